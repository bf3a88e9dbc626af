"""Run vLLM's steps in parts that take turns at the sums: one part computes while the sums of another are on the wire.

    FLASHCOMM_OVERLAP=auto vllm serve MODEL -tp 2
    FLASHCOMM_CODEC=int8g128 FLASHCOMM_OVERLAP=2 vllm serve MODEL -tp 2

How: vLLM's V1 model runner builds the attention metadata of a step and calls the model in two methods, which are
replaced. A step with enough tokens is cut, between requests where that balances and else inside of one; vLLM's own code
for microbatches makes the metadata of each part. Each part calls the model with its tokens, metadata, slot mapping and
forward context, as a greenlet. The first part leads, so at every layer its keys and values are in the cache before a
later part reads them.

Parts run the model without its compiled graph (`skip_compiled`): a greenlet that switches inside an operator written in
Python ends the process, because pybind11 keeps a stack per thread. All other steps stay compiled.

Not cut, and counted with the reason: see `never` and `_why_whole`. vLLM's V2 model runner, which it takes on GPUs, has
other methods. Tested with vLLM 0.32 on the CPU; no GPU has run this.

Source: ISO (arXiv 2409.11155); turns at the sums are our own, the parts' metadata vLLM's.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from flashcomm.codecs import Codec
from flashcomm.collectives.stats import record_prefill
from flashcomm.integrations import worker_metrics
from flashcomm.integrations.sums import Sums
from flashcomm.integrations.vllm_steps import Step
from flashcomm.parts.planned import Planned, Refused, Waiting, refused
from flashcomm.planner.overlap import MIN_TOKENS
from flashcomm.policy import Policy

_ATTENTION = ("FullAttentionSpec",)
"""Kinds of cache whose attention can be cut anywhere: each token reads all keys before it, and no other state."""


class StepOverlap(Planned):
    """The steps of one worker.

    Args:
        policy: its key ``overlap`` is not ``off``.
        config: vLLM's ``VllmConfig``.
        log: for a warning if no step can be cut.
    """

    sums: Sums | None
    """The sums of the worker's ``tp`` group, once its ranks have met."""
    running: bool
    """Whether parts run, so that every sum must come to `reduce`."""

    def __init__(self, policy: Policy, config: Any, log: logging.Logger):
        compilation = config.compilation_config
        super().__init__(_parts(policy), graphs=getattr(compilation.mode, "name", "NONE") != "NONE")
        self.sums, self.running = None, False
        self._waiting, self._number = self.wait, 0
        self._codec: Codec | None = None
        self._never = never(config)
        if self._never:
            log.warning("flashcomm runs all steps in one piece: %s", self._never)
            record_prefill(f"in one piece: {self._never}")

    def use(self, policy: Policy):
        """Follow another policy from the next step on, on all ranks alike."""
        self.parts = _parts(policy)

    def hooks(self) -> list[tuple[type, str, Callable[[Callable], Callable]]]:
        """Methods of vLLM to wrap, each with its wrapper."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        return [
            (GPUModelRunner, "_build_attention_metadata", self._remembering),
            (GPUModelRunner, "_model_forward", self._in_parts),
        ]

    def reduce(self, x: torch.Tensor, codec: Codec) -> torch.Tensor:
        """Sum the output of a layer of the part that runs; other parts run meanwhile."""
        import vllm.forward_context as forward_context

        assert self.sums is not None
        # A global that the other parts change.
        mine, self._codec = forward_context._forward_context, codec
        # The embedding's sum is the first; those after attention and after the MLP alternate.
        name = ("mlp", "attention")[self._number % 2] if self._number else "embedding"
        self._number += 1
        try:
            return self._waiting(partial(self.sums.start, x.contiguous(), codec), name)
        except Exception as error:
            worker_metrics.count_error(error)
            raise
        finally:
            forward_context._forward_context = mine

    def reduce_alone(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` like the latest sum of a part, and wait for it."""
        assert self.sums is not None and self._codec is not None
        return self.sums.start(x, self._codec).wait()

    @contextmanager
    def waiting(self, wait: Waiting, context: Any) -> Iterator[None]:
        """Make sums by `wait` in this block, after which vLLM's forward context is `context`."""
        from vllm.forward_context import override_forward_context

        self.running, self._waiting = True, wait
        try:
            with override_forward_context(context):
                yield
        finally:
            self.running = False

    def begin(self):
        """Count the sums of a part from its first."""
        self._number = 0

    def _remembering(self, build: Callable) -> Callable:
        def built(runner: Any, *args: Any, **kwargs: Any) -> Any:
            runner._flashcomm_step = None if args else (partial(build, runner), kwargs)
            return build(runner, *args, **kwargs)

        return built

    def _in_parts(self, forward: Callable) -> Callable:
        def forwarded(
            runner: Any,
            input_ids: "torch.Tensor | None" = None,
            positions: "torch.Tensor | None" = None,
            intermediate_tensors: Any = None,
            inputs_embeds: "torch.Tensor | None" = None,
            **kwargs: Any,
        ) -> Any:
            from vllm.forward_context import get_forward_context

            whole = partial(
                forward, runner, input_ids, positions, intermediate_tensors=intermediate_tensors,
                inputs_embeds=inputs_embeds, **kwargs,
            )  # fmt: skip
            remembered = getattr(runner, "_flashcomm_step", None)
            runner._flashcomm_step = None
            context = get_forward_context()
            # A step of decodes alone is no prefill; one without metadata only measures memory.
            if remembered is None or not context.attn_metadata or remembered[1]["max_query_len"] == 1:
                return whole()
            assert positions is not None
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
            step = Step(self, runner, context, partial(forward, runner), inputs, positions, whole, *remembered)
            if why := self._never or self._why_whole(step, kwargs):
                return refused(step, Refused(why))
            assert self.sums is not None
            policy = self.sums.policy
            return self.run(step, (policy.codec, policy.layers, policy.algorithm), self.sums.group)

        return forwarded

    def _why_whole(self, step: Step, kwargs: dict[str, Any]) -> str:
        """Reason that this step cannot run in parts; "" if it can."""
        kinds = {type(group.kv_cache_spec).__name__ for group in step.runner.kv_cache_config.kv_cache_groups}
        context, sums = step.context, self.sums
        if sums is None:
            return "the ranks have not met"
        if others := kinds.difference(_ATTENTION):
            return f"attention of kind {', '.join(sorted(others))}"
        if kwargs:
            return f"the model also gets {', '.join(sorted(kwargs))}"
        if not isinstance(context.attn_metadata, dict) or not isinstance(context.slot_mapping, dict):
            return "vLLM's own microbatches"
        if context.cudagraph_runtime_mode.name != "NONE":
            return "a captured CUDA graph"
        if step.batch.tokens < MIN_TOKENS:
            return f"fewer than {MIN_TOKENS} tokens"
        if step.positions.shape[-1] != step.batch.tokens:
            return "padded tokens"
        if self.parts == "auto" and sums.hosts == 1 and not sums.compresses and step.device.type == "cpu":
            return "vLLM's sums over shared memory take the cores, so nothing can compute meanwhile"
        return ""


def never(config: Any) -> str:
    """Reason that no step of an engine runs in parts; "" if some can.

    Args:
        config: vLLM's ``VllmConfig``.
    """
    parallel, model = config.parallel_config, config.model_config
    reasons = {
        "vLLM's V2 model runner": getattr(config, "use_v2_model_runner", False),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "experts": getattr(parallel, "is_moe_model", False) or parallel.enable_expert_parallel,
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "a KV connector": getattr(config, "kv_transfer_config", None) is not None,
        "an encoder": model.is_encoder_decoder,
        "a multimodal model": model.is_multimodal_model,
        "layers with a state": model.is_hybrid or model.is_attention_free,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def _parts(policy: Policy) -> "int | str":
    return 1 if policy.overlap == "off" else policy.overlap
