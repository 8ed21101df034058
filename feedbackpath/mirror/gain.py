"""How large B is beside W, told from the mirror's own signals, and a warning where that is far from 1.

Angles do not show it, yet each layer scales the errors that it sends back by its gain ``<B, W> / <W, W>``.
A pass of mirror mode tells both products without a look at W: its noise is independent of the B that earlier
passes left, and a neuron's drive z = W x has the variance sigma^2 |w|^2::

    <B, W>  ~  sum of <b, cov> / (sigma^2 s)  over neurons        <W, W>  ~  sum of mean z^2 / sigma^2
"""

import math

from feedbackpath.mirror import fields
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.covariance import Estimate
from feedbackpath.mirror.designs import RELU_SPREAD
from feedbackpath.mirror.devices import count_devices
from feedbackpath.mirror.settings import Mirror

LOWEST_GAIN, HIGHEST_GAIN = 0.5, 2.0
TOLERANCE = 0.1  # beyond them: the paper's settings come to exactly 2 in linear layers
STANDARD_ERRORS = 2.0  # of one pass, on top: small layers scatter, though less, for B remembers many passes


def estimate_gain(found: Estimate) -> float:
    """Return the gain of the B that earlier passes left; not a number where no neuron answers.

    Args:
        found: What the present pass found, from which B has not learnt yet. Neurons that do not answer tell
            nothing and are left out.
    """
    weight, answers = found.weight, ~found.is_dead
    feedback, covariance = (
        fields.as_matrix(x, weight) for x in (weight.feedback.detach().to(found.covariance), found.covariance)
    )
    products = (feedback * covariance).sum(2, keepdim=True) / fields.per_neuron(found.slopes, weight)
    product = products[fields.per_neuron(answers, weight)].sum()
    square = found.drive_power[answers].sum() / found.num_samples
    return float(product / square)  # both still hold sigma^2


def check_gain(context: MirrorContext, found: Estimate, settings: Mirror) -> None:
    """Warn once of a layer whose gain lies outside [0.5, 2] by more than chance explains.

    Looked at once a memory, when B has settled; the ``"calibrated"`` reading settles at 1 and is not.

    Args:
        context: What mirror mode knows of the path.
        found: What the present pass found, from which B has not learnt yet.
        settings: How the layer is mirrored.

    Warns:
        MirrorWarning: Names the layer, its gain, and settings that would bring it to 1.
    """
    name = found.weight.name
    is_settled = (context.passes.get(name, 0) + 1) % settings.memory_passes == 0
    if settings.reading == "calibrated" or not is_settled:
        return
    gain = estimate_gain(found)
    margin = 1.0 + TOLERANCE + STANDARD_ERRORS * _scatter(found, settings)
    if gain < LOWEST_GAIN / margin or gain > HIGHEST_GAIN * margin:
        context.warn_once(
            "gain",
            name,
            f"the gain of {name!r} is {gain:.2g}, outside [{LOWEST_GAIN:g}, {HIGHEST_GAIN:g}], and scales "
            "the errors that it sends back; use the 'calibrated' reading, which settles at 1, or "
            f"{_remedy(gain, settings)}",
        )


def _scatter(found: Estimate, settings: Mirror) -> float:
    """Return the gain's relative standard error: the part along W of what a pass leaves to chance."""
    inputs = fields.inputs_in_mirror_mode(found.weight, settings.field)
    samples = settings.total_samples_for(inputs, count_devices(settings))
    variance = settings.design.relative_variance(inputs, samples, RELU_SPREAD)
    return math.sqrt(variance / found.weight.weight.numel())


def _remedy(gain: float, settings: Mirror) -> str:
    """Return what would bring the gain to 1 in the reading as it is."""
    if settings.reading == "printed":
        now = settings.rate / settings.decay
        return f"eta/lambda = {now / gain:.2g} instead of {now:.2g} (rate, decay)"
    if settings.reading == "inside":
        return f"lambda = {settings.decay * gain:.2g} instead of {settings.decay:.2g} (decay)"
    return f"a B that begins {1.0 / gain:.2g} times as large: 'scaled' keeps its norm"
