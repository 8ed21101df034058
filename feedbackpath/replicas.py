"""Kolen-Pollack on several devices: the outer product is reduced once, for W, and handed to B.

W and B have the same gradient (Akrout et al. 2019, equations 16-18), so that DistributedDataParallel, which
averages gradients over the replicas, has to send it only once. B is left out of its traffic, and takes over
W's gradient when that has been averaged. Every replica draws the same B from its seed: no B is ever sent.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from feedbackpath import ops
from feedbackpath.layers import UntiedWeight
from feedbackpath.mirror.devices import has_processes

IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel asks its module for


class SharedReduction:
    """Keeps B out of DistributedDataParallel's traffic, and gives it W's gradient after each backward pass.

    Args:
        model: The model that will be wrapped.
        weights: Untied weights whose B gets W's gradient, each parameter once.
    """

    def __init__(self, model: nn.Module, weights: Sequence[UntiedWeight]) -> None:
        self._model = model
        self._before = getattr(model, IGNORED, None)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        left_out = [names[id(weight.feedback)] for weight in weights]
        setattr(model, IGNORED, [*(self._before or ()), *left_out])
        self._hooks = [_watch(weight) for weight in weights]

    def undo(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        if self._before is None:
            delattr(self._model, IGNORED)
        else:
            setattr(self._model, IGNORED, self._before)


def _watch(weight: UntiedWeight) -> RemovableHandle:
    """Hand the average over whenever W has got a gradient, and it has been averaged."""

    @torch.no_grad()
    def hand_over() -> None:
        gradient, own = weight.weight.grad, weight.feedback.grad
        if gradient is None or own is None:
            return
        if gradient.untyped_storage().nbytes() == gradient.nbytes:
            weight.feedback.grad = ops.share(gradient)
        else:  # a part of what is sent at once: all of that would be kept
            own.copy_(gradient)

    def hand_over_later(_: Tensor) -> None:
        if has_processes():
            queue = torch.autograd.Variable._execution_engine.queue_callback
            # DistributedDataParallel queues its own end, perhaps after this: queueing anew goes behind it.
            queue(partial(queue, hand_over))

    return weight.weight.register_post_accumulate_grad_hook(hand_over_later)  # type: ignore[no-any-return,no-untyped-call]
