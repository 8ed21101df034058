"""Audit a rule on a network, and the README's table of verdicts."""

from feedbackpath.auditing import Report, audit
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload
from feedbackpath.rules import RULES

BATCH_SIZE = 8
TABLE_MODEL = "resnet8"


def audit_rule(
    rule: str, model: str = TABLE_MODEL, *, batch_size: int = BATCH_SIZE, steps: int = 2, device: str = "cpu"
) -> Report:
    """Audit training steps of a network by a rule: SGD with momentum, on one minibatch of noise.

    Args:
        rule: Name of the rule.
        model: Name of the network.
        batch_size: Samples of the minibatch.
        steps: Steps to watch and replay.
        device: torch device.

    Raises:
        UserError: There is no such rule or network, or the step cannot be audited.
    """
    step = TrainingStep(find_workload(model), rule, batch_size, Arithmetic(device))
    assert step.path is not None
    return audit(step, step.path, steps=steps)


def table_of_rules() -> str:
    """Return a Markdown table of what an audit says of every rule, on the 8-layer ResNet."""
    lines = ["| rule | verdict of its audit | the update of B takes |", "|---|---|---|"]
    for rule in RULES:
        report = audit_rule(rule)
        taken = " / ".join(dict.fromkeys(report.locality.values())) or "–"
        lines.append(f"| `{rule}` | {report.verdict} | {taken} |")
    return "\n".join(lines) + "\n"
