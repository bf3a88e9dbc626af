"""Pipeline stages of a real vLLM: what a server answers when hops are encoded, and what its groups of ranks send."""

import os

import pytest
import torch
import torch.distributed as dist
from server import Server
from test_vllm import greedy, lose_a_worker, prompts

import flashcomm
from events import wait_for
from flashcomm.demo import MODEL
from flashcomm.policy import Hops, Policy

# What vLLM imports warns of itself.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
POLICY = """
codec = "none"
min_bytes = 4096
algorithm = "one_step"

[hops]
pp = "lossless"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "policy.toml").write_text(POLICY)
    env = {"FLASHCOMM_POLICY": str(folder / "policy.toml")}
    with Server(folder / "log", "--enforce-eager", ranks=1, stages=2, env=env) as server:
        yield server


def test_greedy_texts_of_lossless_are_plains(server):
    # In 16 bits, which not every CPU multiplies fast, so a few prompts; FLASHCOMM_TEXTS=64 for all.
    asked = prompts()[-int(os.environ.get("FLASHCOMM_TEXTS", "12")) :]
    server.on_workers("flashcomm_hops", "none")
    plain = greedy(server, asked)
    server.on_workers("flashcomm_hops", "lossless")
    server.on_workers("flashcomm_stats")
    assert greedy(server, asked) == plain
    first, last = server.on_workers("flashcomm_stats")
    assert first["calls"].keys() == {"hop/pp/lossless"}
    assert first["calls"]["hop/pp/lossless"] > 0
    # No decode step of eight requests is large.
    assert 0.6 < first["wire_bytes"] / first["plain_bytes"] < 0.75
    assert first["plain"].keys() == {"message under the policy's min_bytes = 4 KiB"}
    assert not last["calls"]


def test_says_what_it_does(server):
    assert "flashcomm compresses pp hops in lossless; 2 stages" in server.printed()
    # Other tests may have set the counts to zero.
    server.complete(prompts()[-1], max_tokens=1)
    sample = '{call="hop/pp/lossless",rank="0"}'
    # Workers write once a second.
    wait_for(lambda: server.metrics("flashcomm_calls_total").get(sample), 30)


def test_a_lost_stage_ends_the_server(server):
    lose_a_worker(server)


def hops_of_rank(codec: str) -> tuple[list, dict]:
    """Hand tensors on between real groups of vLLM, two stages of two ranks, over gloo as between hosts."""
    # Ranks with different names share no memory.
    os.environ["VLLM_DIST_IDENT"] = f"rank{dist.get_rank()}"
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    from flashcomm.integrations import vllm

    rank = dist.get_rank()
    config = EngineArgs(model=str(MODEL), tensor_parallel_size=2, pipeline_parallel_size=2).create_engine_config()
    policy = Policy(codec="none", min_bytes=4096, hops=Hops(pp=codec))
    vllm.install(policy, config, rank)
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(4, rank, "env://", rank, "gloo")
        parallel_state.initialize_model_parallel(2, 2)
    pp, tp = parallel_state.get_pp_group(), parallel_state.get_tp_group()
    flashcomm.reset_stats()
    # 33 rows do not divide among two ranks, but their columns do; one row is under min_bytes.
    rows, generator = (64, 33, 1), torch.Generator().manual_seed(0)
    dicts = [
        {name: torch.randn(n, 256, generator=generator).bfloat16() for name in ("hidden_states", "residual")}
        for n in rows
    ]
    if pp.is_first_rank:
        for tensors in dicts:
            pp.send_tensor_dict(tensors, all_gather_group=tp)
        return [], flashcomm.stats()
    found = [pp.recv_tensor_dict(all_gather_group=tp) for _ in dicts]
    return [[torch.equal(got[name], sent[name]) for name in sent] for got, sent in zip(found, dicts, strict=True)], {}


def test_ranks_of_a_stage_send_a_share_each(fresh_ranks):
    (_, first), (_, second), (third, _), (fourth, _) = fresh_ranks(4).run(hops_of_rank, "lossless")
    assert third == fourth == [[True, True]] * 3
    assert first["calls"] == second["calls"] == {"hop/pp/lossless": 4}
    assert first["plain_bytes"] == 2 * (64 + 33) * 256 * 2 / 2
    assert first["wire_bytes"] < 0.8 * first["plain_bytes"]
