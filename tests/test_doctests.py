"""Every example in a docstring runs, with ``torch``, ``nn`` and ``fp`` at hand."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import feedbackpath as fp

ROOT = Path(fp.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = [
    ".".join(("feedbackpath", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(ROOT.rglob("*.py"))
]
SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if ">>>" in path.read_text()]


@pytest.mark.parametrize("name", [*MODULES, *SCRIPTS])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.startswith("feedbackpath.integrations."):
        pytest.importorskip(name.rpartition(".")[2])
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn, "fp": fp})
    assert results.failed == 0
