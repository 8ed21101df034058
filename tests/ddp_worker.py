"""What each of two processes runs, and what one process runs instead; see ``test_distributed.py``."""

import copy
import dataclasses
import itertools
import pickle
from unittest import mock

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import feedbackpath as fp
from feedbackpath.core import pytorch
from feedbackpath.rules import activity_rule

STEPS, BATCH = 4, 8
RULES = {rule: rule for rule in fp.RULES} | {
    f"update-first, {rate}": fp.KolenPollack(order="update-first", feedback_rate=rate) for rate in (1.0, 0.5)
}
AVERAGED = fp.Mirror(noise="gaussian", samples=64, across_devices="averaged")


def train(rule, rank=0, world_size=1, parts=1):
    """Train a small network; each process sees its share of every batch. Return W and B of each layer.

    In several ``parts``, one process takes the share of each of so many in turn, with that one's noise.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    path = fp.untie(model, rule)
    model(torch.zeros(1, 6, dtype=torch.float64))  # a rule that broadcasts errors makes its feedback weights
    parallel = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    path.check_optimizer(optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        target = torch.randint(0, 3, (BATCH,), generator=generator)
        optimizer.zero_grad()
        for part in range(parts):
            own = slice(rank + part, None, world_size * parts)
            with as_process(rank + part):
                (nn.functional.cross_entropy(parallel(x[own]), target[own]) / parts).backward()
        optimizer.step()
        torch.rand(rank + 1)  # the processes' global random numbers part ways
        with as_process(*range(rank, rank + parts)):
            path.step()
    return {name: (w.detach().clone(), b.detach().clone()) for name, w, b in path.pairs()}


def as_process(*ranks):
    """Draw the noise that rides on activity as processes do: as one, or as several in turn."""
    return mock.patch.object(activity_rule, "process_number", side_effect=itertools.cycle(ranks))


def run_audits(rank, world_size, folder):
    """Audit a step of DistributedDataParallel by each of some rules, and leave the verdicts in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        rules = {rule: rule for rule in ("kp", "wm", "bp")} | {"averaged": fp.WeightMirror(AVERAGED)}
        verdicts = {name: audit_step(rule, rank) for name, rule in rules.items()}
        torch.save(verdicts, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def audit_step(rule, rank):
    """Return the verdict on a training step of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    path = fp.untie(model, rule)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(rank))

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x), torch.arange(BATCH) % 3).backward()
        optimizer.step()
        path.step()

    return fp.audit(step, path).transport_free


class Subclassed(nn.Linear):
    """A subclass, whose copies have to be of the same class."""


def make_learner(*, is_root=False):
    """Return a model under Kolen-Pollack, and its path."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 9), nn.ReLU(), Subclassed(9, 7), nn.Tanh(), nn.Linear(7, 3)]
    model = (nn.Linear(6, 3) if is_root else nn.Sequential(*layers)).double()
    return model, fp.untie(model, "kp")


def load_anew(model):
    """Load by assignment, so that every parameter is another tensor than before."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = list(model.parameters())
    model.load_state_dict(state, assign=True)
    assert {id(p) for p in before}.isdisjoint(id(p) for p in model.parameters())
    return model


REPLACED = {
    "as it was": lambda model: model,
    "deepcopied": copy.deepcopy,
    "deepcopied twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "assigned": load_anew,
    "assigned twice": lambda model: load_anew(load_anew(model)),
    "deepcopied, then assigned": lambda model: load_anew(copy.deepcopy(model)),
    "in lower precision and back": lambda model: model.float().double(),
}
"""What may become of a model between ``untie`` and DistributedDataParallel."""


def run_replaced(rank, world_size, folder):
    """Train what became of a model, in each way, and leave in ``folder`` what came of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        found = {way: train_replaced(replace, rank) for way, replace in REPLACED.items()}
        found["root"] = train_replaced(lambda model: model, rank, is_root=True)
        found["root, deepcopied"] = train_replaced(copy.deepcopy, rank, is_root=True)
        with mock.patch.object(pytorch, "_find", return_value=None):  # a PyTorch without callbacks at the end
            found["without callbacks"] = train_replaced(lambda model: model, rank)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def train_replaced(replace, rank, *, is_root=False):
    """Return the gradients of W and B after each of some steps, the state at the end, and what was sent."""
    model, path = make_learner(is_root=is_root)
    model = replace(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    sent = []

    def note(group, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(group, bucket)

    parallel.register_comm_hook(None, note)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    generator = torch.Generator().manual_seed(rank)
    pairs = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        nn.functional.cross_entropy(parallel(x), torch.arange(BATCH) % 3).backward()
        named = dict(model.named_parameters())
        names = [name.removesuffix("feedback") for name in named if name.endswith("feedback")]
        pairs.append([(named[f"{n}weight"].grad.clone(), named[f"{n}feedback"].grad.clone()) for n in names])
        optimizer.step()
    plain = [p for name, p in model.named_parameters() if not name.endswith("feedback")]
    return {
        "pairs": pairs,
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "sent": sum(sent) / STEPS,
        "plain": sum(p.numel() for p in plain),
    }


def run_all_rules(rank, world_size, folder):
    """Train by every rule and leave the result in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(
            {name: train(rule, rank, world_size) for name, rule in RULES.items()}, f"{folder}/{rank}.pt"
        )
    finally:
        torch.distributed.destroy_process_group()


MIRRORS = {
    "same": fp.Mirror(forgetting=0.1, samples=256),
    "averaged": fp.Mirror(forgetting=0.1, samples=256, across_devices="averaged"),
    "signs": fp.Mirror(noise="signs", forgetting=0.1, samples=256, across_devices="averaged"),
    "target": fp.Mirror(forgetting=0.1, target_angle_deg=5, across_devices="averaged"),
    "until": fp.Mirror(noise="uniform", samples=256, across_devices="averaged"),
}


def run_mirrors(rank, world_size, folder):
    """Mirror at rest with each of ``MIRRORS``, and while training; leave what came out in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        found = {name: mirror_at_rest(name, settings, rank) for name, settings in MIRRORS.items()}
        found["schedule"] = train_on_a_budget(rank)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def mirror_at_rest(name, settings, rank=0):
    """Return what mirroring gives, in one go and resumed on the way, and what was planned."""
    whole, resumed = make_net_at_rest(settings), make_net_at_rest(settings)
    plan = whole.plan(lambda: whole.model(torch.randn(2, 8, 3, 3)).sum())
    torch.rand(rank + 1)  # the processes' global random numbers part ways
    if name == "until":
        whole.mirror(until_angle_deg=4)
    else:
        whole.mirror()
        resumed.mirror(steps=3)
        half = make_net_at_rest(settings)
        half.model.load_state_dict(resumed.model.state_dict())
        half.load_state_dict(resumed.state_dict())
        half.mirror(steps=47)
        resumed = half
    return {
        "feedback": [b.detach().clone() for _, _, b in whole.pairs()],
        "resumed": [b.detach().clone() for _, _, b in resumed.pairs()],
        "angles": whole.matrix_angles(),
        "passes": whole.state_dict()["parts"]["MirrorMode"]["passes"],
        "planned_deg": {layer.name: layer.angle_deg for layer in plan},
        "samples": {layer.name: layer.samples for layer in plan},
        "flops": {layer.name: layer.flops for layer in plan},
    }


def make_net_at_rest(settings):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 300)
    )
    return fp.untie(model, fp.WeightMirror(settings))


def train_on_a_budget(rank):
    """Train with noise of each rank's own and time for some layers a step; return B and the path's state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 90), nn.ReLU(), nn.Linear(90, 70), nn.ReLU(), nn.Linear(70, 3))
    path = fp.untie(model, fp.WeightMirror(dataclasses.replace(AVERAGED, when=fp.When(cost_share=0.2))))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randn(BATCH, 60, generator=generator)
        nn.functional.cross_entropy(parallel(x), torch.arange(BATCH) % 3).backward()
        optimizer.step()
        path.step()
    return {"feedback": [b.detach().clone() for _, _, b in path.pairs()], "state": path.state_dict()}
