import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashcomm
from flashcomm.codecs import Codec, parse

affine = st.builds("int{}{}g{}".format, st.integers(1, 8), st.sampled_from(["", "s"]), st.integers(1, 4096))
single = affine | st.sampled_from(["bf16", "fp32"])


@given(single | st.just("none") | st.builds("{}:{}".format, single, single))
def test_canonical_spelling_parses_to_itself(spelling):
    assert str(parse(spelling)) == spelling
    assert parse(parse(spelling)) == parse(spelling)


def test_group_defaults_to_128():
    assert str(parse("int8")) == "int8g128"
    assert str(parse("int4s")) == "int4sg128"


@pytest.mark.parametrize(
    ("spelling", "nearest"),
    [
        ("int9", "int8g64"),
        ("int0g128", "int8g128"),
        ("int4g0", "int4g64"),
        ("in4g128", "int4g128"),
        ("", ""),
        ("INT4g128", "int4g128"),
    ],
)
def test_unknown_codec_lists_what_is_allowed_and_the_nearest(spelling, nearest):
    meant = f" Did you mean {nearest}?" if nearest else ""
    with pytest.raises(ValueError) as error:
        parse(spelling)
    assert str(error.value).startswith(
        f"unknown codec '{spelling}'.{meant} Allowed: none, bf16, fp32, lossless, lossless_fp16, int1 to int8"
    )


@pytest.mark.parametrize("spelling", ["a:b:c", "none:int8", "int8:none", ":", "int8:"])
def test_broken_pairs_are_refused(spelling):
    with pytest.raises(ValueError, match="codec"):
        parse(spelling)


def test_not_a_string_is_refused():
    with pytest.raises(ValueError, match="a codec is a string such as 'int8g128', not 8"):
        parse(8)
    with pytest.raises(ValueError, match=r"a codec is a string such as 'int8g128', not \['int8'\]"):
        parse(["int8"])


def test_pair_is_two_formats_and_encodes_nothing_itself():
    pair = flashcomm.codec("int4g128:int8g128")
    assert [str(single) for single in pair.formats] == ["int4g128", "int8g128"]
    assert pair.bits_per_value(4096) == 6.25
    for call in (
        lambda: pair.payload_bytes(128),
        lambda: pair.encode(torch.zeros(1, 128)),
        lambda: pair.step(torch.zeros(1, 1)),
    ):
        with pytest.raises(ValueError, match="is several formats.*int4g128 and int8g128"):
            call()


@pytest.mark.parametrize(
    ("spelling", "cols", "bits"),
    [
        ("int8g128", 4096, 8.25),
        ("int4g128", 4096, 4.25),
        ("int4g32", 4096, 5.0),
        ("int4sg32", 4096, 4.5),
        ("bf16", 7, 16.0),
        ("fp32", 7, 32.0),
        ("none", 7, 16.0),
        ("int3g32", 4096, 4.0),
        ("int5g128", 100, 5.36),
        ("int1g8", 1, 40.0),
    ],
)
def test_bits_per_value_count_everything(spelling, cols, bits):
    codec = flashcomm.codec(spelling)
    assert codec.bits_per_value(cols) == bits
    assert codec.payload_bytes(cols) == codec.encode(torch.zeros(1, cols, dtype=torch.bfloat16)).shape[1]


def test_codecs_compare_by_value_and_are_immutable():
    assert parse("int8") == parse("int8g128")
    assert len({parse("int8"), parse("int8g128")}) == 1
    with pytest.raises(AttributeError):
        parse("int8").bits = 4
    assert isinstance(parse("none"), Codec)
