"""Words that several errors share."""

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A question that follows "unknown ...", empty if nothing is near.

    >>> did_you_mean("h10", ["l40", "h100"]), did_you_mean("what", ["l40", "h100"])
    (' Did you mean h100?', '')
    """
    near = difflib.get_close_matches(given, list(known), 1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
