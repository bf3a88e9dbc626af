import torch
from hypothesis import given
from hypothesis import strategies as st

from flashcomm.codecs.bits import PLANES, code_bytes, pack, unpack


@given(st.integers(1, 8), st.integers(1, 200), st.integers(0, 2**31))
def test_unpack_inverts_pack(bits, n, seed):
    codes = torch.randint(0, 1 << bits, (2, 3, n), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, code_bytes(n, bits))
    assert torch.equal(unpack(packed, n, bits), codes.int())


def test_widths_split_into_powers_of_two():
    assert PLANES[7] == (4, 2, 1)
    assert PLANES[8] == (8,)
    assert all(sum(planes) == bits for bits, planes in PLANES.items())


def test_codes_half_a_group_apart_share_a_byte():
    assert pack(torch.tensor([1, 2, 3, 4]), 4).tolist() == [0x31, 0x42]


def test_slots_beyond_the_last_code_are_zero():
    # Five 3-bit codes, all ones: in the 2-bit plane codes 0, 2, 4 and codes 1, 3 meet, in the 1-bit plane all five.
    assert pack(torch.full((5,), 7), 3).tolist() == [0b00111111, 0b00001111, 0b00011111]
