"""The collectives of N ranks in one process, bit for bit as the ranks would get them, without a network.

For tests, and to learn what a codec costs a model before a cluster is touched.
"""

from collections.abc import Sequence

import torch

from flashcomm import codecs, kernels, planner
from flashcomm.codecs import Codec, Levels, Pair


def all_reduce(
    xs: Sequence[torch.Tensor],
    codec: str | Codec = "int8g128",
    algorithm: str = "auto",
    *,
    batch_invariant: bool = False,
    hosts: int = 0,
) -> torch.Tensor:
    """Compute the result of `flashcomm.all_reduce` on every rank if rank r holds ``xs[r]``.

    Args:
        xs: one tensor per rank, all of the same shape, dtype and device.
        codec, algorithm, batch_invariant: as for `flashcomm.all_reduce`.
        hosts: number of hosts, among which the ranks divide evenly and in order; 0 for one rank per host.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ValueError: no tensors, tensors that differ, or what `flashcomm.all_reduce` refuses.
        NotImplementedError: the call would run the plain collective, whose order of additions is the backend's.

    >>> all_reduce([torch.ones(4), 2 * torch.ones(4)], "int8g128", "one_step").tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    codec = codecs.parse(codec)
    if not xs or any(x.shape != xs[0].shape or x.dtype != xs[0].dtype for x in xs):
        raise ValueError("simulate.all_reduce needs one tensor per rank, all of the same shape and dtype")
    x, ranks = xs[0], len(xs)
    size = x.numel() * x.element_size()
    if hosts and ranks % hosts:
        raise ValueError(f"{ranks} ranks do not divide evenly among {hosts} hosts: give a divisor of {ranks}")
    facts = planner.Facts(ranks=ranks, hosts=hosts or ranks)
    exact = "bf16" if x.dtype == torch.bfloat16 else "fp32"
    plan = planner.choose(size, facts, codec, algorithm=algorithm, batch_invariant=batch_invariant, exact=exact)
    codec = plan.codec
    if ranks == 1 or x.numel() == 0:
        return x.clone()
    if plan.algorithm == "plain":
        raise NotImplementedError(
            f"this call runs the plain collective ({plan.reason}), whose order of additions belongs to the backend. "
            "Use algorithm='one_step' or 'two_step', or codec='fp32' for sums in rank order"
        )
    if isinstance(codec, Levels):
        return _hierarchical(xs, codec, hosts)
    first, second = codec.formats
    cols = x.shape[-1] if x.dim() else 1
    features = getattr(first, "features", None)
    # Each rank encodes with its own row of a calibration; the payload says which.
    senders = [first if features is None else first.bind(features, rank) for rank in range(ranks)]
    payloads = torch.stack([kernels.encode(r.reshape(-1, cols), c) for r, c in zip(xs, senders, strict=True)])
    if plan.algorithm == "one_step":
        return kernels.decode_sum(payloads, first, cols=cols, dtype=x.dtype).view(x.shape)
    # Rows are independent, so one reduction of all rows gives the bits of one stripe per rank.
    reduced = kernels.decode_sum_encode(payloads, first, second, cols=cols)
    return kernels.decode(reduced, second, cols=cols, dtype=x.dtype).view(x.shape)


def _hierarchical(xs: Sequence[torch.Tensor], codec: Levels, hosts: int) -> torch.Tensor:
    x, size = xs[0], len(xs) // hosts
    cols, (first, second) = x.shape[-1] if x.dim() else 1, codec.inside.formats
    sums = []
    for host in range(hosts):
        payloads = torch.stack([kernels.encode(r.reshape(-1, cols), first) for r in xs[host * size :][:size]])
        sums.append(kernels.decode_sum(payloads, first, cols=cols, dtype=torch.float32))
    name = "one_step" if hosts == 2 and not isinstance(codec.between, Pair) else "two_step"
    total = all_reduce(sums, codec.between, name)
    return kernels.decode(kernels.encode(total, second), second, cols=cols, dtype=x.dtype).view(x.shape)
