"""Programs of torch that know nothing of flashcomm but the name of a backend, over two real ranks."""

import threading
from concurrent.futures import Future
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

import flashcomm
import promises
import ranks
from flashcomm import collectives
from flashcomm.demo import MODEL
from flashcomm.integrations.torch_backend import CompressedGroup, _Handle, create, set_policy
from flashcomm.policy import Hops, Policy, Rule

INT8 = "all_reduce/one_step/int8g128"
LARGE = (128, 512)


@pytest.fixture(scope="module")
def pair():
    # Without shared memory, in which `auto` does not compress.
    one = ranks.Ranks(2, backend="flashcomm", env={"FLASHCOMM_CODEC": "int8g128", **ranks.WAYS["connections"]})
    yield one
    one.close()


def mine(dtype=torch.bfloat16, shape=LARGE, seed=0) -> torch.Tensor:
    return promises.tensor(dist.get_rank(), shape, dtype, seed)


def total(spec="int8g128", dtype=torch.bfloat16, shape=LARGE, seed=0) -> torch.Tensor:
    """The bits that compressed ranks get."""
    xs = [promises.tensor(rank, shape, dtype, seed) for rank in range(2)]
    return flashcomm.simulate.all_reduce(xs, spec, "one_step")


def compressed_calls(count: int, call: str = INT8):
    """One rank's calls since the last look."""
    assert flashcomm.stats()["calls"] == {call: count}, flashcomm.stats()
    flashcomm.reset_stats()


def sums_of_every_api():
    """The same bits, that one process predicts, however the sum is asked for."""
    flashcomm.reset_stats()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = mine(dtype)
        assert dist.all_reduce(x) is None
        assert promises.same(x, total(dtype=dtype))
    compressed_calls(3)
    x = mine().T
    dist.all_reduce(x)
    assert promises.same(x, flashcomm.simulate.all_reduce([promises.tensor(r, LARGE).T for r in (0, 1)], "int8g128"))
    x = mine(torch.float32).requires_grad_()
    dist.all_reduce(x)
    assert promises.same(x.detach(), total(dtype=torch.float32))
    compressed_calls(2)
    x = mine()
    y = functional.all_reduce(x, "sum", dist.group.WORLD)
    assert promises.same(functional.wait_tensor(y), total())
    assert promises.same(x, mine())
    mesh = init_device_mesh("cpu", (2,))
    assert isinstance(mesh.get_group(), CompressedGroup)
    z = DTensor.from_local(mine(), mesh, [Partial()]).redistribute(placements=[Replicate()])
    assert promises.same(z.to_local(), total())
    compressed_calls(2)
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def forward(x):
        y = x * 1
        dist.all_reduce(y)
        return y + 0

    assert promises.same(forward(mine()), total())
    compressed_calls(1)


def handles():
    """What async_op returns waits, tells and has futures, and any number can be under way."""
    flashcomm.reset_stats()
    xs = [mine(seed=seed) for seed in range(8)]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    for seed, (x, work) in reversed(list(enumerate(zip(xs, works, strict=True)))):
        assert work.wait() is True
        assert work.is_completed()
        assert promises.same(x, total(seed=seed))
        assert work.result()[0].data_ptr() == x.data_ptr()
    compressed_calls(8)
    x = mine()
    doubled = dist.all_reduce(x, async_op=True).get_future().then(lambda future: future.value()[0].float() * 2)
    assert torch.equal(doubled.wait(), total().float() * 2)
    flashcomm.reset_stats()
    small = torch.ones(4)
    dist.all_reduce(small, async_op=True).wait()
    assert small.tolist() == [2.0] * 4
    assert flashcomm.stats()["plain"] == {"message under the policy's min_bytes = 64 KiB": 1}


def complex_numbers_and_negations():
    """Complex sums are the backend's own; a view with a pending negation gives the sum of its values."""
    flashcomm.reset_stats()
    x = torch.complex(mine(torch.float32), mine(torch.float32, seed=1))
    want = torch.complex(*(sum(promises.tensor(r, LARGE, torch.float32, seed) for r in (0, 1)) for seed in (0, 1)))
    for sum_of in (dist.all_reduce, lambda y: dist.all_reduce(y, async_op=True).wait()):
        y = x.clone()
        sum_of(y)
        assert promises.same(torch.view_as_real(y), torch.view_as_real(want))
    with torch.inference_mode():
        y = x.clone()
        dist.all_reduce(y)
        assert promises.same(torch.view_as_real(y), torch.view_as_real(want))
    assert flashcomm.stats()["plain"] == {"rows of 2 values, as of complex numbers": 3}
    for async_op in (False, True):
        values = mine(torch.float32)
        view = torch._neg_view(-values)
        work = dist.all_reduce(view, async_op=async_op)
        if work:
            assert work.wait()
            assert work.result()[0] is view or torch.equal(work.result()[0], view)
        assert promises.same(view.clone(), total(dtype=torch.float32))
    compressed_calls(2)


def other_collectives():
    """What is no large sum of floating-point numbers is the backend's, to the bit."""
    rank = dist.get_rank()
    flashcomm.reset_stats()
    for dtype in (torch.int64, torch.float64):
        x = torch.full(LARGE, rank + 1, dtype=dtype)
        dist.all_reduce(x)
        assert x.unique().tolist() == [3]
    x = mine()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    assert torch.equal(x, torch.maximum(promises.tensor(0, LARGE), promises.tensor(1, LARGE)))
    x, y = mine(), mine()
    with dist._coalescing_manager():
        dist.all_reduce(x)
        dist.all_reduce(y)
    assert torch.equal(x, promises.tensor(0, LARGE) + promises.tensor(1, LARGE))
    assert torch.equal(x, y)
    rows = [torch.empty(LARGE, dtype=torch.bfloat16) for _ in range(2)]
    dist.all_gather(rows, mine())
    assert all(torch.equal(row, promises.tensor(r, LARGE)) for r, row in enumerate(rows))
    part = functional.reduce_scatter_tensor(mine(), "sum", 0, dist.group.WORLD)
    want = promises.tensor(0, LARGE) + promises.tensor(1, LARGE)
    assert torch.equal(functional.wait_tensor(part), want.chunk(2)[rank])
    x = mine()
    dist.broadcast(x, 1)
    assert torch.equal(x, promises.tensor(1, LARGE))
    y = torch.empty_like(x)
    dist.all_to_all_single(y, mine())
    dist.barrier()
    facts = [None, None]
    dist.all_gather_object(facts, {"rank": rank})
    assert facts == [{"rank": 0}, {"rank": 1}]
    if rank == 0:
        dist.send(mine(), 1)
    else:
        dist.recv(x, 0)
        assert torch.equal(x, promises.tensor(0, LARGE))
    stats = flashcomm.stats()
    assert stats["calls"] == {}
    assert stats["plain"] == {"dtype torch.float64": 1}


def own_verbs_stay_what_they_are():
    """Asked for a plain collective, flashcomm's own verbs are plain on this backend too."""
    for async_op in (False, True):
        flashcomm.reset_stats()
        y = flashcomm.all_reduce(mine(), "none", async_op=async_op)
        y = y.wait() if async_op else y
        assert torch.equal(y, promises.tensor(0, LARGE) + promises.tensor(1, LARGE))
        compressed_calls(1, "all_reduce/plain/none")
    assert promises.same(flashcomm.all_reduce(mine(), "int4g32"), total("int4g32"))


def hops():
    """send, recv and broadcast in the codecs of [hops], blocking or not; others, and small ones, are torch's own."""
    given = Policy(hops=Hops(send="lossless", broadcast="int8g128"))
    group, rank = dist.new_group(pg_options=given), dist.get_rank()
    flashcomm.reset_stats()
    x = promises.tensor(0, LARGE)
    for _ in range(2):
        out = torch.zeros_like(x)
        if rank == 0:
            dist.send(x, group=group, group_dst=1)
        else:
            assert dist.recv(out, group=group, group_src=0) == 0
            assert promises.same(out, x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, 1 - rank, group),
            dist.P2POp(dist.irecv, out := torch.zeros_like(x), 1 - rank, group),
        ]
    )
    assert [work.wait() for work in works] == [True, True]
    assert promises.same(out, x)
    want = flashcomm.decode(flashcomm.encode(x, "int8g128"), "int8g128", cols=LARGE[1], dtype=x.dtype)
    for async_op in (False, True):
        y = x.clone() if rank == 1 else torch.zeros_like(x)
        work = dist.broadcast(y, 1, group, async_op=async_op)
        assert work.wait() if async_op else work is None
        assert promises.same(y, want)
    sent, got = (3, 1) if rank == 0 else (1, 3)
    calls = {"send/one_step/lossless": sent, "recv/one_step/lossless": got, "broadcast/one_step/int8g128": 2}
    assert flashcomm.stats()["calls"] == calls
    assert flashcomm.stats()["plain"] == {}
    flashcomm.reset_stats()
    for y in (torch.full((4,), float(rank)), torch.full(LARGE, float(rank)), torch.full(LARGE, rank)):
        dist.send(y, 1, group) if rank == 0 else dist.recv(y, 0, group)
        assert y.unique().tolist() == [0]
    reasons = ["message under the policy's min_bytes = 64 KiB", "lossless keeps the bits of torch.bfloat16"]
    assert [reason.partition(",")[0] for reason in flashcomm.stats()["plain"]] == reasons
    # The default group has no [hops], so nothing is counted.
    flashcomm.reset_stats()
    dist.broadcast(x.clone(), 0)
    assert not flashcomm.stats()["plain"]


def policies():
    """A policy of a group, of groups made later, and one that the ranks do not share."""
    world = dist.group.WORLD
    assert world.policy == Policy(codec="int8g128")
    before = dist.new_group([0, 1])
    alone = dist.new_group([0])
    own = dist.new_group([0, 1], pg_options=Policy(codec="int5g128", algorithm="two_step"))
    set_policy(Policy(codec="int4g32", min_bytes=0, layers=(Rule(match="*.down_proj", codec="int3g32"),)))
    after = dist.new_group([0, 1])
    flashcomm.reset_stats()
    for group, spec in ((None, "int4g32"), (before, "int8g128"), (after, "int4g32")):
        x = mine()
        dist.all_reduce(x, group=group)
        assert promises.same(x, total(spec)), spec
    x = mine()
    dist.all_reduce(x, group=own)
    assert "all_reduce/two_step/int5g128" in flashcomm.stats()["calls"]
    if dist.get_rank() == 0:
        x = mine()
        dist.all_reduce(x, group=alone)
        assert torch.equal(x, mine())
    with pytest.raises(RuntimeError, match="disagree about their policy: rank 0 has .*int8g128.*rank 1 has .*int7g128"):
        set_policy(Policy(codec=f"int{8 - dist.get_rank()}g128"))
    with pytest.raises(ValueError, match=r"int4g128\+keep64 needs a calibration, and a process group sees no modules"):
        set_policy(Policy(codec="int4+keep64"))
    assert world.policy.codec == "int4g32"
    set_policy(None)
    flashcomm.reset_stats()
    x = mine()
    dist.all_reduce(x)
    assert torch.equal(x, promises.tensor(0, LARGE) + promises.tensor(1, LARGE))
    assert flashcomm.stats()["calls"] == flashcomm.stats()["plain"] == {}
    set_policy(Policy(codec="int8g128"))
    for group in (before, own, after):
        dist.destroy_process_group(group)


def gradients():
    """DistributedDataParallel, which takes the futures of its sums from C++."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(256, 256, bias=False))
    flashcomm.reset_stats()
    model(promises.tensor(dist.get_rank(), (8, 256), torch.float32)).square().mean().backward()
    compressed_calls(1)
    gradient = model.module.weight.grad
    parts = []
    for rank in range(2):
        alone = torch.nn.Linear(256, 256, bias=False)
        alone.load_state_dict(model.module.state_dict())
        alone(promises.tensor(rank, (8, 256), torch.float32)).square().mean().backward()
        parts.append(alone.weight.grad.view(-1) / 2)
    assert promises.same(gradient.view(-1), flashcomm.simulate.all_reduce(parts, "int8g128", "one_step"))


def transformers_model():
    """A tensor-parallel model that nobody compressed: all of its large sums are, with the same logits on both ranks."""
    from flashcomm.models.load import load_model

    model = load_model(MODEL, torch.bfloat16)
    ids = torch.randint(2, 250, (1, 256), generator=torch.Generator().manual_seed(3))
    flashcomm.reset_stats()
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits
    # 16 row-parallel linears, and the embedding where transformers splits it: not in 5.0.
    calls = flashcomm.stats()["calls"].get(INT8)
    assert calls in (16, 17)
    compressed_calls(calls)
    assert all(promises.same(logits, theirs) for theirs in promises.everyone(logits))


def ends():
    world = dist.group.WORLD
    dist.destroy_process_group()
    return type(world).__name__


@pytest.mark.parametrize(
    "function",
    [
        sums_of_every_api,
        handles,
        complex_numbers_and_negations,
        other_collectives,
        own_verbs_stay_what_they_are,
        hops,
        policies,
        gradients,
    ],
    ids=lambda f: f.__name__,
)
def test_on_ranks(pair, function):
    pair.run(function)


def test_a_transformers_model_is_compressed_untouched(pair):
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    pair.run(transformers_model)


def test_the_group_can_be_destroyed(pair):
    assert pair.run(ends) == ["CompressedGroup"] * 2


def created(policies, store=None, first: int | None = None) -> list:
    """The group, or the exception, of each rank in a world of threads; rank `first` comes before the others."""
    store, made, begun = store or dist.HashStore(), [None] * len(policies), threading.Event()

    class Watched(Policy):
        """A policy that the ranks compare once it has been printed."""

        def __repr__(self):
            begun.set()
            return repr(Policy(codec=self.codec))

    def make(rank):
        if first is not None:
            policies[rank] = Watched(codec=policies[rank].codec) if rank == first else policies[rank]
            assert rank == first or begun.wait(20)
        options = SimpleNamespace(
            store=store, group_rank=rank, group_size=len(policies), global_ranks_in_group=[], group_id="t",
            timeout=timedelta(seconds=20),
        )  # fmt: skip
        try:
            made[rank] = create(options, policies[rank])
        except Exception as error:
            made[rank] = error

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(len(policies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_without_a_policy_it_is_plain_and_says_so(caplog, monkeypatch):
    monkeypatch.delenv("FLASHCOMM_CODEC", raising=False)
    assert [group.policy for group in created([None, None])] == [None, None]
    assert caplog.text.count("backend flashcomm has no policy and compresses nothing: set FLASHCOMM_POLICY or") == 1


def test_rules_for_modules_do_not_apply_and_it_says_so(caplog):
    policy = Policy(codec="int8g128", layers=(Rule(match="*", codec="int4g32"),))
    created([policy])
    assert "sees no modules: of the policy it uses int8g128, and no [[layers]]" in caplog.text


@pytest.mark.parametrize("other", [Policy(codec="int4g32"), "int9"], ids=str)
def test_ranks_with_different_policies_all_fail_before_communication(other):
    first, second = created([Policy(codec="int8g128"), other])
    assert "ranks disagree about their policy: rank 0 has Policy(codec='int8g128'" in str(first)
    expected = "rank 1 has Policy(codec='int4g32'" if isinstance(other, Policy) else "Policy is needed, such as"
    assert expected in str(second)


@pytest.mark.parametrize("first", [0, 1])
def test_the_words_and_addresses_of_an_earlier_group_do_not_count(first):
    """Under one launcher, whose store outlives the group; one rank is there before the other."""
    store = dist.HashStore()
    for codec in ("int8g128", "int4g32", "int5g128"):
        groups = created([Policy(codec=codec), Policy(codec=codec)], store, first)
        assert [group.policy.codec for group in groups] == [codec] * 2
        x = torch.ones(8)
        works = [group.allreduce([x]) for group in groups]
        for work in works:
            work.wait()
        del groups, works
    assert "ranks disagree" in str(created([Policy(codec="int8g128"), Policy(codec="int4g32")], store)[0])


def test_wrong_policies_are_refused(monkeypatch):
    monkeypatch.setenv("FLASHCOMM_CODEC", "int9")
    (error,) = created([None])
    assert isinstance(error, ValueError)
    assert "FLASHCOMM_CODEC: codec = 'int9'" in str(error)
    with pytest.raises(ValueError, match='is no group of backend "flashcomm": use init_process_group'):
        set_policy(None)


def test_a_sum_that_fails_fails_its_handle_and_its_future():
    failed = Future()
    handle = _Handle(collectives.Work(torch.ones(2), future=failed), torch.ones(2))
    later = handle.get_future()
    assert not later.done()
    failed.set_exception(RuntimeError("a peer is gone"))
    for wait in (handle.wait, handle.result, later.wait):
        with pytest.raises(RuntimeError, match="a peer is gone"):
            wait()
