"""A step of the training loop (Fabric, schedule, checks) beside the same step in plain PyTorch.

Run it alone on a machine: `python benchmarks/loop.py`. Both train the 8-layer ResNet on glyphs by
Kolen-Pollack, on the same minibatch, and take turns step by step, with two threads.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from feedbackpath.data import minibatches
from feedbackpath.tasks import load_task
from feedbackpath.train.build import make_network, make_optimizer, make_path
from feedbackpath.train.config import RunConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Training

STEPS, WARM_UP = 300, 20
OUT = Path(__file__).parent / "loop" / "speed.json"


def make_loop_step(config: RunConfig, run: Training, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Return one step of the project's loop."""

    def step() -> None:
        run.consumed = 0
        run._train_step(x, y)

    return step


def make_plain_step(config: RunConfig, run: Training, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Return the same step as a user would write it."""
    model = make_network(config, 0, run.task).to(memory_format=torch.channels_last)
    path = make_path(config, config.rule, 0, model)
    optimizer = make_optimizer(model, config)
    model.train()
    x = x.to(memory_format=torch.channels_last)

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.step()
        loss.item()

    return step


def measure() -> list[float]:
    """Return, for each pair of steps, the loop's time over plain PyTorch's."""
    config = RunConfig(rule="kp", epochs=100)
    task = load_task("glyphs")
    run = Training(config, config.rule, 0, task, Engine(config))
    run.model.train()
    x, y = next(minibatches(task.train, batch_size=config.batch_size, seed=0, epoch=0, shuffle=True))
    steps = [make(config, run, x, y) for make in (make_loop_step, make_plain_step)]
    ratios = []
    for number in range(WARM_UP + STEPS):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            steps[which]()
            seconds[which] = time.perf_counter() - started
        ratios.append(seconds[0] / seconds[1])
    return ratios[WARM_UP:]


def main() -> None:
    """Measure, print and write the result file."""
    torch.set_num_threads(2)
    low, middle, high = statistics.quantiles(measure(), n=4)
    results = {
        "task": "ResNet-8, glyphs, batch 128, kp: a step of the loop over a step of plain PyTorch",
        "pairs": STEPS,
        "threads": torch.get_num_threads(),
        "processor": {"machine": platform.machine(), "torch": torch.backends.cpu.get_cpu_capability()},
        "torch": torch.__version__,
        "ratio": {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)},
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=2) + "\n")
    print(f"ratio {middle:.3f} ({low:.3f} to {high:.3f}) over {STEPS} pairs of steps")


if __name__ == "__main__":
    main()
