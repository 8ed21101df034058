"""Kolen-Pollack under Adam and AdamW: the moments of W and B are kept once, as long as they are the same.

Adam keeps two numbers for each value of a parameter (Kingma & Ba 2015, Algorithm 1)::

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2

W and B have the same gradient g (Akrout et al. 2019, equations 16 and 17). Where weight decay is decoupled
from it (Loshchilov & Hutter 2019, AdamW), their moments are the same numbers too. So the optimizer updates
W alone, and B then moves by the same moments, in the optimizer's own arithmetic. Beyond plain PyTorch that
takes B's own memory, and not three times as much.

Between steps the optimizer has state of B as of any parameter: copies of W's that take memory only when
somebody writes to one of the two. So checkpoints, copies and audits see what they would see of separate
moments, and training can continue without this module.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from feedbackpath.core.pytorch import share
from feedbackpath.errors import RuleError
from feedbackpath.rules.base import Weights

Group = dict[str, Any]
State = dict[str, Any]
# Where a tensor lies, without a copy being made of one that shares its memory. Fallback: values are compared.
_address_of: Callable[[Tensor], int] = getattr(torch._C, "_data_address", id)


class Path(Protocol):
    """What is asked of a feedback path."""

    @property
    def groups(self) -> Sequence[tuple[Any, Weights]]:
        """Rules, each with the weights that it governs."""


class Pair(NamedTuple):
    """A forward weight and its feedback weight."""

    w: Any
    b: Any


def share_moments(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Keep one set of moments for W and B, if B learns from the same gradients.

    Training stays the same: bit for bit, or to rounding if the optimizer is fused. If W and B have different
    gradients in a step, they have separate moments from then on.

    Args:
        path: The feedback path.
        optimizer: ``torch.optim.Adam`` or ``AdamW``, made after ``untie``; at any time, before training or
            after a checkpoint was loaded.

    Raises:
        RuleError: Nothing can be shared; the message says why.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Linear(3, 2)
        >>> path = fp.untie(model, "kp")
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> fp.share_moments(path, optimizer)
    """
    if (why := why_apart(path, optimizer)) is not None:
        raise RuleError(f"share_moments: {why}")
    for rule, weights in path.groups:
        rule.check_optimizer(weights, optimizer)
    _SharedMoments(_pairs_of(path)).attach(optimizer)


def why_apart(path: Path, optimizer: torch.optim.Optimizer) -> str | None:
    """Say why the moments of W and B have to be kept apart; None: they can be shared."""
    if not _pairs_of(path):
        return "no B gets W's gradient as it is; it serves kp and mirror-kp at feedback_rate 1"
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return f"{type(optimizer).__name__} is neither torch.optim.Adam nor AdamW: B keeps moments of its own"
    return next(filter(None, map(_why_group_apart, optimizer.param_groups)), None)


def _why_group_apart(group: Group) -> str | None:
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        return "an L2 penalty in the gradient makes the moments of W and B differ: use AdamW"
    is_traced = group["capturable"] or group["differentiable"]
    if is_traced or any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"])):
        return "an optimizer that is capturable, differentiable or has tensors for settings is not served"
    return None


def _pairs_of(path: Path) -> list[Pair]:
    return [
        Pair(weight.weight, weight.feedback)
        for rule, weights in path.groups
        if rule.learns and rule.gradients is None and rule.send_back.is_local
        for weight in weights
        if weight.weight.requires_grad
    ]


class _SharedMoments:
    """Lets an optimizer update W, and then moves B; the optimizer's hooks keep it.

    What other hooks do to gradients comes before it, and what they do after a step finds B moved.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self._pairs = {id(pair.b): pair for pair in pairs}
        self._taken: list[Pair] = []
        self._before: RemovableHandle

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Be the last of the hooks before a step, and the first after it."""
        self._before = optimizer.register_step_pre_hook(self.before_step)
        after = optimizer.register_step_post_hook(self.after_step)
        _hooks_of(after).move_to_end(after.id, last=False)

    def before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take B out of a step; where a closure computes the gradients, after that."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if next(reversed(_hooks_of(self._before))) != self._before.id:
            self._put_back(optimizer.state)
            return None  # a newer hook may change gradients: this step is the optimizer's alone
        if closure is None:
            self._take(optimizer)
            return None

        def compute() -> Any:
            loss = closure()
            self._take(optimizer)
            return loss

        return (optimizer, compute), {}

    @torch.no_grad()
    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Move each B that was taken out as its W was moved, and put it back."""
        state, taken = optimizer.state, self._taken
        of_b = _groups_of(optimizer) if taken else {}
        steps = torch.stack([state[pair.w]["step"] for pair in taken]).tolist() if taken else []
        for group in optimizer.param_groups:
            due = [(pair, n) for pair, n in zip(taken, steps, strict=True) if of_b[id(pair.b)] is group]
            is_default = group["foreach"] is None and not group["fused"]
            if due and (group["foreach"] or (is_default and due[0][0].b.is_cuda)):
                _move_at_once([p.b for p, _ in due], [state[p.w] for p, _ in due], [n for _, n in due], group)
            else:
                for pair, number in due:
                    _move(pair.b, state[pair.w], number, group)
        for pair in taken:
            pair.b.grad = share(pair.w.grad)
        self._put_back(state)
        _hooks_of(self._before).move_to_end(self._before.id)

    @torch.no_grad()
    def _take(self, optimizer: Any) -> None:
        self._put_back(optimizer.state)  # those of a step that failed
        if getattr(optimizer, "found_inf", None) is not None:
            return  # a scaler leaves it to the fused kernel whether there is an update at all
        groups = _groups_of(optimizer)
        held = [pair for pair in self._pairs.values() if id(pair.w) in groups and id(pair.b) in groups]
        due = [pair for pair in held if pair.w.grad is not None or pair.b.grad is not None]
        for pair, is_same in zip(due, _agree([_compared(p, optimizer.state) for p in due]), strict=True):
            if is_same and _are_alike(groups[id(pair.w)], groups[id(pair.b)]):
                self._taken.append(pair)
                pair.b.grad = None  # a fused optimizer may write to W's, which must not be copied then
                optimizer.state.pop(pair.b, None)
            else:
                del self._pairs[id(pair.b)]

    @torch.no_grad()
    def _put_back(self, state: Any) -> None:
        """Give each B that was taken out a state that takes no memory until it, or W's, is written to."""
        for pair in self._taken:
            for key, value in state[pair.w].items():
                if type(value) is Tensor and not value.untyped_storage().resizable():
                    state[pair.w][key] = value.clone()  # loaded memory cannot be shared
            state[pair.b] = {key: share(value) for key, value in state[pair.w].items()}
        self._taken.clear()


def _hooks_of(handle: RemovableHandle) -> Any:
    """Return the hooks of which one is a handle's, in their order."""
    return handle.hooks_dict_ref()


def _groups_of(optimizer: torch.optim.Optimizer) -> dict[int, Group]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _are_alike(of_w: Group, of_b: Group) -> bool:
    """Whether the moments of W and B follow from the gradients alike, by the settings that hold now."""
    same = all(of_w[key] == of_b[key] for key in ("betas", "eps", "amsgrad", "maximize"))
    return same and _why_group_apart(of_w) is None and _why_group_apart(of_b) is None


def _compared(pair: Pair, state: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Return what has to be equal for W and B to move alike; None: they do not."""
    of_w, own = state.get(pair.w, {}), state.get(pair.b, {})
    if pair.w.grad is None or pair.b.grad is None or of_w.keys() != own.keys():
        return None
    return [(pair.w.grad, pair.b.grad), *[(of_w[key], own[key]) for key in of_w]]


def _agree(compared: list[list[tuple[Tensor, Tensor]] | None]) -> list[bool]:
    """Say of each list whether its tensors are equal, pair by pair, with one message from the device."""
    differ, places = [], []
    for place, pairs in enumerate(compared):
        for one, other in pairs or ():
            if _address_of(one) != _address_of(other) or one.stride() != other.stride():
                differ.append((one != other).any())
                places.append(place)
    found = torch.stack([x.to(differ[0].device) for x in differ]).tolist() if differ else []
    apart = {place for place, differs in zip(places, found, strict=True) if differs}
    return [pairs is not None and place not in apart for place, pairs in enumerate(compared)]


def _move(b: Tensor, of_w: State, step: float, group: Group) -> None:
    """Do what Adam does to a parameter once it has the moments, in the order in which torch does it."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if group["weight_decay"]:
        b.mul_(1 - lr * group["weight_decay"])
    square = of_w["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    root = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    b.addcdiv_(of_w["exp_avg"], root, value=-(lr / (1 - beta1**step)))


def _move_at_once(bs: list[Tensor], of_ws: list[State], steps: list[float], group: Group) -> None:
    """Do the same to many, as an optimizer with ``foreach`` does."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if group["weight_decay"]:
        torch._foreach_mul_(bs, 1 - lr * group["weight_decay"])
    roots = torch._foreach_sqrt([s["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"] for s in of_ws])
    torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(roots, group["eps"])
    means, sizes = [of_w["exp_avg"] for of_w in of_ws], [-(lr / (1 - beta1**step)) for step in steps]
    torch._foreach_addcdiv_(bs, means, list(roots), sizes)
