"""Steps that ``fp.audit(build=...)`` makes in a process of its own."""

import torch
import torch.nn.functional as F
from torch import nn

import feedbackpath as fp

CACHE = {}


def make(rule, after_update=None, after_untie=None):
    """Return a step and its path."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    path = fp.untie(model, rule)
    if after_untie:
        after_untie(path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=1e-2)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        path.step()
        if after_update:
            with torch.no_grad():
                after_update(path)

    return step, path


def copy_from_cache(path):
    for name, w, b in path.pairs():
        b.copy_(torch.tensor(CACHE.setdefault(name, w.tolist())))


@torch.no_grad()
def copy_once(path):
    for _, w, b in path.pairs():
        b.copy_(w)


def clean_fa():
    return make("fa")


def clean_kp():
    return make("kp")


def clean_wm():
    return make("wm")


def mirrored_first():
    return make("mirror-kp", after_untie=lambda path: path.mirror())


def cached():
    return make("fa", after_update=copy_from_cache)


def copied_at_the_start():
    return make("fa", after_untie=copy_once)


def signs():
    return make("ss")


def unbuilt():
    return (lambda: None), None


def set_from_outside(path):
    for _, w, _ in path.pairs():
        w.data = torch.linspace(-1, 1, w.numel()).view_as(w)


def set_anew():
    return make("fa", set_from_outside)
