"""The command ``train``."""

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from feedbackpath.cli.exit_codes import DONE
from feedbackpath.cli.output import write_out
from feedbackpath.cli.running import run
from feedbackpath.errors import ConfigError
from feedbackpath.recipes import make_recipe
from feedbackpath.train.config import RunConfig
from feedbackpath.train.settings import merge_config, read_config, read_run


def train(
    *,
    flags: Annotated[RunConfig, Parameter(name="*")] = RunConfig(),  # noqa: B008 (frozen)
    recipe: Annotated[
        str | None, Parameter(help="recipe to start from; a file and flags override it")
    ] = None,
    config: Annotated[Path | None, Parameter(help="YAML file of settings; flags override it")] = None,
    out: Annotated[Path | None, Parameter(help="folder for the results; by default runs/ and a name")] = None,
    resume: Annotated[Path | None, Parameter(help="folder of a run to continue, with its settings")] = None,
    print_config: Annotated[bool, Parameter(help="print the whole config and stop", negative="")] = False,
) -> int:
    """Train one network by one rule; keep checkpoints, the network, its history and a page.

    Exit codes: 0 done, 2 bad input, 3 diverged, 130 or 143 interrupted (the last step is kept).
    """
    if resume is not None:
        if recipe or config or out:
            raise ConfigError(
                "--resume takes the settings of the run: leave --recipe, --config and --out out"
            )
        settings, folder = read_run(resume, **flags.model_dump(include=flags.model_fields_set)), resume
    else:
        settings = _settings_of_run(flags, recipe, config)
        name = recipe or f"{settings.data}-{settings.model}"
        folder = out or Path("runs") / f"{name}-{settings.rule}-norm-{settings.norm}-seed{settings.seed}"
    if print_config:
        write_out(settings.to_yaml())
        return DONE
    return run(settings, folder, resume=resume is not None or _was_restarted(folder))


def _was_restarted(folder: Path) -> bool:
    """Whether torchrun starts this command anew after a crash: it goes on then with what it has begun.

    After a refusal it does so too; what the folder holds is then another's, and is refused again.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    from feedbackpath.jobs.book import is_of_this_launch

    return is_of_this_launch(folder)


def _settings_of_run(flags: RunConfig, recipe: str | None, config: Path | None) -> RunConfig:
    """Return a run's config; the recipe is that of the rule and norm which the flags or the file name."""
    if recipe is None:
        return merge_config(flags, config)
    settings = read_config(config, RunConfig) if config is not None else {}
    given = settings | flags.model_dump(include=flags.model_fields_set)
    cell = {name: given[name] for name in ("rule", "norm") if name in given}
    return merge_config(flags, config, make_recipe(recipe, **cell), settings)
