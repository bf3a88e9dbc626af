"""Formats of other projects by hand: their scales, roundings and limits."""

import pytest
import torch

import flashcomm
from flashcomm import kernels
from flashcomm.codecs import parse
from flashcomm.codecs.peers import PEERS, USERS


def through(x, spec):
    codec = parse(spec)
    return codec.decode(codec.encode(x), x.shape[1], torch.float32)


@pytest.mark.parametrize("spec", PEERS)
def test_spelling_size_and_route(spec):
    assert str(parse(spec)) == spec
    assert parse(spec).bits_per_value(4096) == {"q4_0": 4.5, "qr_int4": 4.5, "qr_int6": 6.5, "e4m3": 8}.get(spec, 8.5)
    assert kernels.route(parse(spec), "cpu") == ("torch", f"no CPU kernel for {spec}")
    assert spec in USERS
    with pytest.raises(ValueError, match="not known or not possible on"):
        parse(f"{spec}+hadamard")


def test_names_of_users_are_codecs():
    assert {str(parse(spec)) for spec in USERS} == set(USERS)


@pytest.mark.parametrize("spec", ["q4_0", "qr_int4"])
def test_the_largest_magnitude_is_exact_and_its_opposite_is_clipped(spec):
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 2], x[0, 4], x[0, 6] = 8.0, -8.0, 3.0, -2.0
    assert through(x, spec)[0, :8:2].tolist() == [8.0, -7.0, 3.0, -2.0]


def test_ties_go_up_away_or_to_even():
    x = torch.zeros(1, 64)
    # The scale is -1, so 2.5 and -2.5 are the codes -2.5 and 2.5.
    x[0, 0], x[0, 2], x[0, 4] = 8.0, 2.5, -2.5
    assert through(x, "q4_0")[0, 2:6:2].tolist() == [2.0, -3.0]
    assert through(x, "qr_int4")[0, 2:6:2].tolist() == [2.0, -2.0]
    x[0, 0] = 127.0
    assert through(x, "q8_0")[0, 2:6:2].tolist() == [3.0, -3.0]


def test_even_and_odd_neighbours_are_groups_of_their_own():
    x = torch.ones(1, 128)
    x[0, 0] = 1000.0
    lost = (through(x, "qr_int8") - x).abs() > 0.1
    assert lost[0, 2:64:2].all()
    assert not lost[0, 1::2].any()
    assert not lost[0, 64:].any()
    lost = (through(x, "q8_0") - x).abs() > 0.1
    assert lost[0, 1:32].all()
    assert not lost[0, 32:].any()


@pytest.mark.parametrize("spec", ["q4_0", "q8_0", "qr_int6"])
def test_a_nan_or_inf_spoils_its_group_alone(spec):
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 192)
        x[1, 70] = bad
        broken = through(x, spec).isnan()
        assert not broken[0].any()
        assert broken[1].sum() == 32
        assert broken[1, 70]


def test_a_bare_cast_saturates_and_vanishes():
    x = torch.tensor([[1e6, -500.0, 0.0009, 17.0, float("nan"), float("-inf")]])
    found = through(x, "e4m3")
    assert found[0, :4].tolist() == [448.0, -448.0, 0.0, 16.0]
    assert found[0, 4:].isnan().all()


def test_an_all_reduce_of_them_is_simulated():
    xs = [torch.full((2, 64), float(rank)) for rank in range(3)]
    for spec in PEERS:
        found = flashcomm.simulate.all_reduce(xs, spec, "two_step")
        torch.testing.assert_close(found, torch.full((2, 64), 3.0), rtol=0.1, atol=0)
