"""What pipeline stages hand on: encoded, sent in shares, put back; and stages that do not fit each other."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import flashcomm
import ranks
from flashcomm.errors import CollectiveError, RanksDisagree, TimedOut
from flashcomm.integrations.hops import Hops
from flashcomm.policy import Hops as HopCodecs
from flashcomm.policy import Policy


def hops(codec: str, min_bytes: int = 0) -> Hops:
    return Hops(Policy(min_bytes=min_bytes, hops=HopCodecs(pp=codec)))


def handed_on(tokens: int = 6, hidden: int = 64, dtype=torch.bfloat16) -> dict:
    generator = torch.Generator().manual_seed(tokens)
    hidden_states, residual = (torch.randn(tokens, hidden, generator=generator).to(dtype) for _ in range(2))
    return {"hidden_states": hidden_states, "residual": 30 * residual}


def through(stage: Hops, tensors: dict, shares: int = 1) -> dict:
    """Let `shares` ranks encode, and one rank of the next stage decode and gather."""
    sent = [stage.encoded(tensors, rank, shares) for rank in range(shares)]
    parts: list[list[torch.Tensor]] = []
    for one in sent:
        mine: list[torch.Tensor] = []
        stage.decode(dict(one), lambda x, mine=mine: mine.append(x) or x.repeat(shares))
        parts.append(mine)
    joined = zip(*parts, strict=True)
    stage.decode(sent[0], lambda x: torch.cat(next(joined)))
    return sent[0]


@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize("tokens", [6, 7])
def test_lossless_puts_back_every_bit(tokens, shares):
    given = handed_on(tokens, 96)
    found = through(hops("lossless"), given, shares)
    assert list(found) == list(given)
    assert all(torch.equal(found[name], given[name]) for name in given)
    # The same check tells eight bits apart from all bits.
    assert not torch.equal(through(hops("int8g32"), given, shares)["residual"], given["residual"])


@pytest.mark.parametrize("codec", ["int8g128", "ec6", "int4g32", "lossless"])
def test_a_hop_is_one_encode_and_decode(codec):
    flashcomm.reset_stats()
    given = handed_on(5, 256)
    found = through(hops(codec), given)
    for name, x in given.items():
        expected = flashcomm.decode(flashcomm.encode(x, codec), codec, cols=256, dtype=x.dtype)
        assert torch.equal(found[name], expected)
    stats = flashcomm.stats()
    assert stats["calls"] == {f"hop/pp/{codec}": 2}
    assert stats["plain_bytes"] == 2 * 5 * 256 * 2
    assert stats["wire_bytes"] < 0.85 * stats["plain_bytes"]


def test_what_is_not_encoded_is_counted_with_its_reason():
    flashcomm.reset_stats()
    stage = hops("int8g128", min_bytes=1000)
    given = {**handed_on(1, 64), "ids": torch.arange(9), "depth": 3}
    sent = stage.encoded(given)
    assert sent == given
    stage.decode(sent, torch.Tensor.clone)
    assert sent == given
    # Three columns of two tokens are no whole rows of six ranks, though six values divide.
    assert list(hops("lossless").encoded({"residual": torch.ones(2, 3)}, 0, 6)) == ["residual"]
    assert list(hops("lossless").encoded({"residual": torch.ones(2, 6)}, 0, 6)) == ["residual"]
    assert flashcomm.stats()["plain"] == {
        "message under the policy's min_bytes = 1000 B": 2,
        "ids is none of hidden_states, residual": 1,
        "rows do not divide among 6 ranks": 1,
        "lossless keeps the bits of torch.bfloat16, not of torch.float32": 1,
    }


def test_stages_that_share_memory_copy_unless_an_algorithm_is_named():
    flashcomm.reset_stats()
    given = handed_on()
    policy = Policy(min_bytes=0, hops=HopCodecs(pp="int8g32"))
    assert Hops(policy, shared=True).encoded(given) == given
    assert flashcomm.stats()["plain"] == {"stages share memory": 2}
    assert Hops(replace(policy, algorithm="one_step"), shared=True).encoded(given).keys() != given.keys()


def test_a_payload_is_never_cut_by_an_engine():
    for tokens in range(1, 9):
        for rank in range(2):
            sent = hops("int8g32").encoded(handed_on(tokens, 32), rank, 2)
            assert all(x.numel() % 2 for x in sent.values())


def test_tensors_that_differ_among_ranks_are_sent_whole():
    given = handed_on(4, 64)
    sent = hops("int8g64").encoded(given, 1, 2, apart=["residual"])
    whole, half = sorted((x.numel() for x in sent.values()), reverse=True)
    assert (whole, half) == (4 * 68 + 1, 2 * 68 + 1)


def test_a_damaged_payload_is_an_error():
    stage = hops("lossless")
    sent = stage.encoded(handed_on())
    next(iter(sent.values()))[:4] = 255
    with pytest.raises(CollectiveError, match="a hop in lossless is damaged"):
        stage.decode(sent, torch.Tensor.clone)


def met(codecs: list[str], timeout_s: float = 30.0) -> str:
    """What a stage's meeting raises; a stage without a codec does not come."""
    codec = codecs[dist.get_rank()]
    if not codec:
        return "did not come"
    try:
        hops(codec).meet(dist.group.WORLD, torch.device("cpu"), [64], timeout_s)
    except (RanksDisagree, TimedOut, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_stages_with_different_policies_are_told_so():
    found = ranks.shared(2).run(met, ["lossless", "int8g128"])
    said = 'stage 0 has pp = "lossless", min_bytes = 0; stage 1 has pp = "int8g128", min_bytes = 0'
    assert all(text.startswith("RanksDisagree: ") and said in text for text in found)
    assert ranks.shared(2).run(met, ["lossless", "lossless"]) == ["", ""]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_stage_without_a_policy_is_missed(fresh_ranks, missing):
    codecs = ["lossless", "lossless"]
    codecs[missing] = ""
    found = fresh_ranks(2).run(met, codecs, 0.5)
    text = found[1 - missing]
    assert text.startswith("TimedOut: stage")
    assert "did not come within 0.5 s: give all nodes the same policy" in text
