"""What prompts are predicted to take: counts, formulas, limits that no plan can beat, and advice."""

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcomm.codecs import parse
from flashcomm.planner import Algorithm, Facts, LinkCosts, choose
from flashcomm.planner.advice import plan
from flashcomm.planner.batches import pairs
from flashcomm.planner.costs import Cost, Point, extra_s
from flashcomm.planner.hardware import ACCELERATORS, LINKS, Cluster, accelerator, cluster
from flashcomm.planner.overlap import Line, Profile
from flashcomm.planner.prefill import CODECS, WORTH, SumCosts, advise, compare, predict, profile
from flashcomm.planner.shapes import SHAPES, Shape, load
from flashcomm.units import bits_per_second

MIB = 1 << 20
RESULTS = Path(__file__).parents[2] / "results"
LLAMA = SHAPES["llama-3-8b"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74), ("llama-2-13b", 13.02), ("llama-3-8b", 8.03), ("llama-3-70b", 70.6),
        ("llama-3-405b", 405.9), ("qwen2.5-72b", 72.7), ("mixtral-8x7b", 46.7), ("mixtral-8x22b", 140.6),
        ("mistral-7b", 7.25), ("llama-30b", 32.5), ("qwen3-32b", 32.8),
    ],
)  # fmt: skip
def test_built_in_shapes_have_the_parameters_that_were_published(name, billions):
    assert math.isclose(SHAPES[name].parameters / 1e9, billions, rel_tol=0.005)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LlamaConfig", dict(intermediate_size=128, tie_word_embeddings=False)),
        ("Qwen3Config", dict(intermediate_size=128, head_dim=32, tie_word_embeddings=False)),
        ("MixtralConfig", dict(intermediate_size=128, num_local_experts=4)),
        ("Qwen3MoeConfig", dict(moe_intermediate_size=32, intermediate_size=128, num_experts=4)),
    ],
)
def test_weights_are_counted_as_transformers_makes_them(kind, options):
    transformers = pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    import torch

    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=256)
    config = getattr(transformers, kind)(**{**sizes, "num_experts_per_tok": 2, **options})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if "norm" not in name and not name.endswith("bias")
    )
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight")))
    assert Shape.from_config(config.to_dict(), kind).parameters == matrices - routers


def test_ranks_divide_the_work():
    for one in (LLAMA.attention, LLAMA.mlp, LLAMA.head):
        assert math.isclose(one(4).flops, one(1).flops / 4)
    # Heads of keys are repeated where there are fewer of them than ranks.
    assert LLAMA.attention(32).flops > LLAMA.attention(1).flops / 32
    mixture = SHAPES["mixtral-8x7b"].mlp(1)
    assert mixture.weight_bytes == 4 * mixture.flops


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no num_attention_heads"),
        ({"num_attention_heads": "8"}, "num_attention_heads = '8'"),
        ({"num_attention_heads": 8, "hidden_size": 64, "kv_lora_rank": 16}, "latent attention is not counted"),
    ],
)
def test_configurations_that_cannot_be_counted_are_refused(config, message):
    with pytest.raises(ValueError, match=f"mine.*{message}"):
        Shape.from_config(config, "mine")


def test_a_model_is_a_name_a_file_or_a_folder(tmp_path):
    assert load("Llama-3-8B") is LLAMA
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=8, vocab_size=256, intermediate_size=128)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes}))
    assert load(str(tmp_path)) == load(str(tmp_path / "config.json"))
    assert (load(str(tmp_path)).kv_heads, load(str(tmp_path)).head_dim) == (8, 8)
    with pytest.raises(ValueError, match=r"unknown model 'llama3-8b'. Did you mean llama-3-8b\? Allowed: a folder"):
        load("llama3-8b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read"):
        load(str(tmp_path))


def by_hand(plain_s=1e-3, per_mib_s=1e-3):
    """Two ranks on which everything has a round number."""
    cost = Cost((Point(1 << 10, plain_s, 0.0), Point(256 * MIB, plain_s + 256 * per_mib_s, 0.0)))
    few = Cost((Point(1 << 10, plain_s / 2, 0.0), Point(256 * MIB, plain_s / 2, 64 * per_mib_s / 4.25)))
    costs = LinkCosts(name="hand", plain=cost, compressed={Algorithm(name="two_step"): few})
    group = Facts(ranks=2, hosts=2, costs=costs)
    return Cluster(name="hand", group=group, flops=1e12, attention_flops=1e11, bytes_s=1e10, segment_s=1e-4)


def test_a_prediction_is_its_formula():
    ranks, shape = by_hand(), replace(LLAMA, layers=3)
    found = predict(shape, ranks, "none", tokens=1024, rows=2)
    attention, mlp = shape.attention(2), shape.mlp(2)
    seen = 2 * pairs(1024, 0, "all")
    layer = sum(
        2e-4 / 2 + max(2048 * (w.flops / 1e12 + w.value_bytes / 1e10), w.weight_bytes / 1e10) for w in (attention, mlp)
    )
    layer += seen * attention.pair_flops / 1e11
    look_up = 1e-4 + 2048 * 4 * 4096 / 1e10
    assert math.isclose(found.compute_s, 3 * layer + 2 * look_up, rel_tol=1e-9)
    message = 2048 * 4096 * 2
    assert math.isclose(found.sums_s, 7 * ranks.group.costs.plain.seconds(message), rel_tol=1e-9)
    assert math.isclose(found.ttft_s, found.compute_s + found.sums_s + found.head_s)
    assert math.isclose(found.share, found.sums_s / found.prefill_s)


def test_short_prompts_take_what_reading_the_weights_takes():
    one, two = (predict(LLAMA, by_hand(), "none", tokens=n).compute_s for n in (1, 2))
    read = LLAMA.layers * sum(work(2).weight_bytes for work in (LLAMA.attention, LLAMA.mlp)) / 1e10
    assert one > read
    assert two < 1.01 * one


@settings(max_examples=40)
@given(
    times=st.lists(st.floats(0, 1e-2), min_size=6, max_size=6),
    busy=st.floats(0, 1),
    layers=st.integers(1, 30),
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=4),
)
def test_layers_that_repeat_take_as_long_as_if_each_was_walked_through(times, busy, layers, sizes):
    first, a, b, last = (Line(fixed_s=fixed, token_s=times[4] / 100) for fixed in times[:4])
    kind = dict(sum=Line(fixed_s=times[5], token_s=times[5] / 200), busy=busy)
    short = Profile(segments=(first, a, b, last), layers=layers, **kind)
    long = Profile(segments=(first, *((a, b) * layers), last), **kind)
    assert short.sums == long.sums == 2 * layers + 1
    assert math.isclose(short.seconds(sizes), long.seconds(sizes), rel_tol=1e-6, abs_tol=1e-12)
    assert math.isclose(short.compute_s(77), long.compute_s(77), abs_tol=1e-12)


@pytest.mark.parametrize("machine", ACCELERATORS)
def test_no_plan_beats_its_compute_or_its_sums(machine):
    ranks = cluster(machine, 8)
    plain, *others = compare(LLAMA, ranks, CODECS, tokens=1024, rows=2)
    for one in (plain, *others):
        assert one.compute_s == plain.compute_s
        assert one.ttft_s > one.head_s + one.compute_s
        assert one.overlapped_s >= one.head_s + 0.999 * max(one.compute_s, one.sums_s)
        assert one.overlapped_s <= one.ttft_s * (1 + 1e-9)
        # What does not pay runs as plain does, or as values as they are.
        assert one.ttft_s <= plain.ttft_s * (1 + 1e-9)
    bits = [parse(one.codec).bits_per_value(4096) for one in others]
    in_order = sorted(zip(bits, (one.sums_s for one in others), strict=True))
    assert [seconds for _, seconds in in_order] == sorted(seconds for _, seconds in in_order)


def test_a_faster_link_is_never_slower():
    times = [
        predict(LLAMA, cluster("h100", 16, rate=f"{rate}gbit"), "int8g128", tokens=512).ttft_s
        for rate in (1, 3, 10, 30, 100, 300)
    ]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("codec", ["none", "int8g128", "int4g128"])
def test_the_lab_is_predicted_from_its_rate_alone(codec):
    # 4 ranks on 2 cores, so the cores are what a table of machines knows least about.
    rows = json.loads((RESULTS / "all_reduce_lab4_1gbit.json").read_text())["rows"]
    ranks = cluster("cpu-1gbe", 4)
    algorithm = "plain" if codec == "none" else "two_step"
    for row in rows:
        if row["codec"] == codec and row["algorithm"] == algorithm and row["message_bytes"] >= 4 * MIB:
            sums = SumCosts(cluster=ranks, codec=parse(codec), token_bytes=row["message_bytes"])
            assert math.isclose(1e3 * sums.seconds(1), row["p50_ms"], rel_tol=0.25)


def test_slow_kernels_are_worth_their_time_on_slow_links_alone():
    def seconds(rate: str, spec: str) -> float:
        sums = SumCosts(cluster=cluster("cpu-1gbe", 4, rate=rate), codec=parse(spec), token_bytes=16 * MIB)
        return sums.seconds(1)

    assert seconds("100mbit", "ec6") < seconds("100mbit", "int6g128") < seconds("100mbit", "int8g128")
    assert seconds("5gbit", "ec6") > seconds("5gbit", "int8g128")
    group = cluster("cpu-1gbe", 4, rate="25gbit").group
    assert choose(16 * MIB, group, parse("int6g128")).declined is False
    assert choose(16 * MIB, group, parse("ec6")).declined is True
    # Half of the time, where one transfer alone is coded; all of it around a format of its own.
    assert extra_s(parse("bf16:ec6"), MIB) == extra_s(parse("ec6"), MIB) / 2
    assert extra_s(parse("ec4+keep16"), MIB) == extra_s(parse("int8g128/ec6"), MIB) == extra_s(parse("ec6"), MIB)


def test_a_plan_says_up_to_which_rate_slow_kernels_are_faster():
    made = plan("llama-3-8b", "cpu-1gbe", tokens=1024, codecs=("int8g128", "int6g128", "ec6"))
    [limit] = made.limits
    found = re.fullmatch(
        r"ec6 has slow kernels: between hosts it is faster than plain up to (\w+), than int6g128 up to (\w+)", limit
    )
    assert found
    plain, other = map(bits_per_second, found.groups())
    assert 1e8 < other < plain < 25e9
    assert limit in made.notes
    assert plan("llama-3-8b", "l40", codecs=("ec6",)).limits == ()


def test_hosts_of_several_ranks_sum_inside_first():
    ranks = cluster("h100", 1024)
    assert (ranks.group.hosts, ranks.group.has_levels) == (128, True)
    assert predict(SHAPES["llama-3-405b"], ranks, "int8g128", tokens=4096).algorithm == "hierarchical"


def test_a_plan_for_1024_ranks_takes_milliseconds():
    seconds = []
    for tokens in (2048, 4096, 8192):
        start = time.perf_counter()
        predict(SHAPES["llama-3-405b"], cluster("h100", 1024, rate="200gbit"), "int8g128", tokens=tokens, rows=8)
        seconds.append(time.perf_counter() - start)
    # Other work on the machine may disturb one of them.
    assert min(seconds) < 0.1


def test_advice_is_to_leave_plain_what_nothing_makes_faster():
    advice = advise(list(compare(SHAPES["llama-2-7b"], cluster("h20", 2), CODECS, tokens=2048, rows=4)))
    assert (advice.codec, advice.parts, advice.min_bytes, advice.speedup) == ("none", (2048,), 0, 1.0)
    assert any("leave it plain" in reason for reason in advice.reasons)


def test_advice_prefers_what_nobody_has_to_measure():
    ranks = cluster("l40", 4, link="pcie4-sys")
    plain, *others = compare(SHAPES["llama-3-70b"], ranks, CODECS, tokens=1024, rows=8)
    advice = advise([plain, *others])
    assert advice.codec == "int8g128"
    assert math.isclose(advice.speedup, plain.ttft_s / others[0].ttft_s)
    assert any(reason.startswith("int4g128 makes it") for reason in advice.reasons)
    # From min_bytes on a message is compressed, and not before.
    assert choose(advice.min_bytes, ranks.group, parse("int8g128")).declined is False
    assert choose(advice.min_bytes // 2, ranks.group, parse("int8g128")).declined is True
    # Without it, the most bits that are worth it, and a word that they have to be measured.
    advice = advise([plain, *others[2:]])
    assert advice.codec == others[2].codec
    assert any(f"what {advice.codec} costs" in reason for reason in advice.reasons)


def test_parts_are_advised_where_they_gain():
    made = list(compare(SHAPES["llama-2-70b"], cluster("rtx4090", 8), CODECS, tokens=4096, rows=1))
    advice = advise(made)
    chosen = next(one for one in made if one.codec == advice.codec)
    assert len(advice.parts) > 1
    assert sum(advice.parts) == 4096
    assert math.isclose(advice.speedup_in_parts, made[0].ttft_s / chosen.overlapped_s)
    assert advice.speedup_in_parts > WORTH * advice.speedup


def test_transfers_that_take_the_core_make_parts_gain_less():
    ranks = cluster("a800", 8)
    idle = replace(ranks, plain_core=0.0)
    shape, prompt = SHAPES["llama-2-70b"], dict(tokens=4096, rows=1)
    assert profile(shape, ranks, parse("none"), 4096).busy > 0.1
    assert predict(shape, idle, "none", **prompt).overlapped_s < predict(shape, ranks, "none", **prompt).overlapped_s


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cluster("h1000", 4), r"unknown machine 'h1000'. Did you mean h100\? Allowed: l4, "),
        (lambda: cluster("l40", 1), "1 rank: one rank sends nothing"),
        (lambda: cluster("l40", 12, ranks_per_host=8), "12 ranks on hosts of 8"),
        (lambda: cluster("l40", 4, link="pcie9"), "unknown link 'pcie9'. Allowed: pcie4, pcie4-sys"),
        (lambda: cluster("l40", 16, rate="fast"), "rate 'fast': give a number and kbit, mbit or gbit"),
    ],
)
def test_what_a_machine_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_machine_has_a_link_and_says_where_its_figures_are_from():
    for one in ACCELERATORS.values():
        assert one.link in LINKS
        assert one.source
        assert bits_per_second(one.rate) > 0
    assert all(link.achieved < link.gbytes_s and len(link.source) > 20 for link in LINKS.values())
    assert accelerator("L40x4") is ACCELERATORS["l40"]


def test_a_measured_cluster_survives_json():
    ranks = cluster("l40", 4)
    again = Cluster.from_dict(json.loads(json.dumps(ranks.as_dict())), "here.json")
    plain, once_more = (predict(LLAMA, one, "int4g128", tokens=1024).ttft_s for one in (ranks, again))
    assert math.isclose(plain, once_more)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": None}, "here.json: no machine in it"),
        ({"flops": "fast"}, "here.json: flops = 'fast', and a number of 0 or more is needed"),
        ({"ranks": None}, "here.json: ranks = None"),
        ({"machine": {"name": "x"}}, "here.json: its machine cannot be read"),
    ],
)
def test_a_damaged_file_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Cluster.from_dict({**cluster("l40", 4).as_dict(), **change}, "here.json")
