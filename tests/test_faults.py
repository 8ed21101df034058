"""Faults that were found once, each with siblings: copies under DDP, failures half way, subclasses."""

import copy
import pickle
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import ddp_worker
import pytest
import torch
from problems import MLP, make_encoder, make_mlp
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import difference

import feedbackpath as fp
from feedbackpath.core import pytorch
from feedbackpath.core.batchnorm import sigma_type
from feedbackpath.core.modules import FeedbackModule, untied_type
from feedbackpath.rules import resolve_rule

IGNORED = "_ddp_params_and_buffers_to_ignore"

# --- Models that were copied or loaded, on two processes ---------------------------------------------------


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("replaced")
    torch.multiprocessing.spawn(ddp_worker.run_replaced, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


WAYS = [*ddp_worker.REPLACED, "root", "root, deepcopied", "without callbacks"]


@pytest.mark.parametrize("way", WAYS)
def test_what_became_of_a_model_learns_on_two_processes(way, replaced):
    first, second = (found[way] for found in replaced)
    assert len(first["pairs"]) == ddp_worker.STEPS
    for ours, theirs in zip(first["pairs"], second["pairs"], strict=True):
        assert ours
        for (w, b), (other_w, other_b) in zip(ours, theirs, strict=True):
            assert w.any()
            assert torch.equal(w, b), "B's gradient is not W's"
            assert torch.equal(w, other_w)
            assert torch.equal(b, other_b)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), f"processes part at {name}"


@pytest.mark.parametrize("way", WAYS)
def test_no_feedback_weight_is_sent_whatever_became_of_the_model(way, replaced):
    for found in replaced:
        assert found[way]["sent"] == found[way]["plain"]


ROOTS = {
    "linear": (lambda: nn.Linear(6, 3), {"feedback"}),
    "convolution": (lambda: nn.Conv1d(2, 3, 3), {"feedback"}),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"feedback", "out_proj.feedback"}),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=7),
        {"q_feedback", "k_feedback", "v_feedback", "out_proj.feedback"},
    ),
    "recurrent": (lambda: nn.LSTM(6, 3), {"weight_ih_l0_feedback", "weight_hh_l0_feedback"}),
}


@pytest.mark.parametrize("case", ROOTS)
def test_feedback_of_a_root_layer_is_left_out_of_what_is_sent(case, tmp_path):
    make, names = ROOTS[case]
    model = make()
    path = fp.untie(model, "kp")
    assert names <= {name.removeprefix(".") for name in getattr(model, IGNORED)}
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        sent = {id(p) for p in parallel._module_parameters}
    finally:
        torch.distributed.destroy_process_group()
    feedbacks = {id(b) for _, _, b in path.pairs()}
    assert len(feedbacks) == len(names)
    assert sent == {id(p) for p in model.parameters()} - feedbacks
    path.retie()
    assert not hasattr(model, IGNORED)


def test_what_a_user_left_out_of_the_traffic_stays_left_out():
    model = make_mlp()
    setattr(model, IGNORED, ["0.bias"])
    path = fp.untie(model, "kp")
    assert {"0.bias", "0.feedback", "2.feedback", "4.feedback"} <= set(getattr(model, IGNORED))
    path.retie()
    assert getattr(model, IGNORED) == ["0.bias"]


# --- Untying that fails half way ---------------------------------------------------------------------------


class Final(type(nn.Module)):
    """A metaclass whose classes cannot be derived from."""

    def __new__(mcs, name, bases, body, **settings):
        if any(isinstance(base, Final) for base in bases):
            raise TypeError(f"{bases[-1].__name__} is final")
        return super().__new__(mcs, name, bases, body, **settings)


class FinalLinear(nn.Linear, metaclass=Final):
    """A layer of such a class."""


class SealedLinear(nn.Linear):
    """A layer that refuses subclasses in the other way."""

    def __init_subclass__(cls, **settings):
        raise TypeError("SealedLinear is sealed")


class SlottedLinear(nn.Linear):
    """A layer with a slot, so that its memory is laid out otherwise."""

    __slots__ = ("extra",)


class FixedLinear(nn.Linear):
    """A layer whose class stays what it is."""

    def __setattr__(self, name, value):
        if name == "__class__":
            raise TypeError("the class of FixedLinear is fixed")
        super().__setattr__(name, value)


class StubbornLinear(nn.Linear):
    """A layer that takes no parameters beside its own."""

    def register_parameter(self, name, value):
        if name not in ("weight", "bias"):
            raise RuntimeError(f"no parameter {name} here")
        super().register_parameter(name, value)


@dataclass(frozen=True)
class Failing(fp.Rule):
    """A rule that fails where it is told to, in the layer called ``last``."""

    name: ClassVar[str] = "failing"
    where: str = "start"

    def _fail_at(self, where):
        if where == self.where:
            raise ZeroDivisionError(where)

    def start(self, weights, context):
        super().start(weights, context)
        self._fail_at("start")

    def attach(self, weights, context):
        self._fail_at("attach")

    def detach(self, weights, context):
        self._fail_at("detach")

    def serves(self, weights):
        self._fail_at("serves")
        return True


class FailingPart:
    """A part of a path that cannot be made."""

    def __init__(self, context):
        raise ZeroDivisionError("part")


class WithFailingPart(fp.KolenPollack):
    """A rule that has hooked on to weights by then."""

    def attach(self, weights, context):
        super().attach(weights, context)
        context.part(FailingPart)


def with_last(layer):
    return lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), layer(6, 6))


HALF_WAY = {
    "final": (with_last(FinalLinear), "fa", {}, TypeError),
    "sealed": (with_last(SealedLinear), "kp", {}, TypeError),
    "fixed": (with_last(FixedLinear), "fa", {}, TypeError),
    "stubborn": (with_last(StubbornLinear), "fa", {}, RuntimeError),
    "start": (with_last(nn.Linear), Failing("start"), {}, ZeroDivisionError),
    "start of the second": (
        with_last(nn.Linear), "kp", {"overrides": {"3": Failing("start")}}, ZeroDivisionError
    ),
    "attach": (with_last(nn.Linear), Failing("attach"), {}, ZeroDivisionError),
    "attach of the second": (
        with_last(nn.Linear), "kp", {"overrides": {"3": Failing("attach")}}, ZeroDivisionError
    ),
    "serves": (with_last(nn.Linear), Failing("serves"), {}, ZeroDivisionError),
    "part": (with_last(nn.Linear), WithFailingPart(), {}, ZeroDivisionError),
    "no norm": (with_last(nn.Linear), "kp", {"batchnorm_feedback": "sigma"}, fp.UntieError),
    "two rules of one weight": (
        lambda: tied(with_last(nn.Linear)(), 2, 3), "kp", {"overrides": {"3": "fa"}}, fp.UntieError
    ),
}  # fmt: skip


def tied(model, one, other):
    model[one] = nn.Linear(6, 6)
    model[0] = nn.Linear(6, 6)
    model[other].weight = model[one].weight
    return model


def describe(model):
    """Return all of a model that untying changes: types, attributes, keys, parameters, hooks on these."""
    modules = {
        name: (type(module), sorted(vars(module)), list(module._parameters), list(module._forward_hooks))
        for name, module in model.named_modules()
    }
    hooks = {
        name: len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) + len(p._backward_hooks or ())
        for name, p in model.named_parameters()
    }
    values = [
        (name, id(p), p.requires_grad, p.detach().clone().tolist()) for name, p in model.named_parameters()
    ]
    return modules, hooks, values, list(model.state_dict())


@pytest.mark.parametrize("case", HALF_WAY)
def test_untying_that_fails_half_way_leaves_the_model_as_it_was(case):
    make, rule, settings, error = HALF_WAY[case]
    torch.manual_seed(1)
    model = make()
    before = describe(model)
    for _ in range(2):  # what fails twice fails alike
        with pytest.raises(error) as raised:
            fp.untie(model, rule, **settings)
        assert raised.type is error
        assert describe(model) == before
    x = torch.randn(4, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(copy.deepcopy(model)(x).square().sum(), x)
    if "layer" in str(error) or isinstance(
        model[3], (FinalLinear, SealedLinear, FixedLinear, StubbornLinear)
    ):
        model[3] = nn.Linear(6, 6)  # what stood in the way
        (expected,) = torch.autograd.grad(copy.deepcopy(model)(x).square().sum(), x)
    path = fp.untie(model, "kp")
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    assert difference(found, expected) > 0.3
    model(x).square().sum().backward()
    assert all(torch.equal(w.grad, b.grad) for _, w, b in path.pairs())


def test_a_layer_with_slots_is_untied_or_refused_whole():
    model = with_last(SlottedLinear)()
    model[3].extra = 7
    before = describe(model)
    try:
        path = fp.untie(model, "fa")
    except (TypeError, fp.UntieError):
        assert describe(model) == before
    else:
        assert isinstance(model[3], SlottedLinear)
        assert model[3].extra == 7
        path.retie()
        assert describe(model) == before
    assert type(model[3]) is SlottedLinear


def test_a_rule_that_fails_in_detach_too_hides_nothing():
    """The first fault is the one to see."""

    class Twice(Failing):
        def attach(self, weights, context):
            raise ZeroDivisionError("attach")

        def detach(self, weights, context):
            raise KeyError("detach")

    model = make_mlp()
    with pytest.raises((ZeroDivisionError, KeyError)) as raised:
        fp.untie(model, Twice())
    faults = [raised.value]
    while faults[-1].__context__ is not None:
        faults.append(faults[-1].__context__)
    assert any(isinstance(fault, ZeroDivisionError) for fault in faults)
    assert type(model[0]) is nn.Linear
    assert not any("feedback" in name for name in model.state_dict())


# --- Subclasses --------------------------------------------------------------------------------------------


class Named(nn.Linear):
    """A subclass that computes what its base does."""


class Doubling(nn.Linear):
    """A subclass with a forward pass of its own, and a state of its own."""

    def __init__(self, *sizes, times=2.0):
        super().__init__(*sizes)
        self.times = times

    def forward(self, x):
        return self.times * super().forward(x)


class Model(nn.Module):
    """A model with a forward pass of its own."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Named(6, 6), Doubling(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


SUBCLASSED = {
    "named": lambda: nn.Sequential(Named(6, 6), nn.ReLU(), Named(6, 3)),
    "own forward": lambda: nn.Sequential(Doubling(6, 6), nn.ReLU(), Doubling(6, 3, times=3.0)),
    "own model": Model,
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Flatten(), Named(8, 3)
    ),
    "norm": lambda: nn.Sequential(Named(6, 6), nn.BatchNorm1d(6), nn.ReLU(), Named(6, 3)),
    "root": lambda: Doubling(6, 3),
}


def run_once(model, x):
    model.zero_grad()
    given = x.clone().requires_grad_()
    model(given).square().sum().backward()
    return [given.grad, *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("case", SUBCLASSED)
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_subclassed_layers_pickle_and_copy(case, rule, tmp_path):
    torch.manual_seed(1)
    model, x = SUBCLASSED[case](), torch.randn(4, 6)
    plain = run_once(copy.deepcopy(model), x)
    fp.untie(model, rule)
    expected = run_once(model, x)
    assert difference(expected[0], plain[0]) > 0.2
    torch.save(model, tmp_path / "model.pt")
    doubles = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "save": torch.load(tmp_path / "model.pt", weights_only=False),
    }
    for way, double in doubles.items():
        types = [type(module) for module in double.modules()]
        assert types == [type(module) for module in model.modules()], way
        assert {id(p) for p in double.parameters()}.isdisjoint(id(p) for p in model.parameters())
        found = run_once(double, x)
        assert len(found) == len(expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), way
        again = copy.deepcopy(double)
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(run_once(again, x), expected, strict=True)
        )


def test_one_class_is_made_of_each_subclass():
    first, second = (nn.Sequential(Named(6, 6), Doubling(6, 3)) for _ in range(2))
    for model in (first, second):
        fp.untie(model, "fa")
    for number, plain in enumerate((Named, Doubling)):
        kind = type(first[number])
        assert kind is type(second[number]) is type(copy.deepcopy(first)[number]) is untied_type(plain, True)
        assert issubclass(kind, plain)
        assert kind.__name__ == f"Feedback{plain.__name__}"
        assert kind.plain_type is plain
    same_name = type("Named", (nn.Linear,), {})
    assert untied_type(same_name, True) is not untied_type(Named, True)


def test_attention_and_its_subclasses_pickle_and_copy(tmp_path):
    model = make_encoder().eval()
    fp.untie(model, "fa")
    x = torch.randn(2, 5, 8)
    expected = run_once(model, x)
    torch.save(model, tmp_path / "model.pt")
    for double in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        found = run_once(double, x)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_path_is_copied_with_its_model():
    path = fp.untie(SUBCLASSED["named"](), "kp")
    double = copy.deepcopy(path)
    before = [b.detach().clone() for _, _, b in path.pairs()]
    optimizer = torch.optim.SGD(double.model.parameters(), lr=0.1, weight_decay=0.1)
    double.model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    double.step()
    assert (double.context.steps, path.context.steps) == (1, 0)
    assert double.context.model is double.model
    assert all(torch.equal(b, old) for (_, _, b), old in zip(path.pairs(), before, strict=True))
    assert all(not torch.equal(b, old) for (_, _, b), old in zip(double.pairs(), before, strict=True))
    double.retie()
    assert isinstance(path.model[0], FeedbackModule)


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_a_part_of_an_untied_model_goes_back_through_feedback(rule):
    """A slice of a Sequential is made by the class of the whole."""
    torch.manual_seed(1)
    model = make_mlp().double()
    path = fp.untie(model, rule)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    parts = {
        "slices": lambda x: model[2:](model[:2](x)),
        "layers in a new one": lambda x: nn.Sequential(*model)(x),
        "sum": lambda x: (model[:2] + model[2:])(x),
        "popped": lambda x: popped(model)(x),
    }
    for way, run in parts.items():
        assert torch.equal(torch.autograd.grad(run(x).square().sum(), x)[0], expected), way
    path.retie()


def popped(model):
    """Return the layers of a model, each taken out of a copy of it."""
    double = copy.deepcopy(model)
    return nn.Sequential(*[double.pop(0) for _ in range(len(double))])


def test_a_new_one_of_an_untied_models_class_is_plain():
    """``type(model)(...)``, as people write who make a second network like the first."""
    model = Model()
    path = fp.untie(model, "fa")
    fresh = type(model)()
    layer = type(model.body)(6, 6)
    x = torch.randn(2, 6, requires_grad=True)
    fresh.load_state_dict({name: v for name, v in model.state_dict().items() if "feedback" not in name})
    assert torch.equal(fresh(x), model(x))
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], layer.weight.sum(0).expand(2, 6))
    copy.deepcopy(fresh)
    path.retie()


# --- BatchNorm that sends back sigma alone -----------------------------------------------------------------


class NamedNorm(nn.BatchNorm1d):
    """A subclass that computes what its base does, with a setting of its own."""

    def __init__(self, *sizes, label="mine"):
        super().__init__(*sizes)
        self.label = label


class ClippedNorm(nn.BatchNorm1d):
    """A subclass with a forward pass of its own."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class NamedNorm2d(nn.BatchNorm2d):
    """A subclass of another base."""


def sigma_net(norm):
    return nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU(), nn.Linear(6, 3))


def test_a_batchnorm_subclass_sends_back_sigma_alone():
    torch.manual_seed(1)
    plain, ours = (sigma_net(kind(6)).double() for kind in (nn.BatchNorm1d, NamedNorm))
    ours.load_state_dict(plain.state_dict())
    paths = [fp.untie(model, "bp", batchnorm_feedback="sigma") for model in (plain, ours)]
    x = torch.randn(8, 6, dtype=torch.float64)
    found, expected = run_once(ours, x), run_once(plain, x)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert isinstance(ours[1], NamedNorm)
    assert ours[1].label == "mine"
    paths[1].retie()
    assert type(ours[1]) is NamedNorm
    assert difference(run_once(ours, x)[0], found[0]) > 0.01


def test_a_batchnorm_with_a_forward_pass_of_its_own_is_refused_by_name():
    for norm in (ClippedNorm(6), nn.SyncBatchNorm(6)):
        model = nn.Sequential(sigma_net(nn.BatchNorm1d(6)), norm)
        before = describe(model)
        with pytest.raises(
            fp.UntieError, match=rf"'1' \({type(norm).__name__}\) .* leave batchnorm_feedback at"
        ):
            fp.untie(model, "kp", batchnorm_feedback="sigma")
        assert describe(model) == before
        fp.untie(model, "kp").retie()


def test_sigma_batchnorms_pickle_and_copy(tmp_path):
    for norm, x in ((NamedNorm(6, label="yours"), torch.randn(8, 6)), (nn.BatchNorm1d(6), torch.randn(8, 6))):
        model = sigma_net(norm)
        fp.untie(model, "fa", batchnorm_feedback="sigma")
        expected = run_once(model, x)
        torch.save(model, tmp_path / "model.pt")
        for double in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert type(double[1]) is type(model[1]) is sigma_type(norm.plain_type)
            assert vars(double[1]).get("label") == vars(norm).get("label")
            found = run_once(double, x)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert sigma_type(NamedNorm) is sigma_type(NamedNorm)
    assert sigma_type(NamedNorm2d) is not sigma_type(nn.BatchNorm2d)
    assert sigma_type(ClippedNorm) is None


# --- A weight that is updated where its B has seen nothing --------------------------------------------------


class Tied(nn.Module):
    """An embedding, and a head with its weight that does not always run."""

    def __init__(self, *, is_linear=False):
        super().__init__()
        self.embedding = nn.Linear(5, 6, bias=False) if is_linear else nn.Embedding(6, 5)
        self.inner, self.head = nn.Linear(6 if is_linear else 5, 5), nn.Linear(5, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x, *, with_head=True):
        hidden = self.inner(self.embedding(x))
        return self.head(hidden) if with_head else hidden


def take_steps(model, path, optimizer, heads, x):
    for with_head in heads:
        optimizer.zero_grad()
        model(x, with_head=with_head).square().sum().backward()
        optimizer.step()
        path.step()


HEADS = {"not in step 1": (False, True, True), "never": (False, False), "from step 1 on": (True, False, True)}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:the weights of 'head' are shared")
def test_a_tied_head_that_does_not_run_is_no_optimizer_made_too_early(heads, make):
    model = Tied()
    path = fp.untie(model, "kp")
    optimizer = make(model.parameters(), lr=0.1, weight_decay=0.1)
    take_steps(model, path, optimizer, HEADS[heads], torch.arange(4))


@pytest.mark.filterwarnings("ignore:the weights of 'head' are shared")
def test_a_gradient_that_was_thrown_away_is_no_optimizer_made_too_early():
    """B got a gradient once, which no update followed; the one that came belongs to the embedding alone."""
    model = Tied()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.arange(4)).square().sum().backward()  # to look at its size, say
    take_steps(model, path, optimizer, (False, True), torch.arange(4))


@pytest.mark.filterwarnings("ignore:the weights of 'head' are shared")
def test_measuring_angles_before_the_first_step_is_no_optimizer_made_too_early():
    model = Tied()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    path.delta_angles(lambda: model(torch.arange(4)).square().sum())
    take_steps(model, path, optimizer, (False, True), torch.arange(4))


def test_a_layer_that_is_skipped_in_step_1_is_no_optimizer_made_too_early():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x, *, with_head=True):
            return self.head(self.inner(x)) if with_head else self.inner(x)

    model = Skipping()
    path = fp.untie(model, "kp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    take_steps(model, path, optimizer, (False, True, False), torch.randn(4, 5))


@pytest.mark.filterwarnings("ignore:the weights of 'head' are shared")
def test_an_optimizer_made_too_early_is_still_found_when_the_head_runs_at_last():
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    path = fp.untie(model, "kp", overrides={"inner": "fa"})
    with pytest.raises(fp.RuleError, match="make it after untie"):
        take_steps(model, path, optimizer, (False, True, True), torch.arange(4))


# --- Rules without a hash ----------------------------------------------------------------------------------


@dataclass
class Unfrozen(fp.Rule):
    """A dataclass that can be compared and changed."""

    name: ClassVar[str] = "unfrozen"
    size: float = 1.0


@dataclass(frozen=True)
class WithList(fp.Rule):
    """A setting without a hash."""

    name: ClassVar[str] = "with-list"
    sizes: list = field(default_factory=list)


class Compared(fp.Rule):
    """A class that says when two are equal, and so has no hash."""

    name = "compared"

    def __eq__(self, other):
        return isinstance(other, Compared)


@pytest.mark.parametrize("rule", [Unfrozen(), WithList([1, 2]), Compared()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("as_override", [False, True])
def test_a_rule_without_a_hash_is_refused_in_one_line(rule, as_override):
    model = make_mlp()
    message = rf"the rule {type(rule).__name__} has no hash, .*: make it a frozen dataclass"
    given, overrides = ("fa", {"0": rule}) if as_override else (rule, None)
    with pytest.raises(fp.RuleError, match=message) as raised:
        fp.untie(model, given, overrides=overrides)
    assert "\n" not in str(raised.value)
    assert type(model[0]) is nn.Linear
    with pytest.raises(fp.RuleError, match="has no hash"):
        resolve_rule(rule)


# --- One gradient for two parameters -----------------------------------------------------------------------


def refuse_to_clone(tensor):
    raise RuntimeError("this allocator's memory cannot be shared")


@pytest.mark.parametrize("clone", [None, refuse_to_clone])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_without_lazy_clones_the_two_gradients_are_two(clone, compiled, monkeypatch):
    monkeypatch.setattr(pytorch, "_lazy_clone", clone)
    model = MLP.build()
    path = fp.untie(model, "kp")
    (torch.compile(model, backend="eager") if compiled else model)(MLP.inputs()[0]).square().sum().backward()
    for _, weight, feedback in path.pairs():
        assert weight.grad is not feedback.grad
        assert weight.grad.data_ptr() != feedback.grad.data_ptr()
        assert torch.equal(weight.grad, feedback.grad)
        kept = weight.grad.clone()
        feedback.grad.zero_()
        assert torch.equal(weight.grad, kept)
    torch._dynamo.reset()


def test_second_derivatives_without_lazy_clones_are_those_with_them(monkeypatch):
    def penalised():
        torch.manual_seed(1)
        model = make_mlp().double()
        path = fp.untie(model, "kp")
        x = MLP.inputs()[0]
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [(w.grad, b.grad) for _, w, b in path.pairs()]

    expected = penalised()
    monkeypatch.setattr(pytorch, "_lazy_clone", None)
    for (w, b), (expected_w, expected_b) in zip(penalised(), expected, strict=True):
        assert w is not b
        assert torch.equal(w, expected_w)
        assert torch.equal(b, expected_b)
        assert torch.equal(w, b)


# --- Others that were found on the way ----------------------------------------------------------------------


def test_the_audit_can_be_called_whatever_was_imported_before():
    """``feedbackpath.audit`` is a function, and a package of that name holds it."""
    import importlib

    importlib.import_module("feedbackpath.auditing.report")
    assert callable(fp.audit)
    assert callable(importlib.import_module("feedbackpath").audit)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_delta_angles_of_a_model_that_checkpoints_inside(rule, reentrant):
    class Checkpointed(nn.Module):
        way = None

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.middle = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())

        def forward(self, x):
            h = self.first(x).relu()
            h = self.middle(h) if self.way is None else checkpoint(self.middle, h, use_reentrant=self.way)
            return self.last(h)

    torch.manual_seed(1)
    model = Checkpointed().double()
    path = fp.untie(model, rule)
    x = torch.randn(5, 6, dtype=torch.float64)
    loss = lambda: model(x).square().sum()  # noqa: E731
    expected = path.delta_angles(loss)
    model.way = reentrant
    if reentrant:  # torch's own: no gradient taken by hand passes through it
        with pytest.raises((fp.UntieError, RuntimeError)):
            path.delta_angles(loss)
    else:
        assert path.delta_angles(loss) == pytest.approx(expected, abs=1e-9)


class Direct(fp.Rule):
    """Direct feedback alignment."""

    name = "direct"
    send_back = fp.Broadcast()


@pytest.mark.parametrize("reentrant", [False, True])
def test_broadcasting_into_a_checkpointed_part_trains_all_layers_or_is_refused(reentrant):
    class Checkpointed(nn.Module):
        is_checkpointed = False

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)
            self.middle = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())

        def forward(self, x):
            h = self.first(x).tanh()
            h = (
                checkpoint(self.middle, h, use_reentrant=reentrant)
                if self.is_checkpointed
                else self.middle(h)
            )
            return self.last(h)

    torch.manual_seed(1)
    model = Checkpointed()
    fp.untie(model, Direct())
    x = torch.randn(5, 6)
    expected = run_once(model, x)
    model.is_checkpointed = True
    try:
        found = run_once(model, x)
    except (fp.RuleError, fp.UntieError):
        assert reentrant
    else:
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", ["kp", "mirror-kp"])
def test_warnings_name_the_line_that_called_untie(rule):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp.untie(nn.ModuleList([nn.Bilinear(4, 4, 4), nn.Linear(4, 4)]), "wm", activations={"*": torch.relu})
        tied = Tied()
        tied.embedding.sparse = True  # B could not take over such a gradient
        fp.untie(tied, rule, activations={"*": torch.relu})
    found = [(one.category, one.filename) for one in caught]
    assert found == [(fp.UnconvertedLayerWarning, __file__), (fp.KolenPollackWarning, __file__)]


@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_sharded_weights_are_refused(rule, tmp_path):
    """FSDP gives each process a part of W and of B: angles, mirrors and steps of one part would be wrong."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        path = fp.untie(model, rule)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(torch.randn(4, 6)).square().sum().backward()
        for use in (path.step, path.matrix_angles, path.gains, path.mirror, lambda: list(path.pairs())):
            with pytest.raises(fp.UntieError, match="'0' is sharded .* use DistributedDataParallel"):
                use()
        with pytest.raises(fp.UntieError, match="sharded"):
            fp.untie(fully_shard(nn.Sequential(nn.Linear(6, 8)), mesh=init_device_mesh("cpu", (1,))), rule)
    finally:
        torch.distributed.destroy_process_group()
