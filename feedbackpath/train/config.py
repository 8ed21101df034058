"""The settings of a training run and of a comparison: what flags, YAML files, recipes and results hold."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from cyclopts import Group, Parameter
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from feedbackpath.train.faults import first_fault


def _section(name: str, number: int) -> Any:
    """Return what puts a setting under a heading of the help."""
    return Parameter(group=Group(name, sort_key=number))


DATA, NETWORK = _section("Data", 1), _section("Network", 2)
CHIP = _section("Chip", 3)
OPTIMIZER, SCHEDULE = _section("Optimizer", 4), _section("Schedule", 5)
RULES, MACHINE, KEPT = _section("Rules", 0), _section("Machine", 6), _section("What is kept", 7)
IN_A_FILE = Parameter(parse=False)  # no flag: it takes a mapping


def _refuse_separators(name: str) -> str:
    if os.sep in name:
        raise ValueError(f"files get this name, so it cannot have a {os.sep!r}")
    return name


MOST_THREADS, MOST_WORKERS = 4096, 512
Name = Annotated[str, AfterValidator(_refuse_separators)]
"""What a rule or a network is called."""


class DataSettings(BaseModel):
    """What is learned from."""

    data: Annotated[str, DATA] = Field(
        "glyphs",
        description="glyphs, digits, text, text-1024, mnist, fashion-mnist, cifar10, cifar100, imagenet, "
        "your own",
    )
    data_dir: Annotated[Path | None, DATA] = Field(
        None, description="folder of the data files (for imagenet, --data DIR is the same)"
    )
    classes: Annotated[int | None, DATA] = Field(
        None, ge=2, description="number of glyph classes (200 unless given)"
    )
    image_size: Annotated[int | None, DATA] = Field(
        None, ge=8, description="side of the images in pixels (imagenet: 224)"
    )
    samples_per_epoch: Annotated[int | None, DATA] = Field(
        None, ge=2, description="training samples per epoch"
    )
    on_bad_image: Annotated[Literal["error", "skip"] | None, DATA] = Field(
        None,
        description="unreadable images (imagenet): end the run (error), or leave out and count them (skip)",
    )
    evaluate_on: Annotated[Literal["test", "validation"], DATA] = Field(
        "test", description="split on which the metric is reported; choose settings on validation"
    )
    num_workers: Annotated[int, DATA] = Field(
        0, ge=0, le=MOST_WORKERS, description="processes that read data, for each device"
    )


class NetworkSettings(BaseModel):
    """What learns."""

    model: Annotated[Name, NETWORK] = Field(
        "resnet8",
        description="mlp, lenet, transformer, resnet8, resnet20, resnet56, resnet18, resnet50; gpt, "
        "gpt-124m, lstm (text); or your own",
    )
    norm: Annotated[Literal["after", "before", "scaling"], NETWORK] = Field(
        "after", description="BatchNorm after or before the activation, or synaptic scaling after it"
    )
    activation: Annotated[Literal["relu", "rectified-tanh"], NETWORK] = Field(
        "relu", description="activation after a layer (lenet and small ResNets)"
    )
    connections: Annotated[Literal["shared", "local"], NETWORK] = Field(
        "shared", description="convolution, or separate weights at each position (lenet and small ResNets)"
    )
    batchnorm_feedback: Annotated[Literal["autograd", "sigma"], NETWORK] = Field(
        "autograd", description="what BatchNorm sends back: its gradient (autograd), or delta gamma / sigma"
    )
    sync_batchnorm: Annotated[bool, NETWORK] = Field(
        False, description="BatchNorm statistics over all devices (CUDA)"
    )


CHIPS = ("ideal", "linear", "soft", "reference", "ecram", "reram", "capacitor", "pcm", "hfo2")


class ChipSettings(BaseModel):
    """What holds the weights."""

    chip: Annotated[str | None, CHIP] = Field(
        None,
        description=f"devices in the arrays: {', '.join(CHIPS)}, or a .csv file with a measured response",
    )
    read_bits: Annotated[int | None, CHIP] = Field(
        None, ge=2, le=32, description="bits of the arrays' converters, in both passes"
    )
    read_noise: Annotated[float | None, CHIP] = Field(
        None, ge=0, description="noise of a read, as a share of the outputs' root mean square"
    )
    chip_settings: Annotated[dict[str, Any], IN_A_FILE] = Field(
        default_factory=dict, description="settings of the devices, and read, wiring, update (in a file only)"
    )

    @field_validator("chip")
    @classmethod
    def _know_chip(cls, value: str | None) -> str | None:
        if value is None or value in CHIPS:
            return value
        if not value.endswith(".csv"):
            raise ValueError(f"choose {', '.join(CHIPS)}, or measured responses *.csv")
        return str(Path(value).resolve())  # a run goes on from any folder


class OptimizerSettings(BaseModel):
    """How an update is made."""

    optimizer: Annotated[Literal["sgd", "adamw"], OPTIMIZER] = Field("sgd", description="optimizer")
    lr: Annotated[float, OPTIMIZER] = Field(0.2, gt=0, lt=1e30, description="highest learning rate")
    lr_batch_size: Annotated[int | None, OPTIMIZER] = Field(
        None,
        ge=1,
        description="batch size that lr is meant for; lr is scaled in proportion to --batch-size",
    )
    momentum: Annotated[float, OPTIMIZER] = Field(0.9, ge=0, lt=1, description="momentum (sgd)")
    nesterov: Annotated[bool, OPTIMIZER] = Field(True, description="Nesterov's form of momentum (sgd)")
    weight_decay: Annotated[float, OPTIMIZER] = Field(
        2e-3, ge=0, lt=1e30, description="L2 penalty (sgd) or decoupled decay (adamw)"
    )
    clip_norm: Annotated[float | None, OPTIMIZER] = Field(
        None, gt=0, description="clip gradients to this norm; only those of W count"
    )
    batch_size: Annotated[int, OPTIMIZER] = Field(
        128, ge=2, lt=2**31, description="samples per step, over all devices"
    )
    micro_batch_size: Annotated[int | None, OPTIMIZER] = Field(
        None,
        ge=1,
        lt=2**31,
        description="samples at once on a device; gradients are accumulated (all at once unless given)",
    )


class ScheduleSettings(BaseModel):
    """How long, and with what learning rate when."""

    seed: Annotated[int, SCHEDULE] = Field(0, ge=0, lt=2**32, description="first seed")
    epochs: Annotated[int, SCHEDULE] = Field(6, ge=1, description="epochs")
    mirror_epochs: Annotated[int, SCHEDULE] = Field(
        0,
        ge=0,
        description="number of epochs at the start in which only mirror mode runs (rules with mirror mode)",
    )
    max_steps: Annotated[int | None, SCHEDULE] = Field(
        None, ge=1, description="stop after this number of training steps"
    )
    schedule: Annotated[Literal["cosine", "constant", "steps"], SCHEDULE] = Field(
        "cosine", description="learning rate after warm-up; steps: divided by 10 after each of the milestones"
    )
    milestones: Annotated[tuple[int, ...], SCHEDULE, Parameter(negative="")] = Field(
        (32, 62, 82),
        description="epochs after which --schedule steps divides the rate by 10, separated by commas",
    )
    warmup_epochs: Annotated[float, SCHEDULE] = Field(0.5, ge=0, description="epochs of linear warm-up")
    early_efolds: Annotated[float | None, SCHEDULE] = Field(
        None, gt=0, description="e-folds of weight decay in the first tenth of the steps, for kp"
    )


class MachineSettings(BaseModel):
    """Where it runs."""

    device: Annotated[str, MACHINE] = Field("cpu", description="torch device")
    devices: Annotated[int, MACHINE] = Field(
        1, ge=1, description="number of devices of a machine (torchrun sets it by itself)"
    )
    num_nodes: Annotated[int, MACHINE] = Field(
        1, ge=1, description="number of machines (SLURM; torchrun sets it by itself)"
    )
    precision: Annotated[Literal["32-true", "64-true", "bf16-mixed"], MACHINE] = Field(
        "32-true", description="arithmetic"
    )
    channels_last: Annotated[bool, MACHINE] = Field(
        True, description="memory format of images and convolutions"
    )
    compile: Annotated[bool, MACHINE] = Field(False, description="run the network under torch.compile")
    num_threads: Annotated[int | None, MACHINE] = Field(
        None, ge=1, le=MOST_THREADS, description="CPU threads of torch"
    )


class KeptSettings(BaseModel):
    """What is left on disk."""

    select_best: Annotated[bool, KEPT] = Field(
        False, description="measure the validation metric too, and keep the checkpoint that is best by it"
    )
    checkpoint_steps: Annotated[int | None, KEPT] = Field(
        None, ge=1, description="also keep a checkpoint after every so many steps, not only after each epoch"
    )
    keep_checkpoints: Annotated[int, KEPT] = Field(
        2, ge=1, description="number of newest checkpoints of a run to keep"
    )


class RuleSettings(BaseModel):
    """How rules are chosen, and what is the user's own."""

    imports: Annotated[tuple[Path, ...], RULES, Parameter(name="--import", negative="")] = Field(
        (), description="Python file that registers rules, layers, models or tasks of your own"
    )
    overrides: Annotated[dict[str, str], IN_A_FILE] = Field(
        default_factory=dict,
        description="patterns of layer names, each with the rule to use there instead (in a file only)",
    )
    rule_settings: Annotated[dict[str, dict[str, Any]], IN_A_FILE] = Field(
        default_factory=dict,
        description="names of rules, each with settings that differ from its defaults (in a file only)",
    )

    @field_validator("imports")
    @classmethod
    def _keep_places(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(file.resolve() for file in value)  # a run goes on from any folder


class TrainConfig(
    RuleSettings,
    KeptSettings,
    MachineSettings,
    ScheduleSettings,
    OptimizerSettings,
    ChipSettings,
    NetworkSettings,
    DataSettings,
):
    """Everything that decides the numbers of training, whatever the rule."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    by_rule: Annotated[dict[str, dict[str, Any]], IN_A_FILE] = Field(
        default_factory=dict,
        description="names of rules, each with its own optimizer settings, as from `tune` (in a file only)",
    )

    @field_validator("milestones", mode="before")
    @classmethod
    def _split_numbers(cls, value: Any) -> Any:
        parts = list(value) if isinstance(value, list | tuple) else [value]
        return tuple(part for joined in parts for part in str(joined).split(",") if part.strip())

    @field_validator("by_rule")
    @classmethod
    def _know_settings(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for rule, settings in value.items():
            for name in settings:
                if name not in OptimizerSettings.model_fields | {"warmup_epochs": None}:
                    raise ValueError(f"{rule} may have its own optimizer settings, but {name} is not one")
        return value

    @model_validator(mode="after")
    def _keep_chips_on_one_device(self) -> Self:
        if self.chip and (self.compile or self.devices > 1 or self.num_nodes > 1):
            raise ValueError(
                "--chip runs eagerly and on one device: leave --compile, --devices, --num-nodes out"
            )
        return self

    @model_validator(mode="after")
    def _check_settings_of_rules(self) -> Self:
        for rule in self.by_rule:  # not when its turn comes, hours later
            try:
                self.for_rule(rule)
            except ValidationError as error:
                raise ValueError(f"by_rule, {rule}: {first_fault(error)}") from None
        return self

    def for_rule(self, rule: str) -> Self:
        """Return the settings that hold for a rule: those of ``by_rule`` go before the others."""
        own = self.by_rule.get(rule)
        return type(self).model_validate(self.model_dump() | own | {"by_rule": {}}) if own else self

    @model_validator(mode="before")
    @classmethod
    def _take_folder_given_as_data(cls, values: Any) -> Any:
        """Let ``--data DIR`` name the folder, as in ``train --recipe imagenet-resnet50 --data DIR``."""
        data = values.get("data") if isinstance(values, dict) else None
        if isinstance(data, str) and os.sep in data or isinstance(data, Path):
            rest = {name: value for name, value in values.items() if name != "data"}
            return {"data_dir": Path(data)} | rest
        return values

    @property
    def peak_lr(self) -> float:
        """The highest learning rate of this batch size."""
        return self.lr * (self.batch_size / self.lr_batch_size if self.lr_batch_size else 1.0)

    def to_yaml(self) -> str:
        """Return the whole config, section by section, as a file that ``read_config`` reads."""
        values, text = self.model_dump(mode="json"), ""
        for section in (
            DataSettings,
            NetworkSettings,
            ChipSettings,
            OptimizerSettings,
            ScheduleSettings,
            MachineSettings,
        ):
            own = {name: values.pop(name) for name in section.model_fields}
            text += f"# {(section.__doc__ or '').rstrip('.')}\n{yaml.safe_dump(own, sort_keys=False)}\n"
        return f"{text}# The rest\n{yaml.safe_dump(values, sort_keys=False)}"


class CompareConfig(TrainConfig):
    """The settings of a comparison; the same for every rule."""

    rules: Annotated[tuple[Name, ...], RULES, Parameter(negative="")] = Field(
        ("bp", "fa", "ss", "kp", "wm"), description="rules to compare, separated by commas; or: all"
    )
    seeds: Annotated[int, RULES] = Field(1, ge=1, description="number of seeds, counted up from --seed")
    equivalence: Annotated[float | None, RULES] = Field(
        None, gt=0, description="margin within which a rule is as good as bp, in the metric's unit"
    )

    @model_validator(mode="after")
    def _compare_with_backprop(self) -> Self:
        if self.equivalence is not None and ("bp" not in self.rules or self.seeds < 2):
            raise ValueError("--equivalence compares rules with bp over seeds: add bp, and two seeds or more")
        return self

    @field_validator("rules", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("name rules, as in bp,kp")
        return tuple(name.strip() for joined in names for name in joined.split(",") if name.strip())

    @field_validator("rules")
    @classmethod
    def _refuse_repeats(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one rule, as in bp,kp")
        if len(set(value)) != len(value):
            raise ValueError("name each rule only once")
        return value


class RunConfig(TrainConfig):
    """The settings of one run: one rule, one seed."""

    rule: Annotated[Name, RULES] = Field("bp", description="rule to train by")
    select_best: Annotated[bool, KEPT] = Field(
        True, description="measure the validation metric too, and keep the checkpoint that is best by it"
    )

    @property
    def rules(self) -> tuple[str, ...]:
        """The one rule, as a comparison has several."""
        return (self.rule,)

    @property
    def seeds(self) -> int:
        """One: a run has the one seed that ``seed`` names."""
        return 1


class AuditConfig(RuleSettings, OptimizerSettings, ChipSettings, NetworkSettings, DataSettings):
    """The settings of an audit: a step of training by one rule, on a minibatch of the data."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rule: Annotated[Name, RULES] = Field("kp", description="rule")
    steps: Annotated[int, RULES] = Field(
        2, ge=1, description="number of successive training steps to watch and repeat"
    )
    seed: Annotated[int, RULES] = Field(0, ge=0, lt=2**32, description="seed")
    batch_size: Annotated[int, OPTIMIZER] = Field(8, ge=2, lt=2**31, description="samples of the minibatch")
    device: Annotated[str, MACHINE] = Field("cpu", description="torch device")

    def as_run(self) -> RunConfig:
        """Return the training run whose steps are audited."""
        return RunConfig.model_validate(self.model_dump(exclude={"steps"}))
