"""The exchange of an engine's experts between real ranks: what is compressed, what is not, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
from flashcomm import planner
from flashcomm.collectives.group import group_of
from flashcomm.errors import RanksDisagree, TimedOut
from flashcomm.integrations.experts import Experts
from flashcomm.policy import Hops, Policy

POLICY = Policy(min_bytes=0, algorithm="one_step", hops=Hops(dispatch="int8g128", combine="int4g32"))


def made(policy: Policy = POLICY) -> Experts:
    experts = Experts(policy, dist.group.WORLD)
    experts.meet(dist.group.WORLD, torch.device("cpu"), [64])
    return experts


def exchanged_on_ranks() -> dict:
    rank, sizes = dist.get_rank(), [5, 0, 2]
    experts = made()
    flashcomm.reset_stats()
    tokens = [promises.tensor(r, (n, 64)) for r, n in enumerate(sizes)]
    everyone = torch.cat(tokens)
    gathered = experts.dispatch(tokens[rank], sizes)
    want = flashcomm.decode(flashcomm.encode(everyone, "int8g128"), "int8g128", cols=64, dtype=everyone.dtype)
    assert promises.same(gathered, want)
    ids = experts.routing(torch.full((sizes[rank], 2), rank), sizes)
    assert ids[:, 0].tolist() == [0] * 5 + [2] * 2
    sums = [promises.tensor(10 + r, (7, 64)) for r in range(3)]
    total = flashcomm.simulate.all_reduce(sums, "int4g32", "one_step")
    assert promises.same(experts.combine(sums[rank], sizes), total.split(sizes)[rank])
    return flashcomm.stats()


def test_dispatch_and_combine_have_codecs_of_their_own():
    for stats in ranks.shared(3, by="connections").run(exchanged_on_ranks):
        calls = {"all_gather/one_step/int8g128": 1, "all_gather/plain/none": 1, "reduce_scatter/one_step/int4g32": 1}
        assert stats["calls"] == calls
        assert stats["plain"] == {"weights and numbers of experts": 1}


def plain_on_ranks() -> tuple[dict, str]:
    rank, sizes = dist.get_rank(), [3, 1]
    x = promises.tensor(rank, (sizes[rank], 64))
    flashcomm.reset_stats()
    # All ranks judge by the longest part, of 384 bytes, though rank 1 has less.
    experts = made(replace(POLICY, min_bytes=385))
    everyone = torch.cat([promises.tensor(r, (n, 64)) for r, n in enumerate(sizes)])
    assert promises.same(experts.dispatch(x, sizes), everyone)
    assert experts.dispatch(x, sizes, lambda x: x + 1).shape == x.shape
    experts.policy = replace(POLICY, min_bytes=384)
    assert not promises.same(experts.dispatch(x, sizes), everyone)
    experts.policy = replace(POLICY, hops=Hops(dispatch="lossless"))
    assert promises.same(experts.dispatch(x.float(), sizes), everyone.float())
    assert promises.same(experts.combine(everyone, sizes), (2 * everyone).split(sizes)[rank])
    # Ranks of one host gain nothing, and `auto` knows.
    shared = made(replace(POLICY, algorithm="auto"))
    assert promises.same(shared.dispatch(x, sizes), everyone)
    return flashcomm.stats()["plain"], shared.line(torch.device("cpu"))


def test_what_is_not_compressed_is_counted_with_its_reason():
    for plain, line in ranks.shared(2).run(plain_on_ranks):
        assert plain == {
            "message under the policy's min_bytes = 385 B": 2,
            "lossless keeps the bits of torch.bfloat16, not of torch.float32": 1,
            "codec none": 1,
            "compression does not pay in shared memory": 1,
        }
        assert line.startswith("flashcomm compresses dispatch in int8g128, combine in int4g32; 2 ranks over ")
        assert line.endswith("; but auto sends values as they are: compression does not pay in shared memory")


def auto_between_hosts_on_ranks() -> tuple[list[str], str]:
    experts, group = made(replace(POLICY, algorithm="auto")), group_of(None)
    group.facts = planner.Facts(ranks=2, hosts=2, connected=True)
    flashcomm.reset_stats()
    x = promises.tensor(dist.get_rank(), (2048, 64))
    experts.dispatch(x, [2048, 2048])
    experts.dispatch(x[:1], [1, 1])
    return list(flashcomm.stats()["calls"]), experts.line(torch.device("cpu"))


def test_auto_compresses_large_exchanges_between_hosts(fresh_ranks):
    for calls, line in fresh_ranks(2).run(auto_between_hosts_on_ranks):
        assert calls == ["all_gather/one_step/int8g128", "all_gather/plain/none"]
        assert "but auto" not in line


def different_on_ranks() -> str:
    policy = POLICY if dist.get_rank() else replace(POLICY, hops=Hops(dispatch="int8g128"))
    with pytest.raises(RanksDisagree) as raised:
        made(policy)
    return str(raised.value)


def alone_on_ranks() -> str:
    if dist.get_rank():
        return ""
    from flashcomm.integrations.agreement import same_policy

    with pytest.raises(TimedOut) as raised:
        same_policy(dist.group.WORLD, "one", "rank", "the exchange of experts", timeout_s=1)
    return str(raised.value)


def test_ranks_with_other_policies_or_none_are_errors_on_all(fresh_ranks):
    for message in ranks.shared(2).run(different_on_ranks):
        assert "ranks have different policies for the exchange of experts: rank 0 has dispatch" in message
        assert 'combine = "none"' in message
        assert 'rank 1 has dispatch = "int8g128", combine = "int4g32"' in message
    message, _ = fresh_ranks(2).run(alone_on_ranks)
    assert "rank 0 has the policy one for the exchange of experts, and another rank did not come within 1 s" in message


def test_a_codec_that_does_not_fit_the_rows_is_refused_before_ranks_meet():
    experts = Experts.__new__(Experts)
    experts.policy = replace(POLICY, hops=Hops(dispatch="int4static"))
    with pytest.raises(ValueError, match="calibrat"):
        experts.meet(None, torch.device("cpu"), [64])  # pyright: ignore[reportArgumentType]
