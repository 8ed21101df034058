"""The census of foreign models: its table is that of its file, and it looks at a model as it says."""

import json
from pathlib import Path

import census
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent


def test_the_table_in_the_docs_is_that_of_the_file():
    findings = json.loads((ROOT / "benchmarks/census/models.json").read_text())
    text = (ROOT / "docs/models.md").read_text()
    assert census.table(findings) == text.partition("<!-- census -->\n")[2].partition("\n<!-- end -->")[0]


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.5 * x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Swish()
        self.positions, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(4, 10)
        self.lstm = nn.LSTM(4, 5)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x))).mean((2, 3)) + self.positions[:, 0]
        return torch.tanh(self.head(x)), self.lstm(x)[0]


def test_a_model_is_looked_at():
    finding = census.look_at("timm", "net", lambda: (Net(), {"": torch.randn(2, 3, 6, 6)}))
    assert (finding.error, finding.mirror_error, finding.warnings, finding.wrong) == ("", "", [], [])
    assert finding.share == 1.0
    assert finding.same_forward
    assert finding.gradient_gap < 1e-5
    assert finding.random_gap > 0.3
    assert (finding.right, finding.mirrored) == (2, 2)
    assert finding.named == []


def test_kernels_and_functions_may_disagree(monkeypatch):
    monkeypatch.setattr(
        census.MirrorMode,
        "find_activations",
        lambda mode, weights: mode.activations.update({weight.name: torch.relu for weight in weights}),
    )
    finding = census.look_at("timm", "net", lambda: (Net(), {"": torch.randn(2, 3, 6, 6)}))
    assert finding.right == 0
    assert finding.wrong == ["conv", "head"]


@pytest.mark.parametrize("arguments", [["--out", "x.json"], ["--out", "x.json", "--part", "1/2"]])
def test_the_command_line_is_read(arguments):
    assert census.parse(arguments).out == Path("x.json")
