"""The training loop: the same start for every rule, exact resume, divergence, accumulation, schedules."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from problems import COVERING_RULES, settings_that_start_at_once
from torch import Tensor

import feedbackpath as fp
from feedbackpath.data import UNREADABLE
from feedbackpath.data.counter import permutation
from feedbackpath.data.dataset import stream_positions
from feedbackpath.errors import ConfigError
from feedbackpath.recipes.imagenet import PAPER_MIRROR
from feedbackpath.tasks import load_task
from feedbackpath.train.build import make_network, make_optimizer
from feedbackpath.train.config import CompareConfig, RunConfig
from feedbackpath.train.divergence import LOSS_ITSELF, find_origin
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Diverged, Measured, Paused, Step, train
from feedbackpath.train.rules import make_rule
from feedbackpath.train.schedule import Schedule
from feedbackpath.train.settings import merge_config, read_config

SMALL = {"data": "digits", "model": "mlp", "epochs": 3, "samples_per_epoch": 256, "batch_size": 64}


def events(rule: str, state=None, must_stop=lambda: False, **settings):
    config = CompareConfig(**(SMALL | settings_that_start_at_once(rule) | settings))
    task = load_task("digits", samples_per_epoch=config.samples_per_epoch)
    return train(config, rule, 0, task, Engine(config), state=state, must_stop=must_stop)


def run(rule: str, **settings) -> list:
    return list(events(rule, **settings))


def measured(seen) -> list[Measured]:
    return [event for event in seen if isinstance(event, Measured)]


def without_times(event: Measured) -> dict:
    return event.entry.model_dump(exclude={"seconds"})


def test_every_rule_of_a_seed_starts_from_the_same_forward_weights_and_sees_the_same_samples():
    starts = {rule: next(events(rule, max_steps=1)) for rule in COVERING_RULES}
    reference = starts["bp"]
    for rule, start in starts.items():
        for key, value in reference.state["model"].items():
            assert torch.equal(value, start.state["model"][key]), (rule, key)
        assert start.entry.test == reference.entry.test
    first_losses = {
        rule: next(event.loss for event in run(rule, max_steps=1) if isinstance(event, Step))
        for rule in COVERING_RULES
    }
    assert len(set(first_losses.values())) == 1


def last_weights(seen) -> dict:
    return measured(seen)[-1].state["model"]


@pytest.mark.parametrize(
    ("rule", "stop_after"),  # at an epoch's end, where none is left of it, and within one
    [
        *((rule, 5) for rule in COVERING_RULES),
        *(
            pytest.param(rule, 4, marks=pytest.mark.slow) if rule == "wm" else (rule, 4)
            for rule in COVERING_RULES
        ),
    ],
)
def test_a_resumed_run_ends_bit_identical_to_an_unbroken_one(rule, stop_after):
    whole = run(rule)
    steps = iter(range(1, 100))
    broken = run(rule, must_stop=lambda: next(steps) == stop_after)
    assert isinstance(broken[-1], Paused)
    assert (broken[-1].step, broken[-1].is_last) == (stop_after, True)
    resumed = run(rule, state=copy.deepcopy(broken[-1].state))
    expected = [without_times(event) for event in measured(whole)]
    assert [without_times(event) for event in measured(broken) + measured(resumed)] == expected
    for key, value in last_weights(whole).items():
        assert torch.equal(value, last_weights(resumed)[key]), key


def test_checkpoints_come_every_so_many_steps_and_not_twice_at_an_epochs_end():
    seen = run("bp", checkpoint_steps=2, epochs=1)
    assert [event.step for event in seen if isinstance(event, Paused)] == [2]
    assert seen[-1].state["epoch"] == 2
    assert seen[-1].state["consumed"] == 0


def test_mirror_epochs_leave_the_forward_weights_alone_and_count_as_epochs():
    seen = run("wm", mirror_epochs=1, warmup_epochs=0)
    start, mirrored, *rest = measured(seen)
    assert [event.entry.epoch for event in rest] == [2, 3]
    assert mirrored.entry.train_loss is None
    assert torch.equal(start.state["model"]["fc1.weight"], mirrored.state["model"]["fc1.weight"])
    assert max(mirrored.entry.matrix_angle_deg.values()) < 30
    assert min(start.entry.matrix_angle_deg.values()) > 60
    assert [event.entry.epoch for event in measured(run("bp", mirror_epochs=1))] == [0, 1, 2, 3]


def test_accumulated_gradients_are_those_of_the_whole_minibatch():
    whole, parts = (
        last_weights(run("kp", precision="64-true", micro_batch_size=size)) for size in (None, 24)
    )
    for key, value in whole.items():
        torch.testing.assert_close(value, parts[key], rtol=1e-9, atol=1e-9)


def test_the_learning_rate_follows_the_batch():
    config = RunConfig(lr=0.1, lr_batch_size=256, batch_size=2048)
    assert config.peak_lr == pytest.approx(0.8)


def test_unreadable_images_are_left_out_of_the_mean_and_counted(monkeypatch):
    task = load_task("digits", samples_per_epoch=128)
    unreadable = torch.zeros(len(task.train.labels), dtype=torch.bool)
    unreadable[::5] = True
    marked = replace(task.train, labels=task.train.labels.masked_fill(unreadable, UNREADABLE))
    config = CompareConfig(**(SMALL | {"epochs": 1, "on_bad_image": "skip", "batch_size": 128}))
    broken = replace(task, train=marked)
    (*_, last) = train(config, "bp", 0, broken, Engine(config))
    rows = stream_positions(permutation(128, 0, 1), 1, 128, len(unreadable))
    assert last.entry.unreadable_images == int(unreadable[rows].sum()) > 0
    # The same update by hand, from the same start, over the samples that can be read.
    first = next(iter(train(config, "bp", 0, broken, Engine(config))))
    model = make_network(config, 0, task)
    model.load_state_dict(first.state["model"])
    optimizer = make_optimizer(fp.untie(model, "bp"), config)
    Schedule(config, 1, 1).set_rates(optimizer, 0)
    x, y = marked.batch(permutation(128, 0, 1), 1)
    torch.nn.functional.cross_entropy(model(x[y >= 0]), y[y >= 0]).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, last.state["model"][key])


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_the_weights():
    seen = run("bp", lr=1e17, momentum=0.0, nesterov=False, schedule="constant", epochs=5)
    last = seen[-1]
    assert isinstance(last, Diverged)
    assert last.epoch >= 1
    assert last.learning_rate > 0
    assert "layer 'fc" in last.origin


def test_divergence_names_the_first_layer_whose_output_is_not_finite():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    torch.nn.init.constant_(model[1].weight, 3e38)
    x = torch.full((1, 2), 10.0)
    assert find_origin(model, lambda: model(x).sum()) == "the output of layer '1'"
    assert find_origin(model, lambda: torch.tensor(float("nan"))) == LOSS_ITSELF


def test_max_steps_ends_the_run_with_a_last_measurement():
    seen = run("bp", max_steps=5)
    assert sum(isinstance(event, Step) for event in seen) == 5
    assert measured(seen)[-1].entry.epoch == 2


def test_mirror_kp_follows_backprop():
    runs = [run("bp", precision="64-true"), run("mirror-kp", precision="64-true")]
    bp, ours = (measured(found)[-1].entry for found in runs)
    assert ours.test == bp.test
    assert ours.train_loss == pytest.approx(bp.train_loss, rel=1e-6)


def test_settings_are_honoured():
    assert run("kp", clip_norm=0.01, max_steps=2)
    assert run("wm", precision="bf16-mixed", max_steps=2)
    assert run("fa", optimizer="adamw", max_steps=2)
    overridden = measured(run("fa", overrides={"*": "bp"}, max_steps=1))[-1]
    assert set(overridden.entry.matrix_angle_deg.values()) == {0.0}


def test_learning_rate_warms_up_and_falls_to_zero():
    config = CompareConfig(lr=0.2, warmup_epochs=1)
    rates = [Schedule(config, 10, 50).learning_rate(step) for step in range(51)]
    assert rates[0] == pytest.approx(0.2 / 11)
    assert max(rates) == rates[10] == 0.2
    assert rates[50] == pytest.approx(0.0, abs=1e-9)
    constant = config.model_copy(update={"schedule": "constant"})
    assert Schedule(constant, 10, 50).learning_rate(49) == 0.2


@pytest.mark.parametrize(
    ("optimizer", "decay", "epochs"), [("adamw", 0.0, 30), ("adamw", 0.1, 30), ("sgd", 1e-3, 600)]
)
def test_the_first_tenth_of_the_steps_has_the_early_efolds(optimizer, decay, epochs):
    settings = {"optimizer": optimizer, "lr": 0.01, "weight_decay": decay, "early_efolds": 2.0}
    config = CompareConfig(**(SMALL | settings | {"epochs": epochs}))
    schedule = Schedule.over(config, 256)
    slowness = 1 - config.momentum if optimizer == "sgd" else 1.0
    early = math.ceil(schedule.num_steps / 10)
    rates = [(schedule.learning_rate(t), schedule.weight_decay(t)) for t in range(schedule.num_steps)]
    assert sum(rate * decay for rate, decay in rates[:early]) / slowness == pytest.approx(2.0)
    assert {decay for _, decay in rates[early:]} == {decay}


def difference(event: Measured) -> Tensor:
    """Return W - B of the layers of an MLP, as one vector."""
    state = event.state["model"]
    return torch.cat([(state[f"fc{n}.weight"] - state[f"fc{n}.feedback"]).flatten() for n in (1, 2, 3)])


def test_early_efolds_bring_kolen_pollack_together_without_any_other_decay():
    settings = {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.0, "epochs": 30, "early_efolds": 3.0}
    config = CompareConfig(**(SMALL | settings))
    schedule, left = Schedule.over(config, 256), 1.0
    for step in range(schedule.num_steps):
        left *= 1 - schedule.learning_rate(step) * schedule.weight_decay(step)
    first, *_, last = (difference(event) for event in events("kp", **settings) if isinstance(event, Measured))
    torch.testing.assert_close(last, left * first, rtol=1e-3, atol=1e-5)
    assert left < math.exp(-3)


def test_a_resumed_run_goes_on_among_its_early_efolds():
    settings = {"optimizer": "adamw", "lr": 0.003, "epochs": 30, "early_efolds": 3.0}
    unbroken = (event for event in events("kp", **settings) if isinstance(event, Measured))
    state = copy.deepcopy(next(event for event in unbroken if event.entry.epoch == 1).state)
    *_, whole = unbroken
    assert without_times(measured(events("kp", state=state, **settings))[-1]) == without_times(whole)


def test_make_rule_takes_nested_settings_and_names_wrong_ones():
    rule = make_rule("wm", {"mirror": {"reading": "printed"}})
    assert rule == fp.WeightMirror(fp.Mirror(reading="printed"))
    assert make_rule("mirror-kp", {"mirror": {"sigma": 0.5}}).mirror == fp.Mirror(sigma=0.5)
    exact = make_rule("mirror-kp", {"start": "exact", "mirror": {"sigma": 0.5}})
    assert exact == fp.MirrorKolenPollack(fp.Mirror.exact(sigma=0.5))
    with pytest.raises(ConfigError, match="mirror has no setting 'readin'; it has noise, "):
        make_rule("wm", {"mirror": {"readin": "printed"}})
    with pytest.raises(fp.RuleError, match="samples must be a whole number, not 'many'"):
        make_rule("wm", {"mirror": {"samples": "many"}})
    rule = make_rule("wm", {"mirror": {"when": {"layers": "turn", "every": 2}}})
    assert rule.mirror.when == fp.When("turn", every=2)
    with pytest.raises(ConfigError, match="mirror.when has no setting 'often'; it has layers, every"):
        make_rule("wm", {"mirror": {"when": {"often": 2}}})
    assert make_rule("wm", {"mirror": PAPER_MIRROR}).mirror == fp.Mirror.paper()
    with pytest.raises(ConfigError, match="mirror must map settings to values, not 5"):
        make_rule("wm", {"mirror": 5})
    with pytest.raises(ConfigError, match="bp has no setting 'scale'; it has none"):
        make_rule("bp", {"scale": "he"})


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
        ("epochs: two", "epochs is 'two': it must be a whole number"),
        ("rules: 5", ": name rules, as in bp,kp"),
        ("rules: [bp, 5]", ": name rules, as in bp,kp"),
        ("rules: bp,bp", "rules is 'bp,bp': name each rule only once"),
        ("data_dir: 2024-13-45", "is not YAML: month must be"),
        ("seed: " + "9" * 5000, "is not YAML"),
        ("{" * 3000, "is not YAML"),
        ("milestones: 5.5", "milestones.0 is '5.5': it must be a whole number"),
        ("milestones: null", "milestones.0 is 'None': it must be a whole number"),
        ("lr: .inf", "lr is inf: it must be a number"),
        ("weight_decay: .inf", "weight-decay is inf: it must be a number"),
        ("warmup_epochs: .nan", "warmup-epochs is nan: it must be a number"),
        ("by_rule: {kp: {lr: -1}}", "by_rule, kp: lr is -1: it must be more than 0"),
        ("by_rule: {kp: {momentum: 1}}", "by_rule, kp: momentum is 1: it must be less than 1"),
        ("by_rule: {'{x}': {foo: 1}}", "{x} may have its own optimizer settings, but foo is not one"),
        ("imports: a.py", "imports is 'a.py': it must be a list"),
        ("batch_size: 99999999999999999999", "batch-size is 99999999999999999999: it must be less than"),
        ("equivalence: 0.5\nrules: [kp]", "c.yaml: --equivalence compares rules with bp"),
        ("rules: [../x]", "rules.0 is '../x': files get this name"),
        ("model: a/b", "model is 'a/b': files get this name"),
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


def test_a_folder_given_as_data_is_the_folder(tmp_path):
    assert RunConfig(data=str(tmp_path)).data_dir == tmp_path
    assert RunConfig(data="digits").data_dir is None
    merged = merge_config(RunConfig(data=f"{tmp_path}/"), None, RunConfig(data="imagenet"))
    assert (merged.data, merged.data_dir) == ("imagenet", tmp_path)
