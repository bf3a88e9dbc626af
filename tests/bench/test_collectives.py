"""The table of collectives has the right figures, and none for wrong answers."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

import flashcomm
import ranks
from flashcomm.bench import collectives, mpi
from flashcomm.bench.timing import interleaved
from flashcomm.lab import hosts as lab

OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
SPECS = ("int8g128", "int4g32:int8g128", "mxfp4")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world", [2, 3])
def test_rows(op, world):
    algorithms = ("auto", "one_step", "two_step") if op == "all_reduce" else ("auto",)
    sizes = (2, 100, 200_000)
    rows = ranks.shared(world).run(collectives.measure, op, SPECS, sizes, algorithms, 1, torch.bfloat16)[0]
    by_size = {}
    for row in rows:
        by_size.setdefault(row.message_bytes, []).append(row)
    assert list(by_size) == [collectives.message_bytes(op, size, world, torch.bfloat16) for size in sizes]
    for size, table in by_size.items():
        variants = [(row.codec, row.algorithm) for row in table]
        assert variants == [("none", "plain")] + [
            (spec, algorithm)
            for spec in SPECS
            for algorithm in algorithms
            if ":" not in spec
            or (op != "all_to_all" and algorithm != "one_step")
            or op in ("reduce_scatter", "all_gather")
        ]
        for row in table:
            assert (row.op, row.ranks, row.ranks_per_host, row.backend, row.link) == (op, world, world, "gloo", "local")
            assert row.algorithm in (row.chosen, "auto")
            assert (row.repeats, row.calls_per_time) == ((1, 20) if size <= 65536 else (5, 1))
            assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
            assert row.speedup == pytest.approx(table[0].p50_ms / row.p50_ms)
            assert row.algorithm_gbps == pytest.approx(size / row.p50_ms / 1e6)
            assert row.interface_bytes is None
            # The slower of two ranks is timed, and a pool of threads may work for each.
            assert 0 < row.cpu_ms < 20 * row.p80_ms
            assert row.ceiling == "copy" and row.ceiling_share > 0
            assert row.sqnr_db is None or row.sqnr_db > 10
    sent = {row.codec: row.wire_bytes for row in table}
    expected = {"all_reduce": 2 / world, "reduce_scatter": 1 / world, "all_gather": 1 / world, "all_to_all": 1 / world}
    assert sent["none"] == pytest.approx(expected[op] * (world - 1) * size, rel=1e-5)
    assert sent["int8g128"] == pytest.approx(expected[op] * (world - 1) * size * 8.25 / 16, rel=0.05)


def wrong_by_an_ulp(op: str, spec: str, only_rank: int | None) -> str:
    """The error of `measure` when `op` alters one value, everywhere or on one rank."""
    right = getattr(flashcomm, op)

    def wrong(x, codec, *, algorithm, out):
        right(x, codec, algorithm=algorithm, out=out)
        if str(codec) == spec and only_rank in (None, dist.get_rank()):
            value = out.view(-1)[-1:].view(torch.int16)
            value += 1 if spec != "none" else 64

    setattr(flashcomm, op, wrong)
    try:
        specs = [] if spec == "none" else [spec]
        collectives.measure(op, specs, (4000,), ("one_step",), 1, torch.bfloat16)
    except RuntimeError as error:
        return str(error)
    finally:
        setattr(flashcomm, op, right)
    return "measured"


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_answer_is_not_measured(op):
    two = ranks.shared(2)
    found = two.run(wrong_by_an_ulp, op, "int8g128", None)
    assert found == [
        f"{op} of 4000 bytes, int8g128 one_step: rank {r} got other values than one process computes" for r in (0, 1)
    ]
    for rank, message in enumerate(two.run(wrong_by_an_ulp, op, "none", None)):
        assert message.startswith(f"{op} of 4000 bytes, none plain: rank {rank} is ")
        assert message.endswith(" away from the exact result")


@pytest.mark.parametrize("op", ["all_reduce", "all_gather"])
def test_ranks_that_differ_are_found_on_all_of_them(op):
    found = ranks.shared(3).run(wrong_by_an_ulp, op, "int8g128", 2)
    assert [message.split(": ")[1] for message in found] == ["rank 2 got other bits than rank 0"] * 3


@pytest.mark.skipif(lab.unavailable() is not None, reason=f"no lab here: {lab.unavailable()}")
def test_the_ceiling_in_a_lab_is_the_links():
    with lab.Lab(ranks=2, rate="100mbit") as two:
        rows = collectives.run(
            "all_reduce", ["int4g128"], ranks=2, sizes=[2 << 20], algorithms=["two_step"], repeats=3, lab=two
        )
    for row in rows:
        assert (row.link, row.ceiling, row.ranks_per_host) == ("100mbit", "link", 1)
        assert row.wire_bytes < row.interface_bytes < 1.1 * row.wire_bytes
        assert row.ceiling_share == pytest.approx(row.interface_bytes * 8 / 100e6 / row.p50_ms * 1e3)
        # A bucket lets some pass at once, and a loaded machine takes its time.
        assert 0.3 < row.ceiling_share < 1.6
    assert rows[1].speedup > 1.5


@pytest.mark.skipif(mpi.unavailable() is not None, reason=f"no Open MPI: {mpi.unavailable()}")
@pytest.mark.parametrize("op", ["all_reduce", "all_to_all"])
def test_open_mpi(op):
    sizes = [128, 40_000]

    def measure():
        return ranks.shared(2).run(collectives.measure, op, ["int8g128"], sizes, ["auto"], 1, torch.bfloat16)[0]

    rows = mpi.around(measure, op, ranks=2, sizes=sizes, repeats=1, dtype=torch.bfloat16)
    assert [row.backend.split(" v")[0] for row in rows] == ["gloo", "gloo", "Open MPI"] * 2
    for plain, _, theirs in (rows[:3], rows[3:]):
        assert (theirs.dtype, theirs.message_bytes, theirs.codec) == ("float32", plain.message_bytes, "none")
        assert theirs.speedup == pytest.approx(plain.p50_ms / theirs.p50_ms)
        assert theirs.wire_bytes is None


def test_what_open_mpi_lacks_is_said(monkeypatch):
    monkeypatch.setattr(mpi.shutil, "which", lambda tool: None)
    assert "the command 'mpirun' is missing: apt-get install openmpi-bin" in mpi.unavailable()
    monkeypatch.setattr(mpi.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(mpi, "find_spec", lambda module: None)
    assert "mpi4py is missing: pip install 'flashcomm[mpi]'" in mpi.unavailable()


def test_fields_that_documents_use_are_there():
    names = {field.name for field in dataclasses.fields(collectives.CollectiveRow)}
    assert names >= {
        "ranks", "backend", "dtype", "message_bytes", "codec", "algorithm", "p20_ms", "p50_ms", "p80_ms", "speedup",
        "wire_bytes", "sqnr_db",
    }  # fmt: skip


def test_rounds_are_combined_in_their_order():
    seen = []
    times = interleaved({"a": lambda: None}, repeats=3, combine=lambda seconds: seen.append(seconds) or [3.0, 1.0, 2.0])
    assert len(seen[0]) == 3
    assert times["a"].seconds == (1.0, 2.0, 3.0)
