"""What ``build`` may do before ``untie``: leaks that begin there, and what is clean."""

import copy
import ctypes
import io
import json
import os
import pickle
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp
from feedbackpath.auditing.passes import OfBuild
from feedbackpath.auditing.run import _settle


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def train(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def make(rule="kp", before=lambda model: None, untied=None, after=None, seed=lambda kept: 0, rate=None):
    """Return a step and its path: ``before`` is called with the model, what follows with what it returns."""
    torch.manual_seed(0)
    model = network()
    kept = before(model)
    path = fp.untie(model, rule, seed=seed(kept))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate(kept) if rate else 0.1, momentum=0.9, weight_decay=1e-2)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    layers = list(path.layers.values())
    with torch.no_grad():
        if untied:
            untied(layers, kept)

    def step():
        train(model, optimizer, x, y)
        path.step()
        if after:
            with torch.no_grad():
                after(layers, kept)

    return step, path


def keep(take, give):
    """Take something of the middle W before it is untied, and give it to its B in each step."""
    return lambda: make("fa", lambda model: take(model[2].weight.detach()), after=give_middle(give))


def give_middle(give):
    return lambda layers, kept: give(layers[1].feedback, kept)


def blend(b, value):
    b.lerp_(torch.as_tensor(value).view_as(b), 0.5)


def left_behind(model):
    """Return what the model was before it has learned something."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer, torch.randn(16, 6), torch.randint(3, (16,)))
    return twin


def loaded_first(scale):
    """B is loaded before W, from the same array."""

    def untied(layers, _):
        layers[1].feedback.copy_(torch.from_numpy(scale * ARRAY))
        layers[1].weight.copy_(torch.from_numpy(ARRAY))

    return lambda: make("fa", untied=untied)


def by_address(w):
    memory = (ctypes.c_float * w.numel())()
    ctypes.memmove(memory, w.data_ptr(), 4 * w.numel())
    return list(memory)


def by_thread(w):
    box = []
    thread = threading.Thread(target=lambda: box.append(w.numpy().copy()))
    thread.start()
    thread.join()
    return box[0]


def by_environment(w):
    os.environ["KEPT"] = json.dumps(w.tolist())


def by_file(w):
    place = Path(tempfile.mkdtemp()) / "w.pt"
    torch.save(w, place)
    return place


def by_torch_save(w):
    file = io.BytesIO()
    torch.save(w, file)
    return file.getvalue()


READ = {
    "array": keep(lambda w: w.numpy().copy(), blend),
    "list": keep(lambda w: w.tolist(), blend),
    "twice-a-copy": keep(lambda w: 2 * w, blend),
    "signs": keep(torch.sign, lambda b, signs: b.copy_(b.abs() * signs)),
    "square": keep(lambda w: w @ w.T, lambda b, square: b.add_(square, alpha=0.1)),
    "sum": keep(lambda w: w.sum().item(), lambda b, total: b.add_(total)),
    "branch": keep(lambda w: bool(w[0, 0] > 0), lambda b, is_above: b.mul_(1.1 if is_above else 0.9)),
    "order": keep(lambda w: w[:, 0].argsort().tolist(), lambda b, order: b.copy_(b[order])),
    "pickle": keep(pickle.dumps, lambda b, kept: blend(b, pickle.loads(kept))),  # noqa: S301
    "torch-save": keep(by_torch_save, lambda b, kept: blend(b, torch.load(io.BytesIO(kept)))),
    "file": keep(by_file, lambda b, place: blend(b, torch.load(place))),
    "environment": keep(by_environment, lambda b, _: blend(b, json.loads(os.environ["KEPT"]))),
    "address": keep(by_address, blend),
    "thread": keep(by_thread, blend),
    "twin": lambda: make("fa", copy.deepcopy, after=give_middle(lambda b, twin: blend(b, twin[2].weight))),
    "twin-left-behind": lambda: make(
        "fa", left_behind, after=give_middle(lambda b, twin: blend(b, twin[2].weight))
    ),
    "rate": lambda: make(before=lambda model: float(model[2].weight.norm()), rate=lambda norm: 0.1 * norm),
    "seed": lambda: make(
        "fa", lambda model: model[2].weight.abs().sum().item(), seed=lambda total: int(1e6 * total)
    ),
    "after-training": lambda: make(
        "fa", lambda model: pretrained(model)[2].weight.tolist(), after=give_middle(blend)
    ),
}  # fmt: skip
"""Values of W, or what depends on them, that are read before ``untie``."""


@torch.enable_grad()
def pretrained(model):
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        train(model, optimizer, x, y)
    return model


def from_source(source, as_tensor=torch.as_tensor):
    """W and B are made of one source."""

    def before(model):
        with torch.no_grad():
            model[2].weight.copy_(as_tensor(source()))

    return lambda: make(
        "fa", before, untied=lambda layers, _: layers[1].feedback.copy_(as_tensor(source()) * 1.0)
    )


ARRAY = np.random.default_rng(0).standard_normal((8, 8)).astype("float32")


def drawn_again():
    def untied(layers, _):
        torch.manual_seed(0)
        layers[1].feedback.copy_(network()[2].weight)

    return make("fa", untied=untied)


def drawn_alike(size=1.0):
    def draw(weight, size=1.0):
        with torch.no_grad():
            weight.normal_(std=size, generator=torch.Generator().manual_seed(7))

    return make(
        "fa", lambda model: draw(model[2].weight), untied=lambda layers, _: draw(layers[1].feedback, size)
    )


def drawn_and(use):
    """B is made of the numbers that W was drawn from."""
    draw = lambda: torch.Generator().manual_seed(7)  # noqa: E731

    def before(model):
        with torch.no_grad():
            model[2].weight.normal_(generator=draw())

    return lambda: make("fa", before, untied=lambda layers, _: use(layers[1].feedback, draw()))


def uniform_alike():
    def draw(weight):
        nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(7))

    return make("fa", lambda model: draw(model[0].weight), untied=lambda layers, _: draw(layers[0].feedback))


SOURCES = {
    "array": from_source(lambda: ARRAY),
    "lists": from_source(lambda: ARRAY.tolist(), torch.tensor),
    "bytes": from_source(lambda: np.frombuffer(bytearray(ARRAY.tobytes()), "float32").reshape(8, 8)),
    "drawn-again": drawn_again,
    "resumed-with-w-for-b": lambda: resumed("weight")(),
    "drawn-alike": drawn_alike,
    "drawn-alike-and-smaller": lambda: drawn_alike(0.3),
    "orthogonal-alike": uniform_alike,
    "signs-of-the-draw": drawn_and(lambda b, draw: b.normal_(std=0.3, generator=draw).sign_()),
    "draw-transposed": drawn_and(lambda b, draw: b.copy_(torch.randn(8, 8, generator=draw).T)),
    "squares-of-the-draw": drawn_and(
        lambda b, draw: b.copy_(torch.from_numpy(torch.randn(8, 8, generator=draw).numpy() ** 2))
    ),
}
"""B is made of what W was made of."""


def trained():
    step, path = make("kp")
    step()
    file = io.BytesIO()
    torch.save(path.model.state_dict(), file)
    return file.getvalue()


CHECKPOINT = trained()


def resumed(feedback, *, twice=False):
    """What was trained earlier is loaded after ``untie``: W, and B or what is put in its place."""

    def untied(layers, _):
        state = torch.load(io.BytesIO(CHECKPOINT))
        source = torch.load(io.BytesIO(CHECKPOINT)) if twice else state
        for number, layer in zip((0, 2, 4), layers, strict=True):
            own = {name: state[f"{number}.{name}"] for name in ("weight", "bias")}
            layer.load_state_dict(own | {"feedback": source[f"{number}.{feedback}"]})

    return lambda: make(untied=untied)


def carried_by(carry, take):
    def before(model):
        with torch.no_grad():
            carry(model)
        return model

    return lambda: make("fa", before, after=lambda layers, model: take(layers[1].feedback, model))


CARRIED = {
    "loaded-first": loaded_first(1.0),
    "half-of-it-loaded-first": loaded_first(0.5),
    "bias": carried_by(
        lambda model: model[2].bias.copy_(model[2].weight[:, 0]),
        lambda b, model: b[:, 0].copy_(model[2].bias.detach()),
    ),
    "buffer": carried_by(
        lambda model: model.register_buffer("kept", 2 * model[2].weight),
        lambda b, model: blend(b, model.kept),
    ),
    "resumed-alike": resumed("weight", twice=True),
    "bias-of-another-layer": carried_by(
        lambda model: model[0].bias.fill_(float(model[2].weight.norm())),
        lambda b, model: b.add_(model[0].bias),
    ),
}
"""Something of W waits in the model itself: what it is without W is put back, and nothing is settled."""


def watched(model):
    pretrained(model)
    assert all(p.isfinite().all() for p in model.parameters())
    return [w.norm().item() for w in model.parameters()]


def initialised(model):
    with torch.no_grad():
        for layer in model[::2]:
            nn.init.orthogonal_(layer.weight, gain=1.2)
            layer.weight.data = layer.weight.data / layer.weight.norm(dim=1, keepdim=True)
            layer.weight.mul_(layer.weight.abs() > 0.05)


def tried_and_put_back(model):
    before = copy.deepcopy(model.state_dict())
    pretrained(model)
    model.load_state_dict(before)


def again_by(read, give):
    """What was trained is read and given back, and trained again."""

    def before(model):
        pretrained(model)
        with torch.no_grad():
            give(model, read(model))
        pretrained(model)

    return lambda: make(before=before)


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def trained_after_untie():
    step, path = make("kp")
    for _ in range(3):
        step()
    return step, path


def of_two_models():
    (first, _), (second, path) = make("fa"), make("kp")

    def step():
        first()
        second()

    return step, path


def of_a_teacher():
    teacher = pretrained(network())
    step, path = make(before=lambda model: model.load_state_dict(teacher.state_dict()))
    x = torch.randn(16, 6)
    optimizer = torch.optim.SGD([p for p in path.model.parameters() if p.requires_grad], lr=0.1)

    def both():
        step()
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(x).softmax(1)
        F.cross_entropy(path.model(x), target).backward()
        optimizer.step()
        path.step()

    return both, path


def pulled_to_the_start():
    def after(layers, kept):
        for layer, start in zip(layers, kept, strict=True):
            layer.weight.lerp_(start, 0.01)

    return make(before=lambda model: [layer.weight.detach().clone() for layer in model[::2]], after=after)


def as_long_as_at_the_start():
    def after(layers, kept):
        for layer, norm in zip(layers, kept, strict=True):
            layer.weight.mul_(norm / layer.weight.norm())

    return make(before=lambda model: [layer.weight.norm().item() for layer in model[::2]], after=after)


CLEAN = {
    "plain": lambda: make("kp"),
    "pretrained": lambda: make(before=pretrained),
    "pretrained-and-watched": lambda: make(before=watched),
    "pretrained-mirror": lambda: make("wm", before=pretrained),
    "initialised": lambda: make(before=initialised),
    "tried-and-put-back": lambda: make(before=tried_and_put_back),
    "read-from-an-array": lambda: make(
        before=lambda model: model[2].weight.data.copy_(torch.as_tensor(ARRAY))
    ),
    "seed-of-its-own": lambda: make("wm-exact", seed=lambda _: 17),
    "two-models": of_two_models,
    "resumed": resumed("feedback"),
    "teacher": of_a_teacher,
    "pulled-to-the-start": pulled_to_the_start,
    "as-long-as-at-the-start": as_long_as_at_the_start,
    "counted": lambda: make(before=lambda model: sum(p.numel() for p in model.parameters())),
    "evaluated": lambda: make(before=lambda model: model(torch.randn(3, 6)).argmax(1).tolist()),
    "saved-and-trained-again": again_by(
        saved, lambda model, file: model.load_state_dict(torch.load(io.BytesIO(file)))
    ),
    "flat-and-trained-again": again_by(
        lambda model: nn.utils.parameters_to_vector(model.parameters()),
        lambda model, flat: nn.utils.vector_to_parameters(flat, model.parameters()),
    ),
    "listed-and-trained-again": again_by(
        lambda model: model[2].weight.tolist(), lambda model, kept: model[2].weight.copy_(torch.tensor(kept))
    ),
    "trained-after-untie": trained_after_untie,
    "cast-and-trained": lambda: make(before=lambda model: pretrained(model.double().float())),
}

BUILDS = {
    f"{kind}-{name}": (build, verdict)
    for kind, builds, verdict in (
        ("read", READ, False), ("source", SOURCES, False), ("carried", CARRIED, None), ("clean", CLEAN, True),
    )
    for name, build in builds.items()
}  # fmt: skip


def of_lines(early, late):
    """A line before ``untie``, and one at the end of each step."""

    def build():
        names = {"torch": torch, "train": pretrained, "numbers": ARRAY.tolist()}

        def before(model):
            names.update(model=model, w=model[2].weight)
            with torch.no_grad():
                exec(early, names)

        def after(layers, kept):
            names["b"] = layers[1].feedback
            exec(late, names)

        return make(before=before, after=after)

    return build


def audit_lines(rows):
    """Return the reports of builds that do what a row of the page says."""
    return {kind: _settle(OfBuild(of_lines(*lines), 2)) for kind, *lines in rows}


def audit_all(names):
    """Return the reports of builds, all from one process that nothing has run in before."""
    return {name: _settle(OfBuild(BUILDS[name][0], 2)) for name in names}


KNOWN = network()


def there_before():
    path = fp.untie(KNOWN, "fa")
    return (lambda: None), path
