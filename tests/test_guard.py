"""What becomes of a model after ``untie`` is noticed by the next step and by every measurement."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import feedbackpath as fp


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6))


def take_step(model, path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    path.step()


USES = {
    "step": lambda path: path.step(),
    "matrix_angles": lambda path: path.matrix_angles(),
    "gains": lambda path: path.gains(),
    "delta_angles": lambda path: path.delta_angles(lambda: path.model(torch.randn(4, 6)).sum()),
    "update_angles": lambda path: path.update_angles(lambda: path.model(torch.randn(4, 6)).sum()),
    "pairs": lambda path: list(path.pairs()),
    "mirror": lambda path: path.mirror(steps=1),
    "plan": lambda path: path.plan(lambda: path.model(torch.randn(4, 6)).sum()),
    "clip_grad_norm_": lambda path: path.clip_grad_norm_(1.0),
    "check_optimizer": lambda path: path.check_optimizer(torch.optim.SGD(path.model.parameters(), lr=0.1)),
}


class KeepsCopy(nn.Module):
    """Runs a copy of a layer that learns, as PEFT's ``modules_to_save`` does."""

    def __init__(self, layer):
        super().__init__()
        self.original, self.saved = layer, copy.deepcopy(layer).requires_grad_(True)

    def forward(self, x):
        return self.saved(x)


def put(model, place, module):
    model[place] = module


def set_weight(model, weight):
    model[2].weight, model[2].bias = nn.Parameter(weight), None


def untied_elsewhere():
    other = nn.Linear(6, 6)
    untied_elsewhere.path = fp.untie(other, "fa")
    return other


def give_memory(model, part):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["0.feedback"] = state[part]
    model.load_state_dict(state, assign=True)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


CHANGES = {
    "pruned": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), "'weight' of '0' is no parameter"),
    "B pruned": (lambda m: prune.random_unstructured(m[0], "feedback", 0.5), "'feedback' of '0' is no param"),
    "weight_norm": (lambda m: parametrizations.weight_norm(m[2]), "'weight' of '2' is no parameter any more"),
    "orthogonal": (lambda m: parametrizations.orthogonal(m[0]), "'weight' of '0' is no parameter any more"),
    "spectral_norm": (lambda m: nn.utils.spectral_norm(m[0]), "'weight' of '0' is no parameter any more"),
    "a new head": (lambda m: put(m, 2, nn.Linear(6, 6)), "'2' is no longer in the model"),
    "a layer taken out": (lambda m: put(m, 0, nn.Identity()), "'0' is no longer in the model"),
    "a layer deleted": (lambda m: m.__delitem__(2), "'2' is no longer in the model"),
    "resized": (lambda m: set_weight(m, torch.randn(4, 6)), r"had shape \[6, 6\]; now W has \[4, 6\] and B"),
    "resized by .data": (lambda m: setattr(m[0].weight, "data", torch.randn(5, 6)), r"now W has \[5, 6\]"),
    "B resized": (lambda m: setattr(m[0].feedback, "data", torch.randn(5, 6)), r"and B \[5, 6\]"),
    "copied": (lambda m: put(m, 2, KeepsCopy(m[2])), "'2.saved' is a copy of an untied layer"),
    "a copy in its place": (lambda m: put(m, 2, copy.deepcopy(m[2])), "'2' is a copy of an untied layer"),
    "of another path": (lambda m: m.append(untied_elsewhere()), "'4' is a copy .* or of another path"),
    "B is W": (lambda m: setattr(m[0], "feedback", m[0].weight), "'0' lies in the memory of another weight"),
    "B in W's memory": (lambda m: setattr(m[0].feedback, "data", m[2].weight.data), "'0' lies in the memory"),
    "assigned one memory": (lambda m: give_memory(m, "0.weight"), "'0' lies in the memory"),
    "one B for two": (lambda m: setattr(m[2], "feedback", m[0].feedback), "'2' lies in the memory"),
    "B taken away": (lambda m: setattr(m[0], "feedback", None), "feedback weight of '0' was taken away"),
    "B deleted": (lambda m: delattr(m[0], "feedback"), "'feedback' of '0' is no parameter"),
    "of another class": (
        lambda m: setattr(m[2], "__class__", Doubled),
        "class of '2' was changed to Doubled",
    ),
    "shared later": (
        lambda m: setattr(m[2], "weight", m[0].weight),
        "other weights are shared now than before",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rule", ["fa", "kp", "wm"])
def test_a_change_is_noticed_by_the_next_step_whatever_the_rule(change, rule):
    make, message = CHANGES[change]
    model = make_net()
    path = fp.untie(model, rule)
    take_step(model, path)
    make(model)
    with pytest.raises(fp.UntieError, match=message) as raised:
        path.step()
    assert "\n" not in str(raised.value)
    with pytest.raises(fp.UntieError, match=message):  # not only once
        path.step()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", ["pruned", "a new head", "copied"])
def test_a_change_is_noticed_by_everything_that_a_path_can_be_asked(change, use):
    make, message = CHANGES[change]
    path = fp.untie(make_net(), "wm")
    make(path.model)
    with pytest.raises(fp.UntieError, match=message):
        USES[use](path)


def test_shared_weights_that_are_loaded_apart_are_noticed():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    path = fp.untie(model, "kp")
    path.matrix_angles()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(fp.UntieError, match=r"load_state_dict\(assign=True\)"):
        path.matrix_angles()


def test_a_resized_embedding_with_a_tied_head_says_so_when_it_runs_and_when_it_is_measured():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    model = Tied()
    path = fp.untie(model, "fa")
    model.embedding = nn.Embedding(12, 8)
    model.head.weight = model.embedding.weight
    with pytest.raises(fp.UntieError, match=r"'head': W is \[12, 8\] of torch.float32 on cpu, B \[10, 8\]"):
        model(torch.arange(12))
    with pytest.raises(fp.UntieError, match="'head' had shape"):
        path.gains()


STAYS = {
    "nothing": lambda m: None,
    "loaded": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "weights assigned": lambda m: m.load_state_dict(make_net().state_dict(), assign=True),
    "precision and back": lambda m: m.double().float(),
    "another of the same shape": lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(6, 6))),
    "wrapped": lambda m: put(m, 2, nn.Sequential(m[2])),
    "hooked": lambda m: m[0].register_forward_hook(lambda module, x, y: y + 1),
    "more without weights": lambda m: m.append(nn.Tanh()),
}


@pytest.mark.parametrize("change", STAYS)
@pytest.mark.parametrize("rule", ["fa", "kp"])
def test_what_leaves_every_weight_in_its_place_is_let_be(change, rule):
    model = make_net()
    path = fp.untie(model, rule)
    STAYS[change](model)
    take_step(model, path)
    assert path.matrix_angles().keys() == {"0", "2"}
    path.retie()
    assert not any("feedback" in name for name in model.state_dict())


@pytest.mark.parametrize("use", ["step", "matrix_angles", "gains", "pairs"])
def test_a_new_layer_is_named_at_once_and_once(use):
    path = fp.untie(make_net(), "fa")
    for _ in range(3):
        path.step()
    path.model.append(nn.Linear(6, 3))
    with pytest.warns(fp.UnconvertedLayerWarning, match="'4' came into the model after it was untied"):
        USES[use](path)
    USES[use](path)


@pytest.mark.parametrize("use", ["step", "matrix_angles", "pairs"])
def test_a_forward_that_is_replaced_later_is_named_once(use):
    path = fp.untie(make_net(), "fa")
    layer = path.model[2]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    with pytest.warns(fp.UnconvertedLayerWarning, match="the forward of '2' was replaced on the object"):
        USES[use](path)
    USES[use](path)


@pytest.mark.parametrize(
    "lost", [lambda layer: setattr(layer, "feedback", None), lambda layer: delattr(layer, "feedback")]
)
@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LSTM(6, 6)], ids=["linear", "lstm"])
def test_a_lost_b_is_named_by_the_next_step_and_no_error_of_pythons(lost, layer):
    model = nn.Sequential(copy.deepcopy(layer))
    path = fp.untie(model, "kp")
    name = path.weights[0].feedback_name
    lost(model[0]) if name == "feedback" else setattr(model[0], name, None)
    output = model(torch.randn(4, 6))
    (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
    with pytest.raises(fp.UntieError, match="taken away|no parameter any more"):
        path.step()


@pytest.mark.parametrize("part", ["weight", "feedback"])
@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.Conv1d(4, 6, 1)], ids=["linear", "conv"])
def test_w_and_b_of_two_precisions_are_refused_in_a_line(part, layer):
    model = copy.deepcopy(layer)
    fp.untie(model, "fa")
    tensor = getattr(model, part)
    tensor.data = tensor.data.double()
    with pytest.raises(fp.UntieError, match="W is .* of torch.float.*, B .* of torch.float"):
        model(torch.randn(4, 4, 6) if isinstance(layer, nn.Conv1d) else torch.randn(4, 6))


def test_a_matrix_that_an_untied_module_gets_later_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return x @ self.w

    model = nn.Sequential(Own())
    path = fp.untie(model, "fa")
    model[0].v = nn.Parameter(torch.randn(6, 6))
    with pytest.warns(fp.UnconvertedLayerWarning, match="'0' came into the model"):
        path.step()


def test_retie_gives_back_what_runs_or_says_what_is_in_the_way():
    for change, (make, _) in CHANGES.items():
        model = make_net()
        path = fp.untie(model, "kp")
        make(model)
        if change == "of another class":
            with pytest.raises(fp.UntieError, match="changed to Doubled"):
                path.retie()
            continue
        if change in ("weight_norm", "orthogonal"):
            with pytest.raises(fp.UntieError, match="changed to Parametrized.*remove_parametrizations"):
                path.retie()
            nn.utils.parametrize.remove_parametrizations(model[0 if change == "orthogonal" else 2], "weight")
        path.retie()
        if change not in ("resized", "resized by .data", "B pruned"):
            model(torch.randn(4, 6)).sum().backward()
        if change in ("copied", "a copy in its place", "a new head", "weight_norm"):
            assert not any("feedback" in name for name in model.state_dict()), change
            fp.untie(model, "kp").retie()


# --- Averages of weights that were begun before ``untie`` ---------------------------------------------------


def by_torch(average, model):
    average.update_parameters(model)


def by_hand(average, model):
    with torch.no_grad():
        for mean, new in zip(average.module.parameters(), model.parameters(), strict=False):
            mean.lerp_(new, 0.5)


def the_other_way_round(average, model):
    for new, mean in zip(model.parameters(), average.module.parameters(), strict=False):
        mean.data.lerp_(new.data, 0.5)


@pytest.mark.parametrize(
    "update", [by_torch, by_hand, the_other_way_round], ids=lambda update: update.__name__
)
@pytest.mark.parametrize("use", ["step", "matrix_angles", "gains"])
def test_an_average_that_was_begun_before_is_noticed(update, use):
    """All weights have one shape, so that PyTorch averages W with B without a word."""
    model = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)])
    average = AveragedModel(model)
    path = fp.untie(model, "kp")
    update(average, model)
    with pytest.warns(
        fp.UnconvertedLayerWarning, match=r"average of weights \(EMA, AveragedModel\) made before"
    ):
        USES[use](path)
    USES[use](path)


def test_an_average_that_was_begun_after_and_other_looks_at_parameters_are_let_be():
    model = make_net()
    path = fp.untie(model, "kp")
    average = AveragedModel(model)
    for _ in range(2):
        average.update_parameters(model)
        next(model.parameters())
        assert all(p.requires_grad for p in model.parameters())
        assert any(p.dim() > 1 for p in model.parameters())
        path.matrix_angles()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and "running" not in name:
            assert torch.equal(average.module.state_dict()[name], value)


def test_states_that_are_gone_through_side_by_side_pair_forward_weights():
    """As timm's ``ModelEmaV2`` does with an average that was begun before."""
    model, plain = make_net(), make_net()
    fp.untie(model, "kp")
    names = list(plain.state_dict())
    assert list(model.state_dict()) == [*names, "0.feedback", "2.feedback"]
    assert list(nn.Sequential(model).state_dict())[: len(names)] == [f"0.{name}" for name in names]
    assert isinstance(model.state_dict()._metadata, dict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plain_weights_of_another_precision_take_feedback_weights_along(dtype):
    model = make_net()
    path = fp.untie(model, "kp")
    model.load_state_dict(make_net().to(dtype).state_dict(), assign=True)
    model(torch.randn(4, 6, dtype=dtype)).square().sum().backward()
    assert all(w.grad.dtype == b.dtype == b.grad.dtype == dtype for _, w, b in path.pairs())
