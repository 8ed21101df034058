"""A small network for digits, 64-256-128-10: `--import benchmarks/digits_mlp.py --model mlp-256-128`."""

from torch import nn

import feedbackpath as fp

fp.register_model(
    "mlp-256-128",
    lambda num_classes: nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 256), nn.ReLU(),
        nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, num_classes),
    ),
)  # fmt: skip
