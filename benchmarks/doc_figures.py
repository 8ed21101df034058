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
from functools import cache, partial
from pathlib import Path
from typing import Any

import balance_page
import brain_like
import competing_units
import estimating_w
import figure_4
import hardware_theory
import language
import language_page
from cells import read_cells
from growth_figure import draw_growth
from matplotlib import rc_context
from matplotlib.figure import Figure
from old_names import name_now, read_with_names_of_now
from one_input_figures import LOOKS, draw_angles
from PIL import Image, PngImagePlugin
from study_figures import render_study
from study_table import read_study

from feedbackpath.report.figures import render_figures
from feedbackpath.report.page import render_page
from feedbackpath.report.panels import Panel, make_panel
from feedbackpath.report.parts import FIGURE_STYLE, render
from feedbackpath.report.tolerance import draw_errors, draw_map
from feedbackpath.train.results import read_results

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
RESULTS = ROOT / "benchmarks"
STAMP = "Source"
WINDOW = 1300  # pixels


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


def read(source: str) -> Any:
    """Return the content of a JSON file below benchmarks/."""
    return json.loads((RESULTS / source).read_text(encoding="utf-8"))


def read_panel(folder: str) -> Panel:
    """Read a comparison's folder; its rules get the names that they have today."""
    results = read_with_names_of_now(RESULTS / folder)
    return make_panel([(folder, results.model_copy(update={"looks": results.looks | LOOKS}))])


def of_comparison(folder: str, figure: str) -> bytes:
    """Draw one figure of a comparison's folder below benchmarks/."""
    return all_of(folder)[f"{figure}.png"]


@cache
def all_of(folder: str) -> dict[str, bytes]:
    """Draw a comparison, or the mirror's study."""
    if folder == "mirror-study":
        return render_study(read_study(RESULTS / folder))
    return render_figures([read_panel(folder)])


def of_page(folder: str) -> bytes:
    """Take a picture of a comparison's page in Chromium, down to the end of the first rule's layers."""
    from playwright.sync_api import sync_playwright

    page = render_page([read_panel(folder)])
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        (Path(place) / "report.html").write_text(page, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        window = browser.new_page(viewport={"width": WINDOW, "height": 2050})
        window.set_default_timeout(300_000)
        window.goto((Path(place) / "report.html").as_uri())
        second = window.locator(".layers h4").nth(1).bounding_box()
        assert second is not None
        return window.screenshot(
            clip={"x": 0, "y": 0, "width": WINDOW, "height": second["y"] - 5}, full_page=True
        )


def of_one_input() -> Figure:
    """Draw the angles of the study with one noisy input."""
    return draw_angles(read("one-input/angles.json")["measured"])


def of_balance(part: str) -> Figure:
    """Draw maps of decay and rate."""
    return balance_page.draw_maps(part, read_cells(RESULTS / f"balance/{part}.json"))


def of_growth() -> Figure:
    """Draw how a step's cost grows; the file's `wm` is today's `wm-exact`."""
    found = read("step-cost/growth.json")
    found["settings"]["rules"] = [name_now(rule) for rule in found["settings"]["rules"]]
    for axis in found["growth"].values():
        for cell in axis["cells"]:
            cell["step"]["wm-exact"] = cell["step"].pop("wm")
    return draw_growth(found)


def drawn(draw: Callable[[], Figure]) -> Callable[[], bytes]:
    """Return a function that draws a figure as the bytes of a PNG."""

    def render_png() -> bytes:
        with rc_context(FIGURE_STYLE):
            return render(draw(), "png")

    return render_png


COMPARISONS = {
    "glyphs-resnet8": ("learning_curves", "alignment", "gains"),
    "fashion-mnist-lenet": ("learning_curves",),
    "one-input": ("learning_curves",),
}
DRAWN: dict[str, tuple[list[str], Callable[[], bytes]]] = {
    **{
        f"{folder}-{figure}.png": ([f"{folder}/results.json"], partial(of_comparison, folder, figure))
        for folder, figures in COMPARISONS.items()
        for figure in figures
    },
    "balance.png": (
        ["balance/balance.json"],
        drawn(lambda: balance_page.draw_balance(read_cells(RESULTS / "balance/balance.json"))),
    ),
    **{
        f"balance-{part}.png": (
            [f"balance/{part}.json"],
            drawn(partial(of_balance, part)),
        )
        for part in balance_page.MAPS
    },
    "brain-like.png": (
        [
            f"brain-like/{study}/{part}/results.json"
            for study in brain_like.STUDIES
            for part in brain_like.PARTS
        ],
        drawn(brain_like.draw),
    ),
    "estimating-w.png": (
        ["estimating-w/angles.json"],
        drawn(lambda: estimating_w.draw_methods(read("estimating-w/angles.json")["points"])),
    ),
    "figure-4.png": (
        ["figure-4/results.json", "figure-4/theory.json"],
        drawn(lambda: figure_4.draw(read_results(RESULTS / "figure-4"), read("figure-4/theory.json"))),
    ),
    "kh-features.png": (
        ["competing-units/mnist.json"],
        drawn(lambda: competing_units.draw(read("competing-units/mnist.json"))),
    ),
    "hardware-tolerance.png": (
        ["hardware-tolerance/tolerance.json"],
        drawn(lambda: draw_map(read("hardware-tolerance/tolerance.json"))),
    ),
    "hardware-errors.png": (
        ["hardware-tolerance/tolerance.json"],
        drawn(lambda: draw_errors(read("hardware-tolerance/tolerance.json"))),
    ),
    "hardware-theory.png": (
        ["hardware-theory/theory.json"],
        drawn(lambda: hardware_theory.draw(read("hardware-theory/theory.json"))),
    ),
    "language-errors.png": (
        ["language/samples.json"],
        drawn(lambda: language_page.draw(read_cells(RESULTS / "language/samples.json"))),
    ),
    "language-noise.png": (
        [f"language/gpt/doses-{way}/results.json" for way in language.ways_of("doses", "gpt")],
        drawn(lambda: language_page.draw_doses(language_page.jobs_of("doses", "gpt"))),
    ),
    "one-input-angles.png": (["one-input/angles.json"], drawn(of_one_input)),
    "report-page.png": (["glyphs-resnet8/results.json"], partial(of_page, "glyphs-resnet8")),
    "step-cost-growth.png": (["step-cost/growth.json"], drawn(of_growth)),
    **{
        f"mirror-study-{part}.png": (
            ["mirror-study/study.json"],
            partial(of_comparison, "mirror-study", part),
        )
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
