"""What can have become of an untied weight since ``untie``, in words; ``Guard`` asks."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import FeedbackModule, untied_type


def fault_of(weight: UntiedWeight, shape: torch.Size, *, had_b: bool) -> str | None:
    """Say what is wrong with a weight, of its shape at ``untie``; None: nothing."""
    held, name = weight.layer._parameters, repr(weight.name)
    w, b = held.get(weight.weight_name), held.get(weight.feedback_name)
    if not isinstance(weight.layer, FeedbackModule):
        kind = type(weight.layer).__name__
        return f"the class of {name} was changed to {kind}, which sends errors back through W"
    if w is None or weight.feedback_name not in held:
        lost = weight.weight_name if w is None else weight.feedback_name
        return (
            f"{lost!r} of {name} is no parameter any more (pruning, weight_norm, parametrize compute it "
            "from others)"
        )
    if hasattr(w, "full_tensor"):
        return (
            f"the weight of {name} is sharded over processes (FSDP, tensor parallelism), so "
            "that rules, mirrors and measures would see one part of it; use DistributedDataParallel"
        )
    if b is None and had_b:
        return f"the feedback weight of {name} was taken away"
    is_local = weight.layer.untied.send_back.is_local
    if w.shape != shape or (b is not None and is_local and b.shape != shape):
        now = list(w.shape if b is None else b.shape)
        return f"the weight of {name} had shape {list(shape)}; now W has {list(w.shape)} and B {now}"
    return None


def memory_faults(weights: Sequence[UntiedWeight]) -> Iterator[str]:
    """Name each B that lies in the memory of a W, or of another W's B: what is written to one is in both."""
    held = [(one, one.layer._parameters) for one in weights]
    found = [(one, kept.get(one.weight_name), kept.get(one.feedback_name)) for one, kept in held]
    found = [(one, w, b) for one, w, b in found if w is not None and not hasattr(w, "full_tensor")]
    owners = {w.data_ptr(): 0 for _, w, _ in found}
    for weight, w, b in found:
        if b is not None and b.data_ptr() and owners.setdefault(b.data_ptr(), id(w)) != id(w):
            yield (
                f"the feedback weight of {weight.name!r} lies in the memory of another weight (.data = ..., "
                "or load_state_dict(assign=True) of tensors that share theirs)"
            )


def is_other_class(module: nn.Module, *, is_own: bool) -> bool:
    """Whether something was put on top of an untied module's class, or in its place."""
    if not isinstance(module, FeedbackModule):
        return is_own
    return type(module) is not untied_type(module.plain_type, bool(module.untied.weights))
