"""Make what a run trains: the network, its feedback path and its optimizer."""

import torch
from torch import nn

from feedbackpath.errors import ConfigError
from feedbackpath.models import READ_TOKENS, build_model, takes_numbers
from feedbackpath.path import FeedbackPath, untie
from feedbackpath.tasks import Task
from feedbackpath.train.chips import make_chip
from feedbackpath.train.config import TrainConfig
from feedbackpath.train.rules import make_rule


def make_network(config: TrainConfig, seed: int, task: Task) -> nn.Module:
    """Build the network of a config for a task; the weights depend on the seed alone.

    Raises:
        ConfigError: There is no such model, or it cannot take the data.
    """
    if len(task.sample_shape) == 1 and takes_numbers(config.model):  # as mlp does: others want images
        first = task.train.prepare(task.train.batch(torch.tensor([0]), 1)[0])
        if not first.is_floating_point():
            raise ConfigError(
                f"model {config.model} reads numbers, but {task.name} is made of tokens; choose from "
                f"{', '.join(sorted(READ_TOKENS))}, or a network of your own"
            )
    torch.manual_seed(seed)
    try:
        return build_model(
            config.model,
            sample_shape=task.sample_shape,
            num_classes=task.num_classes,
            norm=config.norm,
            activation=config.activation,
            connections=config.connections,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_path(config: TrainConfig, rule: str, seed: int, model: nn.Module) -> FeedbackPath:
    """Untie a network by a rule with the config's settings and overrides."""
    settings = config.rule_settings.get(rule, {})
    return untie(
        model,
        make_rule(rule, settings),
        overrides=config.overrides,
        batchnorm_feedback=config.batchnorm_feedback,
        chip=make_chip(config, seed),
        seed=seed,
    )


def run_once(path: FeedbackPath, task: Task) -> None:
    """Run a model on a sample where a rule broadcasts errors: its feedback weights are made then.

    They have to be there before the optimizer, replicas and compilers. Nothing else of the model changes.
    """
    if not any(weight.layer.untied.send_back.is_broadcast for weight in path.weights):
        return
    was_training = [module for module in path.model.modules() if module.training]
    like = next(path.model.parameters())
    x = task.train.prepare(task.train.batch(torch.tensor([0]), 1)[0].to(like.device))
    with torch.enable_grad():
        path.model.eval()(x.to(like.dtype) if x.is_floating_point() else x)
    for module in was_training:
        module.training = True


def make_optimizer(path: FeedbackPath, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a config for all parameters that learn, B among them; a chip writes for it."""
    parameters = [parameter for parameter in path.model.parameters() if parameter.requires_grad]
    made: torch.optim.Optimizer
    if config.optimizer == "adamw":
        made = torch.optim.AdamW(parameters, lr=config.peak_lr, weight_decay=config.weight_decay)
    else:
        made = torch.optim.SGD(
            parameters,
            lr=config.peak_lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    if path.chip is not None:
        path.chip.attach(made)
    return made
