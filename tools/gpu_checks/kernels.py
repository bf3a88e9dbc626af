"""Codec kernels: their environment, bytes, speeds and counters."""

import importlib.metadata
import itertools
import multiprocessing
import subprocess
import sys
import traceback
from pathlib import Path

import torch

import flashcomm
from flashcomm import codecs, kernels
from flashcomm.codecs import Codec
from gpu_checks.measuring import DEVICE, DRY, device_ms, differing, host_us, note, synchronize

SCRIPT = str(Path(__file__).parents[1] / "gpu_check.py")
PACKAGES = ("torch", "triton", "numba", "numpy", "transformers", "greenlet", "pytest", "nvidia-nccl-cu13")
CODECS = ("int8g128", "int4g128", "int4g32", "int6g128", "int3g32", "mxfp4", "mxfp8_e4m3", "nvfp4", "fp8g128", "bf16")
SPIKES = "int2g32+spike"
_WORKERS = 14
_METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
)


def env():
    """Note versions, the GPU and its clocks, and the kernels that serve it."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    note(flashcomm=flashcomm.__version__, python=sys.version.split()[0], versions=found)
    # Fails where it does not know the installed numpy.
    import numba  # noqa: F401

    if not DRY:
        gpu = torch.cuda.get_device_properties(0)
        note(gpu=gpu.name, multiprocessors=gpu.multi_processor_count, memory_gib=gpu.total_memory >> 30)
        query = "--query-gpu=clocks.sm,clocks.mem,driver_version,compute_mode"
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        note(clocks=done.stdout.strip())
    note(route=list(kernels.route(codecs.parse("int8g128"), DEVICE)))


def ceilings():
    """Note the speed of a copy by size, and the cost of a launch."""
    from flashcomm.kernels import gpu

    speeds = {}
    for mib in (1, 4, 16, 64, 256, 1024):
        x = torch.empty(mib << 20, dtype=torch.uint8, device=DEVICE).random_()
        y = torch.empty_like(x)
        speeds[mib] = round(2 * x.numel() / device_ms(lambda x=x, y=y: y.copy_(x)) / 1e6, 1)
    note(copy_gb_s_by_mib=speeds)
    x, codec = torch.randn(16, 4096, device=DEVICE).bfloat16(), codecs.parse("int8g128")
    payload, y = kernels.encode(x, codec), torch.empty_like(x)
    calls = {
        "copy_": lambda: y.copy_(x),
        "kernels.encode": lambda: kernels.encode(x, codec, out=payload),
        "kernels.decode": lambda: kernels.decode(payload, codec, cols=4096, dtype=x.dtype, out=y),
        "gpu.encode": lambda: gpu.encode(x, codec, payload),
    }
    note(host_us={name: host_us(call) for name, call in calls.items()})
    note(device_us_of_128_kib={name: round(1e3 * device_ms(call, 50), 2) for name, call in calls.items()})


def bandwidth():
    """Note the time of each verb of each codec beside a copy of as many bytes: 1 GiB of bf16 in rows of 4,096."""
    from flashcomm.kernels import gpu

    rows, cols = (2, 256) if DRY else ((1 << 29) // 4096, 4096)
    x = torch.randn(2, cols, device=DEVICE).bfloat16().repeat(rows // 2, 1)
    y = torch.empty_like(x)
    copy_gb_s, table = 4 * x.numel() / device_ms(lambda: y.copy_(x)) / 1e6, {}
    for spec in CODECS[:2] if DRY else (*CODECS, SPIKES):
        codec = codecs.parse(spec)
        payload = torch.empty(rows, codec.payload_bytes(cols), dtype=torch.uint8, device=DEVICE)
        gpu.encode(x, codec, payload)
        payloads, again = payload[None].repeat(4, 1, 1), torch.empty_like(payload)
        wire = codec.payload_bytes(cols) / cols
        for name, call, moved in _verbs(gpu, codec, x, payload, payloads, y, again, wire):
            ms = device_ms(call, 3, 5)
            gb_s = moved * x.numel() / ms / 1e6
            table[f"{spec} {name}"] = {"ms": round(ms, 4), "gb_s": round(gb_s), "share": round(gb_s / copy_gb_s, 3)}
            print(f"{spec:14s} {name:18s} {ms:9.4f} ms  {gb_s / copy_gb_s:6.1%} of a copy")
    note(copy_gb_s=round(copy_gb_s), table=table)


def _verbs(gpu, codec: Codec, x, payload, payloads, y, again, wire: float):
    return (
        ("encode", lambda: gpu.encode(x, codec, payload), 2 + wire),
        ("decode", lambda: gpu.decode_sum(payload[None], codec, y), 2 + wire),
        ("decode_sum_encode", lambda: gpu.decode_sum_encode(payloads, codec, codec, x.shape[1], again), 5 * wire),
    )


def bytes_of_formats():
    """Compare the bytes of all formats with the specification's; as many processes compile as there are cores."""
    from kernels import test_tiles

    specs = ("int4g128", "mxfp4") if DRY else test_tiles.SPECS
    if DRY:
        wrong = list(itertools.chain(*map(_wrong_bytes, specs)))
    else:
        with multiprocessing.get_context("spawn").Pool(_WORKERS) as pool:
            wrong = list(itertools.chain(*pool.imap_unordered(_wrong_bytes, specs)))
    note(formats=len(specs), wrong=wrong)
    print(f"{len(specs)} formats", *wrong[:12], sep="\n")


def _wrong_bytes(spec: str) -> list[str]:
    """Mistakes of one format in all types and kinds of rows."""
    wrong: list[str] = []
    try:
        _compare(codecs.parse(spec), wrong)
    except Exception:
        # The error of a worker may hold what cannot be sent.
        wrong.append(traceback.format_exc()[-600:])
    return [f"{spec}: {what}" for what in wrong]


def _compare(codec: Codec, wrong: list[str]):
    import values
    from flashcomm.kernels import gpu
    from kernels import test_tiles

    def same(what: str, got: torch.Tensor, want: torch.Tensor):
        if bad := differing(got, want):
            wrong.append(f"{what}: {bad} bytes")

    shapes = test_tiles.ROWS[:1] if DRY else (*test_tiles.ROWS, (torch.bfloat16, 4096), (torch.bfloat16, 5120))
    for dtype, cols in shapes:
        if gpu.why_not(codec, cols):
            continue
        x = test_tiles.rows(dtype, cols)
        payload = codec.encode(x)
        same(f"encode {dtype} {cols}", test_tiles.encoded(codec, x), payload)
        payloads = torch.stack([payload, payload.flip(0)]).to(DEVICE)
        out = torch.empty(3, cols, dtype=dtype, device=DEVICE)
        gpu.decode_sum(payloads[:1], codec, out)
        same(f"decode {dtype} {cols}", out, codec.decode(payload, cols, dtype))
        again = torch.empty_like(payload, device=DEVICE)
        gpu.decode_sum_encode(payloads, codec, codec, cols, again)
        same(f"decode_sum_encode {dtype} {cols}", again, codecs.decode_sum_encode(payloads.cpu(), codec, codec, cols))
    for dtype in () if DRY else (torch.bfloat16, torch.float16):
        x = values.every_pattern(dtype).reshape(32, 2048)
        same(f"patterns of {dtype}", test_tiles.encoded(codec, x), codec.encode(x))
    wide = torch.randn(4, 256 + 3).bfloat16()
    odd = wide.to(DEVICE)[:, 3:]
    payload = torch.empty(4, codec.payload_bytes(256), dtype=torch.uint8, device=DEVICE)
    gpu.encode(odd, codec, payload)
    same("rows at odd addresses", payload, codec.encode(wide[:, 3:]))


def far_apart():
    """Decode payloads of ranks that lie more than 2 GiB apart in all."""
    from flashcomm.kernels import gpu

    codec, x = codecs.parse("int8g128"), torch.randn(1, 128)
    payload = codec.encode(x)
    stride = (1 << 20) if DRY else int(0.8 * 2**30)
    base = torch.empty(4 * stride, dtype=torch.uint8, device=DEVICE)
    payloads = torch.as_strided(base, (4, 1, payload.shape[1]), (stride, payload.shape[1], 1))
    payloads.copy_(payload[None].expand(4, -1, -1))
    out = torch.empty(1, 128, device=DEVICE)
    gpu.decode_sum(payloads, codec, out)
    synchronize()
    want = codecs.decode_sum(payload[None].expand(4, -1, -1), codec, 128, torch.float32)
    note(wrong=[f"{bad} bytes"] if (bad := differing(out, want)) else [])


def counters():
    """Note issue slots and memory of six launches, by the hardware's counters."""
    done = subprocess.run(
        ["ncu", "--clock-control", "none", "--metrics", ",".join(_METRICS), "-k", "regex:^move", "-c", "6", "--csv",
         sys.executable, SCRIPT, "--one", "few_kernels", "."],
        capture_output=True, text=True, timeout=80,
    )  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if "move" in line]
    note(rows=rows, tail="" if rows else (done.stdout + done.stderr)[-300:])
    print("\n".join(rows) or done.stderr[-300:])


def few_kernels():
    """Launch each verb of two codecs once, for `counters`."""
    from flashcomm.kernels import gpu

    x = torch.randn(1 << 15, 4096, device=DEVICE).bfloat16()
    y = torch.empty_like(x)
    for spec in CODECS[:2]:
        codec = codecs.parse(spec)
        payload = torch.empty(x.shape[0], codec.payload_bytes(4096), dtype=torch.uint8, device=DEVICE)
        gpu.encode(x, codec, payload)
        gpu.decode_sum(payload[None], codec, y)
        gpu.decode_sum_encode(payload[None].repeat(4, 1, 1), codec, codec, 4096, torch.empty_like(payload))
    synchronize()
