"""The models of ``benchmarks/census.py``: how each is made small, and an input for it."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from feedbackpath.core.operations import names_in

Make = Callable[[], tuple[nn.Module, dict[str, Any]]]
SMALL = "test femto atto pico nano micro mini tiny xxs xx_small x_small xs b0 t0 s0 0_5 small 050 18 s12 _s"
ARCHITECTURES = names_in(
    """albert bart beit bert big_bird bloom clip codegen convbert convnext convnextv2 cvt data2vec-vision
    deberta deit dinov2 distilbert efficientnet electra ernie falcon focalnet gemma gpt2 gpt_bigcode
    gpt_neo gpt_neox gptj levit llama mamba mistral mixtral mobilebert mobilenet_v2 mobilevit mpnet mpt
    nystromformer opt phi poolformer pvt qwen2 qwen2_moe qwen3 regnet rembert resnet roberta segformer
    swin swinv2 t5 vit vit_mae wav2vec2 xlnet"""
)


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "n_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_heads": 4,
    "n_head": 4,
    "intermediate_size": 64,
    "d_ff": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "d_kv": 8,
    "rotary_dim": 4,
    "vocab_size": 101,
    "image_size": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "word_embed_proj_dim": 32,
    "d_inner": 64,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
}
FOUR = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "clip": {
        "text_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 101,
            "intermediate_size": 64,
        },
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 64,
        },
    },
    "convnext": FOUR,
    "convnextv2": FOUR,
    "regnet": FOUR | {"groups_width": 8, "embedding_size": 8},
    "resnet": FOUR | {"embedding_size": 8, "layer_type": "basic"},
    "poolformer": FOUR,
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 101,
        "intermediate_size": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "levit": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 101, "state_size": 8},
    "mobilebert": {
        "hidden_size": 32,
        "embedding_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 101,
        "intra_bottleneck_size": 16,
    },
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
    },
    "pvt": {
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 4],
    },
    "segformer": {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 4],
    },
    "swin": {
        "image_size": 64,
        "embed_dim": 16,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "window_size": 4,
    },
    "swinv2": {
        "image_size": 64,
        "embed_dim": 16,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "window_size": 4,
    },
    "wav2vec2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_dim": [32, 32],
        "conv_kernel": [10, 3],
        "conv_stride": [5, 2],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    },
}


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


def timm_models() -> Iterator[tuple[str, Make]]:
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
                        usual = (getattr(model, "pretrained_cfg", None) or {}).get(
                            "input_size", (3, 224, 224)
                        )
                        given = {"": torch.randn(2, *(usual if side is None else (3, side, side)))}
                        model(given[""])
                        return model, given
                    except Exception:  # it does not take that
                        continue
            raise ValueError(f"{name} runs on no image that was tried")

        yield name, make


def torchvision_models() -> Iterator[tuple[str, Make]]:
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


def transformers_models() -> Iterator[tuple[str, Make]]:
    """Yield a small model of each architecture."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    for kind in sorted(ARCHITECTURES):

        def make(kind: str = kind) -> tuple[nn.Module, dict[str, Any]]:
            known = AutoConfig.for_model(kind)
            like = {
                key: value for key, value in SIZES.items() if type(getattr(known, key, "")) is type(value)
            }
            config = AutoConfig.for_model(kind, **(OWN_SIZES.get(kind, like)))
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
