"""One net of everything that reads a weight, and what every way of running it is held to."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Zoo(nn.Module):
    """Layers, recurrence, attention, matrices of its own, a tied head, and a weight that it reads itself."""

    recurrent = True
    checkpointing = None

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 12)
        self.head = nn.Linear(12, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.inp = nn.Linear(6, 12)
        self.conv = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.back = nn.ConvTranspose1d(6, 4, 3, groups=2, padding=1)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.bilinear = nn.Bilinear(12, 12, 12)
        self.cube = nn.Parameter(0.3 * torch.randn(12, 3, 4))
        self.square = nn.Parameter(0.3 * torch.randn(12, 12))
        self.other = nn.Linear(12, 12)
        if self.recurrent:
            self.lstm = nn.LSTM(12, 12, batch_first=True, num_layers=2)

    def forward(self, x):
        hidden = self.inp(x).tanh()
        hidden = hidden + self.back(self.conv(hidden))
        if self.recurrent:
            hidden = self.lstm(hidden)[0]
        if self.checkpointing is None:
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.checkpointing == "reentrant")
        return self.head(hidden)

    def middle(self, hidden):
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        wide = hidden.to(self.square.dtype)  # bilinear refuses mixed precision, and autocast does not help it
        hidden = hidden + self.bilinear(wide, wide.tanh())
        hidden = hidden + torch.einsum("nti,iab->ntab", hidden, self.cube).flatten(2)
        product = torch.addmm(self.other.bias, hidden.flatten(0, 1), self.square)
        hidden = hidden + product.view_as(hidden)
        return hidden + F.linear(hidden, self.other.weight)


class ZooWithoutRecurrence(Zoo):
    recurrent = False


def make_zoo(kind=Zoo, dtype=torch.float64):
    torch.manual_seed(1)
    return kind().to(dtype)


def zoo_input(dtype=torch.float64):
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def gradients(model, x, run=None, between=lambda: None):
    """Return the output, and the gradients of its sum of squares for the input and every weight by name."""
    x = x.clone().requires_grad_()
    output = model(x) if run is None else run(x)
    loss = output.float().square().sum() if output.dtype != torch.float64 else output.square().sum()
    between()
    model.zero_grad()
    loss.backward()
    wanted = {"x": x} | dict(model.named_parameters())
    return output.detach(), {name: p.grad.clone() for name, p in wanted.items() if p.grad is not None}


def let_feedback_be_weights(path):
    for _, weight, feedback in path.pairs():
        feedback.data.copy_(weight.data)


def difference(ours, expected):
    return float((ours - expected).norm() / expected.norm())
