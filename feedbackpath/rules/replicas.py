"""What all processes of a job have to have alike: B that learns, and how far the rules have come.

DistributedDataParallel sends what the first process has to all others when it wraps a model. It knows nothing
of a path, and leaves out each B that learns (``feedbackpath.rules.shared_reduction``). When it first runs the
model, those are sent as well: a checkpoint that the first process alone has loaded then counts for all. When
``join`` ends, it sends them with W, from the last process that had a batch.
"""

import functools
from typing import Any

import torch
from torch import nn

from feedbackpath.core import pytorch
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.errors import RuleError, UntieError

KNOWN = "_feedbackpath_models"  # where a DistributedDataParallel keeps the models that were begun alike


def running_ddp() -> Any:
    """Return the DistributedDataParallel whose forward pass is running; fallback: None."""
    if not pytorch.has_processes():
        return None
    return getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def watch_replicas(model: Any) -> None:
    """See to an untied model whenever it runs, if this process is one of several."""
    memo = model.untied.memo
    _see_wrapping()
    if pytorch.has_processes() and "replicas" not in memo:
        memo["replicas"] = model.register_forward_pre_hook(begin_alike)


def leave_replicas(model: Any) -> None:
    """Let a model run unseen again."""
    if (handle := model.untied.memo.pop("replicas", None)) is not None:
        handle.remove()


def begin_alike(model: Any, _: Any) -> None:
    """Give all processes what the first has, before DistributedDataParallel runs a model for the first time.

    Raises:
        UntieError: The model was sharded after it was untied.
        RuleError: Processes may take different numbers of steps, and a rule mirrors after each.
    """
    if torch.compiler.is_compiling():
        return
    weights: list[UntiedWeight] = model.untied.below
    ddp = running_ddp()
    if ddp is None:
        sharded = [repr(weight.name) for weight in weights if hasattr(weight.weight, "full_tensor")]
        if sharded:
            raise UntieError(
                f"the weights of {', '.join(sharded)} were sharded over processes after untie, and their "
                "feedback weights were not: use DistributedDataParallel"
            )
        return
    if ddp._join_config.enable:
        _refuse_to_join(weights)
    known = vars(ddp).setdefault(KNOWN, set())
    if not torch.is_grad_enabled() or not ddp.require_backward_grad_sync or id(model) in known:
        return
    known.add(id(model))
    if not ddp._join_config.enable:  # a process without a first batch would be waited for
        _send(list(_learning(weights).values()), weights, ddp.process_group)


def _learning(weights: list[UntiedWeight]) -> dict[int, nn.Parameter]:
    """Return each B that learns, by id."""
    return {id(w.feedback): w.feedback for w in weights if w.has_feedback and w.feedback.requires_grad}


def _send(feedbacks: list[nn.Parameter], weights: list[UntiedWeight], group: Any) -> None:
    first = torch.distributed.get_global_rank(group, 0)
    for feedback in feedbacks:
        torch.distributed.broadcast(feedback.detach(), first, group=group)
    for context in {
        id(weight.layer.untied.context): weight.layer.untied.context for weight in weights
    }.values():
        state = [context.state_dict()]
        torch.distributed.broadcast_object_list(state, first, group=group)
        if torch.distributed.get_rank() != first:
            context.load_state_dict(state[0])


def _refuse_to_join(weights: list[UntiedWeight]) -> None:
    if names := [w.name for w in weights if _mirrors_at_steps(w)]:
        raise RuleError(
            f"DistributedDataParallel.join lets processes take different numbers of steps, and {names[0]!r} "
            "is mirrored by steps, so B would differ between them: give each process the same number of "
            "batches (drop_last=True)"
        )


def _mirrors_at_steps(weight: UntiedWeight) -> bool:
    """Whether a weight is mirrored again and again: not at all, or once, before training, does no harm."""
    rule = weight.layer.untied.rule
    mirrors_once = hasattr(rule, "start_angle_deg") and getattr(rule, "every", None) is None
    return getattr(rule, "mirror", None) is not None and not mirrors_once


@functools.cache
def _see_wrapping() -> None:
    """See each DistributedDataParallel as it wraps a model: a process without any batch never runs one."""
    if torch.distributed.is_available():
        nn.modules.module.register_module_module_registration_hook(_join_alike)


def _join_alike(owner: nn.Module, name: str, model: Any) -> None:
    if name == "module" and isinstance(owner, nn.parallel.DistributedDataParallel) and _below(model):
        vars(owner)["join_hook"] = functools.partial(_JoinAlike, owner)


def _below(model: nn.Module | None) -> list[UntiedWeight]:
    parts = () if model is None else model.modules()
    return [weight for part in parts if isinstance(part, FeedbackModule) for weight in part.untied.weights]


class _JoinAlike:
    """DistributedDataParallel's own join hook, which at its end sends each B that learns beside W."""

    def __init__(self, ddp: Any, **settings: Any) -> None:
        self._ddp, self._own = ddp, type(ddp).join_hook(ddp, **settings)

    def main_hook(self) -> None:
        """Answer what processes that still have batches send; this one has none left."""
        _refuse_to_join(_below(self._ddp.module))
        self._own.main_hook()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Give all processes what the last one has."""
        ddp, ignored = self._ddp, self._ddp.parameters_to_ignore
        learning = _learning(_below(ddp.module))
        names = {name for name, parameter in ddp.module.named_parameters() if id(parameter) in learning}
        ddp.parameters_to_ignore = ignored - names
        try:
            self._own.post_hook(is_last_joiner)
        finally:
            ddp.parameters_to_ignore = ignored
