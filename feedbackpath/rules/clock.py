"""How far Kolen-Pollack learning gets in a run: the e-folds by which W - B shrinks.

Equations 16 and 17 of Akrout et al. 2019 leave ``W - B`` to weight decay alone. With learning rate lr_t,
decay wd and momentum mu, a run of N steps shrinks it by e to the power of::

    sum over t of lr_t wd (1 - dampening) / (1 - mu)       SGD, whose decay is a part of the gradient
    sum over t of lr_t wd                                  AdamW and others whose decay is decoupled

Three e-folds leave 5% of what W and B differ by at first.

The sum for SGD is of first order. It holds while lr wd is well below (1 - sqrt(mu))^2, 0.0026 at a momentum
of 0.9. Beyond, W - B oscillates, and no step divides it by more than 1 / sqrt(mu).
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.errors import KolenPollackWarning, RuleError, level_outside

LEAST_EFOLDS = 3.0
Schedule = LRScheduler | Callable[[int], float] | None


def count_efolds(
    groups: Sequence[tuple[Any, Sequence[UntiedWeight]]],
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: Schedule = None,
) -> dict[str, float]:
    """Count the e-folds of a run for every B that Kolen-Pollack learning governs; see the equation above.

    Args:
        groups: Rules, and the weights that each governs.
        optimizer: SGD, or one with decoupled decay.
        steps: N, the updates that are still to come.
        schedule: What sets the learning rate: one of torch's schedulers that is stepped after each update
            (it is left as it was), or a function from the update's number, from 0, to the rate of all
            groups. None: rates stay as they are.

    Returns:
        E-folds by the weight's name; empty under rules without this decay.

    Raises:
        RuleError: ``steps`` is no count, or the e-folds of this optimizer or schedule cannot be told.

    Warns:
        KolenPollackWarning: Names the weights with fewer than three, and what to do; not those whose B was
            mirrored first.

    Example:
        >>> import feedbackpath as fp
        >>> model = torch.nn.Linear(3, 2)
        >>> path = fp.untie(model, "kp")
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        >>> {name: round(efolds, 1) for name, efolds in path.check_optimizer(sgd, steps=5000).items()}
        {'': 5.0}
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RuleError(f"check_optimizer: steps must be a whole number of at least 1, not {steps!r}")
    places = {id(p): at for at, group in enumerate(optimizer.param_groups) for p in group["params"]}
    slow = {
        weight.name: (places[id(weight.weight)], rule.needs_decay)
        for rule, weights in groups
        for weight in weights
        if hasattr(rule, "needs_decay") and weight.has_feedback and id(weight.weight) in places
    }
    if not slow:
        return {}
    totals = [0.0] * len(optimizer.param_groups)
    for settings in _settings_of_run(optimizer, steps, schedule):
        for at in {at for at, _ in slow.values()}:
            totals[at] += _efolds_of_step(optimizer, settings[at])
    efolds = {name: totals[at] for name, (at, _) in slow.items()}
    short = {name: count for name, count in efolds.items() if slow[name][1] and count < LEAST_EFOLDS}
    if short:
        warnings.warn(
            f"Kolen-Pollack: in {steps} steps W - B shrinks by {min(short.values()):.2g} e-folds in "
            f"{', '.join(map(repr, short))}, fewer than {LEAST_EFOLDS:g}: B will still differ from "
            "W; mirror once (rule mirror-kp), train longer, or decay more",
            KolenPollackWarning,
            stacklevel=level_outside(),
        )
    return efolds


def _efolds_of_step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    decay = float(group["lr"]) * float(group.get("weight_decay", 0.0))
    if isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
        return decay
    if isinstance(optimizer, torch.optim.SGD):
        return decay * (1.0 - float(group["dampening"])) / (1.0 - float(group["momentum"]))
    raise RuleError(
        f"check_optimizer: the e-folds of {type(optimizer).__name__} cannot be computed, because its decay "
        "depends on gradients; use SGD or AdamW, or leave steps= out"
    )


def _settings_of_run(
    optimizer: torch.optim.Optimizer, steps: int, schedule: Schedule
) -> Iterator[list[dict[str, Any]]]:
    """Yield the settings of every parameter group at each update."""
    plain = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if not isinstance(schedule, LRScheduler):
        for step in range(steps):
            yield plain if schedule is None else [{**group, "lr": schedule(step)} for group in plain]
        return
    if schedule.optimizer is not optimizer:
        raise RuleError("check_optimizer: the schedule belongs to another optimizer; pass that one")
    kept, state = copy.deepcopy(plain), copy.deepcopy(schedule.state_dict())
    try:
        for _ in range(steps):
            yield list(optimizer.param_groups)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch expects updates in between
                schedule.step()
    except (TypeError, ValueError) as error:
        raise RuleError(
            f"check_optimizer: {type(schedule).__name__} cannot be simulated for {steps} steps ({error}); "
            "pass a function from the step's number to the learning rate"
        ) from None
    finally:
        schedule.load_state_dict(state)
        for group, settings in zip(optimizer.param_groups, kept, strict=True):
            group.update(settings)
