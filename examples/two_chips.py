"""Two chips: the forward path in one process, the feedback path in another, and no weight on the wire.

    python examples/two_chips.py --rule kp
    python examples/two_chips.py --rule wm
    python examples/two_chips.py --rule kp --chip reram

W is made in the forward process and never leaves it; B in the feedback process. All that goes between them
goes through sockets, and the parent sits on the line: it reads every byte there, passes it on, and counts
what it read. The chips exchange activities and deltas, and by ``wm`` the noise that neurons fire with
the answers to it.

By ``kp`` each chip computes the product of activity and delta from noisy signals of its own: the two updates
are not equal, and weight decay brings B to W all the same. ``wm`` is the paper's mirror: all neurons of a
layer fire independent Gaussian noise, and B learns from its covariance with the answers (Akrout et al. 2019,
equations 5 to 7). See docs/two-chips.md.

``--chip`` lets each process write its weights through devices of its own: ``fp.devices`` by name. The wire
carries the same bytes.
"""

import argparse
import math
import multiprocessing
import pickle
import selectors
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feedbackpath.hardware.devices import PRESETS, device_named

WIDTHS = (20, 32, 16, 5)
BATCH_SIZE, NUM_PROBES = 64, 512
SIGNAL_NOISE = 0.1  # of the signals of kp, in their own sizes: each chip draws its own
MIRROR_RATE, MIRROR_DECAY = 0.1, 0.5  # eta and lambda of the paper's Algorithm 1, decay inside the rate
SEED_OF_W, SEED_OF_B, SEED_OF_DATA, SEED_OF_NOISE, SEED_OF_OTHER_NOISE = range(5)
KINDS = ("activities", "deltas", "noise", "answers to noise")
HEADER = struct.Struct("<BQ")  # kind, and bytes that follow


def make_weights(seed: int) -> list[nn.Parameter]:
    """Draw the weights of every layer, ``[out, in]``: W on one chip, B on the other."""
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(n_out, n_in, generator=generator, dtype=torch.float64) / n_in**0.5)
        for n_in, n_out in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def make_optimizer(weights: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that each chip has for its own weights."""
    return torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=1e-2)


class Cells:
    """The cells that hold one chip's weights; without devices they take what they are given.

    Args:
        name: Name of the devices; None: ideal.
        weights: The weights.
        seed: Seed of these cells, and of the noise of their writes.
    """

    def __init__(self, name: str | None, weights: Sequence[nn.Parameter], seed: int) -> None:
        self.device = None if name is None else device_named(name)
        self.weights, self.generator = weights, torch.Generator().manual_seed(seed)
        if self.device is not None:
            self.cells = [self.device.draw(weight.detach(), self.generator) for weight in weights]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let devices write what is asked of the weights meanwhile."""
        before = [weight.detach().clone() for weight in self.weights]
        yield
        if self.device is None:
            return
        for weight, old, cells in zip(self.weights, before, self.cells, strict=True):
            asked = weight.detach() - old
            with torch.no_grad():
                weight.copy_(self.device.write(old, asked, cells, self.generator))


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and the classes that a fixed teacher gives them."""
    teacher = torch.randn(WIDTHS[-1], WIDTHS[0], generator=torch.Generator().manual_seed(SEED_OF_DATA))
    x = torch.randn(BATCH_SIZE, WIDTHS[0], generator=torch.Generator().manual_seed(1000 + step))
    return x.double(), (x @ teacher.T).argmax(1)


@dataclass
class Link:
    """A chip's end of the line. What is sent is a header and the bytes of one tensor of doubles.

    Args:
        line: The socket.
    """

    line: socket.socket

    def send(self, kind: str, tensor: Tensor) -> None:
        """Send a tensor."""
        values = tensor.detach().contiguous().numpy().tobytes()
        self.line.sendall(HEADER.pack(KINDS.index(kind), len(values)) + values)

    def receive(self, kind: str, *shape: int) -> Tensor:
        """Wait for a tensor of that kind."""
        number, size = HEADER.unpack(self._read(HEADER.size))
        assert KINDS[number] == kind
        assert size == 8 * math.prod(shape)
        return torch.frombuffer(bytearray(self._read(size)), dtype=torch.float64).view(shape)

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self.line.recv(min(size - len(parts), 1 << 16))
            if not part:
                raise ConnectionError("the other chip is gone")
            parts += part
        return bytes(parts)


@dataclass
class Tapped:
    """One direction of the line, as read off it byte by byte.

    Attributes:
        counts: Bytes of values, by kind.
        total: All bytes, headers included.
    """

    counts: Counter[str] = field(default_factory=Counter)
    total: int = 0
    _rest: bytearray = field(default_factory=bytearray)
    _left: int = 0
    _kind: str = ""

    def read(self, data: bytes) -> None:
        """Take in what has just passed."""
        self.total += len(data)
        self._rest += data
        while self._rest:
            if self._left:
                taken = min(self._left, len(self._rest))
                self.counts[self._kind] += taken
                self._left -= taken
                del self._rest[:taken]
            elif len(self._rest) >= HEADER.size:
                number, self._left = HEADER.unpack(bytes(self._rest[: HEADER.size]))
                self._kind = KINDS[number]
                del self._rest[: HEADER.size]
            else:
                return


def perturbed(signal: Tensor, generator: torch.Generator) -> Tensor:
    """Return a signal as one chip reads it: with noise of that chip's own."""
    noise = torch.randn(signal.shape, generator=generator, dtype=torch.float64)
    return signal + SIGNAL_NOISE * signal.std() * noise


def run_forward_chip(link: Link, rule: str, steps: int, chip: str | None) -> list[Tensor]:
    """Hold W: send activities and the output's delta, take the other deltas, update W."""
    weights, generator = make_weights(SEED_OF_W), torch.Generator().manual_seed(SEED_OF_NOISE)
    optimizer, cells = make_optimizer(weights), Cells(chip, weights, SEED_OF_W)
    for step in range(steps):
        x, target = make_batch(step)
        activities = [x]
        for weight in weights[:-1]:
            activities.append(torch.relu(activities[-1] @ weight.detach().T))
        output = activities[-1] @ weights[-1].detach().T
        error = (output.softmax(1) - F.one_hot(target, WIDTHS[-1])) / BATCH_SIZE
        for activity in activities:
            link.send("activities", activity)
        link.send("deltas", error)
        deltas = [link.receive("deltas", BATCH_SIZE, width) for width in WIDTHS[1:-1]] + [error]
        for weight, activity, delta in zip(weights, activities, deltas, strict=True):
            if rule == "kp":
                activity, delta = perturbed(activity, generator), perturbed(delta, generator)
            weight.grad = delta.T @ activity  # equation 4
        with cells.writing():
            optimizer.step()
        if rule == "wm":
            fire_noise(link, weights, generator)
    return [weight.detach() for weight in weights]


def fire_noise(link: Link, weights: Sequence[nn.Parameter], generator: torch.Generator) -> None:
    """Mirror mode: all neurons of a layer fire independent noise, and the next layer answers."""
    for number, weight in enumerate(weights):
        noise = torch.randn(NUM_PROBES, weight.shape[1], generator=generator, dtype=torch.float64)
        drive = noise @ weight.detach().T
        link.send("noise", noise)
        link.send("answers to noise", drive if number == len(weights) - 1 else torch.relu(drive))


def run_feedback_chip(link: Link, rule: str, steps: int, chip: str | None) -> list[Tensor]:
    """Hold B: take activities and the output's delta, send the other deltas back through B, update B."""
    feedback, generator = make_weights(SEED_OF_B), torch.Generator().manual_seed(SEED_OF_OTHER_NOISE)
    optimizer, cells = make_optimizer(feedback), Cells(chip, feedback, SEED_OF_B)
    for _ in range(steps):
        activities = [link.receive("activities", BATCH_SIZE, width) for width in WIDTHS[:-1]]
        deltas = [link.receive("deltas", BATCH_SIZE, WIDTHS[-1])]
        for b, activity in zip(feedback[:0:-1], activities[:0:-1], strict=True):
            deltas.insert(0, (deltas[0] @ b.detach()) * (activity > 0))  # equation 3
        for delta in deltas[:-1]:
            link.send("deltas", delta)
        if rule == "kp":
            for b, activity, delta in zip(feedback, activities, deltas, strict=True):
                product = perturbed(delta, generator).T @ perturbed(activity, generator)
                b.grad = product  # equation 17: the same product, of signals that are noisy in another way
            with cells.writing():
                optimizer.step()
        else:
            with cells.writing():
                listen_to_noise(link, feedback)
    return [b.detach() for b in feedback]


@torch.no_grad()
def listen_to_noise(link: Link, feedback: Sequence[nn.Parameter]) -> None:
    """Learn W from the covariance of the noise and the answers to it (equations 5 to 7, 11)."""
    for b in feedback:
        noise = link.receive("noise", NUM_PROBES, b.shape[1])
        answer = link.receive("answers to noise", NUM_PROBES, b.shape[0])
        covariance = (answer - answer.mean(0)).T @ noise / (NUM_PROBES - 1)
        b.add_(MIRROR_RATE * (covariance - MIRROR_DECAY * b))


def run_chip(
    is_forward: bool, line: socket.socket, result: socket.socket, rule: str, steps: int, devices: str | None
) -> None:
    """Be one of the chips; give back the weights at the end, on a line that the other has no part in."""
    torch.set_num_threads(1)
    chip = run_forward_chip if is_forward else run_feedback_chip
    weights = chip(Link(line), rule, steps, devices)
    line.close()
    result.sendall(pickle.dumps([weight.numpy() for weight in weights]))
    result.close()


def pass_on(forward: socket.socket, feedback: socket.socket) -> tuple[Tapped, Tapped]:
    """Carry bytes between the two chips until both are done; return what was read in each direction."""
    down, up = Tapped(), Tapped()
    with selectors.DefaultSelector() as lines:
        lines.register(forward, selectors.EVENT_READ, (feedback, down))
        lines.register(feedback, selectors.EVENT_READ, (forward, up))
        while lines.get_map():
            for key, _ in lines.select():
                other, tapped = key.data
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                tapped.read(data)
                if data:
                    other.sendall(data)
                else:
                    lines.unregister(key.fileobj)
    return down, up


def train(
    rule: str, steps: int, devices: str | None = None
) -> tuple[list[Tensor], list[Tensor], Tapped, Tapped]:
    """Train on two chips; return W, B, and what went over the line in each direction."""
    context = multiprocessing.get_context("spawn")
    lines, results, chips = [], [], []
    for is_forward in (True, False):
        ours, theirs = socket.socketpair()
        result, their_result = socket.socketpair()
        arguments = (is_forward, theirs, their_result, rule, steps, devices)
        chips.append(context.Process(target=run_chip, args=arguments))
        chips[-1].start()
        theirs.close()
        their_result.close()
        lines.append(ours)
        results.append(result)
    down, up = pass_on(*lines)
    weights = []
    for result in results:
        with result.makefile("rb") as file:
            weights.append([torch.from_numpy(values) for values in pickle.load(file)])  # noqa: S301 (our own)
    for chip in chips:
        chip.join()
    return weights[0], weights[1], down, up


def angle_deg(one: Tensor, other: Tensor) -> float:
    """Return the angle between two tensors taken as vectors, in degrees."""
    return math.degrees(
        math.acos(min(1.0, float(F.cosine_similarity(one.detach().flatten(), other.detach().flatten(), 0))))
    )


def expected_bytes(rule: str, steps: int) -> tuple[Counter[str], Counter[str]]:
    """Return the bytes that the two paths need, by kind: what sizes alone tell."""
    down, up = Counter(), Counter()
    down["activities"] = 8 * steps * BATCH_SIZE * sum(WIDTHS[:-1])
    down["deltas"] = 8 * steps * BATCH_SIZE * WIDTHS[-1]
    up["deltas"] = 8 * steps * BATCH_SIZE * sum(WIDTHS[1:-1])
    if rule == "wm":
        down["noise"] = 8 * steps * NUM_PROBES * sum(WIDTHS[:-1])
        down["answers to noise"] = 8 * steps * NUM_PROBES * sum(WIDTHS[1:])
    return down, up


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on two chips, and print what was read off the line between them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", choices=("kp", "wm"), default="kp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--chip", choices=PRESETS, help="devices that write W and B")
    options = parser.parse_args(arguments)
    weights, feedback, down, up = train(options.rule, options.steps, options.chip)
    angles = [
        f"{angle_deg(b0, w0):.1f} to {angle_deg(b, w):.1f}"
        for b0, w0, b, w in zip(
            make_weights(SEED_OF_B), make_weights(SEED_OF_W), feedback, weights, strict=True
        )
    ]
    print(f"{options.rule}: angles of B and W in {options.steps} steps, in degrees: {'; '.join(angles)}")
    for name, tapped in (("forward to feedback", down), ("feedback to forward", up)):
        print(f"{name}: {tapped.total} bytes read off the line")
        for kind, count in sorted(tapped.counts.items()):
            print(f"{name}: {kind}, {count} bytes")
    is_as_expected = (down.counts, up.counts) == expected_bytes(options.rule, options.steps)
    print("this is all that the two paths need" if is_as_expected else "THE LINE CARRIED SOMETHING ELSE")
    return 0 if is_as_expected else 1


if __name__ == "__main__":
    raise SystemExit(main())
