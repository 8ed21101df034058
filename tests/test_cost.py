"""What a rule costs, in calls of operators and not in seconds: the same on every machine."""

from collections import Counter

import pytest
from problems import PAPER_RULES, rule_that_starts_at_once
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from feedbackpath.bench.workloads import Arithmetic, TrainingStep, find_workload

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
RECORDS = ("_record_function_enter_new", "_record_function_exit")  # the optimizer's name for profilers
MODELS = ["mlp", "lenet", "transformer", "resnet8"]


class Calls(TorchDispatchMode):
    """Counts operators, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def count(self, names):
        return sum(self.counts[name] for name in names)


def count_calls(model, rule):
    """Return the calls of forward and backward passes, and of what follows, in a step after the first."""
    step = TrainingStep(find_workload(model), rule_that_starts_at_once(rule), 8, Arithmetic())
    step()
    step.optimizer.zero_grad()
    with Calls() as passes:
        step.loss().backward()
    with Calls() as after:
        step.optimizer.step()
        if step.path is not None:
            step.path.step()
    num_weights = 0 if step.path is None else len(step.path.weights)
    return passes, after, num_weights


@pytest.fixture(scope="module")
def plain():
    return {model: count_calls(model, None) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", PAPER_RULES)
def test_forward_and_backward_take_no_more_calls_than_backprop(rule, model, plain):
    expected, _, _ = plain[model]
    passes, _, num_weights = count_calls(model, rule)
    assert passes.count(PRODUCTS) == expected.count(PRODUCTS)
    # B's gradient shares the memory of W's: one call for that, one to hand it over, and no copy.
    learned = num_weights if rule in ("kp", "mirror-kp") else 0
    assert passes.counts["_lazy_clone"] == learned
    assert passes.counts.total() <= expected.counts.total() + 2 * learned


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", ["bp", "fa"])
def test_a_fixed_feedback_weight_costs_nothing_after_the_update(rule, model, plain):
    _, expected, _ = plain[model]
    _, after, _ = count_calls(model, rule)
    assert after.counts == expected.counts


@pytest.mark.parametrize("model", MODELS)
def test_signs_are_taken_by_one_call_a_weight(model, plain):
    _, expected, _ = plain[model]
    _, after, num_weights = count_calls(model, "ss")
    assert after.counts.total() <= expected.counts.total() + num_weights


@pytest.mark.parametrize("model", MODELS)
def test_learned_feedback_weights_take_the_optimizers_calls_and_no_others(model, plain):
    _, expected, _ = plain[model]
    _, after, num_weights = count_calls(model, "kp")
    parameters = sum(1 for _ in TrainingStep(find_workload(model), None, 8, Arithmetic()).model.parameters())
    calls_a_parameter = (expected.counts.total() - expected.count(RECORDS)) / parameters
    assert after.counts.total() == expected.counts.total() + num_weights * calls_a_parameter


@pytest.mark.parametrize("model", MODELS)
def test_delta_angles_take_two_passes_forward_two_back_and_no_weights_gradient(model):
    step = TrainingStep(find_workload(model), "fa", 8, Arithmetic())
    with FlopCounterMode(display=False) as forward:
        step.loss()
    with FlopCounterMode(display=False) as measuring:
        step.path.delta_angles(step.loss)
    assert measuring.get_total_flops() < 4 * forward.get_total_flops()
