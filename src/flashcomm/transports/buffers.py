"""Uninitialised bytes that the next call of the same name uses again; they only ever grow."""

import math

import torch

from flashcomm.transports import pages


class Buffers:
    """The buffers of one lane, whose calls do not overlap, except on different CUDA streams."""

    def __init__(self):
        self._held: dict[tuple, torch.Tensor] = {}
        self._captured: dict[int, torch.Tensor] = {}
        """By their addresses, buffers that a CUDA graph holds: its replays write there as long as the program runs."""

    def take(self, name: str, device: torch.device, *shape: int) -> torch.Tensor:
        """An uninitialised uint8 tensor of `shape`; valid until the next `take` of the same name."""
        size = math.prod(shape)
        # Calls on different streams overlap, so they must not share.
        stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
        held = self._held.get((name, device, stream))
        if held is None or held.numel() < size:
            # A buffer born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                if device.type == "cpu" and size >= pages.HUGE_BYTES:
                    held = pages.empty(torch.Size([size]), torch.uint8)
                else:
                    held = torch.empty(size, dtype=torch.uint8, device=device)
            self._held[name, device, stream] = held
        if capturing(device):
            self._captured[held.data_ptr()] = held
        return held[:size].view(shape)


def capturing(device: torch.device) -> bool:
    """Whether calls on `device` become part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Payloads:
    """Uninitialised payloads, [R, n, P] of each piece, so that a piece is one operation for a backend."""

    def __init__(self, buffers: Buffers, name: str, length: int, width: int, ranks: int, device: torch.device):
        self._width, self._ranks = width, ranks
        self._bytes = buffers.take(name, device, length * ranks * width)
        self._pieces: dict[int, torch.Tensor] = {}

    def __getitem__(self, piece: slice) -> torch.Tensor:
        # Each rank's part is asked for once or twice, and a view takes 2 us.
        view = self._pieces.get(piece.start)
        if view is None:
            row = self._ranks * self._width
            view = self._bytes[piece.start * row : piece.stop * row].view(self._ranks, -1, self._width)
            self._pieces[piece.start] = view
        return view
