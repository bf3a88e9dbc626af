"""Accelerators and links by name, and the costs of collectives on them: data sheets times measured shares.

A `Cluster` holds all that a prediction needs: how fast a rank computes, and `Facts` with the costs of its collectives.
It comes from here, by arithmetic, or from a file of ``flashcomm tune --save``, by measuring.

A plain sum is one call of the backend; a compressed sum is one call for each transfer. A call takes a latency and the
time in which the slowest link carries its bytes. Inside a host the latency is the same for 2 ranks as for 8; between
hosts it grows with the logarithm of their number.

Shape legend: R ranks, H hosts of L ranks, M bytes of a message in 16 bits, C bytes of its payload.

Source: the alpha-beta model (Hockney 1994), bytes per step from docs/algorithms.md; each figure has its own.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from flashcomm.codecs import parse
from flashcomm.errors import did_you_mean
from flashcomm.planner.choose import MOST_PIECES, PIECE_S, Facts
from flashcomm.planner.costs import SIZES, Algorithm, Cost, LinkCosts
from flashcomm.planner.overlap import CROWDED
from flashcomm.units import bits_per_second

MATMUL_SHARE = 0.81
"""Share of the peak that the best matrix products reach: 252.9 of 312 TFLOPS on an A100 PCIe, the slowest NVIDIA card of
the table "Maximum Achievable Matmul FLOPS" in github.com/stas00/ml-engineering; cards in that table have their own."""
ATTENTION_SHARE = 0.62
"""Share of the peak that attention reaches: the middle of the 50 to 73 % of FlashAttention-2, arXiv 2307.08691, abstract."""
MEMORY_SHARE = 0.83
"""Share of the memory bandwidth that copies reach: inside an RTX PRO 6000, 1,488 of 1,792 GB/s, voipmonitor/rtx6kpro, pcie-bandwidth.md."""
ETHERNET_SHARE = 0.92
"""Share of the rate that plain all-reduces reach: 16 MiB at 1 Gbit/s, results/all_reduce_lab4_1gbit.md."""
STAGE_S = 3.7e-6
"""Shortest time of encoding, adding up or decoding on a GPU: 23.9 us for int8 less 12.7 us for fp16 by the same
algorithm and three stages, 2 KiB on 4 MI300X, github.com/vllm-project/vllm/pull/19744."""
NETWORK_S = 20e-6
"""Latency of a call between two hosts with RDMA: the ring's 19.8 us in RCCL's tuning model."""
CPU_STEP_S = 0.45e-3
"""Latency of a call between two CPU hosts: half of 0.9 ms, 16 KiB among 4, one_step, results/all_reduce_lab4_1gbit.md."""
CPU_PLAIN_CORE_S, CPU_CODEC_CORE_S = 1.76e-9, 1.2e-9
"""Core seconds for each byte of a message, plain and int8g128: 29.5 and 20 ms for 16 MiB, cpu_ms of
results/all_reduce_lab4_10gbit.md."""
CPU_CODEC_BYTES_S = 3.1e9
"""Bytes per second that a core encodes, sends, adds up and decodes, in and out of its codecs: the same 20 ms."""
CPU_LOSSLESS_BYTES_S = 1.5e9
"""The same of ``lossless``, an estimate: its kernels take 2.5 times as long as those of int8g128 (results/codec_cpu.md),
and sending takes as long."""
_BITS = (4.25, 8.25)
_CPU_PIECES = (1, 3, 6, MOST_PIECES)


class HostLink(NamedTuple):
    """The link between the ranks of one host, each direction by itself."""

    gbytes_s: float
    """Peak of one rank, 1e9 bytes/s; of one pair of ranks where `per_peer`."""
    achieved: float
    """1e9 bytes/s that all-reduces of many MiB reached."""
    call_s: float
    """Latency of one collective in seconds, independent of its size."""
    sm_share: float
    """Share of the processors that a transfer takes from the compute beside it."""
    source: str
    per_peer: bool = False


_NVLINK_CALL = "4 KB take 19.4 us, 8 H100, NVIDIA aiconfigurator"
_PCIE_CALL = "8 B take 42 us, 8 RTX 4090, NVIDIA/nccl#1530"
_PCIE_SMS, _NVLINK_SMS = 0.03, 0.18
"""4 of 128 processors, as PCIe wants 1 to 4 blocks (NVFP4 all-reduce, lessons); 24 of 132, as TokenWeave's 16 to 32."""
LINKS = {
    "pcie4": HostLink(31.5, 20, 42e-6, _PCIE_SMS, f"PCIe 4.0 x16; 20 GB/s: NVIDIA/nccl-tests#178; {_PCIE_CALL}"),
    "pcie4-sys": HostLink(31.5, 10, 42e-6, _PCIE_SMS, f"PCIe 4.0 x16, through the CPUs; 10 GB/s: what NCCL takes for SYS, NVIDIA/nccl-tests#307; {_PCIE_CALL}"),
    "pcie5": HostLink(63, 35, 42e-6, _PCIE_SMS, f"PCIe 5.0 x16; 35 GB/s: 4 RTX 5090, NVIDIA/nccl#1639; {_PCIE_CALL}"),
    "nvlink3": HostLink(300, 208, 19.4e-6, _NVLINK_SMS, f"NVIDIA: 600 GB/s both ways; 208 GB/s: NVIDIA/nccl-tests#178; {_NVLINK_CALL}"),
    "nvlink3-a800": HostLink(200, 139, 19.4e-6, _NVLINK_SMS, f"NVIDIA: 400 GB/s both ways; the share of nvlink3; {_NVLINK_CALL}"),
    "nvlink4": HostLink(450, 306, 19.4e-6, _NVLINK_SMS, f"NVIDIA: 900 GB/s both ways; 306 GB/s: 4 H100, 0.5 to 4 MiB, vllm#24532; {_NVLINK_CALL}"),
    "nvlink5": HostLink(900, 770, 19.4e-6, _NVLINK_SMS, f"NVIDIA: 1,800 GB/s both ways; 770 GB/s: GB200, Azure/AI-benchmarking-guide#7; {_NVLINK_CALL}"),
    "xgmi": HostLink(64, 45.8, 14e-6, _NVLINK_SMS, "AMD: 7 links of 64 GB/s; 45.8 GB/s, and 37.2 us for 1 MiB: 2 MI300X, RCCL, mk1-project/quickreduce", per_peer=True),
    "memory": HostLink(20, 8, 0.05e-3, 1.0, "shared memory of a CPU host: 16 MiB among 4 ranks, results/all_reduce_shared_cpu.md"),
}  # fmt: skip
"""Links between the GPUs of a host. One collective among 4 or 8 ranks reaches the second figure, in 1e9 bytes/s."""


class Accelerator(NamedTuple):
    """The processor that one rank runs on."""

    tflops: float
    """Peak for bf16 without sparsity."""
    matmul_share: float
    memory_gbytes_s: float
    link: str
    """Name in `LINKS`."""
    source: str
    rate: str = "400gbit"
    """Default rate of the link between hosts."""
    ranks_per_host: int = 8
    attention_share: float = ATTENTION_SHARE
    memory_share: float = MEMORY_SHARE

    @property
    def is_cpu(self) -> bool:
        """Whether a rank is a process without an accelerator."""
        return self.link == "memory"


_MAMF = "matmul: stas00/ml-engineering"
_CPU = "a rank on each core of an AMD EPYC (Zen 5): transformers, CPU time, as `flashcomm tune --save` counts"
ACCELERATORS = {
    "l4": Accelerator(121, MATMUL_SHARE, 300, "pcie4", "NVIDIA L4 data sheet: 242 with sparsity"),
    "a10": Accelerator(125, MATMUL_SHARE, 600, "pcie4", "NVIDIA A10 data sheet"),
    "l40": Accelerator(181, MATMUL_SHARE, 864, "pcie4", "NVIDIA L40 data sheet"),
    "l40s": Accelerator(362, MATMUL_SHARE, 864, "pcie4", "NVIDIA L40S data sheet"),
    "rtx4090": Accelerator(165, MATMUL_SHARE, 1008, "pcie4-sys", "NVIDIA Ada whitepaper; no peer access over PCIe"),
    "rtxpro6000": Accelerator(500, MATMUL_SHARE, 1792, "pcie5", "NVIDIA data sheet: an eighth of 4,000 TOPS FP4 with sparsity"),
    "a100-pcie": Accelerator(312, 0.81, 1935, "pcie4", f"NVIDIA A100 data sheet, 80 GB; {_MAMF}"),
    "a100": Accelerator(312, 0.869, 2039, "nvlink3", f"NVIDIA A100 data sheet, SXM 80 GB; {_MAMF}"),
    "a800": Accelerator(312, 0.869, 2039, "nvlink3-a800", f"as A100 SXM, with 400 GB/s of NVLink; {_MAMF}"),
    "h20": Accelerator(148, MATMUL_SHARE, 4000, "nvlink4", "NVIDIA H20 data sheet"),
    "h100-pcie": Accelerator(756, MATMUL_SHARE, 2000, "pcie5", "NVIDIA H100 data sheet, PCIe"),
    "h100": Accelerator(989, 0.803, 3350, "nvlink4", f"NVIDIA H100 data sheet, SXM; {_MAMF}"),
    "h200": Accelerator(989, 0.803, 4800, "nvlink4", f"NVIDIA H200 data sheet; {_MAMF}, of H100"),
    "b200": Accelerator(2250, 0.776, 8000, "nvlink5", f"NVIDIA B200 data sheet; {_MAMF}"),
    "mi300x": Accelerator(1307, 0.514, 5300, "xgmi", f"AMD MI300X data sheet; {_MAMF}"),
    **{
        f"cpu-{rate}gbe": Accelerator(
            0.31, 1.0, 1.2, "memory", _CPU, rate=f"{rate}gbit", ranks_per_host=1, attention_share=0.24, memory_share=1.0
        )
        for rate in (1, 10, 25, 100)
    },
}  # fmt: skip
"""Accelerators by name. ``flashcomm tune --save`` writes a file for the machine at hand, which is better."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks, the speed of each, and the costs of their collectives."""

    name: str
    group: Facts
    """Facts about the ranks, among them their `costs`."""
    flops: float
    """Operations per second in matrix products."""
    attention_flops: float
    bytes_s: float
    """Bytes per second that are read and written between products."""
    segment_s: float = 0.0
    """Shortest time of a segment, in seconds."""
    plain_core: float = 0.0
    """Core seconds that a plain sum takes from the compute beside it, per byte of the message."""
    codec_core: float = 0.0
    """The same for a compressed sum."""
    crowded: float = 0.0
    """The same as in `flashcomm.planner.overlap.Profile`."""
    skips: str = "all"
    """The same as in `flashcomm.planner.overlap.Profile`."""
    facts: tuple[str, ...] = field(default=(), compare=False)
    """Sources of the figures, in words."""

    def as_dict(self) -> dict:
        """Convert to what JSON stores."""
        assert self.group.costs is not None
        rates = {name: getattr(self, name) for name in _RATES}
        ranks = {"ranks": self.group.ranks, "hosts": self.group.hosts}
        return {"name": self.name, **ranks, **rates, "skips": self.skips, "machine": self.group.costs.as_dict()}

    @classmethod
    def from_dict(cls, fields: Any, source: str) -> "Cluster":
        """Read what `as_dict` returns.

        Raises:
            ValueError: a key is missing, or its value is of another kind; names `source` and the key.
        """
        if not isinstance(fields, Mapping) or not isinstance(fields.get("machine"), Mapping):
            raise ValueError(f"{source}: no machine in it. Give a file of `flashcomm tune --save FILE`")
        for key in (*_RATES, "ranks", "hosts"):
            value = fields.get(key)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
                raise ValueError(
                    f"{source}: {key} = {value!r}, and a number of 0 or more is needed. Make it again with "
                    "`flashcomm tune --save FILE`"
                )
        try:
            costs = LinkCosts.from_dict(dict(fields["machine"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{source}: its machine cannot be read ({error!r}): make it again") from None
        group = Facts(ranks=int(fields["ranks"]), hosts=int(fields["hosts"]), connected=True, costs=costs)
        rates = {key: float(fields[key]) for key in _RATES}
        return cls(
            name=str(fields.get("name", source)), group=group, skips=str(fields.get("skips", "all")),
            facts=(f"measured: {source}",), **rates,
        )  # fmt: skip


_RATES = ("flops", "attention_flops", "bytes_s", "segment_s", "plain_core", "codec_core", "crowded")


def accelerator(name: str) -> Accelerator:
    """Find an accelerator by its name, which may end with a number of ranks: ``l40x4``.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    key = re.sub(r"x\d+$", "", name.lower()) if name.lower() not in ACCELERATORS else name.lower()
    if key not in ACCELERATORS:
        raise ValueError(
            f"unknown machine {name!r}.{did_you_mean(key, ACCELERATORS)} Allowed: {', '.join(ACCELERATORS)}, or a file "
            "of `flashcomm tune --save FILE`"
        )
    return ACCELERATORS[key]


def cluster(
    name: str, ranks: int, *, ranks_per_host: int | None = None, rate: str | None = None, link: str | None = None
) -> Cluster:
    """Compute the cluster of `ranks` ranks on accelerators of the table.

    Args:
        name: in `ACCELERATORS`.
        ranks: R, 2 or more.
        ranks_per_host: L; the table's if not given, or all ranks if there are fewer.
        rate: of each host's link to the others, such as ``100gbit``; the table's if not given.
        link: in `LINKS`, between the ranks of a host; the table's if not given.

    Raises:
        ValueError: an unknown name, or ranks that hosts of that size cannot hold.

    >>> cluster("l40", 4).group.hosts, cluster("h100", 1024).group.hosts
    (1, 128)
    """
    one, ways = accelerator(name), paths(name, ranks, ranks_per_host=ranks_per_host, rate=rate, link=link)
    inside, hosts, rate, wire = ways.inside, ways.hosts, rate or one.rate, LINKS[link or one.link]
    sends = 2 * (ranks - 1) / ranks / (ways.bytes_s if hosts == 1 else min(ways.bytes_s, ways.host_bytes_s))
    facts = [f"{name}: {one.tflops:g} TFLOPS, {one.memory_gbytes_s:g} GB/s ({one.source})"]
    if inside > 1:
        facts.append(f"{link or one.link}: {wire.achieved:g} of {wire.gbytes_s:g} GB/s ({wire.source})")
    if hosts > 1:
        facts.append(f"between {hosts} hosts: {rate} each")
    peak = 1e12 * one.tflops
    return Cluster(
        name=f"{ranks} x {name}",
        group=Facts(ranks=ranks, hosts=hosts, connected=one.is_cpu, costs=ways.costs(f"{ranks} x {name}")),
        flops=one.matmul_share * peak,
        attention_flops=one.attention_share * peak,
        bytes_s=1e9 * one.memory_share * one.memory_gbytes_s,
        plain_core=CPU_PLAIN_CORE_S if one.is_cpu else wire.sm_share * sends,
        # Half of the bytes travel, and the codecs compute.
        codec_core=CPU_CODEC_CORE_S
        if one.is_cpu
        else wire.sm_share * sends / 2 + ways.codec_s("two_step", 1.0, 0.5) - 3 * ways.stage_s,
        crowded=CROWDED if one.is_cpu else 0.0,
        facts=tuple(facts),
    )


def paths(
    name: str, ranks: int, *, ranks_per_host: int | None = None, rate: str | None = None, link: str | None = None
) -> "Paths":
    """Look up what carries the messages of a cluster; arguments and errors as of `cluster`."""
    one = accelerator(name)
    if ranks < 2:
        raise ValueError(f"{ranks} rank: one rank sends nothing. Give 2 or more")
    inside = min(ranks_per_host or one.ranks_per_host, ranks)
    if ranks % inside:
        raise ValueError(f"{ranks} ranks on hosts of {inside}: give a number of ranks per host that divides {ranks}")
    if link is not None and link not in LINKS:
        raise ValueError(f"unknown link {link!r}. Allowed: {', '.join(LINKS)}")
    wire = LINKS[link or one.link]
    return Paths(
        ranks=ranks,
        inside=inside,
        bytes_s=1e9 * wire.achieved * (inside - 1 if wire.per_peer else 1),
        call_s=wire.call_s,
        host_bytes_s=ETHERNET_SHARE * bits_per_second(rate or one.rate) / 8,
        network_s=CPU_STEP_S if one.is_cpu else NETWORK_S,
        codec_bytes_s=CPU_CODEC_BYTES_S if one.is_cpu else 1e9 * one.memory_share * one.memory_gbytes_s,
        stage_s=0.0 if one.is_cpu else STAGE_S,
        pieces=_CPU_PIECES if one.is_cpu else (1,),
        plain_core_s=CPU_PLAIN_CORE_S if one.is_cpu else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Rates and latencies of the links and codecs that carry a message."""

    ranks: int
    inside: int
    """L, the ranks of a host."""
    bytes_s: float
    """Bandwidth of one rank to the others of its host."""
    call_s: float
    host_bytes_s: float
    """Bandwidth of one host to the others."""
    network_s: float
    codec_bytes_s: float
    stage_s: float
    pieces: tuple[int, ...]
    plain_core_s: float
    """Core seconds of a plain sum, per byte; 0 where links alone limit it."""

    @property
    def hosts(self) -> int:
        return self.ranks // self.inside

    def costs(self, name: str) -> LinkCosts:
        """Compute the costs of every algorithm at the sizes that are compared."""
        names = ["one_step", "two_step", *(["hierarchical"] if 1 < self.hosts < self.ranks else [])]
        algorithms = [Algorithm(name=name, pieces=n) for name in names for n in self.pieces]
        compressed = {one: self._cost(one, _BITS) for one in algorithms}
        whole = [one for one in algorithms if one.pieces == 1]
        exact = {one: self._cost(one, (16.0,)) for one in whole} if len(self.pieces) > 1 else {}
        lossless = {}
        if len(self.pieces) > 1:
            slower, bits = replace(self, codec_bytes_s=CPU_LOSSLESS_BYTES_S), parse("lossless").bits_per_value(4096)
            lossless = {one: slower._cost(one, (bits,)) for one in algorithms}
        plain = Cost.measured([(size, 16.0, self.plain_s(size)) for size in SIZES])
        return LinkCosts(name=name, plain=plain, compressed=compressed, uncompressed=exact, lossless=lossless)

    def plain_s(self, message: float) -> float:
        """Seconds of the backend's ring, which enters and leaves each host once."""
        sent = 2 * (self.ranks - 1) / self.ranks * message
        return self._latency_s(1) + max(
            sent / self.bytes_s if self.inside > 1 else 0.0,
            sent / self.host_bytes_s if self.hosts > 1 else 0.0,
            message * self.plain_core_s,
        )

    def codec_s(self, algorithm: str, message: float, payload: float) -> float:
        """Seconds in which encoding, adding up and decoding read and write their bytes."""
        if algorithm == "one_step":
            stages, moved = 2, 2 * message + (self.ranks + 1) * payload
        elif algorithm == "two_step":
            stages, moved = 3, 2 * message + (3 + 1 / self.ranks) * payload
        else:
            stages, moved = 4, 3 * message + (2 * message + 3 * payload) / self.inside
        return stages * self.stage_s + moved / self.codec_bytes_s

    def _cost(self, algorithm: Algorithm, widths: tuple[float, ...]) -> Cost:
        return Cost.measured([(size, bits, self._call_s(algorithm, size, bits)) for size in SIZES for bits in widths])

    def _call_s(self, algorithm: Algorithm, message: int, bits: float) -> float:
        payload, others = message * bits / 16, self.ranks - self.inside
        if algorithm.name == "one_step":
            calls, inside, between = 1, (self.inside - 1) * payload, self.inside * others * payload
        elif algorithm.name == "two_step":
            calls = 2
            inside = 2 * (self.inside - 1) / self.ranks * payload
            between = 2 * self.inside * others / self.ranks * payload
        else:
            calls = 2
            inside = 2 * (self.inside - 1) / self.inside * message
            between = (1 if self.hosts == 2 else 2 * (self.hosts - 1) / self.hosts) * payload
        inside_s, between_s = inside / self.bytes_s, between / self.host_bytes_s
        # Levels take turns; without them both links carry at once.
        links = inside_s + between_s if algorithm.name == "hierarchical" else max(inside_s, between_s)
        codecs = self.codec_s(algorithm.name, message, payload)
        if len(self.pieces) == 1:
            return self._latency_s(calls) + links + codecs
        hidden = min(links, codecs) * (1 - 1 / algorithm.pieces)
        return self._latency_s(calls) + links + codecs - hidden + (algorithm.pieces - 1) * PIECE_S

    def _latency_s(self, calls: int) -> float:
        network = self.network_s * math.ceil(math.log2(self.hosts)) if self.hosts > 1 else 0.0
        return calls * ((self.call_s if self.inside > 1 else 0.0) + network)
