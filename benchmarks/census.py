"""Convert models that others wrote, each in one call, and see what comes of it: the table in docs/models.md.

    python benchmarks/census.py --out benchmarks/census/models.json

takes whatever is installed of timm (one model of each of its files), torchvision (one classifier of each) and
transformers (one small configuration of each architecture in ``ARCHITECTURES``), with random weights. Of each
model it notes whether it converts under ``kp``, whether its forward pass stays bit-identical, whether B = W
gives autograd's gradients and a random B does not, every warning, and whether ``wm`` knows after one training
step what follows each layer. That is compared with ``watch_kernels``: the kernels that ran, one level below.

torchvision's wheel needs the build of torch that it was made for: beside another CPU build its kernels do
not load. Classifiers need none of them, so their names alone are declared here where that is so.
"""

import argparse
import gc
import importlib.util
import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from census_kernels import Kernels
from census_models import PACKAGES, Make, declare_torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import feedbackpath as fp
from feedbackpath.core.layers import Recurrent
from feedbackpath.core.operations import ADDITIVE, NO_VALUES, NO_WEIGHTS, SCALES, is_matrix, name_of
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.following import PASSED_OVER

MOST = 40e6  # parameters
PROBE = torch.linspace(-8.0, 8.0, 65)


@dataclass
class Finding:
    """What came of one model."""

    package: str
    name: str
    error: str = ""
    share: float = 0.0
    left: list[str] = field(default_factory=list)
    same_forward: bool = False
    gradient_gap: float = 1.0
    random_gap: float = 0.0
    warnings: list[str] = field(default_factory=list)
    mirror_error: str = ""
    mirrored: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    """Return a model's outputs of floating point; random numbers are the same each time."""
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 (one model draws from it)
    given = {key: x.clone() if torch.is_tensor(x) else x for key, x in given.items()}
    output = model(given[""]) if "" in given else model(**given)
    return [x for x in tensors_in(output) if x.is_floating_point()]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an output."""
    if isinstance(value, Tensor):
        return [value]
    parts = list(value.values()) if isinstance(value, dict) else value
    return [t for part in parts for t in tensors_in(part)] if isinstance(parts, (list, tuple)) else []


def gradients(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradients of a random weighting of the outputs, for every forward parameter."""
    model.zero_grad()
    outputs = run(model, given)
    torch.manual_seed(4)
    sum(((y * torch.randn(y.shape)).sum() for y in outputs if y.requires_grad), torch.zeros(())).backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and not name.endswith("feedback")
    }


class _Multiplied(TorchFunctionMode):
    """Notes the matrices that operations take up, but for look-ups, sums and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, nn.Parameter] = {}
        self._shown: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = name_of(func)
        for tensor in tensors_in([*args, *(kwargs or {}).values()]):
            weight = self._shown[id(tensor)][1] if id(tensor) in self._shown else tensor
            if not (isinstance(weight, nn.Parameter) and is_matrix(weight)):
                continue
            if name in PASSED_OVER - {"layer_norm"}:
                self._shown |= {id(view): (view, weight) for view in tensors_in(output)}
            elif name not in NO_WEIGHTS | ADDITIVE | NO_VALUES | SCALES and tensors_in(output):
                self.found[id(weight)] = weight
        return output


def multiplied(model: nn.Module, given: dict[str, Any]) -> list[nn.Parameter]:
    """Return the matrices among a model's parameters that signals pass through."""
    with _Multiplied() as noted:
        run(model, given)
    return list(noted.found.values())


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest relative difference between gradients, of parameters that have some."""
    largest = max((float(g.norm()) for g in other.values()), default=0.0)
    gaps = [
        float((one[n] - g).norm()) / (float(g.norm()) + 1e-5 * largest + 1e-30)
        for n, g in other.items()
        if n in one
    ]
    return max(gaps, default=0.0) if one.keys() == other.keys() else 1.0


def look_at(package: str, name: str, make: Make) -> Finding:
    """Convert one model and return what came of it."""
    finding, start = Finding(package, name), time.perf_counter()
    torch.manual_seed(0)
    model, given = make()
    if sum(p.numel() for p in model.parameters()) > MOST:
        raise ValueError(f"it has more than {MOST:.0e} parameters")
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def as_it_was() -> None:
        model.load_state_dict(state)

    model.train()
    run(model, given)  # one of them changes itself in its first pass
    as_it_was()
    before = run(model, given)
    as_it_was()
    taken = multiplied(model, given)
    as_it_was()
    plain = gradients(model, given)
    as_it_was()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            path = fp.untie(model, "kp")
            random = gradients(model, given)
            as_it_was()
            for _, w, b in path.pairs():
                b.data.copy_(w.data)
            exact = gradients(model, given)
            as_it_was()
            after = run(model, given)
            as_it_was()
            ids = {id(w) for _, w, _ in path.pairs()}
            sizes = {id(p): p.numel() for p in taken}
            finding.share = sum(n for i, n in sizes.items() if i in ids) / max(1, sum(sizes.values()))
            finding.left = [n for n, p in model.named_parameters() if id(p) in sizes.keys() - ids]
            path.retie()
            finding.same_forward = all(map(torch.equal, before, after)) and len(before) == len(after)
            finding.gradient_gap, finding.random_gap = gap(exact, plain), gap(random, plain)
        except Exception as error:
            finding.error = f"{type(error).__name__}: {error}"[:500]
    finding.warnings = told(caught)
    if not finding.error:
        look_at_mirror(finding, model, given)
    finding.seconds = time.perf_counter() - start
    return finding


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    """Return what this library warned of."""
    ours = [w for w in caught if w.category.__module__.startswith("feedbackpath")]
    return [f"{w.category.__name__}: {w.message}"[:700] for w in ours]


def look_at_mirror(finding: Finding, model: nn.Module, given: dict[str, Any]) -> None:
    """Untie under ``wm``, train one step, and compare what it found to follow each layer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            path = fp.untie(model, "wm")
            gradients(model, given)
            mode = path.context.part(MirrorMode)
            mode.end_watch()
            governed = [w for _, group in path.groups for w in group]
            # What follows the products of a recurrent layer is its gates: they are tested by themselves.
            weights = [w for w in governed if not isinstance(w.layer, Recurrent)]
            mode.find_activations(weights)
            kernels = Kernels(weights, model)
            with kernels:
                run(model, given)
            for weight in weights:
                finding.mirrored += 1
                expected = kernels.what_follows(weight.name, PROBE)
                found = mode.activations[weight.name](PROBE.clone().double()).float()
                if any(torch.allclose(found, one.float(), atol=1e-5) for one in expected):
                    finding.right += 1
                else:
                    finding.wrong.append(weight.name)
            path.retie()
        except Exception as error:
            finding.mirror_error = f"{type(error).__name__}: {error}"[:500]
    finding.named = told(caught)


def table(findings: list[dict[str, Any]]) -> str:
    """Return the table of docs/models.md: a line for each package."""
    lines = [
        "| | models | convert | forward bit-identical | B = W is autograd | weights with a `B` | `wm` in one "
        "call | layers whose activation is right | warnings of `kp` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for package in PACKAGES:
        ran = [
            one for one in findings if one["package"] == package and not one["error"].startswith("cannot be")
        ]
        if not ran:
            continue
        counts = [
            len(ran),
            sum(not one["error"] for one in ran),
            sum(one["same_forward"] for one in ran),
            sum(one["gradient_gap"] < 1e-4 for one in ran),
            f"{100 * sum(one['share'] for one in ran) / len(ran):.1f}%",
            sum(not one["mirror_error"] and one["mirrored"] > 0 for one in ran),
            f"{sum(one['right'] for one in ran)} of {sum(one['mirrored'] for one in ran)}",
            sum(len(one["warnings"]) for one in ran),
        ]
        lines.append(f"| {package} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", default=",".join(PACKAGES))
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--part", default="0/1", help="0/2: every second model")
    return parser.parse_args(arguments)


def main() -> None:
    """Look at every model that is installed, and write what was found."""
    chosen = parse()
    part, parts = map(int, chosen.part.split("/"))
    declare_torchvision()
    only = set(filter(None, chosen.only.split(",")))
    findings = []
    for package in chosen.packages.split(","):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: left out")
            continue
        for number, (name, make) in enumerate(PACKAGES[package]()):
            if (only and name not in only) or number % parts != part:
                continue
            try:
                finding = look_at(package, name, make)
            except Exception as error:  # the model itself does not run here: nothing to say of the library
                finding = Finding(
                    package, name, error=f"cannot be made: {type(error).__name__}: {error}"[:300]
                )
            findings.append(finding)
            print(
                f"{package:12} {name:40} share {finding.share:.2f} gap {finding.gradient_gap:.1e} "
                f"wm {finding.right}/{finding.mirrored} {len(finding.warnings)} {len(finding.named)} "
                f"{finding.seconds:.0f} s {finding.error[:160]}{finding.mirror_error[:160]}",
                flush=True,
            )
            gc.collect()
            chosen.out.write_text(json.dumps([asdict(one) for one in findings], indent=1) + "\n")


if __name__ == "__main__":
    main()
