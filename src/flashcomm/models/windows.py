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
    count = max(1, min(tokens, len(ids)) // size)
    starts = torch.linspace(0, max(0, len(ids) - size), count, dtype=torch.float32, device="cpu").long().tolist()
    return [ids[start : start + size] for start in starts]
