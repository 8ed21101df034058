"""The command ``compare``."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from feedbackpath.cli.running import run
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.settings import merge_config


def compare(
    *,
    flags: Annotated[CompareConfig, Parameter(name="*")] = CompareConfig(),  # noqa: B008 (frozen)
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
    out: Annotated[Path, Parameter(help="folder for results, figures and report.html")] = Path(
        "runs/compare"
    ),
    resume: Annotated[
        bool, Parameter(help="continue the job in --out, if there is one", negative="")
    ] = False,
) -> int:
    """Train the same network by several rules; write a table, figures and one HTML page.

    Exit codes: 0 done, 2 bad input, 3 a run diverged, 130 or 143 interrupted (what was done is kept).
    """
    return run(with_all_rules(merge_config(flags, config)), out, resume=resume)


def with_all_rules(settings: CompareConfig) -> CompareConfig:
    """Return settings in which ``--rules all`` is every rule there is, those of imported files too."""
    if settings.rules != ("all",):
        return settings
    from feedbackpath.jobs.imports import import_files
    from feedbackpath.rules import RULES

    import_files(settings.imports)
    return settings.model_copy(update={"rules": tuple(RULES)})
