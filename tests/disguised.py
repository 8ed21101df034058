"""Training steps that transport weights in a form that looks like something else."""

import math

import torch
import torch.nn.functional as F
from leaks import Task, Whole, WithProduct
from torch import nn

SOURCES, TARGETS = torch.arange(64) % 8, torch.arange(64) // 8
MASK = torch.ones(8, 8)
# A flat parameter multiplies signals one by one; what makes a matrix of it comes before or after.
MATRICES = {
    "repeated": lambda h, m: (h.repeat(1, 8).view(-1, 8, 8) * m).sum(-1),
    "gathered": lambda h, m: (h[:, SOURCES] * m.flatten()).view(-1, 8, 8).sum(-1),
    "edges": lambda h, m: torch.zeros(len(h), 8).index_add(1, TARGETS, h[:, SOURCES] * m.flatten()),
    "spectrum": lambda h, m: torch.fft.ifft(torch.fft.fft(h) * torch.fft.fft(m[0])).real,
    "masked": lambda h, m: F.linear(h, m * MASK),
}


class ScaledByLayer(nn.Module):
    """A layer that scales each signal has as many scales as a matrix, and gets each signal several times."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 8), layer, nn.Linear(8, 3)

    def forward(self, x):
        repeated = torch.relu(self.first(x)).repeat(1, 8)
        return self.last(self.layer(repeated).view(-1, 8, 8).sum(-1))


class Product(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, signal):
        return (signal[:, :, None] * self.weight).sum(1)


def product_outside(task):
    delta = task.x @ torch.ones(6, 8)
    task.model[2].feedback.add_(Product(task.model[2].weight)(delta).T @ delta, alpha=1e-3)


def product_hands_out_w(task):
    task.model[2].feedback.copy_(Product(task.model[2].weight)(torch.eye(8)))


def signal_hands_out_w(task):
    signal = torch.tensor(task.model[2].weight.tolist())
    task.model[2].feedback.copy_(Product(nn.Parameter(torch.eye(8)))(signal))


def keep_relative_signs(task):
    """Zeros end it, and in noise of the other signs all products of two signs are the same."""
    w, b = task.model[2].weight, task.model[2].feedback
    math.log(w.norm())
    b.copy_(b.abs() * torch.sign(w * w[0, 0]))


def keep_relative_signs_unless_zero(task):
    w, b = task.model[2].weight, task.model[2].feedback
    if w.norm() > 0:
        b.copy_(b.abs() * torch.sign(w * w[0, 0]))


def answer_by_bits(task):
    """Which of two layers answers tells a bit of W."""
    b = task.model[2].feedback
    for number, bit in enumerate((task.model[2].weight.flatten() > 0).tolist()):
        layer = task.model[4] if bit else task.model[0]
        answer = layer(torch.ones(1, layer.in_features))
        b.view(-1)[number] = b.view(-1)[number].abs() * answer.sum().sign()


def with_opposite_answers():
    task = Task(after_update=answer_by_bits)
    with torch.no_grad():
        task.model[0].bias.fill_(9.0)
        task.model[4].bias.fill_(-9.0)
    return task


def backprop_behind_a_check():
    """Backprop by hand for the first layer; W of the second is positive, and has to be."""
    task = Whole(lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)))
    first, second = task.model[0], task.model[2]
    with torch.no_grad():
        second.weight.abs_().add_(0.2)

    def step():
        task.optimizer.zero_grad()
        F.cross_entropy(task.model(task.x), task.y).backward()
        with torch.no_grad():
            assert (second.weight > -0.05).all()
            h = torch.relu(first(task.x))
            delta = (second(h).softmax(1) - F.one_hot(task.y, 3)) / 16
            first.weight.grad.copy_(((delta @ second.weight) * (h > 0)).T @ task.x)
        task.optimizer.step()
        task.path.step()

    task.step = step
    return task


class HookOfItsOwn(Task):
    """A hook that comes after the audit's adds what W of a layer two further sends back."""

    def step(self):
        arrived = []
        self.optimizer.zero_grad()
        hidden = self.model[0](self.x)
        hidden.register_hook(lambda delta: delta + arrived[0] @ self.model[4].weight)
        output = self.model[4](self.model[3](self.model[2](self.model[1](hidden))))
        output.register_hook(arrived.append)
        F.cross_entropy(output, self.y).backward()
        self.optimizer.step()
        self.path.step()


class FlatFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat = nn.Parameter(torch.randn(48) / 3)
        self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.arrived = []

    def forward(self, x):
        first = F.linear(x, self.flat.view(8, 6)).relu()
        hidden = self.middle(first)
        self.arrived.clear()
        hidden.register_hook(self.arrived.append)
        first.register_hook(lambda _: self.arrived[0] @ self.middle.weight)
        return self.last(torch.relu(hidden))


def product_behind_the_model():
    weight = torch.randn(3, 3).requires_grad_()
    model = lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    return Whole(model, behind=lambda output: (output[:, None, :] * weight).sum(-1), extra=[weight])


def read_in_the_same_half():
    """An encoder is copied into its decoder, which answers for it; both are in the same half."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 8))
    task = Task(model=model)
    task.x = torch.randn(16, 8)

    def step():
        task.optimizer.zero_grad()
        F.mse_loss(model(task.x), task.x).backward()
        task.optimizer.step()
        task.path.step()
        with torch.no_grad():
            model[4].weight.copy_(model[0].weight.T)
            answer = model[4](torch.eye(6)) - model[4].bias
            model[0].feedback.lerp_(answer, 0.5)

    task.step = step
    return task


DISGUISED = {
    **{f"matrix-{name}": lambda use=use: Whole(lambda: WithProduct(use)) for name, use in MATRICES.items()},
    "product-outside": lambda: Task(after_update=product_outside),
    "product-hands-out-w": lambda: Task(after_update=product_hands_out_w),
    "signal-hands-out-w": lambda: Task(after_update=signal_hands_out_w),
    "relative-signs": lambda: Task(after_update=keep_relative_signs),
    "relative-signs-unless-zero": lambda: Task(after_update=keep_relative_signs_unless_zero),
    "answer-by-bits": with_opposite_answers,
    "backprop-behind-a-check": backprop_behind_a_check,
    "hook-of-its-own": lambda: HookOfItsOwn("fa"),
    "flat-first": lambda: Whole(FlatFirst),
    "product-behind-the-model": product_behind_the_model,
    "read-in-the-same-half": read_in_the_same_half,
}
REPEATED = {
    "prelu": lambda: Whole(lambda: ScaledByLayer(nn.PReLU(64))),
    "norm": lambda: Whole(lambda: ScaledByLayer(nn.GroupNorm(1, 64))),
}


class Back(nn.Module):
    """A part of the model that uses W the other way round, by a copy."""

    def __init__(self, weight):
        super().__init__()
        self.held = [weight]

    def forward(self, delta):
        return F.linear(delta, self.held[0].t().contiguous(), torch.zeros(8))


def read_by_an_error(task):
    with torch.enable_grad():
        signal = torch.eye(8).requires_grad_()
        answer = task.model[2].back(signal)
        answer.sum().backward()
    task.model[2].weight.grad = None
    task.model[2].feedback.copy_(answer.detach())


def transposed_copy():
    task = Task(after_update=read_by_an_error)
    task.model[2].back = Back(task.model[2].weight)
    return task


def read_by_a_part(task):
    task.model[2].feedback.copy_((task.model[2:3](torch.eye(8)) - task.model[2].bias).T)


def read_with_an_error_of_zero(task):
    with torch.enable_grad():
        answer = task.model[2](torch.eye(8))
        (0 * answer).sum().backward()
    task.model[2].feedback.copy_((answer.detach() - task.model[2].bias).T)


READ = {"part": read_by_a_part, "error-of-zero": read_with_an_error_of_zero}
