"""Audit a rule on a network."""

from feedbackpath.auditing import Report, audit
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload


def audit_rule(
    rule: str, model: str = "resnet8", *, batch_size: int = 8, steps: int = 2, device: str = "cpu"
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
