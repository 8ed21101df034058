"""What each of two processes does in ``test_replicas.py``: parts of a job that may part."""

import gc
import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import feedbackpath as fp

BATCH = 8


def run_all(rank, world_size, folder):
    """Do everything, and leave what came of it in ``folder``: errors in words."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save({name: outcome(job, rank) for name, job in JOBS.items()}, f"{folder}/{rank}.pt")
    finally:
        # PyTorch aborts at exit if a DDP model that an error broke off lives on in a cycle of references.
        gc.collect()
        torch.distributed.destroy_process_group()


def outcome(job, rank):
    """Return what a job returns, or the kind and words of its error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return job(rank)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).double()


def take_steps(parallel, path, rank, steps=3, optimizer=None):
    """Train by SGD; return W and B of each layer."""
    model = path.model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x), torch.arange(BATCH) % 3).backward()
        optimizer.step()
        path.step()
    return weights_of(path)


def weights_of(path):
    return [(w.detach().clone(), b.detach().clone()) for _, w, b in path.pairs()]


def load_on_the_first(rank):
    """The first process alone loads a checkpoint, before the model is wrapped."""
    model, other = make_net(), make_net(1)
    path = fp.untie(model, "kp")
    fp.untie(other, "kp", seed=5)
    if rank == 0:
        model.load_state_dict(other.state_dict())
    return take_steps(DistributedDataParallel(model), path, rank)


def load_on_both(rank):
    """What that has to come to."""
    model, other = make_net(), make_net(1)
    path = fp.untie(model, "kp")
    fp.untie(other, "kp", seed=5)
    model.load_state_dict(other.state_dict())
    return take_steps(DistributedDataParallel(model), path, rank)


def with_seeds_of_their_own(rule):
    """Each process unties by another seed, and the first alone mirrors."""

    def job(rank):
        path = fp.untie(make_net(), rule, seed=rank)
        if rank == 0:
            path.mirror(steps=2)
        pairs = take_steps(DistributedDataParallel(path.model), path, rank)
        return [*pairs, (torch.tensor(path.context.seed),) * 2]

    return job


def inside_another(rank):
    """The untied model is a part of what is wrapped."""
    path = fp.untie(make_net(), "kp", seed=rank)
    return take_steps(DistributedDataParallel(nn.Sequential(nn.Identity(), path.model)), path, rank)


def accumulating(rank):
    """The first forward pass is not to be synchronised."""
    path = fp.untie(make_net(), "kp", seed=rank)
    parallel = DistributedDataParallel(path.model)
    with parallel.no_sync():
        parallel(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    return take_steps(parallel, path, rank)


def joined(rule, *epochs, whole=lambda model: model):
    """In each epoch, each process has as many batches as are said; the second has two more else."""

    def job(rank):
        path = fp.untie(make_net(), rule)
        parallel = DistributedDataParallel(whole(path.model))
        for batches in epochs or [(2, 4)]:
            with parallel.join(divide_by_initial_world_size=False):
                take_steps(parallel, path, rank, steps=batches[rank])
        return weights_of(path)

    return job


def alone(rule, steps):
    """The second process has all batches, and trains by itself."""

    def job(rank):
        path = fp.untie(make_net(), rule)
        return take_steps(path.model, path, 1, steps=steps)

    return job


class Branches(nn.Module):
    """A network of which each process uses another part."""

    def __init__(self):
        super().__init__()
        self.parts, self.last = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.parts[torch.distributed.get_rank()](x))


def branched(rank):
    torch.manual_seed(0)
    path = fp.untie(Branches().double(), "kp")
    return take_steps(DistributedDataParallel(path.model, find_unused_parameters=True), path, rank)


def with_zero(optimizer):
    """ZeroRedundancyOptimizer: each process updates a part of the parameters, and sends it."""

    def job(rank):
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns as it is imported

        path = fp.untie(make_net(), "kp")
        if optimizer is None:
            chosen = torch.optim.SGD(path.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        else:
            settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
            chosen = ZeroRedundancyOptimizer(path.model.parameters(), optimizer, **settings)
        path.check_optimizer(chosen)
        return take_steps(DistributedDataParallel(path.model), path, rank, optimizer=chosen)

    return job


def clipped(rank):
    path = fp.untie(make_net(), "kp")
    parallel = DistributedDataParallel(path.model)
    parallel(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    nn.utils.clip_grad_norm_(path.model.parameters(), 0.1)
    torch.optim.SGD(path.model.parameters(), lr=0.1, weight_decay=0.01).step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path.step()
    return [str(one.message) for one in caught]


def sharded(rule):
    """FSDP after ``untie``: what each use says."""

    def job(rank):
        path = fp.untie(make_net(), rule)
        fully_shard(path.model, mesh=init_device_mesh("cpu", (2,)))
        uses = (path.step, path.matrix_angles, path.gains, path.mirror, lambda: list(path.pairs()))
        return [outcome(lambda rank, use=use: use(), rank) for use in uses]

    return job


PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def parallel_before(rank):
    model = parallelize_module(make_net(), init_device_mesh("cpu", (2,)), PLAN)
    return [outcome(lambda rank: fp.untie(model, "fa"), rank)]


def parallel_after(rank):
    path = fp.untie(make_net(), "fa")
    parallelize_module(path.model, init_device_mesh("cpu", (2,)), PLAN)
    uses = (path.matrix_angles, path.step, lambda: path.model(torch.randn(4, 6, dtype=torch.float64)))
    return [outcome(lambda rank, use=use: use(), rank) for use in uses]


def apart(rank):
    """Processes of one job that train a model each: nothing is sent."""
    path = fp.untie(make_net(), "kp", seed=rank)
    return take_steps(path.model, path, rank, steps=1 + rank)


JOBS = {
    "load on the first": load_on_the_first,
    "load on both": load_on_both,
    "kp, own seeds": with_seeds_of_their_own("kp"),
    "mirror-kp, own seeds": with_seeds_of_their_own("mirror-kp"),
    "wm, own seeds": with_seeds_of_their_own("wm"),
    "inside another": inside_another,
    "accumulating": accumulating,
    "join, kp": joined("kp"),
    "join, fa": joined("fa"),
    "join, mirror-kp": joined("mirror-kp"),
    "join, wm": joined("wm"),
    "join, kp, no batch": joined("kp", (0, 3)),
    "join, kp, no batch, alone": alone("kp", 3),
    "join, kp, no batch in turns": joined("kp", (0, 2), (3, 0), (2, 1)),
    "join, fa, no batch": joined("fa", (0, 3)),
    "join, mirror-kp, no batch": joined("mirror-kp", (0, 3)),
    "join, kp, no batch, inside another": joined("kp", (0, 3), whole=nn.Sequential),
    "branches": branched,
    "zero": with_zero(torch.optim.SGD),
    "no zero": with_zero(None),
    "clipped": clipped,
    "fsdp, wm": sharded("wm"),
    "fsdp, mirror-kp": sharded("mirror-kp"),
    "fsdp, fa": sharded("fa"),
    "parallel, then untied": parallel_before,
    "untied, then parallel": parallel_after,
    "apart": apart,
    # The last: what the processes sent each other is left half read.
    "join, wm, no batch": joined("wm", (0, 3)),
}
