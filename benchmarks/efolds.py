"""The e-folds by which Kolen-Pollack's W - B would shrink in well-known recipes.

`python benchmarks/efolds.py` prints the table of docs/balance.md.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import feedbackpath as fp

IMAGENET = 1_281_167


@dataclass(frozen=True)
class Recipe:
    """A recipe: its optimizer's settings, its steps, and its learning rate at each."""

    name: str
    source: str
    settings: dict[str, float]
    steps: int
    rate: Callable[[int], float]

    def efolds(self) -> float:
        """Return the e-folds of the whole run."""
        model = nn.Linear(2, 2)
        path = fp.untie(model, "kp")
        kind = torch.optim.SGD if "momentum" in self.settings else torch.optim.AdamW
        optimizer = kind(model.parameters(), **self.settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fp.KolenPollackWarning)
            return path.check_optimizer(optimizer, steps=self.steps, schedule=self.rate)[""]


def cosine(highest: float, lowest: float, warmup: int, steps: int) -> Callable[[int], float]:
    """Return a linear warm-up and a half cosine."""

    def rate(step: int) -> float:
        if step < warmup:
            return highest * (step + 1) / (warmup + 1)
        share = (step - warmup) / (steps - warmup)
        return lowest + 0.5 * (highest - lowest) * (1.0 + math.cos(math.pi * share))

    return rate


EPOCH_256, EPOCH_1024 = math.ceil(IMAGENET / 256), IMAGENET // 1024
RECIPES = (
    Recipe(
        "ResNet-50, 90 epochs, batch 256", "torchvision, references/classification/train.py, its defaults",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}, 90 * EPOCH_256,
        lambda step: 0.1 * 0.1 ** (step // EPOCH_256 // 30),
    ),
    Recipe(
        "ViT-B (DeiT-B), 300 epochs, batch 1024", "facebookresearch/deit, main.py",
        {"lr": 1e-3, "weight_decay": 0.05}, 300 * EPOCH_1024,
        cosine(1e-3, 1e-5, 5 * EPOCH_1024, 300 * EPOCH_1024),
    ),
    Recipe(
        "GPT-2 (124M), 600,000 steps", "karpathy/nanoGPT, train.py and config/train_gpt2.py",
        {"lr": 6e-4, "weight_decay": 0.1}, 600_000, cosine(6e-4, 6e-5, 2000, 600_000),
    ),
    Recipe(
        "LLaMA 7B, 1.0T tokens, 4M a step", "Touvron et al. 2023, Section 2.3 and Table 2, arXiv:2302.13971",
        {"lr": 3e-4, "weight_decay": 0.1}, 250_000, cosine(3e-4, 3e-5, 2000, 250_000),
    ),
)  # fmt: skip


def main() -> None:
    """Print the table."""
    print("| recipe | e-folds | source |\n|---|---|---|")
    for recipe in RECIPES:
        print(f"| {recipe.name} | {recipe.efolds():.1f} | {recipe.source} |")


if __name__ == "__main__":
    main()
