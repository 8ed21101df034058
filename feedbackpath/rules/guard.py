"""Whether a model still is what was untied: asked before each step and each measurement of a path.

A model goes on living after ``untie``: somebody prunes it, gives it a new head, or copies one of its layers.
Errors would then go back through W, or a B that nobody governs, in silence.
"""

import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from feedbackpath.core.layers import UntiedWeight, kind_of
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.core.surgery import retie_module
from feedbackpath.errors import UnconvertedLayerWarning, UntieError, level_outside
from feedbackpath.rules.checks import warn_of_older_copy
from feedbackpath.rules.faults import fault_of, is_other_class, memory_faults
from feedbackpath.rules.replicas import leave_replicas, watch_replicas


class Guard:
    """Notices what has become of a model and its untied weights since ``untie``."""

    def __init__(self, model: nn.Module, weights: Sequence[UntiedWeight]) -> None:
        self._model, self._weights, self._plain = model, list(weights), _plain_layers(model)
        self._shapes, self._sharing = [weight.weight.shape for weight in weights], _sharing_of(weights)
        names = [(weight, name) for weight in weights for name in (weight.weight_name, weight.feedback_name)]
        self._places = [(weight.layer._parameters, name) for weight, name in names]
        self._had_b = [weight.has_feedback for weight in weights]
        self._patched = self._find_patched()
        self._seen = self._look()
        watch_replicas(model)

    def check(self) -> None:
        """See that every untied weight is in its place, and that no layer has joined them.

        Raises:
            UntieError: Says what has changed, and where.

        Warns:
            UnconvertedLayerWarning: Names new layers, through whose weights errors go.
        """
        watch_replicas(self._model)
        warn_of_older_copy(self._model)
        seen = self._look()
        if seen == self._seen:
            return
        if faults := list(self._find_faults()):
            raise UntieError(
                f"{'; '.join(faults[:3])}{'; and others' * (len(faults) > 3)}: the model has changed since "
                "it was untied; path.retie(), and untie it again when it has its final form"
            )
        self._name_newcomers()
        self._seen = seen

    def refuse_other_classes(self) -> None:
        """Refuse to give back plain modules where something has been put on top of the untied ones.

        Raises:
            UntieError: Names the first such module.
        """
        own = {id(weight.layer) for weight in self._weights}
        for name, module in self._model.named_modules():
            if is_other_class(module, is_own=id(module) in own):
                raise UntieError(
                    f"the class of {name!r} was changed to {type(module).__name__} after untie; undo it "
                    "first, as by torch.nn.utils.parametrize.remove_parametrizations, and then retie"
                )

    def release(self) -> None:
        """Let go of the model, and make plain modules of untied layers that were copied into it."""
        leave_replicas(self._model)
        for _, module in self._copies():
            if module.untied.context is not None and not module.untied.context.has_model:
                module.untied.context.close()
                retie_module(module)

    def _look(self) -> tuple[object, ...]:
        """Return what tells in a few microseconds whether more than values has changed."""
        modules: dict[int, int] = {}
        left: list[nn.Module | None] = [self._model]
        while left:
            module = left.pop()
            if module is not None and id(module) not in modules:
                modules[id(module)] = len(module._parameters)
                left.extend(module.children())
        held = [parameters.get(name) for parameters, name in self._places]
        kinds = [(id(type(weight.layer)), "forward" in vars(weight.layer)) for weight in self._weights]
        memory = len({p.data_ptr() for p in held if p is not None and not hasattr(p, "full_tensor")})
        return modules, [(id(p), None if p is None else p.shape) for p in held], kinds, memory

    def _find_faults(self) -> Iterator[str]:
        layers = {id(module) for module in self._model.modules()}
        for weight, shape, had_b in zip(self._weights, self._shapes, self._had_b, strict=True):
            if id(weight.layer) not in layers:
                yield f"{weight.name!r} is no longer in the model"
            elif fault := fault_of(weight, shape, had_b=had_b):
                yield fault
        yield from memory_faults(self._weights)
        for name, _ in self._copies():
            yield f"{name!r} is a copy of an untied layer, or of another path, whose B no rule updates"
        if _sharing_of(self._weights) != self._sharing:
            yield "other weights are shared now than before (load_state_dict(assign=True) can do that)"

    def _copies(self) -> list[tuple[str, FeedbackModule]]:
        """Return the untied layers in the model that are not of this path."""
        own = {id(weight.layer) for weight in self._weights}
        untied = [(name, m) for name, m in self._model.named_modules() if isinstance(m, FeedbackModule)]
        return [(name, module) for name, module in untied if module.untied.weights and id(module) not in own]

    def _find_patched(self) -> set[str]:
        return {weight.name for weight in self._weights if "forward" in vars(weight.layer)}

    def _name_newcomers(self) -> None:
        newcomers = _plain_layers(self._model) - self._plain
        self._plain |= newcomers
        patched = self._find_patched() - self._patched
        self._patched |= patched
        if patched:
            warnings.warn(
                f"the forward of {', '.join(map(repr, sorted(patched)))} was replaced on the object after "
                "untie; unless it calls the earlier forward, errors go back through W there, as in backprop",
                UnconvertedLayerWarning,
                stacklevel=level_outside(),
            )
        if newcomers:
            warnings.warn(
                f"{', '.join(map(repr, sorted(newcomers)))} came into the model after it was untied; errors "
                "go back through the weights there; untie the model after its last layer is in place",
                UnconvertedLayerWarning,
                stacklevel=level_outside(),
            )


def _sharing_of(weights: Sequence[UntiedWeight]) -> list[int]:
    """Return, for each weight, the place of the first that is the same parameter."""
    ids = [id(weight.layer._parameters.get(weight.weight_name, weight)) for weight in weights]
    return [ids.index(one) for one in ids]


def _plain_layers(model: nn.Module) -> set[str]:
    """Return the paths to the layers that own a weight without a feedback weight."""
    plain = set()
    for name, module in model.named_modules():
        untied = module.untied.weights if isinstance(module, FeedbackModule) else ()
        if kind_of(module).weights(module).keys() - {weight.weight_name for weight in untied}:
            plain.add(name)
    return plain
