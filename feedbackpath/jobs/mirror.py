"""Plan mirror mode on a network."""

import torch

from feedbackpath.bench.workloads import find_workload
from feedbackpath.mirror import LayerPlan, Mirror
from feedbackpath.models import build_model
from feedbackpath.path import untie
from feedbackpath.rules import WeightMirror

PROBED = 2  # samples that are run: what a step computes grows with its batch


def plan_of_model(model: str, settings: Mirror, batch_size: int | None) -> tuple[list[LayerPlan], int]:
    """Return the plan for a network, and the size of the minibatch that it is for.

    Args:
        model: Name of the network.
        settings: How to mirror.
        batch_size: Samples of a training step; the benchmark's own where not given.

    Raises:
        UserError: There is no such network.
    """
    workload = find_workload(model)
    size = batch_size or workload.batch_size
    torch.manual_seed(0)
    network = build_model(model, sample_shape=workload.sample_shape, num_classes=workload.num_classes)
    path = untie(network, WeightMirror(settings))
    x = torch.randn(PROBED, *workload.sample_shape)
    return path.plan(lambda: network(x).sum(), scale=size / PROBED), size
