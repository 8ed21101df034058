"""The settings of a comparison: what the command line, a YAML file and ``results.json`` hold."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from feedbackpath.errors import ConfigError


class CompareConfig(BaseModel):
    """Everything that decides a comparison's numbers; the same for every rule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: Annotated[tuple[str, ...], Parameter(negative="")] = Field(
        ("bp", "fa", "ss", "kp", "wm"), description="rules to compare, by commas"
    )
    data: str = Field("glyphs", description="glyphs, digits, mnist, fashion-mnist, cifar10 or cifar100")
    data_dir: Path | None = Field(None, description="folder of the data files")
    classes: int | None = Field(None, ge=2, description="number of glyph classes (200 unless given)")
    model: str = Field("resnet8", description="mlp, lenet, resnet8, resnet20, resnet56, resnet18 or resnet50")
    norm: Literal["after", "before"] = Field("after", description="BatchNorm after the ReLU, or before it")
    seeds: int = Field(1, ge=1, description="number of seeds, counted up from --seed")
    seed: int = Field(0, ge=0, lt=2**32, description="first seed")
    epochs: int = Field(6, ge=1, description="epochs")
    samples_per_epoch: int | None = Field(None, ge=2, description="training samples an epoch")
    max_steps: int | None = Field(None, ge=1, description="stop after so many training steps")
    batch_size: int = Field(128, ge=2, description="samples a step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimizer")
    lr: float = Field(0.2, gt=0, description="highest learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum (sgd)")
    nesterov: bool = Field(True, description="Nesterov's form of momentum (sgd)")
    weight_decay: float = Field(2e-3, ge=0, description="L2 penalty (sgd) or decoupled decay (adamw)")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after warm-up")
    warmup_epochs: float = Field(0.5, ge=0, description="epochs of linear warm-up")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm, that of W alone")
    evaluate_on: Literal["test", "validation"] = Field(
        "test", description="split of the reported error; choose settings on validation"
    )
    device: str = Field("cpu", description="torch device")
    devices: Literal[1] = Field(1, description="number of devices; this version trains on one")
    precision: Literal["32-true", "64-true", "bf16-mixed"] = Field("32-true", description="arithmetic")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of torch")
    overrides: Annotated[dict[str, str], Parameter(parse=False)] = Field(
        default_factory=dict, description="layer patterns to rules, over every rule (in a file only)"
    )
    rule_settings: Annotated[dict[str, dict[str, Any]], Parameter(parse=False)] = Field(
        default_factory=dict,
        description="rule names to settings that differ from its defaults (in a file only)",
    )

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

    def to_yaml(self) -> str:
        """Return the whole config as a file that ``read_config`` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_config(file: Path) -> dict[str, Any]:
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
        if name not in CompareConfig.model_fields:
            close = difflib.get_close_matches(str(name), CompareConfig.model_fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"config file {file}: unknown setting {name!r}{hint}")
    return settings


def merge_config(flags: CompareConfig, file: Path | None) -> CompareConfig:
    """Return the config of a run: a flag overrides the file, the file overrides the defaults."""
    given = flags.model_dump(include=flags.model_fields_set)
    settings = read_config(file) if file is not None else {}
    try:
        return CompareConfig(**(settings | given))
    except ValidationError as error:
        raise ConfigError(f"config file {file}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """Return what pydantic found wrong first, as one line that names the setting."""
    fault = error.errors(include_url=False)[0]
    setting = ".".join(str(part) for part in fault["loc"]).replace("_", "-")
    message = fault["msg"].removeprefix("Value error, ")
    return f"{setting}: {message}, not {fault['input']!r}"
