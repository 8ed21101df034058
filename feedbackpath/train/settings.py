"""Where settings come from: flags, YAML files, recipes and run folders, and which of them change nothing."""

import difflib
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from feedbackpath.arguments import shown
from feedbackpath.errors import ConfigError
from feedbackpath.train.config import AuditConfig, CompareConfig, RunConfig, TrainConfig
from feedbackpath.train.faults import first_fault

Config = TypeVar("Config", bound=BaseModel)
MOST_BYTES = 2**20  # of a file of settings


def read_config(file: Path, kind: type[BaseModel] = CompareConfig) -> dict[str, Any]:
    """Read the settings in a YAML file.

    Raises:
        ConfigError: The file cannot be read, is no mapping, or names a setting that does not exist.
    """
    return read_settings(file, list(kind.model_fields))


def read_settings(file: Path, known: Sequence[str]) -> dict[str, Any]:
    """Read a YAML file that maps some of the known names to values; see ``read_config``."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)  # a pipe can be read once, and a device may never end
        if len(content) > MOST_BYTES:
            raise ConfigError(f"config file {file} has more than {MOST_BYTES} bytes: give a file of settings")
        settings = yaml.safe_load(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read config file {file}: {reason}; give a YAML file of settings") from None
    except ConfigError:
        raise
    except Exception as error:  # its constructors raise whatever int, datetime and the like do
        raise ConfigError(f"config file {file} is not YAML: {' '.join(str(error).split())[:300]}") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigError(f"config file {file} must map settings to values, such as 'epochs: 6'")
    if unknown := [name for name in settings if name not in known]:
        close = difflib.get_close_matches(str(unknown[0]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"leave out {', '.join(map(shown, unknown))}"
        raise ConfigError(f"config file {file}: unknown setting {shown(unknown[0])}; {hint}")
    return settings


def merge_config(
    flags: Config,
    file: Path | None,
    recipe: Config | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """Return the config of a run: a flag overrides the file, the file the recipe, the recipe the defaults.

    ``settings`` are what was read of the file, if that has been done.
    """
    kind = type(flags)
    given = flags.model_dump(include=flags.model_fields_set)
    if settings is None:
        settings = read_config(file, kind) if file is not None else {}
    base = recipe.model_dump(include=recipe.model_fields_set) if recipe is not None else {}
    try:
        merged = kind(**(base | dict(settings) | given))
    except ValidationError as error:
        place = f"config file {file}: " if file is not None else ""
        raise ConfigError(f"{place}{first_fault(error)}") from None
    defaults = {name: kind.model_fields[name].get_default(call_default_factory=True) for name in settings}
    differing = {name for name in settings if getattr(merged, name) != defaults[name]}
    refuse_without_effect(merged, flags.model_fields_set | differing)
    if isinstance(merged, TrainConfig) and merged.mirror_epochs >= merged.epochs:
        raise ConfigError(
            f"--mirror-epochs {merged.mirror_epochs} of --epochs {merged.epochs} leaves none for training: "
            "the first of them are for mirror mode; give more epochs"
        )
    return merged


def refuse_without_effect(config: Any, given: Set[str]) -> None:
    """Refuse settings that change nothing in this run: whoever gives one expects something of it.

    Raises:
        ConfigError: Names the first, and why.
    """
    is_scaled, is_local = config.norm == "scaling", config.connections == "local"
    has_norm = re.match("mlp|lenet|transformer|gpt|lstm", config.model) is None
    has_maps = re.match("mlp|transformer|gpt|lstm", config.model) is None
    no_batchnorm = not has_norm or is_scaled, f"{config.model} has no BatchNorm{' then' * is_scaled}"
    idle = {
        "norm": (not (has_norm or is_scaled), f"{config.model} has no BatchNorm"),
        "batchnorm_feedback": no_batchnorm,
        "sync_batchnorm": no_batchnorm,
        "channels_last": (not has_maps or is_local, f"{config.model} has no convolution{' then' * is_local}"),
        "momentum": (config.optimizer != "sgd", "it belongs to --optimizer sgd"),
        "nesterov": (config.optimizer != "sgd", "it belongs to --optimizer sgd"),
        "read_bits": (config.chip is None, "it belongs to --chip"),
        "read_noise": (config.chip is None, "it belongs to --chip"),
        "chip_settings": (config.chip is None, "they belong to --chip"),
        "milestones": (getattr(config, "schedule", "steps") != "steps", "it belongs to --schedule steps"),
    }
    if isinstance(config, AuditConfig):
        idle |= dict.fromkeys(NOT_IN_AN_AUDIT, (True, "an audit takes one minibatch of training data"))
    for name, (is_idle, why) in idle.items():
        if is_idle and name in given:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect here: {why}; leave it out")


def read_run(folder: Path, **changes: Any) -> RunConfig:
    """Read the config that ``feedbackpath train`` left in a folder, with some settings changed.

    Raises:
        ConfigError: The folder holds no run, or it is a comparison's.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{folder} has no run: give the --out folder of feedbackpath train")
    settings = read_settings(file, [*RunConfig.model_fields, *CompareConfig.model_fields])
    if not settings.keys() <= RunConfig.model_fields.keys():
        raise ConfigError(
            f"{folder} holds a comparison, and not a run of feedbackpath train; continue it by the command "
            f"that made it (compare or hardware), with --out {folder} --resume"
        )
    return merge_config(RunConfig(**changes), file, settings=settings)


NOT_IN_AN_AUDIT = ("evaluate_on", "num_workers", "micro_batch_size", "on_bad_image", "samples_per_epoch")
