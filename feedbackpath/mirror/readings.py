"""The reading: what B makes of what noise told of W (Akrout et al. 2019, Algorithm 1; ``Mirror.reading``)."""

import torch

from feedbackpath.errors import RuleError
from feedbackpath.mirror import fields
from feedbackpath.mirror.context import MirrorContext
from feedbackpath.mirror.estimate import Estimate
from feedbackpath.mirror.settings import Mirror, passes_to_fill

TELLING_SAMPLES = 32  # a neuron that answers to none of so many is not silent by chance
LOWEST_GAIN, HIGHEST_GAIN = 0.5, 2.0
TOLERANCE = 1.25  # beyond them: the paper's settings come to exactly 2 in linear layers, and passes scatter


def learn(context: MirrorContext, found: Estimate, settings: Mirror, share: float | None = None) -> None:
    """Let one B learn from what a pass found, and count the pass.

    With s each neuron's mean slope, d = ``forgetting``, eta = ``rate`` and lambda = ``decay``::

        calibrated    B <- (1 - d) B + d cov / (sigma^2 s)       settles at W
        inside        B <- B + eta (cov - lambda B)              settles at sigma^2 s / lambda times W
        printed       B <- (1 - lambda) B + eta cov              settles at sigma^2 s eta / lambda times W
        scaled        B <- B + eta cov, then back to its norm    settles in the direction of W

    Args:
        context: What mirror mode knows of the path.
        found: What noise told of W. It is used up: its products are worked on in place.
        settings: Which reading, and its numbers.
        share: d of ``"calibrated"``; None: ``forgetting``, and at first the pass's share of all samples so
            far, until that falls to ``forgetting``: a plain average.

    Raises:
        RuleError: The activation made of finite drives what is not finite. B is as it was.
    """
    weight, feedback = found.weight, found.weight.feedback.detach()
    if not found.drive_answer.isfinite().all() and found.drive_power.isfinite().all():
        raise RuleError(
            f"mirror mode: the activation of {weight.name!r} returns NaN or infinity for noise of deviation "
            f"{settings.deviation:g}; give another one by untie(..., activations=...), or a smaller sigma"
        )
    passes = context.passes.get(weight.name, 0)
    full = settings.share_for(fields.inputs_of(weight), found.effective_samples or found.num_samples)
    if settings.reading != "calibrated" and (passes + 1) % passes_to_fill(full) == 0:
        _check_gain(context, found, settings)
    if settings.reading == "calibrated":
        so_far = context.count_samples(found)
        if share is None:
            share = max(full, found.num_samples / so_far)
        _move_to_estimate(context, found, share)
    elif settings.reading == "scaled":
        norm = feedback.norm()
        feedback.add_(found.covariance, alpha=settings.rate).mul_(norm / feedback.norm())
    else:
        feedback.mul_(1.0 - full).add_(found.covariance, alpha=settings.rate)
    context.passes[weight.name] = passes + 1


def _move_to_estimate(context: MirrorContext, found: Estimate, share: float) -> None:
    """B <- (1 - d) B + d cov / (sigma^2 s). Neurons that did not answer keep the feedback weights they have.

    Each neuron remembers what its slope is taken from as long as its B remembers: a small minibatch tells
    little of a slope.
    """
    weight, feedback, silent = found.weight, found.weight.feedback.detach(), found.is_silent
    signals = torch.stack([found.drive_answer, found.drive_power]) / found.num_samples
    known = context.signals.get(weight.name)
    if known is not None and known.shape == signals.shape and share < 1.0:
        known = known.to(signals)
        signals = torch.where(silent, known, known.lerp(signals, share))
    context.signals[weight.name] = signals
    found.drive_answer, found.drive_power = signals
    estimate = found.at_gain_one().to(feedback.dtype)
    num_silent = int(silent.sum())
    if num_silent:
        estimate = torch.where(fields.per_neuron(silent, weight), feedback, estimate)
    feedback.lerp_(estimate, share)
    if num_silent and found.num_samples >= TELLING_SAMPLES:
        context.warn_once(
            "dead",
            weight.name,
            f"{num_silent} of {len(silent)} neurons of {weight.name!r} do not answer to noise; their B stays "
            "as it is (blocked biases or a larger sigma may help, unless something silences the layer)",
        )


def estimate_gain(found: Estimate) -> float:
    """Return the gain <B, W> / <W, W> of B before this pass; not a number where no neuron answers.

    Angles do not show it, yet each layer scales the errors that it sends back by it. A pass tells both
    products without a look at W: its noise is independent of the B that earlier passes left, and a neuron's
    drive z = W x has the variance sigma^2 |w|^2::

        <B, W>  ~  sum of <b, cov> / (sigma^2 s)  over neurons        <W, W>  ~  sum of mean z^2 / sigma^2

    Args:
        found: What the present pass found, from which B has not learnt yet. Neurons that do not answer tell
            nothing and are left out.
    """
    weight, answers = found.weight, ~found.is_silent
    told = weight.feedback.detach().to(found.products) * found.covariance
    told = told / fields.per_neuron(found.slopes, weight)
    product = torch.where(fields.per_neuron(answers, weight), told, 0.0).sum()
    square = found.drive_power[answers].sum() / torch.as_tensor(found.pairs).mean()
    return float(product / square)  # both still hold sigma^2


def _check_gain(context: MirrorContext, found: Estimate, settings: Mirror) -> None:
    """Warn once of a layer whose gain lies outside [0.5, 2] by more than chance explains."""
    gain = estimate_gain(found)
    if LOWEST_GAIN / TOLERANCE <= gain <= HIGHEST_GAIN * TOLERANCE or gain != gain:
        return
    if settings.reading == "printed":
        now = settings.rate / settings.decay
        remedy = f"eta/lambda = {now / gain:.2g} instead of {now:.2g} (rate, decay)"
    elif settings.reading == "inside":
        remedy = f"lambda = {settings.decay * gain:.2g} instead of {settings.decay:.2g} (decay)"
    else:
        remedy = f"a B that begins {1.0 / gain:.2g} times as large: 'scaled' keeps its norm"
    context.warn_once(
        "gain",
        found.weight.name,
        f"the gain of {found.weight.name!r} is {gain:.2g}, outside [{LOWEST_GAIN:g}, {HIGHEST_GAIN:g}], and "
        f"scales the errors that it sends back; use the 'calibrated' reading, which settles at 1, or "
        f"{remedy}",
    )
