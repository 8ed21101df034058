"""Learned feedback in networks that read text: the study behind docs/language.md.

    python benchmarks/language.py                      # every part, one seed
    python benchmarks/language.py --seeds 3            # two more seeds: what is there is kept
    python benchmarks/language.py --parts gpt-equivalence --seeds 10

Each part is a job of ``feedbackpath compare`` in a folder of its own; run again, it goes on where it was. The
parts ``*-equivalence`` have seeds that no other part has used, and a margin that was written here before any
of them ran. Margins are in bits per byte.

Decay of the parts ``*-efolds``: over 1,000 steps of a cosine schedule, AdamW's decoupled decay shrinks W - B
by exp(-sum of lr wd) = exp(-0.003 * 3.5 * 0.5 * 1000), 5.2 e-folds. The parts ``gpt-long*`` have as many in
ten times as many steps, with a tenth of the decay: a run takes some 20 minutes of one core.
"""

import argparse
import subprocess
import sys
from pathlib import Path

TEXT = (
    "--data text --optimizer adamw --lr 0.003 --weight-decay 0.1 --batch-size 16 --samples-per-epoch 4000 "
    "--epochs 4 --num-threads 1"
)
ZERO = Path(__file__).parent / "language_zero.yaml"  # kp whose B starts at 0
STRONG_DECAY = "--weight-decay 3.5"
LONG = "--weight-decay 0.35 --epochs 40"
MARGINS = {"gpt-equivalence": 0.02, "lstm-equivalence": 0.05}
PARTS = {
    "gpt": "--model gpt --rules bp,mirror-kp,kp,ss,fa,dfa",
    "lstm": "--model lstm --rules bp,mirror-kp,kp,ss,fa",
    "gpt-efolds": f"--model gpt --rules bp,kp {STRONG_DECAY}",
    "gpt-efolds-zero": f"--config {ZERO} --model gpt --rules kp {STRONG_DECAY}",
    "gpt-long": f"--model gpt --rules bp,kp {LONG}",
    "gpt-long-zero": f"--config {ZERO} --model gpt --rules kp {LONG}",
    "lstm-efolds": f"--model lstm --rules bp,kp {STRONG_DECAY}",
    "gpt-wm": "--model gpt --rules wm",
    "lstm-wm": "--model lstm --rules wm",
    "gpt-equivalence": "--model gpt --rules bp,mirror-kp,wm --seed 100",
    "lstm-equivalence": "--model lstm --rules bp,mirror-kp,wm --seed 100",
}


def command_of(part: str, seeds: int, out: Path) -> list[str]:
    """Return the command of a part: a later flag goes before an earlier one."""
    words = " ".join([TEXT, PARTS[part]]).split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    flags |= {"--seeds": str(seeds), "--out": str(out / part)}
    if part in MARGINS:
        flags["--equivalence"] = str(MARGINS[part])
    return [
        *(sys.executable, "-m", "feedbackpath", "compare"),
        *[word for flag in flags.items() for word in flag],
        "--resume",
    ]


def main() -> None:
    """Run parts of the study, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(p for p in PARTS if p not in MARGINS), help=", ".join(PARTS)
    )
    parser.add_argument("--seeds", type=int, default=1, help="of each part")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "language")
    options = parser.parse_args()
    for part in options.parts.split(","):
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; parts are {', '.join(PARTS)}")
        subprocess.run(command_of(part, options.seeds, options.out), check=True)


if __name__ == "__main__":
    main()
