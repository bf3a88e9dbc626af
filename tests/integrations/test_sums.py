"""What an engine's worker compresses and what it leaves alone, over two ranks; engines themselves are tests/engines."""

import json
import logging
from collections import Counter

import pytest
import torch
import torch.distributed as dist

import flashcomm
import ranks
from flashcomm.accuracy.simulated import Simulation
from flashcomm.integrations import worker_metrics
from flashcomm.integrations.sums import Sums, asked_for, keys_of
from flashcomm.integrations.transformers import Compression
from flashcomm.policy import Hops, Policy, Rule
from flashcomm.simulate import all_reduce

LOG = logging.getLogger("flashcomm.test")


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch):
    for name in ("FLASHCOMM_POLICY", "FLASHCOMM_CODEC"):
        monkeypatch.delenv(name, raising=False)


def test_off_unless_asked_for(monkeypatch):
    assert asked_for() is None
    assert asked_for({}) is None
    assert asked_for(object()) is None
    assert asked_for({"flashcomm": "none"}) is None
    monkeypatch.setenv("FLASHCOMM_CODEC", "int6g128")
    assert str(asked_for()).startswith("int6g128; prefill")


def test_options_win_and_survive_the_way_to_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHCOMM_CODEC", "int6g128")
    policy = Policy(
        codec="none",
        layers=(Rule(match="*.o_proj", codec="int4g32"),),
        min_bytes=5,
        algorithm="one_step",
        hops=Hops(pp="lossless"),
    )
    policy.save(tmp_path / "policy.toml")
    assert asked_for({"flashcomm": str(tmp_path / "policy.toml")}) == policy
    keys = json.loads(json.dumps(keys_of(policy)))
    assert asked_for({"flashcomm": keys}) == policy
    assert asked_for({"flashcomm": "int8g128"}) == Policy()
    hops = {"codec": "none", "hops": {"pp": "int8g128"}}
    assert asked_for({"flashcomm": hops}) == Policy(codec="none", hops=Hops(pp="int8g128"))


@pytest.mark.parametrize(
    "given, message",
    [
        ("int8g129x", "option flashcomm: codec = 'int8g129x'"),
        ({"min_byte": 5}, "option flashcomm: unknown key min_byte. Did you mean min_bytes?"),
        (5, "option flashcomm: 5: give a codec, the path of a .toml file, or the keys of a policy"),
        ("nowhere.toml", "cannot read the policy 'nowhere.toml'"),
        ("int4g128+keep64", "needs a calibration, which engines do not have yet"),
    ],
)
def test_a_wrong_wish_is_refused(given, message):
    with pytest.raises(ValueError) as error:
        asked_for({"flashcomm": given})
    assert message in str(error.value)


def reduced(policy: Policy, decoding: bool, shape: tuple[int, int]):
    """x, its sum, whether the engine made it, and the counts."""
    sums = Sums(policy, dist.group.WORLD, lambda: decoding, LOG)
    sums.meet(torch.device("cpu"))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(dist.get_rank())).to(torch.bfloat16)
    before, asked = x.clone(), []

    def plain(x: torch.Tensor) -> torch.Tensor:
        asked.append(x.shape)
        return x

    flashcomm.reset_stats()
    result = sums.reduce(x, flashcomm.codec(policy.codec), plain)
    assert torch.equal(x, before)
    return x, result, bool(asked), flashcomm.stats()


def test_large_sums_are_compressed():
    policy = Policy(min_bytes=1024, algorithm="one_step")
    (x0, first, left, stats), (x1, second, _, _) = ranks.shared(2).run(reduced, policy, False, (64, 256))
    assert not left
    assert torch.equal(first, second)
    assert torch.equal(first, all_reduce([x0, x1], "int8g128", "one_step"))
    assert stats["calls"] == {"all_reduce/one_step/int8g128": 1}


@pytest.mark.parametrize(
    "policy, decoding, reason",
    [
        (Policy(min_bytes=1 << 20, algorithm="one_step"), False, "message under the policy's min_bytes = 1 MiB"),
        (Policy(min_bytes=0, algorithm="one_step"), True, "decode step"),
        (Policy(min_bytes=0, codec="none", layers=(Rule(match="a", codec="int8g128"),)), False, "codec none"),
        (Policy(min_bytes=0), False, "compression does not pay in shared memory"),
    ],
)
def test_the_rest_is_the_engines(policy, decoding, reason):
    for x, result, left, stats in ranks.shared(2).run(reduced, policy, decoding, (64, 256)):
        assert left
        assert torch.equal(x, result)
        assert stats["plain"] == {reason: 1}
        assert not stats["calls"]


def test_decode_steps_too_if_asked():
    policy = Policy(min_bytes=0, phase="all", algorithm="one_step")
    assert not any(left for _, _, left, _ in ranks.shared(2).run(reduced, policy, True, (1, 256)))


def after_another_policy():
    sums = Sums(Policy(min_bytes=0), dist.group.WORLD, lambda: False, LOG)
    sums.meet(torch.device("cpu"))
    x = torch.ones(64, 256)
    sums.reduce(x, flashcomm.codec("int8g128"), torch.clone)
    sums.policy = Policy(min_bytes=0, algorithm="one_step")
    flashcomm.reset_stats()
    sums.reduce(x, flashcomm.codec("int8g128"), torch.clone)
    return flashcomm.stats()


def test_another_policy_forgets_what_the_first_one_refused():
    # `auto` does not compress in shared memory, and an algorithm that is named does.
    for stats in ranks.shared(2).run(after_another_policy):
        assert stats["calls"] == {"all_reduce/one_step/int8g128": 1}
        assert not stats["plain"]


def reasons_of_engines(policy: Policy, dtype: torch.dtype, tokens: int):
    """Why each engine leaves the same sum plain, as its own counts say it; {} where it compresses."""
    x = torch.ones(1, tokens, 256, dtype=dtype)
    decoding = tokens == 1
    flashcomm.reset_stats()

    def counted() -> dict[str, int]:
        stats = flashcomm.stats()["plain"]
        flashcomm.reset_stats()
        return stats

    server = Sums(policy, dist.group.WORLD, lambda: decoding, LOG)
    server.reduce(x, policy.codec_for("layers.0.o_proj"), torch.clone)
    found = {"vllm and sglang": counted()}
    # A compression without its model: what it decides needs none.
    model = Compression.__new__(Compression)
    model.codec, model.algorithm, model.calibration, model._options = policy, "auto", None, {}
    model.group, model.wait, model._observe, model._decoding = dist.group.WORLD, None, None, False
    model.calls = {"layers.0.o_proj": 0}
    model.reduce("layers.0.o_proj", x)
    found["transformers"] = counted()
    if not decoding or policy.phase == "all":
        # A process group and a simulation know no decode steps.
        if not policy.layers:
            group = dist.new_group([0, 1], backend="flashcomm", pg_options=policy)
            dist.all_reduce(x.clone(), group=group)
            found["torch"] = counted()
            dist.destroy_process_group(group)
        simulation = Simulation.__new__(Simulation)
        simulation.policy, simulation.plain, simulation.ranks, simulation.hosts = policy, Counter(), 2, 0
        simulation.calibration = simulation.observe = None
        simulation._sum("layers.0.o_proj", [x, x])
        found["simulation"] = dict(simulation.plain)
    return found


@pytest.mark.parametrize(
    "policy, dtype, tokens, reason",
    [
        (Policy(min_bytes=1 << 20, algorithm="one_step"), torch.bfloat16, 64, "under the policy's min_bytes = 1 MiB"),
        (Policy(min_bytes=1000, algorithm="one_step"), torch.bfloat16, 1, "under the policy's min_bytes = 1000 B"),
        (Policy(min_bytes=0, algorithm="one_step"), torch.bfloat16, 1, "decode step"),
        (Policy(min_bytes=0, codec="none"), torch.bfloat16, 64, "codec none"),
        (Policy(min_bytes=0, layers=(Rule(match="*.o_proj", codec="none"),)), torch.float32, 64, "codec none"),
        (Policy(min_bytes=0, algorithm="two_step"), torch.float16, 64, None),
        (Policy(min_bytes=0, phase="all", algorithm="two_step"), torch.float16, 1, None),
    ],
)
def test_every_engine_has_the_same_reason(policy, dtype, tokens, reason):
    for found in ranks.shared(2).run(reasons_of_engines, policy, dtype, tokens):
        for engine, counts in found.items():
            assert len(counts) == (reason is not None), (engine, counts)
            for said, count in counts.items():
                assert said.endswith(reason) and count == 1, (engine, counts)
        assert len({tuple(counts) for counts in found.values()}) == 1


def test_other_types_have_one_reason():
    assert Policy(min_bytes=0).choose(4096, torch.int64).reason == "dtype torch.int64"


def failed():
    sums = Sums(Policy(min_bytes=0, algorithm="one_step"), dist.group.WORLD, lambda: False, LOG)
    with pytest.raises(ValueError, match="requires_grad|gradient"):
        sums.reduce(torch.ones(64, 256, requires_grad=True), flashcomm.codec("int8g128"), lambda x: x)
    return dict(worker_metrics._errors)


def test_failures_are_counted():
    assert all(errors["ValueError"] >= 1 for errors in ranks.shared(2).run(failed))


def test_workers_write_what_they_count(monkeypatch, tmp_path):
    monkeypatch.setenv(worker_metrics.FOLDER_VARIABLE, str(tmp_path))
    reporter = worker_metrics.Reporter(3, LOG)
    try:
        reporter.report()
        assert set(json.loads((tmp_path / "3.json").read_text())) == {
            "calls", "plain", "errors", "prefills", "prefill_ms", "wire_bytes", "plain_bytes",
        }  # fmt: skip
        assert [path.name for path in tmp_path.iterdir()] == ["3.json"]
    finally:
        reporter.close()


def test_workers_that_nobody_sees_log(monkeypatch, caplog):
    monkeypatch.delenv(worker_metrics.FOLDER_VARIABLE, raising=False)
    reporter = worker_metrics.Reporter(0, LOG)
    try:
        with caplog.at_level(logging.INFO, LOG.name):
            reporter.report()
            reporter.report()
        assert len(caplog.messages) == 1
        assert "less than plain" in caplog.messages[0]
    finally:
        reporter.close()
