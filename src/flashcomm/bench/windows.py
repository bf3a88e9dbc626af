"""The windows of a text that models are measured on."""

import torch

WINDOW = 1024
"""Tokens of a window."""


def windows(ids: torch.Tensor, tokens: int, size: int = WINDOW) -> list[torch.Tensor]:
    """Windows of ids, spread evenly over a text.

    Args:
        ids: of the text, [tokens].
        tokens: about so many in all windows.
        size: of a window; a shorter text is one window.

    >>> [len(window) for window in windows(torch.arange(5000), 2048)]
    [1024, 1024]
    """
    count = max(1, min(tokens, len(ids)) // size)
    starts = torch.linspace(0, max(0, len(ids) - size), count).long().tolist()
    return [ids[start : start + size] for start in starts]
