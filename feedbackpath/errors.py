"""The errors and warnings that users meet; each says what was wrong, where, and what to do next."""

import numbers
import sys


class UserError(ValueError):
    """An error that the user can correct; the command line prints one line and exits with code 2."""


class UntieError(UserError):
    """A model that cannot be untied as it is, or a path that no longer fits its model."""


class RuleError(UserError):
    """A rule that does not exist, or that cannot work with the given settings or network."""


class ChipError(UserError):
    """A device, a read-out or a chip that is impossible, or does not fit the network."""


class DataError(UserError):
    """A dataset that is missing, damaged or not as expected; the message is one line."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message)))


class ConfigError(UserError):
    """A setting that does not exist or has a value that makes no sense."""


class CheckpointError(UserError):
    """A checkpoint that could not be written, or is damaged."""


class UnconvertedLayerWarning(UserWarning):
    """Layers with weights that have no untied form, so their backward pass still uses W."""


class MirrorWarning(UserWarning):
    """Feedback weights that mirror mode cannot teach, or not to the precision that was asked for."""


class KolenPollackWarning(UserWarning):
    """An optimizer under which Kolen-Pollack feedback weights would not converge to the forward ones."""


class ForgottenStepWarning(UserWarning):
    """Weights that were updated many times, while their path was neither stepped nor mirrored."""


def refuse_no_size(what: str, value: object) -> None:
    """Refuse what is no number between 1e-12 and 1e12: squares of others leave float32, and B becomes NaN.

    Raises:
        RuleError: Says ``what`` has to be one.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise RuleError(f"{what} must be a number, not {value!r}")
    if not float(value) > 0:
        raise RuleError(f"{what} must be above 0, not {value}")
    if not 1e-12 <= float(value) <= 1e12:
        raise RuleError(f"{what} must be between 1e-12 and 1e12, not {value}")


def class_name(kind: type) -> str:
    """Return the name of a class of modules; with its module's path where it is none of torch's own.

    Example:
        >>> import torch
        >>> class_name(torch.nn.Linear), class_name(type("Linear", (), {"__module__": "theirs.layers"}))
        ('Linear', 'theirs.layers.Linear')
    """
    is_torchs = kind.__module__.startswith("torch.")
    return kind.__name__ if is_torchs else f"{kind.__module__}.{kind.__qualname__}"


def pattern_of(path: str) -> str:
    """Return a layer's path with a star for each number in it: layers of a kind have the same.

    Example:
        >>> pattern_of("blocks.11.mlp.fc1")
        'blocks.*.mlp.fc1'
    """
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def printable(text: str) -> str:
    r"""Write out what a terminal could not print, or would obey: control characters, and bytes not in UTF-8.

    Example:
        >>> print(printable("caf\udce9 \x1b[31m"))
        caf\udce9 \x1b[31m
    """
    return "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)


def level_outside() -> int:
    """Return the ``stacklevel`` by which the caller's warning points at the line that called the library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("feedbackpath."):
        level, frame = level + 1, frame.f_back
    return level
