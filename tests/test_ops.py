"""The two operations against plain loops, against autograd for any geometry, and what they keep."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from feedbackpath import ops
from feedbackpath.ops import ConvGeometry


def draw(*shape, requires_grad=False):
    return torch.randn(shape, dtype=torch.float64).requires_grad_(requires_grad)


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def run_backward(operation, x, weight, feedback, bias, *rest):
    """Return output, delta, and the gradients of x, W, B and bias."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, feedback, bias)]
    output = operation(*inputs, *rest)
    delta = torch.randn_like(output)
    return output.detach(), delta, *torch.autograd.grad(output, inputs, delta)


def test_linear_matches_loops():
    x, weight, feedback, bias = draw(6, 5), draw(4, 5), draw(4, 5), draw(4)
    output, delta, *gradients = run_backward(ops.linear, x, weight, feedback, bias)
    y, grad_x, grad_weight = reference.linear(x, weight, feedback, delta)
    assert_close(output, y + bias)
    assert_close(gradients, [grad_x, grad_weight, grad_weight, delta.sum(0)])


GEOMETRIES = [
    ((4, 6, 3), (9,), ConvGeometry((1,), (0,), (1,), False, (0,), 1)),
    ((4, 6, 3), (9,), ConvGeometry((2,), (1,), (2,), False, (0,), 2)),
    ((4, 6, 3), (5,), ConvGeometry((2,), (1,), (1,), True, (1,), 2)),
    ((4, 6, 3, 2), (6, 5), ConvGeometry((2, 1), (1, 0), (1, 2), False, (0, 0), 1)),
    ((4, 8, 2, 3), (5, 5), ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 4)),
    ((4, 6, 3, 2), (3, 4), ConvGeometry((2, 1), (1, 0), (2, 1), True, (1, 0), 2)),
    ((2, 2, 2, 2, 3), (4, 3, 4), ConvGeometry((2, 1, 1), (1, 0, 1), (1, 1, 1), False, (0, 0, 0), 1)),
    ((2, 4, 2, 2, 2), (3, 2, 2), ConvGeometry((2, 1, 2), (0, 0, 1), (1, 1, 1), True, (0, 0, 1), 2)),
]


@pytest.mark.parametrize(("channels", "size", "geometry"), GEOMETRIES, ids=str)
def test_convolution_matches_loops(channels, size, geometry):
    inputs, outputs, *kernel = channels
    first, second = (inputs, outputs) if geometry.transposed else (outputs, inputs)
    shape = (first, second // geometry.groups, *kernel)
    x, weight, feedback, bias = draw(2, inputs, *size), draw(*shape), draw(*shape), draw(outputs)
    output, delta, *gradients = run_backward(ops.convolution, x, weight, feedback, bias, geometry)
    y, grad_x, grad_weight = reference.convolution(x, weight, feedback, delta, geometry)
    assert_close(output, y + bias.view(1, -1, *(1,) * len(size)))
    assert_close(gradients, [grad_x, grad_weight, grad_weight, delta.transpose(0, 1).flatten(1).sum(1)])


@st.composite
def geometries(draw):
    """Draw (input shape, weight shape, geometry) of a convolution in one or two dimensions."""
    dims, groups, transposed = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.booleans())

    def numbers(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    stride, dilation, kernel, padding = numbers(1, 3), numbers(1, 3), numbers(1, 3), numbers(0, 2)
    extra = tuple(min(draw(st.integers(0, 2)), s - 1) for s in stride) if transposed else (0,) * dims
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True))
    if transposed:  # large enough for its padding not to eat it up
        size = tuple(n + 2 * p for n, p in zip(size, padding, strict=True))
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    geometry = ConvGeometry(stride, padding, dilation, transposed, extra, groups)
    return (draw(st.integers(1, 2)), inputs, *size), (first, second // groups, *kernel), geometry


@settings(max_examples=40, deadline=None, derandomize=True)
@given(geometries())
def test_convolution_of_any_geometry_with_feedback_equal_to_weight_matches_autograd(problem):
    torch.manual_seed(0)
    input_shape, weight_shape, geometry = problem
    x, weight = draw(*input_shape, requires_grad=True), draw(*weight_shape, requires_grad=True)
    expected = torch.convolution(x, weight, None, *geometry)
    ours = ops.convolution(x, weight, weight.detach().clone(), None, geometry)
    assert torch.equal(ours, expected)
    delta = torch.randn_like(expected)
    assert_close(
        torch.autograd.grad(ours, [x, weight], delta), torch.autograd.grad(expected, [x, weight], delta)
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 5), st.integers(1, 5))
def test_linear_of_any_shape_with_feedback_equal_to_weight_matches_autograd(batch, inputs, outputs):
    torch.manual_seed(0)
    x, weight = draw(*batch, inputs, requires_grad=True), draw(outputs, inputs, requires_grad=True)
    expected, ours = F.linear(x, weight), ops.linear(x, weight, weight.detach().clone())
    assert torch.equal(ours, expected)
    delta = torch.randn_like(expected)
    assert_close(
        torch.autograd.grad(ours, [x, weight], delta), torch.autograd.grad(expected, [x, weight], delta)
    )


OPERATIONS = {
    "linear": (ops.linear, (3, 5), (4, 5), ()),
    "convolution": (ops.convolution, (3, 4, 9), (6, 4, 3), (GEOMETRIES[0][2],)),
}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_the_forward_weight_is_not_kept_for_the_backward_pass(kind):
    operation, input_shape, weight_shape, rest = OPERATIONS[kind]
    tensors = [draw(*input_shape), draw(*weight_shape), draw(*weight_shape), draw(weight_shape[0])]
    x, weight, feedback, bias = (tensor.requires_grad_() for tensor in tensors)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        operation(x, weight, feedback, bias, *rest)
    assert weight.data_ptr() not in kept
    assert {x.data_ptr(), feedback.data_ptr()} <= set(kept)


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("asking", range(1, 16))
def test_only_what_asks_gets_a_gradient(kind, asking):
    operation, input_shape, weight_shape, rest = OPERATIONS[kind]
    tensors = [draw(*input_shape), draw(*weight_shape), draw(*weight_shape), draw(weight_shape[0])]
    expected = run_backward(operation, *tensors, *rest)
    for position, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(asking >> position & 1))
    operation(*tensors, *rest).backward(expected[1])
    for tensor, gradient in zip(tensors, expected[2:], strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_gradients_of_each_sample_go_through_feedback_under_torch_func(kind):
    operation, input_shape, weight_shape, rest = OPERATIONS[kind]
    weight, feedback = draw(*weight_shape), draw(*weight_shape)
    samples = draw(7, *input_shape)

    def loss(x):
        return operation(x, weight, feedback, None, *rest).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss))(samples)
    for x, found in zip(samples, ours, strict=True):
        x = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        assert_close(found, expected)


def test_a_padded_position_gets_no_signal():
    """A hand-worked case: of three kernel places only the middle one meets the single input."""
    x = torch.ones(1, 1, 1, requires_grad=True)
    feedback = torch.tensor([[[1.0, 10.0, 100.0]]])
    geometry = ConvGeometry((1,), (1,), (1,), False, (0,), 1)
    ops.convolution(x, torch.zeros(1, 1, 3), feedback, None, geometry).sum().backward()
    assert math.isclose(x.grad.item(), 10.0)


def test_a_tensor_that_outlived_a_transform_passes_its_error_on():
    """What torch.func.vjp has left behind is an activity like any other, to plain operations too."""
    kept = []
    x, feedback = torch.ones(1, 2, requires_grad=True), torch.randn(3, 2)
    torch.func.vjp(lambda x: kept.append(2.0 * x) or kept[0].sum(), x)
    ops.linear(kept[0], torch.randn(3, 2), feedback).sum().backward()
    torch.testing.assert_close(x.grad, 2.0 * feedback.sum(0, keepdim=True))
