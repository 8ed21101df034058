"""Slow, plain forms of what the package computes fast, written from the paper's equations."""

import itertools
import math

import torch


def linear(x, weight, feedback, delta):
    """Return output, gradient for x (equation 3) and for W (equation 4), number by number."""
    outputs, inputs = weight.shape
    y, grad_x, grad_weight = torch.zeros_like(delta), torch.zeros_like(x), torch.zeros_like(weight)
    for n, i, j in itertools.product(range(len(x)), range(outputs), range(inputs)):
        y[n, i] += weight[i, j] * x[n, j]
        grad_x[n, j] += feedback[i, j] * delta[n, i]
        grad_weight[i, j] += delta[n, i] * x[n, j]
    return y, grad_x, grad_weight


def connections(wide_size, narrow_size, kernel, geometry):
    """Yield each (wide position, narrow position, kernel position) that a convolution connects."""
    for narrow in itertools.product(*map(range, narrow_size)):
        for offset in itertools.product(*map(range, kernel)):
            wide = tuple(
                n * stride - padding + k * dilation
                for n, k, stride, padding, dilation in zip(
                    narrow, offset, geometry.stride, geometry.padding, geometry.dilation, strict=True
                )
            )
            if all(0 <= position < size for position, size in zip(wide, wide_size, strict=True)):
                yield wide, narrow, offset


def convolution(x, weight, feedback, delta, geometry):
    """Return output, gradient for x and gradient for W, connection by connection.

    A convolution goes from the wide map to the narrow one, a transposed convolution back.
    """
    y, grad_x, grad_weight = torch.zeros_like(delta), torch.zeros_like(x), torch.zeros_like(weight)
    inputs, outputs = x.shape[1] // geometry.groups, delta.shape[1] // geometry.groups
    rows = weight.shape[0] // geometry.groups
    sizes = (delta.shape[2:], x.shape[2:]) if geometry.transposed else (x.shape[2:], delta.shape[2:])
    for wide, narrow, offset in connections(*sizes, weight.shape[2:], geometry):
        source, target = (narrow, wide) if geometry.transposed else (wide, narrow)
        for group in range(geometry.groups):
            read = (slice(None), slice(group * inputs, (group + 1) * inputs), *source)
            write = (slice(None), slice(group * outputs, (group + 1) * outputs), *target)
            chosen = (slice(group * rows, (group + 1) * rows), slice(None), *offset)
            w, b = (weight[chosen].T, feedback[chosen].T) if geometry.transposed else (
                weight[chosen], feedback[chosen])  # fmt: skip
            y[write] += x[read] @ w.T
            grad_x[read] += delta[write] @ b
            product = delta[write].T @ x[read]
            grad_weight[chosen] += product.T if geometry.transposed else product
    return y, grad_x, grad_weight


def linear_covariance(noise, weight, activation):
    """Return the covariance of the answer with the noise, over samples one by one."""
    answers = [activation(weight @ x) for x in noise]
    mean = sum(answers) / len(noise)
    return sum(torch.outer(y - mean, x) for x, y in zip(noise, answers, strict=True)) / (len(noise) - 1)


def convolution_covariance(noise, weight, activation, geometry, output_shape):
    """Return the covariance over examples and positions (Appendix D.2), for each weight over its own pairs.

    Each neuron, at its own position, answers about its mean over the examples.
    """
    nothing = torch.zeros(output_shape, dtype=noise.dtype)
    drive, _, _ = convolution(noise, weight, weight, nothing, geometry)
    answer = activation(drive)
    mean = sum(answer) / len(answer)
    _, _, products = convolution(noise, weight, weight, answer - mean, geometry)
    ones = torch.ones_like(noise), torch.ones(output_shape, dtype=noise.dtype)
    _, _, pairs = convolution(ones[0], weight, weight, ones[1], geometry)
    return products / pairs * len(noise) / (len(noise) - 1)


def expected_covariance(weight, activation, sigma):
    """Return sigma^2 E[phi'(z)] W (equation 11), each neuron's slope by integrating over its own z ~ N.

    E[phi'(z)] = E[phi(z) z] / var z, so no derivative is needed; the integral is a fine Riemann sum.
    """
    z = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    spread = sigma * weight.flatten(1).norm(dim=1)
    slopes = torch.stack([(activation(s * z) * z * density).sum() / s for s in spread])
    return sigma**2 * slopes.view(-1, *(1,) * (weight.dim() - 1)) * weight


def kolen_pollack_step(x, target, weights, feedbacks, lr, decay):
    """Return W and B of a two-layer ReLU network after one step on half the squared error, equations 1-18."""
    (w1, w2), (b1, b2) = weights, feedbacks
    z1 = torch.stack([w1 @ sample for sample in x])
    y1 = z1.clamp(min=0)
    y2 = torch.stack([w2 @ sample for sample in y1])
    delta2 = y2 - target
    delta1 = torch.stack([(b2.T @ delta) * (z > 0) for delta, z in zip(delta2, z1, strict=True)])
    change1 = sum(torch.outer(delta, sample) for delta, sample in zip(delta1, x, strict=True))
    change2 = sum(torch.outer(delta, sample) for delta, sample in zip(delta2, y1, strict=True))
    new_weights = [w - lr * (change + decay * w) for w, change in ((w1, change1), (w2, change2))]
    new_feedbacks = [b - lr * (change + decay * b) for b, change in ((b1, change1), (b2, change2))]
    return new_weights, new_feedbacks


def gap_sizes(optimizer, steps, lr, decay, momentum=0.9):
    """Return how much of W - B is left after so many steps: a recurrence of its own, free of any data."""
    gap, velocity = 1.0, 0.0
    for _ in range(steps):
        pull = decay * gap
        velocity = momentum * velocity + pull
        gap -= (
            lr
            * {"sgd": pull, "adamw": pull, "momentum": velocity, "nesterov": pull + momentum * velocity}[
                optimizer
            ]
        )
    return gap


def angle_deg(one, other):
    """Return the angle between two tensors by the arc cosine."""
    u, v = one.double().flatten(), other.double().flatten()
    return math.degrees(math.acos(min(1.0, (u @ v / (u.norm() * v.norm())).item())))
