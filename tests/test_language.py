"""The study of networks that read text: its commands, its looks at time, and what its page says."""

import language
import language_page
import pytest
import saturation
import torch
import yaml
from cells import read_cells
from cost_page import put_tables
from language_page import OUT, draw, draw_doses, patterns_per_input, tables
from language_samples import angles_by_step, write
from torch import nn

import feedbackpath as fp
from feedbackpath.models.language import TextLSTM
from feedbackpath.report.equivalence import look
from feedbackpath.train.config import CompareConfig
from feedbackpath.train.results import read_results
from feedbackpath.train.store import write_json


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Settings as a search leaves them, of rules that not every job trains."""
    found = {
        "epochs": 2,
        "by_rule": {rule: {"lr": 0.004, "weight_decay": 0.02} for rule in language.RULES["gpt"]},
        "rule_settings": {"kp": {"scale": "he"}, "fa": {"scale": "xavier"}},
    }
    monkeypatch.setattr(language, "OUT", tmp_path)
    for network in language.RULES:
        (tmp_path / network / "tuned").mkdir(parents=True)
        (tmp_path / network / "tuned" / "chosen.yaml").write_text(yaml.safe_dump(found))


SEEDS = {"run": 100, "equivalence": 200, "long": 300, "mirrors": 400, "doses": 600}
JOBS = [
    (network, study, way)
    for network in language.RULES
    for study in SEEDS
    for way in language.ways_of(study, network) or [""]
    if network == "gpt" or study not in language.OF_THE_GPT
]


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize(("network", "study", "way"), JOBS)
def test_each_study_is_a_job_with_seeds_of_its_own(study, way, network):
    config = CompareConfig.model_validate(language.settings_of(study, network, way))
    assert (config.data, config.model) == ("text", network)
    assert config.seed == (500 if way == "pairs" else SEEDS[study])
    is_a_test = study == "equivalence" or way in ("codes", "fine", "pairs")
    assert config.seeds == (10 if is_a_test else 3)
    assert config.equivalence == (language.MARGINS[network] if is_a_test else None)
    shares_settings = study == "long" and way != "best"
    assert set(config.by_rule) == (set() if shares_settings else set(config.rules))
    mirrors = language.WAYS["mirrors"] | language.WAYS["doses"] | {"bp": None}
    assert config.rule_settings.get("wm", {}).get("mirror") == mirrors.get(way)


def test_margins_are_those_that_were_declared():
    assert language.MARGINS == {"gpt": 0.02, "lstm": 0.05}


@pytest.mark.parametrize(
    ("way", "e_folds"), [("same", 5.25), ("zero", 5.25), ("small", 5.25), ("rate", 5.25), ("twice", 10.5)]
)
def test_a_long_run_of_kolen_pollack_has_five_e_folds_or_more(way, e_folds):
    config = CompareConfig.model_validate(language.settings_of("long", "gpt", way))
    steps = config.epochs * config.samples_per_epoch // config.batch_size
    assert config.lr * config.weight_decay * steps / 2 == pytest.approx(e_folds)


def test_early_e_folds_stand_beside_the_settings_of_backprop_at_its_best():
    config = CompareConfig.model_validate(language.settings_of("long", "lstm", "early"))
    best = language.best_settings("lstm", ("bp",))["by_rule"]["bp"]
    assert {"lr": config.lr, "weight_decay": config.weight_decay} == best
    assert config.early_efolds == 5


@pytest.mark.usefixtures("searched")
def test_a_search_and_a_run_are_of_the_same_rules_and_network(monkeypatch):
    searched, trained = [], []
    monkeypatch.setattr(language, "search_with", lambda *given: searched.append(given))
    monkeypatch.setattr(language, "train", lambda *given: trained.append(given))
    language.main(["tune", "gpt"])
    language.main(["run", "gpt"])
    language.main(["long", "lstm", "--ways", "zero,best"])
    (search, *_), (run, *_) = searched[0], trained[0]
    assert {name: run[name] for name in ("model", "rules", *language.TEXT)} == {
        name: search[name] for name in ("model", "rules", *language.TEXT)
    }
    assert search["epochs"] < run["epochs"]
    assert [given[3] for given in trained[1:]] == [
        f"python benchmarks/language.py long lstm --ways {way}" for way in ("zero", "best")
    ]


def test_errors_through_time_are_compared_step_by_step():
    torch.manual_seed(0)
    model = TextLSTM(11, width=8)
    path = fp.untie(model, "fa")
    x = torch.randint(11, (4, 6))
    apart = angles_by_step(model, x, x)
    assert len(apart) == 6
    assert all(20 < angle < 160 for angle in apart)
    with torch.no_grad():
        for _, w, b in path.pairs():
            b.copy_(w)
    assert all(angle == 0 for angle in angles_by_step(model, x, x))


def test_states_of_an_lstm_are_those_that_its_cell_makes():
    torch.manual_seed(0)
    model = TextLSTM(11, width=8)
    cell = nn.LSTMCell(8, 8)
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in model.lstm.state_dict().items()})
    embedded = model.embed(torch.randint(11, (4, 6)))
    h, candidate, forget = saturation.gates(embedded, model.lstm)
    state = (torch.zeros(4, 8), torch.zeros(4, 8))
    for step in range(6):
        last = state
        state = cell(embedded[:, step], last)
        torch.testing.assert_close(h[:, step], state[0])
        sums = nn.functional.linear(embedded[:, step], cell.weight_ih, cell.bias_ih)
        sums = sums + nn.functional.linear(last[0], cell.weight_hh, cell.bias_hh)
        opened = sums.sigmoid().chunk(4, -1)[0]
        torch.testing.assert_close(state[1], forget[:, step] * last[1] + opened * candidate[:, step])


def test_dimensions_count_directions():
    torch.manual_seed(0)
    flat = torch.randn(5000, 3) @ torch.linalg.qr(torch.randn(7, 7)).Q[:3]
    assert saturation.dimensions(flat) == pytest.approx(3, abs=0.05)


def test_a_sample_depends_on_the_network_alone():
    torch.manual_seed(0)
    model = TextLSTM(256, width=8)
    assert write(model, 5) == write(model, 5)


@pytest.fixture
def made():
    """The first seed of the study of the GPT."""
    found = read_results(OUT / "gpt" / "run")
    found.runs = [run for run in found.runs if run.seed == 100]
    return found


def keep(results, place):
    place.mkdir(parents=True)
    write_json(place / "results.json", results.to_json())


def test_a_table_has_the_settings_of_jobs_whose_rules_train_alike(made, monkeypatch, tmp_path):
    made.config |= {"by_rule": {}, "rule_settings": {}, "lr": 0.003, "weight_decay": 0.1}
    monkeypatch.setattr(language_page, "OUT", tmp_path)
    keep(made, tmp_path / "gpt" / "long-same")
    table = language_page.table_of("long", "gpt")
    first = next(run.rule for run in made.runs)
    assert f"| same | {first} | 1/1 |" in table
    assert table.splitlines()[2].endswith("| lr 0.003, decay 0.1 |")
    assert "Not run yet: twice, zero" in table


@pytest.mark.parametrize(
    ("study", "lender", "way", "rule"), [("long", "same", "zero", "kp"), ("doses", "bp", "angle-4", "wm")]
)
def test_a_job_without_backprop_stands_beside_that_at_the_same_settings(
    study, lender, way, rule, made, monkeypatch, tmp_path
):
    monkeypatch.setattr(language_page, "OUT", tmp_path)
    keep(made, tmp_path / "gpt" / f"{study}-{lender}")
    (bp,) = (run for run in made.runs if run.rule == "bp")
    made.runs = [bp.model_copy(update={"rule": rule, "test": bp.test + 0.25})]
    keep(made, tmp_path / "gpt" / f"{study}-{way}")
    rows = [line for line in language_page.table_of(study, "gpt").splitlines() if f"| {way} |" in line]
    assert len(rows) == 1
    assert f"| {way} | {rule} | 1/1 |" in rows[0]
    assert "+0.25" in rows[0]


@pytest.mark.parametrize("angle", [1, 4, 20])
def test_the_figure_counts_patterns_as_the_mirror_does(angle):
    fired = fp.Mirror(pairs=True, target_angle_deg=angle, forgetting=1.0).examples_for(512) / 512
    assert float(patterns_per_input(angle).replace(",", "")) == pytest.approx(fired, rel=0.05)


def test_a_table_has_the_verdict_on_every_rule(made, monkeypatch, tmp_path):
    made.runs = [run for run in made.runs if run.rule in ("bp", "wm", "mirror-kp")]
    made.runs += [run.model_copy(update={"seed": 101}) for run in made.runs]
    look(made, 0.02, seeds=2)
    monkeypatch.setattr(language_page, "OUT", tmp_path)
    keep(made, tmp_path / "gpt" / "equivalence")
    lines = language_page.table_of("equivalence", "gpt").splitlines()
    assert [line.split(" minus bp: ")[0] for line in lines[-2:]] == ["- mirror-kp", "- wm"]
    assert not lines[-3]


def test_the_page_has_what_the_result_files_have():
    for page, made in tables().items():
        text = page.read_text()
        assert put_tables(text, made) == text, "write it anew: python benchmarks/language_page.py"
    assert len(draw(read_cells(OUT / "samples.json")).axes) == 2
    assert len(draw_doses(language_page.jobs_of("doses", "gpt")).axes) == 2
