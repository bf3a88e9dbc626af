"""SGLang's own group of ranks with our hooks around it, over gloo; no engine runs here."""

import importlib

import pytest
import torch
import torch.distributed as dist

import flashcomm
from flashcomm.simulate import all_reduce

POLICY = """
codec = "int8g128"
phase = "all"
min_bytes = 4096
algorithm = "one_step"
"""


def _missing() -> str:
    try:
        importlib.import_module("sglang.srt.distributed.parallel_state")
    except ImportError as error:
        return f"SGLang cannot be imported here: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(missing := _missing()), reason=missing)


def group_of_sglang(name: str):
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    off = ("pynccl", "mscclpp", "custom_allreduce", "torch_symm_mem_all_reduce", "hpu_communicator", "xpu_communicator")
    options = {f"use_{name}": False for name in off}
    return GroupCoordinator([[0, 1]], dist.get_rank(), "gloo", group_name=name, **options)


def some_values(seed: "int | None" = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank() if seed is None else seed)
    return torch.randn(64, 256, generator=generator).to(torch.bfloat16)


def sums_of_rank():
    from sglang.srt.plugins import load_plugins

    load_plugins()
    tp, other = group_of_sglang("tp"), group_of_sglang("moe_ep")
    x = some_values()
    results = [tp.all_reduce(x.clone()), other.all_reduce(x.clone()), tp.all_reduce(x[:1].clone())]
    from_graph = tp._all_reduce_out_place(x, "auto")
    return x, results, from_graph, flashcomm.stats()


def test_compresses_large_sums_of_the_tp_group(fresh_ranks, tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)
    env = {"FLASHCOMM_POLICY": str(tmp_path / "policy.toml"), "LOCAL_SIZE": "0"}
    (x0, first, graph0, stats), (x1, second, graph1, _) = fresh_ranks(2, env=env).run(sums_of_rank)
    expected = all_reduce([x0, x1], "int8g128", "one_step")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], expected) and torch.equal(graph0, expected) and torch.equal(graph1, expected)
    exact = x0.float() + x1.float()
    # bf16 rounds the sum once: 8 bits of mantissa.
    assert torch.allclose(first[1].float(), exact, rtol=2**-8, atol=0)
    assert stats["calls"] == {"all_reduce/one_step/int8g128": 2}
    assert stats["plain"] == {"message under the policy's min_bytes = 4 KiB": 1}


def hops_of_rank():
    from sglang.srt.plugins import load_plugins

    load_plugins()
    pp = group_of_sglang("pp")
    given = {"hidden_states": some_values(0), "residual": some_values(1), "__msg_type__": "proxy"}
    results = {"hidden_states": some_values(2), "__msg_type__": "output"}
    if dist.get_rank() == 0:
        pp.send_tensor_dict(dict(given))
        works = pp.send_tensor_dict(dict(given), async_send=True)
        pp.send_tensor_dict(dict(results))
        for work in works:
            work.work.wait()
        return True, flashcomm.stats()
    found = [pp.recv_tensor_dict() for _ in range(3)]
    same = [
        got[name] is sent[name] or torch.equal(got[name], sent[name])
        for got, sent in zip(found, (given, given, results), strict=True)
        for name in ("hidden_states", "residual")
        if name in sent
    ]
    return all(same), flashcomm.stats()


def test_hops_between_stages_are_encoded(fresh_ranks, tmp_path):
    (tmp_path / "policy.toml").write_text('codec = "none"\nmin_bytes = 4096\n[hops]\npp = "lossless"\n')
    env = {"FLASHCOMM_POLICY": str(tmp_path / "policy.toml"), "LOCAL_SIZE": "0"}
    (_, first), (same, second) = fresh_ranks(2, env=env).run(hops_of_rank)
    assert same
    # What the last stage sends to the first, such as hidden states that a client asked for, is not touched.
    assert first["calls"] == {"hop/pp/lossless": 4}
    assert not second["calls"]


def decode_steps_of_rank():
    from flashcomm.integrations import sglang
    from flashcomm.policy import Policy

    class Batch:
        class forward_mode:
            decoding = False

            @classmethod
            def is_decode(cls):
                return cls.decoding

    hooks = sglang.Hooks(Policy(min_bytes=0, algorithm="one_step"))
    group = group_of_sglang("tp")
    hooks.meet(lambda group: None, group)
    x = some_values()
    for Batch.forward_mode.decoding in (False, True):
        hooks.forward(lambda runner, batch: hooks.all_reduce(lambda group, x: x, group, x), None, Batch)
    return flashcomm.stats()


def test_decode_steps_stay_sglangs(fresh_ranks):
    stats = fresh_ranks(2).run(decode_steps_of_rank)[0]
    assert stats["calls"] == {"all_reduce/one_step/int8g128": 1}
    assert stats["plain"] == {"decode step": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ('codec = "int8g129x"', "codec = 'int8g129x'"),
        ('[[layers]]\nmatch = "*"\ncodec = "int4g128"', "leave \\[\\[layers\\]\\] out"),
    ],
)
def test_a_wrong_policy_ends_the_command(monkeypatch, tmp_path, text, message):
    from flashcomm.integrations import sglang

    (tmp_path / "policy.toml").write_text(text)
    monkeypatch.setenv("FLASHCOMM_POLICY", str(tmp_path / "policy.toml"))
    with pytest.raises(SystemExit, match=message):
        sglang.register()
