"""Each line of docs/limits.md is held by a test: one in this file, or one elsewhere that is named here."""

import ast
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from problems import make_mlp
from torch import nn

import feedbackpath as fp
from feedbackpath.core import one_operation

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs/limits.md").read_text()

HELD = {
    "test_surgery": {
        "Not every rule can run every layer": "test_layers_that_a_rule_does_not_serve_are_named",
        "A layer whose `forward` was replaced": "test_a_layer_whose_forward_was_replaced_is_named",
        "Norms pass their scale": "test_norms_and_embeddings_need_no_feedback_weight",
        "Models that are compiled": "test_models_that_cannot_be_untied_are_refused_with_the_remedy",
    },
    "test_exchange": {
        "Where a weight enters": (
            "test_an_operation_that_is_not_linear_in_w_is_that_of_b_for_its_input_alone"
        ),
        "Weights that are multiplied": "test_weights_that_are_multiplied_with_each_other_are_named",
        "A matrix that is only added": "test_parameters_that_are_only_added_get_no_feedback_weight",
    },
    "test_limits": {
        "An update that is differ": "test_an_update_that_is_differentiated_is_not_backprops",
        "Forward-mode derivatives": "test_derivatives_come_in_reverse_mode_alone",
        "Products outside the model's own": "test_a_product_outside_the_model_goes_back_through_the_weight",
        "A table of positions": "test_positions_that_another_function_adds_get_a_b_that_nothing_uses",
        "An average of weights made before": "test_an_average_of_a_list_made_beforehand_is_not_seen",
        "Recurrent layers run": "test_recurrent_layers_run_without_cudnn",
        "The optimizer must treat": "test_steps_scaled_by_the_norm_of_a_weight_part_w_and_b_unsaid",
        "Parameters in bfloat16": "test_a_bfloat16_parameter_does_not_decay",
        "Clipping to a norm": "test_clipping_that_begins_after_the_first_update_is_not_seen",
        "An update without `B`": "test_an_update_without_b_after_the_first_is_not_seen",
        "Penalties on weights": "test_a_penalty_in_the_loss_reaches_the_weight_alone",
        "The weight mirror leaves": "test_a_wide_layer_and_a_small_minibatch_leave_20_degrees",
        "The first mirroring": "test_a_first_mirroring_is_50_passes_of_2048_examples",
        "Some layers are not mirrored": "test_a_hook_on_attention_is_not_felt_by_the_mirror",
        "`B` is one more tensor": "test_feedback_weights_take_the_memory_of_the_forward_ones",
        "`torch.compile(t": "test_grad_of_torch_func_goes_through_feedback_where_it_is_not_compiled",
        "`torch.fx.symbolic_trace`": "test_an_untied_model_cannot_be_traced_and_a_retied_one_can",
        "`path` belongs": "test_a_copy_of_a_model_is_not_measured_by_its_path",
        "A plain model refuses": "test_a_plain_model_refuses_feedback_keys",
        "Networks are small": "test_no_measured_result_comes_from_a_larger_network",
        "GPUs are not": "test_no_measured_result_comes_from_a_gpu",
        "It does not download": "test_no_file_of_the_package_opens_a_connection",
        "It limits the size of data": "test_the_bounds_of_data_are_those_that_are_stated",
    },
    "test_usage": {
        "An embedding's table": "test_a_table_that_is_read_back_is_named",
    },
    "test_guard": {
        "A change of the model after": "test_a_change_is_noticed_by_the_next_step_whatever_the_rule",
    },
    "test_faults": {
        "Rules that broadc": "test_broadcasting_into_a_checkpointed_part_trains_all_layers_or_is_refused",
        "Save `state_dict()`s": "test_subclassed_layers_pickle_and_copy",
    },
    "test_broadcast_rules": {
        "`drtp` needs cross": "test_random_target_projection_refuses_errors_that_tell_no_class",
    },
    "test_alignment_rules": {
        "`ia`, `aa`, `pal` and `dtp` read": "test_an_output_that_was_changed_in_place_is_refused",
    },
    "test_rules": {
        "It needs weight decay": "test_kolen_pollack_without_decay_keeps_the_gap",
        "Frozen weights": "test_feedback_of_a_frozen_weight_is_frozen_as_well",
    },
    "test_foreign": {
        "A weight shared with": "test_a_table_whose_gradient_b_cannot_take_over_is_named",
        "Weights made from other": "test_weights_that_b_cannot_follow_are_left_by_name",
        "`torch.save((model": "test_a_model_and_its_path_are_saved_together",
    },
    "test_following": {
        "A layer has one activation": "test_what_cannot_be_told_is_linear_and_named_once",
    },
    "test_cited_rules": {
        "`pal` adds noise": "test_phaseless_noise_rides_on_training_alone",
        "`pfa` needs": "test_product_feedback_alignment_says_what_it_cannot_do",
        "`kh` changes": "test_hidden_units_compete_as_is_written",
        "`rdd` and `stdwi` simulate": "test_cells_leak_and_spike_as_is_written",
    },
    "test_update_first": {
        "`KolenPollack(order": "test_what_it_cannot_know_or_do_is_said",
    },
    "test_moments": {
        "Moments are kept once": "test_where_nothing_can_be_shared_it_is_said_why",
    },
    "test_mirror": {
        "The noise's": "test_noise_takes_the_shape_of_the_minibatch_and_2048_examples_before_there_was_one",
        "The exact read-out assumes": "test_hadamard_codes_average_over_noise_and_weak_ones_drown_in_it",
    },
    "test_plan": {
        "`until_angle_deg`": "test_the_angle_is_told_by_the_passes_own_agreement_and_never_by_the_weights",
    },
    "test_distributed": {
        "`Mirror(across_devices": "test_feedback_is_the_same_on_all_ranks_bit_for_bit_and_after_resuming",
    },
    "test_schedule": {
        "A share of FLOPs": "test_what_a_layer_costs_is_the_same_on_every_kind_of_device",
        "Each device": "test_the_minibatch_is_that_of_all_devices_so_that_their_number_makes_no_difference",
    },
    "test_one_input": {
        "One noisy input": "test_feedback_goes_to_the_weights_times_the_covariance_of_the_inputs",
    },
    "test_activations": {
        "Only the layer and its": "test_norms_and_dropout_are_passed_over",
    },
    "test_exact": {
        "The exact read-out is exact": "test_weak_codes_are_nearly_exact_behind_smooth_activations",
    },
    "test_angles": {
        "`delta_angles` runs": "test_another_minibatch_the_second_time_is_refused",
    },
    "test_replicas": {
        "FSDP and tensor": "test_weights_that_are_sharded_after_untie_are_refused_by_every_use",
        "DDP copies `B`": "test_a_checkpoint_that_the_first_process_loads_counts_for_all_from_the_first_step",
    },
    "test_forward": {
        "Second derivatives": "test_a_gradient_penalty_trains_w_and_b_of_kolen_pollack_alike",
    },
    "test_train": {
        "The same seed": "test_a_resumed_run_ends_bit_identical_to_an_unbroken_one",
    },
}
"""By file of tests: the beginning of each line, and the test that holds it."""


def lines_of_the_page():
    found = re.findall(r"^- (.*)", PAGE, flags=re.MULTILINE)
    assert all(line.startswith("**") for line in found), "each line begins with what it says, in bold"
    return [line.removeprefix("**") for line in found]


def test_every_line_has_a_test_and_every_test_a_line():
    lines = lines_of_the_page()
    beginnings = [beginning for tests in HELD.values() for beginning in tests]
    for line in lines:
        assert sum(map(line.startswith, beginnings)) == 1, f"no one test holds: {line}"
    assert len(lines) == len(beginnings)


@pytest.mark.parametrize("file", HELD)
def test_the_tests_that_are_named_exist(file):
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    assert set(HELD[file].values()) <= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def add_positions(x, positions):
    return x + positions


class OutOfSight(nn.Module):
    """A model whose positions a function adds that is not its own."""

    def __init__(self):
        super().__init__()
        self.positions, self.fc = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(add_positions(x, self.positions))


class Adder(nn.Module):
    def forward(self, x, positions):
        return x + positions


class ToOwnModule(OutOfSight):
    """A model that hands its positions to a module of its own."""

    def __init__(self):
        super().__init__()
        self.adder = Adder()

    def forward(self, x):
        return self.fc(self.adder(x, self.positions))


@pytest.mark.parametrize("make", [OutOfSight, ToOwnModule])
def test_positions_that_another_function_adds_get_a_b_that_nothing_uses(make):
    path = fp.untie(model := make(), "kp")
    model(torch.randn(2, 4, 6)).square().sum().backward()
    assert [name for name, _, feedback in path.pairs() if feedback.grad is None] == [""]
    with pytest.warns(fp.UnconvertedLayerWarning, match=make.__name__):
        fp.untie(make(), "wm")


# --- Layers -------------------------------------------------------------------------------------------------


def test_a_product_outside_the_model_goes_back_through_the_weight():
    model = make_mlp().double()
    fp.untie(model, "fa")
    h = torch.randn(4, model[0].in_features, dtype=torch.float64, requires_grad=True)
    y = F.linear(h, model[0].weight)
    (slope,) = torch.autograd.grad(y.sum(), h)
    torch.testing.assert_close(slope, model[0].weight.sum(0).expand_as(h))


def test_an_average_of_a_list_made_beforehand_is_not_seen():
    model = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)])
    means = [p.detach().clone() for p in model.parameters()]
    path = fp.untie(model, "fa")
    for mean, p in zip(means, list(model.parameters()), strict=False):
        mean.lerp_(p.detach(), 0.5)
    path.step()


def test_recurrent_layers_run_without_cudnn(monkeypatch):
    model, seen = nn.LSTM(4, 3), []
    fp.untie(model, "fa")
    run = one_operation.run

    def note(func, args, kwargs):
        seen.append((getattr(func, "__name__", ""), torch.backends.cudnn.enabled))
        return run(func, args, kwargs)

    monkeypatch.setattr(one_operation, "run", note)
    model(torch.randn(2, 3, 4))
    assert ("lstm", False) in seen
    assert torch.backends.cudnn.enabled


# --- Kolen-Pollack ------------------------------------------------------------------------------------------


def gap(path):
    return torch.cat([(w - b).detach().flatten() for _, w, b in path.pairs()])


def test_steps_scaled_by_the_norm_of_a_weight_part_w_and_b_unsaid():
    """As LARS and LAMB do; ``check_optimizer`` sees the same settings."""
    model = make_mlp().double()
    path = fp.untie(model, "kp")
    path.check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01))
    before = gap(path)
    model(torch.randn(4, model[0].in_features, dtype=torch.float64)).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.norm() * p.grad / p.grad.norm())
    path.step()
    assert (gap(path) - before).norm() > 1e-3


def test_a_bfloat16_parameter_does_not_decay():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.1, weight_decay=1e-2)
    p.grad = torch.zeros_like(p)
    for _ in range(100):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


def train_once(model, path, parameters, clip=None):
    model.zero_grad()
    model(torch.randn(4, model[0].in_features)).square().sum().backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    torch.optim.SGD(parameters, lr=0.01, weight_decay=0.01).step()
    path.step()


def test_clipping_that_begins_after_the_first_update_is_not_seen():
    model = make_mlp()
    path = fp.untie(model, "kp")
    train_once(model, path, model.parameters())
    train_once(model, path, model.parameters(), clip=0.1)


def test_an_update_without_b_after_the_first_is_not_seen():
    model = make_mlp()
    plain = list(model.parameters())
    path = fp.untie(model, "kp")
    train_once(model, path, model.parameters())
    train_once(model, path, plain)


def test_a_penalty_in_the_loss_reaches_the_weight_alone():
    model = make_mlp()
    path = fp.untie(model, "kp")
    loss = model(torch.randn(4, model[0].in_features)).square().sum()
    (loss + sum(w.square().sum() for _, w, _ in path.pairs())).backward()
    for _, w, b in path.pairs():
        torch.testing.assert_close(w.grad - b.grad, 2 * w.detach())


# --- Mirror mode --------------------------------------------------------------------------------------------


def test_a_wide_layer_and_a_small_minibatch_leave_20_degrees():
    assert fp.Mirror().expected_angle_deg(512, 64) == pytest.approx(20, abs=3)
    assert fp.Mirror(samples=512).expected_angle_deg(512, 512) < 11


def test_a_first_mirroring_is_50_passes_of_2048_examples():
    path = fp.untie(nn.Sequential(nn.Linear(20, 10), nn.ReLU()), fp.WeightMirror(fp.Mirror(forgetting=0.1)))
    path.mirror()
    assert path.state_dict()["parts"]["MirrorMode"]["passes"] == {"0": 50}
    assert fp.Mirror().examples_for(20) == 2048


def test_a_hook_on_attention_is_not_felt_by_the_mirror():
    model = nn.MultiheadAttention(8, 2)
    path = fp.untie(model, "wm")
    model.register_forward_hook(lambda module, args, output: (output[0] * 0, None))
    path.mirror()
    assert max(path.matrix_angles().values()) < 5


# --- Training and saving ------------------------------------------------------------------------------------


def test_feedback_weights_take_the_memory_of_the_forward_ones():
    model = make_mlp()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(torch.randn(4, model[0].in_features)).sum().backward()
    for _, w, b in path.pairs():
        assert b.nbytes == w.nbytes
    optimizer.step()
    for _, w, b in path.pairs():
        assert optimizer.state[b]["momentum_buffer"].nbytes == optimizer.state[w]["momentum_buffer"].nbytes


def test_grad_of_torch_func_goes_through_feedback_where_it_is_not_compiled():
    model = make_mlp().double()
    path = fp.untie(model, "fa")
    x = torch.randn(4, model[0].in_features, dtype=torch.float64)
    found = torch.func.grad(lambda x: model(x).square().sum())(x)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(given).square().sum(), given)
    torch.testing.assert_close(found, expected)
    path.retie()
    (backprop,) = torch.autograd.grad(model(given).square().sum(), given)
    assert not torch.allclose(found, backprop)


def test_an_untied_model_cannot_be_traced_and_a_retied_one_can():
    model = make_mlp()
    path = fp.untie(model, "fa")
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    torch.fx.symbolic_trace(path.retie())


def test_a_copy_of_a_model_is_not_measured_by_its_path():
    import copy

    model = make_mlp()
    path = fp.untie(model, "fa")
    before = path.matrix_angles()
    double = copy.deepcopy(model)
    with torch.no_grad():
        double[0].feedback.copy_(double[0].weight)
    assert path.matrix_angles() == before


def test_a_plain_model_refuses_feedback_keys():
    model, plain = make_mlp(), make_mlp()
    path = fp.untie(model, "fa")
    with pytest.raises(RuntimeError, match="Unexpected key.*feedback"):
        plain.load_state_dict(model.state_dict())
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.load_state_dict(path.retie().state_dict())


# --- The command line ---------------------------------------------------------------------------------------


def test_no_measured_result_comes_from_a_gpu():
    for file in (TESTS.parent / "benchmarks").rglob("results.json"):
        assert '"device": "cuda' not in file.read_text(), file


def test_no_measured_result_comes_from_a_larger_network():
    known = {"mlp", "lenet", "transformer", "resnet8", "resnet18", "resnet20", "resnet56", "gpt", "lstm"}
    for file in (TESTS.parent / "benchmarks").rglob("results.json"):
        name, *sizes = json.loads(file.read_text())["model"].split("-")
        assert name in known, file
        assert not sizes or (name == "mlp" and max(map(int, sizes)) <= 512), file


def test_no_file_of_the_package_opens_a_connection():
    package = Path(fp.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {
                "urllib",
                "http",
                "requests",
                "ftplib",
            }, file


def test_the_bounds_of_data_are_those_that_are_stated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from feedbackpath.data import decode, files

    numbers = {v for module in (decode, files) for v in vars(module).values() if isinstance(v, int)}
    assert 256 * 2**20 in numbers
    assert 2**26 in numbers  # 67 million


def test_an_update_that_is_differentiated_is_not_backprops():
    def outer_gradient(rule):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
        if rule:
            for _, w, b in fp.untie(model, rule).pairs():
                b.data.copy_(w.data)
        slow = dict(model.named_parameters())
        loss = F.mse_loss(torch.func.functional_call(model, slow, (x,)), y)
        gradients = torch.autograd.grad(loss, list(slow.values()), create_graph=True)
        fast = {name: p - 0.5 * g for (name, p), g in zip(slow.items(), gradients, strict=True)}
        F.mse_loss(torch.func.functional_call(model, fast, (x,)), y).backward()
        return model[0].weight.grad

    assert (outer_gradient(None) - outer_gradient("kp")).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own use of it
def test_derivatives_come_in_reverse_mode_alone():
    model, x = make_mlp(), torch.randn(1, make_mlp()[0].in_features)

    def f(x):
        return model(x).square().sum()

    plain = torch.autograd.functional.hessian(f, x)
    for _, w, b in fp.untie(model, "kp").pairs():
        b.data.copy_(w.data)
    torch.testing.assert_close(torch.autograd.functional.hessian(f, x), plain)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f))(x), plain)
    with pytest.raises(NotImplementedError):
        torch.func.hessian(f)(x)
