"""A rule of one's own: Kolen-Pollack learning whose feedback synapses miss some of their updates.

feedbackpath compare --import examples/lossy_rule.py --data digits --model mlp --rules bp,kp,lossy-kp
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import feedbackpath as fp


@fp.register_rule
@dataclass(frozen=True)
class LossyKolenPollack(fp.KolenPollack):
    """Kolen-Pollack learning in which a synapse of B gets its update with probability ``arrives``.

    An update that arrives is divided by ``arrives``, so that the mean over steps is that of ``kp``.
    """

    name: ClassVar[str] = "lossy-kp"
    arrives: float = 0.5

    def gradients(
        self, weight: fp.UntiedWeight, product: torch.Tensor, context: fp.RuleContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of W and of B, made from the outer product of error and activity."""
        drawn = torch.empty_like(product).uniform_(generator=context.generator(weight, self.name))
        return product, product * (drawn < self.arrives) / self.arrives
