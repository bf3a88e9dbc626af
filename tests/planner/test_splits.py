"""The planner of overlap: fits, the walk through turns, and choices."""

import itertools
import math

import pytest

from flashcomm.planner.batches import pairs
from flashcomm.planner.overlap import MARGIN, Line, Profile, choose


def profile(token_s=1e-6, sum_s=1e-6, layers=8, pair_s=0.0, fixed_s=0.0, skips="first", **more):
    attention = Line(fixed_s=fixed_s, token_s=token_s, pair_s=pair_s)
    mlp = Line(fixed_s=fixed_s, token_s=token_s)
    return Profile(segments=(*((attention, mlp) * layers), Line()), sum=Line(token_s=sum_s), skips=skips, **more)


def test_lines_go_through_what_they_were_made_of():
    line = Line(fixed_s=1e-3, token_s=2e-6, pair_s=3e-9)
    points = [(n, p, line.seconds(n, p)) for n, p in ((128, 8192), (256, 98304), (640, 655360))]
    found = Line.through(points)
    for tokens, attended, seconds in points:
        assert math.isclose(found.seconds(tokens, attended), seconds, rel_tol=1e-6)
    assert math.isclose(found.pair_s, 3e-9, rel_tol=1e-3)


def test_noise_makes_nothing_negative():
    found = Line.through([(128, 8192, 5e-3), (256, 98304, 2e-3), (640, 655360, 3e-3)])
    assert min(found.fixed_s, found.token_s, found.pair_s) >= 0
    assert Line.through([(128, 0, 0.0), (256, 0, 0.0)]).seconds(1000) == 0


def test_one_piece_takes_compute_and_communication_together():
    one = profile(token_s=2e-6, sum_s=1e-6, pair_s=1e-9)
    assert math.isclose(one.seconds((1000,)), one.compute_s(1000) + one.communication_s(1000))
    assert math.isclose(one.communication_s(1000, rows=3), 3 * one.communication_s(1000))


def walked(segments, transfers, parts):
    """Slowly: (segment, part) in turn, each on the core and then on the link."""
    core = link = 0.0
    arrived = dict.fromkeys(range(parts), 0.0)
    for s, p in itertools.product(range(len(segments)), range(parts)):
        core = max(core, arrived[p]) + segments[s][p]
        if s < len(transfers):
            link = max(link, core) + transfers[s][p]
            arrived[p] = link
    return core


def test_turns_are_walked_through_as_they_are_taken():
    one = profile(token_s=3e-6, sum_s=2e-6, pair_s=2e-9, fixed_s=1e-4)
    sizes = (300, 200, 400)
    starts = (0, 300, 500)
    segments = [
        [line.seconds(n, pairs(n, s, "first")) for n, s in zip(sizes, starts, strict=True)] for line in one.segments
    ]
    transfers = [[one.sum.seconds(n) for n in sizes]] * (len(segments) - 1)
    assert math.isclose(one.seconds(sizes), walked(segments, transfers, 3))


def test_no_split_beats_what_must_be_computed_or_sent():
    for sum_s in (1e-7, 1e-6, 5e-6):
        one = profile(sum_s=sum_s, pair_s=1e-9)
        split = choose(one, 1024)
        starts = [sum(split.sizes[:n]) for n in range(len(split.sizes))]
        parts = [(n, pairs(n, start, "first")) for n, start in zip(split.sizes, starts, strict=True)]
        computed = sum(segment.seconds(*part) for segment in one.segments for part in parts)
        assert split.seconds >= max(computed, one.communication_s(1024)) * (1 - 1e-9)


def test_balance_decides_what_is_gained():
    even = choose(profile(), 1024)
    assert even.seconds < 0.6 * even.whole_s
    for lopsided in (profile(sum_s=1e-8), profile(sum_s=1e-4)):
        split = choose(lopsided, 1024)
        assert split.seconds > 0.95 * split.whole_s
    assert choose(profile(sum_s=1e-8), 1024).sizes == (1024,)


def test_quadratic_attention_makes_later_parts_shorter():
    first, *_, last = choose(profile(pair_s=2e-8, sum_s=1e-5), 2048).sizes
    assert first > last


def test_what_a_part_costs_by_itself_keeps_prompts_whole():
    assert len(choose(profile(fixed_s=1e-3), 256).sizes) == 1
    assert len(choose(profile(fixed_s=1e-5), 256).sizes) > 1


def test_cores_that_carry_the_sums_gain_nothing_by_overlap():
    assert len(choose(profile(busy=1.0), 1024).sizes) == 1


def test_what_runs_at_once_in_a_crowd_takes_longer():
    alone, crowded = profile(), profile(crowded=0.2)
    assert crowded.seconds((1000,)) == alone.seconds((1000,))
    assert math.isclose(crowded.seconds((500, 500)), 1.2 * alone.seconds((500, 500)))
    assert len(choose(profile(crowded=1.0), 1024).sizes) == 1


def test_waiting_for_whoever_is_late_is_a_matter_of_one_piece():
    even, uneven = profile(sum_s=5e-7), profile(sum_s=5e-7, uneven=0.2)
    assert math.isclose(uneven.seconds((1000,)), even.seconds((1000,)) + 0.2 * even.compute_s(1000))
    assert uneven.seconds((500, 500)) == even.seconds((500, 500))


def test_an_idle_link_makes_up_for_a_burst_and_a_busy_one_does_not():
    """Segments of 1 ms, sums of 2 ms, and a link that can catch up on 0.6 ms."""
    steady, bursting = (profile(token_s=1e-6, sum_s=2e-6, burst_s=burst_s) for burst_s in (0.0, 6e-4))
    sums = len(steady.segments) - 1
    assert math.isclose(steady.seconds((1000,)) - bursting.seconds((1000,)), sums * 6e-4)
    # In parts the link is busy from the first sum on, so only that one starts with a burst.
    assert math.isclose(steady.seconds((500, 500)) - bursting.seconds((500, 500)), 6e-4)


def test_where_splits_are_alike_the_even_one_is_taken():
    alike = profile(sum_s=2e-7, pair_s=1e-12)
    assert alike.seconds((640, 384)) < alike.seconds((512, 512))
    assert choose(alike, 1024).sizes == (512, 512)


def test_rows_count_like_tokens_and_a_cache_like_a_part():
    one = profile(pair_s=1e-9)
    assert math.isclose(one.compute_s(512, rows=2), 2 * one.compute_s(512))
    assert one.compute_s(512, before=512) > one.compute_s(512)


@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 300, 1000, 4096])
def test_parts_add_up(tokens):
    split = choose(profile(), tokens)
    assert sum(split.sizes) == tokens
    assert len(split.sizes) == 1 or min(split.sizes) >= 64
    assert len(split.sizes) == 1 or split.seconds < MARGIN * split.whole_s
