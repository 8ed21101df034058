"""An untied module: the class that it had, with a forward pass that is watched.

The class of a module is exchanged in place. Parameters, hooks, buffers, sharing and identity stay, and the
module runs its own forward pass. Layers get their feedback weights as parameters; modules above them are
watched as well, for they may read a layer's weight by themselves.
"""

import copyreg
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from feedbackpath.arguments import two_gradients
from feedbackpath.core import pytorch
from feedbackpath.core.context import RuleContext
from feedbackpath.core.exchange import RUNNING, Exchange, watch
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.operations import Args, Kwargs
from feedbackpath.core.sendback import LOCAL, SendBack, broadcast_error
from feedbackpath.core.usage import is_plain

Tap = Callable[[UntiedWeight, Tensor, Tensor, slice], None]
State = dict[str, Any]


@dataclass
class Untied:
    """What an untied module knows of its feedback path; copied and pickled with it.

    Attributes:
        weights: Its own untied weights.
        below: Those of all modules in it, its own included.
        rule: The rule of its own weights.
        context: What that rule may know.
        send_back: Who carries the error to its input.
        is_tied: Whether B is W itself.
        is_quiet: Whether its code takes up no weight but inside the layer that owns it.
        is_watched: Whether its forward pass may let a weight meet activity, or has to lead a broadcast.
        short: Runs it without watching it, where it can; returns None where it cannot.
        taps: Called with (weight, input, output, rows of W) when a weight of its meets activity; not copied.
        tells_rule: Whether its rule is told of errors as they arrive.
        memo: What its rule keeps with it.
    """

    weights: list[UntiedWeight] = field(default_factory=list)
    below: list[UntiedWeight] = field(default_factory=list)
    rule: Any = None
    context: RuleContext | None = None
    send_back: SendBack = LOCAL
    is_tied: bool = False
    is_quiet: bool = False
    is_watched: bool = False
    short: Callable[[Any, Args, Kwargs], Any] | None = None
    taps: tuple[Tap, ...] = ()
    tells_rule: bool = False
    memo: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> State:
        """Let those who listen to a module not listen to its copies."""
        return {**self.__dict__, "taps": ()}

    def gradients_of(self, weight: UntiedWeight) -> Callable[[Tensor], tuple[Tensor, Tensor | None]] | None:
        """Return what the rule makes of an outer product; None: W and B get it as it is."""
        if self.rule is None or self.rule.gradients is None:
            return None
        return lambda product: two_gradients(self.rule, weight, product, self.context)

    def make_feedback(self, weight: UntiedWeight, shape: torch.Size) -> None:
        """Make a B whose shape shows when the model first runs, and let its rule fill it."""
        if getattr(weight.layer, weight.feedback_name) is None:
            w = weight.weight
            b = nn.Parameter(w.new_empty(shape), requires_grad=self.rule.learns and w.requires_grad)
            weight.layer.register_parameter(weight.feedback_name, b)
            self.rule.start([weight], self.context)


class FeedbackModule(nn.Module):
    """What every untied module has in common; mixed into the class that it had.

    Attributes:
        plain_type: The class that the module had, and gets back.
        untied: What it knows of its feedback path.
    """

    plain_type: ClassVar[type[nn.Module]]
    untied: Untied = Untied()  # of a module that was built from such a class, and not untied: it does nothing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward pass, and send errors back through feedback weights."""
        untied, running = self.untied, RUNNING
        forward = super().forward
        is_watched = untied.is_watched or untied.taps or nn.Parameter in map(type, (*args, *kwargs.values()))
        if running.is_off or not is_watched or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        is_traced = pytorch.is_traced()
        exchange = running.traced if is_traced and torch.compiler.is_compiling() else running.exchange
        short = None if untied.taps or is_traced or running.is_backprop else untied.short
        if short is not None and not torch.is_autocast_enabled(untied.weights[0].weight.device.type):
            if exchange is not None:
                exchange.is_aside = True
            try:
                output = short(self, args, kwargs)
            finally:
                if exchange is not None:
                    exchange.is_aside = False
            if output is not None:
                return output
        send_back = LOCAL if running.is_backprop else untied.send_back
        if exchange is not None:
            exchange.learn(untied.weights)
            return send_back.run(self, forward, args, kwargs, exchange)
        exchange = Exchange(untied.below, self)
        output = watch(send_back.run, (self, forward, args, kwargs, exchange), exchange)
        return broadcast_error(output, exchange.deliveries)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a module that is given something new has to be watched from then on."""
        if self.untied.is_quiet and name != "untied" and not is_plain(value):
            self.untied.is_quiet, self.untied.is_watched = False, True
        super().__setattr__(name, value)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters, and note whether somebody stops after as many as the plain module has."""
        feedbacks = {id(w.layer._parameters.get(w.feedback_name)) for w in self.untied.below}
        named, done = list(super().named_parameters(*args, **kwargs)), 0
        plain = sum(id(parameter) not in feedbacks for _, parameter in named)
        try:
            for done, one in enumerate(named, 1):  # noqa: B007
                yield one
        finally:
            if 1 < plain <= done <= plain + 1 and done < len(named):
                self.untied.memo["paired"] = True

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state as torch does, feedback weights last."""
        state = super().state_dict(*args, **kwargs)
        last = {weight.feedback_name for weight in self.untied.below}
        for key in [key for key in state if key.rpartition(".")[2] in last]:
            state[key] = state.pop(key)
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class: this one is made when it is needed."""
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_make_empty, (self.plain_type, bool(self.untied.weights)), *reduced[2:])

    def __setstate__(self, state: State) -> None:
        """Take up what was copied or loaded; hooks on parameters are made anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach()

    def _attach(self) -> None:
        if self.untied.weights and self.untied.rule is not None:
            self.untied.rule.attach(self.untied.weights, self.untied.context)

    def _load_from_state_dict(
        self, state_dict: State, prefix: str, local_metadata: State, strict: bool, *lists: list[str]
    ) -> None:
        """Load as torch does; a plain module's state has no feedback weights, and B then stays as it is."""
        missing = lists[0]
        for weight in self.untied.weights:
            saved = state_dict.get(prefix + weight.feedback_name)
            if saved is not None and getattr(self, weight.feedback_name) is None and not self.untied.is_tied:
                self.untied.make_feedback(weight, saved.shape)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        for weight in self.untied.weights:
            if prefix + weight.feedback_name in missing:
                missing.remove(prefix + weight.feedback_name)
                if weight.has_feedback:  # W that was assigned may be of another precision, or elsewhere
                    weight.feedback.data = weight.feedback.data.to(weight.weight)
        if local_metadata.get("assign_to_params_buffers"):
            self._attach()


_UNTIED_TYPES: dict[tuple[type[nn.Module], bool], type[FeedbackModule]] = {}


def untied_type(plain: type[nn.Module], owns_weights: bool) -> type[FeedbackModule]:
    """Return the class of an untied module: one for each class. Only a layer's name says so."""
    key = plain, owns_weights
    if key not in _UNTIED_TYPES:
        name = f"Feedback{plain.__name__}" if owns_weights else plain.__name__
        shared: Any = FeedbackModule.forward  # copied for each class: others look up its signature
        own = type(shared)(shared.__code__, shared.__globals__, "forward", None, shared.__closure__)
        own.__signature__ = inspect.signature(plain.forward)
        body = {"plain_type": plain, "plain_forward": plain.forward, "forward": own}
        body |= {"__module__": plain.__module__, "__doc__": plain.__doc__}
        _UNTIED_TYPES[key] = cast(type[FeedbackModule], type(name, (FeedbackModule, plain), body))
    return _UNTIED_TYPES[key]


def _make_empty(plain: type[nn.Module], owns_weights: bool) -> FeedbackModule:
    return (kind := untied_type(plain, owns_weights)).__new__(kind)


@contextmanager
def tapped(layers: Iterable[nn.Module], tap: Tap) -> Iterator[None]:
    """Let layers show their signals to a tap for a while."""
    chosen = [layer.untied for layer in layers if isinstance(layer, FeedbackModule)]
    before = [untied.taps for untied in chosen]
    try:
        for untied in chosen:
            untied.taps = (*untied.taps, tap)
        yield
    finally:
        for untied, taps in zip(chosen, before, strict=True):
            untied.taps = taps
