"""send, recv, isend, irecv and broadcast: the promises that apply to them, order, and errors on both ends.

Promise 3 is about sums. Each of the others is a check of `Verbs`, next to broken verbs that it must catch.
"""

import os
import signal
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
import values
from calls import failure, hear, new_group, tell
from flashcomm.collectives.hops import kernels
from flashcomm.errors import CollectiveError, PeerLost, RanksDisagree, TimedOut
from thorough import thorough

SPECS = ("int8g128", "int4g32", "fp32", "mxfp4", "ec4.25", "lossless", "none")


@dataclass(frozen=True)
class Verbs:
    """The verbs that are checked."""

    send: object = flashcomm.send
    recv: object = flashcomm.recv
    broadcast: object = flashcomm.broadcast

    def moved(self, make, spec: str) -> list[torch.Tensor]:
        """What this rank holds after rank 0 has sent ``make(0)`` to rank 1, and broadcast it to all."""
        x = make(0)
        results = []
        if dist.get_rank() == 0:
            self.send(x, 1, codec=spec)
        elif dist.get_rank() == 1:
            results.append(torch.full_like(x, 7.0))
            assert self.recv(results[0], 0, codec=spec) == 0
        results.append(x.clone() if dist.get_rank() == 0 else torch.full_like(x, 7.0))
        self.broadcast(results[-1], 0, codec=spec)
        return results


def decoded(x: torch.Tensor, spec: str) -> torch.Tensor:
    if spec == "none" or not x.numel():
        return x
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    payload = flashcomm.encode(rows, spec)
    return flashcomm.decode(payload, spec, cols=rows.shape[1], dtype=x.dtype).view(x.shape)


def same_bits(verbs: Verbs) -> list[str]:
    """Promise 1: the receiver, and every rank of a broadcast, the root too, hold what one process decodes."""
    bad = []
    for spec in SPECS:
        for dtype in values.DTYPES:
            x = promises.tensor(0, (5, 300), dtype)
            for got in verbs.moved(lambda _, x=x: x, spec):
                if not promises.same(got, decoded(x, spec)):
                    bad.append(f"{spec} {dtype}: not the bits that one process decodes")
    return bad


def bounded_error(verbs: Verbs) -> list[str]:
    """Promise 2: half a step of the codec, and the rounding of the output."""
    bad = []
    for spec in ("int8g128", "int4g32", "mxfp4", "lossless"):
        for scale in (1e-6, 1e3):
            x = (promises.tensor(0, (4, 257), torch.float32, seed=1) * scale).bfloat16()
            allowed = values.allowed_error(flashcomm.codec(spec).step(x), x, x.dtype)
            for got in verbs.moved(lambda _, x=x: x, spec):
                if not ((got.float() - x.float()).abs() <= allowed).all():
                    bad.append(f"{spec} at {scale}: beyond the bound")
    return bad


def token_alone(verbs: Verbs) -> list[str]:
    """Promise 4: the rows around a token change no bit of it."""
    bad, x = [], promises.tensor(0, (9, 300), seed=2)
    for spec in ("int8g128", "ec4.25", "lossless"):
        whole = verbs.moved(lambda _: x, spec)
        padded = verbs.moved(lambda _: torch.cat([x * 100, x, -x]), spec)
        if not all(promises.same(a, b[9:18]) for a, b in zip(whole, padded, strict=True)):
            bad.append(f"{spec}: a token's bits depend on its neighbours")
    return bad


VIEWS = {
    "transposed": lambda x: x.T,
    "every other column": lambda x: x[:, ::2],
    "window": lambda x: x[1:4, 3:17],
}
SHAPES = ((0,), (0, 128), (4, 0), (), (1,), (7,), (3, 100), (2, 3, 5), (2, 4096))


def any_shape(verbs: Verbs) -> list[str]:
    """Promise 5: any shape and strides on both ends; what is sent does not change, but at the root of a broadcast."""
    bad = []
    makers = {str(shape): partial(promises.tensor, shape=shape, seed=3) for shape in SHAPES}
    makers |= {name: lambda r, view=view: view(promises.tensor(r, (6, 20), seed=4)) for name, view in VIEWS.items()}
    for spec in ("int8g128", "lossless", "none"):
        for name, make in makers.items():
            x = make(0)
            for got in verbs.moved(lambda _, x=x: x, spec):
                if not promises.same(got, decoded(make(0), spec)):
                    bad.append(f"{spec} {name}: wrong result")
            if not promises.same(x, make(0)):
                bad.append(f"{spec} {name}: what was sent has changed")
    for name, view in VIEWS.items():
        whole = torch.zeros(6, 20, dtype=torch.bfloat16)
        part, x = view(whole), view(promises.tensor(0, (6, 20), seed=4))
        if dist.get_rank() == 0:
            verbs.send(x, 1, codec="fp32")
        elif dist.get_rank() == 1:
            verbs.recv(part, 0, codec="fp32")
            if not promises.same(part, x) or whole.count_nonzero() != x.count_nonzero():
                bad.append(f"{name}: received into other elements")
    return bad


def nothing_hides(verbs: Verbs) -> list[str]:
    """Promise 6, the values: a NaN or Inf makes its own group NaN and no other; without loss it arrives."""
    bad = []
    for poison in (float("nan"), float("inf")):
        x = promises.tensor(0, (4, 256), seed=5)
        x[2, 70] = poison
        expected = torch.zeros(4, 256, dtype=torch.bool)
        expected[2, :128] = True
        for got in verbs.moved(lambda _, x=x: x, "int8g128"):
            if not torch.equal(got.isnan(), expected):
                bad.append(f"{poison} did not make its own group NaN and no other")
        for got in verbs.moved(lambda _, x=x: x, "lossless"):
            if not (got[2, 70].isnan() if poison != poison else got[2, 70].isinf()):
                bad.append(f"{poison} did not arrive")
    return bad


def nothing_silent(verbs: Verbs) -> list[str]:
    """Promise 7: stats() has every message, its codec and bytes, and the reason if it was not compressed."""
    bad, rank, peers = [], dist.get_rank(), dist.get_world_size() - 1
    x, payload = torch.ones(3, 128), flashcomm.codec("int4g128").payload_bytes(128)
    for spec, how, width in (("int4g128", "one_step", payload), ("none", "plain", 512)):
        flashcomm.reset_stats()
        verbs.moved(lambda _: x, spec)
        verb = {0: "send", 1: "recv"}.get(rank)
        calls = {f"broadcast/{how}/{spec}": 1} | ({f"{verb}/{how}/{spec}": 1} if verb else {})
        seen, sent = flashcomm.stats(), 3 * width * (1 + peers) if rank == 0 else 0
        if seen["calls"] != calls or seen["wire_bytes"] != sent:
            bad.append(f"{spec}: {sent} bytes in {calls}; stats() says {seen}")
        if seen["plain"] != ({"codec none": len(calls)} if spec == "none" else {}):
            bad.append(f"{spec}: stats() says {seen['plain']} ran uncompressed")
    return bad


PROMISES = (same_bits, bounded_error, token_alone, any_shape, nothing_hides, nothing_silent)


def root_keeps_its_own(x, src, codec):
    """Breaks 1: the root keeps what its peers never see."""
    before = x.clone()
    flashcomm.broadcast(x, src, codec=codec)
    if dist.get_rank() == src:
        x.copy_(before)


def clips(x, dst, codec):
    """Breaks 2."""
    limit = x.float().abs().flatten().quantile(0.9) if x.numel() else torch.tensor(0.0)
    flashcomm.send(x.float().clamp(-limit, limit).to(x.dtype), dst, codec=codec)


def flat_send(x, dst, codec):
    """Breaks 4, with `flat_recv`: groups cross rows."""
    flashcomm.send(x.reshape(-1), dst, codec=codec)


def flat_recv(x, src, codec):
    flat = torch.empty(x.numel(), dtype=x.dtype)
    source = flashcomm.recv(flat, src, codec=codec)
    x.copy_(flat.view(x.shape))
    return source


def uses_up(x, dst, codec):
    """Breaks 5: what was sent is lost."""
    flashcomm.send(x, dst, codec=codec)
    x.zero_()


def hides_nan(x, dst, codec):
    """Breaks 6."""
    flashcomm.send(torch.nan_to_num(x, 0.0, 1.0, -1.0), dst, codec=codec)


def silent_send(x, dst, codec):
    """Breaks 7, with `silent_recv`: torch's own, without a word."""
    dist.send(x, dst)


def silent_recv(x, src, codec):
    return dist.recv(x, src)


BROKEN = (
    Verbs(broadcast=root_keeps_its_own),
    Verbs(send=clips),
    Verbs(send=flat_send, recv=flat_recv),
    Verbs(send=uses_up),
    Verbs(send=hides_nan),
    Verbs(send=silent_send, recv=silent_recv),
)


def promises_on_ranks() -> list[str]:
    return [text for promise in PROMISES for text in promise(Verbs())]


def broken_on_ranks() -> list[bool]:
    return [bool(promise(broken)) for promise, broken in zip(PROMISES, BROKEN, strict=True)]


@pytest.mark.parametrize("by", ["memory", thorough("connections"), thorough("gloo")])
def test_promises(by):
    assert ranks.shared(3, by=by).run(promises_on_ranks) == [[]] * 3


def test_each_check_catches_broken_verbs():
    noticed = ranks.shared(3, by="connections").run(broken_on_ranks)
    assert [any(ours) for ours in zip(*noticed, strict=True)] == [True] * len(PROMISES)


def order_on_ranks():
    """Messages of a pair and tag arrive in the order of their start; both directions and all tags go on at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    nxt, last = (rank + 1) % size, (rank - 1) % size
    # Beyond what the kernel holds for a connection, each to the next before anybody receives.
    large = torch.full((1024, 2048), float(rank))
    sent = flashcomm.isend(large, nxt, codec="fp32")
    got = flashcomm.irecv(torch.empty_like(large), last, codec="fp32").wait()
    assert got.unique().tolist() == [last]
    assert sent.wait() is large
    assert sent.is_completed()
    if rank < 2:
        xs = [torch.full((4, 8), float(10 * rank + i)) for i in range(4)]
        outs = [torch.empty(4, 8) for _ in xs]
        works = []
        for i, (x, out) in enumerate(zip(xs, outs, strict=True)):
            works.append(flashcomm.isend(x, 1 - rank, tag=i % 2, codec="fp32"))
            works.append(flashcomm.irecv(out, 1 - rank, tag=i % 2, codec="fp32"))
        for work in reversed(works):
            work.wait()
        assert [out[0, 0].item() for out in outs] == [10 * (1 - rank) + i for i in range(4)]
        # A call that blocks comes after those that were started before.
        work = flashcomm.isend(xs[0], 1, codec="fp32") if rank == 0 else flashcomm.irecv(outs[0], 0, codec="fp32")
        if rank == 0:
            flashcomm.send(xs[1], 1, codec="fp32")
        else:
            flashcomm.recv(outs[1], 0, codec="fp32")
            assert (outs[0][0, 0].item(), outs[1][0, 0].item()) == (0, 1)
        work.wait()
        ints = torch.arange(6) if rank == 0 else torch.zeros(6, dtype=torch.int64)
        flashcomm.send(ints, 1, codec="none") if rank == 0 else flashcomm.recv(ints, 0, codec="none")
        assert ints.tolist() == list(range(6))
    works = [flashcomm.broadcast(torch.full((3, 64), float(i)), 1, async_op=True, codec="fp32") for i in range(3)]
    assert [work.wait()[0, 0].item() for work in reversed(works)] == [2, 1, 0]
    # Ranks of a group are not those of the world.
    group = dist.new_group([1, 2])
    if rank:
        x = torch.full((2, 64), float(rank))
        if rank == 2:
            flashcomm.send(x, group=group, group_dst=0, codec="fp32")
        else:
            assert flashcomm.recv(x, group=group, group_src=1, codec="fp32") == 2
            assert x[0, 0].item() == 2
        x = torch.full((2, 64), float(rank))
        flashcomm.broadcast(x, group=group, group_src=0, codec="fp32")
        assert x[0, 0].item() == 1


@pytest.mark.parametrize("by", ranks.WAYS)
def test_order(by):
    ranks.shared(3, by=by).run(order_on_ranks)


GIVEN = "codec=int8g128, dtype=float32, shape=4x128"
DIFFERENT = {
    "codec=int4g32, dtype=float32, shape=4x128": lambda: (torch.zeros(4, 128), "int4g32"),
    "codec=int8g128, dtype=bfloat16, shape=4x128": lambda: (torch.zeros(4, 128).bfloat16(), "int8g128"),
    "codec=int8g128, dtype=float32, shape=5x128": lambda: (torch.zeros(5, 128), "int8g128"),
    "codec=none, dtype=float32, shape=4x128": lambda: (torch.zeros(4, 128), "none"),
}


def disagreements_on_ranks():
    """Both ends raise, each with what both gave, also after messages on which they agreed; the channel goes on."""
    if dist.get_rank() > 1:
        return
    x = torch.ones(4, 128)

    def agreed():
        if dist.get_rank() == 0:
            flashcomm.send(x, 1)
        else:
            out = torch.zeros_like(x)
            flashcomm.recv(out, 0)
            assert out[0, 0].item() == pytest.approx(1, 0.01)

    for text, make in DIFFERENT.items():
        for _ in range(2):
            theirs, spec = make()
            call = partial(flashcomm.recv, theirs, 0, codec=spec)
            message, _ = failure(partial(flashcomm.send, x, 1) if dist.get_rank() == 0 else call, RanksDisagree)
            assert f"rank 0 sends {GIVEN}; rank 1 receives {text}. Both must give the same" in message
            assert dist.get_rank() == 0 or theirs.count_nonzero() == 0
        agreed()
    # An end that cannot decode says so before values travel.
    real = kernels.load
    if dist.get_rank() == 1:
        kernels.load = lambda *_: 1 / 0
    call = partial(flashcomm.recv, x.clone(), 0, codec="int6g128")
    message, _ = failure(
        partial(flashcomm.send, x, 1, codec="int6g128") if dist.get_rank() == 0 else call, CollectiveError
    )
    assert "rank 1 could not load the kernels" in message
    kernels.load = real
    agreed()


@pytest.mark.parametrize("by", ranks.WAYS)
def test_ends_that_disagree_both_raise_and_go_on(by):
    ranks.shared(3, by=by).run(disagreements_on_ranks)


def wrong_arguments_on_ranks():
    rank, x = dist.get_rank(), torch.zeros(2, 4)
    wrong = {
        "give dst, a global rank, or group_dst, a rank of the group, not neither": lambda: flashcomm.send(x),
        "not both": lambda: flashcomm.isend(x, 0, group_dst=0),
        "receiving from any rank is not supported": lambda: flashcomm.recv(x),
        "dst = 9 is not in the group: use one of the global ranks [0, 1, 2]": lambda: flashcomm.send(x, 9),
        "group_src = -1: use a rank of the group, 0 to 2": lambda: flashcomm.irecv(x, group_src=-1),
        f"src is this rank itself, {rank} of its group": lambda: flashcomm.recv(x, rank),
        "tag must be from 0": lambda: flashcomm.send(x, (rank + 1) % 3, tag=-1),
        "send sends once, so it takes a single codec": lambda: flashcomm.send(x, (rank + 1) % 3, codec="int8:int4"),
        "broadcast sends once": lambda: flashcomm.broadcast(x, 0, codec="int8:int4"),
        "compresses bf16, fp16 and fp32, not torch.int64": lambda: flashcomm.send(x.long(), (rank + 1) % 3),
        "some of [2, 4] with strides [4, 0] share theirs": lambda: flashcomm.recv(
            x[:, :1].expand(2, 4), (rank + 1) % 3
        ),
        "needs to know the features of the model": lambda: flashcomm.send(x, (rank + 1) % 3, codec="int4g32+keep2"),
    }
    for text, call in wrong.items():
        assert text in failure(call, ValueError)[0]
    strict = partial(flashcomm.broadcast, x, 0, codec="fp32", strict=True)
    assert strict() is x


def test_wrong_arguments_are_refused_before_anything_is_sent():
    ranks.shared(3, by="connections").run(wrong_arguments_on_ranks)


def late_on_ranks():
    """A rank that does not come in time is an error, of later calls too, and of no other channel."""
    group = new_group(1.0)
    if dist.get_rank() == 0:
        work = flashcomm.isend(torch.ones(2, 64), 1, group, codec="fp32")
        for call in (work.wait, lambda: flashcomm.send(torch.ones(2, 64), 1, group, codec="fp32")):
            message, seconds = failure(call, TimedOut)
            assert seconds < 20
        assert "from rank 0 to rank 1" in message
    tell("waits no longer", group)
    hear("waits no longer", group)
    both = new_group(60.0)
    x = torch.full((2, 64), float(dist.get_rank()))
    if dist.get_rank() == 2:
        flashcomm.send(x, 1, both, codec="fp32")
    elif dist.get_rank() == 1:
        flashcomm.recv(x, 2, both, codec="fp32")
        assert x[0, 0].item() == 2


@pytest.mark.parametrize("by", ["connections", "gloo"])
def test_a_late_rank(by):
    ranks.shared(3, by=by).run(late_on_ranks)


def kill_the_sender():
    """Rank 1 waits for a message of rank 0, which is killed after one that arrived."""
    x = torch.ones(64, 64)
    if dist.get_rank() == 0:
        flashcomm.send(x, 1, codec="fp32")
        os.kill(os.getpid(), signal.SIGKILL)
    flashcomm.recv(x, 0, codec="fp32")
    message, seconds = failure(partial(flashcomm.recv, x, 0, codec="fp32"), PeerLost)
    # The reason that Linux gives, such as "Connection reset by peer", may stand between.
    assert "rank 0 has closed its connection" in message
    assert "as rank 1 sees it" in message
    return seconds


def test_a_dead_rank_is_named(fresh_ranks):
    world = fresh_ranks(2)
    world.start(kill_the_sender)
    good, seconds = world.outcome(1)
    assert good, seconds
    assert seconds < 20
