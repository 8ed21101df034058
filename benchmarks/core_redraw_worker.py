"""What one process of ``core_redraw.py`` does with the package that it finds: trains it, and times its steps.

Jobs come through standard input. The package is imported inside functions only: PYTHONPATH says from which
tree, and the process that compares two trees takes the tables below without importing either.
"""

import ctypes
import hashlib
import inspect
import itertools
import os
import pickle
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN = "plain"  # the network that was never untied
DRAWN = ("fa", "kp")  # rules whose B begins as random numbers and is not mirrored
NUM_LABELLINGS = 32  # with one alone W soon comes to rest, and a mirror would look cheaper than it is
WARM_UP = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Network:
    """A network of the package, its samples ``(C, H, W)`` and its minibatch; ``data`` is for ``losses``."""

    model: str
    sample_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int
    data: str = ""


LOSSES = {
    "resnet8": Network("resnet8", (1, 24, 24), 200, 16, "glyphs"),
    "mlp": Network("mlp", (1, 8, 8), 10, 16, "digits"),
    "lenet": Network("lenet", (1, 24, 24), 200, 16, "glyphs"),
}
TIMES = {
    "mlp": Network("mlp", (1, 28, 28), 10, 256),
    "resnet8": Network("resnet8", (1, 24, 24), 200, 128),
    "resnet18": Network("resnet18", (3, 64, 64), 1000, 16),
    "transformer": Network("transformer", (1, 28, 28), 10, 128),
}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
}


class Training:
    """A network under a rule, with its optimizer, as a user would write it.

    Args:
        network: What to train.
        rule: Name of the rule; `PLAIN`: the network stays as it is.
        optimizer: A key of `OPTIMIZERS`.
        dtype: Of the parameters.
        layout: Memory format of the parameters.
        fill: Whether random B are replaced by numbers that do not depend on the tree.
    """

    def __init__(
        self,
        network: Network,
        rule: str,
        optimizer: str = "sgd",
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
        fill: bool = False,
    ) -> None:
        import feedbackpath as fp
        from feedbackpath.models import build_model

        torch.manual_seed(0)
        self.model: nn.Module = build_model(
            network.model, sample_shape=network.sample_shape, num_classes=network.num_classes
        )
        self.model.to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        state = (value.numpy().tobytes() for value in self.model.state_dict().values())
        self.digest = hashlib.sha256(b"".join(state)).hexdigest()
        self.path = None
        if rule != PLAIN:
            # Both trees read the mirror out exactly, the old one always, the new one where it is asked to.
            has_start = "start" in inspect.signature(fp.MirrorKolenPollack).parameters
            exact = {"mirror-kp": fp.MirrorKolenPollack(start="exact")} if has_start else {}  # type: ignore[call-arg]
            self.path = fp.untie(self.model, exact.get(rule, rule))
        if fill and rule in DRAWN:
            self._fill_feedback()
        if rule == "mirror-kp" and self.path is not None:
            self.path.mirror()
        self.forward = self.model
        kind, settings = OPTIMIZERS[optimizer]
        self.optimizer = kind(self.model.parameters(), **settings)

    @torch.no_grad()
    def _fill_feedback(self) -> None:
        random = np.random.default_rng(0)
        for _, weight, feedback in self.path.pairs() if self.path else ():
            values = random.normal(0.0, weight[0].numel() ** -0.5, weight.shape)
            feedback.copy_(torch.from_numpy(values))

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Do a step; return the loss before it."""
        loss = F.cross_entropy(self.forward(x), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.path is not None:
            self.path.step()
        return loss.detach()

    def feedback(self) -> dict[str, np.ndarray]:
        """Return a copy of every B; under bp this is W."""
        return {name: b.detach().numpy().copy() for name, _, b in self.path.pairs()} if self.path else {}


class Jobs:
    """What a worker can be asked for; arguments and answers are plain values and arrays."""

    def find_tree(self) -> str:
        """Return the tree that the package was imported from."""
        import feedbackpath as fp

        return str(Path(fp.__file__).resolve().parent.parent)

    def draw(self, name: str, steps: int, batch_size: int) -> tuple[str, list[tuple[Any, Any]]]:
        """Return the name of the data and their first minibatches; random ones where there are no data."""
        from feedbackpath import DataError
        from feedbackpath.data import load_dataset, minibatches

        network = LOSSES[name]
        try:
            train = load_dataset(network.data).train
        except (DataError, ImportError):
            random = np.random.default_rng(0)
            images = random.normal(size=(steps, batch_size, *network.sample_shape)).astype(np.float32)
            labels = random.integers(network.num_classes, size=(steps, batch_size))
            return "random", list(zip(images, labels, strict=True))
        epochs = (
            minibatches(train, batch_size=batch_size, seed=0, epoch=epoch, shuffle=True)
            for epoch in itertools.count()
        )
        batches = itertools.islice(itertools.chain.from_iterable(epochs), steps)
        return network.data, [(train.prepare(x).numpy(), labels.numpy()) for x, labels in batches]

    def train(
        self, cell: dict[str, Any], batches: list[tuple[Any, Any]], rank: int, store: str, fill: bool
    ) -> dict[str, Any]:
        """Train on minibatches, or on this process's share of them.

        Returns:
            A digest of W at the start, every loss, and every B before and after.
        """
        world_size, dtype = cell["processes"], getattr(torch, cell["dtype"])
        if world_size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo", f"file://{store}", timedelta(minutes=2), world_size, rank
            )
        training = Training(LOSSES[cell["network"]], cell["rule"], cell["optimizer"], dtype, fill=fill)
        if world_size > 1:
            training.forward = nn.parallel.DistributedDataParallel(training.model)
        before, own = training.feedback(), slice(rank, None, world_size)
        losses = [
            float(training.step(torch.from_numpy(x[own]).to(dtype), torch.from_numpy(labels[own])))
            for x, labels in batches
        ]
        after = training.feedback()
        return {"digest": training.digest, "losses": np.array(losses), "before": before, "after": after}

    def prepare(self, name: str, rules: Sequence[str], batch_size: int, core: int | None) -> None:
        """Build what is timed, on one core, and warm it up."""
        if core is not None:
            os.sched_setaffinity(0, {core})
        network, layout = TIMES[name], torch.channels_last
        self.trainings = {rule: Training(network, rule, layout=layout) for rule in rules}
        self.x = torch.randn(batch_size, *network.sample_shape).to(memory_format=layout)
        self.labels = torch.randint(network.num_classes, (NUM_LABELLINGS, batch_size))
        for number, rule in itertools.product(range(WARM_UP), rules):
            self.time_step(rule, number)

    def time_step(self, rule: str, number: int) -> tuple[float, float]:
        """Do a step; return its seconds of CPU time and by the clock."""
        labels = self.labels[number % NUM_LABELLINGS]
        cpu, clock = time.process_time(), time.perf_counter()
        self.trainings[rule].step(self.x, labels)
        return time.process_time() - cpu, time.perf_counter() - clock


def keep_freed_memory() -> None:
    """Let the C library keep what is freed (Linux): else steps fetch pages anew, or do not, by chance."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def serve() -> None:
    """Answer jobs from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the package prints must not get between the answers
    torch.set_num_threads(1)
    keep_freed_memory()
    jobs = Jobs()
    while True:
        try:
            job, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, getattr(jobs, job)(**arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
