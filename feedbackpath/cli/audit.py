"""The command ``audit``."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE, NOT_SETTLED, TRANSPORTS_WEIGHTS
from feedbackpath.cli.output import make_console
from feedbackpath.train.config import AuditConfig
from feedbackpath.train.settings import merge_config


def audit(
    *,
    flags: Annotated[AuditConfig, Parameter(name="*")] = AuditConfig(),  # noqa: B008 (frozen)
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
) -> int:
    """Check whether a training step transports weights: verdict, findings, and signals that cross.

    Exit codes: 0 transport-free, 2 bad input, 4 weights are transported, 5 not settled.
    """
    from feedbackpath.jobs.audit import audit_run

    settings = merge_config(flags, config)
    report = audit_run(settings)
    console = make_console(soft_wrap=True)
    console.print(f"{settings.model}, {settings.rule}: {report}")
    return {True: DONE, False: TRANSPORTS_WEIGHTS, None: NOT_SETTLED}[report.transport_free]
