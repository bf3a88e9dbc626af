"""Errors that a caller may want to tell apart, and a hint for misspelt names.

    ValueError
        SettingError        a FLASHCOMM_ variable has a value that is not allowed
    RuntimeError
        CollectiveError     a collective failed, for a reason that torch or a codec gives
            PeerLost        a rank has ended or has closed its connection
            TimedOut        a rank did not come within the group's timeout
            RanksDisagree   ranks are about to run different collectives
            Unavailable     this machine or group cannot do what was asked for

Wrong arguments are plain `ValueError`; a valid request without a route is `NotImplementedError`.
"""

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """An environment variable has a value that is not allowed."""


class CollectiveError(RuntimeError):
    """A collective failed."""


class PeerLost(CollectiveError):
    """A rank has ended, or has closed its connection."""


class TimedOut(CollectiveError):
    """A rank did not come within the group's timeout."""


class RanksDisagree(CollectiveError):
    """Ranks are about to run different collectives."""


class Unavailable(CollectiveError):
    """This machine or group cannot do what was asked for."""


# Words of gloo, NCCL and torch's stores, in lower case: torch raises RuntimeError for all of them.
_TIMED_OUT = ("timed out", "application timeout", "did not join", "watchdog caught collective operation timeout")
_LOST = (
    "closed by peer",
    "reset by peer",
    "connection closed",
    "connection reset",
    "broken pipe",
    "remote process exited",
)


def kind_of(error: BaseException) -> type[CollectiveError]:
    """The class of this tree that describes `error`, by its type or by the words of torch's backends.

    >>> kind_of(RuntimeError("Connection closed by peer [127.0.0.1]:123")).__name__
    'PeerLost'
    >>> kind_of(RuntimeError("Timed out waiting 4000ms for recv operation to complete")).__name__
    'TimedOut'
    """
    if isinstance(error, CollectiveError):
        return type(error)
    text = str(error).lower()
    if any(words in text for words in _TIMED_OUT):
        return TimedOut
    return PeerLost if any(words in text for words in _LOST) else CollectiveError


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A question that follows "unknown ...", empty if nothing is near.

    >>> did_you_mean("h10", ["l40", "h100"]), did_you_mean("what", ["l40", "h100"])
    (' Did you mean h100?', '')
    """
    near = difflib.get_close_matches(given, list(known), 1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
