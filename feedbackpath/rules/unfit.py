"""Why a model cannot be untied as it stands: asked before anything is changed."""

from collections.abc import Iterator

import torch
from torch import nn

from feedbackpath.core.layers import kind_of
from feedbackpath.core.modules import FeedbackModule
from feedbackpath.errors import UntieError


def refuse_unfit(model: nn.Module, batchnorm_feedback: str) -> None:
    """Refuse a model that cannot be untied as it stands, or a way that BatchNorm cannot send errors back.

    Raises:
        UntieError: Every reason and its remedy is named.
    """
    if not isinstance(model, nn.Module):
        raise UntieError(f"untie: {type(model).__name__} is not a model; pass a torch.nn.Module")
    if batchnorm_feedback not in ("autograd", "sigma"):
        raise UntieError(f"untie: batchnorm_feedback={batchnorm_feedback!r} is not one of autograd, sigma")
    faults = list(_find_faults(model))
    if faults:
        raise UntieError("; ".join(faults))


def _find_faults(model: nn.Module) -> Iterator[str]:
    """Say why a model cannot be untied as it stands, each time with the remedy."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or type(model).__name__ == "FullyShardedDataParallel":
        yield f"the model is wrapped in {type(model).__name__}: untie model.module first, then wrap"
        return
    if type(model).__name__ == "OptimizedModule" or getattr(model, "_compiled_call_impl", None) is not None:
        yield "the model is compiled: untie the plain model first, then compile"
        return
    if isinstance(model, torch.jit.ScriptModule):
        yield "the model is a TorchScript module, whose layers are fixed: untie the Python model"
        return
    for name, module in model.named_modules():
        yield from _find_faults_of(f"{name!r} ({type(module).__name__})", module)


def _find_faults_of(where: str, module: nn.Module) -> Iterator[str]:
    parameters = list(module.parameters(recurse=False))
    if isinstance(module, FeedbackModule):
        if module.untied.weights:
            yield f"{where} is untied already: call path.retie() first"
    elif any(nn.parameter.is_lazy(parameter) for parameter in parameters):
        yield f"{where} is lazy and has no weights yet: run one forward pass first"
    elif any(parameter.is_meta for parameter in parameters):
        yield f"{where} is on the meta device and has no values yet: load its weights first"
    elif any(parameter.is_complex() and parameter.dim() > 1 for parameter in parameters):
        yield f"{where} has complex weights, which have no untied form: split real and imaginary parts"
    elif any(hasattr(parameter, "full_tensor") for parameter in parameters):
        yield f"{where} is sharded (FSDP, tensor parallelism), which has no untied form; use DDP"
    else:
        for weight in kind_of(module).weights(module).values():
            if hasattr(module, weight):
                yield f"{where} has an attribute named {weight!r} already: rename it first"
