"""`flashcomm bench gpu`: every kernel compiles for every kind of GPU, and spills hardly a register to memory."""

import json
import re
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import ranks
from thorough import thorough

pytest.importorskip("triton")
from flashcomm.bench import gpu
from flashcomm.cli import app

SPECS = {
    "sm_80": ("int4g128", "nvfp4", "int2g32+spike"),
    "sm_89": ("int4g128",),
    "sm_90": ("mxfp4",),
    "gfx942": ("int4g128",),
}
"""One format of each kind of device function on one target; the rest differ in constants, and targets hardly at all."""


SPILLED_BYTES = 96
"""Bytes that a thread may spill in `two_step`: Triton 3.6 spills up to 20, 3.7 and 3.9 up to 84."""


def command(*arguments):
    return CliRunner().invoke(app, ["bench", "gpu", *map(str, arguments)], env={"TRITON_INTERPRET": None})


def exit_status(*arguments) -> int:
    """Output of the command in this process."""
    return command(*arguments).exit_code


@pytest.fixture(scope="module")
def compiler():
    """A process that has not imported Triton yet, which is interpreted here."""
    with ProcessPoolExecutor(1, get_context("spawn"), ranks.forget, ("TRITON_INTERPRET",)) as pool:
        yield pool


@pytest.mark.parametrize("target", [*gpu.TARGETS[:-1], thorough(gpu.TARGETS[-1])])
def test_all_kernels_compile_with_hardly_a_spill(compiler, target, tmp_path):
    file = tmp_path / "rows.json"
    specs = SPECS[target]
    assert compiler.submit(exit_status, "--codecs", ",".join(specs), "--targets", target, "--json", file).result() == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6 * len(specs)
    for row in rows:
        assert row["target"] == target
        # Triton 3.6 spills a word in one_step for sm_89.
        assert row["spilled_bytes"] <= (SPILLED_BYTES if row["kernel"] == "two_step" else 4), row
        assert row["shared_bytes"] <= 48 << 10, row


def test_kernels_compile_for_radeon(compiler, tmp_path):
    if version("triton").startswith("3.4."):
        pytest.skip("Triton 3.4 brings no linker for AMD's GPUs")
    file = tmp_path / "rows.json"
    assert compiler.submit(exit_status, "--codecs", "int8g128", "--targets", "gfx1100", "--json", file).result() == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(row["kernel"], row["spilled_bytes"]) for row in rows} == {
        *((verb, 0) for verb in (*gpu.VERBS, "decode_sum_add_norm", "one_step", "two_step"))
    }
    assert {row["threads"] for row in rows} <= {128, 256, 512}


def test_an_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set: nothing is compiled"):
        gpu.compiled()


def test_measuring_checks_the_bytes_first_and_counts_what_moves():
    rows = gpu.measure(["int8g128"], mib=1, repeats=1, device="cpu")
    assert [row.kernel for row in rows] == list(gpu.VERBS)
    for row in rows:
        assert row.backend == "numba"
        moved = {"encode": 2 + 1.03125, "decode": 2 + 1.03125, "decode_sum_encode": 5 * 1.03125}[row.kernel]
        assert row.copy_share == pytest.approx(moved / 4 * row.copy_ms / row.ms)


def test_all_reduces_are_measured_beside_what_one_would_use_instead():
    for rows in ranks.shared(2).run(gpu.all_reduces, ["int4g128", "int4g128:int8g128"], 1, 2, "cpu"):
        ways = [(row.codec, row.algorithm, row.route) for row in rows]
        assert ways == [
            ("none", "plain", "group"),
            ("cast to e4m3", "two_step", "group"),
            ("int4g128", "one_step", "group"),
            ("int4g128", "two_step", "group"),
            ("int4g128:int8g128", "two_step", "group"),
        ]
        assert rows[0].speedup == 1
        assert all(row.speedup == pytest.approx(rows[0].ms / row.ms) for row in rows)


def cast_and_summed():
    size, rank = dist.get_world_size(), dist.get_rank()
    xs = [torch.randn(7, 64, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(size)]
    out = torch.empty_like(xs[rank])
    gpu.sum_in_fp8(xs[rank], out)
    exact, reach = sum(x.double() for x in xs), sum(x.double().abs() for x in xs)
    # Half a step of e4m3 is at most 2^-4 of a value, or of the smallest step: once for each value, once for the sum.
    assert ((out.double() - exact).abs() <= 2.0**-4 * (2.0**-4 + 1) * reach + 2.0**-4 * exact.abs() + 2.0**-9).all()
    return out


def test_the_cast_that_others_use_sums():
    first, *others = ranks.shared(3).run(cast_and_summed)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_all_reduces_on_a_gpu(world_size, fresh_ranks):
    env = {"FLASHCOMM_FUSED": "1", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    rows = fresh_ranks(world_size, env=env).run(gpu.all_reduces, ["int8g128", "int4g128"], 4, 3)[0]
    assert {row.algorithm for row in rows} >= {"one_step", "two_step"}


@pytest.mark.gpu
def test_measuring_on_a_gpu():
    assert torch.cuda.is_available()
    assert all(row.backend == "triton" for row in gpu.measure(gpu.CODECS, mib=64, repeats=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "foo"], "unknown target 'foo': give names such as sm_80"),
        (["--targets", "sm_90", "--codecs", "int4g100"], "groups of a power of two, not of 100"),
        (["--targets", "sm_90", "--codecs", "int4g128:int8g128"], "a pair of formats"),
        (["--targets", "sm_90", "--tp", "2"], "needs a CUDA device: leave out --targets"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(arguments, message):
    done = command(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def assembly_of_a_copy() -> str:
    """PTX of the function that moves payloads to other GPUs."""
    import triton
    from triton.backends.compiler import GPUTarget

    from flashcomm.transports.symmetric import exchange

    signature = {"target_ptr": "*u8", "source_ptr": "*u8", "width": "i64", "WORDS": "constexpr"}
    aligned: Any = {(place,): [["tt.divisibility", 16]] for place in range(3)}
    source = triton.compiler.ASTSource(
        fn=exchange._copy, signature=signature, constexprs={"WORDS": 2048}, attrs=aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_payloads_travel_in_words_of_16_bytes(compiler):
    ptx = compiler.submit(assembly_of_a_copy).result()
    moves = re.findall(r"(?:ld|st)\.global\S*", ptx)
    assert moves
    assert all(".v4.b32" in move for move in moves), moves
