"""A task of one's own: learn y = sin(x), judged by the mean squared error.

feedbackpath compare --import examples/regression.py --data sine --model curve --rules bp,fa,kp --lr 0.01
"""

import torch
from torch import nn

import feedbackpath as fp


def sine(seed: int) -> fp.Task:
    """Return points of a sine wave: the same ones whatever the seed."""
    x = 6 * torch.rand(1200, 1, generator=torch.Generator().manual_seed(0)) - 3
    rows = {"train": slice(800), "validation": slice(800, 1000), "test": slice(1000, 1200)}
    parts = {name: (x[own], x[own].sin()) for name, own in rows.items()}
    judged = {"metric": "mse", "unit": "", "score": lambda output, y: (output - y).square().mean(1)}
    return fp.Task.of_tensors("sine", **parts, num_outputs=1, loss=nn.functional.mse_loss, **judged)


fp.register_task("sine", sine)
fp.register_model("curve", lambda: nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)))
