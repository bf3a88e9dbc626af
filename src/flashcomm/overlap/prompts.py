"""Run a model's prompts in parts: one part computes while the sums of another are on the wire.

    with flashcomm.overlap.prefill(model, codec="int8g128"):  # a model loaded tensor parallel
        model.generate(**inputs)

The model is not changed and needs no schedule: its decoder runs once for each part, and the runs take turns where they
wait for a sum (`flashcomm.parts.turns`). The first part always leads, so at every layer its keys and values are in
the cache before the second part needs them. Steps of one token run unchanged. So does a prompt that cannot be split or
would not gain by it; `flashcomm.stats()` counts it.

Hazard: hooks on modules inside the decoder run once for each part, on that part's tokens.

Source: ISO (arXiv 2409.11155); the turns at the sums, and views of one cache, are our own.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from flashcomm.codecs import Codec
from flashcomm.collectives.stats import record_prefill
from flashcomm.integrations.patches import Patches
from flashcomm.integrations.transformers import Compression, compress, compression_of
from flashcomm.overlap import splitting
from flashcomm.parts.planned import Planned, Refused, Waiting
from flashcomm.planner.batches import Rows
from flashcomm.policy import Policy

_overlaps: "list[Overlap]" = []


@contextmanager
def prefill(model: Any, parts: "int | str | Sequence[int]" = "auto", codec: str | Codec | Policy | None = None):
    """Overlap the prefill of `model` for the length of a ``with`` block; yields the `Overlap`.

    Args:
        model: a transformers model, loaded tensor parallel, as for `flashcomm.integrations.transformers.compress`.
        parts: ``auto`` to let `flashcomm.planner.overlap` choose, from times taken of the first prompt of 256 tokens or
            more, whose parts run one after the other; or a number of parts of about equal size, 1 for no overlap; or
            shares of the tokens, such as ``(3, 2)``.
        codec: wire format of the sums, or a policy; None to keep the compression of `model`, or plain if it has none.

    Raises:
        ValueError: a model whose prompts cannot be split, that is not tensor parallel, or that is overlapped already,
            or has a codec already where one is given.

    Example::

        with flashcomm.overlap.prefill(model, codec="int8g128"):
            model.generate(input_ids)

    Source: ISO (arXiv 2409.11155).
    """
    overlap = wrap(model, parts, codec)
    try:
        yield overlap
    finally:
        overlap.undo()


def wrap(
    model: Any, parts: "int | str | Sequence[int]" = "auto", codec: str | Codec | Policy | None = None
) -> "Overlap":
    """Overlap the prefill of `model` until ``undo()`` of the returned handle; the arguments are those of `prefill`."""
    return Overlap(model, parts, codec)


class Overlap(Planned):
    """A model whose prefill overlaps; made by `prefill` and `wrap`."""

    compression: Compression
    """The model's compression; its ``codec`` and ``algorithm`` may be set between prompts, on all ranks alike."""

    def __init__(self, model: Any, parts: "int | str | Sequence[int]", codec: str | Codec | Policy | None):
        super().__init__(parts)
        self._decoder = splitting.decoder_of(model)
        if any(overlap._decoder is self._decoder for overlap in _overlaps):
            raise ValueError("this model's prefill is overlapped already: undo() that first")
        existing = compression_of(model)
        if isinstance(codec, Policy):
            codec = replace(codec, overlap="off")
        owned = compress(model, codec or "none") if codec is not None or existing is None else None
        self._owned = owned
        self.compression = owned or existing  # pyright: ignore[reportAttributeAccessIssue]
        self._running = False
        self._inner = self._decoder.forward
        self._patches = Patches("flashcomm.overlap")
        # A function, because a bound method cannot take the name and signature of what it replaces.
        self._patches.wrap(
            self._decoder, "forward", lambda inner: lambda *args, **kwargs: self._forward(*args, **kwargs)
        )
        _overlaps.append(self)

    def undo(self):
        """Let prompts run in one piece again; the model is as it was. Harmless when repeated."""
        if self in _overlaps:
            _overlaps.remove(self)
            self._patches.undo()
            if self._owned:
                self._owned.undo()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._running:
            raise RuntimeError(
                "this model is in the middle of an overlapped prefill: neither a hook nor another thread can use it "
                "before that is done"
            )
        arguments = splitting.bind(self._inner, args, kwargs)
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None and tokens.shape[1] == 1:
            return self._inner(*args, **kwargs)
        self.last_split = None
        try:
            prompt = splitting.prompt_of(self._decoder, arguments)
        except Refused as why:
            record_prefill(f"in one piece: {why}")
            return self._inner(*args, **kwargs)
        whole = functools.partial(self._inner, *args, **kwargs)
        key = str(self.compression.codec), self.compression.algorithm
        return self.run(_Pass(self, prompt, whole), key, self.compression.group)

    @contextmanager
    def _waiting(self, wait: Waiting):
        self._running, self.compression.wait = True, wait
        try:
            yield
        finally:
            self._running, self.compression.wait = False, None


class _Pass:
    """One call of an overlapped decoder, as `flashcomm.parts.planned` wants it."""

    def __init__(self, overlap: Overlap, prompt: splitting.Prompt, whole: Callable[[], Any]):
        self._overlap, self._prompt, self.whole = overlap, prompt, whole
        self.batch = Rows(prompt.tokens, prompt.rows, prompt.before)
        self.skips, self.device = prompt.skips, prompt.device
        self.waiting = overlap._waiting

    def check(self, sizes: Sequence[int]):
        """Allow all cuts: a prompt that cannot be cut comes here never."""

    def calls(self, sizes: Sequence[int]) -> list[Callable[[], Any]]:
        arguments = splitting.arguments_of_parts(self._prompt, sizes)
        return [functools.partial(self._overlap._inner, **part) for part in arguments]

    def joined(self, outputs: Sequence[Any]) -> Any:
        return splitting.joined(self._prompt, outputs)

    def reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._overlap.compression.reduce(name, x)
