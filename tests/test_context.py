"""What a rule may know of its path, and the parts that rules share."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.mirror import MirrorMode


class Part:
    """Counts in steps of its own."""

    def __init__(self, context):
        self.context, self.count, self.is_closed = context, 0, False

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def close(self):
        self.is_closed = True


def test_a_part_is_made_once_when_it_is_asked_for():
    context = fp.RuleContext(nn.Linear(2, 2))
    assert context.state_dict()["parts"] == {}
    assert context.part(Part) is context.part(Part)
    assert context.part(Part).context is context


def test_the_state_of_a_part_waits_until_it_is_made():
    model = nn.Linear(2, 2)
    first, second = fp.RuleContext(model, seed=3), fp.RuleContext(model)
    first.steps, first.part(Part).count = 5, 7
    second.load_state_dict(first.state_dict())
    assert (second.seed, second.steps) == (3, 5)
    assert second.state_dict() == first.state_dict()  # it is kept, made or not
    assert second.part(Part).count == 7


def test_a_part_that_is_younger_than_the_state_is_let_go():
    model = nn.Linear(2, 2)
    path = fp.untie(model, "fa")
    state = path.state_dict()
    path.mirror(settings=fp.Mirror(noise="gaussian", samples=8))
    path.load_state_dict(state)
    assert path.context.part(MirrorMode).passes == {}
    context = fp.RuleContext(model)
    state, part = context.state_dict(), context.part(Part)
    context.load_state_dict(state)
    assert part.is_closed
    assert context.part(Part) is not part


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_a_copy_belongs_to_no_model_and_keeps_the_state(copied):
    model = nn.Linear(2, 2)
    context = fp.RuleContext(model)
    context.part(Part).count = 7
    twin = copied(context)
    assert twin.part(Part).count == 7
    with pytest.raises(RuntimeError, match="model of this feedback path no longer exists"):
        _ = twin.model
    assert twin.attach(model).model is model


def test_a_context_does_not_keep_the_model_alive():
    model = nn.Linear(2, 2)
    context = fp.RuleContext(model)
    assert context.model is model
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        _ = context.model


def test_random_numbers_follow_from_seed_purpose_step_and_weight():
    path = fp.untie(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "fa")
    context, (one, other) = path.context, path.weights

    def draw(weight, purpose):
        return torch.rand(3, generator=context.generator(weight, purpose)).tolist()

    first = draw(one, "noise")
    assert draw(one, "noise") == first
    assert first not in (draw(other, "noise"), draw(one, "signs"))
    context.steps += 1
    assert draw(one, "noise") != first
