"""The committed codec figures against today's code: names, bits and SQNR; times are the machine's business."""

import json
from pathlib import Path

import pytest
import torch

from flashcomm.bench import codec as bench
from flashcomm.codecs import parse, registry
from thorough import thorough

ROWS = json.loads((Path(__file__).parents[2] / "results" / "codec_cpu.json").read_text())["rows"]


def test_every_format_is_in_the_table():
    assert [row["codec"] for row in ROWS] == list(registry.ALL)
    assert all(row["bytes_equal_specification"] for row in ROWS)


@pytest.fixture(scope="module")
def partial_sums():
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    from flashcomm.models.partial_sums import partial_sums

    return partial_sums()


@pytest.mark.parametrize(
    "row", [thorough(row) if i % 4 else row for i, row in enumerate(ROWS)], ids=lambda row: row["codec"]
)
def test_figures_are_those_of_todays_code(row, partial_sums):
    codec = parse(row["codec"])
    if codec.varies:
        x = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert bench.bits_per_value(codec, codec.encode(x)) == pytest.approx(row["bits_per_value"], abs=0.01)
    else:
        assert codec.bits_per_value(4096) == row["bits_per_value"]
    gaussian, heavy, model = bench.sqnrs(codec, partial_sums)
    if row["codec"] == "lossless":
        assert gaussian == heavy == model == float("inf")
        assert row["sqnr_db"] is row["sqnr_heavy_db"] is row["sqnr_model_db"] is None
        return
    assert gaussian == pytest.approx(row["sqnr_db"], abs=0.05)
    assert heavy == pytest.approx(row["sqnr_heavy_db"], abs=0.05)
    # The text is the standard library of the Python that runs this.
    assert model == pytest.approx(row["sqnr_model_db"], abs=0.5)


def test_a_wrong_kernel_is_not_measured():
    codec, x = parse("int4g32"), torch.randn(4, 64)
    payload = codec.encode(x)
    bench.check(codec, x, payload)
    payload[2, 5] ^= 1
    with pytest.raises(RuntimeError, match="int4g32: the kernel's bytes differ"):
        bench.check(codec, x, payload)


def test_partial_sums_add_up_to_the_layers_output(partial_sums):
    assert len(partial_sums) == 16
    for parts in partial_sums.values():
        assert parts.shape == (4, 2048, 256)
        assert parts.float().std() > 0
