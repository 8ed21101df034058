"""Recipes: every cell is the paper's, and whole."""

import inspect

import pytest

from feedbackpath.errors import ConfigError
from feedbackpath.recipes import RECIPES, make_recipe
from feedbackpath.train.config import RunConfig
from feedbackpath.train.rules import make_rule
from feedbackpath.train.schedule import Schedule
from feedbackpath.train.settings import merge_config

IMAGENET = ("imagenet-resnet18", "imagenet-resnet50")
STEPS_PER_EPOCH = 626


def lr_in_epoch(config: RunConfig, epoch: int) -> float:
    """Return the learning rate of the last step of an epoch, counted from 1, mirror epochs included."""
    step = (epoch - config.mirror_epochs) * STEPS_PER_EPOCH - 1
    num_steps = (config.epochs - config.mirror_epochs) * STEPS_PER_EPOCH
    schedule = Schedule(config, STEPS_PER_EPOCH, num_steps, epochs_before=config.mirror_epochs)
    return schedule.learning_rate(step)


@pytest.mark.parametrize("name", IMAGENET)
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("rule", ["bp", "fa", "ss", "kp", "wm"])
def test_the_twenty_cells_have_the_settings_of_appendix_d(name, rule, norm):
    config = make_recipe(name, rule=rule, norm=norm)
    assert (config.rule, config.norm, config.model) == (rule, norm, name.removeprefix("imagenet-"))
    assert (config.data, config.image_size, config.batch_size, config.epochs) == ("imagenet", 224, 2048, 90)
    assert (config.momentum, config.nesterov, config.weight_decay) == (0.9, True, 1e-4)
    assert config.peak_lr == pytest.approx(0.5 if rule == "ss" else 0.8)
    assert config.mirror_epochs == (2 if rule == "wm" else 0)
    make_rule(rule, config.rule_settings.get(rule, {}))


@pytest.mark.parametrize("rule", ["kp", "wm"])
def test_the_learning_rate_is_annealed_as_in_appendix_d(rule):
    config = make_recipe("imagenet-resnet50", rule=rule)
    warm = 8 if rule == "wm" else 6  # "over the first 6 epochs (or over epochs 3 to 8 for weight-mirror)"
    peak = config.peak_lr
    assert lr_in_epoch(config, warm) == pytest.approx(peak, rel=1e-3)
    assert lr_in_epoch(config, warm - 3) == pytest.approx(peak / 2, rel=1e-3)
    for epoch, share in ((32, 1), (33, 0.1), (62, 0.1), (63, 0.01), (82, 0.01), (83, 0.001), (90, 0.001)):
        assert lr_in_epoch(config, epoch) == pytest.approx(peak * share)


def test_the_learning_rate_follows_another_batch():
    smaller = merge_config(RunConfig(batch_size=512), None, make_recipe("imagenet-resnet18", rule="bp"))
    assert smaller.peak_lr == pytest.approx(0.2)


def test_flags_and_file_override_a_recipe(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 3\nweight_decay: 0.5\n")
    config = merge_config(RunConfig(weight_decay=0.1), file, make_recipe("glyphs-resnet8", rule="kp"))
    assert (config.rule, config.epochs, config.weight_decay) == ("kp", 3, 0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_document_themselves(name):
    text = inspect.getdoc(RECIPES[name])
    for part in ("Expected", "Hardware", "ime:", f"feedbackpath train --recipe {name} "):
        assert part in text, part


def test_an_unknown_recipe_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'glyphs-resnet8'"):
        make_recipe("glyphs-resnet9")
