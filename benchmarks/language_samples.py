"""What networks of the study in ``language.py`` write, and how far their errors are from backprop's.

    python benchmarks/language_samples.py [--networks lstm] [--out benchmarks/language/samples.json]

Trains each rule with its best settings once more, with the first seed of the study, and keeps of each: its
bits per byte on test text; 200 bytes that it writes after a prompt (temperature 0.8, the same random numbers
for all); delta angles by layer; and, of the LSTM, the angle between the error through B and that through W
that arrives at the input of a time step, from the loss of the last one, by the steps in between. Killed, it
goes on where it was.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cells import Cell, run_cells
from language import OUT, RULES, settings_of
from torch import Tensor, nn

from feedbackpath.core.exchange import as_backprop
from feedbackpath.measure.angles import angle_deg
from feedbackpath.tasks import load_task
from feedbackpath.tasks.text import CONTEXT, byte_loss
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Measured, Training

PROMPT = "def read_lines(path):\n    "


@torch.no_grad()
def write(model: nn.Module, length: int = 200, temperature: float = 0.8) -> str:
    """Return what a network writes after the prompt, as text."""
    generator = torch.Generator().manual_seed(0)
    text = list((b"\n" * CONTEXT + PROMPT.encode())[-CONTEXT:])
    for _ in range(length):
        logits = model(torch.tensor([text[-CONTEXT:]]))[0, -1] / temperature
        text.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return bytes(text[CONTEXT:]).decode("utf-8", "backslashreplace")


def angles_by_step(model: Any, x: Tensor, y: Tensor) -> list[float]:
    """Return the angle of the last step's error at each step's input, by the steps between the two."""

    def errors() -> Tensor:
        inputs: list[Tensor] = []
        hook = model.embed.register_forward_hook(lambda *called: inputs.append(called[2]))
        loss = byte_loss(model(x)[:, -1:], y[:, -1:])
        hook.remove()
        return torch.autograd.grad(loss, inputs[0])[0]

    ours = errors()
    with as_backprop():
        exact = errors()
    return [angle_deg(ours[:, -1 - back], exact[:, -1 - back]) for back in range(x.shape[1])]


def epochs_of(config: CompareConfig, rule: str) -> Iterator[tuple[Training, Measured]]:
    """Train one network with a job's first seed, and yield it after each epoch with what was measured."""
    torch.set_num_threads(1)
    task = load_task("text", seed=config.seed, samples_per_epoch=config.samples_per_epoch)
    training = Training(config.for_rule(rule), rule, config.seed, task, Engine(config))
    training.begin()
    while not training.is_finished:
        for event in training.go_through_epoch():
            if isinstance(event, Measured):
                yield training, event


def run_cell(cell: Cell) -> Cell:
    """Train one network and look at it."""
    network, rule = cell["network"], cell["rule"]
    config = CompareConfig.model_validate(settings_of("run", network))
    *_, (training, measured) = epochs_of(config, rule)
    x, y = training.task.test.batch(torch.arange(64), 0)
    angles = angles_by_step(training.model, x, y) if network == "lstm" else None
    return {
        "bits_per_byte": measured.entry.test,
        "sample": write(training.model.eval()),
        "delta_angle_deg": measured.entry.delta_angle_deg,
        "delta_angle_deg_by_steps_back": angles,
    }


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT / "samples.json")
    parser.add_argument("--networks", default=",".join(RULES), help="names, by commas")
    asked = parser.parse_args()
    cells = [{"network": name, "rule": rule} for name in asked.networks.split(",") for rule in RULES[name]]
    run_cells(asked.out, "python benchmarks/language_samples.py", cells, run_cell)


if __name__ == "__main__":
    main()
