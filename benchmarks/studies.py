"""What studies share: calls of the program, searches and jobs that go on, and the result files they keep."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from feedbackpath import cli
from feedbackpath.jobs import run_job
from feedbackpath.jobs.tune import in_words
from feedbackpath.report.live import LiveView
from feedbackpath.report.table import summary_rows
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.results import Results

ROOT = Path(__file__).parent.parent


def call(*arguments: object) -> int:
    """Run a command of the program and return its exit code.

    Raises:
        SystemExit: It was interrupted: so is this script.
    """
    sys.argv = ["feedbackpath", *map(str, arguments)]  # what result files keep as their command
    try:
        cli.main(sys.argv[1:])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if code >= 128:
            raise
        return code
    return 0


def search(work: Path, kept: Path, *arguments: object) -> None:
    """Call ``feedbackpath tune``, or go on with what was kept of it, and keep what came out.

    Raises:
        SystemExit: The search was interrupted, or could not be run.
    """
    if (kept / "tune.json").exists() and not (work / "tune.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept / "tune.json", work)
    try:
        code = call("tune", *arguments, "--out", work, "--resume")
    finally:
        for name in ("tune.json", "chosen.yaml"):
            if (work / name).exists():
                keep(work / name, kept)
    if code:
        raise SystemExit(code)


def search_with(settings: Mapping[str, Any], work: Path, kept: Path, *arguments: object) -> None:
    """Search as ``search`` does, with settings that are written beside the search.

    Raises:
        SystemExit: The search was interrupted, or could not be run.
    """
    config = work.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    search(work, kept, "--config", config, *arguments)


def train(settings: Mapping[str, Any], work: Path, kept: Path, command: str) -> Results:
    """Train what a job of ``feedbackpath compare`` asks for, or go on with it, and keep its result file."""
    config = CompareConfig.model_validate(settings)
    view = LiveView(Console(quiet=True))
    try:
        return run_job(config, work, resume=True, command=command, view=view)
    finally:
        if (work / "results.json").exists():
            keep(work / "results.json", kept)
        print(kept, flush=True)


def keep(file: Path, folder: Path) -> None:
    """Copy a result file, without the folders of the machine that made it, and what each epoch counted."""
    text = file.read_text(encoding="utf-8").replace(f"{ROOT}/", "")
    if file.suffix == ".json":
        content = json.loads(text)
        for entry in [entry for run in content.get("runs", ()) for entry in run["history"]]:
            entry.pop("counts", None)
        text = json.dumps(content) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).write_text(text, encoding="utf-8")


def settings_in_words(found: Mapping[str, Any], rule: str) -> str:
    """Return a rule's settings, those of training and its own, from what a search or a job was given.

    A job whose rules all train alike has the settings of training once.
    """
    names = [name for name in ("lr", "weight_decay", "early_efolds") if found.get(name) is not None]
    shared = found["by_rule"].get(rule) or {name: found[name] for name in names}
    settings = shared | found["rule_settings"].get(rule, {})
    return in_words(settings).replace("weight_decay", "decay").replace("early_efolds", "early e-folds")


def chosen_settings(kept: Path) -> dict[str, Any]:
    """Return what a search has chosen, as the settings of a job."""
    found: dict[str, Any] = yaml.safe_load((kept / "chosen.yaml").read_text(encoding="utf-8"))
    return found


def rows_with_settings(results: Results, columns: Sequence[str], *first: str) -> list[list[str]]:
    """Return a row for each rule of a job: first cells, columns of its summary, and its settings."""
    return [
        [*first, *(row[column] for column in columns), settings_in_words(results.config, row["rule"])]
        for row in summary_rows(results.runs, results.metric)
    ]
