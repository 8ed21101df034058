"""Mirror mode on several devices: the same noise on each, or noise of its own and an average over all.

The same noise needs no traffic: estimates are equal because noise and W are. With noise of their own, D
devices give D times the samples; each estimate is averaged in one all-reduce, before B learns from it, and B
stays equal on all of them bit for bit.
"""

import torch

from feedbackpath.core.pytorch import has_processes
from feedbackpath.mirror.covariance import Estimate
from feedbackpath.mirror.settings import Mirror


def count_devices(settings: Mirror) -> int:
    """Return how many devices fire noise of their own: 1 where all fire the same, or there is only one."""
    return torch.distributed.get_world_size() if _is_averaged(settings) else 1


def own_rank(settings: Mirror) -> int:
    """Return this device's place among them: 0 where all fire the same."""
    return torch.distributed.get_rank() if _is_averaged(settings) else 0


def average_over_devices(found: Estimate) -> None:
    """Average what each device found, in place; every process of the job has to take part."""
    parts = (found.covariance, found.drive_answer, found.drive_power)
    together = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(together)
    together.div_(torch.distributed.get_world_size())
    means = torch.split(together, [part.numel() for part in parts])
    for part, mean in zip(parts, means, strict=True):
        part.copy_(mean.view(part.shape))


def _is_averaged(settings: Mirror) -> bool:
    return has_processes() and settings.across_devices == "averaged"
