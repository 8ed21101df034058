"""Two chips: the forward path in one process, the feedback path in another, and no weight on the wire.

    python examples/two_chips.py --rule kp
    python examples/two_chips.py --rule wm-exact

W is made in the forward process and never leaves it; B in the feedback process. They exchange activities and
deltas, and by ``wm-exact`` the noise that neurons fire with the answers to it. Both learn by the same local
product of activity and delta; each keeps its own optimizer. The parent then trains the same network in one process,
by the library, and compares.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackpath as fp

WIDTHS = (20, 32, 16, 5)
BATCH_SIZE, SIGMA = 64, 0.01
FORWARD, FEEDBACK = 0, 1
SEED_OF_W, SEED_OF_B, SEED_OF_DATA, SEED_OF_NOISE = range(4)


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


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """Return inputs and the classes that a fixed teacher gives them."""
    teacher = torch.randn(WIDTHS[-1], WIDTHS[0], generator=torch.Generator().manual_seed(SEED_OF_DATA))
    x = torch.randn(BATCH_SIZE, WIDTHS[0], generator=torch.Generator().manual_seed(1000 + step))
    return x.double(), (x @ teacher.T).argmax(1)


def make_codes(size: int) -> Tensor:
    """Return noise ``[size, size]`` whose samples are orthogonal: each neuron fires its own code."""
    generator = torch.Generator().manual_seed(SEED_OF_NOISE)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q * size**0.5


class Wire:
    """All that goes between the chips, counted in bytes by what it is."""

    def __init__(self, other: int) -> None:
        self.other = other
        self.sent: Counter[str] = Counter()

    def send(self, kind: str, tensor: Tensor) -> None:
        """Send a tensor."""
        tensor = tensor.detach().contiguous()
        self.sent[kind] += tensor.numel() * tensor.element_size()
        dist.send(tensor, self.other)

    def receive(self, *shape: int) -> Tensor:
        """Wait for a tensor."""
        tensor = torch.empty(shape, dtype=torch.float64)
        dist.recv(tensor, self.other)
        return tensor


def run_forward_chip(rule: str, steps: int) -> tuple[dict[str, object], Counter[str]]:
    """Hold W: send activities and the output's delta, take the other deltas, update W."""
    wire, weights = Wire(FEEDBACK), make_weights(SEED_OF_W)
    optimizer, losses = make_optimizer(weights), []
    for step in range(steps):
        x, target = make_batch(step)
        activities = [x]
        for weight in weights[:-1]:
            activities.append(torch.relu(activities[-1] @ weight.detach().T))
        output = activities[-1] @ weights[-1].detach().T
        losses.append(F.cross_entropy(output, target).item())
        error = (output.softmax(1) - F.one_hot(target, WIDTHS[-1])) / BATCH_SIZE
        for activity in activities:
            wire.send("activities", activity)
        wire.send("deltas", error)
        deltas = [wire.receive(BATCH_SIZE, width) for width in WIDTHS[1:-1]] + [error]
        for weight, activity, delta in zip(weights, activities, deltas, strict=True):
            weight.grad = delta.T @ activity  # equation 4
        optimizer.step()
        if rule == "wm-exact":
            fire_noise(wire, weights)
    return {"weights": [w.detach() for w in weights], "losses": losses}, wire.sent


def fire_noise(wire: Wire, weights: Sequence[nn.Parameter]) -> None:
    """Mirror mode: neurons fire codes and then the negatives of them, and the layer answers."""
    for number, weight in enumerate(weights):
        noise = SIGMA * make_codes(weight.shape[1])
        drive = noise @ weight.detach().T
        is_output = number == len(weights) - 1
        answer = 2.0 * drive if is_output else torch.relu(drive) - torch.relu(-drive)
        wire.send("noise", noise)
        wire.send("answers to noise", answer)


def run_feedback_chip(rule: str, steps: int) -> tuple[dict[str, object], Counter[str]]:
    """Hold B: take activities and the output's delta, send the other deltas back through B, update B."""
    wire, feedback = Wire(FORWARD), make_weights(SEED_OF_B)
    optimizer = make_optimizer(feedback)
    for _ in range(steps):
        activities = [wire.receive(BATCH_SIZE, width) for width in WIDTHS[:-1]]
        deltas = [wire.receive(BATCH_SIZE, WIDTHS[-1])]
        for b, activity in zip(feedback[:0:-1], activities[:0:-1], strict=True):
            deltas.insert(0, (deltas[0] @ b.detach()) * (activity > 0))  # equation 3
        for delta in deltas[:-1]:
            wire.send("deltas", delta)
        if rule == "kp":
            for b, activity, delta in zip(feedback, activities, deltas, strict=True):
                b.grad = delta.T @ activity  # equation 18: the same product, computed here
            optimizer.step()
        else:
            listen_to_noise(wire, feedback)
    return {"feedback": [b.detach() for b in feedback]}, wire.sent


@torch.no_grad()
def listen_to_noise(wire: Wire, feedback: Sequence[nn.Parameter]) -> None:
    """Learn W from the covariance of the noise and the answers to it (equations 5 to 7, 11)."""
    for number, b in enumerate(feedback):
        n_out, n_in = b.shape
        noise, answer = wire.receive(n_in, n_in), wire.receive(n_in, n_out)
        slope = 2.0 if number == len(feedback) - 1 else 1.0  # relu(z) - relu(-z) = z; the output answers 2 z
        b.copy_(answer.T @ noise / (n_in * SIGMA**2 * slope))


def train_in_one_process(rule: str, steps: int) -> dict[str, object]:
    """Train the same network by the library."""
    layers = [nn.Linear(a, b, bias=False).double() for a, b in zip(WIDTHS[:-1], WIDTHS[1:], strict=True)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    path = fp.untie(model, rule)
    with torch.no_grad():
        for (_, w, b), new_w, new_b in zip(
            path.pairs(), make_weights(SEED_OF_W), make_weights(SEED_OF_B), strict=True
        ):
            w.copy_(new_w)
            b.copy_(new_b)
    optimizer, losses = make_optimizer([p for p in model.parameters() if p.requires_grad]), []
    for step in range(steps):
        x, target = make_batch(step)
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.step()
        losses.append(loss.item())
    weights, feedback = zip(*((w.detach(), b.detach()) for _, w, b in path.pairs()), strict=True)
    return {"weights": list(weights), "feedback": list(feedback), "losses": losses}


def run_chip(rank: int, rule: str, steps: int, folder: str) -> None:
    """Be one of the chips."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        chip = run_forward_chip if rank == FORWARD else run_feedback_chip
        torch.save(chip(rule, steps), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on two chips and in one process, compare, and print what went over the wire."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", choices=("kp", "wm-exact"), default="kp")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_chip, (options.rule, options.steps, folder), nprocs=2)
        (forward, down), (back, up) = (
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in (FORWARD, FEEDBACK)
        )
    alone = train_in_one_process(options.rule, options.steps)
    distance = max(
        float((mine - theirs).abs().max())
        for kind, chip in (("weights", forward), ("feedback", back))
        for mine, theirs in zip(chip[kind], alone[kind], strict=True)
    )
    first, last = forward["losses"][0], forward["losses"][-1]
    print(f"{options.rule}: loss {first:.3f} to {last:.3f} in {options.steps} steps")
    print(f"largest difference of a W or B from one process: {distance:.1e}")
    for name, sent in (("forward to feedback", down), ("feedback to forward", up)):
        for kind, count in sorted(sent.items()):
            print(f"{name}: {kind}, {count} bytes")
    return 0 if distance < 1e-6 else 1


if __name__ == "__main__":
    raise SystemExit(main())
