"""The study of networks that read text: its commands, its looks at time, and what its page says."""

import json

import pytest
import torch
from cost_page import put_tables
from language import MARGINS, PARTS, command_of
from language_page import FOLDER, PAGE, draw, tables
from language_samples import angles_by_step, config_of, write

import feedbackpath as fp
from feedbackpath.models.language import TextLSTM


@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_a_job(part):
    config = config_of(part)
    assert config.data == "text"
    assert config.weight_decay == (3.5 if "efolds" in part else 0.35 if "long" in part else 0.1)
    steps = config.epochs * config.samples_per_epoch // config.batch_size
    if "efolds" in part or "long" in part:
        assert config.lr * config.weight_decay * steps / 2 == pytest.approx(5.25)
    assert config.rule_settings == ({"kp": {"scale": "zero"}} if part.endswith("zero") else {})


def test_equivalence_has_its_margin_and_seeds_of_its_own(tmp_path):
    assert MARGINS == {"gpt-equivalence": 0.02, "lstm-equivalence": 0.05}
    for part in PARTS:
        command = command_of(part, 10, tmp_path)
        assert ("--equivalence" in command) == (part in MARGINS)
        assert ("--seed" in command) == (part in MARGINS)


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


def test_a_sample_depends_on_the_network_alone():
    torch.manual_seed(0)
    model = TextLSTM(256, width=8)
    assert write(model, 5) == write(model, 5)


def test_the_page_has_what_the_result_files_have():
    page = PAGE.read_text()
    assert put_tables(page, tables()) == page, "write it anew: python benchmarks/language_page.py"
    assert len(draw(json.loads((FOLDER / "samples.json").read_text())).axes) == 2
