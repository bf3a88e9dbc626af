"""Cut a text into the windows that models are measured on."""

import torch

WINDOW = 1024
"""Tokens per window."""


def windows(ids: torch.Tensor, tokens: int, size: int = WINDOW) -> list[torch.Tensor]:
    """Take windows of token ids, spread evenly over a text.

    Args:
        ids: token ids of the text, [tokens].
        tokens: total of all windows, rounded down to whole windows, at least one.
        size: tokens per window; a shorter text is one window.

    >>> [len(window) for window in windows(torch.arange(5000), 2048)]
    [1024, 1024]
    """
    return [ids[start : start + size] for start in _starts(len(ids), tokens, size)]


def rest(ids: torch.Tensor, tokens: int, size: int = WINDOW) -> torch.Tensor:
    """Take the token ids between the windows that `windows` takes, to calibrate on text that is not measured.

    >>> len(rest(torch.arange(5000), 2048))
    2952
    """
    free = torch.ones(len(ids), dtype=torch.bool, device="cpu")
    for start in _starts(len(ids), tokens, size):
        free[start : start + size] = False
    return ids[free]


def _starts(length: int, tokens: int, size: int) -> list[int]:
    """Places of the first tokens of all windows."""
    count = max(1, min(tokens, length) // size)
    return torch.linspace(0, max(0, length - size), count, dtype=torch.float32, device="cpu").long().tolist()
