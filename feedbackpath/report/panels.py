"""Runs side by side: several results files, those of one network on one data set joined in a panel."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from feedbackpath.errors import ConfigError
from feedbackpath.report.curves import Run

Results = dict[str, Any]
Source = tuple[str, Results]
"""A folder's name and the content of its ``results.json``."""

NAMES_OF_RUNS = {"rule", "rules", "seed", "seeds"}  # what runs of a panel are told apart by
LONGEST_VALUE, MOST_NAMES = 60, 3  # of what is listed where sources differ


@dataclass(frozen=True)
class Panel:
    """The runs of one network on one data set, from one results file or several.

    Args:
        data: Name of the data set.
        model: Name of the network.
        norm: ``"after"`` or ``"before"``: where BatchNorm stands to the ReLU.
        sources: The results files that the runs come from.
    """

    data: str
    model: str
    norm: str
    sources: tuple[Source, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs of all sources."""
        return [run for _, results in self.sources for run in results.get("runs") or []]

    @property
    def title(self) -> str:
        """The panel's name for readers, such as ``resnet8 on glyphs``."""
        name = " on ".join(part for part in (self.model, self.data) if part) or "feedbackpath"
        return name + (", BatchNorm before ReLU" if self.norm == "before" else "")

    @property
    def file_name(self) -> str:
        """The panel's name in file names, such as ``resnet8-glyphs-after``."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.model}-{self.data}-{self.norm}".lower()).strip("-")


def make_panel(sources: Sequence[Source]) -> Panel:
    """Join results files of the same network on the same data.

    Raises:
        ConfigError: Two of them hold a run of the same rule and seed.
    """
    owners: dict[tuple[str, Any], int] = {}
    for index, (folder, results) in enumerate(sources):
        for run in results.get("runs") or []:
            rule, seed = run["rule"], run.get("seed")
            owner = owners.setdefault((rule, seed), index)
            if owner != index:
                raise ConfigError(
                    f"{sources[owner][0]} and {folder} both hold {rule}, seed {seed}; leave one of them out"
                )
    return Panel(*_network_of(sources[0][1]), tuple(sources))


def lay_side_by_side(sources: Sequence[Source]) -> list[Panel]:
    """Sort results files into panels by data, model and norm, in the order in which these first come up.

    Raises:
        ConfigError: Two files of a panel hold a run of the same rule and seed.

    Example:
        >>> kp, fa = ({"model": "mlp", "runs": [{"rule": rule, "seed": 0}]} for rule in ("kp", "fa"))
        >>> panels = lay_side_by_side([("a", kp), ("b", fa), ("c", kp | {"model": "lenet"})])
        >>> [(panel.title, len(panel.runs)) for panel in panels]
        [('mlp', 2), ('lenet', 1)]
    """
    groups: dict[tuple[str, str, str], list[Source]] = {}
    for source in sources:
        groups.setdefault(_network_of(source[1]), []).append(source)
    return [make_panel(group) for group in groups.values()]


def join_runs(panels: Sequence[Panel]) -> list[Run]:
    """Return the runs of all panels."""
    return [run for panel in panels for run in panel.runs]


def list_differences(panel: Panel) -> list[str]:
    """Say in what the sources of a panel differ besides rules and seeds: settings, data, device, versions.

    Example:
        >>> files = [(folder, {"config": {"lr": lr}}) for folder, lr in (("a", 0.1), ("b", 0.2), ("c", 0.1))]
        >>> list_differences(make_panel(files))
        ['lr differs: 0.1 in a, c; 0.2 in b.']
    """
    facts = [(folder, _facts_of(results)) for folder, results in panel.sources]
    names = dict.fromkeys(name for _, known in facts for name in known)
    values = {
        name: _folders_by_value([(folder, known.get(name)) for folder, known in facts]) for name in names
    }
    return [
        f"{name} differs: {'; '.join(f'{_shorten(value)} in {where}' for value, where in found.items())}."
        for name, found in values.items()
        if len(found) > 1
    ]


def _network_of(results: Results) -> tuple[str, str, str]:
    data = results.get("data") or ""
    name = data.get("name", "") if isinstance(data, dict) else data
    return str(name), str(results.get("model") or ""), str((results.get("config") or {}).get("norm", ""))


def _facts_of(results: Results) -> dict[str, Any]:
    """Collect what decides the numbers of a results file, each under the name that readers know."""
    data = results.get("data")
    facts = {
        name: value for name, value in (results.get("config") or {}).items() if name not in NAMES_OF_RUNS
    }
    facts |= {f"data {name}": value for name, value in data.items()} if isinstance(data, dict) else {}
    facts |= {f"version of {name}": value for name, value in (results.get("versions") or {}).items()}
    return facts | {"hardware": results.get("device")}


def _folders_by_value(values: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Map each value, as text, to the folders that have it."""
    folders: dict[str, list[str]] = {}
    for folder, value in values:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
        folders.setdefault(text, []).append(folder)
    return {text: _enumerate(names) for text, names in folders.items()}


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
