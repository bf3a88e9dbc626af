"""A policy says which codec each sum and each hop of a model gets. It is a file that every integration reads.

    codec = "int8g128"      # of the layers that no rule names; "none" for plain
    phase = "prefill"       # or "all"
    min_bytes = 65536       # of a message in the model's dtype; smaller ones are plain
    algorithm = "auto"
    overlap = "off"         # or "auto", or a number of parts: run long prompts in parts that take turns

    [[layers]]              # the first match wins
    match = "model.layers.[0-3].mlp.*"
    codec = "int4g128"

    [hops]                  # from one rank to another; "none" if not given
    pp = "lossless"         # between pipeline stages
    dispatch = "fp8g128"    # tokens to the ranks that hold their experts
    combine = "ec8"         # what the experts of a rank make of them, back to the token's rank, which adds it up
    send = "lossless"       # send and recv of the torch backend
    broadcast = "lossless"  # broadcast of the torch backend

`Policy.from_environment` finds it, or a codec alone: ``FLASHCOMM_POLICY=policy.toml``, ``FLASHCOMM_CODEC=int8g128``.
``FLASHCOMM_OVERLAP=auto`` sets the key `overlap` of either, and is a policy of plain sums by itself.
`Policy.choose` decides about one sum, by the same rules and in the same words for every engine.

Source: our own.
"""

import fnmatch
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flashcomm import settings
from flashcomm.codecs import FLOAT_DTYPES, Codec, Lossless, Plain, parse
from flashcomm.errors import did_you_mean
from flashcomm.units import bytes_text, kib_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

PHASES = ("prefill", "all")
ALGORITHMS = ("auto", "one_step", "two_step", "hierarchical")
FILE_VARIABLE = "FLASHCOMM_POLICY"
CODEC_VARIABLE = "FLASHCOMM_CODEC"
OVERLAP_VARIABLE = "FLASHCOMM_OVERLAP"
MOST_PARTS = 16


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The codec of all modules whose name matches a pattern."""

    match: str
    """Pattern of `fnmatch` for the whole name of a module; ``*`` matches dots too."""
    codec: str


@dataclass(frozen=True, kw_only=True)
class Hops:
    """Codecs of what travels from one rank to another, by its kind; ``none`` leaves a kind uncompressed.

    A message is one transfer, so each codec has one format, and ``min_bytes`` of the policy alone decides which
    messages are large enough: prompts, and large batches of decode steps.

    >>> Hops(pp="lossless").codec("pp").varies
    True
    """

    pp: str = "none"
    """Hidden states and residual between pipeline stages."""
    dispatch: str = "none"
    """Hidden states of tokens, to the ranks that hold the tokens' experts."""
    combine: str = "none"
    """Sums of a rank's experts, back to the ranks of the tokens, which add them up in fp32."""
    send: str = "none"
    """Tensors of `send` and `recv` of the backend ``flashcomm``."""
    broadcast: str = "none"
    """Tensors of `broadcast` of the backend ``flashcomm``."""

    def __post_init__(self):
        for kind in fields(self):
            name, given = f"hops.{kind.name}", getattr(self, kind.name)
            codec = _canonical(name, given)
            _check(len(set(parse(codec).formats)) == 1, name, given, "a hop is one transfer: use one format")
            object.__setattr__(self, kind.name, codec)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that have a codec, such as ``pp``."""
        return tuple(kind.name for kind in fields(self) if getattr(self, kind.name) != "none")

    def codec(self, kind: str) -> Codec:
        """The codec of one kind, such as ``pp``."""
        return parse(getattr(self, kind))

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """All codecs, without `none`."""
        return tuple(map(self.codec, self.kinds))

    def __str__(self) -> str:
        return ", ".join(f"{kind} hops in {self.codec(kind)}" for kind in self.kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The decision about one sum; made by `Policy.choose`."""

    codec: Codec
    """Format of the module's sums, named even if this sum stays plain."""
    algorithm: str
    """Name for `flashcomm.all_reduce`; ``plain`` for a sum that is not compressed."""
    reason: str | None
    """Sentence that says why the sum stays plain; None if it is compressed."""

    def declined(self, reason: str) -> "Choice":
        """Return the same choice for a sum that stays plain."""
        return Choice(codec=self.codec, algorithm="plain", reason=reason)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Rules that say which sums are compressed, and in which codec.

    Raises:
        ValueError: a value that is not allowed; the message says which field, what was given, and what is allowed.

    >>> policy = Policy(codec="int8g128", layers=(Rule(match="*.down_proj", codec="int5g128"),))
    >>> str(policy.codec_for("model.layers.7.mlp.down_proj")), str(policy.codec_for("model.layers.7.self_attn.o_proj"))
    ('int5g128', 'int8g128')
    >>> print(policy)
    int8g128, int5g128 for *.down_proj; prefill, from 64 KiB
    """

    codec: str = "int8g128"
    """Codec of the layers that no rule matches."""
    phase: str = "prefill"
    """``prefill``, or ``all`` to compress decode steps too."""
    min_bytes: int = 64 * 2**10
    """Smallest message that is compressed, in bytes of the model's dtype."""
    algorithm: str = "auto"
    overlap: "str | int" = "off"
    """``auto`` to run long prompts in parts where measured times say that it pays, a number of parts to run all of them
    in that many, ``off`` for one piece. Engines follow it; `flashcomm.overlap` has arguments of its own."""
    layers: tuple[Rule, ...] = ()
    """Rules for single modules; the first that matches counts."""
    hops: Hops = field(default_factory=Hops)

    def __post_init__(self):
        _check(self.phase in PHASES, "phase", self.phase, f"use {' or '.join(PHASES)}")
        _check(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, f"use one of {', '.join(ALGORITHMS)}")
        is_size = isinstance(self.min_bytes, int) and not isinstance(self.min_bytes, bool) and self.min_bytes >= 0
        _check(is_size, "min_bytes", self.min_bytes, "use a number of bytes, 0 or more")
        parts = self.overlap
        is_count = isinstance(parts, int) and not isinstance(parts, bool) and 2 <= parts <= MOST_PARTS
        hint = f'use "off", "auto" or a number of parts from 2 to {MOST_PARTS}'
        _check(is_count or parts in ("off", "auto"), "overlap", parts, hint)
        object.__setattr__(self, "codec", _canonical("codec", self.codec))
        rules = [Rule(match=r.match, codec=_canonical(f"codec of layers {r.match!r}", r.codec)) for r in self.layers]
        object.__setattr__(self, "layers", tuple(rules))

    def codec_for(self, module: str) -> Codec:
        """The codec of the sum after one module.

        Args:
            module: its name in the model, such as ``model.layers.0.mlp.down_proj``.
        """
        found = self._found
        if module not in found:
            rules = (rule.codec for rule in self.layers if fnmatch.fnmatchcase(module, rule.match))
            found[module] = parse(next(rules, self.codec))
        return found[module]

    def choose(
        self,
        message_bytes: int,
        dtype: torch.dtype,
        module: str | None = None,
        decoding: "bool | Callable[[], bool]" = False,
        *,
        codec: Codec | None = None,
    ) -> Choice:
        """Decide whether a sum is compressed, by arithmetic on facts that are equal on all ranks.

        Args:
            message_bytes: size of the sum on one rank.
            dtype: of its values.
            module: name of the module whose outputs are summed; None if the engine does not know it, so that no rule
                for layers applies.
            decoding: whether the step that runs is a decode step; a function is called only if the answer matters.
            codec: format of the module's sums, if the caller has looked it up already, or has bound it.

        >>> policy = Policy(codec="int8g128", min_bytes=1 << 20)
        >>> policy.choose(1 << 20, torch.bfloat16).reason, policy.choose(1 << 20, torch.bfloat16, decoding=True).reason
        (None, 'decode step')
        >>> policy.choose(4096, torch.bfloat16).reason
        "message under the policy's min_bytes = 1 MiB"
        """
        if codec is None:
            codec = self._default if module is None else self.codec_for(module)
        reason = self._why_plain(message_bytes, dtype, codec, decoding)
        return Choice(codec=codec, algorithm="plain" if reason else self.algorithm, reason=reason)

    def choose_hop(self, kind: str, message_bytes: int, dtype: torch.dtype) -> Choice:
        """Decide whether a hop is compressed; size and dtype alone count, and its algorithm is ``hop``.

        Args:
            kind: a field of `Hops`, such as ``pp``.
            message_bytes: of the uncompressed message.
            dtype: of its values.

        >>> Policy(hops=Hops(pp="lossless")).choose_hop("pp", 1 << 20, torch.float32).reason
        'lossless keeps the bits of torch.bfloat16, not of torch.float32'
        """
        codec = self.hops.codec(kind)
        reason = self._why_plain(message_bytes, dtype, codec, False)
        if reason is None and isinstance(codec, Lossless) and dtype != codec.wire:
            reason = f"{codec} keeps the bits of {codec.wire}, not of {dtype}"
        return Choice(codec=codec, algorithm="plain" if reason else "hop", reason=reason)

    def _why_plain(
        self, message_bytes: int, dtype: torch.dtype, codec: Codec, decoding: "bool | Callable[[], bool]"
    ) -> str | None:
        if message_bytes < self.min_bytes:
            return f"message under the policy's min_bytes = {bytes_text(self.min_bytes)}"
        if dtype not in FLOAT_DTYPES:
            return f"dtype {dtype}"
        if self.phase == "prefill" and (decoding() if callable(decoding) else decoding):
            return "decode step"
        return "codec none" if isinstance(codec, Plain) else None

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """All codecs that a module's sum can get, without `none`."""
        names = dict.fromkeys([self.codec, *(rule.codec for rule in self.layers)])
        return tuple(parse(name) for name in names if name != "none")

    @classmethod
    def parse(cls, text: str, source: str = "policy") -> "Policy":
        """Read TOML.

        Args:
            text: with the keys that this module's description shows.
            source: origin of the text, for error messages.

        Raises:
            ValueError: not TOML, or a key or value that is not allowed.
        """
        try:
            return cls.from_keys(tomllib.loads(text))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> "Policy":
        """Read the keys of a file, such as ``{"codec": "int8g128", "layers": [{...}], "hops": {...}}``.

        Raises:
            ValueError: a key or value that is not allowed.
        """
        _known(keys, [field.name for field in fields(cls)], "")
        rules = keys.get("layers", [])
        _check(isinstance(rules, list) and all(isinstance(r, dict) for r in rules), "layers", rules, "use [[layers]]")
        for number, rule in enumerate(rules, 1):
            _known(rule, [field.name for field in fields(Rule)], f"layers[{number}].")
            for name in ("match", "codec"):
                given = rule.get(name)
                _check(isinstance(given, str) and given, f"layers[{number}].{name}", given, "give a text")
        hops = keys.get("hops", {})
        _check(isinstance(hops, dict), "hops", hops, "use a table [hops]")
        _known(hops, [field.name for field in fields(Hops)], "hops.")
        return cls(**{**keys, "layers": tuple(Rule(**rule) for rule in rules), "hops": Hops(**hops)})

    @classmethod
    def load(cls, path: "str | Path") -> "Policy":
        """Read a file.

        Raises:
            ValueError: no such file, or one that `parse` refuses.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the policy {str(path)!r}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def from_environment(cls) -> "Policy | None":
        """Read the policy that the environment asks for; None if none of the three variables is set.

        Raises:
            ValueError: a policy and a codec are both set, or one cannot be read.
        """
        path, codec, parts = map(settings.text, (FILE_VARIABLE, CODEC_VARIABLE, OVERLAP_VARIABLE))
        if path and codec:
            raise ValueError(f"{FILE_VARIABLE}={path} and {CODEC_VARIABLE}={codec} are both set: use one of them")
        policy = cls.load(path) if path else None
        try:
            if codec:
                policy = cls(codec=codec)
        except ValueError as error:
            raise ValueError(f"{CODEC_VARIABLE}: {error}") from None
        if not parts:
            return policy
        try:
            return replace(policy or cls(codec="none"), overlap=int(parts) if parts.isdecimal() else parts)
        except ValueError as error:
            raise ValueError(f"{OVERLAP_VARIABLE}: {error}") from None

    def save(self, path: "str | Path", comments: Sequence[str] = ()):
        """Write a file that `load` reads.

        Args:
            path: of the file.
            comments: lines at its beginning, such as the evidence for the policy.
        """
        lines = [f"# {line}".rstrip() for line in comments]
        lines += [f"{field.name} = {_toml(getattr(self, field.name))}" for field in fields(self)[:-2]]
        if self.hops != Hops():
            lines += ["", "[hops]", *(f"{kind.name} = {_toml(getattr(self.hops, kind.name))}" for kind in fields(Hops))]
        for rule in self.layers:
            lines += ["", "[[layers]]", f"match = {_toml(rule.match)}", f"codec = {_toml(rule.codec)}"]
        Path(path).write_text("\n".join(lines) + "\n")

    def __str__(self) -> str:
        rules = "".join(f", {rule.codec} for {rule.match}" for rule in self.layers[:3])
        more = f", and {len(self.layers) - 3} more rules" if len(self.layers) > 3 else ""
        phase = "prefill" if self.phase == "prefill" else "prefill and decode"
        size = f", from {kib_text(self.min_bytes)}" if self.min_bytes else ""
        algorithm = f", {self.algorithm}" if self.algorithm != "auto" else ""
        parts = "" if self.overlap == "off" else f", in {self.overlap} parts"
        hops = f"; {self.hops}" if self.hops.codecs else ""
        return f"{self.codec}{rules}{more}; {phase}{size}{algorithm}{parts}{hops}"

    @cached_property
    def _found(self) -> dict[str, Codec]:
        return {}

    @cached_property
    def _default(self) -> Codec:
        return parse(self.codec)


def _known(keys: Mapping[str, Any], allowed: Sequence[str], where: str):
    for key in keys:
        if key not in allowed:
            raise ValueError(f"unknown key {where}{key}.{did_you_mean(key, allowed)} Allowed: {', '.join(allowed)}")


def _check(holds: object, field: str, given: object, hint: str):
    if not holds:
        raise ValueError(f"{field} = {given!r}: {hint}")


def _canonical(field: str, given: object) -> str:
    _check(isinstance(given, str), field, given, 'use a codec, such as "int8g128", or "none"')
    try:
        return str(parse(str(given)))
    except ValueError as error:
        raise ValueError(f"{field} = {given!r}: {error}") from None


def _toml(value: object) -> str:
    """Write a text or number as TOML, whose basic strings escape like JSON's."""
    return json.dumps(value)
