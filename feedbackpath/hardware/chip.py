"""A chip: W and B in separate arrays, each written by its own devices and read through converters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from feedbackpath.arguments import checked
from feedbackpath.core.context import generator_of
from feedbackpath.core.layers import UntiedWeight
from feedbackpath.core.pytorch import version_of
from feedbackpath.errors import ChipError
from feedbackpath.hardware.arrays import Array
from feedbackpath.hardware.cells import Device, Ideal
from feedbackpath.hardware.counter import Counter, unknown_in
from feedbackpath.hardware.readout import OutputPort, Port, Read, can_read, reads_of
from feedbackpath.hardware.samples import write_samples
from feedbackpath.hardware.wiring import Line, Wiring

Update = Literal["net", "samples", "samples-exact"]
Groups = Sequence[tuple[Any, Sequence[UntiedWeight]]]


class Chip:
    """The arrays that hold W and B: how they are written (devices) and read (converters, noise).

    W and B of every untied weight are in separate arrays, with cells drawn independently. Biases,
    norms and layers that are not untied stay in digital memory. Under ``bp`` there is one array, read in
    both directions. Cells start with the weights of the network.

    Args:
        device: The cells of both arrays.
        read: How arrays are read: one ``Read`` for the forward and the backward pass, or a mapping with any
            of ``"forward"``, ``"backward"``, ``"update"`` (each array receives x and delta separately) and
            ``"mirror"`` (as ``"forward"`` unless given). Left out: ideal.
        feedback_device: The cells of B, if they differ.
        wiring: Which part of an update of W reaches B, and when (Kolen-Pollack and related rules).
        update: ``"net"``: the optimizer's change is written once per step. ``"samples"``: each sample's
            product is written in pulses, with means of up and of down pulses; plain SGD.
            ``"samples-exact"``: one sample after another.
        verify: How many times a write is read and corrected.
        seed: Seed of the cells and of all noise of the chip.

    Example:
        >>> import feedbackpath as fp
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> chip = fp.Chip(fp.devices.SoftBounds(step=1e-3, noise=0.3), read=fp.Read(bits=8, noise=0.02))
        >>> path = fp.untie(model, "kp", chip=chip)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
        >>> chip.attach(optimizer)
        >>> model(torch.ones(2, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> path.step()
    """

    @checked(ChipError)
    def __init__(
        self,
        device: Device | None = None,
        read: Read | Mapping[str, Read] | None = None,
        *,
        feedback_device: Device | None = None,
        wiring: Wiring | None = None,
        update: Update = "net",
        verify: int = 0,
        seed: int = 0,
    ) -> None:
        if verify < 0:
            raise ChipError(f"Chip: verify must be a whole number of corrections, not {verify!r}")
        self.device = device or Ideal()
        self.feedback_device = feedback_device or self.device
        self.wiring, self.update, self.verify, self.seed = wiring or Wiring(), update, verify, seed
        self.reads = reads_of(read)
        self.is_mirroring = False
        self.is_attached = False
        self.counter: Counter | None = None
        self._groups: Groups = ()
        self._weights: Sequence[UntiedWeight] = ()
        self._arrays: dict[tuple[str, str], Array] = {}
        self._ports: list[Any] = []
        self._generators: dict[str, torch.Generator] = {}
        self._loaded: dict[str, Any] = {}

    @property
    def is_ideal(self) -> bool:
        """Whether it does what it is asked: then nothing of it runs, and no bit of a run changes."""
        return self.writes_ideally and self.reads_ideally

    @property
    def writes_ideally(self) -> bool:
        """Whether arrays take what they are asked to."""
        devices = self.device.is_ideal and self.feedback_device.is_ideal
        return devices and self.wiring.is_ideal and self.update == "net"

    @property
    def reads_ideally(self) -> bool:
        """Whether all signals pass as they are."""
        return all(read.is_ideal for read in self.reads.values())

    @property
    def takes_signals(self) -> bool:
        """Whether arrays take up the signals of updates by themselves."""
        return self.update != "net" or not self.reads["update"].is_ideal

    def hold(self, path: Any) -> None:
        """Take up the weights of an untied model; ``untie`` calls it with the new path.

        Raises:
            ChipError: The chip holds another model, or cannot read some of the layers. The model is retied.
        """
        try:
            if self._groups:
                raise ChipError("Chip: it already has another model: make a chip for each model")
            if not (self.wiring.is_ideal or any(rule.learns for rule, _ in path.groups)):
                raise ChipError("Chip: wiring= has no effect here: no B gets the updates of W; leave it out")
            if not (self.reads_ideally and self.update == "net"):
                self._put_ports(path)
        except ChipError:
            path.retie()
            raise
        self._groups, path.chip, path.context.writes_apart = path.groups, self, not self.writes_ideally
        self._weights = path.weights

    def _put_ports(self, path: Any) -> None:
        """Put converters about the arrays of every layer."""
        broadcasting = [(rule, group) for rule, group in path.groups if rule.send_back.is_broadcast]
        for rule, group in broadcasting:
            if rule.learns and self.takes_signals:
                raise ChipError(
                    f"chip: B of {group[0].name!r} learns from the output's error, whose own read-out for "
                    'updates is not modelled: leave "update" out of read=, and update="net"'
                )
        unfit = [weight for weight in path.weights if not can_read(weight)]
        if unfit:
            raise ChipError(
                f"chip: the read-out of {', '.join(repr(weight.name) for weight in unfit)} is not modelled, "
                "only that of linear layers and convolutions: leave read= out, or such layers"
            )
        self._ports = [Port(self, weight) for weight in path.weights]
        if broadcasting:
            self._ports.append(OutputPort(self, path.model))

    def release(self) -> None:
        """Let go of a model: it is retied."""
        for port in self._ports:
            port.remove()
        if self.counter is not None:
            self.counter.stop()
        self._ports.clear()
        self._arrays.clear()
        self._groups, self._weights, self.is_attached = (), (), False

    @property
    def can_count(self) -> bool:
        """Whether what the arrays do under the model's rules is modelled."""
        return not unknown_in(self._weights)

    def counting(self) -> Counter:
        """Count the work of the arrays from now on, as a context manager or until ``stop``: see ``Counter``.

        Raises:
            ChipError: The chip holds no model yet, counts already, or a rule does what is not modelled.
        """
        if not self._groups or self.counter is not None:
            why = "it is counting already" if self._groups else "call untie(model, rule, chip=chip) first"
            raise ChipError(f"chip.counting: {why}")
        self.counter = Counter(self, self._weights)
        for array in self._arrays.values():
            array.count_for(self)
        return self.counter

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From the optimizer's next step on, let devices write the changes that it asks for.

        Raises:
            ChipError: The chip holds no model yet, the optimizer has none of its weights, or it is no plain
                SGD where single samples are written.
        """
        if not self._groups:
            raise ChipError("chip.attach: the chip has no model: call untie(model, rule, chip=chip) first")
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(weight.weight) in own for _, group in self._groups for weight in group):
            raise ChipError("chip.attach: the optimizer has no weight of this chip: make it of its model")
        is_plain = type(optimizer) is torch.optim.SGD and not any(
            g["momentum"] for g in optimizer.param_groups
        )
        if self.update != "net" and not is_plain:
            raise ChipError(
                f'chip.attach: update="{self.update}" writes the products of single samples: use '
                "torch.optim.SGD without momentum"
            )
        self.is_attached = True
        if self.writes_ideally:
            return
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @contextmanager
    def writing(self, *, is_step: bool = True) -> Iterator[None]:
        """Let devices write what rules change of B meanwhile, and mirror noise be read as a mirror is.

        Raises:
            ChipError: Training goes on without ``attach``.
        """
        if is_step and not self.is_attached:
            raise ChipError("path.step: no optimizer writes through the chip: call chip.attach(optimizer)")
        arrays = [] if self.writes_ideally else [one for one in self._all_arrays() if one.side == "feedback"]
        before = [(one, version_of(one.values), one.values.detach().clone()) for one in arrays]
        was_mirroring, self.is_mirroring = self.is_mirroring, True
        if self.counter is not None:
            self.counter.before_rules()
        try:
            yield
        finally:
            self.is_mirroring = was_mirroring
        for array, version, values in before:
            if version_of(array.values) != version:
                with torch.no_grad():
                    self._write(array, values, array.values.detach() - values)
                if self.counter is not None:
                    self.counter.asked(array)
        if self.counter is not None:
            self.counter.after_rules(is_step)

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """Return the random numbers that go on from one use to the next; they are kept with checkpoints."""
        if purpose not in self._generators:
            made = generator_of(f"chip/{self.seed}/{purpose}", device)
            if purpose in self._loaded:
                made.set_state(self._loaded.pop(purpose))
            self._generators[purpose] = made
        return self._generators[purpose]

    def fixed(self, what: str, device: torch.device) -> torch.Generator:
        """Return the random numbers of what is drawn once."""
        return generator_of(f"chip/{self.seed}/{what}", device)

    def take_signals(self, weight: UntiedWeight, side: str, x: Tensor, delta: Tensor) -> None:
        """Keep the two signals of an update until it is written."""
        if self.update != "net":
            self._array(weight, side).signals.append((x, delta))

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: random numbers, second cells of pairs, updates on their way."""
        arrays = {
            "/".join(key): {
                "minus": one.cells.minus, "idle": one.idle, "waiting": one.line.waiting if one.line else [],
            }
            for key, one in self._arrays.items()
        }  # fmt: skip
        states = {purpose: one.get_state() for purpose, one in self._generators.items()}
        counts = {} if self.counter is None else {"counts": self.counter.state_dict()}
        return {"generators": self._loaded | states, "arrays": arrays, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where ``state`` was taken."""
        self._loaded, self._generators = dict(state["generators"]), {}
        self._arrays.clear()
        if self.counter is not None and "counts" in state:
            self.counter.load_state_dict(state["counts"])
        for array in self._all_arrays():
            kept = state["arrays"].get(f"{array.weight.name}/{array.side}")
            if kept is not None:
                if kept["minus"] is not None and array.cells.minus is not None:
                    array.cells.minus.copy_(kept["minus"])
                array.idle = kept["idle"]
                if array.line is not None:
                    array.line.waiting = list(kept["waiting"])

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy belong to no optimizer, and have random numbers of its own, which go on alike."""
        states = {purpose: one.get_state() for purpose, one in self._generators.items()}
        return {
            **self.__dict__,
            "_generators": {},
            "_loaded": self._loaded | states,
            "is_attached": self.is_ideal and self.is_attached,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copy, and the converters that came with its model."""
        self.__dict__.update(state)
        for port in self._ports:
            port.chip = self

    # Writing

    def _all_arrays(self) -> list[Array]:
        found = []
        for _, group in self._groups:
            for weight in group:
                found += self.arrays_of(weight)
        return found

    def arrays_of(self, weight: UntiedWeight) -> list[Array]:
        """Return the array of W, and that of B where there is one."""
        has_b = weight.has_feedback and not weight.is_tied
        return [self._array(weight, side) for side in ("forward", "feedback")[: 1 + has_b]]

    def _array(self, weight: UntiedWeight, side: str) -> Array:
        key = weight.name, side
        if key not in self._arrays:
            is_forward = side == "forward"
            values = weight.weight if is_forward else weight.feedback
            device = self.device if is_forward else self.feedback_device
            cells = device.draw(values.detach(), self.fixed(f"{side} cells of {weight.name}", values.device))
            line = None
            if not (is_forward or self.wiring.is_ideal):
                drawn = self.fixed(f"partners of {weight.name}", values.device)
                inputs = values.shape[1]
                line = Line(self.wiring, self.wiring.partners(inputs, drawn) if self.wiring.swapped else None)
            self._arrays[key] = Array(weight, side, device, cells, line)
            self._arrays[key].count_for(self)
        return self._arrays[key]

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for array in self._all_arrays():
            values = array.values
            if id(values) not in updated:
                continue
            array.before = values.detach().clone()
            if array.line is not None and values.grad is not None:
                # The optimizer sees what has arrived; the gradient itself is put back afterwards.
                array.gradient = values.grad
                values.grad = array.line.pass_on(values.grad, self.generator("write", values.device))

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for array in self._all_arrays():
            if array.before is not None:
                before, array.before = array.before, None
                group, asked = groups[id(array.values)], array.values.detach() - before
                decay = group["lr"] * group.get("weight_decay", 0.0) / (1.0 - group.get("momentum", 0.0))
                if array.line is not None and self.wiring.decay != 1.0:
                    asked.sub_(before, alpha=(self.wiring.decay - 1.0) * decay)
                if array.gradient is not None:
                    array.values.grad, array.gradient = array.gradient, None
                if self.counter is not None:
                    self.counter.asked(array)
                if array.signals:
                    self._write_samples(array, before, group["lr"], decay)
                else:
                    self._write(array, before, asked)
            self._leak(array)

    def _write(self, array: Array, before: Tensor, asked: Tensor) -> None:
        """Let cells be asked for changes, and hold what comes of it."""
        values = array.values
        if self.counter is not None:
            self.counter.wrote(array)
        if array.device.is_ideal:
            values.copy_(before + asked)
            return
        generator, target = self.generator("write", values.device), before + asked
        new = array.device.write(before, asked, array.cells, generator)
        for _ in range(self.verify):
            new = array.device.write(new, target - new, array.cells, generator)
        values.copy_(new)
        self._note_written(array, before)

    def _write_samples(self, array: Array, before: Tensor, lr: float, decay: float) -> None:
        """Write each sample's product in pulses; decay is a read and a write."""
        values, generator = array.values, self.generator("write", array.values.device)
        signals, array.signals = array.signals, []
        new, is_exact = before, self.update == "samples-exact"
        for x, delta in signals:
            new = write_samples(
                array.weight, array.device, array.cells, new, x, delta, lr, generator, is_exact
            )
        values.copy_(new)
        if decay:
            if self.counter is not None:
                self.counter.read_cells(array)
            self._write(array, new, new * -decay)
        self._note_written(array, before)

    def _note_written(self, array: Array, before: Tensor) -> None:
        if array.device.drift:
            idle = torch.ones_like(before) if array.idle is None else array.idle
            array.idle = torch.where(array.values.detach() != before, 1.0, idle)

    def _leak(self, array: Array) -> None:
        """Let what nobody holds leak away: a share of each weight, and drift as a power of its age."""
        device, values = array.device, array.values
        if device.is_ideal:
            return
        if math.isfinite(device.lifetime):
            values.mul_(1.0 - 1.0 / device.lifetime)
        if device.drift:
            idle = torch.ones_like(values) if array.idle is None else array.idle
            values.mul_((idle / (idle + 1.0)).pow_(device.drift))
            array.idle = idle + 1.0
