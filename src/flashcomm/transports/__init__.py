"""Ways to move bytes between ranks, one file or folder each; `base` says what they have in common."""
