"""Whose steps are audited: the weights, which of them are absent, and all state that a step may change."""

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from feedbackpath.auditing.copies import are_parallel, by_size, copies_of, holds, things
from feedbackpath.auditing.memory import is_plain, values_of
from feedbackpath.auditing.report import AuditError, Finding
from feedbackpath.auditing.stand_ins import Kind, StandIn, preserve_version, replace
from feedbackpath.auditing.state import leaves, random_state, set_random_state
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.operations import is_matrix
from feedbackpath.layers import LocallyConnected2d
from feedbackpath.path import FeedbackPath

State = dict[str, Any]


class Stateful(Protocol):
    """What a step changes besides the model and its optimizer: a scheduler, a scaler, an average."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Go back to it."""


class Subject:
    """A model with a feedback path, and the optimizers that update it.

    Args:
        model: The model.
        path: Its feedback path; None: it is being made, and ``attach`` will tell.
        stateful: What else a step changes.

    Attributes:
        forward_weights: By name, every weight that has, or will have, a feedback weight.
        others: By name, every other parameter and floating buffer of the model, of its optimizers, and of
            modules that are called besides.
        scales: Names of those of them that are scales, if they multiply signals number by number.
        layer_names: Names of the untied layers, by id.
        renamed: Names of parameters in the model to those of the weights that they turned out to be.
    """

    def __init__(
        self, model: nn.Module, path: FeedbackPath | None, stateful: Sequence[Stateful] = ()
    ) -> None:
        self.model, self.stateful = model, list(stateful)
        self.forward_weights: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        self.scales: set[str] = set()
        self.layer_names: dict[int, str] = {}
        self.renamed: dict[str, str] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self._standing_in: StandIn | None = None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._absent: dict[int, list[Tensor]] = {}
        self._loaded: list[Tensor] = []
        self._begun: dict[str, Tensor] = {}
        self._tensors: list[Tensor] | None = None  # of the whole process
        self._parts = {id(module) for module in model.modules()}
        self._known: set[int] = set()
        self._path: FeedbackPath | None = None
        self._take(model, "")
        if path is not None:
            self.attach(path)

    def attach(self, path: FeedbackPath) -> None:
        """Know the feedback path, and the optimizers there are."""
        self._path = path
        self.layer_names = {id(layer): name for name, layer in path.layers.items()}
        names = {id(tensor): name for name, tensor in self.others.items()}
        for weight in path.weights:
            self.forward_weights[weight.name] = weight.weight
            if id(weight.weight) in names:
                self.renamed[names[id(weight.weight)]] = weight.name
                self._begun[weight.name] = weight.weight.detach().clone()
                self.others.pop(names[id(weight.weight)], None)
            if not weight.is_tied and weight.has_feedback:
                self._known.add(id(weight.feedback))
                self.others.pop(names.get(id(weight.feedback), ""), None)
        mine = {id(parameter) for parameter in self.model.parameters()}
        # One look at all objects, before processes are forked: there it would copy all of Python's memory.
        objects = things()
        if self._standing_in is None:
            self._tensors = [thing for thing in objects if type(thing) in (Tensor, nn.Parameter)]
        self.optimizers = [
            thing
            for thing in objects
            if issubclass(type(thing), torch.optim.Optimizer)
            and any(id(p) in mine for group in thing.param_groups for p in group["params"])
        ]
        extra = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        for number, parameter in enumerate(extra):
            self.add(f"parameter {number} of an optimizer, in no model", parameter)

    @property
    def path(self) -> FeedbackPath:
        """The feedback path."""
        assert self._path is not None
        return self._path

    @property
    def weights(self) -> Sequence[UntiedWeight]:
        """Every W that is untied; none while the path is being made, or where a step has tied them."""
        return [] if self._path is None else [w for w in self._path.weights if "untied" in vars(w.layer)]

    @property
    def feedback_weights(self) -> dict[str, nn.Parameter]:
        """By layer, every B that is a tensor of its own, as it is now."""
        return {w.name: w.feedback for w in self.weights if not w.is_tied and w.has_feedback}

    def _take(self, module: nn.Module, prefix: str) -> None:
        for path, part in module.named_modules(prefix=prefix):
            for name, tensor in _own_tensors(part):
                self.add(f"{path}.{name}".lstrip("."), tensor)
                is_added = name.endswith("bias") and type(part).__module__.startswith("torch.nn")
                if isinstance(tensor, nn.Parameter) and not is_added:
                    self.scales.add(f"{path}.{name}".lstrip("."))

    def add(self, name: str, tensor: Tensor) -> str:
        """Know a parameter or buffer, once; return the name that it got."""
        if id(tensor) in self._known:
            return name
        name = name if name not in self.others else f"{name} ({len(self.others)})"
        self._known.add(id(tensor))
        self.others[name] = tensor
        if self._standing_in is not None:
            kind, uses, present = self._standing_in
            if name in uses and name not in present:
                replace(tensor, kind, torch.Generator().manual_seed(len(self._known)))
        return name

    def strangers(self, tensors: Sequence[Tensor], may_be_data: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield weights of no module among the operands of a product, such as those in a dictionary, by name.

        Args:
            tensors: The operands that are not known.
            may_be_data: Whether those that are no parameters, but require a gradient, may be data that do.
        """
        for tensor in tensors:
            root = tensor if tensor._base is None else tensor._base
            is_parameter = isinstance(root, nn.Parameter)
            if is_parameter or (root.is_leaf and root.requires_grad and not may_be_data):
                kind = "parameter" if is_parameter else "tensor that requires a gradient"
                yield self.add(f"a {kind} of shape {list(root.shape)}, in no module", root), root

    def newcomers(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers of a module that is called and was not known, by name."""
        own = getattr(module, "untied", None)
        feedback = {weight.feedback_name for weight in own.weights} if own is not None else set()
        place = "" if id(module) in self._parts else ", outside the model"
        for name, tensor in _own_tensors(module):
            if id(tensor) not in self._known and name not in feedback:
                yield self.add(f"{type(module).__name__}.{name}{place}", tensor), tensor

    def is_in_model(self, module: nn.Module) -> bool:
        """Whether a module is a part of the model."""
        return id(module) in self._parts

    def weight_named(self, name: str) -> UntiedWeight | None:
        """Return the untied weight of that name."""
        return next((weight for weight in self.weights if weight.name == name), None)

    def layer_named(self, name: str) -> nn.Module:
        """Return the layer of a name that deltas are known by: its own, or that of one of its weights."""
        found = self.path.layers.get(name)
        return next(w.layer for w in self.path.weights if w.name == name) if found is None else found

    @property
    def is_all_zero(self) -> bool:
        """Whether zeros stand in for all forward weights."""
        return self._standing_in is not None and self._standing_in[0] == "zeros"

    def trained(self) -> dict[str, Tensor]:
        """Return every W, and what is trained besides, by name."""
        mine = {id(p) for p in self.model.parameters() if p.requires_grad}
        return self.forward_weights | {name: t for name, t in self.others.items() if id(t) in mine}

    def numbers(self) -> dict[str, int | None]:
        """Return the number of the layer that a parameter is in; None: in no untied layer."""
        numbers = {name: number for number, name in enumerate(self.path.layers)}
        layers = {id(layer): numbers[name] for name, layer in self.path.layers.items()}
        found = {name: _number_of(name, numbers) for name in self.others}
        found |= {weight.name: layers[id(weight.layer)] for weight in self.path.weights}
        return found | {name: found[late] for name, late in self.renamed.items()}

    @staticmethod
    def num_neurons(weight: UntiedWeight) -> int:
        """Return how many outputs W has, channels in a convolution."""
        w = weight.weight
        if isinstance(weight.layer, LocallyConnected2d):
            return w.shape[:3].numel()
        return w.shape[1] * int(weight.layer.groups) if weight.transposed else w.shape[0]

    def optimizer_state(self, parameter: Tensor) -> Iterator[tuple[str, object]]:
        """Yield what optimizers remember of a parameter, by name."""
        for optimizer in self.optimizers:
            yield from leaves("", optimizer.state.get(parameter, {}))

    def refuse_tied(self) -> None:
        """See that the step has not tied what was untied.

        Raises:
            AuditError: It has.
        """
        tied = [name for name, layer in self.path.layers.items() if "untied" not in vars(layer)]
        if tied:
            raise AuditError(
                f"audit: the step ties {tied[0]!r} again, or exchanges it: let it train the model of the "
                "path that is given, as it is"
            )

    @property
    def is_shared(self) -> bool:
        """Whether the model is in memory that processes share: what a forked one writes stays there."""
        tensors: list[Any] = [values_of(t) for t in (*self.model.parameters(), *self.model.buffers())]
        return any(is_plain(tensor) and tensor.is_shared() for tensor in tensors)

    def find_aliases(self) -> list[Finding]:
        """Find every B that is W itself, or lies in the memory of one."""
        places = {w.data_ptr(): name for name, w in self.forward_weights.items()}
        found = [
            Finding(
                name, "weight", "feedback weight", "sharing memory", "untie, or later", "storage", b.numel()
            )
            for name, b in self.feedback_weights.items()
            if b.numel() and b.data_ptr() in places
        ]
        tied = {weight.name: weight.weight for weight in self.weights if weight.is_tied}
        return found + [
            Finding(name, "weight", "feedback weight", "being W itself", "untie", "storage", w.numel())
            for name, w in tied.items()
        ]

    def find_equals(self, read: Container[str]) -> list[Finding]:
        """Find every B that is what W was when it was untied, though W has not been read: by W's own seed.

        Only from ``untie`` on is it known what has been read.
        """
        return [
            Finding(name, "weight", "feedback weight", "being made as W was", "build", "storage", b.numel())
            for name, b in self.feedback_weights.items()
            if name in self._begun and name not in read and by_size([b])
            if are_parallel(b, self._begun[name])
        ]  # fmt: skip

    def declared(self, used: Mapping[str, int]) -> dict[str, int]:
        """Add up scalars by the kind of layer that they belong to: ``BatchNorm scale``."""
        kinds: dict[str, int] = {}
        modules = dict(self.model.named_modules())
        for name in self.scales & used.keys():
            if name in self.others:
                owner, _, own = name.rpartition(".")
                is_batch_norm = isinstance(modules[owner], nn.modules.batchnorm._NormBase)
                kind = "BatchNorm scale" if is_batch_norm else f"{type(modules[owner]).__name__} {own}"
                kinds[kind] = kinds.get(kind, 0) + self.others[name].numel()
        return dict(sorted(kinds.items()))

    def stand_in(self, kind: Kind, uses: dict[str, int], present: frozenset[str]) -> None:
        """Replace forward weights, whatever else multiplies activities, and all copies of them.

        Args:
            kind: What stands in for them.
            uses: Names of parameters and buffers that multiply activities.
            present: Names of those that are left as they are.
        """
        self._standing_in = kind, uses, present
        names = [*self.forward_weights, *(name for name in self.others if name in uses)]
        absent = [self.forward_weights.get(n, self.others.get(n)) for n in names if n not in present]
        tensors, self._tensors = self._tensors, None  # not to keep in memory what steps let go of
        weights = [weight for weight in absent if weight is not None]
        staying = [weight for name, weight in self.forward_weights.items() if name in present]
        others = list(self.feedback_weights.values())  # a copy of such a B may be taken for one of W
        self._copies = [(c, c.detach().clone()) for c in copies_of(weights, others, staying, tensors)]
        told = [w for w in weights if not any(b.numel() == w.numel() and holds(b, w) for b in others)]
        self._absent = {size: [w.clone() for w in found] for size, found in by_size(told).items()}
        generator = torch.Generator().manual_seed(1)
        for tensor in [*weights, *(tensor for tensor, _ in self._copies)]:
            replace(tensor, kind, generator)

    @property
    def misses_weights(self) -> bool:
        """Whether stand-ins are in the places of weights."""
        return bool(self._absent)

    def load(self, name: str, tensor: Tensor) -> bool:
        """Let what is about to be written into a weight, from outside, be absent if the weight is.

        Returns:
            Whether a B holds the same, or a multiple of it.
        """
        known = self._absent.get(tensor.numel(), [])
        is_absent = self._standing_in is not None and name not in self._standing_in[2]
        if not is_absent or not by_size([tensor]) or any(holds(tensor, weight) for weight in known):
            return False
        self._loaded.append(tensor.detach().clone())
        self._absent.setdefault(tensor.numel(), []).append(self._loaded[-1])
        return any(are_parallel(b, tensor) for b in self.feedback_weights.values())

    def is_loaded(self, tensor: Tensor) -> bool:
        """Whether a tensor holds what was written into an absent weight."""
        return any(w.numel() == tensor.numel() and holds(tensor, w) for w in self._loaded)

    def stand_in_for_copy(self, tensor: Tensor) -> None:
        """Replace a tensor that has come from outside, if it holds what an absent weight held."""
        self._stand_in_for(tensor, holds)

    def stand_in_for_draw(self, tensor: Tensor) -> None:
        """Replace random numbers that an absent weight was made of, if to another scale."""
        self._stand_in_for(tensor, are_parallel)

    def _stand_in_for(self, tensor: Tensor, is_alike: Callable[[Tensor, Tensor], bool]) -> None:
        for weight in self._absent.get(tensor.numel(), ()):
            if tensor.is_floating_point() and is_plain(tensor) and is_alike(tensor, weight):
                self._copies.append((tensor, tensor.detach().clone()))
                assert self._standing_in is not None
                replace(tensor, self._standing_in[0], torch.Generator().manual_seed(1))
                return

    @torch.no_grad()
    def put_back(self, start: Mapping[str, Tensor]) -> list[str]:
        """Make the model what it was; return what had changed but for matrices that are parameters."""
        changed = []
        for name, value in start.items():
            tensor = self.others.get(name)
            if tensor is None or tensor.shape != value.shape or not torch.equal(tensor, value):
                if not (isinstance(tensor, nn.Parameter) and is_matrix(value)):
                    changed.append(name)
                if tensor is not None and tensor.shape == value.shape:
                    with preserve_version(tensor):
                        tensor.copy_(value)
        return changed

    # State, for where no process of its own can be had

    @torch.no_grad()
    def save(self) -> State:
        """Return a copy of everything that a step may change."""
        modules = list(self.model.modules())
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.others.values()]
        return {
            "modules": [(m, dict(m._parameters), dict(m._buffers), m.training) for m in modules],
            "values": [(t, t.data, t.detach().clone(), copy.deepcopy(t.grad)) for t in tensors],
            "path": copy.deepcopy(self.path.state_dict()),
            "stateful": [copy.deepcopy(part.state_dict()) for part in self.stateful],
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
            "random": random_state(),
        }

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go back to a saved state."""
        self._standing_in, self._absent, self._loaded = None, {}, []
        for copied, value in self._copies:
            copied.copy_(value)
        for module, parameters, buffers, is_training in state["modules"]:
            vars(module).update(_parameters=dict(parameters), _buffers=dict(buffers), training=is_training)
        for tensor, data, value, gradient in state["values"]:
            with preserve_version(tensor):
                if values_of(tensor).data_ptr() != values_of(data).data_ptr():
                    tensor.data = data
                tensor.copy_(value)
            tensor.grad = copy.deepcopy(gradient)
        self.path.load_state_dict(copy.deepcopy(state["path"]))
        for part, value in zip(self.stateful, state["stateful"], strict=True):
            part.load_state_dict(copy.deepcopy(value))
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(value))
        set_random_state(state["random"])


def _number_of(name: str, numbers: Mapping[str, int]) -> int | None:
    """Return the number of the innermost layer that a parameter lies in, as its name tells."""
    while name:
        name = name.rpartition(".")[0]
        if name in numbers:
            return numbers[name]
    return None


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return ((name, tensor) for name, tensor in own if tensor.is_floating_point())
