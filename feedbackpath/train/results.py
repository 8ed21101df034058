"""What a job has found: the content of ``results.json``, typed; docs/results.md lists every field.

The measured quantity is named by its metric: of a task whose metric is ``error``, files say ``test_error`` and
``validation_error`` where these types say ``test`` and ``validation``.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from feedbackpath.errors import ConfigError

SCHEMA = 1
"""Version of the layout of ``results.json``."""

Layers = dict[str, float | None]
"""Layer paths to a number, from the input layer to the output layer; None where it was not finite."""
Status = Literal["waiting", "running", "interrupted", "finished", "diverged"]
ENDED: tuple[Status, ...] = ("finished", "diverged")


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metric(_Typed):
    """What a network is judged by: a mean over the samples of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("error", description="what it is called; files say `test_` and `validation_` before it")
    unit: str = Field("%", description="what follows a number")
    lower_is_better: bool = Field(True, description="which end is good")

    @property
    def label(self) -> str:
        """Its name for readers."""
        return f"test {self.name.replace('_', ' ')}"


class Entry(_Typed):
    """What was measured after an epoch, or (epoch 0) before the first."""

    epoch: int = Field(description="0: before training")
    train_loss: float | None = Field(
        None, description="mean over the epoch's samples; none in mirror mode alone"
    )
    test: float | None = Field(None, description="the metric on the split that `evaluate_on` names")
    validation: float | None = Field(
        None, description="the metric on the validation split, with `select_best`"
    )
    matrix_angle_deg: Layers = Field(
        default_factory=dict, description="angle between B and W, by layer, degrees"
    )
    delta_angle_deg: Layers = Field(default_factory=dict, description="angle of delta to backprop's, degrees")
    gain: Layers = Field(default_factory=dict, description="<B, W> / <W, W>, by layer")
    seconds: float = Field(0.0, description="time of the epoch, measuring included")
    unreadable_images: int | None = Field(None, description="images left out, with `on_bad_image: skip`")


class Best(_Typed):
    """The epoch that validation data chose."""

    epoch: int
    validation: float
    test: float | None


class Divergence(_Typed):
    """Where a loss stopped being finite."""

    step: int
    learning_rate: float
    origin: str = Field(description="the first layer whose output was not finite")


class Run(_Typed):
    """One rule and one seed."""

    rule: str
    seed: int
    status: Status = "waiting"
    test: float | None = Field(None, description="the metric after the last epoch so far")
    seconds: float = 0.0
    history: list[Entry] = Field(default_factory=list, description="an entry an epoch")
    start: Entry | None = Field(None, description="what was measured before training")
    best: Best | None = None
    diverged_epoch: int | None = None
    divergence: Divergence | None = None

    @property
    def name(self) -> str:
        """Its name in file names, such as ``kp-seed0``."""
        return f"{self.rule}-seed{self.seed}"

    @property
    def is_ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in ENDED


class Summary(_Typed):
    """A rule's finished runs."""

    n: int = Field(description="finished seeds")
    test_mean: float | None = None
    test_se: float | None = Field(None, description="standard error of the mean; one seed has none")
    diverged: int | None = Field(None, description="seeds that diverged, if any")


class Look(_Typed):
    """How a rule of the user's is called and drawn; what is not given is chosen."""

    label: str | None = None
    colour: str | None = None


class DataFacts(BaseModel):
    """What the data says of itself: a name, and whatever tells whether it is the same data."""

    model_config = ConfigDict(extra="allow")

    name: str = ""


class Results(_Typed):
    """The results of a job."""

    layout: int = Field(SCHEMA, alias="schema", description="version of this layout")
    command: str = Field("", description="the command line that made it")
    versions: dict[str, str] = Field(default_factory=dict, description="of what numbers may depend on")
    device: str = ""
    data: DataFacts = Field(default_factory=DataFacts)
    model: str = ""
    metric: Metric = Field(default_factory=Metric)
    config: dict[str, JsonValue] = Field(default_factory=dict, description="all settings: config.yaml")
    looks: dict[str, Look] = Field(default_factory=dict, description="labels and colours of users' rules")
    runs: list[Run]
    summary: dict[str, Summary] = Field(default_factory=dict, description="by rule")

    def run_of(self, rule: str, seed: int) -> Run:
        """Return the entry of a run."""
        return next(run for run in self.runs if (run.rule, run.seed) == (rule, seed))

    def to_json(self) -> dict[str, JsonValue]:
        """Return what ``results.json`` holds: what was never measured is left out of entries."""
        made = self.model_dump(mode="json", by_alias=True)
        sparse = {"start", "best", "diverged_epoch", "divergence", "diverged"}
        sparse |= {"validation", "unreadable_images"}
        return _renamed(made, _names_of(self.metric), sparse)  # type: ignore[return-value]


def entry_to_json(entry: Entry, metric: Metric) -> dict[str, JsonValue]:
    """Return an entry as ``history.jsonl`` has it."""
    sparse = {"validation", "unreadable_images"}
    return _renamed(entry.model_dump(mode="json"), _names_of(metric), sparse)  # type: ignore[return-value]


def parse_results(content: Any, where: str) -> Results:
    """Check the content of a ``results.json``.

    Raises:
        ConfigError: It has another layout, or a field that is missing, unknown or of another type.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        layout = content.get("schema") if isinstance(content, dict) else None
        raise ConfigError(f"{where} has layout {layout!r} and this version reads {SCHEMA}; make it anew")
    try:
        metric = Metric(**content.get("metric", {}))
        names = {theirs: ours for ours, theirs in _names_of(metric).items()}
        return Results.model_validate(_renamed(content, names, set()))
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{where} is damaged: {_first_fault(error)}; choose another folder") from None


def read_results(folder: Path) -> Results:
    """Read the ``results.json`` of a folder.

    Raises:
        ConfigError: There is none, or it is damaged, or of another version's layout.
    """
    file = folder / "results.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no results.json; give the --out folder of a run") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); choose another folder") from None
    return parse_results(content, str(file))


def _names_of(metric: Metric) -> dict[str, str]:
    """Return the names in files of what is called test and validation here."""
    tests = {name: name.replace("test", f"test_{metric.name}") for name in ("test", "test_mean", "test_se")}
    return tests | {"validation": f"validation_{metric.name}"}


def _renamed(value: Any, names: dict[str, str], sparse: set[str], depth: int = 0) -> Any:
    """Rename keys at all levels of runs and summaries; drop those of ``sparse`` that are None."""
    if isinstance(value, list):
        return [_renamed(item, names, sparse, depth) for item in value]
    if not isinstance(value, dict):
        return value
    if depth == 0 and "runs" in value:
        parts = {
            name: _renamed(value[name], names, sparse, 1) for name in ("runs", "summary") if name in value
        }
        return value | parts
    return {
        names.get(name, name): _renamed(item, names, sparse, depth + 1)
        for name, item in value.items()
        if not (name in sparse and item is None)
    }


def _first_fault(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
