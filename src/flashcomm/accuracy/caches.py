"""The cost of a codec of key/value caches: prefill, encode, decode, and go on as another process would.

Each window is a prompt and N tokens that follow it. The model computes the prompt once, and its cache passes through
each codec. Then, teacher-forced, two texts are judged on each cache: the window's own N tokens, for KL and perplexity,
and the N tokens that plain writes greedily. A text is kept if each of its tokens is the first choice on the codec's
cache too: then greedy decoding would write the same text.

Shape legend: W windows, B windows of a batch, N judged tokens, V vocabulary, C variants (plain first).

Source: our own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashcomm import kv
from flashcomm.accuracy.measuring import by_window
from flashcomm.accuracy.metrics import Estimate, compare, flat, summarise
from flashcomm.integrations.loaded import cache_name

BATCH = 8
"""Windows that are computed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """One codec of caches against plain; estimates as in `AccuracyRow`."""

    codec: str
    bits_per_value: float
    """Bits of an encoded cache per value, headers included; 16 or 32 for plain."""
    perplexity_change: Estimate
    kl: Estimate
    top1: Estimate
    texts: int
    """Texts that plain wrote greedily, one for each window."""
    texts_kept: int
    """Texts of which every token is kept."""
    tokens_kept: float
    """Share of the texts' tokens before the first other choice."""

    def as_dict(self) -> dict:
        """The figures by name, flat: ``kl``, ``kl_low``, ``kl_high``, ..."""
        return flat(self)


@torch.inference_mode()
def measure_caches(
    model: Any,
    codecs: Sequence[str],
    windows: Sequence[torch.Tensor],
    *,
    new_tokens: int = 32,
    folder: Path | None = None,
    origin: str = "",
    progress: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> list[CacheRow]:
    """Compare caches that were encoded and decoded with plain ones.

    Args:
        model: a causal model of transformers with full attention.
        codecs: spellings for `flashcomm.kv.encode`; plain is measured too, as the first.
        windows: token ids, all of one length.
        new_tokens: N; the rest of a window is the prompt.
        folder, origin, progress: see `measuring.measure`; a batch counts for one pass of each codec and of plain.
        seed: see `summarise`.

    Raises:
        ValueError: windows without a prompt.
        NotImplementedError: a cache that is not one tensor of keys and one of values per layer, for all tokens.
    """
    names = ["none", *(name for name in codecs if name != "none")]
    if len(windows[0]) < 2 * new_tokens:
        raise ValueError(
            f"windows of {len(windows[0]):,} tokens, of which {new_tokens:,} follow the prompt: give a prompt of as "
            "many or more"
        )
    batches = [torch.stack([*windows[at : at + BATCH]]) for at in range(0, len(windows), BATCH)]
    found = by_window(
        batches,
        lambda ids: _batch(model, names, ids.to(model.device), new_tokens, progress),
        folder,
        ["kv", origin, new_tokens, names],
        len(names),
        progress,
    )
    figures = torch.cat([figures for figures, _, _ in found], 2)
    kept = torch.cat([kept for _, kept, _ in found], 1)
    sizes = torch.stack([sizes for _, _, sizes in found]).sum(0)
    bits = (8 * sizes / sizes[0] * model.dtype.itemsize).tolist()
    return [
        CacheRow(
            codec=row.codec,
            bits_per_value=row.bits_per_value,
            perplexity_change=row.perplexity_change,
            kl=row.kl,
            top1=row.top1,
            texts=len(windows),
            texts_kept=int((tokens == new_tokens).sum()),
            tokens_kept=tokens.double().mean().item() / new_tokens,
        )
        for row, tokens in zip(summarise(names, bits, figures, seed=seed), kept, strict=True)
    ]


def _batch(
    model: Any, names: Sequence[str], ids: torch.Tensor, new_tokens: int, progress: Callable[[], object]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Measure windows [B, P + N]: figures [C, 4, B, N - 1], tokens kept [C, B], bytes [C].

    Calls `progress` after all passes but the last.
    """
    # The last token of the prompt is the first that is computed on the cache.
    prompt, rest = ids[:, : -new_tokens - 1], ids[:, -new_tokens - 1 :]
    name_of_cache = cache_name(model.forward)
    cache = getattr(model(prompt, use_cache=True, logits_to_keep=1), name_of_cache)
    layers = [kv.KV(*_tensors(layer, prompt.shape[1])) for layer in cache.layers]
    written = _greedy(model, _cache(layers), rest[:, :1], new_tokens)
    inputs = rest[:, :-1], torch.cat([rest[:, :1], written[:, :-1]], 1)
    figures, kept, sizes, plain = [], [], [], []
    for name in names:
        if figures:
            progress()
        sent = [] if name == "none" else [kv.encode(*layer, name) for layer in layers]
        # Plain needs no copy: passes over a cache leave its tensors alone.
        arrived = [kv.decode(data) for data in sent] or layers
        sizes.append(sum(map(len, sent)) or sum(x.nbytes for layer in layers for x in layer))
        caches = [{name_of_cache: _cache(arrived, model.device)} for _ in inputs]
        logits = [model(x, **one, use_cache=True).logits for x, one in zip(inputs, caches, strict=True)]
        plain = plain or logits
        figures.append(torch.stack([*map(compare, plain[0], logits[0], rest[:, 1:])], 1))
        same = logits[1].argmax(-1) == plain[1].argmax(-1)
        kept.append(same.int().cumprod(1).sum(1).cpu())
    return torch.stack(figures), torch.stack(kept), torch.tensor(sizes, dtype=torch.float64, device="cpu")


def _tensors(layer: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer of a ``DynamicCache``."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.shape[-2] != tokens:
        raise NotImplementedError(
            f"a layer's cache is a {type(layer).__name__} that does not hold keys and values of all {tokens:,} tokens: "
            "measured are models with full attention in all layers"
        )
    return keys, values


def _cache(layers: Sequence[kv.KV], device: Any = None) -> Any:
    """Make a ``DynamicCache`` of keys and values."""
    from transformers import DynamicCache

    return DynamicCache([tuple(x.to(device) for x in layer) for layer in layers])


def _greedy(model: Any, cache: Any, token: torch.Tensor, count: int) -> torch.Tensor:
    """Write `count` tokens behind `token` [B, 1]: [B, count]."""
    found, given = [], {cache_name(model.forward): cache}
    for _ in range(count):
        token = model(token, **given, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        found.append(token)
    return torch.cat(found, 1)
