"""The benchmark itself: what it measures, and that its figures mean what they say."""

import json
import time

import pytest
import torch

from feedbackpath import cli
from feedbackpath.bench import BenchSettings, run_bench
from feedbackpath.bench.bench import ANGLE_STEPS, _largest_angle, describe
from feedbackpath.bench.counts import count_collective_bytes, count_graph_breaks
from feedbackpath.bench.measure import bytes_of_feedback, peak_bytes, time_in_turns, untie_milliseconds
from feedbackpath.bench.workloads import PLAIN, WORKLOADS, Arithmetic, TrainingStep, find_workload, make_steps
from feedbackpath.errors import ConfigError
from feedbackpath.models import MODELS, READ_TOKENS


def run_cli(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code


@pytest.fixture(scope="module")
def found():
    lines = []
    settings = BenchSettings(
        models=("lenet",), rules=("bp", "fa", "kp", "wm"), rounds=2, batch_size=8, least_seconds=0.0
    )
    results = run_bench(settings, lines.append)
    assert lines == [describe(name, network) for name, network in results["networks"].items()]
    return json.loads(json.dumps(results))


def test_every_rule_is_measured_beside_plain_pytorch(found):
    for network in found["networks"].values():
        assert set(network["step"]) == set(network["feedback_bytes"]) == {"bp", "fa", "kp", "wm"}
        assert all(0 < row["q1"] <= row["median"] <= row["q3"] for row in network["step"].values())
        assert network["delta_angles"]["median"] > 0
        assert network["untie_ms"] > 0
    assert found["start_up"]["help_s"] > 0


def test_memory_is_that_of_plain_pytorch_and_of_the_feedback_weights(found):
    for network in found["networks"].values():
        memory, feedback = network["memory_bytes"], network["feedback_bytes"]
        assert memory["bp"] == memory[PLAIN]
        assert feedback["bp"] == 0
        assert memory["fa"] - memory[PLAIN] == pytest.approx(feedback["fa"], rel=0.05)
        # Its B and its momentum: its gradient is W's.
        assert memory["kp"] - memory[PLAIN] <= 2.05 * feedback["kp"]


def test_a_rule_does_what_it_says(found):
    for network in found["networks"].values():
        angles = network["largest_angle_deg"]
        assert angles["bp"] == 0
        assert angles["wm"] < 50 < 60 < angles["fa"]  # so small a minibatch leaves it little to mirror with


def test_no_rule_breaks_graphs_or_adds_to_traffic(found):
    for network in found["networks"].values():
        assert network["graph_breaks"] == dict.fromkeys((PLAIN, "bp", "fa", "kp", "wm"), 0)
        assert network["traffic"] == dict.fromkeys(("bp", "fa", "kp", "wm"), 1.0)
        assert network["collective_bytes"]["kp"]["allreduce_"] > 0


class BreaksForward(torch.nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


class _BreaksOffGoingBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, delta):
        torch._dynamo.graph_break()
        return delta


class BreaksBackward(torch.nn.Module):
    def forward(self, x):
        return _BreaksOffGoingBack.apply(x)


@pytest.mark.parametrize("kind", [BreaksForward, BreaksBackward])
def test_graph_breaks_are_counted(kind):
    step = TrainingStep(find_workload("mlp"), "fa", 2, Arithmetic())
    whole = step.model
    step.model = torch.nn.Sequential(whole, kind())
    assert count_graph_breaks(step) >= 1
    assert step.forward is whole  # as it was before


def test_what_a_rule_sends_is_counted():
    step = TrainingStep(find_workload("mlp"), "fa", 2, Arithmetic())
    silent = count_collective_bytes(step)
    (first, *_), own_step = step.path.weights, step.path.step

    def send_and_step():
        torch.distributed.all_reduce(first.feedback.detach())
        own_step()

    step.path.step = send_and_step
    sent = count_collective_bytes(step)
    assert sent["allreduce_"] == silent["allreduce_"] + 4 * first.feedback.numel()
    assert not torch.distributed.is_initialized()


def test_calls_take_turns():
    order = []
    seconds = time_in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4)
    assert "".join(order) == "abbaabba"
    assert {len(times) for times in seconds.values()} == {4}


def test_short_calls_are_timed_more_often():
    seconds = time_in_turns({"a": lambda: sum(range(10_000))}, rounds=2, least_seconds=0.02)
    assert len(seconds["a"]) > 2
    assert sum(seconds["a"][:-1]) < 0.02 <= sum(seconds["a"])


def test_w_goes_on_moving_while_steps_are_timed():
    step = make_steps(find_workload("mlp"), {}, 16, Arithmetic())[PLAIN]
    weight = step.model.fc1.weight
    for _ in range(100):
        step()
    before = weight.detach().clone()
    step()
    assert (weight.detach() - before).norm() > 1e-4 * before.norm()


def test_a_mirrors_angle_is_the_largest_after_some_steps():
    step = TrainingStep(find_workload("mlp"), "wm", 16, Arithmetic(), num_labellings=4)
    seen = []
    measure = step.path.matrix_angles
    step.path.matrix_angles = lambda: seen.append(measure()) or seen[-1]
    assert _largest_angle(step, step.path, seconds=60) == max(
        angle for angles in seen for angle in angles.values()
    )
    assert step.num_steps == len(seen) - 1 == ANGLE_STEPS


def test_a_rule_that_broadcasts_has_no_angle_to_w():
    step = TrainingStep(find_workload("mlp"), "dfa", 2, Arithmetic())
    assert _largest_angle(step, step.path, seconds=60) is None


def test_waiting_is_not_work():
    seconds = time_in_turns({"sleep": lambda: time.sleep(0.05)}, rounds=2)
    assert max(seconds["sleep"]) < 0.04


def test_peak_memory_counts_what_is_in_use_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8)

    def together():
        return [torch.empty(2**20, dtype=torch.uint8) for _ in range(3)]

    assert peak_bytes(one_after_the_other, "cpu") == pytest.approx(2**20, rel=0.01)
    assert peak_bytes(together, "cpu") == pytest.approx(3 * 2**20, rel=0.01)


def test_every_workload_is_a_network_that_trains():
    assert set(WORKLOADS) == set(MODELS) - READ_TOKENS
    with pytest.raises(ConfigError, match="gpt reads tokens"):
        find_workload("gpt")
    for model in ("mlp", "transformer", "resnet8"):
        step = TrainingStep(find_workload(model), "kp", 4, Arithmetic(is_bf16=True))
        before = step.loss().item()
        for _ in range(20):
            step()
        assert step.loss().item() < before


def test_untying_leaves_the_model_plain():
    step = TrainingStep(find_workload("mlp"), None, 4, Arithmetic())
    times = untie_milliseconds(step.model, "fa", repetitions=2)
    assert times["untie_ms"] > 0
    assert "feedback" not in " ".join(step.model.state_dict())


def test_bytes_of_shared_feedback_count_once():
    step = TrainingStep(find_workload("mlp"), "fa", 4, Arithmetic())
    expected = sum(4 * weight.weight.numel() for weight in step.path.weights)
    assert bytes_of_feedback(step.path) == expected


def test_the_command_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    small = ("--models", "mlp", "--rules", "fa", "--rounds", 2, "--seconds", 0, "--batch-size", 4)
    assert run_cli("bench", *small, "--out", out) == 0
    assert "mlp, batch 4: fa" in capsys.readouterr().out
    assert json.loads(out.read_text())["networks"]["mlp"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "resnet9"), "no model 'resnet9'"),
        (("--rules", "kq"), "unknown rule 'kq'"),
        (("--rounds", 1), "rounds is 1"),
        (("--num-threads", 0), "--num-threads is 0"),
        (("--device", "cuda"), "cannot be used"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(capsys, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run_cli("bench", *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_settings_are_checked_before_anything_runs():
    with pytest.raises(ConfigError, match="no model"):
        BenchSettings(models=("mlp", "vgg"))
