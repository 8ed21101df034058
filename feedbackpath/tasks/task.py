"""A task: data, loss and metric. Image classification is the one that a plain dataset stands for."""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from feedbackpath.arguments import checked, refuse_name
from feedbackpath.data import DATASETS, Dataset, Split, load_dataset
from feedbackpath.data.dataset import stream_positions
from feedbackpath.errors import DataError

Samples = tuple[Tensor, Tensor]
"""Inputs ``[N, ...]`` and targets ``[N, ...]``."""


def wrong_percent(output: Tensor, target: Tensor) -> Tensor:
    """Return 100 for each sample that is classified wrongly, else 0: its mean is the error in percent."""
    return 100.0 * (output.argmax(-1) != target).double()


@dataclass(frozen=True)
class Task(Dataset):
    """Data, loss and metric.

    The fields of the data come first: ``name``, ``num_classes`` (outputs of the network), ``sample_shape``,
    ``train``, ``validation``, ``test`` and ``facts``.

    Attributes:
        loss: Returns the mean loss of a minibatch, given the network's output and the targets.
        score: Returns a number for each sample, ``[N]``, given output and targets. The metric is its mean.
        metric: What the metric is called: ``error`` gives ``test_error`` in result files.
        unit: The unit, printed after its numbers.
        lower_is_better: Whether smaller numbers are better.
        chance: The metric of guesses at random; None: not known, or computed (`wrong_percent`).
    """

    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    score: Callable[[Any, Tensor], Tensor] = wrong_percent
    metric: str = "error"
    unit: str = "%"
    lower_is_better: bool = True
    chance: float | None = None

    @property
    def guessing(self) -> dict[str, float]:
        """What is known of guesses at random: ``classes``, how many there are, and ``chance``, their metric.

        Example:
            >>> load_task("digits").guessing
            {'classes': 10, 'chance': 90.0}
        """
        if self.chance is None and self.score is wrong_percent:
            return {"classes": self.num_classes, "chance": 100.0 * (1.0 - 1.0 / self.num_classes)}
        return {} if self.chance is None else {"chance": self.chance}

    @classmethod
    @checked(DataError)
    def of_tensors(
        cls,
        name: str,
        *,
        train: Samples,
        validation: Samples,
        test: Samples,
        num_outputs: int,
        samples_per_epoch: int | None = None,
        **settings: Any,
    ) -> Self:
        """Make a task of tensors in memory.

        Args:
            name: Its name.
            train: What to learn from.
            validation: What to choose hyperparameters by.
            test: What to report.
            num_outputs: Outputs of the network.
            samples_per_epoch: Training samples per epoch; all of them by default.
            settings: ``loss``, ``score``, ``metric``, ``unit``, ``lower_is_better``, ``chance``.

        Raises:
            DataError: Inputs and targets differ in number, or there are none.

        Example:
            >>> x, y = torch.randn(60, 3), torch.randn(60, 1)
            >>> rows = {"train": slice(40), "validation": slice(40, 50), "test": slice(50, 60)}
            >>> parts = {name: (x[own], y[own]) for name, own in rows.items()}
            >>> judged = {"metric": "mse", "unit": "", "score": lambda out, y: (out - y).square().mean(1)}
            >>> task = Task.of_tensors("lines", **parts, num_outputs=1, loss=F.mse_loss, **judged)
            >>> task.sample_shape, len(task.train)
            ((3,), 40)
        """
        digest = hashlib.sha256()
        for part, (x, y) in {"train": train, "validation": validation, "test": test}.items():
            least = 2 if part == "train" else 1  # BatchNorm has no variance over a single sample
            if len(x) != len(y) or len(x) < least:
                raise DataError(
                    f"{name}: {part} has {len(x)} inputs and {len(y)} targets; give the same number of "
                    f"both, and {least} or more"
                )
            for tensor in (x, y):
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        size = samples_per_epoch or len(train[0])
        return cls(
            name,
            num_outputs,
            tuple(train[0].shape[1:]),  # type: ignore[arg-type]
            train=TensorSplit(*train, size),
            validation=TensorSplit(*validation, len(validation[0])),
            test=TensorSplit(*test, len(test[0])),
            facts={"checksum": digest.hexdigest(), "samples_per_epoch": size},
            **settings,
        )


@dataclass(frozen=True, eq=False)
class TensorSplit(Split):
    """Samples in memory as tensors.

    Attributes:
        x: Inputs ``[M, ...]``.
        y: Targets ``[M, ...]``.
        samples_per_epoch: Samples an epoch; where it is not M, epochs walk through them in turn.
    """

    x: Tensor
    y: Tensor
    samples_per_epoch: int

    def __len__(self) -> int:
        return self.samples_per_epoch

    def batch(self, indices: Tensor, epoch: int) -> Samples:
        """Return some samples of an epoch."""
        rows = stream_positions(indices, epoch, self.samples_per_epoch, len(self.x))
        return self.x[rows], self.y[rows]


@checked(DataError)
def register_task(name: str, make: Callable[..., Dataset]) -> None:
    """Give your own task a name, so that ``--data NAME`` finds it.

    Args:
        name: Its name.
        make: Returns it, or a `Dataset` of images and classes. It is called with ``seed=``, and with those of
            ``data_dir``, ``num_classes``, ``samples_per_epoch``, ``image_size`` and ``on_bad_image`` that are
            given; one that it does not take is refused. What does not depend on the seed may be the same each
            time: validation and test data have to be.

    Raises:
        DataError: The name is taken, or has a separator of folders; or ``make`` does not take ``seed``.
    """
    refuse_name(name, "a task", DataError)
    try:
        inspect.signature(make).bind(seed=0)
    except TypeError as error:
        raise DataError(f"the function of {name!r} must accept seed=0: {error}") from None
    if name in DATASETS and DATASETS[name] is not make:
        raise DataError(f"there is a dataset {name!r} already: choose another name")
    DATASETS[name] = make


def load_task(name: str, **options: Any) -> Task:
    """Load a task by its name; a plain dataset is one of classification, judged by the error in percent.

    Args:
        name: A key of `feedbackpath.data.DATASETS`.
        options: See `feedbackpath.data.load_dataset`.

    Raises:
        DataError: There is none, it does not take such an option, or its files are missing or damaged.
    """
    data = load_dataset(name, **options)
    if isinstance(data, Task):
        return data
    if not isinstance(data, Dataset):
        raise DataError(
            f"the function of {name!r} returned {type(data).__name__}: return an fp.Task or a Dataset"
        )
    return Task(**{field.name: getattr(data, field.name) for field in dataclasses.fields(Dataset)})
