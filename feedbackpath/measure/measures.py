"""What can be measured of a feedback path: ``fp.FeedbackPath`` has all of it."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from feedbackpath.core.layers import UntiedWeight
from feedbackpath.measure import angles, deltas


class Measures:
    """Measures of an untied model: how well its feedback weights, errors and updates agree with backprop's.

    ``compute_loss`` runs the model forward on the same minibatch each time, and returns the loss. Gradients,
    running statistics and random numbers are left as they were.
    """

    model: nn.Module
    weights: Sequence[UntiedWeight]
    _refuse_retied: Callable[[], None]

    def matrix_angles(self) -> dict[str, float]:
        """Return each weight's angle between B and W, in degrees; B of another shape than W has none."""
        self._refuse_retied()
        return angles.matrix_angles(self.weights)

    def gains(self) -> dict[str, float]:
        """Return each weight's gain <B, W> / <W, W>: 1 when B has W's size along W."""
        self._refuse_retied()
        return angles.gains(self.weights)

    def delta_angles(self, compute_loss: Callable[[], Tensor]) -> dict[str, float]:
        """Return each layer's angle between its delta through B and through W, in degrees."""
        return {name: delta.angle_deg for name, delta in self.deltas(compute_loss).items()}

    def deltas(self, compute_loss: Callable[[], Tensor]) -> dict[str, deltas.Delta]:
        """Return each layer's delta angle with the angle of chance and delta's lengths.

        See `feedbackpath.measure.deltas.deltas`: an angle says nothing where errors vanish.
        """
        self._refuse_retied()
        return deltas.deltas(self.weights, self.model, compute_loss)

    def update_angles(self, compute_loss: Callable[[], Tensor]) -> dict[str, float]:
        """Return the angle of each parameter's gradient, and of the whole update, to backprop's, in degrees.

        See `feedbackpath.measure.deltas.update_angles`.
        """
        self._refuse_retied()
        return deltas.update_angles(self.weights, self.model, compute_loss)
