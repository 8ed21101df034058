"""Draw the figures of the docs anew, each from its result file: `python benchmarks/doc_figures.py`.

A stamp is a line of text in the PNG: the result files and their checksums. A test compares them, so that no
figure shows what its file does not say.
"""

import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import balance
import competing_units
import estimating_w
import hardware_theory
import language_page
from growth_figure import render_growth
from matplotlib import rc_context
from one_input_figures import draw_angles
from PIL import Image, PngImagePlugin
from study_figures import render_study
from study_table import read_study

from feedbackpath.report.figures import render_figures
from feedbackpath.report.page import render_page
from feedbackpath.report.panels import make_panel
from feedbackpath.report.parts import FIGURE_STYLE, render
from feedbackpath.train.results import read_results

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
RESULTS = ROOT / "benchmarks"
STAMP = "Source"


def stamp_for(sources: list[str]) -> str:
    """Return the stamp of a figure that is drawn from these files below benchmarks/."""
    digests = [hashlib.sha256((RESULTS / source).read_bytes()).hexdigest() for source in sources]
    return "; ".join(
        f"benchmarks/{source} sha256:{digest}" for source, digest in zip(sources, digests, strict=True)
    )


def stamp_of(figure: Path) -> str:
    """Return the stamp that a PNG carries; empty: none."""
    with Image.open(figure) as image:
        return str(image.info.get(STAMP, ""))


def write_stamped(name: str, png: bytes, sources: list[str]) -> None:
    """Write a figure of the docs with the stamp of what it was drawn from."""
    text = PngImagePlugin.PngInfo()
    text.add_text(STAMP, stamp_for(sources))
    with Image.open(io.BytesIO(png)) as image:
        image.save(FIGURES / name, pnginfo=text, dpi=image.info.get("dpi"), optimize=True)


def of_comparison(folder: str, figure: str) -> bytes:
    """Draw one figure of a comparison's folder below benchmarks/."""
    panel = make_panel([(folder, read_results(RESULTS / folder))])
    return render_figures([panel])[f"{figure}.png"]


def of_page(folder: str) -> bytes:
    """Take a picture of a comparison's page in Chromium, down to the first rules' layers."""
    from playwright.sync_api import sync_playwright

    page = render_page([make_panel([(folder, read_results(RESULTS / folder))])])
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        (Path(place) / "report.html").write_text(page, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        window = browser.new_page(viewport={"width": 1300, "height": 2050})
        window.goto((Path(place) / "report.html").as_uri())
        return window.screenshot()


def of_one_input() -> bytes:
    """Draw the angles of the study with one noisy input."""
    with rc_context(FIGURE_STYLE):
        found = json.loads((RESULTS / "one-input" / "angles.json").read_text(encoding="utf-8"))
        return render(draw_angles(found["measured"]), "png")


def of_growth() -> bytes:
    """Draw how a step's cost grows."""
    return render_growth(json.loads((RESULTS / "step-cost" / "growth.json").read_text(encoding="utf-8")))


@cache
def all_of_study() -> dict[str, bytes]:
    """Draw the mirror's study."""
    return render_study(read_study(RESULTS / "mirror-study"))


def of_balance(name: str) -> bytes:
    """Draw a figure of Kolen-Pollack's balance, or of sensitivity."""
    with tempfile.TemporaryDirectory() as folder:
        balance.draw(RESULTS / "balance", Path(folder))
        return (Path(folder) / name).read_bytes()


def of_estimates() -> bytes:
    """Draw ways of estimating W."""
    found = json.loads((RESULTS / "estimating-w" / "angles.json").read_text(encoding="utf-8"))
    with rc_context(FIGURE_STYLE):
        return render(estimating_w.draw_methods(found["points"]), "png")


def of_features() -> bytes:
    """Draw what competing units learn."""
    found = json.loads((RESULTS / "competing-units" / "mnist.json").read_text(encoding="utf-8"))
    with rc_context(FIGURE_STYLE):
        return render(competing_units.draw(found), "png")


def of_language() -> bytes:
    """Draw delta angles of the GPT and the LSTM."""
    found = json.loads((RESULTS / "language" / "samples.json").read_text(encoding="utf-8"))
    with rc_context(FIGURE_STYLE):
        return render(language_page.draw(found), "png")


def of_hardware() -> bytes:
    """Draw theories of imperfect arrays over measurements."""
    found = json.loads((RESULTS / "hardware-theory" / "theory.json").read_text(encoding="utf-8"))
    with rc_context(FIGURE_STYLE):
        return render(hardware_theory.draw(found), "png")


COMPARISONS = {
    "glyphs-resnet8": ("learning_curves", "alignment", "gains"),
    "fashion-mnist-lenet": ("learning_curves",),
    "one-input": ("learning_curves",),
}
DRAWN: dict[str, tuple[list[str], Callable[[], bytes]]] = {
    **{
        f"{folder}-{figure}.png": (
            [f"{folder}/results.json"],
            lambda folder=folder, figure=figure: of_comparison(folder, figure),  # type: ignore[misc]
        )
        for folder, figures in COMPARISONS.items()
        for figure in figures
    },
    "balance.png": (["balance/balance.json"], lambda: of_balance("balance.png")),
    "balance-kp.png": (["balance/kp.json"], lambda: of_balance("balance-kp.png")),
    "balance-wm.png": (["balance/wm.json"], lambda: of_balance("balance-wm.png")),
    "estimating-w.png": (["estimating-w/angles.json"], of_estimates),
    "kh-features.png": (["competing-units/mnist.json"], of_features),
    "hardware-theory.png": (["hardware-theory/theory.json"], of_hardware),
    "language-errors.png": (["language/gpt/results.json", "language/samples.json"], of_language),
    "one-input-angles.png": (["one-input/angles.json"], of_one_input),
    "report-page.png": (["glyphs-resnet8/results.json"], lambda: of_page("glyphs-resnet8")),
    "step-cost-growth.png": (["step-cost/growth.json"], of_growth),
    **{
        f"mirror-study-{part}.png": (
            ["mirror-study/study.json"],
            lambda part=part: all_of_study()[f"{part}.png"],
        )  # type: ignore[misc]
        for part in ("designs", "grid", "depth", "width", "batch")
    },
}
"""File name to the result files, below benchmarks/, and the drawing."""


def main() -> None:
    """Draw and stamp those that are named on the command line, or all of them."""
    for name in sys.argv[1:] or DRAWN:
        sources, draw = DRAWN[name]
        write_stamped(name, draw(), sources)


if __name__ == "__main__":
    main()
