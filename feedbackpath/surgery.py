"""Surgery: turn a model's layers into feedback layers in place, and back.

A layer's class is exchanged and ``feedback`` is added; nothing else of it changes, so that optimizers,
hooks, shared modules and references to the layer stay good, and the model itself may be a layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from feedbackpath import layers
from feedbackpath.attention import FeedbackMultiheadAttention
from feedbackpath.batchnorm import SIGMA_TYPES, SigmaBatchNorm
from feedbackpath.errors import UntieError
from feedbackpath.layers import FeedbackLayer, UntiedWeight

FEEDBACK_TYPES: dict[type[nn.Module], type[FeedbackLayer]] = {
    feedback_type.plain_type: feedback_type
    for feedback_type in (
        layers.FeedbackLinear,
        layers.FeedbackConv1d,
        layers.FeedbackConv2d,
        layers.FeedbackConv3d,
        layers.FeedbackConvTranspose1d,
        layers.FeedbackConvTranspose2d,
        layers.FeedbackConvTranspose3d,
        FeedbackMultiheadAttention,
    )
}
# They own weights, but no error signal goes back through a matrix of theirs: norms scale each neuron by its
# own number (declared in the docs), embeddings have no input to send an error to.
WITHOUT_FEEDBACK = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.Embedding, nn.EmbeddingBag, nn.PReLU,
)  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """What a model holds.

    Attributes:
        convertible: Layer paths to layers that can be untied; a shared layer appears once.
        unconverted: Paths and types of the layers whose weights have no untied form.
    """

    convertible: dict[str, nn.Module]
    unconverted: dict[str, str]


def survey(model: nn.Module) -> Survey:
    """Find what can be untied and what cannot.

    Raises:
        UntieError: The model cannot be untied as it stands; every reason and its remedy is named.
    """
    faults = list(_find_faults(model))
    if faults:
        raise UntieError("; ".join(faults))
    convertible = {name: module for name, module in model.named_modules() if _can_be_untied(module)}
    unconverted = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name not in convertible and _owns_matrices(module) and not isinstance(module, WITHOUT_FEEDBACK)
    }
    if not convertible:
        kinds = ", ".join(sorted(plain.__name__ for plain in FEEDBACK_TYPES))
        raise UntieError(f"nothing to untie in {type(model).__name__}: it has no layer of the kinds {kinds}")
    return Survey(convertible, unconverted)


def untie_layer(layer: nn.Module) -> FeedbackLayer:
    """Turn a plain layer into a feedback layer in place, its feedback weights absent (None) as yet."""
    plain = type(layer)
    base = _known_base(plain)
    assert base is not None
    feedback_type = FEEDBACK_TYPES[base]
    if plain is not base:
        feedback_type = type(f"Feedback{plain.__name__}", (feedback_type, plain), {"plain_type": plain})
    layer.__class__ = feedback_type
    untied = cast(FeedbackLayer, layer)
    for feedback_name in untied.untied_names().values():
        untied.register_parameter(feedback_name, None)
    return untied


def retie_layer(layer: FeedbackLayer) -> None:
    """Turn a feedback layer back into the plain layer that it was."""
    for feedback_name in layer.untied_names().values():
        delattr(layer, feedback_name)
    layer.__class__ = layer.plain_type  # type: ignore[assignment]


def send_back_sigma(model: nn.Module) -> list[SigmaBatchNorm]:
    """Turn a model's BatchNorm layers, in place, into ones that send back their scale alone.

    Raises:
        UntieError: The model has no BatchNorm layer of a kind that can.
    """
    norms = [module for module in model.modules() if type(module) in SIGMA_TYPES]
    if not norms:
        kinds = ", ".join(kind.__name__ for kind in SIGMA_TYPES)
        raise UntieError(f"batchnorm_feedback='sigma' needs a BatchNorm layer ({kinds}); leave it out here")
    for norm in norms:
        norm.__class__ = SIGMA_TYPES[type(norm)]
    return cast(list[SigmaBatchNorm], norms)


def retie_norm(norm: SigmaBatchNorm) -> None:
    """Turn such a layer back into torch's."""
    norm.__class__ = norm.plain_type  # type: ignore[assignment]


def list_weights(name: str, layer: FeedbackLayer) -> list[UntiedWeight]:
    """List a layer's untied weights; where there are several, each is named ``layer.weight_name``."""
    names = layer.untied_names()
    return [
        UntiedWeight(name if len(names) == 1 else f"{name}.{weight}".lstrip("."), layer, weight, feedback)
        for weight, feedback in names.items()
    ]


def _known_base(plain: type[nn.Module]) -> type[nn.Module] | None:
    """Return the torch layer class that a class is, or extends without a forward pass of its own."""
    for base in FEEDBACK_TYPES:
        if issubclass(plain, base):
            methods = ("forward", "_conv_forward", "__call__")
            keeps_forward = all(getattr(plain, name, None) is getattr(base, name, None) for name in methods)
            return base if keeps_forward else None
    return None


def _can_be_untied(module: nn.Module) -> bool:
    """Whether it is a known layer, and no one has put another forward pass on this very object."""
    is_patched = not vars(module).keys().isdisjoint(("forward", "_conv_forward"))
    return not is_patched and _known_base(type(module)) is not None


def _owns_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _find_faults(model: nn.Module) -> Iterator[str]:
    """Say why a model cannot be untied as it stands, each time with the remedy."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or (
        type(model).__name__ == "FullyShardedDataParallel"
    ):
        yield f"the model is wrapped in {type(model).__name__}: untie model.module first, then wrap"
        return
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        yield "the model is compiled: untie the plain model first, then compile"
        return
    if isinstance(model, torch.jit.ScriptModule):
        yield "the model is a TorchScript module, whose layers are fixed: untie the Python model"
        return
    for name, module in model.named_modules():
        where = f"{name!r} ({type(module).__name__})"
        if isinstance(module, FeedbackLayer):
            yield f"{where} is untied already: call path.retie() first"
        elif _has_parametrized_weight(module):
            yield (
                f"{where} computes its weight from other parameters (weight_norm, spectral_norm, "
                "parametrize): remove the parametrization first"
            )
        elif isinstance(module, tuple(FEEDBACK_TYPES)) and hasattr(module, "feedback"):
            yield f"{where} has an attribute named 'feedback' already: rename it first"
        elif any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            yield f"{where} is on the meta device and has no values yet: load its weights first"
        elif any(parameter.is_complex() for parameter in module.parameters(recurse=False)):
            yield f"{where} has complex weights, which have no untied form: split real and imaginary parts"
        elif any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            yield f"{where} is lazy and has no weights yet: run one forward pass first"


def _has_parametrized_weight(module: nn.Module) -> bool:
    if torch.nn.utils.parametrize.is_parametrized(module):
        return True
    own: dict[str, Any] = module._parameters
    return isinstance(module, tuple(FEEDBACK_TYPES)) and any(
        name.endswith(("weight_g", "weight_v", "weight_orig")) for name in own
    )
