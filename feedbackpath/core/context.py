"""What a rule may know about its path: seed, steps, activations, and the parts that rules share."""

import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from feedbackpath.core.layers import UntiedWeight


class Part(Protocol):
    """Something that the rules of one path share, such as mirror mode; made when it is first asked for."""

    def __init__(self, context: "RuleContext") -> None:
        """Belong to a path."""

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""

    def close(self) -> None:
        """Take all hooks off the model."""


P = TypeVar("P", bound=Part)


class RuleContext:
    """What a rule may know of its path.

    Args:
        model: The untied model. It is held by a weak reference: a copy of a layer takes no model along.
        seed: Seed of everything random in the feedback path.
        activations: Glob patterns of layer paths to the activation that follows, as given to ``untie``.

    Attributes:
        seed: The seed.
        steps: How many times ``path.step()`` has been called, including a present call.
        activations: What was given.
        state: What rules have to remember, by the name of the weight: plain values and tensors.
        is_measuring: Whether the model runs to be measured at the moment, and not to be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int = 0,
        activations: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.seed = seed
        self.steps = 0
        self.activations = dict(activations or {})
        self.state: dict[str, dict[str, Any]] = {}
        self.is_measuring = self.writes_apart = False  # the latter: by a chip, in which W and B may differ
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._parts: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    @property
    def model(self) -> nn.Module:
        """The untied model."""
        model = None if self._model is None else self._model()
        if model is None:
            raise RuntimeError("the model of this feedback path no longer exists: keep a reference to it")
        return model

    @property
    def has_model(self) -> bool:
        """Whether this belongs to a path: not that of a layer, or a model, which was copied by itself."""
        return self._model is not None

    def attach(self, model: nn.Module) -> Self:
        """Belong to a model: needed after a path was copied or loaded from a pickle."""
        self._model = weakref.ref(model)
        return self

    def generator(self, weight: UntiedWeight, purpose: str) -> torch.Generator:
        """Return random numbers that depend only on seed, weight, purpose and step.

        They are the same on every process and after a resume.
        """
        key = f"{self.seed}/{purpose}/{self.steps}/{weight.name}/{weight.feedback_name}"
        return generator_of(key, weight.weight.device)

    def part(self, kind: type[P]) -> P:
        """Return the one part of that kind; it is made when it is first asked for."""
        name = kind.__name__
        if name not in self._parts:
            self._parts[name] = kind(self)
            if name in self._loaded:
                self._parts[name].load_state_dict(self._loaded.pop(name))
        return self._parts[name]  # type: ignore[no-any-return]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Say that the model runs to be measured, and not to be trained, for a while."""
        before, self.is_measuring = self.is_measuring, True
        try:
            yield
        finally:
            self.is_measuring = before

    def close(self) -> None:
        """Let all parts take their hooks off the model."""
        for part in self._parts.values():
            part.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beyond the model's own state."""
        parts = self._loaded | {name: part.state_dict() for name, part in self._parts.items()}
        return {"seed": self.seed, "steps": self.steps, "parts": parts, "rules": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state that ``state_dict`` returned.

        The state of a part that is not there yet is kept until it is made. A part that was made after
        ``state`` was taken is let go.
        """
        self.seed, self.steps = state["seed"], state["steps"]
        self.state = {name: dict(values) for name, values in state["rules"].items()}
        self._loaded = dict(state["parts"])
        for name in list(self._parts):
            if name in self._loaded:
                self._parts[name].load_state_dict(self._loaded.pop(name))
            else:
                self._parts.pop(name).close()

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy belong to no model, and have no parts, only their state."""
        return {**self.__dict__, "_model": None, "_parts": {}, "_loaded": self.state_dict()["parts"]}


def generator_of(key: str, device: torch.device) -> torch.Generator:
    """Return random numbers that depend on a key alone, apart from the global ones."""
    return torch.Generator(device).manual_seed(zlib.crc32(key.encode()))
