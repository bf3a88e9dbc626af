"""One step of vLLM's V1 model runner, and the parts that it is cut into.

Source: our own; vLLM's code for microbatches makes the parts' metadata.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch

from flashcomm.parts.planned import Refused, Waiting
from flashcomm.planner.batches import Requests


class Step:
    """One step of a model runner, as `flashcomm.parts.planned.Pass` describes it.

    Args:
        overlap: the worker's `flashcomm.integrations.vllm_overlap.StepOverlap`.
        runner: vLLM's ``GPUModelRunner``.
        context: vLLM's forward context of the step.
        forward: runs the model on ``input_ids``, ``inputs_embeds`` and ``positions``.
        inputs: of the step: ids of shape [tokens], or embeddings of shape [tokens, hidden].
        positions: of shape [tokens], or [3, tokens].
        whole: runs the step in one piece.
        build: makes attention metadata, for parts if it is given ``ubatch_slices``.
        arguments: with which vLLM called it in this step.
    """

    skips = "all"

    def __init__(
        self,
        overlap: Any,
        runner: Any,
        context: Any,
        forward: Callable[..., Any],
        inputs: "dict[str, torch.Tensor | None]",
        positions: torch.Tensor,
        whole: Callable[[], Any],
        build: Callable[..., Any],
        arguments: dict[str, Any],
    ):
        self.runner, self.context, self.positions, self.whole = runner, context, positions, whole
        self._inputs = inputs
        self._overlap, self._forward, self._build, self._arguments = overlap, forward, build, arguments
        self.device = runner.device
        requests, scheduled = runner.input_batch, arguments["num_scheduled_tokens"]
        count = arguments["num_reqs"]
        self._computed = requests.num_computed_tokens_cpu[:count]
        self.batch = Requests(
            tuple((scheduled[name], int(n)) for name, n in zip(requests.req_ids[:count], self._computed, strict=True))
        )
        self._ends = np.cumsum([tokens for tokens, _ in self.batch.requests])
        self.reduce = lambda x, name: overlap.reduce_alone(x)

    def waiting(self, wait: Waiting) -> AbstractContextManager:
        return self._overlap.waiting(wait, self.context)

    def check(self, sizes: Sequence[int]):
        """Refuse a cut before the writer of a block that a request before the cut reads from the prefix cache.

        vLLM lets a request hit blocks that another one of the same step computes. In one piece all keys of a layer are
        written before any is read; in parts, only those of this part and the earlier ones.
        """
        tokens = np.array([tokens for tokens, _ in self.batch.requests])
        starts = self._ends - tokens
        for group in self.runner.input_batch.block_table.block_tables:
            table, size = group.get_numpy_array()[: len(tokens)], group.block_size
            columns, computed = np.arange(table.shape[1]), self._computed[:, None]
            # Blocks before a request's own first one; of these it may have hit some.
            hit = columns < computed // size
            for cut in itertools.accumulate(sizes[:-1]):
                first = computed + np.maximum(0, cut - starts)[:, None]
                last = computed + tokens[:, None] - 1
                later = (first // size <= columns) & (columns <= last // size) & (self._ends > cut)[:, None]
                if np.isin(table[hit & (starts < cut)[:, None]], table[later]).any():
                    raise Refused("a prefix that a later request of the same step computes")

    def calls(self, sizes: Sequence[int]) -> list[Callable[[], Any]]:
        from vllm.v1.worker.ubatch_utils import UBatchSlice

        slices = []
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
            first = int(np.searchsorted(self._ends, end - size, side="right"))
            last = int(np.searchsorted(self._ends, end, side="left"))
            slices.append(UBatchSlice(slice(first, last + 1), slice(end - size, end)))
        # Part by part: in one call, FlashAttention's builder would take the first part's lengths for all.
        return [
            partial(self._part, one.token_slice, self._build(**{**self._arguments, "ubatch_slices": [one]})[0][0])
            for one in slices
        ]

    def _part(self, tokens: slice, metadata: Any) -> Any:
        import vllm.forward_context as forward_context

        mine = copy.copy(self.context)
        mine.attn_metadata, mine.skip_compiled = metadata, True
        mine.slot_mapping = {layer: slots[tokens] for layer, slots in self.context.slot_mapping.items()}
        mine.additional_kwargs = dict(self.context.additional_kwargs)
        if getattr(mine, "is_padding", None) is not None:
            mine.is_padding = mine.is_padding[tokens]
        forward_context._forward_context = mine
        self._overlap.begin()
        inputs = {name: None if x is None else x[tokens] for name, x in self._inputs.items()}
        return self._forward(**inputs, positions=self.positions[..., tokens])

    def joined(self, outputs: Sequence[Any]) -> torch.Tensor:
        return torch.cat(list(outputs))
