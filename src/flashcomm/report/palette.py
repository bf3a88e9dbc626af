"""The colours of all pictures."""

BLUE, GREY, BLACK, RED = "#2563eb", "#9ca3af", "#111827", "#b91c1c"
"""Ours, plain, another library's plain, and limits or errors."""
GRID, LEADER = "#f0f0f0", "#d1d5db"
"""Lines in the background, and lines from a name to its point."""
SERIES = (
    *(BLUE, "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#4b5563", "#be123c", "#a16207"),
    "#1e3a8a",
)


def series(number: int) -> str:
    """The colour of a line or a part, counted from 0; colours repeat after the last one.

    >>> series(0) == series(len(SERIES)) == BLUE
    True
    """
    return SERIES[number % len(SERIES)]
