"""Runs of several folders side by side: who shares a panel, what is said, what is written and refused."""

import json

import pytest
from test_report import make_results, make_run

from feedbackpath import cli
from feedbackpath.errors import ConfigError
from feedbackpath.report import markdown_error_table, write_side_by_side
from feedbackpath.report.figures import learning_curves
from feedbackpath.report.page import list_notes, render_page
from feedbackpath.report.panels import lay_side_by_side, list_differences, make_panel, styles_of
from feedbackpath.report.scales import error_axis
from feedbackpath.train.results import DataFacts, Metric, Results

NETWORKS = {"resnet8-glyphs-after", "resnet8-glyphs-before", "lenet-digits-after"}


def make_file(*runs, model="resnet8", data="glyphs", norm="after", **settings):
    config = {"norm": norm, "lr": 0.1, **settings}
    return make_results(*runs, model=model, data=DataFacts(name=data), config=config)


def make_sources():
    """Return results of three networks; the first's are in two folders, as ``train`` leaves them."""
    return {
        "bp": make_file(make_run("bp", 0, [99.0, 3.0]), rule="bp"),
        "kp": make_file(make_run("kp", 0, [99.0, 3.6]), rule="kp"),
        "before": make_file(make_run("kp", 0, [99.0, 3.4]), make_run("kp", 1, [99.0, 3.8]), norm="before"),
        "lenet": make_file(make_run("fa", 0, [90.0], status="diverged"), model="lenet", data="digits"),
    }


@pytest.fixture
def folders(tmp_path):
    for name, results in make_sources().items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results.to_json()))
    return [tmp_path / name for name in make_sources()]


def test_a_panel_is_of_one_data_set_model_and_norm():
    panels = lay_side_by_side(list(make_sources().items()))
    assert {panel.file_name for panel in panels} == NETWORKS
    assert [[run.rule for run in panel.runs] for panel in panels] == [["bp", "kp"], ["kp", "kp"], ["fa"]]
    assert [panel.title for panel in panels] == [
        "resnet8 on glyphs",
        "resnet8 on glyphs, BatchNorm before ReLU",
        "lenet on digits",
    ]


def test_the_table_has_each_networks_errors_by_rule():
    panels = lay_side_by_side(list(make_sources().items()))
    assert markdown_error_table(panels).splitlines() == [
        "| network | norm | data | n | bp | fa | kp |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| resnet8 | after | glyphs | 1 | 3.0% | – | 3.6% |",
        "| resnet8 | before | glyphs | 2 | – | – | 3.6(2)% |",
        "| lenet | after | digits | 0 | – | diverged | – |",
    ]


def test_the_same_rule_and_seed_twice_is_refused_with_both_folders():
    sources = make_sources()
    with pytest.raises(ConfigError, match=r"^runs/a and runs/b both hold kp, seed 0; leave one"):
        lay_side_by_side([("runs/a", sources["kp"]), ("x", sources["before"]), ("runs/b", sources["kp"])])


def test_results_in_different_metrics_are_refused():
    sources = make_sources()
    sources["lenet"].metric = Metric(name="mse", unit="")
    with pytest.raises(
        ConfigError, match=r"^bp is judged by test error and lenet by test mse; make a report"
    ):
        lay_side_by_side(list(sources.items()))


def test_unlike_settings_data_and_versions_are_named():
    one, other = make_file(rules=["bp"], seed=0, lr=0.1), make_file(rules=["kp"], seed=1, lr=0.2)
    one.runs, other.runs = [], []
    other.data = DataFacts(name="glyphs", checksum="f" * 100)
    other.versions = {"torch": "2.11.0"}
    panel = make_panel([(f"runs/{n}", one) for n in range(5)] + [("runs/other", other)])
    fives = "runs/0, runs/1, runs/2 and 2 more"
    assert list_differences(panel) == [
        f"lr differs: 0.1 in {fives}; 0.2 in runs/other.",
        f'version of torch differs: "2.13.0" in {fives}; "2.11.0" in runs/other.',
        f'data checksum differs: null in {fives}; "{"f" * 59}… in runs/other.',
    ]
    assert list_notes(panel)[-3:] == list_differences(panel)


def test_equal_settings_need_no_note():
    sources = make_sources()
    assert list_differences(make_panel([("a", sources["bp"]), ("b", sources["kp"])])) == []


def test_the_page_tells_panels_apart():
    sources = make_sources()
    sources["kp"].config["lr"] = 0.7
    page = render_page(lay_side_by_side(list(sources.items())))
    assert "resnet8 on glyphs: lr differs: 0.1 in bp; 0.7 in kp." in page
    assert "lenet on digits: fa, seed 0: diverged (epoch 0); left out" in page
    assert page.count('<div class="chart"') == 3 + 3 * 3  # errors of each panel; layers of kp, kp and fa
    for folder in sources:
        assert f"<summary>{folder}</summary>" in page


def test_panels_share_the_error_axis():
    panels = lay_side_by_side(list(make_sources().items()))
    figure = learning_curves(panels, styles_of(panels))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown[::2]] == ["resnet8 on glyphs", "lenet on digits"]
    assert len({axes.get_ylim() for axes in shown}) == 1
    assert shown[0].get_ylim() == pytest.approx(error_axis([99.0, 3.0])[1])


def test_files_of_a_report_side_by_side(folders, tmp_path, capsys):
    out = tmp_path / "out"
    panels = write_side_by_side(folders, out)
    assert {path.name for path in out.iterdir()} == {"figures", "report.html", "table.md"}
    names = {f"{kind}-{name}" for kind in ("alignment", "gains") for name in NETWORKS} | {"learning_curves"}
    assert {path.stem for path in out.glob("figures/*.pdf")} == names
    assert {path.stem for path in out.glob("figures/*.png")} == names
    assert (out / "table.md").read_text() == markdown_error_table(panels)
    write_side_by_side(folders, out)  # its own files are replaced


@pytest.mark.parametrize("name", ["report.html", "table.md"])
def test_files_of_a_users_own_are_not_written_over(folders, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{name} exists, is not from a report, and would be overwritten"):
        write_side_by_side(folders, out)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


def run_report(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", *map(str, arguments)])
    return stop.value.code


def test_report_of_one_folder_stays_in_it_unless_told(folders, tmp_path):
    assert run_report(folders[0]) == 0
    assert (folders[0] / "report.html").exists()
    assert run_report(folders[0], "--out", tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere" / "report.html").exists()


def test_report_of_several_folders_prints_the_table(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_report(*folders) == 0
    assert (tmp_path / "runs" / "report" / "report.html").exists()
    printed = capsys.readouterr().out
    assert "3.6(2)%" in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bp", "kp", "--out", "kp"], "--out kp has its own run"),
        (["bp", "kp", "bp"], "bp and bp both hold bp, seed 0"),
        (["bp", "nowhere"], "nowhere has no results.json"),
        ([], "FOLDERS"),
    ],
)
def test_what_report_refuses_is_one_line(folders, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_report(*arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_networks_of_other_parts_have_panels_of_their_own():
    parts = (
        {},
        {"connections": "local"},
        {"norm": "scaling", "connections": "local", "activation": "rectified-tanh"},
    )
    files = [(str(i), Results(model="lenet", config=config, runs=[])) for i, config in enumerate(parts)]
    titles = [panel.title for panel in lay_side_by_side(files)]
    assert titles == [
        "lenet",
        "lenet, local connections",
        "lenet, local connections, rectified tanh, synaptic scaling",
    ]
