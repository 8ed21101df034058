"""The settings of a training run and of a comparison: what flags, YAML files, recipes and results hold."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feedbackpath.errors import ConfigError

Config = TypeVar("Config", bound="TrainConfig")


class TrainConfig(BaseModel):
    """Everything that decides the numbers of training, whatever the rule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        "glyphs", description="glyphs, digits, mnist, fashion-mnist, cifar10, cifar100 or imagenet"
    )
    data_dir: Path | None = Field(None, description="folder of the data files (--data DIR says the same)")
    classes: int | None = Field(None, ge=2, description="number of glyph classes (200 unless given)")
    image_size: int | None = Field(None, ge=8, description="side of the images in pixels (imagenet: 224)")
    on_bad_image: Literal["error", "skip"] | None = Field(
        None, description="an unreadable training image stops the run (error), or is counted (imagenet)"
    )
    num_workers: int = Field(0, ge=0, description="processes that read the data of each device")
    model: str = Field(
        "resnet8", description="mlp, lenet, transformer, resnet8, resnet20, resnet56, resnet18 or resnet50"
    )
    norm: Literal["after", "before"] = Field("after", description="BatchNorm after the ReLU, or before it")
    batchnorm_feedback: Literal["autograd", "sigma"] = Field(
        "autograd", description="what BatchNorm sends back: the whole gradient, or delta times gamma / sigma"
    )
    sync_batchnorm: bool = Field(False, description="BatchNorm statistics over all devices (CUDA)")
    seed: int = Field(0, ge=0, lt=2**32, description="first seed")
    epochs: int = Field(6, ge=1, description="epochs")
    mirror_epochs: int = Field(
        0, ge=0, description="of the epochs, so many at first in mirror mode alone (rules that mirror)"
    )
    samples_per_epoch: int | None = Field(None, ge=2, description="training samples an epoch")
    max_steps: int | None = Field(None, ge=1, description="stop after so many training steps")
    batch_size: int = Field(128, ge=2, description="samples a step, over all devices")
    micro_batch_size: int | None = Field(
        None, ge=1, description="samples at once on a device; more are accumulated (all unless given)"
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimizer")
    lr: float = Field(0.2, gt=0, description="highest learning rate")
    lr_batch_size: int | None = Field(
        None, ge=1, description="lr is for batches of so many samples, and follows --batch-size"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum (sgd)")
    nesterov: bool = Field(True, description="Nesterov's form of momentum (sgd)")
    weight_decay: float = Field(2e-3, ge=0, description="L2 penalty (sgd) or decoupled decay (adamw)")
    schedule: Literal["cosine", "constant", "steps"] = Field(
        "cosine", description="learning rate after warm-up; steps: a tenth after each of the milestones"
    )
    milestones: Annotated[tuple[int, ...], Parameter(parse=False)] = Field(
        (32, 62, 82), description="epochs after which the schedule `steps` divides the learning rate by 10"
    )
    warmup_epochs: float = Field(0.5, ge=0, description="epochs of linear warm-up")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm, that of W alone")
    evaluate_on: Literal["test", "validation"] = Field(
        "test", description="split of the reported error; choose settings on validation"
    )
    select_best: bool = Field(
        False, description="measure the validation error too, and keep the best checkpoint by it"
    )
    device: str = Field("cpu", description="torch device")
    devices: int = Field(1, ge=1, description="devices of a machine; under torchrun: what it started")
    num_nodes: int = Field(1, ge=1, description="machines (SLURM; torchrun knows by itself)")
    precision: Literal["32-true", "64-true", "bf16-mixed"] = Field("32-true", description="arithmetic")
    channels_last: bool = Field(True, description="memory format of images and convolutions")
    compile: bool = Field(False, description="run the network under torch.compile")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of torch")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="keep a checkpoint every so many steps too, not only after each epoch"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints of a run that are kept")
    overrides: Annotated[dict[str, str], Parameter(parse=False)] = Field(
        default_factory=dict, description="layer patterns to rules, over every rule (in a file only)"
    )
    rule_settings: Annotated[dict[str, dict[str, Any]], Parameter(parse=False)] = Field(
        default_factory=dict,
        description="rule names to settings that differ from its defaults (in a file only)",
    )

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
        """Return the whole config as a file that ``read_config`` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class CompareConfig(TrainConfig):
    """The settings of a comparison; the same for every rule."""

    rules: Annotated[tuple[str, ...], Parameter(negative="")] = Field(
        ("bp", "fa", "ss", "kp", "wm"), description="rules to compare, by commas"
    )
    seeds: int = Field(1, ge=1, description="number of seeds, counted up from --seed")

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
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one rule, and each only once")
        return value


class RunConfig(TrainConfig):
    """The settings of one run: one rule, one seed."""

    rule: str = Field("bp", description="rule to train by")
    select_best: bool = Field(
        True, description="measure the validation error too, and keep the best checkpoint by it"
    )

    @property
    def rules(self) -> tuple[str, ...]:
        """The one rule, as a comparison has several."""
        return (self.rule,)

    @property
    def seeds(self) -> int:
        """One: a run has the one seed that ``seed`` names."""
        return 1


def read_config(file: Path, kind: type[TrainConfig] = CompareConfig) -> dict[str, Any]:
    """Read the settings in a YAML file.

    Raises:
        ConfigError: The file cannot be read, is no mapping, or names a setting that does not exist.
    """
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read config file {file}: {getattr(error, 'strerror', None) or error}"
        ) from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"config file {file} is not YAML: {where}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"config file {file} must map settings to values, such as 'epochs: 6'")
    for name in settings:
        if name not in kind.model_fields:
            close = difflib.get_close_matches(str(name), kind.model_fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"config file {file}: unknown setting {name!r}{hint}")
    return settings


def merge_config(flags: Config, file: Path | None, recipe: Config | None = None) -> Config:
    """Return the config of a run: a flag overrides the file, the file the recipe, the recipe the defaults."""
    kind = type(flags)
    given = flags.model_dump(include=flags.model_fields_set)
    settings = read_config(file, kind) if file is not None else {}
    base = recipe.model_dump(include=recipe.model_fields_set) if recipe is not None else {}
    try:
        return kind(**(base | settings | given))
    except ValidationError as error:
        raise ConfigError(f"config file {file}: {first_fault(error)}") from None


def read_run(folder: Path, **changes: Any) -> RunConfig:
    """Read the config that ``feedbackpath train`` left in a folder, with some settings changed.

    Raises:
        ConfigError: The folder holds no run, or it is a comparison's.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{folder} holds no run: give the --out folder of feedbackpath train")
    return merge_config(RunConfig(**changes), file)


def first_fault(error: ValidationError) -> str:
    """Return what pydantic found wrong first, as one line that names the setting."""
    fault = error.errors(include_url=False)[0]
    setting = ".".join(str(part) for part in fault["loc"]).replace("_", "-")
    message = fault["msg"].removeprefix("Value error, ")
    return f"{setting}: {message}, not {fault['input']!r}"
