"""Encode what pipeline stages of an inference engine hand on, within the messages of the engine.

An engine sends a dictionary of tensors from stage to stage: first names, shapes and dtypes, then each tensor. `Hops`
replaces the hidden states and the residual before that and puts them back after it. How messages travel and when they
are waited for stays the engine's. The name of a payload says what decodes it:

    {"hidden_states": bf16 [1024, 4096]}    becomes    {'flashcomm {"name": "hidden_states", ...}': uint8 [n]}

Tensor-parallel ranks of a stage hold the same tensors, so an engine lets each of them send one share, and the next
stage gathers the shares. Here a rank cuts its share before it encodes, and the next stage gathers what it has decoded:
each rank encodes its share only, and payloads of different ranks may differ in length.

Source: our own; the dictionaries are those of vLLM 0.32 and SGLang 0.5.23.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist

from flashcomm import codecs, kernels
from flashcomm.codecs import Codec
from flashcomm.collectives.stats import record_plain, tally
from flashcomm.errors import CollectiveError
from flashcomm.integrations import worker_metrics
from flashcomm.integrations.agreement import MEET_S, same_policy
from flashcomm.policy import Policy

TENSORS = ("hidden_states", "residual")
"""Names of the tensors that are encoded."""
_MARK = "flashcomm "


class Hops:
    """The hops between the pipeline stages of one engine, in this process.

    Args:
        policy: its codec for hops and ``min_bytes`` count; may be assigned to between steps.
        shared: whether the engine hands tensors on in memory that the stages share. No codec is as fast as a copy, so
            they stay plain there unless the policy names an algorithm.
    """

    def __init__(self, policy: Policy, shared: bool = False):
        self.policy, self.shared = policy, shared

    def meet(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        columns: Collection[int] = (),
        timeout_s: float = MEET_S,
    ):
        """Check that all stages have the same policy, and that it fits the model; before the first hop, on all stages.

        Args:
            group: one rank of each stage, over gloo.
            device: holds the tensors; its kernels are loaded here, so that no request waits until they are compiled.
            columns: numbers of values that a row may have, if the engine knows them already.
            timeout_s: seconds to wait for the other stages.

        Raises:
            ValueError: the codec cannot encode such rows.
            TimedOut: a stage did not come; most likely it has no policy.
            RanksDisagree: stages have different policies.
        """
        codec = self.policy.hops.codec("pp")
        for cols in columns:
            codec.check(cols)
        mine = f'pp = "{codec}", min_bytes = {self.policy.min_bytes}'
        same_policy(group, mine, "stage", "hops", timeout_s)
        kernels.load(codec, device.type)

    def line(self, stages: int) -> str:
        """Say at the start what will be done.

        >>> Hops(Policy()).line(2)
        'flashcomm compresses pp hops in none; 2 stages'
        """
        but = "; but auto leaves them to the engine: stages share memory" if self._copied else ""
        return f"flashcomm compresses pp hops in {self.policy.hops.pp}; {stages} stages{but}"

    @property
    def _copied(self) -> bool:
        return self.shared and self.policy.algorithm == "auto"

    def encoded(
        self, tensors: Mapping[str, Any], rank: int = 0, ranks: int = 1, apart: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return what to send instead of `tensors`.

        Args:
            tensors: what a stage hands on; not changed.
            rank, ranks: of the stage's group whose ranks send a share each; one rank sends all.
            apart: names of tensors that differ among those ranks, so that each sends all of its own.
        """
        return dict(self._encoded(name, x, rank, ranks, name in apart) for name, x in tensors.items())

    def _encoded(self, name: str, x: Any, rank: int, ranks: int, apart: bool) -> tuple[str, Any]:
        if not isinstance(x, torch.Tensor) or name.startswith(_MARK):
            return name, x
        choice = self.policy.choose_hop("pp", x.numel() * x.element_size(), x.dtype)
        codec = choice.codec
        # As engines do: a share for each rank where the values divide.
        shares = ranks if x.numel() % ranks == 0 and not apart else 1
        copied = "stages share memory" if self._copied else None
        if reason := _why_whole(name, x, codec, shares) or choice.reason or copied:
            record_plain("hop", reason)
            return name, x
        cols = _columns(x.shape, shares)
        part = x.reshape(shares, -1, cols)[rank % shares]
        data = _packed(part, codec)
        plain_bytes = part.numel() * part.element_size()
        tally("hop", "pp", str(codec), "asked for", uncompressed=False).add(data.numel(), plain_bytes)
        about = {"name": name, "codec": str(codec), "dtype": str(x.dtype).removeprefix("torch."), "cols": cols}
        about |= {"shape": list(x.shape), "shares": shares, "bytes": data.numel()}
        if ranks > 1 and data.numel() % ranks == 0:
            # An engine cuts into shares what divides: an odd byte keeps it whole.
            data = torch.cat([data, data.new_zeros(1)])
        return _MARK + json.dumps(about), data

    def decode(self, tensors: dict[str, Any], gather: Callable[[torch.Tensor], torch.Tensor]):
        """Put back the tensors that the stage before has encoded.

        Args:
            tensors: what has been received; changed.
            gather: joins the shares of a stage's ranks, each a vector, in the order of the ranks.

        Raises:
            CollectiveError: a damaged payload.
        """
        for key in [key for key in tensors if key.startswith(_MARK)]:
            about = json.loads(key.removeprefix(_MARK))
            shape, shares = about["shape"], about["shares"]
            part = _unpacked(tensors.pop(key), about)
            tensors[about["name"]] = (part if shares == 1 else gather(part.view(-1))).view(shape)


def _why_whole(name: str, x: torch.Tensor, codec: Codec, shares: int) -> str | None:
    """The reason that a tensor cannot be encoded, beside the policy's."""
    if name not in TENSORS or x.dim() < 2:
        return f"{name} is none of {', '.join(TENSORS)}"
    if codec.varies and x.device.type != "cpu":
        return f"rows of {codec} are only packed on CPUs"
    return None if _columns(x.shape, shares) else f"rows do not divide among {shares} ranks"


def _columns(shape: torch.Size, shares: int) -> int:
    """Values of a row of one share: those of a token, or a part of them; 0 if shares are no whole rows of either.

    >>> _columns(torch.Size([6, 64]), 2), _columns(torch.Size([5, 64]), 2), _columns(torch.Size([2, 3]), 6)
    (64, 32, 0)
    """
    rows, cols = shape[:-1].numel(), shape[-1]
    if rows % shares == 0:
        return cols
    return 0 if cols % shares else cols // shares


def _packed(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Encode [T, H] into as few bytes as its rows take: uint8 [n]."""
    payload = kernels.encode(x, codec)
    if not codec.varies:
        return payload.view(-1)
    # Loads numba.
    from flashcomm.transports import rows

    return rows.pack(payload, payload)


def _unpacked(data: torch.Tensor, about: Mapping[str, Any]) -> torch.Tensor:
    """Decode what `_packed` has returned into [T, H]."""
    codec, dtype = codecs.named(about["codec"]), getattr(torch, about["dtype"])
    cols, size = about["cols"], about["bytes"]
    num_rows = torch.Size(about["shape"]).numel() // about["shares"] // cols
    bound = codec.payload_bytes(cols, dtype)
    if not codec.varies:
        return kernels.decode(data[:size].view(num_rows, bound), codec, cols=cols, dtype=dtype)
    from flashcomm.transports import rows

    payload = data.new_empty(num_rows, bound)
    payload.view(-1)[:size] = data[:size]
    if not rows.spread(payload, size):
        error = CollectiveError(f"a hop in {codec} is damaged: its rows do not add up to {size:,} bytes")
        worker_metrics.count_error(error)
        raise error
    return kernels.decode(payload, codec, cols=cols, dtype=dtype)
