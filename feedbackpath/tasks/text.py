"""Next-byte prediction: text as bytes, judged in bits per byte.

The built-in corpus needs no download: the source files of Python's own standard library, which every
installation has. They differ between versions of Python; results tell which it was, and the checksum. Any
folder of text files can take its place by ``--data-dir``.
"""

import hashlib
import math
import platform
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackpath.data import Split
from feedbackpath.data.counter import uniform
from feedbackpath.errors import DataError
from feedbackpath.tasks.task import Samples, Task, register_task

CONTEXT, LONG_CONTEXT = 64, 1024  # bytes that a network sees at once: ``text``, ``text-1024``
EVERY = 20  # one file in so many is for validation, one for testing
SAMPLES_PER_EPOCH, EVALUATED = 16_384, 2_048  # windows; longer ones are fewer
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def load_text(
    seed: int, data_dir: Path | None = None, samples_per_epoch: int | None = None, *, context: int = CONTEXT
) -> Task:
    """Return the task of predicting each next byte of text.

    Which files are for validation and testing depends on their paths alone.

    Args:
        seed: Chooses the windows of each epoch.
        data_dir: A folder of text files; Python's standard library by default.
        samples_per_epoch: Windows per epoch.
        context: Bytes of a window.

    Raises:
        DataError: The folder holds no text, or too little.
    """
    folder = data_dir or Path(sysconfig.get_paths()["stdlib"])
    parts, digest, count = _read_parts(folder, "**/*" if data_dir else "**/*.py")
    if count == 0:
        raise DataError(f"text: {folder} has no files; give a folder of text files by --data-dir")
    for name, part in parts.items():
        if len(part) <= context:
            share = f"{EVERY - 2 if name == 'train' else 1} in {EVERY}"
            raise DataError(
                f"text: {folder} has {count} files, and of these {len(part)} bytes for {name}; more than "
                f"{context} are needed; give a folder of more text files: {share} of them are for {name}"
            )
    return Task(
        "text" if context == CONTEXT else f"text-{context}",
        256,
        (context,),  # type: ignore[arg-type]
        train=RandomWindows(parts["train"], samples_per_epoch or SAMPLES_PER_EPOCH, seed, context),
        validation=EvenWindows(parts["validation"], context),
        test=EvenWindows(parts["test"], context),
        facts={
            "source": str(folder) if data_dir else "Python's standard library",
            "python": platform.python_version() if data_dir is None else None,
            "files": count,
            "checksum": digest,
            "samples_per_epoch": samples_per_epoch or SAMPLES_PER_EPOCH,
            "sizes": {name: len(part) for name, part in parts.items()},
        },
        loss=byte_loss,
        score=bits_per_byte,
        metric="bits_per_byte",
        unit="",
        chance=8.0,
    )


def byte_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, given logits ``[N, T, 256]`` and the next bytes ``[N, T]``."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def bits_per_byte(logits: Tensor, target: Tensor) -> Tensor:
    """Return each window's mean cross-entropy in bits, ``[N]``."""
    nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return nats.view(target.shape).double().mean(1) / math.log(2)


@dataclass(frozen=True, eq=False)
class RandomWindows(Split):
    """Windows of text at places that are a function of seed, epoch and number.

    Attributes:
        text: Bytes, uint8 ``[M]``.
        samples_per_epoch: Windows per epoch.
        seed: Chooses them.
        context: Bytes of a window.
    """

    text: Tensor
    samples_per_epoch: int
    seed: int
    context: int

    def __len__(self) -> int:
        return self.samples_per_epoch

    def batch(self, indices: Tensor, epoch: int) -> Samples:
        """Return some windows, and the bytes that follow each of theirs: int64 ``[N, T]`` both."""
        share = uniform(indices, 1, self.seed, epoch)[:, 0].double()
        return _windows(self.text, (share * (len(self.text) - self.context)).long(), self.context)


@dataclass(frozen=True, eq=False)
class EvenWindows(Split):
    """Windows of text at even distances: the same ones whatever the seed.

    Attributes:
        text: Bytes, uint8 ``[M]``.
        context: Bytes of a window.
    """

    text: Tensor
    context: int

    def __len__(self) -> int:
        return min(EVALUATED * CONTEXT // self.context, (len(self.text) - 1) // self.context)

    def batch(self, indices: Tensor, epoch: int) -> Samples:
        """Return some windows, and the bytes that follow each of theirs: int64 ``[N, T]`` both."""
        starts = indices * ((len(self.text) - 1 - self.context) // max(len(self) - 1, 1))
        return _windows(self.text, starts, self.context)


def _windows(text: Tensor, starts: Tensor, context: int) -> Samples:
    found = text[starts[:, None] + torch.arange(context + 1)].long()
    return found[:, :-1], found[:, 1:]


def _read_parts(folder: Path, pattern: str) -> tuple[dict[str, Tensor], str, int]:
    """Read the files of a folder, in the order of their paths, and tell them apart by their paths."""
    if not folder.is_dir():
        raise DataError(f"text: {folder} is not a folder; give a folder of text files by --data-dir")
    digest, count = hashlib.sha256(), 0
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in sorted(folder.glob(pattern)):
        within = path.relative_to(folder)
        if LEFT_OUT.intersection(within.parts) or not path.is_file():
            continue
        content = path.read_bytes()
        name = within.as_posix().encode(errors="surrogateescape")
        digest.update(name + b"\0" + content + b"\0")
        number = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") % EVERY
        parts[{0: "validation", 1: "test"}.get(number, "train")].append(content)
        count += 1
    joined = {name: bytearray(b"".join(of)) for name, of in parts.items()}
    empty = torch.empty(0, dtype=torch.uint8)
    tensors = {name: torch.frombuffer(of, dtype=torch.uint8) if of else empty for name, of in joined.items()}
    return tensors, digest.hexdigest(), count


register_task("text", load_text)
register_task("text-1024", partial(load_text, context=LONG_CONTEXT))
