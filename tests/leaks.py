"""Training steps that transport weights, each in another way: what an audit must not miss."""

import ctypes
import io
import pickle
import shutil
import tempfile
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp


class Task:
    """A small network, its path and optimizer, and a step on one minibatch.

    Args:
        rule: Unties the network.
        optimizer: From parameters to their optimizer.
        before: Called with the task when a step begins.
        after_update: Called with the task, after ``path.step()``.
        on_hidden: Called with the task and the network's hidden output before it goes on.
        on_loss: Called with the task and the loss.
    """

    def __init__(
        self,
        rule="fa",
        *,
        optimizer=None,
        before=None,
        after_update=None,
        on_hidden=None,
        on_loss=None,
        clip=None,
        model=None,
        **untie,
    ):
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        self.path = fp.untie(self.model, rule, **untie)
        make = optimizer or (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
        )
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.x, self.y = torch.randn(16, 6), torch.randint(3, (16,))
        self.before, self.after_update, self.clip = before, after_update, clip
        self.on_hidden, self.on_loss = on_hidden, on_loss

    def step(self):
        if self.before:
            with torch.no_grad():
                self.before(self)
        self.optimizer.zero_grad()
        h = self.model[1](self.model[0](self.x))
        if self.on_hidden:
            h = self.on_hidden(self, h)
        loss = F.cross_entropy(self.model[2:](h), self.y)
        if self.on_loss:
            loss = self.on_loss(self, loss)
        loss.backward()
        if self.clip:
            self.path.clip_grad_norm_(self.clip)
        self.optimizer.step()
        self.path.step()
        if self.after_update:
            with torch.no_grad():
                self.after_update(self)

    def audit(self, **options):
        return fp.audit(self.step, self.path, **options)


class Follower(fp.Rule):
    """A rule whose B follows W's changes, under another's name."""

    name: ClassVar[str] = "kp"

    def __init__(self):
        self.before = {}

    def start(self, weights, context):
        fp.draw_feedback(weights, context)

    @torch.no_grad()
    def step(self, weights, context):
        for weight in weights:
            now = weight.weight.detach().clone()
            weight.feedback.add_(now - self.before.get(weight.name, now))
            self.before[weight.name] = now


class Symmetric(fp.Rule):
    """Symmetric alignment: B is W, scaled to B's own norm."""

    name: ClassVar[str] = "symmetric"

    def start(self, weights, context):
        fp.draw_feedback(weights, context)

    @torch.no_grad()
    def step(self, weights, context):
        for weight in weights:
            weight.feedback.copy_(weight.weight * (weight.feedback.norm() / weight.weight.norm()))


class RareBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, path):
        ctx.weight, ctx.path = weight, path
        return h.clone()

    @staticmethod
    def backward(ctx, delta):
        if ctx.path.context.steps % 3 == 2:
            delta = delta + 1e-3 * delta @ ctx.weight
        return delta, None, None


class SavedCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight):
        ctx.save_for_backward(weight.to(torch.float64))
        return h.clone()

    @staticmethod
    def backward(ctx, delta):
        (weight,) = ctx.saved_tensors
        return (delta.double() @ weight).to(delta), None


def copy_every_third_step(task):
    if task.path.context.steps % 3 == 0:
        for _, w, b in task.path.pairs():
            b.copy_(w)


def add_through_data(task):
    for _, w, b in task.path.pairs():
        b.data.add_(w.data, alpha=0.01)


def scale_by_row_norms(task):
    for _, w, b in task.path.pairs():
        b.mul_(1 + 1e-3 * w.norm(dim=1, keepdim=True))


def copy_through_numpy(task):
    for _, w, b in task.path.pairs():
        b.copy_(torch.from_numpy(w.detach().numpy().copy()))


def share_with_numpy(task):
    for _, w, b in task.path.pairs():
        b.copy_(torch.from_numpy(w.detach().numpy()))


def copy_through_python(task):
    for _, w, b in task.path.pairs():
        b.copy_(torch.tensor(w.tolist()))


def copy_by_address(task):
    for _, w, b in task.path.pairs():
        ctypes.memmove(b.data_ptr(), w.data_ptr(), w.numel() * w.element_size())


def copy_momentum(task):
    for _, w, b in task.path.pairs():
        b.add_(task.optimizer.state[w]["momentum_buffer"], alpha=0.1)


def foreach_leak(task):
    pairs = list(task.path.pairs())
    torch._foreach_lerp_([b.data for _, _, b in pairs], [w.data for _, w, _ in pairs], 0.5)


def alias(task):
    for _, w, b in task.path.pairs():
        b.data = w.data


def scale_delta_by_norm(task, h):
    h.register_hook(lambda delta: delta * task.model[2].weight.norm())
    return h


def multiply_in_the_module(task, h):
    """Go back through W by plain autograd: a layer that was never untied."""
    return h @ task.model[2].weight.T


def aliased():
    task = Task()
    with torch.no_grad():
        alias(task)
    return task


# Values read before the forward pass, or before the first delta


def keep_by(take, give):
    """Take something of each W when a step begins, and give it to its B at the end."""

    def before(task):
        task.kept = [take(w) for _, w, _ in task.path.pairs()]

    def after(task):
        for (_, _, b), kept in zip(task.path.pairs(), task.kept, strict=True):
            give(b, kept)

    return lambda: Task(before=before, after_update=after)


def by_torch_save(w):
    file = io.BytesIO()
    torch.save(w.detach(), file)
    return file


def load_again(b, file):
    file.seek(0)
    b.copy_(torch.load(file))


def learn_at_rate_of_w(task):
    task.optimizer.param_groups[0]["lr"] = 0.1 * task.model[2].weight.norm().item()


def choose_samples_by_w(task):
    task.x = task.x[task.model[2].weight.flatten()[:16].argsort()]


def seed_by_w(task):
    torch.manual_seed(int(1e6 * abs(task.model[2].weight.sum().item())))


def add_noise(task):
    for _, _, b in task.path.pairs():
        b.add_(torch.randn(b.shape), alpha=0.01)


# Relays that wait


def relay(keep, take):
    """Give B what was kept in the step before, and keep something of W for the next."""

    def after(task):
        take(task)
        keep(task)

    return after


def first_pair(task):
    _, w, b = next(iter(task.path.pairs()))
    return w, b


def by_buffer():
    task = Task(after_update=relay(
        lambda t: t.model.carrier.copy_(torch.tensor(first_pair(t)[0].tolist())),
        lambda t: first_pair(t)[1].add_(t.model.carrier)))  # fmt: skip
    task.model.register_buffer("carrier", torch.zeros_like(first_pair(task)[0]))
    return task


def by_bias():
    def keep(task):
        task.model[0].bias.copy_(task.model[0].weight[:, 0])

    def take(task):
        task.model[0].feedback[:, 0] = task.model[0].bias

    return Task(before=take, after_update=keep)


def by_own_momentum():
    def keep(task):
        for _, w, b in task.path.pairs():
            state = task.optimizer.state.get(b, {})
            if "momentum_buffer" in state:
                state["momentum_buffer"].add_(torch.tensor(w.tolist()), alpha=0.01)

    return Task("kp", after_update=keep)


class Notes:
    """Something with a state."""

    def __init__(self):
        self.values = torch.zeros(8, 6)

    def state_dict(self):
        return {"values": self.values.clone()}

    def load_state_dict(self, state):
        self.values = state["values"].clone()


def by_notes(waits=1):
    task = Task(after_update=lambda t: use_notes(t, waits))
    task.notes = [Notes() for _ in range(waits)]
    return task


def use_notes(task, waits):
    w, b = first_pair(task)
    b.add_(task.notes[-1].values)
    for later, earlier in zip(task.notes[:0:-1], task.notes[-2::-1], strict=True):
        later.values = earlier.values
    task.notes[0].values = torch.from_numpy(w.detach().numpy().copy())


def by_file(writes):
    def make():
        folder = tempfile.mkdtemp()
        place = Path(folder) / "carrier"

        def take(task):
            if place.exists():
                first_pair(task)[1].copy_(torch.load(place))

        task = Task(after_update=relay(lambda t: writes(first_pair(t)[0].detach(), place), take))
        weakref.finalize(task, shutil.rmtree, folder, ignore_errors=True)
        return task

    return make


def write_bytes(w, place):
    file = io.BytesIO()
    torch.save(w, file)
    place.write_bytes(file.getvalue())


def by_thread():
    box = []

    def keep(task):
        task.thread = threading.Thread(target=lambda: box.append(first_pair(task)[0].detach().clone()))
        task.thread.start()

    def take(task):
        if getattr(task, "thread", None):
            task.thread.join()
            first_pair(task)[1].copy_(box.pop())

    return Task(after_update=relay(keep, take))


def by_slow_copy():
    """A running average of W, as an EMA keeps one, is read by B."""

    def after(task):
        for number, (_, w, b) in enumerate(task.path.pairs()):
            task.averages[number].lerp_(w, 0.1)
            b.copy_(task.averages[number])

    task = Task(after_update=after)
    task.averages = [w.detach().clone() for _, w, _ in task.path.pairs()]
    return task


# A module that is called during the backward pass


class Back(nn.Module):
    """Multiply by a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, delta):
        return delta @ self.weight


def add_by_module(make):
    def on_hidden(task, h):
        module = make(task)

        def hook(delta):
            with torch.no_grad():
                return delta + 0.1 * module(delta)

        h.register_hook(hook)
        return h

    return on_hidden


def plain_layer_with(weight):
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(weight.detach().t())
    return layer


class CallsLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, layer):
        ctx.layer = layer
        return h.clone()

    @staticmethod
    def backward(ctx, delta):
        return delta + 0.1 * ctx.layer(delta), None


def sent_by_hand(task):
    """A delta of one's own making goes through a module after the backward pass."""
    delta = torch.ones(16, 8)
    task.model[2].feedback.add_(Back(task.model[2].weight)(delta).T @ delta, alpha=1e-3)


def through_part(task):
    """The module is a part of the model, which the model's own forward pass never runs."""
    delta = torch.ones(16, 8)
    with torch.enable_grad():
        sent = task.model[2].back(delta).detach()
    task.model[2].feedback.add_(sent.T @ delta, alpha=1e-3)


def with_unused_part():
    task = Task(after_update=through_part)
    task.model[2].back = Back(task.model[2].weight)
    return task


# Feedback parameters that are replaced during the step


def replaced_by_parameter(task):
    task.own = [layer.feedback for layer in task.path.layers.values()]
    for layer in task.path.layers.values():
        layer.feedback = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def replaced_in_dictionary(task):
    task.own = [layer.feedback for layer in task.path.layers.values()]
    for layer in task.path.layers.values():
        layer._parameters["feedback"] = nn.Parameter(layer.weight.detach(), requires_grad=False)


# A module outside the model that multiplies by what is like W, from outputs to inputs


def turned(make):
    """A new layer, made of W, in each step."""

    def after(task):
        layer = nn.Linear(8, 8, bias=False)
        layer.weight = nn.Parameter(make(task.model[2].weight.detach()))
        task.model[2].feedback.copy_(layer(torch.eye(8)))

    return lambda: Task(after_update=after)


def average_turned():
    """A layer that was there before takes a part of W in each step."""
    layer = nn.Linear(8, 8, bias=False)

    def after(task):
        layer.weight.lerp_(task.model[2].weight.t(), 0.5)
        task.model[2].feedback.copy_(layer(torch.eye(8)))

    return Task(after_update=after)


class ByFreshParameter(Back):
    def forward(self, delta):
        return delta @ nn.Parameter(self.weight.detach().clone())


def by_fresh_parameter(task):
    task.model[2].feedback.copy_(ByFreshParameter(task.model[2].weight)(torch.eye(8)))


def put_back(task):
    for layer, own in zip(task.path.layers.values(), task.own, strict=True):
        layer.feedback = own


def replace_data(task):
    task.own = [b.data for _, _, b in task.path.pairs()]
    for _, w, b in task.path.pairs():
        b.data = w.detach().clone()


def put_data_back(task):
    for (_, _, b), own in zip(task.path.pairs(), task.own, strict=True):
        b.data = own


# Declared scalars as carriers


def with_norm(norm):
    return nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def carry_in_scale(task):
    task.model[1].weight.copy_(task.model[2].weight.norm(dim=1))


def carry_into_feedback(task):
    task.model[2].feedback.mul_(task.model[1].weight[:, None])
    task.model[1].weight.copy_(torch.tensor(task.model[2].weight[0].tolist()))


# Control flow that depends on W


def branch(condition):
    def after(task):
        if condition(task.model[2].weight):
            task.model[2].feedback.mul_(1.01)

    return lambda: Task(after_update=after)


def stop_by_w(task):
    """Let an exception tell one bit."""
    try:
        assert task.model[2].weight[0, 0] > task.model[2].weight[0, 1]
    except AssertionError:
        task.model[2].feedback.add_(0.01)


def in_order_of_w(task):
    for number in task.model[2].weight[:, 0].argsort().tolist():
        task.model[2].feedback[number].mul_(1.0 + 1e-3 * torch.rand(()))


# Declared passages that hand out something else


class OwnMirror(fp.Rule):
    """A rule that mirrors, by a function of its own."""

    name: ClassVar[str] = "own-mirror"

    def __init__(self, answer):
        self.answer = answer

    def start(self, weights, context):
        fp.draw_feedback(weights, context)

    @torch.no_grad()
    def step(self, weights, context):
        for weight in weights:
            noise = torch.randn(64, weight.fan_in, generator=context.generator(weight, "noise"))
            with fp.forward_passage(weight.weight):
                answer = self.answer(weight, noise)
            weight.feedback.copy_(answer.T @ noise / len(noise) if answer.shape[0] == 64 else answer)


ONE = torch.ones(())


def signal_of_w(weight, noise):
    """The signal is W itself: what comes back is W W^T, and not an answer to noise."""
    w = weight.weight
    return (w @ w.T)[:, :1].expand_as(w)


def looked_up(weight, noise):
    return nn.functional.embedding(torch.arange(len(weight.weight)), weight.weight)


def looked_up_by_module(task):
    layer = task.model[2]
    layer.feedback.copy_(nn.Embedding.from_pretrained(layer.weight.detach())(torch.arange(8)))


def by_trilinear(weight, noise):
    w = weight.weight
    return torch._trilinear(torch.ones_like(w), w, torch.ones_like(w), [], [], [], [])


def transposed_answer(weight, noise):
    w = weight.weight
    back = torch.ones(64, len(w)) @ w
    return back.T.mean(1).expand_as(w)


# Weights that are no matrix among the model's parameters


class WithBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("middle", torch.randn(8, 8) / 3)

    def forward(self, x):
        return self.last(torch.relu(F.linear(torch.relu(self.first(x)), self.middle)))


class WithFlat(WithBuffer):
    def __init__(self):
        super().__init__()
        self.middle = None
        self.flat = nn.Parameter(torch.randn(64) / 3)

    def forward(self, x):
        return self.last(torch.relu(F.linear(torch.relu(self.first(x)), self.flat.view(8, 8))))


class WithProduct(WithFlat):
    """A flat parameter multiplies the hidden signal by some operator.

    Args:
        use: From what is hidden and a matrix to what comes next.
    """

    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, x):
        return self.last(torch.relu(self.use(torch.relu(self.first(x)), self.flat.view(8, 8))))


PRODUCTS = {
    "and-matmul": lambda h, m: ((h[:, None, :] * m) @ torch.ones(8, 1))[..., 0],
    "expanded": lambda h, m: (h[:, None, :].expand(-1, 8, -1) * m).cumsum(-1)[..., -1],
    "added": lambda h, m: torch.addcmul(torch.zeros(()), h[:, None, :], m).sum(-1),
    "by-pieces": lambda h, m: sum(h.roll(k, 1) * m[k] for k in range(8)),
    "by-distance": torch.cdist,
    "solved": lambda h, m: torch.linalg.solve(m + 3 * torch.eye(8), h.T).T,
}


class WithList(WithBuffer):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(8, 8)]

    def forward(self, x):
        return self.last(torch.relu(self.layers[0](torch.relu(self.first(x)))))


class WithDictOfTensors(WithBuffer):
    def __init__(self):
        super().__init__()
        self.weights = {"middle": nn.Parameter(torch.randn(8, 8) / 3)}

    def forward(self, x):
        return self.last(torch.relu(torch.relu(self.first(x)) @ self.weights["middle"]))


class Whole(Task):
    """A step in which the model runs as a whole, and perhaps something behind it."""

    def __init__(self, model, rule="fa", behind=None, extra=()):
        torch.manual_seed(0)
        self.model, self.behind = model(), behind or (lambda output: output)
        self.path = fp.untie(self.model, rule)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD([*parameters, *extra], lr=0.1, momentum=0.9, weight_decay=1e-2)
        self.x, self.y = torch.randn(16, 6), torch.randint(3, (16,))

    def step(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.behind(self.model(self.x)), self.y).backward()
        self.optimizer.step()
        self.path.step()


def with_head_outside():
    head = nn.Linear(3, 3)
    return Whole(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), behind=head)


def with_raw_head_outside():
    weight = torch.randn(3, 3).requires_grad_()
    model = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    return Whole(model, behind=lambda output: output @ weight, extra=[weight])


# In what the optimizer does


def decay_towards_w(task):
    for _, w, b in task.path.pairs():
        b.grad = b.grad + 1e-2 * (b - w)
    task.optimizer.step()


def remember(make):
    """The state of B in the optimizer gets something of W, which B does not need soon."""

    def after(task):
        for _, w, b in task.path.pairs():
            task.optimizer.state[b]["kept"] = make(w)

    return lambda: Task("kp", after_update=after)


def decay_of_w(task):
    for _, w, b in task.path.pairs():
        task.optimizer.state[b]["momentum_buffer"].mul_(1.0 - 0.01 * w.abs().mean())


# A layer's own parameters, updated by what the weights of other layers send back, past B and the deltas


class ByHand(Task):
    """The true gradients are worked out beside the backward pass, and put in the place of its own."""

    def step(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        with torch.no_grad():
            one, two, three = self.model[0], self.model[2], self.model[4]
            h1 = one(self.x).relu()
            h2 = two(h1).relu()
            delta = (three(h2).softmax(1) - F.one_hot(self.y, 3)) / 16
            delta = (delta @ three.weight) * (h2 > 0)
            two.weight.grad.copy_(delta.T @ h1)
            one.weight.grad.copy_(((delta @ two.weight) * (h1 > 0)).T @ self.x)
        self.optimizer.step()
        self.path.step()


class ByHandAndChecked(ByHand):
    """Large stand-ins for W do not pass the check."""

    def step(self):
        assert all(w.abs().max() < 5 for _, w, _ in self.path.pairs())
        super().step()


class TwinTrained(Task):
    """A plain network of the same weights sends back the errors that count."""

    def step(self):
        twin = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        for plain, own in zip(twin[::2], self.model[::2], strict=True):
            plain.weight, plain.bias = own.weight, own.bias
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.zero_grad()
        F.cross_entropy(twin(self.x), self.y).backward()
        self.optimizer.step()
        self.path.step()


class Afterwards(Whole):
    """The model runs as a whole, and something is done after each step."""

    def __init__(self, after, rule="fa"):
        super().__init__(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), rule)
        self.after = after

    def step(self):
        super().step()
        with torch.no_grad():
            self.after(self)


def update_bias_by_w(task):
    task.model[0].bias.sub_(0.01 * task.model[2].weight.sum(0))


def update_by_numpy(task):
    delta = task.model[2].weight.detach().numpy().sum(0)
    task.model[0].weight.sub_(0.01 * torch.from_numpy(delta)[:, None])


# Weights that are written anew from copies: the copies are what has to be absent


class Masters(Whole):
    """W is trained in another precision, and written anew in each step."""

    def __init__(self, leaks=True, dtype=torch.float64):
        super().__init__(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), "kp")
        self.leaks = leaks
        self.masters = [w.detach().to(dtype, copy=True) for _, w, _ in self.path.pairs()]

    def step(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        with torch.no_grad():
            for (_, w, b), master in zip(self.path.pairs(), self.masters, strict=True):
                master.mul_(0.999).sub_(w.grad, alpha=0.1)
                w.copy_(master)
                b.mul_(0.999).sub_(b.grad, alpha=0.1)
                if self.leaks:
                    b.lerp_(w, 0.1)
        self.path.step()


class MastersOfOptimizer(Masters):
    """The optimizer keeps them."""

    def __init__(self):
        super().__init__()
        for (_, w, _), master in zip(self.path.pairs(), self.masters, strict=True):
            self.optimizer.state[w]["master"] = master


class FlatMasters(Masters):
    """All of them lie in one vector."""

    @property
    def masters(self):
        weights = [w for _, w, _ in self.path.pairs()]
        parts = self.flat.split([w.numel() for w in weights])
        return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]

    @masters.setter
    def masters(self, masters):
        self.flat = torch.cat([master.flatten() for master in masters])


# Something besides the answer in what a reading hands out


def add_answer(read):
    def after(task):
        layer = task.model[2]
        layer.feedback.add_(read(layer, torch.zeros(8, 8)), alpha=0.1)

    return lambda: Task(after_update=after)


def product_and_w(layer, signal):
    with fp.forward_passage(layer.weight):
        return torch.addmm(layer.weight.clone(), signal, layer.weight.T)


def product_and_floats(layer, signal):
    bias = torch.tensor(layer.weight[:, 0].tolist())
    with fp.forward_passage(layer.weight):
        return F.linear(signal, layer.weight, bias)


def factor_of_w(layer, signal):
    with fp.forward_passage(layer.weight):
        return torch.addmm(signal, signal + 1, layer.weight.T, alpha=float(layer.weight[0, 0]))


def bias_exchanged(layer, signal):
    own = layer.bias
    layer.bias = nn.Parameter(layer.weight[:, 0].clone())
    answer = layer(signal)
    layer.bias = own
    return answer


def transpose_read(layer, signal):
    own = layer.weight.data
    layer.weight.data = own.T.contiguous()
    answer = layer(signal + 1)
    layer.weight.data = own
    return answer


def transposed_in_place(layer, signal):
    layer.weight.t_()
    answer = layer(signal + 1)
    layer.weight.t_()
    return answer


def transpose_read_in_a_passage(layer, signal):
    own = layer.weight.data
    layer.weight.data = own.T.contiguous()
    with fp.forward_passage(layer.weight):
        answer = (signal + 1) @ layer.weight.T
    layer.weight.data = own
    return answer


# Functions of the library that take a weight, called in a passage of one's own


def by_library(use):
    def after(task):
        layer = task.model[2]
        with fp.forward_passage(layer.weight):
            found = use(task, layer)
        layer.feedback.add_(found, alpha=0.01)

    return lambda: Task(after_update=after)


def written_by_a_device(task, layer):
    device, generator = fp.devices.Ideal(), torch.Generator()
    cells = device.draw(layer.weight.detach(), generator)
    return device.write(torch.zeros(8, 8), layer.weight.detach(), cells, generator)


class ProductAndSum(WithFlat):
    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(torch.relu((h[:, None, :] * self.flat.view(8, 8)).sum(-1)))


def with_tensors_outside():
    """A head that is no parameter of anything, and that the step itself updates."""
    weight = torch.randn(3, 3).requires_grad_()
    task = Whole(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), behind=lambda y: y @ weight
    )
    task.plain_step = task.step

    def step():
        task.plain_step()
        with torch.no_grad():
            weight.sub_(weight.grad, alpha=0.1)
            weight.grad = None

    task.step = step
    return task


SEEN = {
    "backprop": lambda: Task("bp"),
    "backprop-in-one-layer": lambda: Task("fa", overrides={"2": "bp"}),
    "signs": lambda: Task("ss"),
    "symmetric-alignment": lambda: Task(Symmetric()),
    "copied-every-third-step": lambda: Task(after_update=copy_every_third_step),
    "follows-changes-as-kp": lambda: Task(Follower()),
    "rare-branch": lambda: Task(
        on_hidden=lambda task, h: RareBranch.apply(h, task.model[2].weight, task.path)
    ),
    "cast-kept-from-forward": lambda: Task(
        on_hidden=lambda task, h: SavedCast.apply(h, task.model[2].weight)
    ),
    "aliased": aliased,
    "through-data": lambda: Task(after_update=add_through_data),
    "by-a-hook": lambda: Task(on_hidden=scale_delta_by_norm),
    "row-norms": lambda: Task(after_update=scale_by_row_norms),
    "momentum-of-w": lambda: Task(after_update=copy_momentum),
    "by-a-list-operator": lambda: Task(after_update=foreach_leak),
    "shared-with-numpy": lambda: Task(after_update=share_with_numpy),
    "layer-never-untied": lambda: Task(on_hidden=multiply_in_the_module),
}
"""Leaks that an operator shows, with the weight's layer and the line of the call."""

UNSEEN_BY_OPERATORS = {
    "copied-by-numpy": lambda: Task(after_update=copy_through_numpy),
    "copied-by-python": lambda: Task(after_update=copy_through_python),
    "copied-by-address": lambda: Task(after_update=copy_by_address),
}
"""Leaks that leave PyTorch on the way: replay finds them."""

BEFORE = {
    "numpy-before": keep_by(
        lambda w: w.detach().numpy().copy(), lambda b, kept: b.copy_(torch.from_numpy(kept))
    ),
    "pickle-before": keep_by(pickle.dumps, lambda b, kept: b.lerp_(pickle.loads(kept).detach(), 0.5)),  # noqa: S301
    "torch-save-before": keep_by(by_torch_save, load_again),
    "floats-before": keep_by(lambda w: w.norm().item(), lambda b, kept: b.mul_(kept / b.norm())),
    "one-float-before": keep_by(lambda w: float(w[0, 0]), lambda b, kept: b[0, 0].fill_(kept)),
    "learning-rate": lambda: Task("kp", before=learn_at_rate_of_w),
    "loss-scale": lambda: Task(on_loss=lambda task, loss: loss * task.model[2].weight.norm().item()),
    "loss-scale-by-tensor": lambda: Task(
        on_loss=lambda task, loss: loss * task.model[2].weight.detach().std()
    ),
    "samples-chosen-by-w": lambda: Task(before=choose_samples_by_w),
    "seed-of-w": lambda: Task(before=seed_by_w, after_update=add_noise),
}
RELAYS = {
    "relay-buffer": by_buffer,
    "relay-bias": by_bias,
    "relay-own-momentum": by_own_momentum,
    "relay-stateful": by_notes,
    "relay-two-steps": lambda: by_notes(2),
    "relay-file": by_file(write_bytes),
    "relay-torch-save": by_file(torch.save),
    "relay-thread": by_thread,
    "relay-average": by_slow_copy,
}
MODULES = {
    "module-in-hook": lambda: Task(on_hidden=add_by_module(lambda task: Back(task.model[2].weight))),
    "layer-in-hook": lambda: Task(on_hidden=add_by_module(lambda task: task.model[2])),
    "new-layer-in-hook": lambda: Task(
        on_hidden=add_by_module(lambda task: plain_layer_with(task.model[2].weight))
    ),
    "layer-in-function": lambda: Task(on_hidden=lambda task, h: CallsLayer.apply(h, task.model[2])),
    "unused-part-of-the-model": with_unused_part,
    "module-after-backward": lambda: Task(after_update=sent_by_hand),
}
REPLACED = {
    "replaced-parameter": lambda: Task(before=replaced_by_parameter, after_update=put_back),
    "replaced-in-dictionary": lambda: Task(before=replaced_in_dictionary, after_update=put_back),
    "replaced-data": lambda: Task(before=replace_data, after_update=put_data_back),
}
CARRIERS = {
    "scale-of-batchnorm": lambda: Task(model=with_norm(nn.BatchNorm1d(8)), after_update=carry_in_scale),
    "scale-of-layernorm": lambda: Task(model=with_norm(nn.LayerNorm(8)), before=carry_in_scale),
    "scale-into-feedback": lambda: Task(model=with_norm(nn.LayerNorm(8)), after_update=carry_into_feedback),
}
BRANCHES = {
    "branch-on-value": branch(lambda w: w[0, 0] > 0),
    "branch-on-other-value": branch(lambda w: w[0, 0] <= 0),
    "branch-on-norm-above": branch(lambda w: w.norm() > 1),
    "branch-on-norm-below": branch(lambda w: w.norm() < 5),
    "branch-on-exception": lambda: Task(after_update=stop_by_w),
    "order-of-w": lambda: Task(after_update=in_order_of_w),
}
PASSAGES = {
    "passage-times-one": lambda: Task(OwnMirror(lambda weight, noise: weight.weight * ONE)),
    "passage-copy": lambda: Task(OwnMirror(lambda weight, noise: weight.weight.clone())),
    "passage-numpy": lambda: Task(
        OwnMirror(lambda weight, noise: torch.from_numpy(weight.weight.detach().numpy().copy()))
    ),
    "passage-of-w": lambda: Task(OwnMirror(signal_of_w)),
    "passage-transposed": lambda: Task(OwnMirror(transposed_answer)),
    "passage-looked-up": lambda: Task(OwnMirror(looked_up)),
    "passage-trilinear": lambda: Task(OwnMirror(by_trilinear)),
    "looked-up-by-module": lambda: Task(after_update=looked_up_by_module),
}
TURNED = {
    "copy-turned": turned(lambda w: w.t().contiguous()),
    "copy-turned-by-numpy": turned(lambda w: torch.from_numpy(w.numpy().T.copy())),
    "average-turned": average_turned,
    "fresh-parameter": lambda: Task(after_update=by_fresh_parameter),
}
BESIDE = {
    "product-and-w": add_answer(product_and_w),
    "product-and-floats": add_answer(product_and_floats),
    "factor-of-w": add_answer(factor_of_w),
    "bias-exchanged": add_answer(bias_exchanged),
}
EXCHANGED = {
    "transpose-read": add_answer(transpose_read),
    "transposed-in-place": add_answer(transposed_in_place),
    "transpose-read-in-a-passage": add_answer(transpose_read_in_a_passage),
}
LIBRARY = {
    "angles-in-a-passage": by_library(lambda task, layer: torch.tensor(task.path.matrix_angles()["2"])),
    "gains-in-a-passage": by_library(lambda task, layer: torch.tensor(task.path.gains()["2"])),
    "device-in-a-passage": by_library(written_by_a_device),
}
OWN_UPDATES = {
    "backprop-by-hand": ByHand,
    "backprop-by-hand-and-checked": ByHandAndChecked,
    "twin-trained": TwinTrained,
    "bias-updated-by-w": lambda: Afterwards(update_bias_by_w),
    "updated-by-numpy": lambda: Afterwards(update_by_numpy),
}
COPIES = {
    "masters": Masters,
    "masters-of-optimizer": MastersOfOptimizer,
    "masters-in-one-vector": FlatMasters,
    "masters-in-same-precision": lambda: Masters(dtype=torch.float32),
}
UNNAMED = {
    "weight-in-buffer": lambda: Whole(WithBuffer),
    "flat-parameter": lambda: Whole(WithFlat),
    "list-of-layers": lambda: Whole(WithList),
    "dictionary-of-tensors": lambda: Whole(WithDictOfTensors),
    "head-outside": with_head_outside,
    "raw-head-outside": with_raw_head_outside,
    "tensors-outside": with_tensors_outside,
    "product-and-sum-of-flat": lambda: Whole(ProductAndSum),
    **{f"product-{name}": partial(Whole, partial(WithProduct, use)) for name, use in PRODUCTS.items()},
}
UPDATES = {
    "decay-towards-w": lambda: Task("kp", after_update=decay_towards_w),
    "momentum-scaled-by-w": lambda: Task("kp", after_update=decay_of_w),
    "list-in-state-of-b": remember(lambda w: [{"w": w.clone()}]),
    "array-in-state-of-b": remember(lambda w: w.numpy().copy()),
    "word-in-state-of-b": remember(lambda w: str(w.sum().item())),
}
# Through other layouts, and the transforms of ``torch.func``


def into_feedback(copied):
    def after(task):
        for _, w, b in task.path.pairs():
            b.lerp_(copied(w), 0.1)

    return lambda: Task(after_update=after)


def relay_sparse(task):
    for name, w, b in task.path.pairs():
        b.lerp_(task.__dict__.get(name, w.detach().to_sparse()).to_dense(), 0.1)
        vars(task)[name] = w.detach().to_sparse()


def with_sparse_weight(layout):
    task = Task()
    weight = nn.Parameter((torch.randn(8, 8) / 3).to_sparse(layout=layout))
    task.model[0].register_forward_hook(lambda module, x, y: torch.sparse.mm(weight, y.T).T)
    return task


class BackThrough(torch.autograd.Function):
    """Does nothing, and adds W's error on the way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h, weight):
        return h.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, delta):
        return delta + 0.1 * delta @ ctx.saved_tensors[0], None


def functional(is_per_sample):
    from clean_steps import Functional, PerSample

    task = (PerSample if is_per_sample else Functional)("fa")
    weight = task.model[2].weight.detach()
    task.model[1].register_forward_hook(lambda module, x, y: BackThrough.apply(y, weight))
    return task


def turned(product):
    """Read what the transposed weight does, in a passage."""

    def copied(w):
        with fp.forward_passage(w):
            return product(torch.eye(len(w)), w).float()

    return into_feedback(copied)


def in_autocast(e, w):
    with torch.autocast("cpu", torch.bfloat16):
        return e @ w


LAYOUTS = {
    "by-sparse": into_feedback(lambda w: w.to_sparse().to_dense()),
    "by-torch-func": into_feedback(
        lambda w: torch.func.grad(lambda v: (v * w).sum())(torch.zeros_like(w)),
    ),
    "turned-in-autocast": turned(in_autocast),
    "turned-by-einsum": turned(lambda e, w: torch.einsum("bo,oi->bi", e, w)),
    "turned-by-einsum-from-the-left": turned(lambda e, w: torch.einsum("oi,bo->ib", w, e).T),
    "by-vmap": into_feedback(lambda w: torch.func.vmap(lambda row: row * 1.0)(w)),
    "back-in-torch-func": lambda: functional(is_per_sample=False),
    "back-in-vmap": lambda: functional(is_per_sample=True),
    "by-sparse-product": into_feedback(lambda w: torch.sparse.mm(torch.eye(len(w)).to_sparse(), w)),
    "by-opaque": into_feedback(lambda w: w.to_mkldnn().to_dense()),
    "by-nested": into_feedback(lambda w: torch.nested.nested_tensor(list(w)).to_padded_tensor(0.0)),
    "relay-sparse": lambda: Task(after_update=relay_sparse),
    "sparse-weight": lambda: with_sparse_weight(torch.sparse_coo),
    "compressed-weight": lambda: with_sparse_weight(torch.sparse_csr),
}

KINDS = {
    "seen": SEEN, "unseen": UNSEEN_BY_OPERATORS, "before": BEFORE, "relay": RELAYS, "module": MODULES,
    "replaced": REPLACED, "carrier": CARRIERS, "branch": BRANCHES, "passage": PASSAGES, "unnamed": UNNAMED,
    "update": UPDATES, "beside": BESIDE, "exchanged": EXCHANGED, "library": LIBRARY,
    "own-updates": OWN_UPDATES, "copies": COPIES,
    "turned": TURNED, "layouts": LAYOUTS,
}  # fmt: skip
LEAKS = {name: make for kind in KINDS.values() for name, make in kind.items()}
