"""Which codec which sum of a model gets, in a file that every integration reads.

    codec = "int8g128"      # of the layers that no rule names; "none" for plain
    phase = "prefill"       # or "all"
    min_bytes = 65536       # of a message in the model's dtype; smaller ones are plain
    algorithm = "auto"

    [[layers]]              # the first match wins
    match = "model.layers.[0-3].mlp.*"
    codec = "int4g128"

`Policy.from_environment` finds it, or a codec alone: ``FLASHCOMM_POLICY=policy.toml``, ``FLASHCOMM_CODEC=int8g128``.

Source: our own.
"""

import fnmatch
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from flashcomm.codecs import Codec, parse
from flashcomm.errors import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

PHASES = ("prefill", "all")
ALGORITHMS = ("auto", "one_step", "two_step", "hierarchical")
FILE_VARIABLE = "FLASHCOMM_POLICY"
CODEC_VARIABLE = "FLASHCOMM_CODEC"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What some layers get."""

    match: str
    """Pattern of `fnmatch` for the whole name of a module; ``*`` matches dots too."""
    codec: str


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is compressed, and how.

    Raises:
        ValueError: a field that is not allowed; says which, what was given, and what is allowed.

    >>> policy = Policy(codec="int8g128", layers=(Rule(match="*.down_proj", codec="int5g128"),))
    >>> str(policy.codec_for("model.layers.7.mlp.down_proj")), str(policy.codec_for("model.layers.7.self_attn.o_proj"))
    ('int5g128', 'int8g128')
    >>> print(policy)
    int8g128, int5g128 for *.down_proj; prefill, from 64 KiB
    """

    codec: str = "int8g128"
    """Of the layers that no rule matches."""
    phase: str = "prefill"
    """``all`` for decode steps too."""
    min_bytes: int = 64 * 2**10
    """Of a message in the dtype of the model."""
    algorithm: str = "auto"
    layers: tuple[Rule, ...] = ()

    def __post_init__(self):
        _check(self.phase in PHASES, "phase", self.phase, f"use {' or '.join(PHASES)}")
        _check(self.algorithm in ALGORITHMS, "algorithm", self.algorithm, f"use one of {', '.join(ALGORITHMS)}")
        is_size = isinstance(self.min_bytes, int) and not isinstance(self.min_bytes, bool) and self.min_bytes >= 0
        _check(is_size, "min_bytes", self.min_bytes, "use a number of bytes, 0 or more")
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

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """All that some module can get, without `none`."""
        names = dict.fromkeys([self.codec, *(rule.codec for rule in self.layers)])
        return tuple(parse(name) for name in names if name != "none")

    @classmethod
    def parse(cls, text: str, source: str = "policy") -> "Policy":
        """Read TOML.

        Args:
            text: as in this module's description.
            source: where it is from, for error messages.

        Raises:
            ValueError: no TOML, or a key or value that is not allowed.
        """
        try:
            return cls.from_keys(tomllib.loads(text))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> "Policy":
        """What a file with these keys says, such as ``{"codec": "int8g128", "layers": [{...}]}``.

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
        return cls(**{**keys, "layers": tuple(Rule(**rule) for rule in rules)})

    @classmethod
    def load(cls, path: "str | Path") -> "Policy":
        """Read a file.

        Raises:
            ValueError: no such file, or as for `parse`.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the policy {str(path)!r}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def from_environment(cls) -> "Policy | None":
        """What ``FLASHCOMM_POLICY`` or ``FLASHCOMM_CODEC`` says; None if neither is set.

        Raises:
            ValueError: both are set, or one cannot be read.
        """
        path, codec = os.environ.get(FILE_VARIABLE, ""), os.environ.get(CODEC_VARIABLE, "")
        if path and codec:
            raise ValueError(f"{FILE_VARIABLE}={path} and {CODEC_VARIABLE}={codec} are both set: use one of them")
        if path:
            return cls.load(path)
        if not codec:
            return None
        try:
            return cls(codec=codec)
        except ValueError as error:
            raise ValueError(f"{CODEC_VARIABLE}: {error}") from None

    def save(self, path: "str | Path", comments: Sequence[str] = ()):
        """Write a file that `load` reads.

        Args:
            path: of the file.
            comments: lines to begin it with, such as what the choice is based on.
        """
        lines = [f"# {line}".rstrip() for line in comments]
        lines += [f"{field.name} = {_toml(getattr(self, field.name))}" for field in fields(self)[:-1]]
        for rule in self.layers:
            lines += ["", "[[layers]]", f"match = {_toml(rule.match)}", f"codec = {_toml(rule.codec)}"]
        Path(path).write_text("\n".join(lines) + "\n")

    def __str__(self) -> str:
        rules = "".join(f", {rule.codec} for {rule.match}" for rule in self.layers[:3])
        more = f", and {len(self.layers) - 3} more rules" if len(self.layers) > 3 else ""
        phase = "prefill" if self.phase == "prefill" else "prefill and decode"
        size = f", from {self.min_bytes / 1024:g} KiB" if self.min_bytes else ""
        algorithm = f", {self.algorithm}" if self.algorithm != "auto" else ""
        return f"{self.codec}{rules}{more}; {phase}{size}{algorithm}"

    @cached_property
    def _found(self) -> dict[str, Codec]:
        return {}


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
    """A text or number as TOML; basic strings escape as JSON's do."""
    return json.dumps(value)
