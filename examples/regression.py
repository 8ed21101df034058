"""A task of one's own: learn y = sin(x), judged by the mean squared error.

feedbackpath compare --import examples/regression.py --data sine --model curve --rules bp,fa,kp --lr 0.05
"""

import torch
from torch import nn

import feedbackpath as fp


def sine(seed: int) -> fp.Task:
    x = torch.linspace(-3, 3, 1200)[torch.randperm(1200, generator=torch.Generator().manual_seed(0))][:, None]
    parts = [(part, part.sin()) for part in (x[:800], x[800:1000], x[1000:])]
    named = dict(zip(("train", "validation", "test"), parts, strict=True))
    settings = {"metric": "mse", "unit": "", "num_outputs": 1}
    return fp.Task.of_tensors("sine", **named, **settings, loss=nn.functional.mse_loss, score=squared)


def squared(output, y):
    return (output - y).square().mean(1)


fp.register_task("sine", sine)
fp.register_model(
    "curve",
    lambda: nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)),
)
