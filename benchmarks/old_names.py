"""Result files of the time when ``wm-exact`` was named ``wm``, read with the names that rules have today."""

from pathlib import Path

from feedbackpath.train.results import Results, read_results

WM_WAS_EXACT = (
    "fashion-mnist-lenet",
    "fashion-mnist-resnet56",
    "glyphs-resnet8-bp-wm",
    "glyphs1000-resnet18",
    "glyphs1000-resnet18-bp-wm",
    "one-input",
)
"""Folders beside this file."""


def name_now(rule: str) -> str:
    """Return what a rule of such a file is named today."""
    return {"wm": "wm-exact"}.get(rule, rule)


def read_with_names_of_now(folder: Path) -> Results:
    """Read a folder's results; a file keeps the names that it was made with."""
    found = read_results(folder)
    if folder.name not in WM_WAS_EXACT:
        return found
    runs = [run.model_copy(update={"rule": name_now(run.rule)}) for run in found.runs]
    return found.model_copy(update={"runs": runs})
