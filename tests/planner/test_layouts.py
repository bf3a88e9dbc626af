"""Layouts of ranks: their formulas by hand, limits that none can beat, and advice."""

import math

import pytest

from flashcomm.codecs import parse
from flashcomm.planner.hardware import CPU_STEP_S, ETHERNET_SHARE, cluster
from flashcomm.planner.layouts import CODECS, advise_layout, compare_layouts
from flashcomm.planner.placement import Link, measured, named
from flashcomm.planner.prefill import predict
from flashcomm.planner.shapes import SHAPES
from flashcomm.planner.stages import layers_of_stages

LLAMA = SHAPES["llama-3-8b"]
PROMPT = dict(tokens=1024, rows=1)


def by_name(machine="cpu-1gbe", ranks=2, shape=LLAMA, prompt=PROMPT, **options):
    found = compare_layouts(shape, named(machine, ranks, **options), **prompt)
    return {(one.layout, one.codec): one for one in found}


def test_tensor_parallel_ranks_are_those_of_the_first_table():
    found = by_name(ranks=4)
    for codec in CODECS:
        expected, one = predict(LLAMA, cluster("cpu-1gbe", 4), codec, **PROMPT), found["TP 4", codec]
        assert math.isclose(one.compute_s, expected.compute_s, rel_tol=1e-9)
        assert math.isclose(one.ttft_s, expected.ttft_s, rel_tol=1e-9)
        assert math.isclose(one.batches_s, 1 / one.ttft_s, rel_tol=1e-9)


def test_a_hop_carries_two_tensors():
    plain, exact = (by_name()["PP 2", codec] for codec in ("none", "lossless"))
    message = 2 * 1024 * 4096 * 2
    rate = ETHERNET_SHARE * 1e9 / 8
    assert math.isclose(plain.sent_s, CPU_STEP_S + message / rate, rel_tol=1e-9)
    assert plain.sums_s == 0
    payload = message * parse("lossless").bits_per_value(4096) / 16
    codec_s = 2 * (message + payload) / Link(1, 0).lossless_bytes_s
    assert math.isclose(exact.sent_s, CPU_STEP_S + payload / rate + codec_s, rel_tol=1e-9)


def test_keys_and_values_travel_once():
    plain = by_name()["TP 1 + TP 1", "none"]
    cache = 2 * LLAMA.layers * LLAMA.kv_heads * LLAMA.head_dim * 1024 * 2
    assert math.isclose(plain.sent_s, CPU_STEP_S + cache / (ETHERNET_SHARE * 1e9 / 8), rel_tol=1e-9)
    assert plain.weights == 1


def test_stages_share_the_work_but_not_the_time_of_one_batch():
    found = by_name(ranks=4, rate="10gbit")
    one, four = found["TP 4", "none"], found["PP 4", "none"]
    assert four.compute_s > 3 * one.compute_s
    # Every stage has a quarter of the layers, and the last one the head.
    assert 0.2 / four.ttft_s < four.batches_s / 1 < 4.001 / four.compute_s
    assert four.weights == one.weights == 0.25


def test_stages_inside_of_a_host_do_not_use_its_link():
    inside = by_name("l40", 8, ranks_per_host=4, rate="1gbit")
    assert inside["TP 2 x PP 4", "none"].sent_s < 1.1 * inside["TP 4 x PP 2", "none"].sent_s
    fast = by_name("l40", 8, ranks_per_host=8, rate="1gbit")
    assert fast["TP 4 x PP 2", "none"].sent_s < 0.1 * inside["TP 4 x PP 2", "none"].sent_s


@pytest.mark.parametrize("machine", ["cpu-1gbe", "h100", "l40"])
@pytest.mark.parametrize("ranks", [2, 6, 16])
def test_no_layout_beats_its_compute(machine, ranks):
    found = by_name(machine, ranks, ranks_per_host=2)
    assert {layout for layout, _ in found} >= {f"PP {ranks}"}
    for one in found.values():
        assert one.ttft_s >= one.compute_s + one.sums_s + one.sent_s
        assert one.batches_s <= 1.001 * ranks / one.compute_s


def test_layers_are_cut_as_vllm_cuts_them():
    # `get_pp_indices` of vLLM 0.32, called for every stage.
    assert layers_of_stages(30, 4) == (7, 8, 8, 7)
    assert layers_of_stages(8, 3) == (3, 3, 2)
    assert all(sum(layers_of_stages(n, s)) == n for s in range(1, 9) for n in range(s, 40))
    with pytest.raises(ValueError, match="9 pipeline stages of 8 layers: give 1 to 8"):
        layers_of_stages(8, 9)


def test_measured_ranks_have_the_link_of_their_sums():
    there = cluster("cpu-1gbe", 2)
    found = {(one.layout, one.codec): one for one in compare_layouts(LLAMA, measured(there), **PROMPT)}
    by_table = by_name()
    assert set(found) == set(by_table)
    for key in (("PP 2", "none"), ("PP 2", "int8g128"), ("TP 2", "none")):
        assert math.isclose(found[key].ttft_s, by_table[key].ttft_s, rel_tol=0.01)
    # A file of four ranks says nothing about two of them.
    four = {one.layout for one in compare_layouts(LLAMA, measured(cluster("cpu-1gbe", 4)), **PROMPT)}
    assert four == {"TP 4", "PP 4"}


def test_advice_prefers_what_changes_nothing():
    slow = by_name("l40", 8, ranks_per_host=4, rate="25gbit").values()
    first, many = advise_layout(list(slow))
    assert first.startswith("first token of a single batch: use TP 4 x PP 2 in int8g128; ")
    assert first.endswith("x over TP 4 x PP 2 plain")
    assert many.startswith("batches per second while others wait: use PP 8")
    # Where a codec gains less than 5 %, none is named.
    assert advise_layout(list(by_name(ranks=4, rate="100gbit").values()))[1].endswith("plain")
