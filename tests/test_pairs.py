"""Mirroring by pairs of inputs: the short way, held against codes of sixteen and against W."""

import copy
import gc

import pytest
import torch
from problems import KINDS, by_id
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import prune

import feedbackpath as fp
from feedbackpath.bench.measure import peak_bytes
from feedbackpath.mirror import MirrorMode, mode, pairs
from feedbackpath.mirror.activations import odd_slope
from feedbackpath.mirror.codes import estimate_with_codes
from feedbackpath.mirror.pairs import Pairs, can_pair
from feedbackpath.mirror.rates import Signed


def untie_alone(layer, activation):
    path = fp.untie(nn.Sequential(layer, activation), fp.WeightMirror(fp.Mirror(when=fp.When("all"))))
    return path, path.weights[0]


def can_pair_behind(activation, weight, settings=None):
    return can_pair(weight, settings or fp.Mirror(), odd_slope(activation))


FORWARD = [problem for problem in KINDS if "Transpose" not in problem.id]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.3), nn.GELU(), nn.Identity()], ids=str)
@pytest.mark.parametrize("problem", FORWARD, ids=by_id)
def test_pairs_find_what_codes_of_sixteen_find(problem, activation):
    _, weight = untie_alone(problem.build(), activation)
    assert can_pair_behind(activation, weight)
    Pairs(weight, fp.Mirror()).fire()
    with torch.no_grad():
        found = estimate_with_codes(weight, activation, Signed(), sigma=0.5, block_bias=True)
    torch.testing.assert_close(weight.feedback.detach(), found.at_gain_one(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("inputs", "kernel_size", "groups"), [(3, 3, 1), (4, 1, 1), (6, 3, 6), (6, 1, 6)])
def test_any_number_of_inputs_in_any_order_of_memory(inputs, kernel_size, groups, memory_format):
    layer = nn.Conv2d(inputs, 6, kernel_size, groups=groups)
    _, weight = untie_alone(layer.to(memory_format=memory_format), nn.ReLU())
    Pairs(weight, fp.Mirror()).fire()
    torch.testing.assert_close(weight.feedback, weight.weight)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100])
def test_neurons_are_worked_through_some_at_a_time(rows, monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK_VALUES", 4 * 11)
    _, weight = untie_alone(nn.Linear(11, rows), nn.ReLU())
    Pairs(weight, fp.Mirror()).fire()
    torch.testing.assert_close(weight.feedback, weight.weight)


@pytest.mark.parametrize("inputs", [200, 201])
def test_pairs_take_no_memory_but_an_odd_number_of_inputs_does(inputs):
    path, weight = untie_alone(nn.Linear(inputs, 100), nn.ReLU())
    for _ in range(2):
        path.step()
    taken = peak_bytes(path.step, "cpu")
    assert (taken > weight.weight.nbytes) if inputs % 2 else (taken < 1000)


def test_training_goes_the_short_way_from_the_second_mirroring_on(monkeypatch):
    fired = []
    fire = Pairs.fire
    monkeypatch.setattr(Pairs, "fire", lambda self: fired.append(self) or fire(self))
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    path.mirror()
    assert not fired  # the first looks for neurons that do not answer
    for _ in range(2):
        nn.init.normal_(weight.weight)
        path.step()
        torch.testing.assert_close(weight.feedback, weight.weight)
    assert len(fired) == 2
    assert fired[0] is fired[1]


@pytest.mark.parametrize("move", [
    lambda model: model.float(),
    lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    lambda model: model.to(memory_format=torch.channels_last),
], ids=["precision", "loading", "order"])  # fmt: skip
def test_weights_may_move(move):
    path, weight = untie_alone(nn.Conv2d(4, 6, 3), nn.ReLU())
    for _ in range(2):
        path.step()
    move(path.model)
    nn.init.normal_(weight.weight)
    path.step()
    torch.testing.assert_close(weight.feedback, weight.weight)


def test_other_settings_do_not_find_the_pairs_of_before():
    path, _ = untie_alone(nn.Linear(30, 20), nn.ReLU())
    for _ in range(2):
        path.step()
    path.mirror(1, fp.Mirror(noise="gaussian"))
    assert path.matrix_angles()["0"] > 0.1  # noise that is independent leaves an angle


def test_a_mirroring_that_was_broken_off_begins_anew(monkeypatch):
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    for _ in range(2):
        path.step()
    with monkeypatch.context() as patch:
        patch.setattr(mode, "estimate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            path.mirror(until_angle_deg=1)
    path.step()
    torch.testing.assert_close(weight.feedback, weight.weight)


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_pruned_weight_is_mirrored_as_it_is():
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    prune.l1_unstructured(weight.layer, "weight", 0.5)
    for _ in range(3):
        path.step()
    assert (weight.feedback == 0).float().mean() == 0.5
    assert path.matrix_angles()["0"] < 1e-3


def test_a_copied_model_mirrors_its_own_weights():
    path, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    for _ in range(2):
        path.step()
    twin, before = copy.deepcopy(path), weight.feedback.detach().clone()
    nn.init.normal_(twin.weights[0].weight)
    twin.step()
    torch.testing.assert_close(twin.weights[0].feedback, twin.weights[0].weight)
    torch.testing.assert_close(weight.feedback.detach(), before)


@pytest.mark.parametrize("settings", [
    {"block_bias": False}, {"rates": "push-pull"}, {"rates": "baseline"}, {"reading": "inside"},
    {"noise": "gaussian"},
], ids=str)  # fmt: skip
def test_pairs_are_not_fired_where_more_than_the_drive_counts(settings):
    _, weight = untie_alone(nn.Linear(30, 20), nn.ReLU())
    assert can_pair_behind(torch.relu, weight)
    assert not can_pair_behind(torch.relu, weight, fp.Mirror(**settings))
    assert not can_pair_behind(torch.tanh, weight)


def test_pairs_are_not_fired_where_products_would_lose_digits():
    _, weight = untie_alone(nn.Linear(30, 20).bfloat16(), nn.ReLU())
    assert not can_pair_behind(torch.relu, weight)


def test_pairs_that_memory_does_not_show_are_mirrored_the_longer_way():
    path, weight = untie_alone(nn.Linear(4, 6), nn.ReLU())
    for memory in (torch.randn(6, 5)[:, :4], torch.randn(25)[1:].view(6, 4), torch.randn(4, 6).t()):
        weight.layer.weight = nn.Parameter(memory)
        assert not Pairs(weight, fp.Mirror()).can_fire
        path.mirror(2)
        torch.testing.assert_close(weight.feedback, weight.weight)


@pytest.mark.parametrize("inputs", [4, 5])
def test_a_weight_that_blew_up_leaves_nothing_behind(inputs):
    path, weight = untie_alone(nn.Linear(inputs, 3), nn.ReLU())
    for _ in range(2):
        path.step()
    good = weight.weight.detach().clone()
    with torch.no_grad():
        weight.weight.fill_(float("inf"))
    path.step()
    with torch.no_grad():
        weight.weight.copy_(good)
    path.step()
    torch.testing.assert_close(weight.feedback.detach(), good)


@pytest.mark.parametrize("inputs", [4, 5])
def test_mirroring_in_inference_mode_does_not_hinder_the_next(inputs):
    path, weight = untie_alone(nn.Linear(inputs, 3), nn.ReLU())
    with torch.inference_mode():
        path.mirror(3)
    nn.init.normal_(weight.weight)
    path.mirror()
    torch.testing.assert_close(weight.feedback, weight.weight)


def test_a_square_weight_that_is_transposed_in_place_is_seen_anew():
    path, weight = untie_alone(nn.Linear(6, 6), nn.ReLU())
    train(path, 2)
    weight.layer.weight.data = weight.layer.weight.data.t()
    path.step()
    torch.testing.assert_close(weight.feedback, weight.weight)


def train(path, steps):
    for _ in range(steps):
        path.model(torch.randn(3, 6)).sum().backward()
        path.step()


def test_views_of_weights_do_not_outlive_them(tmp_path):
    path, weight = untie_alone(nn.Linear(6, 4), nn.ReLU())
    train(path, 3)
    torch.save(path, tmp_path / "path.pt")
    saved = torch.load(tmp_path / "path.pt", weights_only=False)
    torch.testing.assert_close(saved.weights[0].feedback, weight.feedback)
    memory = StorageWeakRef(weight.feedback.untyped_storage())
    path.retie()
    assert not path.context.part(MirrorMode).pairs
    del weight
    gc.collect()
    assert memory.expired()


def test_biases_that_are_not_there_need_not_be_blocked(monkeypatch):
    fired = []
    fire = Pairs.fire
    monkeypatch.setattr(Pairs, "fire", lambda self: fired.append(self) or fire(self))
    settings = fp.WeightMirror(fp.Mirror(block_bias=False))
    path = fp.untie(nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU()), settings)
    path.mirror(2)
    assert len(fired) == 1


def test_neurons_that_answer_to_nothing_are_not_fired_at():
    _, weight = untie_alone(nn.Linear(6, 4), nn.LeakyReLU(-1.0))
    assert odd_slope(nn.LeakyReLU(-1.0)) == pytest.approx(0.0)
    assert not can_pair_behind(nn.LeakyReLU(-1.0), weight)
