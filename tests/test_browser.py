"""report.html in a real browser: it fetches nothing, answers the pointer, and reads well, narrow and wide."""

import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from playwright.sync_api import expect, sync_playwright
from test_report import make_results

from feedbackpath.report import write_report
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
TIMEOUT = 180_000  # milliseconds; only a fault, or a very busy machine, comes near it
expect.set_options(timeout=TIMEOUT)
SMALLEST_TEXT = 11  # pixels


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


SOURCES = {one_run: (1000,), several_rules: (400, 1000, 1600), several_panels: (400, 1600)}
"""What is shown, and how wide the window is."""
PAGES = [(make, width) for make, widths in SOURCES.items() for width in widths]


@dataclass(frozen=True)
class Opened:
    """A report in the browser, and what happened while it loaded."""

    page: object
    complaints: list
    requests: list


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.fail("FEEDBACKPATH_BROWSER=required, but no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def new_page(browser, **looks):
    """Open a page that waits as long as a busy machine needs."""
    page = browser.new_page(**looks)
    page.set_default_timeout(TIMEOUT)
    return page


@pytest.fixture(scope="module", params=PAGES, ids=[f"{make.__name__}-{width}" for make, width in PAGES])
def opened(request, browser, tmp_path_factory):
    make, width = request.param
    file = tmp_path_factory.mktemp(make.__name__) / "report.html"
    file.write_text(render_page(lay_side_by_side(make())), encoding="utf-8")
    page = new_page(browser, viewport={"width": width, "height": 900})
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
    for place in opened.page.locator(f".{kind} > div").all()[::2]:
        lines = place.locator(f".subplot .js-line:not({BAND})").all()
        assert lines
        rule = place.get_attribute("data-rule") or ""
        for line in lines[::7]:
            move_to_end(opened.page, line)
            expect(place.locator(".hovertext").first).to_have_text(re.compile(label.replace("RULE", rule)))


def test_clicking_the_legend_hides_a_curve_and_shows_it_again(opened):
    curves = opened.page.locator(".curves .chart").last
    lines = curves.locator(".subplot .js-line").count()
    curves.locator(".legendtoggle").first.click()
    wait_for_lines(curves, lines - 2)  # a rule's mean and band
    curves.locator(".legendtoggle").first.click()
    wait_for_lines(curves, lines)


def test_the_key_of_layers_hides_one_in_all_charts_or_shows_it_alone(opened):
    section = opened.page.locator("section").last
    charts, button = section.locator(".chart"), section.locator(".key button").first
    lines = [chart.locator(".subplot .js-line").count() for chart in charts.all()]
    assert len(lines) >= 3

    def wait_for(counts):
        for chart, count in zip(charts.all(), counts, strict=True):
            wait_for_lines(chart, count)

    button.click()
    wait_for([count - 1 for count in lines])
    expect(button).to_have_attribute("aria-pressed", "false")
    button.click()
    wait_for(lines)
    button.dblclick()
    wait_for([1] * len(lines))
    button.dblclick()
    wait_for(lines)


def test_charts_of_a_quantity_stand_in_a_column_or_all_below_each_other(opened):
    width = opened.page.viewport_size["width"]
    boxes = [place.bounding_box() for place in opened.page.locator(".layers > div").all()]
    lefts = [box["x"] for box in boxes]
    columns = 1 if width == 400 else 3
    assert len(set(lefts)) == columns
    assert lefts == lefts[:columns] * (len(lefts) // columns)
    assert max(box["x"] + box["width"] for box in boxes) > 0.9 * width  # a wide window is not left half empty


def test_a_table_is_within_the_window_and_says_what_cells_are(opened):
    for table in opened.page.locator(".scroll").all():
        assert table.evaluate("element => element.scrollWidth <= element.clientWidth + 1")
    cell = opened.page.locator("td").nth(2)
    label = cell.evaluate("cell => getComputedStyle(cell, '::before').content")
    assert (label != "none") == (opened.page.viewport_size["width"] == 400)


def test_a_printed_figure_can_be_saved(browser, tmp_path):
    write_report(make_results(), tmp_path)
    serve = partial(SilentHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        page = new_page(browser)
        page.goto(f"http://127.0.0.1:{server.server_port}/report.html")
        links = page.locator("a[download]")
        files = [link.get_attribute("href") for link in links.all()]
        with page.expect_download(timeout=TIMEOUT) as saved:
            links.first.click()
        assert saved.value.path().read_bytes() == (tmp_path / files[0]).read_bytes()
        page.close()
        server.shutdown()
    names = ("learning_curves", "alignment", "gains")
    assert files == [f"figures/{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")]


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
    page = new_page(browser, viewport={"width": 400, "height": 900})
    page.set_content(
        "<h1>wide</h1><p style='margin-top: -3rem; width: 500px'>above</p>"
        "<pre style='font-size: 8px'>small</pre>"
    )
    faults = " ".join(page.evaluate(FAULTS_OF_LAYOUT, SMALLEST_TEXT))
    page.close()
    for fault in ("the page is wider", 'P "above" is cut off', "overlaps P", 'PRE "small" is too small'):
        assert fault in faults
