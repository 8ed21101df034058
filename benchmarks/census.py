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
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from census_kernels import Kernels
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import feedbackpath as fp
from feedbackpath.core.operations import ADDITIVE, NO_VALUES, NO_WEIGHTS, SCALES, is_matrix, name_of
from feedbackpath.mirror import MirrorMode
from feedbackpath.mirror.following import PASSED_OVER

SMALL = "test femto atto pico nano micro mini tiny xxs xx_small x_small xs b0 t0 s0 0_5 small 050 18 s12 _s"
PROBE = torch.linspace(-3.0, 3.0, 25)
ARCHITECTURES = [
    "albert",
    "bart",
    "beit",
    "bert",
    "big_bird",
    "bloom",
    "clip",
    "codegen",
    "convbert",
    "convnext",
    "convnextv2",
    "cvt",
    "data2vec-vision",
    "deberta",
    "deit",
    "dinov2",
    "distilbert",
    "efficientnet",
    "electra",
    "ernie",
    "falcon",
    "focalnet",
    "gemma",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "levit",
    "llama",
    "mamba",
    "mistral",
    "mixtral",
    "mobilebert",
    "mobilenet_v2",
    "mobilevit",
    "mpnet",
    "mpt",
    "nystromformer",
    "opt",
    "phi",
    "poolformer",
    "pvt",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "regnet",
    "rembert",
    "resnet",
    "roberta",
    "segformer",
    "swin",
    "swinv2",
    "t5",
    "vit",
    "vit_mae",
    "wav2vec2",
    "xlnet",
]


SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "num_hidden_layers": 2,
    "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "n_heads": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_heads": 4, "n_head": 4, "intermediate_size": 64,
    "d_ff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_dim": 64, "d_kv": 8, "rotary_dim": 4,
    "vocab_size": 101, "image_size": 64, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "word_embed_proj_dim": 32, "d_inner": 64,
    "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 16,
}  # fmt: skip
MOST = 40e6
FOUR = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "clip": {"text_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
                             "intermediate_size": 64},
             "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
                               "patch_size": 8, "intermediate_size": 64}},
    "convnext": FOUR, "convnextv2": FOUR, "regnet": FOUR | {"groups_width": 8, "embedding_size": 8},
    "resnet": FOUR | {"embedding_size": 8, "layer_type": "basic"}, "poolformer": FOUR,
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 101, "intermediate_size": 64,
                "attention_types": [[["global", "local"], 1]]},
    "levit": {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 101, "state_size": 8},
    "mobilebert": {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "intermediate_size": 64, "vocab_size": 101, "intra_bottleneck_size": 16},
    "mobilevit": {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
    "pvt": {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 4]},
    "segformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 4]},
    "swin": {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 4},
    "swinv2": {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 4},
    "wav2vec2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
                 "conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 16,
                 "num_conv_pos_embedding_groups": 4},
}  # fmt: skip


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


def declare_torchvision() -> None:
    """Declare the names of torchvision's kernels, where these cannot be loaded beside this build of torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', text)):
            library.define(f"{name}() -> Tensor")
        globals()["_LIBRARY"] = library  # its declarations go when it goes


def timm_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]]:
    """Yield a small model of each of timm's files."""
    import timm

    def smallness(name: str) -> tuple[int, int, str]:
        hits = [place for place, word in enumerate(SMALL.split()) if word in name]
        return min(hits, default=99), len(name), name

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue
        name = min(names, key=smallness)

        def make(name: str = name) -> tuple[nn.Module, dict[str, Any]]:
            # Two blocks of a transformer tell as much as twelve, and small images as much as large ones.
            for smaller in ({"depth": 2, "img_size": 64}, {"img_size": 64}, {"depth": 2}, {}):
                for side in (64, 224, None):
                    try:
                        model = timm.create_model(name, num_classes=10, **smaller)
                        usual = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
                        given = {"": torch.randn(2, *(usual if side is None else (3, side, side)))}
                        run(model, given)
                        return model, given
                    except Exception:  # it does not take that
                        continue
            raise ValueError(f"{name} runs on no image that was tried")

        yield name, make


def torchvision_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]]:
    """Yield a small classifier of each of torchvision's files."""
    from torchvision import models

    first: dict[str, str] = {}
    words = "18 0_5 tiny _t b0 b_16 400mf 11 121 50 small"
    for name in sorted(models.list_models(module=models), key=lambda n: (len(n), n)):
        module = models.get_model_builder(name).__module__
        better = any(word in name for word in words.split())
        if module not in first or (better and not any(word in first[module] for word in words.split())):
            first[module] = name
    for name in first.values():

        def make(name: str = name) -> tuple[nn.Module, dict[str, Any]]:
            extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            size = 299 if name == "inception_v3" else 224 if name in ("maxvit_t", "vit_b_16") else 64
            return models.get_model(name, weights=None, num_classes=10, **extra), {
                "": torch.randn(2, 3, size, size)
            }

        yield name, make


def transformers_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]]:
    """Yield a small model of each architecture."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    for kind in ARCHITECTURES:

        def make(kind: str = kind) -> tuple[nn.Module, dict[str, Any]]:
            known = AutoConfig.for_model(kind)
            like = {
                key: value for key, value in SIZES.items() if type(getattr(known, key, "")) is type(value)
            }
            config = AutoConfig.for_model(kind, **(OWN_SIZES[kind] if kind in OWN_SIZES else like))
            is_image = hasattr(known, "num_channels") and kind != "clip"
            model: Any = None
            for auto in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)[2 if is_image else 0 :]:
                try:
                    model = auto.from_config(config)
                    break
                except ValueError:
                    continue
            ids = torch.randint(3, 100, (2, 16))
            if kind == "wav2vec2":
                return AutoModel.from_config(config), {"input_values": torch.randn(2, 800)}
            if is_image:
                size = getattr(config, "image_size", 64)
                size = size if isinstance(size, int) else size[0]
                return model, {"pixel_values": torch.randn(2, 3, size, size)}
            if kind == "clip":
                return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
            return model, {"input_ids": ids} | (
                {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
            )

        yield kind, make


PACKAGES = {"timm": timm_models, "torchvision": torchvision_models, "transformers": transformers_models}


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


def look_at(package: str, name: str, make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Finding:
    """Convert one model and return what came of it."""
    finding, start = Finding(package, name), time.perf_counter()
    torch.manual_seed(0)
    model, given = make()
    if sum(p.numel() for p in model.parameters()) > MOST:
        raise ValueError("it has more than 40 million parameters")
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def as_it_was() -> None:
        model.load_state_dict(state)

    model.train()
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
            weights = [w for _, group in path.groups for w in group]
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


def main() -> None:
    """Look at every model that is installed, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", default=",".join(PACKAGES))
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--part", default="0/1", help="0/2: every second model")
    chosen = parser.parse_args()
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
