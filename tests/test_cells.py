"""Every cell of the paper's experiment trains for an epoch on a small folder of ImageNet's shape."""

import pytest
from image_folders import make_class_folders
from rich.console import Console

from feedbackpath.jobs import run_job
from feedbackpath.recipes import make_recipe
from feedbackpath.recipes.imagenet import PAPER_MIRROR
from feedbackpath.report.live import LiveView
from feedbackpath.train.results import read_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_class_folders(tmp_path_factory.mktemp("imagenet"), classes=10)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("rule", ["bp", "fa", "ss", "kp", "wm"])
def test_an_epoch_of_each_cell(folder, tmp_path, rule, norm, model):
    recipe = make_recipe(f"imagenet-{model}", rule=rule, norm=norm)
    small = {"data_dir": folder, "image_size": 64, "batch_size": 16, "num_threads": 1}
    if rule == "wm":  # as many samples a pass as a minibatch has images, as in the paper
        small["rule_settings"] = {"wm": {"mirror": PAPER_MIRROR | {"samples": small["batch_size"]}}}
    epochs = recipe.mirror_epochs + 1
    config = type(recipe)(**(recipe.model_dump() | small | {"epochs": epochs}))
    run_job(config, tmp_path / "run", resume=False, command="", view=LiveView(Console(quiet=True)))
    (run,) = read_results(tmp_path / "run").runs
    assert (run.status, len(run.history)) == ("finished", epochs)
    assert run.history[-1].train_loss > 0
    assert (tmp_path / "run" / "model.safetensors").exists()
