"""The training loop: the same start for every rule, exact resume, divergence, schedules."""

import pytest
import torch

import feedbackpath as fp
from feedbackpath.data import load_dataset
from feedbackpath.errors import ConfigError
from feedbackpath.train.checkpoint import load_checkpoint, save_checkpoint, write_json, write_text
from feedbackpath.train.config import CompareConfig, merge_config, read_config
from feedbackpath.train.loop import Diverged, Measured, Step, learning_rate, train
from feedbackpath.train.rules import make_rule

SMALL = {"data": "digits", "model": "mlp", "epochs": 3, "samples_per_epoch": 256, "batch_size": 64}


def events(rule: str, **settings):
    config = CompareConfig(**(SMALL | settings))
    dataset = load_dataset("digits", samples_per_epoch=config.samples_per_epoch)
    return train(config, rule, 0, dataset)


def run(rule: str, **settings) -> list:
    return list(events(rule, **settings))


def measured(seen) -> list[Measured]:
    return [event for event in seen if isinstance(event, Measured)]


def without_times(event: Measured) -> dict:
    return {key: value for key, value in event.record.items() if key != "seconds"}


def test_every_rule_of_a_seed_starts_from_the_same_forward_weights_and_sees_the_same_samples():
    starts = {rule: next(events(rule, max_steps=1)) for rule in fp.RULES}
    reference = starts["bp"]
    for rule, start in starts.items():
        for key, value in reference.resume_state["model"].items():
            assert torch.equal(value, start.resume_state["model"][key]), (rule, key)
        assert start.record["test_error"] == reference.record["test_error"]
    first_losses = {
        rule: next(event.loss for event in run(rule, max_steps=1) if isinstance(event, Step))
        for rule in fp.RULES
    }
    assert len(set(first_losses.values())) == 1


@pytest.mark.parametrize("rule", fp.RULES)
def test_a_resumed_run_ends_bit_identical_to_an_unbroken_one(rule, tmp_path):
    config = CompareConfig(**SMALL)
    dataset = load_dataset("digits", samples_per_epoch=config.samples_per_epoch)
    whole = measured(train(config, rule, 0, dataset))
    for event in train(config, rule, 0, dataset):
        if isinstance(event, Measured) and event.epoch == 1:
            save_checkpoint(tmp_path / "c.pt", event.resume_state)
            break
    resumed = measured(train(config, rule, 0, dataset, load_checkpoint(tmp_path / "c.pt")))
    assert [event.epoch for event in resumed] == [2, 3]
    assert [without_times(event) for event in resumed] == [without_times(event) for event in whole[2:]]
    for key, value in whole[-1].resume_state["model"].items():
        assert torch.equal(value, resumed[-1].resume_state["model"][key]), key


def test_a_loss_that_is_not_finite_ends_the_run_with_its_epoch():
    *_, last = run("bp", lr=1e6, momentum=0.0, nesterov=False, schedule="constant", epochs=5)
    assert isinstance(last, Diverged)
    assert last.epoch >= 1


def test_max_steps_ends_the_run_with_a_last_measurement():
    seen = run("bp", max_steps=5)
    assert sum(isinstance(event, Step) for event in seen) == 5
    assert measured(seen)[-1].epoch == 2


def test_mirror_kp_follows_backprop():
    bp, ours = (measured(run(rule, precision="64-true"))[-1].record for rule in ("bp", "mirror-kp"))
    assert ours["test_error"] == bp["test_error"]
    assert ours["train_loss"] == pytest.approx(bp["train_loss"], rel=1e-6)


def test_settings_are_honoured():
    assert run("kp", clip_norm=0.01, max_steps=2)
    assert run("wm", precision="bf16-mixed", max_steps=2)
    assert run("fa", optimizer="adamw", max_steps=2)
    overridden = measured(run("fa", overrides={"*": "bp"}, max_steps=1))[-1]
    assert set(overridden.record["matrix_angle_deg"].values()) == {0.0}


def test_learning_rate_warms_up_and_falls_to_zero():
    config = CompareConfig(lr=0.2, warmup_epochs=1)
    rates = [learning_rate(step, 10, 50, config) for step in range(51)]
    assert rates[0] == pytest.approx(0.2 / 11)
    assert max(rates) == rates[10] == 0.2
    assert rates[50] == pytest.approx(0.0, abs=1e-9)
    assert learning_rate(49, 10, 50, config.model_copy(update={"schedule": "constant"})) == 0.2


def test_make_rule_takes_nested_settings_and_names_wrong_ones():
    rule = make_rule("wm", {"mirror": {"reading": "printed"}})
    assert rule == fp.WeightMirror(fp.Mirror(reading="printed"))
    assert make_rule("mirror-kp", {"mirror": {"sigma": 0.5}}).mirror.noise == "orthogonal"
    with pytest.raises(ConfigError, match="mirror has no setting 'readin'; it has reading"):
        make_rule("wm", {"mirror": {"readin": "printed"}})
    with pytest.raises(ConfigError, match="samples cannot be 'many'"):
        make_rule("wm", {"mirror": {"samples": "many"}})
    with pytest.raises(ConfigError, match="mirror must map settings to values, not 5"):
        make_rule("wm", {"mirror": 5})
    with pytest.raises(ConfigError, match="fa has no setting 'scale'; it has none"):
        make_rule("fa", {"scale": "he"})


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 2\nlr: 0.5\nrules: bp,kp\n")
    merged = merge_config(CompareConfig(lr=0.25), file)
    assert (merged.epochs, merged.lr, merged.rules, merged.batch_size) == (2, 0.25, ("bp", "kp"), 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 2", "unknown setting 'epoch'; did you mean 'epochs'"),
        ("- 2", "must map settings to values"),
        ("a: [", "is not YAML"),
        ("epochs: two", "epochs: Input should be a valid integer"),
        ("rules: 5", "rules: name rules, as in bp,kp"),
        ("rules: [bp, 5]", "rules: name rules, as in bp,kp"),
        ("rules: bp,bp", "name at least one rule, and each only once"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        merge_config(CompareConfig(), file)
    assert str(file) in str(error.value)


def test_a_config_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        read_config(tmp_path)


def test_a_config_written_is_the_config_read(tmp_path):
    config = CompareConfig(lr=0.3, overrides={"fc": "bp"}, rule_settings={"wm": {"mirror": {"sigma": 2.0}}})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert merge_config(CompareConfig(), tmp_path / "c.yaml") == config


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5]})
    assert "".join((tmp_path / "a.json").read_text().split()) == '{"x":[null,null,1.5]}'


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ConfigError, match=r"c\.pt is damaged.*delete it"):
        load_checkpoint(tmp_path / "c.pt")
