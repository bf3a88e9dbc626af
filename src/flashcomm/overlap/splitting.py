"""Cut the tokens that a transformers decoder is given into parts, which share one cache.

A part must see the cache as if all tokens before it were there, although they get there layer by layer, while parts
take turns. So each part has a view of the cache, whose layers write into the real ones but answer questions, such as
how long they are and which keys a mask is for, as they will be after the earlier parts.

What is not known to be safe is refused: the caller then runs the prompt in one piece.

Source: our own.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from flashcomm.integrations.loaded import cache_name
from flashcomm.parts.planned import Refused

_CACHES = ("DynamicCache", "StaticCache")
_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# They choose their frequencies by the longest position of a call, so a shorter call would get others.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class Prompt(NamedTuple):
    """One call of a decoder that can be split."""

    arguments: dict[str, Any]
    cache: Any
    """The caller's cache, or a new one."""
    cache_name: str
    """Name of the argument that it is, and of the output."""
    keeps_cache: bool
    """Whether the caller gets the cache back."""
    rows: int
    tokens: int
    before: int
    """Tokens that the cache holds already."""
    skips: str
    """Parts whose attention leaves out keys; see `flashcomm.planner.overlap.Profile`."""
    device: torch.device


def decoder_of(model: Any) -> Any:
    """Find the module of `model` that turns tokens into hidden states.

    Raises:
        ValueError: its prompts cannot be split; the message says why.
    """
    decoder = model.get_decoder()
    config = model.config.get_text_config(decoder=True)
    why = ""
    if not cache_name(decoder.forward):
        why = "its decoder keeps no cache of keys and values"
    elif model.config.is_encoder_decoder:
        why = "it has an encoder, whose tokens see each other"
    elif getattr(config, "is_causal", True) is False:
        why = "its tokens see those that follow them"
    elif getattr(config, "num_kv_shared_layers", 0):
        why = "its layers share keys and values"
    elif others := sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)):
        why = f"it has layers of {', '.join(others)}, and only {' and '.join(_LAYER_TYPES)} is known to be safe"
    elif rope := sorted(_rope_types(getattr(config, "rope_parameters", None)) & set(_ROPE_BY_LENGTH)):
        why = f"its {rope[0]} rotary embedding depends on the length of the whole prompt"
    if why:
        raise ValueError(f"the prompts of a {type(model).__name__} cannot be split: {why}")
    return decoder


def _rope_types(parameters: Any) -> set[str]:
    """Collect the types of all layers, which may have separate parameters."""
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


def bind(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Bind the arguments of a call to their names."""
    signature = inspect.signature(forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def prompt_of(decoder: Any, arguments: dict[str, Any]) -> Prompt:
    """Check a call of `decoder` and describe what it computes.

    Args:
        decoder: from `decoder_of`.
        arguments: of its ``forward``, by name.

    Raises:
        Refused: this call must run in one piece.
    """
    config = decoder.config
    given = {name: value for name, value in arguments.items() if value is not None}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is None:
        raise Refused("neither input_ids nor inputs_embeds")
    rows, length = tokens.shape[:2]
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if given.get(name, getattr(config, name, False)):
            raise Refused(name)
    if not given.get("return_dict", getattr(config, "return_dict", True)):
        raise Refused("return_dict=False")
    if given.get("is_causal", True) is False:
        raise Refused("tokens that see those that follow them")
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and name not in _CUT:
            raise Refused(f"the argument {name}")
    if torch.is_grad_enabled():
        raise Refused("gradients are on")
    if decoder.training:
        raise Refused("the model is in training mode")
    name_of_cache = cache_name(decoder.forward)
    if "past_key_values" in given:
        given[name_of_cache] = given.pop("past_key_values")  # as transformers does, with a warning
    cache = given.get(name_of_cache)
    position_ids = given.get("position_ids")
    if position_ids is not None:
        if position_ids.shape[-1] != length:
            raise Refused("position_ids of another length than the prompt")
        if cache is None and "attention_mask" not in given and (position_ids.diff(dim=-1) != 1).any():
            raise Refused("packed sequences")
    keeps_cache = bool(cache is not None or given.get("use_cache", getattr(config, "use_cache", False)))
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
    _check_cache(cache, config)
    before = int(cache.get_seq_length())
    mask = given.get("attention_mask")
    if isinstance(mask, dict):
        if not set(mask) <= set(_LAYER_TYPES):
            raise Refused("an attention mask of an unknown kind")
        if None in mask.values():
            # A mask is left out where only the order of tokens hides any, so the decoder can make all masks itself.
            given.pop("attention_mask")
            mask = None
    for one in mask.values() if isinstance(mask, dict) else [mask] if mask is not None else []:
        fits = isinstance(one, torch.Tensor) and (
            one.shape == (rows, before + length) if one.ndim == 2 else one.ndim == 4 and one.shape[2] == length
        )
        # One mask of columns cannot be cut for layers that keep different keys.
        mixed = one is mask and one.ndim == 4 and len(set(map(_slides, cache.layers))) > 1
        if not fits or mixed:
            raise Refused("an attention mask of an unknown kind")
    # Without a mask, sdpa leaves out the keys that follow a token; a later part always needs a mask.
    sdpa = "none" if isinstance(mask, dict) or (mask is not None and mask.ndim == 4) else "first"
    skips = {"eager": "none", "sdpa": sdpa}.get(config._attn_implementation, "all")
    return Prompt(given, cache, name_of_cache, keeps_cache, rows, length, before, skips, tokens.device)


_CUT = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "attention_mask")
"""Tensors that are cut with the tokens."""


def _check_cache(cache: Any, config: Any):
    if type(cache).__name__ not in _CACHES or getattr(cache, "offloading", False):
        raise Refused(
            f"a {type(cache).__name__}" + (" that is offloaded" if getattr(cache, "offloading", False) else "")
        )
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < config.num_hidden_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    for layer in cache.layers:
        if type(layer).__name__ not in _LAYERS or getattr(layer, "record_past", False):
            raise Refused(f"a cache with a {type(layer).__name__}")


def arguments_of_parts(prompt: Prompt, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Make the arguments with which a decoder computes each part.

    Args:
        prompt: from `prompt_of`.
        sizes: tokens of each part, in order.
    """
    assert sum(sizes) == prompt.tokens
    views = [_view(prompt, sum(sizes[:number])) for number in range(len(sizes))]
    parts = []
    for number, (size, view) in enumerate(zip(sizes, views, strict=True)):
        start = sum(sizes[:number])
        part = {**prompt.arguments, prompt.cache_name: view, "use_cache": True}
        for name in _CUT:
            if name in part:
                cut = _cut_mask(prompt, views[0], view, start, size) if name == "attention_mask" else None
                if cut is None:
                    dim = -1 if name in ("position_ids", "cache_position") else 1
                    cut = part[name].narrow(dim, start, size)
                part[name] = cut
        parts.append(part)
    return parts


def joined(prompt: Prompt, outputs: Sequence[Any]) -> Any:
    """Join the outputs of the parts to that of the whole prompt.

    Raises:
        RuntimeError: an output has a field that cannot be joined.
    """
    whole = outputs[-1]
    for name, value in whole.items():
        if name == "last_hidden_state":
            whole[name] = torch.cat([output[name] for output in outputs], dim=1)
        elif name != prompt.cache_name and value is not None:
            raise RuntimeError(f"parts of a prompt cannot be joined: the decoder also returns {name}. Use it unsplit")
    whole[prompt.cache_name] = prompt.cache if prompt.keeps_cache else None
    return whole


def _cut_mask(prompt: Prompt, first: Any, view: Any, start: int, size: int) -> Any:
    """Cut the mask, or masks, for a part; `first` is the view of the first part."""
    mask = prompt.arguments["attention_mask"]
    if not isinstance(mask, dict):
        return _cut_one(prompt, mask, first, view, start, size, 0)
    slides = list(map(_slides, prompt.cache.layers))
    return {
        kind: _cut_one(prompt, one, first, view, start, size, slides.index(kind == "sliding_attention"))
        for kind, one in mask.items()
        if (kind == "sliding_attention") in slides
    }


def _slides(layer: Any) -> bool:
    return layer.is_sliding


def _cut_one(prompt: Prompt, mask: torch.Tensor, first: Any, view: Any, start: int, size: int, layer: int):
    """Cut one mask: [rows, keys], or [rows, heads, tokens, keys] of the keys that a layer of the cache returns."""
    if mask.ndim == 2:
        return mask[:, : prompt.before + start + size]
    _, whole_offset = _mask_sizes(first, prompt.tokens, layer)
    length, offset = _mask_sizes(view, size, layer)
    cut = mask[:, :, start : start + size, offset - whole_offset :][..., :length]
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(cut, (0, length - cut.shape[-1]), value=hidden)


def _mask_sizes(view: Any, tokens: int, layer: int) -> tuple[int, int]:
    """Number of keys that a layer returns with `tokens` more tokens, and the position of the first."""
    if "cache_position" in inspect.signature(view.get_mask_sizes).parameters:  # transformers 5.0, which counts them
        return view.get_mask_sizes(torch.empty(tokens, dtype=torch.long, device="meta"), layer)
    return view.get_mask_sizes(tokens, layer)


def _view(prompt: Prompt, tokens: int) -> Any:
    """A view that answers as if `tokens` more tokens were cached, and writes to the real cache."""
    view = copy.copy(prompt.cache)
    view.layers = []
    standing_in: dict[tuple, Any] = {}
    for layer in prompt.cache.layers:
        size = getattr(layer, "sliding_window", getattr(layer, "max_cache_len", None))
        kind = type(layer), size, layer.keys.shape if layer.is_initialized else None
        if kind not in standing_in:
            standing_in[kind] = _advanced(layer, tokens, prompt)
        one = copy.copy(standing_in[kind])
        one.update = layer.update
        view.layers.append(one)
    return view


def _advanced(layer: Any, tokens: int, prompt: Prompt) -> Any:
    """Copy a layer of the cache with one head of one value, and add `tokens` tokens to the copy."""
    small = copy.copy(layer)
    for name, value in vars(layer).items():
        if name in ("keys", "values") and isinstance(value, torch.Tensor) and value.ndim == 4:
            # Some layers count the tokens that are not zero.
            setattr(small, name, value[:1, :1].abs().amax(-1, keepdim=True))
        elif isinstance(value, torch.Tensor):
            setattr(small, name, value.clone())
    if tokens:
        dtype = small.keys.dtype if small.is_initialized else None
        ones = torch.ones(1, 1, tokens, 1, dtype=dtype, device=prompt.device)
        positions = torch.arange(prompt.before, prompt.before + tokens, dtype=torch.long, device=prompt.device)
        # Older releases want the positions, later ones ignore them.
        small.update(ones, ones, {"cache_position": positions})
    return small
