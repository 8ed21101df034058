"""Recipes: whole experiments, each a function that returns a typed config, and the table of their names."""

import difflib
from collections.abc import Callable

from feedbackpath.errors import ConfigError
from feedbackpath.recipes.imagenet import imagenet_resnet18, imagenet_resnet50
from feedbackpath.recipes.small import (
    cifar10_resnet20,
    fashion_mnist_lenet,
    glyphs1000_resnet18,
    glyphs_resnet8,
)
from feedbackpath.recipes.text import text_gpt_124m, text_gpt_small, text_lstm_small
from feedbackpath.train.config import RunConfig

__all__ = ["RECIPES", "make_recipe"]

RECIPES: dict[str, Callable[..., RunConfig]] = {
    "imagenet-resnet18": imagenet_resnet18,
    "imagenet-resnet50": imagenet_resnet50,
    "cifar10-resnet20": cifar10_resnet20,
    "fashion-mnist-lenet": fashion_mnist_lenet,
    "glyphs-resnet8": glyphs_resnet8,
    "glyphs1000-resnet18": glyphs1000_resnet18,
    "text-gpt-small": text_gpt_small,
    "text-lstm-small": text_lstm_small,
    "text-gpt-124m": text_gpt_124m,
}
"""Names to recipes; each takes ``rule`` and ``norm``."""


def make_recipe(name: str, **cell: str) -> RunConfig:
    """Return the config of a recipe for a rule and a place of BatchNorm.

    Raises:
        ConfigError: There is no such recipe.

    Example:
        >>> make_recipe("imagenet-resnet50", rule="wm").mirror_epochs
        2
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no recipe {name!r}; recipes are {', '.join(RECIPES)}{hint}")
    return RECIPES[name](**cell)
