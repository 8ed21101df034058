"""The cost model on paper is what PyTorch's counters find on real steps."""

import gc
import itertools
from functools import partial

import pytest
import torch
from cost_model import (
    GAUSSIAN,
    OPTIMIZER_BYTES,
    PAPER_SAMPLES,
    Calibration,
    LayerSize,
    Storage,
    added_bytes,
    added_flops,
    appendix_b_flops,
    calls,
    mirrored_share,
    moved_bytes,
    predict_ratio,
    reduced_bytes,
    step_flops,
    unshared_bytes,
)
from extrapolation import (
    add_every_rule,
    attention_flops,
    resnet50_on_32_devices,
    transformer_of_7_billion,
)
from layer_sizes import count_parameters, measure_layers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import feedbackpath as fp
from feedbackpath.bench.counts import count_collective_bytes
from feedbackpath.bench.measure import peak_bytes
from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload
from feedbackpath.mirror import Mirror


@pytest.fixture(autouse=True)
def _counting_changes_nothing(monkeypatch):
    """A mode that only counts would send the exact read-out the long way: it may be anything."""
    monkeypatch.setattr("feedbackpath.mirror.shortcut._is_watched", lambda: False)
    monkeypatch.setattr("feedbackpath.mirror.shortcut.is_plain", lambda *_: True)


MODELS = ["mlp", "lenet", "transformer", "resnet8"]
BATCH = 4
MIRRORS = {"wm": Mirror.exact(), GAUSSIAN: Mirror.paper()}
ALLOCATING = ("empty", "new_empty")  # names of operators that write nothing begin so


def count_flops(run):
    """Return the FLOPs of matrix products and convolutions in a call, as PyTorch's own counter has them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Movements(TorchDispatchMode):
    """Counts operators that read or write, and bytes as if nothing stayed in a cache.

    Views do neither, and operators that only allocate are left out.
    """

    def __init__(self):
        super().__init__()
        self.num_calls = self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if not (function.is_view or name.startswith(ALLOCATING) or function.namespace == "profiler"):
            given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
            written = {a.name for a in function._schema.arguments if a.is_write}
            read = {name: value for name, value in given.items() if not (name in kwargs and name in written)}
            self.num_calls += 1
            self.num_bytes += bytes_of(read)
            self.num_bytes += bytes_of([given[name] for name in written] if written else returned)
        return returned


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def count_movement(run):
    """Return the operators' calls and the bytes that they read and write."""
    with Movements() as seen:
        run()
    return seen.num_calls, seen.num_bytes


def test_movement_is_what_operators_read_and_write():
    x, y = torch.ones(10), torch.ones(10)
    assert count_movement(lambda: torch.add(x, y)) == (1, 120)
    assert count_movement(lambda: x.add_(y)) == (1, 120)
    assert count_movement(lambda: torch.add(x, y, out=x)) == (1, 120)
    assert count_movement(lambda: torch.empty(10).view(2, 5)) == (0, 0)


def make_step(model, rule, batch_size=BATCH):
    return TrainingStep(find_workload(model), rule, batch_size, Arithmetic())


@pytest.fixture(scope="module")
def layers():
    return {model: measure_layers(find_workload(model)) for model in MODELS}


@pytest.mark.parametrize("rule", [None, "fa", "kp"])
@pytest.mark.parametrize("model", MODELS)
def test_products_of_a_step_are_those_that_pytorch_counts(model, rule, layers):
    step = make_step(model, rule)
    assert count_flops(step) == step_flops(layers[model], BATCH)
    forward = sum(2 * layer.values * layer.uses * BATCH for layer in layers[model])
    assert count_flops(step.loss) == forward


@pytest.mark.parametrize(("model", "rule"), [*((model, "wm") for model in MODELS), ("mlp", GAUSSIAN)])
def test_products_of_a_mirror_are_those_that_pytorch_counts(model, rule, layers):
    step = make_step(model, fp.WeightMirror(MIRRORS[rule]))
    step()
    assert count_flops(step.path.step) == added_flops(rule, layers[model])


@pytest.mark.parametrize("rule", ["kp", "wm", "ia", "aa", "dfa", "dkp", "pfa", "pal", "dtp", "kh", "rdd"])
def test_flops_of_a_rule_are_those_that_pytorch_counts(rule):
    flops = {}
    for name in (None, rule):
        step = make_step("resnet8", name, batch_size=16)
        step()
        flops[name] = count_flops(step)
    assert flops[rule] / flops[None] == pytest.approx(fp.RULES[rule].facts.flops, abs=0.01)


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ("mlp", "kp"),
        ("resnet8", "wm-exact"),
        *(
            pytest.param(model, rule, marks=pytest.mark.slow)
            for model, rule in itertools.product(("mlp", "resnet8"), ("bp", "fa", "ss", "kp", "wm-exact"))
            if (model, rule) not in (("mlp", "kp"), ("resnet8", "wm-exact"))
        ),
    ],
)
def test_memory_is_what_a_step_takes_beyond_plain_pytorchs(model, rule, layers):
    def train(rule):
        step = make_step(model, rule)
        step()
        step()

    peaks = {}
    for name in (None, rule):
        gc.collect()
        peaks[name] = peak_bytes(partial(train, name), "cpu")
    beyond = peaks[rule] - peaks[None]
    assert beyond == pytest.approx(added_bytes(rule, layers[model], Storage()), rel=0.02, abs=64)


@pytest.mark.parametrize("rule", ["bp", "kp", "wm"])
def test_reduced_bytes_are_those_that_a_device_sends(rule, layers):
    num_parameters, storage = count_parameters(find_workload("resnet8")), Storage()
    step = make_step("resnet8", rule)
    assert count_collective_bytes(step)["allreduce_"] == reduced_bytes(num_parameters, storage)


def test_reducing_bs_product_for_itself_would_send_as_much_again(layers):
    step, storage = make_step("resnet8", "kp"), Storage()
    step.model._ddp_params_and_buffers_to_ignore = []
    shared = reduced_bytes(count_parameters(find_workload("resnet8")), storage)
    assert count_collective_bytes(step)["allreduce_"] == shared + unshared_bytes(
        "kp", layers["resnet8"], storage
    )


@pytest.mark.parametrize(
    ("name", "make"),
    [("sgd", partial(torch.optim.SGD, momentum=0.9, nesterov=True)), ("adamw", torch.optim.AdamW)],
)
def test_an_optimizer_moves_the_bytes_of_the_model(name, make):
    step = make_step("mlp", "kp")
    parameters = [p for p in step.model.parameters() if p.requires_grad]
    optimizer = make(parameters, lr=0.01, weight_decay=1e-4)
    step.loss().backward()
    optimizer.step()
    expected = OPTIMIZER_BYTES[name] * sum(p.numel() for p in parameters)
    assert count_movement(optimizer.step)[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_signs_move_the_bytes_of_the_model(model, layers):
    step = make_step(model, "ss")
    step()
    expected = (calls("ss", layers[model]), moved_bytes("ss", layers[model], "sgd"))
    assert count_movement(step.path.step) == expected


@pytest.mark.parametrize("model", [*MODELS, "mlpx2"])
def test_pairs_move_the_bytes_of_the_model(model):
    sizes = measure_layers(find_workload(model))
    step = make_step(model, fp.WeightMirror(MIRRORS["wm"]))
    step()
    step()
    num_calls, num_bytes = count_movement(step.path.step)
    assert num_bytes == pytest.approx(moved_bytes("wm", sizes, "sgd"), rel=0.02)
    assert num_calls == calls("wm", sizes)


def test_the_mirrors_share_is_that_of_the_schedule_that_was_measured():
    layers = [LayerSize(784, 512), LayerSize(512, 10)]  # 3% of 6 V N FLOPs, for passes of 4 V 2
    assert mirrored_share(layers, 8) == pytest.approx(0.18)
    assert mirrored_share(layers, 512) == 1.0


def test_the_appendix_counts_an_update_for_each_example_and_two_products_more_for_noise():
    layers = [LayerSize(5, 3, uses=7.0), LayerSize(3, 2)]
    by_hand = 10 * (7 * (3 + 4 * 15) + (2 + 4 * 6))
    assert appendix_b_flops("kp", layers, examples=10, samples=1) == by_hand
    assert appendix_b_flops("wm", layers, examples=1, samples=10) == 10 * (3 + 6 * 15 + 2 + 6 * 6)


def test_predictions_add_up_weights_and_values():
    rates = {"fa": (1.0, 0.0), "kp": (2.0, 0.5), "wm": (3.0, 0.0)}
    zero = dict.fromkeys(rates, (0.0, 0.0))
    layers = [LayerSize(2, 3), LayerSize(18, 4, kernel=9, is_conv=True)]
    assert predict_ratio("kp", layers, 8, 10.0, Calibration(zero, zero)) == 1.0
    assert predict_ratio("fa", layers, 8, 10.0, Calibration(rates, zero)) == pytest.approx(1.1)
    assert predict_ratio("kp", layers, 8, 10.0, Calibration(rates, rates)) == pytest.approx(1 + 43 / 10)
    share = mirrored_share(layers, 8)
    assert predict_ratio("wm", layers, 8, 10.0, Calibration(rates, zero)) == pytest.approx(1.1 + 0.2 * share)


def test_resnet_50_is_the_one_of_the_paper():
    training = resnet50_on_32_devices()
    assert training.num_parameters == 25_557_032
    assert training.examples / training.devices == 64
    added = add_every_rule(training)
    assert added["kp"].unshared_traffic == pytest.approx(1.0, abs=0.003)
    assert added["wm"].flops < 0.01 < added[GAUSSIAN].flops
    assert added["kp"].memory == 2 * added["fa"].memory
    assert all(rule.traffic == 0 for rule in added.values())


def test_the_transformer_has_7_billion_parameters():
    training = transformer_of_7_billion()
    assert training.num_parameters == 6_738_415_616
    added = add_every_rule(training)
    assert all(rule.seconds < 0.01 for rule in added.values())
    # Of AdamW's 16 bytes a parameter B takes 4 of its own, and 8 of moments if it learns as W does.
    assert added["fa"].memory < 4 / 16
    assert added["kp"].memory == pytest.approx(3 * added["fa"].memory)


def test_attention_takes_the_products_of_the_model():
    blocks, width, sequence = 1, 8, 6
    q, k, v = (torch.randn(sequence, width, requires_grad=True) for _ in range(3))

    def attend():
        ((q @ k.T).softmax(-1) @ v).sum().backward()

    causal = count_flops(attend) / 2
    assert causal == sequence * attention_flops(blocks, width, sequence)


def test_the_mirrors_settings_are_those_of_the_library():
    assert Mirror.paper().samples == PAPER_SAMPLES
