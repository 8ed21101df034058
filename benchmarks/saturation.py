"""Are the units of an LSTM at their limits after Kolen-Pollack has learned with wrong errors?

    python benchmarks/saturation.py
    python benchmarks/language_page.py

Trains the LSTM of ``language.py long`` ("same") with its first seed for 10 of the 40 epochs: under backprop,
under ``mirror-kp``, and under ``kp`` from each first B. After each epoch it keeps, on validation text: bits
per byte; the largest angle between B and W; quartiles of the candidate's size and of the forget gate; and in
how many dimensions the states h vary, (sum of e)^2 / (sum of e^2) with e the eigenvalues of their covariance.
Killed, it goes on with the first network that is not finished.
"""

from itertools import islice
from typing import Any

import torch
from cells import Cell, run_cells
from language import OUT, settings_of
from language_samples import epochs_of
from torch import Tensor, nn

from feedbackpath.tasks.text import bits_per_byte
from feedbackpath.train.config import CompareConfig

KEPT = OUT / "saturation.json"
EPOCHS, SKIPPED = 10, 16  # the first steps of a window see little text
NETWORKS: dict[str, Cell] = {
    "bp": {"rule": "bp"},
    "mirror-kp": {"rule": "mirror-kp"},
    "kp, usual B": {"rule": "kp"},
    "kp, small B": {"rule": "kp", "scale": 0.1},
    "kp, B = 0": {"rule": "kp", "scale": "zero"},
}


def gates(embedded: Tensor, lstm: nn.LSTM) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states h, the candidates and the forget gates of an LSTM, ``[N, T, units]`` each."""
    h, _ = lstm(embedded)
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
    into = nn.functional.linear(embedded, lstm.weight_ih_l0, lstm.bias_ih_l0)
    back = nn.functional.linear(before, lstm.weight_hh_l0, lstm.bias_hh_l0)
    _, forget, candidate, _ = (into + back).chunk(4, dim=-1)
    return h, candidate.tanh(), forget.sigmoid()


def dimensions(h: Tensor) -> float:
    """Return in how many dimensions states ``[samples, units]`` vary.

    Example:
        >>> round(dimensions(torch.eye(4).repeat(9, 1)), 3)  # four corners: three dimensions
        3.0
    """
    e = torch.linalg.eigvalsh(torch.cov(h.T)).clamp(min=0)
    return float(e.sum().square() / e.square().sum())


def quartiles(values: Tensor) -> list[float]:
    """Return the quartiles of all values."""
    found: list[float] = torch.quantile(values.flatten(), torch.tensor([0.25, 0.5, 0.75])).tolist()
    return found


@torch.no_grad()
def look(model: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return what is kept of a network after an epoch, but for its angles."""
    h, candidate, forget = (part[:, SKIPPED:] for part in gates(model.embed(x), model.lstm))
    return {
        "bits_per_byte": float(bits_per_byte(model(x), y).mean()),
        "candidate": quartiles(candidate.abs()),
        "forget": quartiles(forget),
        "dimensions": dimensions(h.flatten(0, 1)),
    }


def run_cell(cell: Cell, epochs: int = EPOCHS) -> Cell:
    """Train one network and look at it after each epoch."""
    rule = cell["rule"]
    settings = {name: value for name, value in cell.items() if name != "rule"}
    own = {"rules": (rule,), "seeds": 1, "rule_settings": {rule: settings} if settings else {}}
    config = CompareConfig.model_validate(settings_of("long", "lstm", "same") | own)
    seen = []
    for training, measured in islice(epochs_of(config, rule), epochs):
        x, y = training.task.validation.batch(torch.arange(256), 0)
        angles = measured.entry.matrix_angle_deg.values()
        seen.append(look(training.model, x, y) | {"angle_deg": max(angles)})
    return {"epochs": seen}


def main() -> None:
    """Run what is not there yet."""
    run_cells(KEPT, "python benchmarks/saturation.py", NETWORKS.values(), run_cell)


if __name__ == "__main__":
    main()
