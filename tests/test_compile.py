"""Under ``torch.compile`` the backward pass still goes through B, in one graph."""

import copy

import pytest
import torch
from problems import CONVNET, ENCODER, MLP, PAPER_RULES, by_id

import feedbackpath as fp

# Dynamo makes an instance of each autograd function that it traces, and torch itself deprecates that.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()


def run_backward(problem, model, runner):
    """Return the gradients of the input and of every parameter, as ``backward`` leaves them."""
    (x,) = problem.inputs(torch.float32)
    weighting = torch.randn(runner(x).shape, generator=torch.Generator().manual_seed(4))
    (runner(x) * weighting).sum().backward()
    return x.grad, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_compiled(problem, rule, backend):
    plain = problem.build(torch.float32)
    eager = copy.deepcopy(plain)
    fp.untie(eager, rule)
    model = copy.deepcopy(plain)
    path = fp.untie(model, rule)
    ours = run_backward(problem, model, torch.compile(model, fullgraph=True, backend=backend))
    torch.testing.assert_close(ours, run_backward(problem, eager, eager), rtol=1e-4, atol=1e-5)
    backprops, _ = run_backward(problem, plain, plain)
    difference = (ours[0] - backprops).norm() / backprops.norm()
    assert difference < 1e-4 if rule == "bp" else difference > 0.3
    learned = [(w.grad, b.grad) for _, w, b in path.pairs() if w is not b and b.grad is not None]
    assert bool(learned) == (rule in ("kp", "mirror-kp"))
    for of_weight, of_feedback in learned:
        assert torch.equal(of_weight, of_feedback)
        assert of_weight.data_ptr() != of_feedback.data_ptr()


@pytest.mark.parametrize("problem", [MLP, CONVNET], ids=by_id)
@pytest.mark.parametrize("rule", PAPER_RULES)
def test_compiled_gradients_are_the_eager_ones_and_not_backprops(rule, problem):
    check_compiled(problem, rule, "aot_eager")


def test_compiled_attention_goes_back_through_feedback():
    check_compiled(ENCODER, "kp", "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("problem", [MLP, CONVNET, ENCODER], ids=by_id)
@pytest.mark.parametrize("rule", ["bp", "fa", "kp"])
def test_inductors_gradients_are_the_eager_ones_and_not_backprops(rule, problem):
    check_compiled(problem, rule, "inductor")
