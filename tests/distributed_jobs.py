"""What the processes of ``test_engine.py`` run."""

import os

import torch
from problems import COVERING_RULES, settings_that_start_at_once
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from feedbackpath.tasks import load_task
from feedbackpath.train.config import RunConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Measured, Step, Training

# A learning rate at which no rule amplifies rounding: at 0.2 feedback alignment does.
SETTINGS = {
    "data": "digits",
    "model": "mlp",
    "epochs": 3,
    "samples_per_epoch": 1090,
    "batch_size": 64,
    "lr": 0.02,
}
STEPS = 50  # one last minibatch of two samples (1090 = 17 * 64 + 2) within them


def train_all_rules(world_size=1, rank=0):
    """Train by every rule for 50 steps; return losses, final state and bytes of gradients sent a step."""
    found = {}
    for rule in COVERING_RULES:
        settings = settings_that_start_at_once(rule)
        config = RunConfig(
            **SETTINGS, **settings, rule=rule, max_steps=STEPS, devices=world_size, select_best=False
        )
        run = Training(config, rule, 0, load_task("digits", samples_per_epoch=1090), Engine(config))
        sent = count_bytes(run.wrapped_model) if world_size > 1 else []
        events = [run.begin()]
        while not run.is_finished:
            events += run.go_through_epoch()
        torch.rand(rank + 1)  # the processes' global random numbers part ways
        last = [event for event in events if isinstance(event, Measured)][-1]
        found[rule] = {
            "losses": [event.loss for event in events if isinstance(event, Step)],
            "test_error": last.entry.test,
            "model": {key: value.clone() for key, value in last.state["model"].items()},
            "bytes": sum(sent) / STEPS,
        }
    return found


def count_bytes(wrapped):
    """Note the bytes of every bucket of gradients that the replicas average."""
    sent = []

    def hook(group, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    wrapped._forward_module.register_comm_hook(None, hook)
    return sent


def run_as_rank(rank, world_size, port, folder):
    """Be one of several processes and leave what ``train_all_rules`` finds in ``folder``."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    try:
        torch.save(train_all_rules(world_size, rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
