"""The command line: parse and dispatch, nothing else; a command's module is imported when it runs."""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import ValidationError as FlagError

from feedbackpath import __version__
from feedbackpath.cli.exit_codes import BAD_INPUT, DONE
from feedbackpath.cli.output import complain, show_warnings_in_one_line, write_out_what_cannot_be_encoded
from feedbackpath.errors import ConfigError, UserError

_NEXT_STEPS = {
    errno.ENOSPC: "; free some space, and continue with --resume",
    errno.EDQUOT: "; free some space, and continue with --resume",
    errno.EACCES: "; get permission to write there, or choose another place",
    errno.EPERM: "; get permission to write there, or choose another place",
    errno.EROFS: "; choose another --out",
    errno.ENOENT: "; choose another place",
    errno.ENOTDIR: "; choose another --out",
    errno.EEXIST: "; choose another --out",
    errno.ENAMETOOLONG: "; choose a shorter name",
    errno.EISDIR: "; choose another place",
}

_SMALLER = "a smaller --batch-size, --samples-per-epoch or --model"
TRACEBACK = "FEEDBACKPATH_TRACEBACK"
"""The environment variable with which errors that nobody foresaw are shown whole."""


def _as_typed(default: object) -> str | None:
    """Return a default as a user types it: several values with commas between them."""
    values = default if isinstance(default, tuple) else () if default is None else (default,)
    return ",".join(map(str, values)) or None


app = App(
    name="feedbackpath",
    help="Deep learning without weight transport: train, compare and measure feedback paths that learn.",
    version=__version__,
    default_parameter=Parameter(show_default=_as_typed),
    suppress_keyboard_interrupt=False,  # it would say nothing
)
app.command(
    "feedbackpath.cli.compare:compare",
    help="Train the same network by several rules; write a table, figures and one HTML page.\n\n"
    "Example: feedbackpath compare --data digits --model mlp --rules bp,fa,kp --lr 0.05 --seeds 3",
)
app.command(
    "feedbackpath.cli.train:train",
    help="Train one network by one rule; keep checkpoints, the network, its history and a page.\n\n"
    "Example: feedbackpath train --data digits --model mlp --rule kp --lr 0.05 --out runs/kp",
)
app.command(
    "feedbackpath.cli.tune:tune",
    help="Search settings for each rule on validation data, with equally many trials for every rule.\n\n"
    "Example: feedbackpath tune --data digits --model mlp --rules bp,kp --trials 16",
)
app.command(
    "feedbackpath.cli.evaluate:evaluate",
    name="eval",
    help="Measure a trained network again: errors on validation and test data, angles and gains.\n\n"
    "Example: feedbackpath eval runs/kp --which best",
)
app.command(
    "feedbackpath.cli.report:report",
    help="Draw the figures and report.html of a run again, or put several runs side by side.\n\n"
    "Example: feedbackpath report runs/kp runs/bp --out runs/both",
)
app.command(
    "feedbackpath.cli.audit:audit",
    help="Check whether a training step transports weights: verdict, findings, and signals that cross.\n\n"
    "Example: feedbackpath audit --rule kp --model mlp --data digits",
)
app.command(
    "feedbackpath.cli.bench:bench",
    help="Measure what each rule costs compared with plain PyTorch: time, memory and start-up.\n\n"
    "Example: feedbackpath bench --models mlp,lenet --rules fa,kp",
)

mirror_app = App(name="mirror", help="Show what mirror mode will do, before a run.")
mirror_app.command(
    "feedbackpath.cli.mirror:plan",
    help="Print what mirror mode will do with each layer: samples, predicted angle, FLOPs, and how often.\n\n"
    "Example: feedbackpath mirror plan --model lenet --target-angle-deg 5",
)
app.command(mirror_app)

app.command(
    "feedbackpath.cli.hardware:app",
    name="hardware",
    help="Train with W and B in arrays of imperfect devices; `tolerance` finds what each rule tolerates.\n\n"
    "Example: feedbackpath hardware --chip reram --read-bits 8 --rules bp,fa,ss,kp,wm",
)

app.command(
    "feedbackpath.cli.rules:rules",
    help="List the rules by group: paper, equation, what the rule needs, the audit's verdict, and cost.\n\n"
    "Example: feedbackpath rules",
)

data_app = App(name="data", help="Check or shrink image folders for --data imagenet.")
data_app.command(
    "feedbackpath.cli.data:check", help="Decode every image of a folder, and list what is wrong."
)
data_app.command(
    "feedbackpath.cli.data:shrink",
    help="Write a copy of an image folder with short sides of 256 pixels; list what could not be read.",
)
app.command(data_app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; whatever goes wrong is one line on standard error."""
    write_out_what_cannot_be_encoded()
    show_warnings_in_one_line()
    try:
        _refuse_slips(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:  # a job that has begun takes the signal itself, and keeps its work
        complain("interrupted")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        complain(_in_one_line(error))
        sys.exit(BAD_INPUT)
    sys.exit(code if isinstance(code, int) else DONE)


def _refuse_slips(arguments: Sequence[str]) -> None:
    """Refuse an empty value (of a shell's variable that is not set), ~ behind = or in quotes, and -flag."""
    for before, argument in zip(("feedbackpath", *arguments), arguments, strict=False):
        if not argument or (argument.startswith("--") and argument.endswith("=")):
            place = argument.rstrip("=") or before
            raise ConfigError(f"an empty value after {place}: is a variable of the shell not set?")
        if re.match(r"(--[\w-]+=)?~", argument):
            raise ConfigError(f"{argument}: the shell has left ~ as it is; write the path of the folder")
        if re.fullmatch(r"-(?!inf|nan)[a-z][a-z-]+(=.*)?", argument):
            raise ConfigError(f"{argument}: a flag begins with two dashes: write -{argument}")


def _in_one_line(error: Exception) -> str:
    """Say what was wrong, where, and what to do next."""
    if isinstance(error, FlagError):
        return _describe(error)
    if isinstance(error, CycloptsError):
        from feedbackpath.cli.parsing import describe_misuse

        return describe_misuse(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # a folder that cannot be written, a disk that is full
        next_step = _NEXT_STEPS.get(error.errno or 0, "")
        return f"{error.filename or 'a file'}: {error.strerror or error}{next_step}"
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        return f"there is not enough memory ({_first_line(error)}); ask for less: {_SMALLER}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return f"{type(error).__name__} in {place}: {_first_line(error)}; {TRACEBACK}=1 shows the whole traceback"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no memory" if isinstance(error, MemoryError) else "")[:300]


def _describe(error: FlagError) -> str:
    """Return what a settings model found wrong, as one line that names the flag."""
    from pydantic import ValidationError

    from feedbackpath.train.faults import first_fault

    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return str(error)
    fault = first_fault(cause)
    return fault if fault.startswith("--") else f"--{fault}"
