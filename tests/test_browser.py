"""report.html in a real browser: it fetches nothing, answers the pointer, and reads well, narrow and wide."""

import os
import re
import shutil
from dataclasses import dataclass

import pytest
from playwright.sync_api import expect, sync_playwright
from test_report import make_results

from feedbackpath.report.curves import QUANTITIES
from feedbackpath.report.page import render_page
from feedbackpath.report.panels import lay_side_by_side

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
IS_REQUIRED = os.environ.get("FEEDBACKPATH_BROWSER") == "required"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not IS_REQUIRED,
        reason="no Chromium found (chromium, chromium-browser or google-chrome on the path)",
    ),
]
ARGUMENTS = [
    "--no-sandbox",  # as root, which containers run as, Chromium refuses to start with one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
BAND = "[style*='stroke-width: 0px']"
TIMEOUT = 20_000  # milliseconds; only a fault, or a very busy machine, comes near it
expect.set_options(timeout=TIMEOUT)
SMALLEST_TEXT = 11  # pixels
WIDTHS = (400, 1600)


def one_run():
    """Return what ``train`` leaves: one rule, one seed."""
    return [("runs/kp", make_results(make_results().runs[2]))]


def several_rules():
    return [("runs/compare", make_results())]


def several_panels():
    """Return three networks, one of them from two folders that differ in a setting, one with many layers."""
    first, second, before, deep = (make_results() for _ in range(4))
    first.runs, second.runs = first.runs[:3], second.runs[3:]
    second.config["lr"] = 0.2
    before.config["norm"] = "before"
    deep.model = "resnet18"
    for run in deep.runs:
        for entry in run.history:
            for quantity in QUANTITIES:
                first_value = getattr(entry, quantity)["conv1"]
                layers = {f"layer{n // 5}.{n % 5}.conv1": first_value + n / 10 for n in range(20)}
                setattr(entry, quantity, layers)
    return [("runs/a", first), ("runs/b", second), ("runs/before", before), ("runs/deep", deep)]


SOURCES = {maker.__name__: maker for maker in (one_run, several_rules, several_panels)}


@dataclass(frozen=True)
class Opened:
    """A report in the browser, and what happened while it loaded."""

    page: object
    complaints: list
    requests: list


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail("FEEDBACKPATH_BROWSER=required, but no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[f"{name}-{width}" for name in SOURCES for width in WIDTHS])
def opened(request, browser, tmp_path_factory):
    name, _, width = request.param.partition("-")
    file = tmp_path_factory.mktemp(name) / "report.html"
    file.write_text(render_page(lay_side_by_side(SOURCES[name]())), encoding="utf-8")
    page = browser.new_page(viewport={"width": int(width), "height": 900})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(file.as_uri())
    yield Opened(page, complaints, [url for url in requests if url != file.as_uri()])
    page.close()


def test_the_console_stays_empty_and_nothing_is_fetched(opened):
    assert opened.page.locator(".chart .main-svg").count() >= 4  # charts are drawn
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == []


def move_to_end(page, line):
    """Point at the end of a curve, where its last epoch is."""
    line.scroll_into_view_if_needed()
    x, y = line.evaluate(
        """path => {
            const end = path.getPointAtLength(path.getTotalLength()).matrixTransform(path.getScreenCTM());
            return [end.x, end.y];
        }"""
    )
    page.mouse.move(0, 0)
    page.mouse.move(x - 1, y, steps=2)


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("curves", r"^[\w– -]+ \((bp|kp|fa)\)(, seed 1: diverged.*)?epoch \d: [\d.]+( ± [\d.]+)?%"),
        ("layers", r"^(conv1|layer[\w.]+|fc)RULE, epoch \d(matrix angle|δ angle|gain) [\d.]+°?$"),
    ],
    ids=["errors", "layers"],
)
def test_hovering_a_curve_names_rule_layer_and_value(opened, kind, label):
    for place in opened.page.locator(f".{kind} > div").all():
        lines = place.locator(f".subplot .js-line:not({BAND})").all()
        assert lines
        rule = place.locator("h4").text_content().rpartition("(")[2].rstrip(")") if kind == "layers" else ""
        for line in lines[::7]:
            move_to_end(opened.page, line)
            expect(place.locator(".hovertext").first).to_have_text(re.compile(label.replace("RULE", rule)))


def test_clicking_the_legend_hides_a_curve_and_shows_it_again(opened):
    curves = opened.page.locator(".curves .chart").last
    layers = opened.page.locator(".layers .chart").last
    lines = [chart.locator(".subplot .js-line").count() for chart in (curves, layers)]
    click_first_entries(curves, layers)
    wait_for_lines(curves, lines[0] - 2)  # a rule's mean and band
    wait_for_lines(layers, lines[1] - 3)  # a layer's matrix angle, δ angle and gain
    click_first_entries(curves, layers)
    wait_for_lines(curves, lines[0])
    wait_for_lines(layers, lines[1])


def click_first_entries(*charts):
    for chart in charts:
        chart.locator(".legendtoggle").first.click()


def wait_for_lines(chart, count):
    script = "([chart, count]) => chart.querySelectorAll('.subplot .js-line').length === count"
    chart.page.wait_for_function(script, arg=[chart.element_handle(), count], timeout=TIMEOUT)


FAULTS_OF_LAYOUT = """smallest => {
    const isShown = element => element.checkVisibility() && element.getBoundingClientRect().width > 0;
    const find = selector => [...document.querySelectorAll(selector)].filter(isShown);
    const nameOf = element => `${element.tagName} "${element.textContent.trim().slice(0, 30)}"`;
    const overlap = (a, b) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
    const findOverlaps = elements => elements.flatMap((first, i) => elements.slice(i + 1)
        .filter(second => !first.contains(second) && !second.contains(first)
                          && overlap(first.getBoundingClientRect(), second.getBoundingClientRect()))
        .map(second => `${nameOf(first)} overlaps ${nameOf(second)}`));

    const texts = find("h1, h2, h3, h4, p, li, th, td, summary, pre, .chart text");
    const blocks = find("h1, h2, h3, h4, p, li, .scroll, summary, pre, .chart .main-svg:first-child");
    const width = document.documentElement.clientWidth;
    const isScrolled = element => element.closest(".scroll, .legend");
    return [
        ...(document.documentElement.scrollWidth > width ? ["the page is wider than the window"] : []),
        ...[...texts, ...blocks].filter(element => !isScrolled(element)).filter(element => {
            const { left, right } = element.getBoundingClientRect();
            return left < -1 || right > width + 1;
        }).map(element => `${nameOf(element)} is cut off`),
        ...texts.filter(element => parseFloat(getComputedStyle(element).fontSize) < smallest)
            .map(element => `${nameOf(element)} is too small`),
        ...findOverlaps(blocks),
        ...find("table").flatMap(table => findOverlaps([...table.querySelectorAll("th, td")])),
        ...find(".chart").flatMap(chart => findOverlaps([...chart.querySelectorAll("text")].filter(isShown))),
    ];
}"""


def test_nothing_overlaps_or_is_cut_off_or_too_small(opened):
    opened.page.mouse.move(0, 0)
    assert opened.page.evaluate(FAULTS_OF_LAYOUT, SMALLEST_TEXT) == []


def test_the_check_of_the_layout_finds_faults(browser):
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.set_content(
        "<h1>wide</h1><p style='margin-top: -3rem; width: 500px'>above</p>"
        "<pre style='font-size: 8px'>small</pre>"
    )
    faults = " ".join(page.evaluate(FAULTS_OF_LAYOUT, SMALLEST_TEXT))
    page.close()
    for fault in ("the page is wider", 'P "above" is cut off', "overlaps P", 'PRE "small" is too small'):
        assert fault in faults
