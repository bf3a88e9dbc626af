"""Figures of each token, and the figures of a codec that follow from them, with confidence intervals.

Shape legend: W windows, T tokens of a window, V vocabulary, C variants (plain first).

Source: KL between the predictions of a model before and after, as in "Accuracy is Not All You Need" (arXiv 2407.09141),
which shows that equal accuracies hide changed answers; intervals by the percentile bootstrap (Efron, 1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

NLL, KL, KL_TOP, AGREES = range(4)
"""Rows of the figures of a token, see `compare`."""
TOP = 20
"""Tokens that the top-k KL tells apart; the others count as one."""
RESAMPLES = 1000
FLOOR = "fp32"
"""The codec that changes nothing but the order and the precision of the sums."""


def compare(plain: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, *, rows: int = 256) -> torch.Tensor:
    """Compute the figures of each token.

    Args:
        plain: [T, V] logits of the uncompressed model.
        logits: [T, V] logits of the compressed model.
        targets: [T] ids of the next tokens.
        rows: tokens at a time, which bounds the memory in fp32.

    Returns:
        fp32 [4, T] on the CPU: the negative log-likelihood of the target; KL(plain || compressed) in nats over all of
        the vocabulary; the same over plain's 20 most likely tokens and one that stands for all others, so never more;
        and 1 where both rank the same token first.

    >>> even = torch.zeros(1, 4)
    >>> compare(even, even, torch.tensor([3]))[:, 0].tolist()
    [1.3862943649291992, 0.0, 0.0, 1.0]
    """
    found = []
    for p, q, target in zip(plain.split(rows), logits.split(rows), targets.split(rows), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        top = p.topk(min(TOP, p.shape[-1]), -1).indices
        some = [torch.cat([x, _rest(x)], -1) for x in (p.gather(-1, top).double(), q.gather(-1, top).double())]
        kl_top = (some[0].exp() * (some[0] - some[1])).sum(-1).float()
        agrees = (p.argmax(-1) == q.argmax(-1)).float()
        found.append(torch.stack([-q.gather(-1, target[:, None])[:, 0], kl, kl_top, agrees]))
    return torch.cat(found, 1).cpu()


def _rest(log_p: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability that is left, at least 1e-9."""
    return (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()


class Estimate(NamedTuple):
    """A figure with the 95 % confidence interval of its bootstrap over windows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyRow:
    """One codec or policy against plain, teacher-forced over the same tokens."""

    codec: str
    bits_per_value: float
    """Bits on the wire per value, mean over the sums of a token."""
    perplexity: Estimate
    perplexity_change: Estimate
    """Relative to plain: 0.01 is one percent worse."""
    kl: Estimate
    """Mean of KL(plain || codec) over all of the vocabulary, in nats."""
    kl_top20: Estimate
    """The same over plain's 20 most likely tokens and one for all others."""
    top1: Estimate
    """Share of tokens whose most likely successor is plain's."""
    delta_mean: Estimate
    """Mean of |log p(plain) - log p(codec)| of the token that follows."""
    delta_p95: Estimate
    """Their 95th percentile."""

    def as_dict(self) -> dict:
        """The figures by name, flat: ``kl``, ``kl_low``, ``kl_high``, ..."""
        return flat(self)


def flat(row: Any) -> dict:
    """A dataclass's fields by name, with an estimate's ends of the interval as fields of their own."""
    found = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Estimate):
            found |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        else:
            found[field.name] = value
    return found


def summarise(
    names: Sequence[str], bits: Sequence[float], figures: torch.Tensor, *, seed: int = 0
) -> list[AccuracyRow]:
    """Summarise each variant in a row.

    Args:
        names: the variants' names, C.
        bits: bits on the wire per value, C.
        figures: fp32 [C, 4, W, T] of `compare`; the first variant is plain against itself.
        seed: random seed of the resamples, which are the same for all variants.
    """
    windows = figures.shape[2]
    chosen = torch.randint(
        windows, (RESAMPLES, windows), generator=torch.Generator().manual_seed(seed), dtype=torch.long, device="cpu"
    )
    # Number of times that each resample holds each window; the text itself comes first.
    counts = torch.cat(
        [torch.ones(1, windows, dtype=torch.long, device="cpu"), torch.nn.functional.one_hot(chosen, windows).sum(1)]
    ).double()
    means = (figures.double().mean(-1) @ counts.T) / windows
    rows = []
    for name, size, figure, mean in zip(names, bits, figures, means, strict=True):
        delta = (figure[NLL] - figures[0, NLL]).abs()
        rows.append(
            AccuracyRow(
                codec=name,
                bits_per_value=size,
                perplexity=_estimate(mean[NLL].exp()),
                perplexity_change=_estimate((mean[NLL] - means[0, NLL]).expm1()),
                # Rounding in fp32 can leave -1e-9.
                kl=_estimate(mean[KL].clamp_min(0)),
                kl_top20=_estimate(mean[KL_TOP].clamp_min(0)),
                top1=_estimate(mean[AGREES]),
                delta_mean=_estimate(delta.double().mean(-1) @ counts.T / windows),
                delta_p95=_estimate(_quantiles(delta, counts, 0.95)),
            )
        )
    return rows


def by_position(figures: torch.Tensor, parts: int = 8) -> torch.Tensor:
    """KL by stretch of positions in the window: fp32 [C, parts], from figures [C, 4, W, T].

    >>> by_position(torch.arange(8.0).expand(1, 4, 2, 8), 4).tolist()
    [[0.5, 2.5, 4.5, 6.5]]
    """
    return torch.stack([part.mean((1, 2)) for part in figures[:, KL].tensor_split(parts, -1)], -1)


def _estimate(values: torch.Tensor) -> Estimate:
    """Estimate from values whose first is the text's own and whose others are the resamples'."""
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype, device=values.device)).tolist()
    return Estimate(values[0].item(), low, high)


def _quantiles(values: torch.Tensor, counts: torch.Tensor, q: float) -> torch.Tensor:
    """q-quantile of [W, T] values in which window w counts ``counts[:, w]`` times."""
    windows, tokens = values.shape
    order = values.flatten().argsort()
    window, target = order // tokens, q * windows * tokens
    # A few resamples at a time, so that a million tokens take a few megabytes.
    places = [(some[:, window].cumsum(1) < target).sum(1) for some in counts.split(max(1, 2**20 // len(order)))]
    return values.flatten()[order[torch.cat(places).clamp_max(len(order) - 1)]].double()
