"""Runs side by side: several results files, those of one network on one data set joined in a panel."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from feedbackpath.errors import ConfigError
from feedbackpath.report.style import Styles, choose_styles, in_order
from feedbackpath.train.results import Metric, Results, Run

Source = tuple[str, Results]
"""A folder's name and the content of its ``results.json``."""

NAMES_OF_RUNS = {"rule", "rules", "seed", "seeds"}  # what runs of a panel are told apart by
LONGEST_VALUE, MOST_NAMES = 60, 3  # of what is listed where sources differ


NORMS = {"before": ", BatchNorm before ReLU", "scaling": ", synaptic scaling"}
PARTS = {"local": "local connections", "rectified-tanh": "rectified tanh"}


@dataclass(frozen=True)
class Panel:
    """The runs of one network on one data set, from one results file or several.

    Args:
        data: Name of the data set.
        model: Name of the network, with its connections and activation if these are not the usual ones.
        norm: ``"after"`` or ``"before"``: where BatchNorm stands to the ReLU; or ``"scaling"``.
        sources: The results files that the runs come from.
    """

    data: str
    model: str
    norm: str
    sources: tuple[Source, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs of all sources, in the order of their rules."""
        runs = [run for _, results in self.sources for run in results.runs]
        rules = in_order(run.rule for run in runs)
        return sorted(runs, key=lambda run: rules.index(run.rule))

    @property
    def metric(self) -> Metric:
        """What the runs are judged by."""
        return self.sources[0][1].metric

    @property
    def title(self) -> str:
        """The panel's name for readers, such as ``resnet8 on glyphs``."""
        name = " on ".join(part for part in (self.model, self.data) if part) or "feedbackpath"
        return name + NORMS.get(self.norm, "")

    @property
    def file_name(self) -> str:
        """The panel's name in file names, such as ``resnet8-glyphs-after``."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.model}-{self.data}-{self.norm}".lower()).strip("-")


def make_panel(sources: Sequence[Source]) -> Panel:
    """Join results files of the same network on the same data.

    Raises:
        ConfigError: Two of them hold a run of the same rule and seed.
    """
    owners: dict[tuple[str, int], int] = {}
    for index, (folder, results) in enumerate(sources):
        for run in results.runs:
            owner = owners.setdefault((run.rule, run.seed), index)
            if owner != index:
                both = f"{sources[owner][0]} and {folder} both hold"
                raise ConfigError(f"{both} {run.rule}, seed {run.seed}; leave one of them out")
    return Panel(*_network_of(sources[0][1]), tuple(sources))


def lay_side_by_side(sources: Sequence[Source]) -> list[Panel]:
    """Sort results files into panels by data, model and norm, in the order in which these first come up.

    Raises:
        ConfigError: Two files of a panel hold a run of the same rule and seed, or files are judged by
            different metrics, which can share no axis and no table.

    Example:
        >>> kp, fa = (Results(model="mlp", runs=[Run(rule=rule, seed=0)]) for rule in ("kp", "fa"))
        >>> panels = lay_side_by_side([("a", kp), ("b", fa), ("c", Results(model="lenet", runs=kp.runs))])
        >>> [(panel.title, len(panel.runs)) for panel in panels]
        [('mlp', 2), ('lenet', 1)]
    """
    groups: dict[tuple[str, str, str], list[Source]] = {}
    for folder, results in sources:
        first, metric = sources[0][0], sources[0][1].metric
        if results.metric != metric:
            both = f"{first} is judged by {metric.label} and {folder} by {results.metric.label}"
            raise ConfigError(f"{both}; make a report of each")
        groups.setdefault(_network_of(results), []).append((folder, results))
    return [make_panel(group) for group in groups.values()]


def join_runs(panels: Sequence[Panel]) -> list[Run]:
    """Return the runs of all panels."""
    return [run for panel in panels for run in panel.runs]


def styles_of(panels: Sequence[Panel]) -> Styles:
    """Choose the styles of all rules of the panels."""
    looks = {rule: look for panel in panels for _, file in panel.sources for rule, look in file.looks.items()}
    return choose_styles(in_order(run.rule for run in join_runs(panels)), looks)


def suffix_of(panel: Panel, panels: Sequence[Panel]) -> str:
    """Return what the names of a panel's own figures end in, where there are several panels."""
    return f"-{panel.file_name}" if len(panels) > 1 else ""


def list_differences(panel: Panel) -> list[str]:
    """Say in what the sources of a panel differ besides rules and seeds: settings, data, device, versions.

    Example:
        >>> files = [(name, Results(config={"lr": lr}, runs=[])) for name, lr in (("a", 0.1), ("b", 0.2))]
        >>> list_differences(make_panel(files))
        ['lr differs: 0.1 in a; 0.2 in b.']
    """
    facts = [(folder, _facts_of(results)) for folder, results in panel.sources]
    differences = []
    for name in dict.fromkeys(name for _, known in facts for name in known):
        folders: dict[str, list[str]] = {}
        for folder, known in facts:
            text = json.dumps(known.get(name), ensure_ascii=False, sort_keys=True)
            folders.setdefault(text, []).append(folder)
        if len(folders) > 1:
            found = [f"{_shorten(value)} in {_enumerate(names)}" for value, names in folders.items()]
            differences.append(f"{name} differs: {'; '.join(found)}.")
    return differences


def _network_of(results: Results) -> tuple[str, str, str]:
    chosen = (str(results.config.get(name)) for name in ("connections", "activation"))
    parts = [PARTS[value] for value in chosen if value in PARTS]
    return results.data.name, ", ".join([results.model, *parts]), str(results.config.get("norm", ""))


def _facts_of(results: Results) -> dict[str, Any]:
    """Collect what decides the numbers of a results file, each under the name that readers know."""
    return {
        **{name: value for name, value in results.config.items() if name not in NAMES_OF_RUNS},
        **{f"data {name}": value for name, value in results.data.model_dump(mode="json").items()},
        **{f"version of {name}": value for name, value in results.versions.items()},
        "hardware": results.device,
    }


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
