import json
from dataclasses import replace

import pytest

from flashcomm.codecs import parse
from flashcomm.planner import Algorithm, Cost, Facts, LinkCosts, choose

MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "ranks", "codec", "algorithm", "reason"),
    [
        (8 * MIB, 4, "int8g128", "two_step", "fewest bytes"),
        (8 * MIB, 2, "int8g128", "one_step", "two ranks"),
        (8 * MIB, 2, "int4:int8", "two_step", "fewest bytes"),
        (128 << 10, 4, "int8g128", "one_step", "message up to 256 KiB"),
        (128 << 10, 2, "int8g128", "one_step", "two ranks"),
        (128 << 10, 4, "int4:int8", "two_step", "fewest bytes"),
        (8 * MIB, 1, "int8g128", "plain", "one rank"),
        (8 * MIB, 4, "none", "plain", "codec none"),
        (4096, 4, "int8g128", "plain", "message under 64 KiB"),
    ],
)
def test_auto(size, ranks, codec, algorithm, reason):
    plan = choose(size, ranks, parse(codec))
    assert (plan.algorithm, plan.reason) == (algorithm, reason)


def test_only_a_declined_compression_counts_as_declined():
    assert choose(4096, 4, parse("int8")).declined
    assert not choose(4096, 4, parse("none")).declined
    assert not choose(4096, 1, parse("int8")).declined


def test_small_messages_go_as_they_are_by_the_fastest_way():
    for group in (Facts(ranks=4, hosts=4, connected=True), Facts(ranks=4, shared=True)):
        plan = choose(4096, group, parse("int8"))
        assert (plan.algorithm, str(plan.codec), plan.declined) == ("one_step", "bf16", True)
    assert choose(8 * MIB, Facts(ranks=4, hosts=4, connected=True), parse("int8")).algorithm == "two_step"
    assert choose(8 * MIB, Facts(ranks=4, shared=True), parse("int8")).codec == parse("bf16")


def test_batch_invariant_ignores_the_size():
    for ranks in (2, 3, 8):
        plans = {choose(size, ranks, parse("int8"), batch_invariant=True).algorithm for size in (0, 4096, MIB, 1 << 30)}
        assert len(plans) == 1


def test_one_rank_needs_no_algorithm():
    assert choose(MIB, 1, parse("int8"), algorithm="two_step").algorithm == "plain"


def link_costs(plain, two_step, one_step, exact=None):
    """Costs of 10 us and so many seconds per MiB, of plain, of compressed at 4 bits, and of one step as it is."""

    def cost(per_mib, few=4.25):
        return Cost.measured([(size, bits, 1e-5 + per_mib * size / MIB * bits / few) for size in (4096, MIB, 16 * MIB)
                              for bits in (4.25, 8.25)])  # fmt: skip

    return LinkCosts(
        name="here",
        plain=Cost.measured([(size, 16.0, 2e-5 + plain * size / MIB) for size in (4096, MIB, 16 * MIB)]),
        compressed={Algorithm(name="two_step"): cost(two_step), Algorithm(name="one_step"): cost(one_step)},
        uncompressed={Algorithm(name="one_step"): cost(exact, 16.0)} if exact else {},
    )


def test_a_measured_group_takes_what_costs_least():
    group = Facts(ranks=4, hosts=4, costs=link_costs(plain=10e-3, two_step=3e-3, one_step=6e-3))
    plan = choose(8 * MIB, group, parse("int4g128"))
    assert (plan.algorithm, plan.reason, plan.declined) == ("two_step", "measured to win from 1 KiB on", False)
    # 8 bits take 5.8 ms per MiB, 16 bits 11 ms, more than plain.
    assert choose(8 * MIB, group, parse("int8g128")).algorithm == "two_step"
    refused = choose(8 * MIB, group, parse("fp32"))
    assert (refused.algorithm, refused.reason) == ("plain", "compression does not pay on this link")
    assert refused.declined
    assert choose(8 * MIB, group, parse("int4:int8")).algorithm == "two_step"


def test_values_travel_as_they_are_where_that_is_fastest():
    group = Facts(ranks=2, shared=True, costs=link_costs(plain=1e-3, two_step=4e-4, one_step=4e-4, exact=2e-4))
    plan = choose(8 * MIB, group, parse("int4g128"), exact="fp32")
    assert (plan.algorithm, str(plan.codec), plan.declined) == ("one_step", "fp32", True)
    assert choose(8 * MIB, group, parse("int4g128"), algorithm="two_step").codec == parse("int4g128")


def test_compression_starts_where_it_wins_for_good():
    # One lucky size among losses.
    plain = Cost.measured([(4096, 16.0, 1.0), (65536, 16.0, 5.0), (MIB, 16.0, 5.0), (16 * MIB, 16.0, 50.0)])
    two_step = Cost.measured([(4096, 4.25, 2.0), (65536, 4.25, 4.0), (MIB, 4.25, 6.0), (16 * MIB, 4.25, 20.0)])
    here = LinkCosts(name="here", plain=plain, compressed={Algorithm(name="two_step"): two_step})
    group = Facts(ranks=4, hosts=4, costs=here)
    assert choose(65536, group, parse("int4g128")).algorithm == "plain"
    assert choose(65536, group, parse("int4g128")).reason == "message under 2 MiB"
    assert choose(4 * MIB, group, parse("int4g128")).algorithm == "two_step"


def test_what_was_given_up_is_not_taken_beyond():
    costs = link_costs(plain=10e-3, two_step=3e-3, one_step=1e-3)
    short = Cost(costs.compressed[Algorithm(name="one_step")].points[:2])
    given_up = replace(costs, compressed={**costs.compressed, Algorithm(name="one_step"): short})
    group = Facts(ranks=4, hosts=4, costs=given_up)
    assert choose(MIB, group, parse("int4g128")).algorithm == "one_step"
    assert choose(2 * MIB, group, parse("int4g128")).algorithm == "two_step"


def test_files_of_flashcomm_tune_are_read():
    stored = {
        "name": "gloo: 1 on a, 1 on b",
        "plain": [[4096, 1.0, 0.0]],
        "compressed": {"two_step": [[4096, 0.1, 0.05]], "two_step/3": [[4096, 0.1, 0.025]]},
        "uncompressed": {"one_step": [[4096, 0.5, 0.0]]},
    }
    costs = LinkCosts.from_dict(stored)
    assert json.loads(json.dumps(costs.as_dict())) == stored
    # The size of the message, 4 bits and two words of 16 for 128 values.
    best = costs.cheapest(parse("int4g128"), 4096)
    assert (str(best.algorithm), best.seconds) == ("two_step/3", 0.1 + 0.025 * 4.25)
    assert (str(costs.exact(4096).algorithm), costs.exact(4096).seconds) == ("one_step", 0.5)
    assert costs.pieces(parse("int4g128"), "two_step", 4096) == 3
    assert costs.pieces(parse("int4g128"), "one_step", 4096) is None
    assert costs.pays_from(parse("int4g128")) == 1024


def test_link_costs_survive_json():
    costs = link_costs(plain=10e-3, two_step=3e-3, one_step=6e-3, exact=1e-3)
    again = LinkCosts.from_dict(json.loads(json.dumps(costs.as_dict())))
    assert vars(again) == vars(costs)
    assert Algorithm.parse(str(Algorithm(name="two_step", pieces=4))) == Algorithm(name="two_step", pieces=4)


def test_hosts_with_several_ranks_get_levels():
    two_hosts = Facts(ranks=4, hosts=2)
    plan = choose(8 * MIB, two_hosts, parse("int4g128"))
    assert (plan.algorithm, str(plan.codec)) == ("hierarchical", "bf16/int4g128")
    plan = choose(8 * MIB, two_hosts, parse("int8/int4:int8"))
    assert (plan.algorithm, str(plan.codec)) == ("hierarchical", "int8g128/int4g128:int8g128")
    # Levels that a group does not have leave their format unused.
    assert str(choose(8 * MIB, Facts(ranks=4), parse("int8/int4")).codec) == "int8g128"
    assert str(choose(8 * MIB, 4, parse("int8/int4")).codec) == "int4g128"


@pytest.mark.parametrize(
    ("group", "codec", "algorithm", "message"),
    [
        (4, "int8", "hierarchical", "this group of 4 has one rank on each host. Use two_step"),
        (Facts(ranks=4), "int8", "hierarchical", "this group of 4 has one host"),
        (Facts(ranks=5, hosts=0), "int8", "hierarchical", "hosts with different numbers of ranks"),
        (Facts(ranks=4, hosts=2), "int8/int4", "two_step", "two_step knows no levels"),
        (Facts(ranks=4, hosts=2), "none", "hierarchical", "codec 'none' is the plain collective"),
    ],
)
def test_what_a_group_cannot_do_is_refused(group, codec, algorithm, message):
    with pytest.raises(ValueError, match=message):
        choose(MIB, group, parse(codec), algorithm=algorithm)


def test_a_format_whose_algorithm_was_given_up_travels_as_it_is():
    costs = link_costs(plain=10e-3, two_step=3e-3, one_step=1e-3)
    alone = replace(costs, compressed={Algorithm(name="one_step"): costs.compressed[Algorithm(name="one_step")]})
    plan = choose(8 * MIB, Facts(ranks=4, hosts=4, costs=alone), parse("int4:int8"))
    assert (plan.algorithm, plan.declined) == ("plain", True)


def with_lossless(seconds: float, hierarchical: bool = False) -> LinkCosts:
    """Costs of 10 ms per MiB of plain, 5 ms of bf16 in one step, and `seconds` of lossless; 4 bits never pay."""
    costs = link_costs(plain=10e-3, two_step=30e-3, one_step=30e-3, exact=5e-3)
    name = "hierarchical" if hierarchical else "one_step"
    points = [(size, 11.3, 1e-5 + seconds * size / MIB) for size in (4096, MIB, 16 * MIB)]
    exact = {Algorithm(name=name): costs.uncompressed[Algorithm(name="one_step")]}
    return replace(costs, uncompressed=exact, lossless={Algorithm(name=name, pieces=3): Cost.measured(points)})


def test_values_travel_without_loss_where_that_is_faster_and_gives_the_same_bits():
    group = Facts(ranks=4, hosts=4, connected=True, costs=with_lossless(3e-3))
    plan = choose(8 * MIB, group, parse("int4g128"))
    assert (plan.algorithm, plan.pieces, str(plan.codec), plan.declined) == ("one_step", 3, "lossless", True)
    assert plan.reason == "compression does not pay on this link; lossless for the bits of bf16"
    asked = choose(8 * MIB, group, parse("bf16"))
    assert (str(asked.codec), asked.declined) == ("lossless", False)
    assert asked.reason == "measured to win from 4 KiB on; lossless for the bits of bf16"
    assert str(choose(8 * MIB, group, parse("lossless")).codec) == "lossless"
    # Levels: between hosts alone.
    levels = Facts(ranks=4, hosts=2, connected=True, costs=with_lossless(3e-3, hierarchical=True))
    assert str(choose(8 * MIB, levels, parse("bf16")).codec) == "bf16/lossless"


def test_values_do_not_travel_without_loss_where_bits_would_change_or_time_would_be_lost():
    slow = Facts(ranks=4, hosts=4, connected=True, costs=with_lossless(6e-3))
    assert str(choose(8 * MIB, slow, parse("int4g128")).codec) == "bf16"
    assert str(choose(8 * MIB, slow, parse("bf16")).codec) == "bf16"
    fast = Facts(ranks=4, hosts=4, connected=True, costs=with_lossless(3e-3))
    # fp32 values are not bf16, an algorithm that was asked for is obeyed, and `none` is the backend's own sum.
    assert str(choose(8 * MIB, fast, parse("int4g128"), exact="fp32").codec) == "fp32"
    assert str(choose(8 * MIB, fast, parse("bf16"), algorithm="two_step").codec) == "bf16"
    assert choose(8 * MIB, fast, parse("none")).algorithm == "plain"
    # The backend's own sum is faster than bf16 of ours, and adds in another order.
    backend = replace(with_lossless(3e-3), plain=Cost.measured([(4096, 16.0, 1e-5), (16 * MIB, 16.0, 16 * 4e-3)]))
    plan = choose(8 * MIB, replace(fast, costs=backend), parse("int4g128"))
    assert (plan.algorithm, str(plan.codec)) == ("plain", "int4g128")


def test_clusters_of_slow_links_send_without_loss():
    """Whatever is asked for as bf16; from some rate on, the kernels take longer than the bytes that they save."""
    from flashcomm.planner import hardware

    def sent(rate: str) -> str:
        group = hardware.cluster("cpu-1gbe", 4, ranks_per_host=1, rate=rate).group
        return str(choose(16 * MIB, group, parse("bf16")).codec)

    assert sent("1gbit") == "lossless"
    assert sent("100gbit") != "lossless"


def test_lossless_goes_as_bf16_where_rows_would_be_sent_whole():
    for facts in (4, Facts(ranks=4, hosts=4, device="cuda")):
        plan = choose(8 * MIB, facts, parse("lossless"))
        assert (plan.algorithm, str(plan.codec), plan.declined) == ("two_step", "bf16", False)
        assert plan.reason == "fewest bytes; bf16 for the bits of lossless, as rows would be sent whole"
        assert str(choose(8 * MIB, facts, parse("lossless"), algorithm="two_step").codec) == "lossless"
    assert str(choose(8 * MIB, Facts(ranks=4, hosts=4, connected=True), parse("lossless")).codec) == "lossless"
