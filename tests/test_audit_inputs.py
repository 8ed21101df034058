"""Audits of parameters that layers are called with: learned queries, latents and first states."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import feedbackpath as fp


class Queries(nn.Module):
    """A network with three learned queries; what it does with them is in ``mix``."""

    def __init__(self):
        super().__init__()
        self.inputs, self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.queries, self.norm = nn.Parameter(torch.randn(3, 6)), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.among = nn.MultiheadAttention(6, 2, batch_first=True)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 8, batch_first=True), 1)
        self.gru, self.cell = nn.GRU(6, 6, batch_first=True), nn.RNNCell(6, 6)
        self.first = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.inputs(x))))

    def mix(self, h: Tensor) -> Tensor:
        return h + self.layer(self.queries)


class Prepared(Queries):
    def mix(self, h):
        return h + self.layer(torch.tanh(self.norm(self.queries.clone())))


class Latents(Queries):  # as in Perceiver
    def mix(self, h):
        latents = self.queries.expand(len(h), -1, -1)
        latents = latents + self.attention(latents, h, h, need_weights=False)[0]
        return latents + self.among(latents, latents, latents)[0]


class Decoded(Queries):  # as in DETR
    def mix(self, h):
        return self.decoder(self.queries.unsqueeze(0).repeat(len(h), 1, 1), h)


class FirstState(Queries):
    def mix(self, h):
        return self.gru(h, self.first.expand(1, len(h), 6).contiguous())[0]


class FirstStateOfCell(Queries):
    def mix(self, h):
        return self.cell(h[:, 0], self.queries)


class Seeds(Queries):  # of convolutions
    def __init__(self):
        super().__init__()
        self.convolution, self.up = nn.Conv1d(3, 3, 3, padding=1, groups=3), nn.ConvTranspose1d(3, 3, 1)

    def mix(self, h):
        return h + self.up(self.convolution(self.queries[None]))


class AlsoMatrix(Queries):
    """The queries are asked, and multiply a signal too."""

    def mix(self, h):
        return F.linear(h, self.layer(self.queries)) @ self.queries


class MadeMatrix(Queries):
    """W is in the matrix that multiplies a signal."""

    def mix(self, h):
        return h * F.linear(h, F.linear(self.queries, self.layer.weight)).mean(-1, keepdim=True)


class Prototypes(Queries):
    """Normalised, they are a matrix all the same."""

    def mix(self, h):
        return h + (h @ F.normalize(self.queries, dim=1).T).sum(-1, keepdim=True)


class Squashed(Queries):
    def mix(self, h):
        return F.linear(h, torch.tanh(self.queries)) @ self.queries


class Through(torch.autograd.Function):
    """Send errors back through a matrix."""

    @staticmethod
    def forward(ctx, h, matrix):
        ctx.matrix = matrix
        return h.clone()

    @staticmethod
    def backward(ctx, delta):
        return delta @ ctx.matrix, None


class Decoy(Queries):
    """A matrix for errors is given to a layer, too, to look like an input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", self.layer.weight.detach().flip(0) * 2)

    def mix(self, h):
        return Through.apply(h, self.matrix) + 0 * self.layer(self.matrix).mean()


class DecoyOfHook(Decoy):
    def mix(self, h):
        h = h.clone()
        h.register_hook(lambda delta: delta @ self.matrix)
        return h + 0 * self.layer(self.matrix).mean()


LEARNED_INPUTS = [Queries, Prepared, Latents, Decoded, FirstState, FirstStateOfCell, Seeds]
MATRICES = [AlsoMatrix, MadeMatrix, Prototypes, Squashed]


def audit(make, rule):
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 3, 5)
    path = fp.untie(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        path.step()

    return fp.audit(step, path, steps=1)


@pytest.mark.parametrize("rule", ["fa", "kp"])
@pytest.mark.parametrize("make", LEARNED_INPUTS)
def test_a_learned_input_is_activity(make, rule):
    report = audit(make, rule)
    assert report.transport_free, str(report)


@pytest.mark.parametrize("rule", ["fa", "kp"])
@pytest.mark.parametrize("make", [AlsoMatrix, MadeMatrix, Decoy, DecoyOfHook])
def test_a_learned_input_hides_no_matrix(make, rule):
    report = audit(make, rule)
    assert report.transport_free is False
    assert "delta" in {finding.sink for finding in report.findings}


@pytest.mark.parametrize("make", [*LEARNED_INPUTS, *MATRICES])
def test_queries_have_a_feedback_weight_where_they_multiply_signals(make):
    path = fp.untie(make(), "fa")
    own = [weight.weight_name for weight in path.weights if weight.layer is path.model]
    assert own == (["queries"] if make in MATRICES else [])
