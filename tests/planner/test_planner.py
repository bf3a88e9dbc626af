import pytest

from flashcomm.codecs import parse
from flashcomm.planner import choose

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


def test_batch_invariant_ignores_the_size():
    for ranks in (2, 3, 8):
        plans = {choose(size, ranks, parse("int8"), batch_invariant=True).algorithm for size in (0, 4096, MIB, 1 << 30)}
        assert len(plans) == 1


def test_one_rank_needs_no_algorithm():
    assert choose(MIB, 1, parse("int8"), algorithm="two_step").algorithm == "plain"
