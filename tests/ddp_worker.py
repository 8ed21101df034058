"""What each of two processes runs, and what one process runs instead; see ``test_distributed.py``."""

import torch
from torch import nn

import feedbackpath as fp

STEPS, BATCH = 4, 8


def train(rule, rank=0, world_size=1):
    """Train a small network; each process sees its share of every batch. Return W and B of each layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    path = fp.untie(model, rule)
    parallel = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        target = torch.randint(0, 3, (BATCH,), generator=generator)
        own = slice(rank, None, world_size)
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x[own]), target[own]).backward()
        optimizer.step()
        torch.rand(rank + 1)  # the processes' global random numbers part ways
        path.step()
    return {name: (w.detach().clone(), b.detach().clone()) for name, w, b in path.pairs()}


def run_audits(rank, world_size, folder):
    """Audit a step of DistributedDataParallel by two rules, and leave the verdicts in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        verdicts = {rule: audit_step(rule, rank) for rule in ("kp", "wm", "bp")}
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

    return fp.audit(step, path).verdict


def run_all_rules(rank, world_size, folder):
    """Train by every rule and leave the result in ``folder``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save({rule: train(rule, rank, world_size) for rule in fp.RULES}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
