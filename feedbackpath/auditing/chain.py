"""One pass through the steps: what layers answer is recorded, or held while W is absent.

Every operator is watched, below autograd. Where a layer's own forward map meets a signal, the output goes to
a tape in the first pass, and comes from it in later ones, if the signal is the one that it was. Nothing else
is held: whatever W does on any other way shows in the deltas, in a B, or in an optimizer's state of one.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from feedbackpath.auditing import operators as ops
from feedbackpath.auditing.constants import Constants
from feedbackpath.auditing.deltas import wait_for_error, watch
from feedbackpath.auditing.ledger import ACTIVITY, CONSTANT, FEEDBACK, UNKNOWN, Ledger, Made, join
from feedbackpath.auditing.memory import copy_of, unwrapped, values_of
from feedbackpath.auditing.record import UPDATE, Entry, Record, Tape, digest_of
from feedbackpath.auditing.subject import Subject
from feedbackpath.auditing.traces import Traces
from feedbackpath.core import pytorch
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.modules import tapped
from feedbackpath.core.operations import is_matrix
from feedbackpath.core.products import multiply
from feedbackpath.mirror.passage import LISTENERS
from feedbackpath.path import FeedbackPath


class Chain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the steps once.

    Args:
        subject: Whose steps they are.
        tape: What layers answered in the first pass; None: this is the first.

    Attributes:
        record: What this pass leaves.
    """

    watches = True

    def __init__(self, subject: Subject, tape: Sequence[Entry] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.subject, self.record = subject, Record()
        self._tape = None if tape is None else Tape(tape)
        self._ledger = Ledger()
        self._is_aside = False
        self._modules: list[nn.Module] = []
        self._passages: list[tuple[tuple[Tensor, ...], bool]] = []
        self._known_calls: dict[tuple[Any, ...], Entry] = {}
        self._probes: dict[str, int] = {}
        self._doubted: list[Entry] = []
        self._traces = Traces(self._ledger, self.record, subject)
        self._constants = Constants(subject.model, self.record)
        self._stack = ExitStack()

    def begin(self) -> None:
        """Watch from here on."""
        stack = self._stack
        LISTENERS.append(self)
        stack.callback(LISTENERS.remove, self)
        stack.enter_context(warnings.catch_warnings())
        # Compiled models run eagerly.
        warnings.filterwarnings("ignore", ".*global hooks on modules")
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
        end = register_module_forward_hook(self._leave_module, always_call=True)
        stack.callback(end.remove)
        self.record.seen.append([])
        if self.watches:
            self.fix_parameters()
            stack.callback(register_optimizer_step_post_hook(self._after_update).remove)
            stack.enter_context(ops.Exits(self._traces.see_exit))
            stack.enter_context(self)

    def attach(self, path: FeedbackPath) -> None:
        """Know the path of a model that has just been untied under watch, and what was written into its B."""
        self.subject.attach(path)
        self._traces.attach()
        if self.watches:
            self.fix_parameters()

    def run(self, step: Callable[[], object], steps: int) -> Record:
        """Do the steps, and look at B after each."""
        inner = [one for one in self.subject.path.layers.values() if one.untied.short is not multiply]
        self.record.aliases = self.subject.find_aliases()
        try:
            self._stack.enter_context(tapped(inner, self._tap))
            if self.watches:
                self.fix_parameters()
            self._look_at_parameters()
            for _ in range(steps):
                self.record.seen.append([])
                step()
                self.subject.refuse_tied()
                self._look_at_parameters()
                self._ledger.forget_freed()
        except Exception as error:
            self.record.error, self.record.aliases = error, self.subject.find_aliases()
        finally:
            self.close()
        if self.record.error is not None:
            return self.record
        self.record.transposed = {weight.name: weight.transposed for weight in self.subject.path.weights}
        self.record.declared = self.subject.declared(self.record.scales)
        self.record.layers = self.subject.numbers()
        self.record.weights = set(self.subject.forward_weights)
        self.record.doubt_readings()
        for name in self.subject.renamed:  # by these names they are known before they are untied
            self.record.uses[name] = 0
        return self.record

    def close(self) -> None:
        """Watch no longer."""
        self._stack.close()

    def fix_parameters(self) -> None:
        """Know the memory of every parameter and buffer; an update may have given one another."""
        self._ledger.release()
        for name, tensor in self.subject.others.items():
            is_weight = is_matrix(tensor) and not self.subject.forward_weights
            self._ledger.fix(tensor, Made("weight" if is_weight else "other", (name,)))
        for name, tensor in self.subject.forward_weights.items():
            self._ledger.fix(tensor, Made("weight", (name,)))
        for feedback in self.subject.feedback_weights.values():
            self._ledger.fix(feedback, FEEDBACK)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._traces.see_thread(self, self.subject.layer_names.get(id(module)))
        if not self._modules and self.watches:
            self.fix_parameters()
        for name, tensor in self.subject.newcomers(module):
            if self._ledger.fixed(tensor) is None:  # else it lies in a weight's memory
                self._ledger.fix(tensor, Made("other", (name,)))
        self._modules.append(module)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._modules.pop()
        if not self._modules and self._doubted:
            wait_for_error(output, self._doubted)
            self._doubted = []
        name, untied = self.subject.layer_names.get(id(module)), vars(module).get("untied")
        if name is None or self._passages or untied is None or untied.short is not multiply:
            return
        is_probe = self.subject.model not in [*self._modules, module]
        probes = self._probes.get(name, 0) if is_probe else 0
        for tensor in ops.tensors_in(output):
            if tensor.requires_grad:
                self._see_output(name, tensor, probes)
                probes = 0
        if is_probe:
            self.record.count_probes(name, probes)

    def _tap(self, weight: UntiedWeight, _: Tensor, output: Tensor, rows: slice) -> None:
        if output.requires_grad:
            self._see_output(weight.name, output)

    def enter_passage(self, weights: tuple[Tensor, ...]) -> None:
        """Noise goes forward through weights from here on."""
        self._traces.see_thread(self, "a passage")
        if self.watches:
            self.fix_parameters()
        self._passages.append((weights, bool(ops.calling_module())))

    def leave_passage(self, weights: tuple[Tensor, ...]) -> None:
        """It does so no longer."""
        self._passages.pop()

    # What must be the same in every pass

    def _digest(self, value: object, *, with_signs: bool = False) -> str:
        before, self._is_aside = self._is_aside, True
        try:
            return digest_of(value, with_signs=with_signs)
        finally:
            self._is_aside = before

    def _see(self, kind: str, layer: str, value: object, *, with_signs: bool = False) -> None:
        self.record.seen[-1].append((kind, layer, self._digest(value, with_signs=with_signs)))
        self.record.sizes[kind, layer] = value.numel() if isinstance(value, Tensor) else 1

    def _see_output(self, layer: str, output: Tensor, probes: int = 0) -> None:
        if len(self.record.seen) == 2 and not self.subject.path.context.is_measuring:
            self.record.activities[layer] = self.record.activities.get(layer, 0) + unwrapped(output).numel()
        waiting = [probes]
        self.record.count_probes(layer, probes)

        def see(delta: Tensor) -> Tensor | None:
            if waiting and copy_of(delta).ne(0).any():
                self.record.count_probes(layer, -waiting.pop())  # it was no probe: it trains
            return self._see_delta(layer, delta)

        watch(output, see)

    def _see_delta(self, layer: str, delta: Tensor) -> Tensor | None:
        if ops.calling_module() == "feedbackpath.measure.deltas":
            return None  # the path is being compared with backprop
        delta = unwrapped(delta)
        self._see("delta", layer, delta)
        if len(self.record.seen) == 2 and self._tape is None:
            self.record.deltas.append((layer, copy_of(delta)))
        made = self._traces.made_of(delta)
        if made.kind == "weight":
            self.record.add_sight("delta", made, made.operation, made.where, delta.numel())
        return None

    def _digests_of_parameters(self) -> dict[str, str]:
        trained = self.subject.trained().items()
        return {name: self._digest(tensor, with_signs=True) for name, tensor in trained}

    def _after_update(self, *_: Any) -> None:
        if self._tape is None and self.subject.forward_weights:
            self.record.updated.append(self._digests_of_parameters())

    def _look_at_parameters(self) -> None:
        subject = self.subject
        if self._tape is None and not self.record.aliases:
            self.record.aliases = subject.find_equals(self.record.answers | self.record.probes)
        with torch.no_grad():
            if self.watches and not subject.is_all_zero:  # zeros stay zeros: they tell nothing of updates
                self.record.parameters.append(self._digests_of_parameters())
                self.record.sizes |= {(UPDATE, name): t.numel() for name, t in subject.trained().items()}
            for name, feedback in subject.feedback_weights.items():
                self._see("feedback weight", name, feedback, with_signs=True)
                for key, value in subject.optimizer_state(feedback):
                    self._see(f"optimizer state {key} of B", name, value)
            for name in self.record.scales:
                if name in subject.scales:
                    self._see("declared scale", name, subject.others[name])
            if len(self.record.seen) <= 2:
                values = {name: b.detach().clone() for name, b in subject.feedback_weights.items()}
                self.record.feedback.append(values)

    # Operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, hold its output where it is a layer's, and note what comes of it."""
        kwargs = kwargs or {}
        if self._is_aside or func.is_view:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self._see_copies(name, args)
        met = self._meets(name, args, kwargs)
        output = func(*args, **kwargs)
        is_held = met is not None and self._hold(*met, output)
        is_forward = (bool(self._modules) or torch.is_grad_enabled()) and not pytorch.is_in_backward()
        for inputs, written, results in ops.split(func, args, kwargs, output):
            for tensor in [*written, *results] if name in ops.RANDOM else ():
                self.subject.stand_in_for_draw(tensor)
            self._traces.note(name, inputs, written, results, is_held, is_forward)
        return output

    def _see_copies(self, name: str, args: tuple[Any, ...]) -> None:
        """Let copies of absent weights be absent, too, that come from a list, an array or a file."""
        before, self._is_aside = self._is_aside, True
        tensors = [values_of(tensor) for tensor in ops.tensors_in(args)]
        target = self._ledger.look_up(tensors[0]) if name == "copy_" else CONSTANT
        for tensor in tensors:
            made = self._ledger.look_up(tensor) if self.subject.misses_weights else ACTIVITY
            if not (made is UNKNOWN or made.kind == "constant"):
                continue
            if target.kind == "weight":
                self.record.alike |= self.subject.load(target.sources[0], tensor)
            if target is FEEDBACK and self.subject.is_loaded(tensor):
                self.record.alike = True
            else:
                self.subject.stand_in_for_copy(tensor)
        self._is_aside = before

    def _meets(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Made, Entry] | None:
        """Return what the weights of a call of a layer's forward map are, and the call; None: it is none."""
        is_library = bool(self._passages) and self._passages[-1][1] and bool(ops.calling_module())
        if name in ops.SUMS:
            is_inside = self.subject.model in self._modules
            product = self._traces.product(args[0], is_inside) if self._modules else None
            if product is None:
                return None
            return product, Entry(name, product.signals, [], sources=product.sources)
        if name in ops.FACTORS and torch.is_grad_enabled() and not pytorch.is_in_backward():
            self._fix_strangers(ops.tensors_in(args))
        if name not in ops.CONTRACTIONS and (not is_library or name in ops.OVERWRITES):
            return None
        places = ops.CONTRACTIONS.get(name, range(len(args)))
        operands = [(i, t) for i in places if i < len(args) for t in ops.tensors_in(args[i])]
        if not pytorch.is_in_backward():
            self._fix_strangers([t for _, t in operands])
        made = {i: self._ledger.look_up(t) for i, t in operands}
        made |= self._traces.learned_inputs(made, self._modules[-1:])
        if self._tape is None and not pytorch.is_in_backward():
            self._constants.see([(t, made[i]) for i, t in operands])
        tracked = [i for i, m in made.items() if m.is_tracked and (not m.operation or m.is_sign)]
        signals = [t for i, t in operands if not made[i].is_tracked]
        if not tracked or not signals:
            return None
        for i in tracked if name in ops.CONTRACTIONS and name != "embedding" else ():
            for source in made[i].sources:
                self.record.uses[source] = args[i].numel()
        is_inside = self.subject.model in self._modules or (is_library and not self._modules)
        is_sure = is_inside or self._are_forward_maps(name, args, {i: made[i] for i in tracked})
        if not is_sure and not any(self.subject.is_in_model(module) for module in self._modules):
            return None
        digests = tuple(self._digest(t) for t in signals)
        met = join([made[i] for i in tracked], name, "")
        own = [w for source in met.sources if (w := self.subject.forward_weights.get(source)) is not None]
        form = ops.form_of(args, tracked if self._modules and not self._passages else (), own)
        if is_inside:
            return met, Entry(name, digests, [], sources=met.sources, form=form)
        beside = [arg for i, arg in enumerate(args) if i not in made]
        beside += [value for key, value in kwargs.items() if key != "out"]
        digests += tuple(self._digest(part) for arg in beside for part in ops.tensors_in(arg) or [arg])
        is_read = is_sure and self._tape is None and not (self._passages and self._passages[-1][1])
        sources = [made[i].sources[0] for i in tracked if is_read and made[i].kind == "weight"]
        weights = self.subject.forward_weights
        read = tuple((source, self._digest(weights[source], with_signs=True)) for source in sources)
        where = "" if is_sure else ops.call_site()
        is_answer = is_sure and not self._is_turned(name, args, tracked, made)
        return met, Entry(name, digests, [], is_answer, None, read, is_sure, met.sources, form, where)

    def _is_turned(self, name: str, args: tuple[Any, ...], tracked: list[int], made: dict[int, Made]) -> bool:
        """Whether a module of another's takes a copy of a weight from outputs to inputs."""
        others = [i for i in tracked if made[i].kind == "other" and isinstance(args[i], Tensor)]
        if self._tape is not None or not others:  # the first pass decides
            return False
        return any(ops.is_turned(name, args, i, self.subject.weights) for i in others)

    def _fix_strangers(self, operands: list[Tensor]) -> None:
        """Know the weights of no module, such as those in a dictionary, from when they are first met."""
        unknown = [t for t in operands if self._is_new(t)]
        meets_weight = any(self._ledger.look_up(t).is_tracked for t in operands)
        for name, weight in self.subject.strangers(unknown, may_be_data=meets_weight):
            self._ledger.fix(weight, Made("other", (name,)))

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether nobody has said what a tensor is; a parameter may have been made in this step."""
        root = tensor if tensor._base is None else tensor._base
        made_now = isinstance(root, nn.Parameter) and self._ledger.fixed(root) is None
        return made_now or self._ledger.look_up(tensor) is UNKNOWN

    def _are_forward_maps(self, name: str, args: Any, tracked: dict[int, Made]) -> bool:
        """Whether weights meet a signal as in their own layers: in a module's call, or a declared passage."""
        untied = {i: made for i, made in tracked.items() if made.kind == "weight"}
        if not untied:
            return bool(self._modules)
        passing = {id(weight) for weights, _ in self._passages[-1:] for weight in weights}
        for i, made in untied.items():
            weight = self.subject.weight_named(made.sources[0])
            if weight is None or not (self._modules or id(weight.weight) in passing):
                return False
            if len(made.sources) > 1 or not ops.is_forward_map(name, args, i, weight):
                return False
        return True

    def _hold(self, made: Made, entry: Entry, output: Any) -> bool:
        """Write what a layer answers on the tape, or read it there; return whether this is such an answer.

        In a backward pass it is one only where a forward pass is done again, as checkpointing does.
        """
        outputs = [values_of(tensor) for tensor in ops.tensors_in(output) if tensor.numel()]
        name, call = entry.operation, (entry.operation, made.sources, entry.signals, entry.form)
        entry.first = self._known_calls.get(call)
        if pytorch.is_in_backward() and entry.first is None:
            return False
        self._count(name, made, outputs)
        if self._tape is None:
            entry.step, entry.outputs = len(self.record.seen), [tensor.detach().clone() for tensor in outputs]
            self.record.tape.append(entry)
            if (not entry.is_sure or entry.weights) and self._modules and not pytorch.is_in_backward():
                self._doubted.append(entry)
        else:
            taped = self._tape.find(entry, len(self.record.seen))
            if taped.holds:
                for tensor, held in zip(outputs, taped.outputs, strict=True):
                    tensor.copy_(held)
            entry = taped
        self._known_calls.setdefault(call, entry)
        return True

    def _count(self, name: str, made: Made, outputs: list[Tensor]) -> None:
        for source in made.sources if outputs and name != "convolution_backward" else ():
            weight = self.subject.weight_named(source)
            if weight is None:
                continue
            values = outputs[0].numel() * (2 if outputs[0].is_complex() else 1)
            probes = values // self.subject.num_neurons(weight)
            layer = weight.name
            self._probes[layer] = probes
            if self._passages:
                self.record.answers[layer] = self.record.answers.get(layer, 0) + values
                self.record.count_probes(layer, probes)
