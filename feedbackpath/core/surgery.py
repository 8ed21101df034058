"""Surgery: turn a model's modules into untied ones in place, and back.

A module's class is exchanged and its feedback weights are added. Nothing else of it changes: optimizers,
hooks, shared modules and references to the layer stay good, and the model itself may be a layer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from feedbackpath.core.batchnorm import SigmaBatchNorm, sigma_type
from feedbackpath.core.layers import kind_of, list_weights
from feedbackpath.core.modules import FeedbackModule, Untied, untied_type
from feedbackpath.core.usage import quiet_modules
from feedbackpath.errors import UntieError, class_name


@dataclass(frozen=True)
class Survey:
    """What a model holds.

    Attributes:
        convertible: Layer paths to layers with weights that can be untied; a shared layer appears once.
        unconverted: Paths and types of the layers whose weights cannot.
    """

    convertible: dict[str, nn.Module]
    unconverted: dict[str, str]


def survey(model: nn.Module) -> Survey:
    """Find what can be untied and what cannot.

    Raises:
        UntieError: No module in it owns a weight that can be untied.
    """
    layers = {name: module for name, module in model.named_modules() if kind_of(module).weights(module)}
    unconverted = {name: class_name(type(m)) for name, m in layers.items() if is_patched(m, model)}
    convertible = {name: layer for name, layer in layers.items() if name not in unconverted}
    if not convertible:
        left = ", ".join(f"{name!r} ({kind})" for name, kind in unconverted.items())
        why = f"has an untied form: {left}" if left else "owns a matrix that a signal passes through"
        raise UntieError(f"nothing to untie in {type(model).__name__}: no module in it {why}")
    return Survey(convertible, unconverted)


def is_patched(module: nn.Module, model: nn.Module | None = None) -> bool:
    """Whether this very object has another forward pass than its class, or a W that B could not follow."""
    # B goes through weight_norm beside W; spectral_norm, say, keeps vectors that belong to W alone.
    # What a hook of the model itself makes is made before its forward pass begins, and so out of sight.
    made = module if isinstance(module, nn.utils.parametrize.ParametrizationList) else ()
    ends = ("_orig", "_v") if module is model else ("_orig",)
    renamed = any(n.endswith(ends) and n.rpartition("_")[0] in vars(module) for n in module._parameters)
    return renamed or "forward" in vars(module) or any(type(part).__name__ != "_WeightNorm" for part in made)


def untie_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[FeedbackModule]:
    """Turn layers, and the modules that hold them, into untied ones; yield each when it is done.

    Args:
        model: The model.
        layers: Paths to the layers that get feedback weights.
    """
    weights = {id(layer): list_weights(name, layer) for name, layer in layers.items()}
    quiet = quiet_modules(model)
    for module in list(model.modules()):
        below = [weight for part in module.modules() for weight in weights.get(id(part), ())]
        own = weights.get(id(module), [])
        if own or (below and not is_patched(module) and (module is model or id(module) not in quiet)):
            yield _untie_module(module, Untied(own, below, is_quiet=id(module) in quiet))


def _untie_module(module: nn.Module, untied: Untied) -> FeedbackModule:
    module.__class__ = untied_type(type(module), bool(untied.weights))
    assert isinstance(module, FeedbackModule)
    module.untied = untied
    try:
        for weight in untied.weights:
            module.register_parameter(weight.feedback_name, None)
    except BaseException:
        retie_module(module)
        raise
    return module


def retie_module(module: FeedbackModule) -> None:
    """Turn an untied module back into the plain one that it was."""
    for weight in module.untied.weights:
        if hasattr(module, weight.feedback_name):
            delattr(module, weight.feedback_name)
    del module.untied
    module.__class__ = module.plain_type  # type: ignore[assignment]


def send_back_sigma(model: nn.Module) -> list[SigmaBatchNorm]:
    """Turn a model's BatchNorm layers, in place, into ones that send back their scale alone.

    Raises:
        UntieError: The model has no BatchNorm layer, or one of a kind that cannot.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, (*kinds, nn.SyncBatchNorm))}
    if not norms:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise UntieError(f"batchnorm_feedback='sigma' needs a BatchNorm layer ({names}); leave it out here")
    refused = [f"{n!r} ({type(m).__name__})" for n, m in norms.items() if sigma_type(type(m)) is None]
    if refused:
        raise UntieError(
            f"batchnorm_feedback='sigma': {', '.join(refused)} have their own forward pass, which is more "
            "than BatchNorm; replace them by torch's, or leave batchnorm_feedback at 'autograd'"
        )
    for norm in norms.values():
        norm.__class__ = sigma_type(type(norm))  # type: ignore[assignment]
    return [norm for norm in norms.values() if isinstance(norm, SigmaBatchNorm)]


def retie_norm(norm: SigmaBatchNorm) -> None:
    """Turn such a layer back into the one that it was."""
    norm.__class__ = norm.plain_type  # type: ignore[assignment]
