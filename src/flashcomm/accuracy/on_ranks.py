"""Compare codecs with plain on a model that is split over real ranks, where `measuring` simulates them.

Real ranks also tell whether all of them hold the same bits.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.accuracy.metrics import AGREES, KL, NLL, compare
from flashcomm.integrations.transformers import Compression
from flashcomm.models.load import switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """One codec against plain, teacher-forced over the same tokens."""

    perplexity: float
    perplexity_change: float
    """Relative to plain: 0.01 is one percent worse."""
    kl: float
    """Mean of KL(plain || codec) over all of the vocabulary, in nats."""
    top1: float
    """Share of tokens whose most likely successor is plain's."""
    ranks_identical: bool
    """Whether all logits had the same bits on every rank."""


@torch.inference_mode()
def accuracy(
    model: Any,
    handle: Compression,
    specs: Sequence[str],
    windows: Sequence[torch.Tensor],
    algorithm: str = "auto",
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Accuracy]:
    """Compare each codec with the plain sums on windows of token ids.

    Args:
        model: tensor parallel, compressed by `handle`.
        handle: its compression; the codec is switched between forward passes.
        specs: codecs.
        windows: token ids, each [tokens]; a token is judged by its predecessors in the window.
        algorithm: of the compressed sums.
        progress: called after each forward pass.

    Returns:
        One `Accuracy` per codec; the same on every rank.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Per codec: negative log-likelihood, KL, agreements, windows whose bits differed; then the token count.
    sums = {spec: torch.zeros(5, dtype=torch.float64, device="cpu") for spec in ("none", *specs)}
    for window in windows:
        # Each rank judges its share of the tokens, so no core idles while rank 0 computes softmaxes.
        mine = slice(rank, len(window) - 1, ranks)
        window = window.to(model.device)
        targets = window[1:][mine]
        plain = None
        for spec in sums:
            switch(handle, spec, algorithm)
            logits = model(window[None], use_cache=False).logits[0]
            digest = hashlib.blake2b(logits.view(torch.uint8).cpu().numpy().tobytes(), digest_size=16).digest()
            digests = [b""] * ranks
            dist.all_gather_object(digests, digest)
            judged = logits[:-1][mine]
            plain = judged if plain is None else plain
            figures = compare(plain, judged, targets).double().sum(1)
            different = torch.tensor([len(set(digests)) > 1, len(targets)], dtype=torch.float64, device="cpu")
            sums[spec] += torch.cat([figures[[NLL, KL, AGREES]], different])
            progress()
    for spec in sums:
        total = sums[spec].to(model.device)
        dist.all_reduce(total)
        sums[spec] = total.cpu()
    base = sums["none"][0] / sums["none"][4]
    results = {}
    for spec in specs:
        nll, kl, agree, differing, tokens = sums[spec].tolist()
        results[spec] = Accuracy(
            perplexity=torch.tensor(nll / tokens, dtype=torch.float32, device="cpu").exp().item(),
            perplexity_change=torch.expm1(
                torch.tensor(nll / tokens - base.item(), dtype=torch.float64, device="cpu")
            ).item(),
            kl=max(kl / tokens, 0.0),
            top1=agree / tokens,
            ranks_identical=differing == 0,
        )
    return results
