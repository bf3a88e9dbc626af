"""Count the work of one token in a decoder: products, weights, values that are read and written, pairs of tokens.

A layer has two segments, attention and MLP, each of which ends with a sum over ranks. A product with a weight takes two
operations per token and each weight two bytes, so a segment's operations per token are its weights' bytes; a mixture
multiplies with some of its experts and reads all of them.

Shape legend: R ranks, H hidden.

Source: the counts are our own; the built-in shapes are those of the published config.json of each model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flashcomm.errors import did_you_mean

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LATENT = ("kv_lora_rank", "q_lora_rank")


class Workload(NamedTuple):
    """Operations and bytes of one segment on one rank."""

    flops: float
    """Operations of matrix products, per token."""
    weight_bytes: float
    """Bytes of weights, read once for all tokens."""
    value_bytes: float
    """Bytes read and written between the products, per token."""
    pair_flops: float = 0.0
    """Operations of attention, per pair of query and key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a decoder, from a transformers config.json."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the MLP, or of one expert."""
    vocabulary: int
    experts: int = 1
    experts_per_token: int = 1

    def attention(self, ranks: int) -> Workload:
        """Count from the norm before attention to the product whose result is summed.

        >>> SHAPES["llama-2-7b"].attention(1).flops == 2 * 4 * 4096**2
        True
        """
        queries = self.heads * self.head_dim / ranks
        # Every rank that has queries for a head of keys and values has that head.
        keys = max(self.kv_heads / ranks, 1) * self.head_dim
        weights = self.hidden * (2 * queries + 2 * keys)
        values = 4 * self.hidden + 3 * (queries + 2 * keys)
        return Workload(2 * weights, 2 * weights, 2 * values, 4 * queries)

    def mlp(self, ranks: int) -> Workload:
        """Count from the norm before the MLP to the product whose result is summed."""
        width = self.intermediate / ranks
        expert = 3 * self.hidden * width
        values = 4 * self.hidden + 5 * width * self.experts_per_token
        return Workload(2 * expert * self.experts_per_token, 2 * expert * self.experts, 2 * values)

    def head(self, ranks: int) -> Workload:
        """Count the product with the vocabulary, for the last token of a prompt."""
        weights = self.hidden * self.vocabulary / ranks
        return Workload(2 * weights, 2 * weights, 4 * self.hidden)

    @property
    def parameters(self) -> float:
        """Number of parameters of all layers, and of the vocabulary twice.

        >>> f"{SHAPES['llama-3-70b'].parameters / 1e9:.1f}"
        '70.6'
        """
        layer = (self.attention(1).weight_bytes + self.mlp(1).weight_bytes) / 2
        return self.layers * layer + 2 * self.hidden * self.vocabulary

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> "Shape":
        """Read a transformers configuration.

        Args:
            config: the keys of config.json; if a model has several parts, the text's part counts.
            name: for the shape, and for error messages.

        Raises:
            ValueError: a size is missing or not positive, or the layers are of a kind that is not counted here.
        """
        config = config.get("text_config", config)
        if latent := [key for key in _LATENT if config.get(key)]:
            raise ValueError(f"{name} has {latent[0]}: latent attention is not counted here. Give a model without it")
        heads = _size(config, "num_attention_heads", name)
        hidden = _size(config, "hidden_size", name)
        kind = next((key for key in _EXPERTS if config.get(key)), None)
        width = "moe_intermediate_size" if kind and config.get("moe_intermediate_size") else "intermediate_size"
        return cls(
            name=name,
            hidden=hidden,
            layers=_size(config, "num_hidden_layers", name),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", name) if config.get("num_key_value_heads") else heads,
            head_dim=_size(config, "head_dim", name) if config.get("head_dim") else hidden // heads,
            intermediate=_size(config, width, name),
            vocabulary=_size(config, "vocab_size", name),
            experts=_size(config, kind, name) if kind else 1,
            experts_per_token=_size(config, "num_experts_per_tok", name) if kind else 1,
        )


def _size(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        given = f"{key} = {value!r}" if key in config else f"no {key}"
        raise ValueError(f"{name}: {given}. Give the config.json of a decoder, with {key} as a number of 1 or more")
    return value


def _shape(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, **rest: int
) -> tuple[str, Shape]:
    sizes = dict(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary)
    return name, Shape(name=name, intermediate=intermediate, **{"head_dim": hidden // heads, **sizes, **rest})


SHAPES = dict([
    _shape("llama-2-7b", 4096, 32, 32, 32, 11008, 32000),
    _shape("llama-2-13b", 5120, 40, 40, 40, 13824, 32000),
    _shape("llama-2-70b", 8192, 80, 64, 8, 28672, 32000),
    _shape("llama-30b", 6656, 60, 52, 52, 17920, 32000),
    _shape("llama-3-8b", 4096, 32, 32, 8, 14336, 128256),
    _shape("llama-3-70b", 8192, 80, 64, 8, 28672, 128256),
    _shape("llama-3-405b", 16384, 126, 128, 8, 53248, 128256),
    _shape("qwen2.5-7b", 3584, 28, 28, 4, 18944, 152064),
    _shape("qwen2.5-32b", 5120, 64, 40, 8, 27648, 152064),
    _shape("qwen2.5-72b", 8192, 80, 64, 8, 29568, 152064),
    _shape("qwen3-32b", 5120, 64, 64, 8, 25600, 151936, head_dim=128),
    _shape("mistral-7b", 4096, 32, 32, 8, 14336, 32000),
    _shape("gemma-2-27b", 4608, 46, 32, 16, 36864, 256000, head_dim=128),
    _shape("mixtral-8x7b", 4096, 32, 32, 8, 14336, 32000, experts=8, experts_per_token=2),
    _shape("mixtral-8x22b", 6144, 56, 48, 8, 16384, 32768, experts=8, experts_per_token=2),
])  # fmt: skip
"""Shapes by name, for use without a config.json."""


def load(model: str) -> Shape:
    """Find the shape for a name in `SHAPES`, a config.json, or the folder of a model.

    Args:
        model: a name or a path.

    Raises:
        ValueError: neither, or a configuration that `Shape.from_config` refuses.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    path = Path(model)
    if not path.exists():
        raise ValueError(
            f"unknown model {model!r}.{did_you_mean(model.lower(), SHAPES)} Allowed: a folder with a config.json, "
            f"a config.json, or {', '.join(SHAPES)}"
        )
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}. Give the config.json of a transformers model") from None
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds no object. Give the config.json of a transformers model")
    return Shape.from_config(config, path.resolve().parent.name)
