"""Run a model's prompts in parts: one part computes while the sums of another are on the wire.

    with flashcomm.overlap.prefill(model, codec="int8g128"):  # a model loaded tensor parallel
        model.generate(**inputs)

The model is not changed and needs no schedule: its decoder runs once for each part, and the runs take turns where they
wait for a sum (`flashcomm.overlap.turns`). The first part always leads, so at every layer its keys and values are in
the cache before the second part needs them. Steps of one token run unchanged. So does a prompt that cannot be split or
would not gain by it; `flashcomm.stats()` counts it.

Hazard: hooks on modules inside the decoder run once for each part, on that part's tokens.

Source: ISO (arXiv 2409.11155); the turns at the sums, and views of one cache, are our own.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from flashcomm.codecs import Codec
from flashcomm.collectives.stats import record_prefill
from flashcomm.integrations.patches import Patches
from flashcomm.integrations.transformers import Compression, compress, compression_of
from flashcomm.overlap import splitting, turns
from flashcomm.overlap.measuring import SHARES, Stopwatch, profile_of
from flashcomm.planner.overlap import MIN_TOKENS, Profile, Split, choose
from flashcomm.policy import Policy

_overlaps: "list[Overlap]" = []
_MEASURE_TOKENS = 2 * MIN_TOKENS
"""A shorter prompt says too little about longer ones."""


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


class Overlap:
    """A model whose prefill overlaps; made by `prefill` and `wrap`."""

    compression: Compression
    """The model's compression; its ``codec`` and ``algorithm`` may be set between prompts, on all ranks alike."""
    profiles: "dict[tuple[str, str], Profile]"
    """Measured profiles, by codec and algorithm; without an entry the next prompt is measured."""

    last_split: Split | None
    """Parts of the latest prompt and their predicted times; None if it was not planned."""
    wait: Callable[[Callable[[], Any], str], torch.Tensor]
    """Function that makes the sums while parts take turns, like `Compression.wait`; a benchmark may replace it."""

    def __init__(self, model: Any, parts: "int | str | Sequence[int]", codec: str | Codec | Policy | None):
        self.parts, self.last_split = parts, None
        self.wait = lambda start, name: turns.wait(start())
        self._decoder = splitting.decoder_of(model)
        if any(overlap._decoder is self._decoder for overlap in _overlaps):
            raise ValueError("this model's prefill is overlapped already: undo() that first")
        existing = compression_of(model)
        owned = compress(model, codec or "none") if codec is not None or existing is None else None
        self._owned = owned
        self.compression = owned or existing  # pyright: ignore[reportAttributeAccessIssue]
        self.profiles = {}
        self._running = False
        self._inner = self._decoder.forward
        self._patches = Patches("flashcomm.overlap")
        # A function, because a bound method cannot take the name and signature of what it replaces.
        self._patches.wrap(
            self._decoder, "forward", lambda inner: lambda *args, **kwargs: self._forward(*args, **kwargs)
        )
        _overlaps.append(self)

    @property
    def parts(self) -> "str | tuple[int, ...]":
        """Shares of the parts, or ``auto``; may be assigned to like ``compression.codec``, also a number of parts."""
        return self._parts

    @parts.setter
    def parts(self, parts: "int | str | Sequence[int]"):
        shares = (1,) * parts if isinstance(parts, int) else parts
        if shares != "auto" and (isinstance(shares, str) or not shares or min(shares) < 1):
            raise ValueError(f"parts={parts!r}: give 'auto', a number of 1 or more, or a positive share for each part")
        self._parts = shares if isinstance(shares, str) else tuple(shares)

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
            self.last_split = split = self._split_of(prompt)
        except splitting.Refused as why:
            record_prefill(f"in one piece: {why}")
            return self._inner(*args, **kwargs)
        if split is None:
            return self._measured(prompt)
        start = time.perf_counter()
        if len(split.sizes) == 1:
            how, output = "in one piece: parts would not be faster", self._inner(*args, **kwargs)
        else:
            how, output = f"{len(split.sizes)} parts", self._in_turns(prompt, split.sizes)
        # On a GPU the host is done long before.
        seconds = time.perf_counter() - start if prompt.device.type == "cpu" else None
        record_prefill(how, split.seconds, seconds)
        return output

    def _split_of(self, prompt: splitting.Prompt) -> Split | None:
        """Choose the parts of a prompt, or None to measure it; the same on every rank."""
        if len(self.parts) == 1:
            raise splitting.Refused("asked for")
        if not isinstance(self.parts, str):
            return Split(sizes=tuple(cut(prompt.tokens, self.parts)))
        if prompt.tokens < MIN_TOKENS:
            raise splitting.Refused(f"fewer than {MIN_TOKENS} tokens")
        profile = self.profiles.get(self._key)
        if profile is not None:
            return choose(profile, prompt.tokens, prompt.rows, prompt.before)
        if prompt.tokens < _MEASURE_TOKENS:
            raise splitting.Refused(f"nothing measured yet, and fewer than {_MEASURE_TOKENS} tokens")
        return None

    @property
    def _key(self) -> tuple[str, str]:
        return str(self.compression.codec), self.compression.algorithm

    def _in_turns(self, prompt: splitting.Prompt, sizes: Sequence[int]) -> Any:
        with self._waiting(self.wait):
            return splitting.joined(prompt, turns.run(self._calls(prompt, sizes)))

    def _measured(self, prompt: splitting.Prompt) -> Any:
        """Run a prompt's parts one after the other, and keep their profile."""
        sizes, watch = cut(prompt.tokens, SHARES), Stopwatch(prompt.device)
        outputs, times = [], []
        with self._waiting(watch.wait):
            for call in self._calls(prompt, sizes):
                outputs.append(call())
                times.append(watch.part())
        names = watch.names[: len(times[0].sums)]
        reduce = functools.partial(self.compression.reduce, names[-1])
        rates = [watch.rate(reduce, prompt.rows * size) for size in sizes[1:]]
        self.profiles[self._key] = profile_of(
            times,
            rates,
            names,
            sizes,
            prompt.rows,
            prompt.before,
            prompt.skips,
            self.compression.group,
            prompt.device,
        )
        record_prefill(f"{len(SHARES)} parts one after the other, to measure them")
        return splitting.joined(prompt, outputs)

    def _calls(self, prompt: splitting.Prompt, sizes: Sequence[int]) -> list[Callable[[], Any]]:
        return [functools.partial(self._inner, **part) for part in splitting.arguments_of_parts(prompt, sizes)]

    @contextmanager
    def _waiting(self, wait: Callable[[Callable[[], Any], str], torch.Tensor]):
        """Make the sums of the model by `wait` in this block."""
        self._running, self.compression.wait = True, wait
        try:
            yield
        finally:
            self._running, self.compression.wait = False, None


def cut(tokens: int, shares: Sequence[int]) -> list[int]:
    """Divide `tokens` among parts.

    Raises:
        Refused: fewer tokens than parts.

    >>> cut(1000, (1, 1)), cut(10, (1, 2, 1))
    ([500, 500], [2, 5, 3])
    """
    if tokens < len(shares):
        raise splitting.Refused("fewer tokens than parts")
    edges = [tokens * sum(shares[:n]) // sum(shares) for n in range(len(shares) + 1)]
    # A small share may come to nothing.
    for n in range(1, len(edges)):
        edges[n] = min(max(edges[n], edges[n - 1] + 1), tokens - len(shares) + n)
    return [end - start for start, end in itertools.pairwise(edges)]
