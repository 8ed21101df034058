"""Training steps that transport weights, each in another way: what an audit must not miss."""

import ctypes
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
        after_update: Called with the path, after ``path.step()``.
        around: Called with the network's hidden output before it goes on.
    """

    def __init__(
        self, rule="fa", *, optimizer=None, after_update=None, on_hidden=None, clip=None, model=None, **untie
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
        self.after_update, self.on_hidden, self.clip = after_update, on_hidden, clip

    def step(self):
        self.optimizer.zero_grad()
        h = self.model[1](self.model[0](self.x))
        if self.on_hidden:
            h = self.on_hidden(self, h)
        loss = F.cross_entropy(self.model[2:](h), self.y)
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


class Follower:
    """A rule whose B follows W's changes, under another's name."""

    name: ClassVar[str] = "kp"
    feedback_kind: ClassVar[str] = "own"

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


class Symmetric:
    """Symmetric alignment: B is W, scaled to B's own norm."""

    name: ClassVar[str] = "symmetric"
    feedback_kind: ClassVar[str] = "own"

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


LEAKS = {
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
