"""The exchange of vLLM's experts: a server of two data-parallel ranks, its own groups of ranks, and what it refuses."""

import functools
import importlib.util
import inspect
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from server import Server

import flashcomm
from events import wait_for
from flashcomm.demo import MODEL
from flashcomm.models.load import load
from flashcomm.policy import Hops, Policy

# What vLLM imports warns of itself.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
HIDDEN, TOKENS = 64, (5, 2)
SAVED = Policy(
    codec="none", min_bytes=TOKENS[0] * HIDDEN * 2, algorithm="one_step", hops=Hops(dispatch="int8g128", combine="ec6")
)


@pytest.fixture(scope="module")
def configured(tmp_path_factory) -> str:
    """A folder with the configuration of a small mixture of experts."""
    import transformers

    folder = str(tmp_path_factory.mktemp("configured"))
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=256)
    sizes |= dict(head_dim=16, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)
    config = transformers.MixtralConfig(**sizes, architectures=["MixtralForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    return folder


@contextmanager
def groups(folder: str, policy: "Policy | None"):
    """Make vLLM's groups of two data-parallel ranks that share out the experts."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs

    from flashcomm.integrations import vllm

    rank = dist.get_rank()
    arguments = EngineArgs(model=folder, skip_tokenizer_init=True, enforce_eager=True, enable_expert_parallel=True)
    config = arguments.create_engine_config()
    config.parallel_config.data_parallel_size, config.parallel_config.data_parallel_rank = 2, rank
    if policy:
        vllm.install(policy, config, rank)
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, "env://", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        yield config, parallel_state.get_ep_group()
    parallel_state.destroy_model_parallel()
    vllm.undo()


def exchange(config, ep, dtype=torch.bfloat16) -> "tuple[torch.Tensor, ...]":
    """Dispatch this rank's tokens, and combine the result, as vLLM's layers of experts do."""
    from vllm.forward_context import get_forward_context, set_forward_context

    generator, rank = torch.Generator().manual_seed(0), dist.get_rank()
    everyone = torch.randn(sum(TOKENS), HIDDEN, generator=generator).to(dtype)
    ids = torch.randint(4, (sum(TOKENS), 2), generator=generator)
    weights = torch.rand(sum(TOKENS), 2, generator=generator)
    mine = [x.split(TOKENS)[rank] for x in (everyone, weights, ids)]
    numbers = torch.tensor(TOKENS)
    with ExitStack() as stack:
        step = set_forward_context(None, config, num_tokens=TOKENS[rank], num_tokens_across_dp=numbers)
        stack.enter_context(step)
        stack.enter_context(get_forward_context().dp_metadata.sp_local_sizes(1))
        hidden, gathered_weights, gathered_ids = ep.dispatch(*mine)
        part = hidden * (1 + rank)
        combined = ep.combine(part)
        into = torch.empty_like(combined)
        same = ep.combine_into_output(part, into)
        router = ep.dispatch_router_logits(mine[0], mine[1])
    assert same is into
    assert torch.equal(into, combined)
    assert torch.equal(gathered_weights, weights)
    assert torch.equal(gathered_ids, ids)
    assert torch.equal(router[0], hidden)
    assert torch.equal(router[1], weights)
    return everyone, hidden, combined


def alone(folder: str) -> str:
    """What vLLM says without flashcomm."""
    with groups(folder, None) as (config, ep):
        try:
            exchange(config, ep)
        except NotImplementedError:
            return type(ep.device_communicator.all2all_manager).__name__
    return "it works"


def compressed(folder: str) -> dict:
    with groups(folder, SAVED) as (config, ep):
        flashcomm.reset_stats()
        everyone, hidden, combined = exchange(config, ep)
        stats = flashcomm.stats()
        want = flashcomm.decode(flashcomm.encode(everyone, "int8g128"), "int8g128", cols=HIDDEN, dtype=everyone.dtype)
        assert torch.equal(hidden, want)
        total = flashcomm.simulate.all_reduce([want, want * 2], "ec6", "one_step")
        assert torch.equal(combined, total.split(TOKENS)[dist.get_rank()])
        return stats


def plain(folder: str) -> dict:
    """Values as they are, by the same calls: large enough for nothing."""
    with groups(folder, Policy(codec="none", min_bytes=1 << 20, hops=SAVED.hops)) as (config, ep):
        flashcomm.reset_stats()
        everyone, hidden, combined = exchange(config, ep, torch.float32)
        assert torch.equal(hidden, everyone)
        assert torch.equal(combined, (everyone + everyone * 2).split(TOKENS)[dist.get_rank()])
        return flashcomm.stats()


def test_vllm_on_cpus_has_no_exchange_of_its_own(fresh_ranks, configured):
    assert fresh_ranks(2).run(alone, configured) == ["AgRsAll2AllManager"] * 2


def test_dispatch_and_combine_between_vllms_groups(fresh_ranks, configured):
    for stats in fresh_ranks(2).run(compressed, configured):
        assert stats["calls"] == {
            "all_gather/one_step/int8g128": 2,
            "all_gather/plain/none": 3,
            "reduce_scatter/one_step/ec6": 2,
        }
        assert stats["plain"] == {"weights and numbers of experts": 3}


def test_what_is_not_compressed_is_sent_as_it_is(fresh_ranks, configured):
    for stats in fresh_ranks(2).run(plain, configured):
        reason = "message under the policy's min_bytes = 1 MiB"
        assert stats["plain"] == {reason: 4, "weights and numbers of experts": 3}


def given(**options) -> SimpleNamespace:
    usual = dict(
        pipeline_parallel_size=1, tensor_parallel_size=1, data_parallel_size=2, enable_dbo=False, enforce_eager=True,
        enable_expert_parallel=False, enable_elastic_ep=False, all2all_backend="allgather_reducescatter",
        additional_config=None,
    )  # fmt: skip
    return SimpleNamespace(**{**usual, **options})


def test_options_that_cannot_be_combined_are_refused_by_name(monkeypatch):
    from vllm.platforms import current_platform

    from flashcomm.integrations import vllm

    try:
        arguments = given()
        vllm.prepare(arguments, SAVED)
        assert arguments.additional_config["flashcomm"]["hops"]["combine"] == "ec6"
        with pytest.raises(ValueError, match="dispatch and combine: on CPUs .* give --enforce-eager, or take both out"):
            vllm.prepare(given(enforce_eager=False), SAVED)
        with pytest.raises(ValueError, match="leave --enable-expert-parallel out; each expert is then cut over"):
            vllm.prepare(given(enable_expert_parallel=True), SAVED)
        with pytest.raises(ValueError, match="--enable-elastic-ep makes groups"):
            vllm.prepare(given(enable_elastic_ep=True), SAVED)
        # One data-parallel rank exchanges nothing, so nothing is asked of the workers.
        arguments = given(data_parallel_size=1)
        vllm.prepare(arguments, SAVED)
        assert arguments.additional_config is None
        vllm.prepare(given(all2all_backend="deepep_low_latency"), SAVED)
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
        with pytest.raises(ValueError, match="--all2all-backend deepep_low_latency exchanges tokens inside of its own"):
            vllm.prepare(given(all2all_backend="deepep_low_latency", enforce_eager=False), SAVED)
        vllm.prepare(given(enforce_eager=False, enable_expert_parallel=True), SAVED)
    finally:
        vllm.undo()


def test_workers_of_data_parallel_ranks_have_numbers_of_their_own():
    from flashcomm.integrations.vllm import _number

    sizes = SimpleNamespace(data_parallel_index=1, world_size=4)
    assert [_number(rank, sizes) for rank in range(4)] == [4, 5, 6, 7]


POLICY = """
codec = "none"
min_bytes = 4096
algorithm = "one_step"

[hops]
dispatch = "int8g128"
combine = "ec8"
"""
LENGTHS = (1, 5, 17, 40, 64, 100, 150, 200, 250, 300, 350, 400, 450, 500, 600, 700)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """The bundled model with its MLPs cut into eight experts."""
    folder = tmp_path_factory.mktemp("mixture")
    path = Path(__file__).parents[2] / "tools" / "dense_as_experts.py"
    spec = importlib.util.spec_from_file_location("dense_as_experts", path)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    model, _ = load(MODEL, torch.float32)
    tool.cut(model, 8).save_pretrained(folder)
    for file in MODEL.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@torch.inference_mode()
def test_a_server_of_two_data_parallel_ranks_answers_with_compressed_exchanges(mixture, tmp_path):
    (tmp_path / "policy.toml").write_text(POLICY)
    model, tokenizer = load(mixture, torch.float32)
    prompts = [tokenizer(inspect.getsource(functools))["input_ids"][:length] for length in LENGTHS]
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        texts.append(tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True))
    options = ("--data-parallel-size", "2", "--api-server-count", "1", "--enforce-eager")
    env = {"FLASHCOMM_POLICY": str(tmp_path / "policy.toml"), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with Server(tmp_path / "log", *options, model=mixture, ranks=1, dtype="float32", env=env) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=12)["text"], prompts))
        assert sum(map(str.__eq__, answers, texts)) >= 12, list(zip(answers, texts, strict=True))
        assert "flashcomm compresses dispatch in int8g128, combine in ec8; 2 ranks over" in server.printed()

        def counts(call: str) -> list:
            found = server.metrics("flashcomm_calls_total")
            return [found.get(f'{{call="{call}",rank="{rank}"}}') for rank in (0, 1)]

        # Workers write once a second, and idle ranks take part in every step.
        for call in ("all_gather/one_step/int8g128", "reduce_scatter/one_step/ec8"):
            wait_for(lambda call=call: counts(call)[0] and counts(call)[0] == counts(call)[1], 30)
        sent, saved = (server.metrics(f"flashcomm_{kind}_bytes_total")['{rank="0"}'] for kind in ("sent", "saved"))
        # Decode steps are small, and travel as they are.
        assert sent < 0.5 * (sent + saved)
