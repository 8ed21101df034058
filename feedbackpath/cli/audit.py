"""The command ``audit``."""

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from feedbackpath.cli.exit_codes import DONE, TRANSPORTS_WEIGHTS


def audit(
    *,
    rule: Annotated[str, Parameter(help="rule")] = "kp",
    model: Annotated[str, Parameter(help="network")] = "resnet8",
    batch_size: Annotated[int, Parameter(help="samples of the minibatch")] = 8,
    steps: Annotated[int, Parameter(help="training steps in a row to watch and replay")] = 2,
    device: Annotated[str, Parameter(help="torch device")] = "cpu",
) -> int:
    """Say whether a training step transports weights: verdict, findings, and what crosses.

    Exit codes: 0 transport-free, 2 bad input, 4 weights are transported.
    """
    from feedbackpath.errors import ConfigError
    from feedbackpath.jobs.audit import audit_rule

    if batch_size < 2:
        raise ConfigError(f"--batch-size is {batch_size}; it must be at least 2")
    report = audit_rule(rule, model, batch_size=batch_size, steps=steps, device=device)
    Console(soft_wrap=True, highlight=False, markup=False).print(f"{model}, {rule}: {report}")
    return DONE if report.transport_free else TRANSPORTS_WEIGHTS
