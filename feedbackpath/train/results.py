"""What a job has found: the content of ``results.json``, typed; docs/results-file.md lists every field.

The measured quantity is named by its metric: of a task whose metric is ``error``, files say ``test_error``
and ``validation_error`` where these types say ``test`` and ``validation``.
"""

import json
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from feedbackpath.errors import ConfigError
from feedbackpath.train.faults import first_fault

SCHEMA = 1
"""Version of the layout of ``results.json``."""


def _refuse_other_names(name: str) -> str:
    if not name.isprintable() or "/" in name:
        raise ValueError("files get this name, so it cannot have a '/' or characters that cannot be printed")
    return name


Measurement = Annotated[
    float | None,
    AfterValidator(lambda value: float(value) if value is not None and isfinite(value) else None),
]
"""A number that was measured; what is not finite counts as not measured, in memory as in files."""
RuleName = Annotated[str, AfterValidator(_refuse_other_names)]
"""What a run's rule is called; files are called after it."""
Layers = dict[str, Measurement]
"""Layer paths to a number, from the input layer to the output layer; None where it was not finite."""
Status = Literal["waiting", "running", "interrupted", "finished", "diverged"]
ENDED: tuple[Status, ...] = ("finished", "diverged")
BY_LAYER = {
    "matrix_angle_deg",
    "delta_angle_deg",
    "delta_chance_deg",
    "delta_norm_ratio",
    "gain",
}  # a layer may have any name, "test" too
SPARSE = {
    "start", "best", "diverged_epoch", "divergence", "diverged", "validation", "unreadable_images",
    "unreadable_test_images", "delta_chance_deg", "delta_norm_ratio", "counts",
}  # fmt: skip
"""Fields that files leave out where there is nothing to say."""


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metric(_Typed):
    """What a network is judged by: a mean over the samples of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("error", description="its name; files have `test_` and `validation_` before it")
    unit: str = Field("%", description="the unit, printed after a number")
    lower_is_better: bool = Field(True, description="whether smaller numbers are better")

    @property
    def words(self) -> str:
        """Its name for readers."""
        return self.name.replace("_", " ")

    @property
    def label(self) -> str:
        """Its name on test data, for readers."""
        return f"test {self.words}"

    @property
    def suffix(self) -> str:
        """What is printed after a number: ``%`` stands close, a word apart."""
        return f" {self.unit}" if self.unit[:1].isalnum() else self.unit


class Work(_Typed):
    """What arrays do in a training step, on average over an epoch."""

    reads: float = Field(description="vectors that are sent through an array")
    products: float = Field(description="products of a cell and a signal in them")
    dac: float = Field(description="values that are converted on their way in")
    adc: float = Field(description="values that are converted on their way out")
    writes: float = Field(description="cells that are changed, each write of a cell counted")
    pulses: float = Field(description="pulses in these writes; ideal cells take none")
    moved: float = Field(description="values that are brought to an array")


class ArrayCounts(_Typed):
    """The arrays of one kind, of all layers together."""

    cells: int = Field(description="cells; pairs and reference columns have two for each weight")
    dacs: int = Field(description="lines that signals go in by")
    adcs: int = Field(description="lines that signals come out by")
    work: dict[str, Work] = Field(description="by phase: `forward`, `backward`, `update`, `mirror`")


class Entry(_Typed):
    """What was measured after an epoch, or (epoch 0) before the first."""

    epoch: int = Field(ge=0, description="0: before training")
    train_loss: Measurement = Field(
        None, description="mean over the epoch's samples; none where only mirror mode ran"
    )
    test: Measurement = Field(None, description="the metric on the split that `evaluate_on` names")
    validation: Measurement = Field(
        None, description="the metric on the validation split, with `select_best`"
    )
    matrix_angle_deg: Layers = Field(default_factory=dict, description="angle between B and W, in degrees")
    delta_angle_deg: Layers = Field(
        default_factory=dict, description="angle between errors sent back through B and through W, in degrees"
    )
    delta_chance_deg: Layers = Field(
        default_factory=dict,
        description="of pairs of random vectors of that error's size, one in twenty has a smaller angle",
    )
    delta_norm_ratio: Layers = Field(
        default_factory=dict,
        description="length of the error through B, divided by that through W; near 0, angles mean nothing",
    )
    gain: Layers = Field(default_factory=dict, description="⟨B,W⟩/⟨W,W⟩")
    seconds: float = Field(0.0, description="time of the epoch, measuring included")
    unreadable_images: int | None = Field(None, description="images left out, with `on_bad_image: skip`")
    unreadable_test_images: int | None = Field(
        None, description="images left out of the metric on that split, with `on_bad_image: skip`"
    )
    counts: dict[str, ArrayCounts] | None = Field(
        None,
        description="with a chip: arrays of `W`, of `B`, and `one` that backprop reads in both directions",
    )


class Best(_Typed):
    """The epoch that is best on validation data."""

    epoch: int = Field(description="counted from 1")
    validation: float = Field(description="the metric on the validation split")
    test: float | None = Field(description="the metric at that epoch, on the split that `evaluate_on` names")


class Divergence(_Typed):
    """Where a loss stopped being finite."""

    step: int = Field(description="the training step, counted from 1 over all epochs")
    learning_rate: float = Field(description="the learning rate at that step")
    origin: str = Field(description="the first layer whose output was not finite")


class Run(_Typed):
    """One rule and one seed."""

    rule: RuleName = Field(description="the rule's name")
    seed: int = Field(description="runs of one seed start from the same W and see the same samples")
    status: Status = Field("waiting", description="its state")
    test: float | None = Field(None, description="the metric after the last epoch so far")
    seconds: float = Field(0.0, description="time of all epochs, measuring included")
    history: list[Entry] = Field(default_factory=list, description="an entry per epoch")
    start: Entry | None = Field(None, description="measurements before training")
    best: Best | None = Field(
        None, description="the epoch that is best on validation data, with `select_best`"
    )
    diverged_epoch: int | None = Field(None, description="the epoch in which it diverged")
    divergence: Divergence | None = Field(None, description="where it diverged")

    @property
    def name(self) -> str:
        """Its name in file names, such as ``kp-seed0``."""
        return f"{self.rule}-seed{self.seed}"

    @property
    def entries(self) -> list[Entry]:
        """All that was measured, in order: before training, if that was, and after each epoch."""
        return [*([self.start] if self.start else []), *self.history]

    @property
    def is_ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in ENDED


class Summary(_Typed):
    """A rule's finished runs."""

    n: int = Field(description="finished seeds with a finite metric")
    test_mean: float | None = Field(None, description="mean over them of the metric after the last epoch")
    test_se: float | None = Field(None, description="standard error of the mean; one seed has none")
    diverged: int | None = Field(None, description="seeds that diverged, if any")


class Look(_Typed):
    """How a user's rule is called, drawn and described; what is not given is chosen."""

    label: str | None = Field(None, description="its name in full")
    colour: str | None = Field(None, pattern=r"^#[0-9A-Fa-f]{6}$", description="its colour, as `#RRGGBB`")
    what: str | None = Field(None, description="what it does: the first line of its docstring")


class Verdict(_Typed):
    """A rule beside backprop, paired over seeds."""

    rule: str = Field(description="the rule")
    n: int = Field(description="seeds that both have finished")
    difference: float = Field(description="mean difference to backprop, in the metric's unit")
    low: float = Field(description="lower end of the interval")
    high: float = Field(description="upper end of the interval")
    verdict: Literal["equivalent", "not equivalent", "not shown"] = Field(
        description="equivalent: the whole interval lies within the margin"
    )
    seeds_needed: int = Field(description="seeds of a study with 80% power, if these are its pilot")


class EquivalenceTest(_Typed):
    """A look at whether rules are as good as backprop, by `--equivalence`."""

    margin: float = Field(
        description="largest difference that counts as equivalent, written down before the run"
    )
    level: float = Field(description="of each of the two one-sided tests; halved at each further look")
    seeds: int = Field(description="seeds of the job at that look")
    verdicts: list[Verdict] = Field(description="by rule")


class DataFacts(BaseModel):
    """Facts about the data: its name, and what shows whether it is the same data."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("", description="what `--data` calls it")


class Results(_Typed):
    """The results of a job."""

    layout: int = Field(SCHEMA, alias="schema", description="version of this layout")
    command: str = Field("", description="the command line that made it")
    versions: dict[str, str] = Field(
        default_factory=dict, description="versions of packages that numbers may depend on"
    )
    device: str = Field("", description="the hardware")
    data: DataFacts = Field(default_factory=DataFacts, description="facts about the data")
    model: str = Field("", description="the network")
    metric: Metric = Field(default_factory=Metric, description="the metric that networks are judged by")
    config: dict[str, JsonValue] = Field(default_factory=dict, description="all settings: config.yaml")
    looks: dict[str, Look] = Field(default_factory=dict, description="labels and colours of users' rules")
    runs: list[Run] = Field(description="in the order in which they are trained")
    summary: dict[str, Summary] = Field(default_factory=dict, description="by rule")
    equivalence: list[EquivalenceTest] = Field(
        default_factory=list, description="the looks that were taken, in their order"
    )

    def run_of(self, rule: str, seed: int) -> Run:
        """Return the entry of a run."""
        return next(run for run in self.runs if (run.rule, run.seed) == (rule, seed))

    def to_json(self) -> dict[str, JsonValue]:
        """Return what ``results.json`` holds: what was never measured is left out of entries."""
        made = self.model_dump(mode="json", by_alias=True)
        return _translated(made, names_in_files(self.metric), SPARSE)


def entry_to_json(entry: Entry, metric: Metric) -> dict[str, JsonValue]:
    """Return an entry as ``history.jsonl`` has it."""
    made: dict[str, JsonValue] = _renamed(entry.model_dump(mode="json"), names_in_files(metric), SPARSE)
    return made


def parse_results(content: Any, where: str) -> Results:
    """Check the content of a ``results.json``.

    Raises:
        ConfigError: It has another layout, or a field that is missing, unknown or of another type.
    """
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        layout = content.get("schema") if isinstance(content, dict) else None
        raise ConfigError(f"{where} has layout {layout!r} and this version reads {SCHEMA}; run the job again")
    try:
        metric = Metric(**content.get("metric", {}))
        names = {theirs: ours for ours, theirs in names_in_files(metric).items()}
        return Results.model_validate(_translated(content, names, set()))
    except (ValidationError, TypeError) as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else error
        raise ConfigError(f"{where} is damaged: {fault}; choose another folder") from None


def read_results(folder: Path) -> Results:
    """Read the ``results.json`` of a folder.

    Raises:
        ConfigError: There is none, or it is damaged, or of another version's layout.
    """
    file = folder / "results.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no results.json; give the --out folder of a run") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); choose another folder") from None
    return parse_results(content, str(file))


def names_in_files(metric: Metric) -> dict[str, str]:
    """Return what files call the fields that are named after the metric."""
    tests = {name: name.replace("test", f"test_{metric.name}") for name in ("test", "test_mean", "test_se")}
    return tests | {"validation": f"validation_{metric.name}"}


def _translated(content: dict[str, Any], names: dict[str, str], sparse: set[str]) -> dict[str, Any]:
    """Rename what runs and summaries hold; the names of rules and of settings are left alone."""
    found = dict(content)
    if "runs" in found:
        found["runs"] = _renamed(found["runs"], names, sparse)
    if isinstance(found.get("summary"), dict):
        found["summary"] = {rule: _renamed(of, names, sparse) for rule, of in found["summary"].items()}
    return found


def _renamed(value: Any, names: dict[str, str], sparse: set[str]) -> Any:
    """Rename keys at all levels but those of layers; drop those of ``sparse`` that have nothing."""
    if isinstance(value, list):
        return [_renamed(item, names, sparse) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        names.get(name, name): item if name in BY_LAYER else _renamed(item, names, sparse)
        for name, item in value.items()
        if not (name in sparse and item in (None, {}))
    }
