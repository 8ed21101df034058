"""The layers and small networks that tests run over: each a factory, the shapes of its inputs, and an id."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import feedbackpath as fp

PAPER_RULES = ("bp", "fa", "ss", "kp", "wm", "mirror-kp", "mirror-fa")
"""The rules that tests of whole networks run over; ``test_every_rule.py`` runs over all of them."""
COVERING_RULES = (*PAPER_RULES, "dfa")
"""The same where a rule may broadcast errors."""
EXACT_START = {"mirror-kp": {"start": "exact"}, "mirror-fa": {"start": "exact"}}
"""Settings of rules that mirror once, for tests of other things: noise takes seconds for it."""


def settings_that_start_at_once(rule: str) -> dict[str, Any]:
    """Return settings of a job by which a rule is exact in its start, where it mirrors once."""
    return {"rule_settings": {rule: EXACT_START[rule]}} if rule in EXACT_START else {}


def rule_that_starts_at_once(name: str | None) -> str | fp.Rule | None:
    """Return a rule, exact in its start where it mirrors once."""
    return fp.RULES[name](**EXACT_START[name]) if name in EXACT_START else name


@dataclass(frozen=True)
class Problem:
    """One module and how to run it.

    ``outputs`` and ``gradients`` are pure: dropout and the loss draw the same random numbers every time.
    """

    id: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Any] = lambda module, x: module(x)

    def build(self, dtype=torch.float64):
        torch.manual_seed(1)
        return self.make().to(dtype)

    def inputs(self, dtype=torch.float64, requires_grad=True):
        generator = torch.Generator().manual_seed(2)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return [x.to(dtype).requires_grad_(requires_grad) for x in drawn]

    def outputs(self, module, inputs) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        result = self.call(module, *inputs)
        return (result,) if isinstance(result, Tensor) else tuple(x for x in result if x is not None)

    def loss(self, module, inputs):
        generator = torch.Generator().manual_seed(4)
        outputs = self.outputs(module, inputs)
        return sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in outputs)

    def gradients(self, module) -> dict[str, Tensor]:
        """Return the gradients of a random weighting of the outputs, for inputs and parameters by name."""
        inputs = self.inputs(next(module.parameters()).dtype)
        named = dict(module.named_parameters()) | {f"input{i}": x for i, x in enumerate(inputs)}
        wanted = {name: x for name, x in named.items() if x.requires_grad}
        generator = torch.Generator().manual_seed(4)
        outputs = self.outputs(module, inputs)
        weightings = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
        found = torch.autograd.grad(outputs, list(wanted.values()), weightings)
        return dict(zip(wanted, found, strict=True))


def make_linear_problems():
    return [
        Problem(f"Linear-{len(shape)}d-{'bias' if bias else 'no_bias'}",
                lambda bias=bias: nn.Linear(5, 4, bias=bias), (shape,))
        for shape in ((5,), (3, 5), (2, 3, 5)) for bias in (True, False)
    ]  # fmt: skip


SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 5)}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "strided_padded": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "pointwise": {"kernel_size": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same_even": {"padding": "same", "kernel_size": 2},
    "same_even_dilated": {"padding": "same", "kernel_size": 2, "dilation": 3},
    "same_even_circular": {"padding": "same", "kernel_size": 2, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate_strided": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular_grouped": {"padding": 1, "padding_mode": "circular", "groups": 2},
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "strided_padded": {"stride": 2, "padding": 1},
    "output_padding": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2, "stride": 2},
}


def make_convolution(kind, settings):
    return kind(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | settings)


def make_convolution_problems():
    problems = []
    for dims, size in SIZES.items():
        forward, transposed = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        for kind, variants in ((forward, CONVOLUTIONS), (transposed, TRANSPOSED)):
            for variant, settings in variants.items():
                make = lambda kind=kind, settings=settings: make_convolution(kind, settings)  # noqa: E731
                problems.append(Problem(f"{kind.__name__}-{variant}", make, ((2, 4, *size),)))
            unbatched = lambda kind=kind: make_convolution(kind, {})  # noqa: E731
            problems.append(Problem(f"{kind.__name__}-unbatched", unbatched, ((4, *size),)))
    rectangular = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}
    return [
        *problems,
        Problem("Conv2d-rectangular", lambda: make_convolution(nn.Conv2d, rectangular), ((2, 4, 7, 6),)),
        Problem(
            "ConvTranspose2d-output_size",
            lambda: make_convolution(nn.ConvTranspose2d, {"stride": 2}),
            ((2, 4, 3, 3),),
            lambda layer, x: layer(x, output_size=[8, 7]),
        ),
    ]


LOCAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "strided_padded": {"stride": 2, "padding": 1},
    "grouped": {"groups": 2},
    "rectangular_grouped": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "groups": 2},
}


def make_local(settings):
    return fp.LocallyConnected2d(4, 6, (5, 4), **({"kernel_size": 3} | settings))


LOCALS = [
    Problem(f"LocallyConnected2d-{id}", lambda s=settings: make_local(s), ((2, 4, 5, 4),))
    for id, settings in LOCAL.items()
]


LENGTH, KEYS, BATCH, WIDTH = 5, 6, 3, 8
SELF, CROSS = ((LENGTH, BATCH, WIDTH),), ((LENGTH, BATCH, WIDTH), (KEYS, BATCH, WIDTH))
ALL_DIFFERENT = (*CROSS, (KEYS, BATCH, WIDTH))
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()
FLOAT_MASK = torch.linspace(-1, 1, BATCH * 2 * LENGTH * LENGTH).view(BATCH * 2, LENGTH, LENGTH).double()
PADDING = torch.arange(LENGTH) >= torch.tensor([[3], [4], [5]])


def make_attention(id, shapes=SELF, call=None, **settings):
    """Call with one input (self-attention), two (key is value) or three."""
    keywords = call or {}

    def run(layer, query, *rest):
        key, value = (rest * 2)[:2] if rest else (query, query)
        return layer(query, key, value, **keywords)

    return Problem(
        f"MultiheadAttention-{id}", lambda: nn.MultiheadAttention(WIDTH, 2, **settings), shapes, run
    )


def make_attention_problems():
    batch_first = tuple((shape[1], shape[0], shape[2]) for shape in CROSS)
    unbatched = tuple((shape[0], shape[2]) for shape in CROSS)
    other_widths = (CROSS[0], (KEYS, BATCH, 7), (KEYS, BATCH, 6))
    causal = {"attn_mask": CAUSAL, "is_causal": True}
    return [
        make_attention("self"),
        make_attention("encoder_decoder", CROSS),
        make_attention("three_inputs", ALL_DIFFERENT),
        make_attention("kdim_vdim", other_widths, kdim=7, vdim=6),
        make_attention("kdim_vdim_no_bias", other_widths, kdim=7, vdim=6, bias=False),
        make_attention("bias_kv", CROSS, add_bias_kv=True),
        make_attention("zero_attn", CROSS, add_zero_attn=True),
        make_attention("bias_kv_zero_attn_masked", SELF, {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
                       add_bias_kv=True, add_zero_attn=True),
        make_attention("bool_mask", SELF, {"attn_mask": CAUSAL}),
        make_attention("bool_mask_no_weights", SELF, {"attn_mask": CAUSAL, "need_weights": False}),
        make_attention("float_mask_each_head", SELF, {"attn_mask": FLOAT_MASK}),
        make_attention("float_mask_no_weights", SELF, {"attn_mask": FLOAT_MASK, "need_weights": False}),
        make_attention("key_padding", SELF, {"key_padding_mask": PADDING}),
        make_attention("key_padding_no_weights", SELF, {"key_padding_mask": PADDING, "need_weights": False}),
        make_attention("causal", SELF, causal),
        make_attention("causal_no_weights", SELF, causal | {"need_weights": False}),
        make_attention("causal_key_padding", SELF, causal | {"key_padding_mask": PADDING}),
        make_attention("batch_first", batch_first, batch_first=True),
        make_attention("batch_first_self", batch_first[:1], {"need_weights": False}, batch_first=True),
        make_attention("unbatched", unbatched),
        make_attention("unbatched_key_padding", ((LENGTH, WIDTH),), {"key_padding_mask": PADDING[0]}),
        make_attention("no_bias", CROSS, bias=False),
        make_attention("weights_of_each_head", CROSS, {"average_attn_weights": False}),
        make_attention("dropout", CROSS, dropout=0.5),
    ]  # fmt: skip


# One layer of each kind, to mirror: what goes in makes no difference.
KINDS = [
    Problem("linear", lambda: nn.Linear(30, 20), ((30,),)),
    *(
        Problem(f"{kind.__name__}-{id}", lambda kind=kind, s=settings: make_convolution(kind, s), ((1,),))
        for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
        for id, settings in {"plain": {}, "grouped": {"groups": 2}, "strided_dilated_padded": {
            "stride": 2, "dilation": 2, "padding": 1}}.items()
    ),
]  # fmt: skip
PLAIN_LAYERS = make_linear_problems() + make_convolution_problems() + LOCALS
ATTENTIONS = make_attention_problems()
LAYERS = PLAIN_LAYERS + ATTENTIONS


def make_shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3))


def make_tied():
    """Make two layers with one weight between them."""
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    network[2].weight = network[0].weight
    return network


def make_mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))


def make_nested():
    block = nn.Sequential(nn.Linear(6, 7), nn.Sequential(nn.Tanh(), nn.Linear(7, 6)))
    return nn.Sequential(block, nn.ReLU(), nn.Linear(6, 3))


def make_convnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def make_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MLP = Problem("mlp", make_mlp, ((5, 6),))
CONVNET = Problem("convnet", make_convnet, ((4, 3, 6, 6),))
ENCODER = Problem("encoder", make_encoder, ((3, 5, 8),))
NETWORKS = [
    Problem("root", lambda: nn.Linear(6, 3), ((5, 6),)),
    MLP,
    Problem("nested", make_nested, ((5, 6),)),
    Problem("shared", make_shared, ((5, 6),)),
    Problem("tied", make_tied, ((5, 6),)),
    CONVNET,
    ENCODER,
]


def by_id(problem):
    return problem.id
