"""What a step of the small GPT costs under each rule, over plain PyTorch's.

    python benchmarks/gpt_step.py          # measure, and write the table of docs/language.md
    python benchmarks/gpt_step.py --draw   # write the table from the result file alone

AdamW, moments shared under Kolen-Pollack, one thread, steps in turns, CPU time. Two minutes of one core.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from marked import as_table, measure_into, with_quartiles, write_between
from marked import parse_draw as parse

import feedbackpath as fp
from feedbackpath.bench.measure import keep_freed_memory, ratio_to, time_in_turns
from feedbackpath.jobs.run import make_task
from feedbackpath.tasks import Task
from feedbackpath.train.build import make_network
from feedbackpath.train.config import CompareConfig

HERE = Path(__file__).parent
OUT, PAGE = HERE / "language" / "step.json", HERE.parent / "docs" / "language.md"
PLAIN, RULES, BATCHES, ROUNDS = "plain", ("bp", "fa", "ss", "kp", "mirror-kp"), (16, 64), 60
CONFIG = CompareConfig(data="text", model="gpt", optimizer="adamw", lr=0.003, weight_decay=0.1)


class GPTStep:
    """One network, its optimizer and its minibatch; calling it does one step.

    Args:
        rule: The rule that it is untied by, or ``PLAIN``.
        task: The text.
        batch_size: Windows a step.
    """

    def __init__(self, rule: str, task: Task, batch_size: int) -> None:
        self.task, self.model = task, make_network(CONFIG, 0, task)
        self.path = None if rule == PLAIN else fp.untie(self.model, rule)
        x, self.y = task.train.batch(torch.arange(batch_size), 1)
        self.x = task.train.prepare(x)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay
        )
        if self.path is not None and "kp" in rule:
            fp.share_moments(self.path, self.optimizer)

    def __call__(self) -> None:
        """Do a step."""
        self.optimizer.zero_grad()
        self.task.loss(self.model(self.x), self.y).backward()
        self.optimizer.step()
        if self.path is not None:
            self.path.step()


def measure() -> dict[str, dict[str, Any]]:
    """Return the ratio of each rule's step to the plain one's, by batch size."""
    keep_freed_memory()
    task, found = make_task(CONFIG, 0), {}
    for batch_size in BATCHES:
        steps = {rule: GPTStep(rule, task, batch_size) for rule in (PLAIN, *RULES)}
        for step in steps.values():
            step()
        seconds = time_in_turns(steps, ROUNDS)
        found[str(batch_size)] = {rule: ratio_to(seconds[PLAIN], seconds[rule]) for rule in RULES}
    return found


def table() -> str:
    """Return the table of docs/language.md."""
    found = json.loads(OUT.read_text(encoding="utf-8"))["ratios"]
    rows = [
        [batch_size, *(with_quartiles(ratios[rule], 3) for rule in RULES)]
        for batch_size, ratios in found.items()
    ]
    return as_table(["windows a step", *(f"`{rule}`" for rule in RULES)], rows)


if __name__ == "__main__":
    if not parse(sys.argv[1:]).draw:
        measure_into(OUT, "ratios", measure)
    write_between(PAGE, "gpt-step", table() + "\n")
