"""`flashcomm bench gpu`: the Triton kernels, measured where there is a GPU and compiled ahead of time everywhere.

A compiled kernel tells how many registers a thread has, whether some are spilled to memory, and how many bytes must
move. The time of a copy of these bytes is its floor; only a GPU tells how close it comes.

All-reduces are measured beside their alternatives: the backend's, torch's own in one launch, and a cast to FP8.
"""

import inspect
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import codecs, kernels, simulate
from flashcomm.bench.codec import check
from flashcomm.bench.collectives import slowest
from flashcomm.bench.timing import interleaved
from flashcomm.collectives.group import group_of
from flashcomm.transports.base import Task

TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")
CODECS = ("int8g128", "int4g128", "int4g32", "mxfp4", "nvfp4", "fp8g128", "int2g32+spike")
VERBS = ("encode", "decode", "decode_sum_encode")
_COLS = 4096
_RANKS = 4
"""Number of payloads that `decode_sum_encode` adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRow:
    """One kernel, compiled for one target."""

    target: str
    kernel: str
    codec: str
    tile: int
    """Values per tile, which also sets the threads of a program."""
    threads: int
    registers: int | None
    """Registers per thread; None where the compiler does not tell."""
    spilled_bytes: int | None
    shared_bytes: int
    bytes_per_value: float
    """Bytes to read and write per value: the values as bf16, the payload once for each rank."""
    h200_floor_us: float
    """Time for 256 MiB of bf16 at 4.3 TB/s, the speed of a copy on an H200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """One kernel, measured."""

    codec: str
    kernel: str
    backend: str
    mib: int
    ms: float
    copy_ms: float
    copy_share: float
    """Bandwidth, in and out, over that of the copy."""


def measure(
    specs: Sequence[str],
    *,
    mib: int = 256,
    repeats: int = 15,
    device: str = "cuda",
    progress: Callable[[str], object] = lambda codec: None,
) -> list[GpuRow]:
    """Time each verb of each codec on `mib` MiB of bf16 in rows of 4,096, against a copy, in turns.

    Args:
        specs: codecs without calibration, no pairs.
        mib: size of the values in MiB.
        repeats: timed rounds.
        device: ``cuda``, or ``cpu`` in tests.
        progress: called with the name of each codec before it is measured.

    Raises:
        RuntimeError: a kernel's bytes differ from the specification's; no time is given then.
    """
    x = (
        torch.randn(
            mib * (1 << 19) // _COLS,
            _COLS,
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float32,
            device="cpu",
        )
        .bfloat16()
        .to(device)
    )
    copy, decoded = torch.empty_like(x), torch.empty_like(x)
    sync = torch.cuda.synchronize if x.is_cuda else (lambda: None)
    rows = []
    for spec in specs:
        progress(spec)
        codec = codecs.parse(spec)
        payload = kernels.encode(x, codec)
        check(codec, x[:256], payload[:256])
        payloads, sums = payload.expand(_RANKS, -1, -1).contiguous(), torch.empty_like(payload)
        like = {"cols": _COLS, "dtype": x.dtype, "out": decoded}
        calls = {
            "copy": lambda: copy.copy_(x),
            "encode": lambda c=codec, p=payload: kernels.encode(x, c, out=p),
            "decode": lambda c=codec, p=payload, like=like: kernels.decode(p, c, **like),
            "decode_sum_encode": lambda c=codec, p=payloads, s=sums: kernels.decode_sum_encode(
                p, c, c, cols=_COLS, out=s
            ),
        }
        times = interleaved(calls, repeats=repeats, before=sync, after=sync)
        copy_ms = times["copy"].p50_ms
        for verb in VERBS:
            moved = bytes_per_value(codec, verb) * x.numel()
            rows.append(
                GpuRow(
                    codec=str(codec),
                    kernel=verb,
                    backend=kernels.route(codec, x.device.type)[0],
                    mib=mib,
                    ms=times[verb].p50_ms,
                    copy_ms=copy_ms,
                    copy_share=moved / (4 * x.numel()) * copy_ms / times[verb].p50_ms,
                )
            )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceRow:
    """One way to sum over ranks that have GPUs."""

    ranks: int
    gpus: int
    backend: str
    """The process group's backend."""
    mib: int
    codec: str
    algorithm: str
    route: str
    """``one launch``, ``group`` (over the process group), or ``torch`` (its own)."""
    ms: float
    """Median of the slowest rank."""
    copy_ms: float
    """Time of a copy of the message on one rank."""
    speedup: float
    """Time of the backend's all-reduce over this one's."""


def all_reduces(specs: Sequence[str], mib: int = 16, repeats: int = 15, device: str = "cuda") -> list[AllReduceRow]:
    """Run on every rank of the default group: each codec in one step and in two, and the alternatives.

    Args:
        specs: codecs without calibration.
        mib: MiB of bf16 values on each rank, in rows of 4,096.
        repeats: timed rounds; variants take turns.
        device: ``cuda``, of which each rank takes one in turn, or ``cpu``.

    Returns:
        The same rows on every rank.

    Raises:
        RuntimeError: a compressed result is not that of `flashcomm.simulate`.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if gpus:
        torch.cuda.set_device(rank % gpus)
    shape = mib * (1 << 19) // _COLS, _COLS
    xs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(r), dtype=torch.float32, device="cpu").bfloat16()
        for r in range(ranks)
    ]
    x = xs[rank].to(device)
    out, copy = torch.empty_like(x), torch.empty_like(x)
    calls, memories = {}, group_of(None).meet(x.device).lane.memories if device == "cuda" else ()
    calls["none", "plain", "group"] = partial(flashcomm.all_reduce, x, "none", out=out)
    calls["cast to e4m3", "two_step", "group"] = partial(sum_in_fp8, x, out)
    if memories:
        calls["none", "two_shot", "torch"] = _two_shot(x)
    for codec in map(codecs.parse, specs):
        for algorithm in ("one_step", "two_step"):
            if algorithm == "one_step" and len(set(codec.formats)) > 1:
                continue
            call = partial(flashcomm.all_reduce, x, codec, algorithm=algorithm, out=out)
            call()
            if not torch.equal(out[:64].cpu(), simulate.all_reduce([one[:64] for one in xs], codec, algorithm)):
                raise RuntimeError(f"{codec} {algorithm}: rank {rank} got other values than one process computes")
            task = Task(
                name=algorithm,
                codec=codec,
                rows=x.shape[0],
                cols=x.shape[1],
                dtype=x.dtype,
                out_dtype=x.dtype,
                device=x.device,
            )
            route = "one launch" if any(memory.prepare(task, int) for memory in memories) else "group"
            calls[str(codec), algorithm, route] = call
    names = {" ".join(facts): facts for facts in calls}
    times = interleaved(
        {**{name: calls[facts] for name, facts in names.items()}, "copy": lambda: copy.copy_(x)},
        repeats=repeats,
        before=dist.barrier,
        after=torch.cuda.synchronize if device == "cuda" else lambda: None,
        combine=lambda seconds: slowest(seconds, x.device),
    )
    plain_ms = times["none plain group"].p50_ms
    return [
        AllReduceRow(
            ranks=ranks,
            gpus=gpus,
            backend=dist.get_backend(),
            mib=mib,
            codec=codec,
            algorithm=algorithm,
            route=route,
            ms=times[name].p50_ms,
            copy_ms=times["copy"].p50_ms,
            speedup=plain_ms / times[name].p50_ms,
        )
        for name, (codec, algorithm, route) in names.items()
    ]


def sum_in_fp8(x: torch.Tensor, out: torch.Tensor):
    """Sum x [T, H] in 8 bits with torch alone, in two steps: values cast to e4m3, no scales. T >= R."""
    ranks = dist.get_world_size()
    rows = -(-x.shape[0] // ranks)
    sent = torch.zeros(ranks * rows, x.shape[1], dtype=torch.float8_e4m3fn, device=x.device)
    sent[: x.shape[0]] = x.to(torch.float8_e4m3fn)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8))
    mine = received.view(ranks, rows, -1).float().sum(0).to(torch.float8_e4m3fn)
    group_of(None).backend.all_gather(mine.view(torch.uint8), sent.view(torch.uint8))
    out.copy_(sent[: x.shape[0]])


def _two_shot(x: torch.Tensor) -> Callable[[], object]:
    import torch.distributed._symmetric_memory as symmetric_memory

    group = group_of(None).backend.group.group_name
    shared = symmetric_memory.empty(x.shape, dtype=x.dtype, device=x.device)
    symmetric_memory.rendezvous(shared, group=group)

    def call():
        shared.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", group)

    return call


def bytes_per_value(codec: codecs.Codec, verb: str) -> float:
    """Bytes that a kernel must read and write for each value of bf16.

    >>> bytes_per_value(codecs.parse("int8g128"), "encode")
    3.03125
    """
    wire = codec.bits_per_value(_COLS) / 8
    return (_RANKS + 1) * wire if verb == "decode_sum_encode" else 2 + wire


def compiled(
    specs: Sequence[str] = CODECS,
    targets: Sequence[str] = TARGETS,
    progress: Callable[[str], object] = lambda kernel: None,
) -> list[CompiledRow]:
    """Compile all kernels of each codec for each target; needs no GPU.

    Raises:
        RuntimeError: Triton is missing, or was told to interpret.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled. Unset it")
    if missing := kernels.missing(codecs.parse("int8g128"), "cuda"):
        raise RuntimeError(missing)
    rows = []
    for target in targets:
        for spec in specs:
            progress(f"{spec} for {target}")
            rows += _compile(codecs.parse(spec), target)
    return rows


def _compile(codec: codecs.Codec, target: str) -> list[CompiledRow]:
    from flashcomm.kernels import gpu
    from flashcomm.kernels.gpu.tiles import move, norm
    from flashcomm.transports.symmetric import exchange, launch

    form, values = gpu.describe(codec, _COLS), gpu.VALUES[torch.bfloat16]
    length = launch.row_length(_COLS, codec)
    assert length is not None
    short = gpu.describe(codec, length)
    width = launch.padded(codec.payload_bytes(length))
    of_row = {
        "SOURCE": form,
        "VALUES": values,
        "V": max(_COLS, gpu.least_tile(form)),
        "EDGE": gpu.edge(_COLS, max(_COLS, gpu.least_tile(form))),
    }
    size = launch.tile_of(codec, length)
    of_tile = {
        "R": _RANKS,
        "VALUES": values,
        "FIRST": short,
        "SECOND": short,
        "V": size,
        "EDGE": gpu.edge(length, size),
        "WORDS": 1 << (width // 4 - 1).bit_length(),
        "PTX": target.startswith("sm_"),
    }
    sent = (_RANKS - 1) / _RANKS
    fused_bytes = {
        # Beside the values in and out, a payload is written, read and written again for each peer, and read.
        "one_step": 4 + (1 + 2 * (_RANKS - 1) + _RANKS) * width / length,
        "two_step": 4 + (1 + 2 * sent + 1 + 1 / _RANKS + 2 * sent + 1) * width / length,
    }
    whole = {"encode": (values, form), "decode": (form, values), "decode_sum_encode": (form, form)}
    jobs: list[tuple[str, Any, dict, float]] = [
        (verb, move.move, gpu.constants_of(*pair, _COLS), bytes_per_value(codec, verb)) for verb, pair in whole.items()
    ]
    jobs.append(("decode_sum_add_norm", norm.add_norm, of_row, 6 + codec.bits_per_value(_COLS) / 8))
    jobs += [(name, getattr(exchange, name), of_tile, moved) for name, moved in fused_bytes.items()]
    rows = []
    for name, kernel, constants, moved in jobs:
        binary, options = ahead_of_time(kernel, constants, target)
        registers, spilled = _resources(binary, target)
        rows.append(
            CompiledRow(
                target=target,
                kernel=name,
                codec=str(codec),
                tile=constants["V"],
                threads=options["num_warps"] * (64 if target.startswith("gfx9") else 32),
                registers=registers,
                spilled_bytes=spilled,
                shared_bytes=binary.metadata.shared,
                bytes_per_value=moved,
                h200_floor_us=moved * (256 << 19) / 4.3e12 * 1e6,
            )
        )
    return rows


_TYPES = {"bf16": "*i16", "fp16": "*i16", "fp32": "*i32", "": "*u8"}
_UNALIGNED = ("ranks", "rank", "rows", "patience")


def ahead_of_time(kernel: Any, constants: dict, target: str) -> tuple[Any, dict]:
    """Compile a kernel for ``sm_90``, ``gfx942``, ``gfx1100`` or so; rows of tensors begin at multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget

    from flashcomm.kernels import gpu

    values = _TYPES[constants["VALUES"].dtype] if "VALUES" in constants else ""
    source, out = (_TYPES[constants[name].dtype] if name in constants else values for name in ("SOURCE", "TARGET"))
    types = {
        "source_ptr": source,
        "payload_ptr": source,
        "target_ptr": out,
        **dict.fromkeys(("x_ptr", "out_ptr", "residual_ptr", "weight_ptr", "total_ptr"), values),
        "buffers_ptr": "*i64",
        **dict.fromkeys(("epochs_ptr", "lost_ptr"), "*i32"),
        **dict.fromkeys(("source_rank_stride", "rank_stride", "half_bytes"), "i64"),
        "epsilon": "fp32",
    }
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and name not in (*_UNALIGNED, "epsilon")]
    attrs: Any = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    # Radeon has warps of 32 threads, Instinct of 64.
    wide = target.startswith("gfx9")
    where = (
        GPUTarget("cuda", int(target[3:]), 32)
        if target.startswith("sm_")
        else GPUTarget("hip", target, 64 if wide else 32)
    )
    formats = (value for value in constants.values() if isinstance(value, gpu.Format))
    options = gpu.options(constants["V"], *formats)
    if wide:
        # The same threads in half the warps.
        options["num_warps"] //= 2
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=where, options=options), options


def _assembler(capability: int) -> str:
    """Path of the ptxas that Triton itself runs for a GPU: some releases bring a newer one for the newest GPUs."""
    from triton.backends.nvidia import compiler

    # Before Triton 3.6 there is one for all.
    asks = inspect.signature(compiler.get_ptxas).parameters
    return compiler.get_ptxas(*[capability][: len(asks)]).path


def _resources(binary: Any, target: str) -> tuple[int | None, int | None]:
    """(registers per thread, bytes that it spills) from the assembler."""
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        return int(registers[1]) if registers else None, 4 * int(spilled[1]) if spilled else None
    assembler = _assembler(int(target[3:]))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        arch = re.search(r"\.target\s+(\w+)", binary.asm["ptx"])
        command = [assembler, "-v", f"-arch={arch[1] if arch else target}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    return int(registers[1]) if registers else None, int(spilled[1]) if spilled else None
