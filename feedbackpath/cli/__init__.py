"""The command line: parse and dispatch, nothing else; a command's module is imported when it runs."""

import errno
import sys
from typing import Any

from cyclopts import App, CycloptsError
from cyclopts.exceptions import ValidationError as FlagError

from feedbackpath import __version__
from feedbackpath.cli.exit_codes import BAD_INPUT
from feedbackpath.errors import UserError

_NEXT_STEPS = {
    errno.ENOSPC: "; make room, and go on with --resume",
    errno.EDQUOT: "; make room, and go on with --resume",
    errno.EACCES: "; ask for the right to it, or choose another place",
    errno.EPERM: "; ask for the right to it, or choose another place",
    errno.EROFS: "; choose another --out",
    errno.ENOTDIR: "; choose another --out",
    errno.EEXIST: "; choose another --out",
    errno.ENAMETOOLONG: "; choose a shorter name",
    errno.EISDIR: "; choose another place",
}

app = App(
    name="feedbackpath",
    help="Deep learning without weight transport: train, compare and measure feedback paths that learn.",
    version=__version__,
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
    help="Search settings for each rule: as many trials for every one, on validation data alone.\n\n"
    "Example: feedbackpath tune --data digits --model mlp --rules bp,kp --trials 16",
)
app.command(
    "feedbackpath.cli.evaluate:evaluate",
    name="eval",
    help="Measure a trained network anew: errors on validation and test data, angles and gains.\n\n"
    "Example: feedbackpath eval runs/kp --which best",
)
app.command(
    "feedbackpath.cli.report:report",
    help="Write the figures and report.html of a run anew, or lay several runs side by side.\n\n"
    "Example: feedbackpath report runs/kp runs/bp --out runs/both",
)
app.command(
    "feedbackpath.cli.audit:audit",
    help="Say whether a training step transports weights: verdict, findings, and what crosses.\n\n"
    "Example: feedbackpath audit --rule kp --model mlp --data digits",
)
app.command(
    "feedbackpath.cli.bench:bench",
    help="Measure what each rule costs beside plain PyTorch: time, memory and start-up.\n\n"
    "Example: feedbackpath bench --models mlp,lenet --rules fa,kp",
)

mirror_app = App(name="mirror", help="Look at mirror mode before it is run.")
mirror_app.command(
    "feedbackpath.cli.mirror:plan",
    help="Print what mirror mode will do with each layer: samples, predicted angle, FLOPs, and how often.",
)
app.command(mirror_app)

app.command(
    "feedbackpath.cli.hardware:app",
    name="hardware",
    help="Train with W and B in arrays of imperfect devices; `tolerance` finds what each rule tolerates.\n\n"
    "Example: feedbackpath hardware --chip reram --read-bits 8 --rules bp,fa,ss,kp,wm",
)

app.command("feedbackpath.cli.rules:rules", help="List the rules.")

data_app = App(name="data", help="Look after the images that imagenet is read from.")
data_app.command(
    "feedbackpath.cli.data:check", help="Decode every image of a folder, and list what is wrong."
)
data_app.command(
    "feedbackpath.cli.data:shrink",
    help="Write a copy of an image folder with the short sides at 256 pixels; list what could not be read.",
)
app.command(data_app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; what the user can mend is one line on standard error, and code 2."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except FlagError as error:
        _refuse(_describe(error))
    except (CycloptsError, UserError) as error:
        _refuse(str(error))
    except OSError as error:  # a folder that cannot be written, a disk that is full
        _refuse(
            f"{error.filename or 'a file'}: {error.strerror or error}{_NEXT_STEPS.get(error.errno or 0, '')}"
        )
    sys.exit(code if isinstance(code, int) else 0)


def _describe(error: FlagError) -> str:
    """Return what a settings model found wrong, as one line that names the flag."""
    from pydantic import ValidationError

    from feedbackpath.train.faults import first_fault

    cause = error.__cause__
    return f"--{first_fault(cause)}" if isinstance(cause, ValidationError) else str(error)


def _refuse(message: str) -> Any:
    sys.stderr.write(f"feedbackpath: {' '.join(message.split())}\n")
    sys.exit(BAD_INPUT)
