"""Every environment variable of flashcomm and its tests: name, kind, default, and the error for any other value.

    >>> import os
    >>> os.environ["FLASHCOMM_CONNECTIONS"] = "off"
    >>> switched_on("FLASHCOMM_CONNECTIONS")
    False
    >>> del os.environ["FLASHCOMM_CONNECTIONS"]

A variable is read when it is needed, not on import, so that a program may set it after `import flashcomm`.
"""

import logging
import os
from dataclasses import dataclass

from flashcomm.errors import SettingError, did_you_mean

_log = logging.getLogger("flashcomm")
_ON, _OFF = ("1", "true", "on", "yes"), ("0", "false", "off", "no")


@dataclass(frozen=True, slots=True)
class Setting:
    """One environment variable."""

    name: str
    default: "bool | str"
    """On or off for a switch; the text for a text, "" if there is none."""
    meaning: str

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off, rather than a text."""
        return isinstance(self.default, bool)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("FLASHCOMM_CODEC", "", "codec that engines and the torch backend use"),
        Setting("FLASHCOMM_POLICY", "", "path of a policy that engines and the torch backend follow"),
        Setting("FLASHCOMM_OVERLAP", "", "key overlap of the policy: off, auto or a number of parts"),
        Setting("FLASHCOMM_SHARED_MEMORY", True, "share memory between the ranks of a host"),
        Setting("FLASHCOMM_CONNECTIONS", True, "send messages over TCP connections of our own instead of gloo's"),
        Setting("FLASHCOMM_FUSED", False, "all-reduce in one launch over symmetric GPU memory"),
        Setting("FLASHCOMM_COPIES", False, "send messages between the GPUs of a host by their copy engines"),
        Setting("FLASHCOMM_TRITON", True, "use compiled kernels on GPUs, Triton's and those in CUDA C++"),
        Setting("FLASHCOMM_CUDA", False, "use CUDA C++ kernels on GPUs for the formats that have one"),
        Setting("FLASHCOMM_TUNING", "", "path of the file that 'flashcomm tune' writes"),
        Setting("FLASHCOMM_STATS", "", "folder for the counts of a server's workers; set by the server"),
        Setting("FLASHCOMM_LAB_RATE", "", "rate of this host's link; set by 'flashcomm lab'"),
        Setting("FLASHCOMM_SOAK", "", "number of collectives of the soak test; read by the tests alone"),
        Setting("FLASHCOMM_FAULTS", "", "number of calls of the test with faults; read by the tests alone"),
        Setting("FLASHCOMM_FAULTS_LOG", "", "file for the log of the faults; read by the tests alone"),
        Setting("FLASHCOMM_TEXTS", "", "number of texts of the test of pipeline stages; read by the tests alone"),
        Setting("FLASHCOMM_FUZZ_GROUPS", "", "number of groups of the codec fuzz test; read by the tests alone"),
    )
}


def switched_on(name: str) -> bool:
    """Whether a switch is on.

    Raises:
        SettingError: the variable has a value that is neither on nor off.
    """
    default = SETTINGS[name].default
    assert isinstance(default, bool)
    given = os.environ.get(name, "").strip().lower()
    if not given:
        return default
    if given not in _ON + _OFF:
        raise SettingError(f"{name}={os.environ[name]!r}: use 1 (or true, on, yes) or 0 (or false, off, no)")
    return given in _ON


def text(name: str) -> str:
    """The text of a variable, "" if it is not set."""
    assert not SETTINGS[name].is_switch
    return os.environ.get(name, "")


def given(name: str) -> bool:
    """Whether a variable is set, also to nothing."""
    assert name in SETTINGS
    return name in os.environ


def check():
    """Read every switch, and warn of variables that begin like ours and are none of them.

    Raises:
        SettingError: a switch has a value that is neither on nor off.
    """
    for name, setting in SETTINGS.items():
        if setting.is_switch:
            switched_on(name)
    for name in sorted(os.environ):
        if name.startswith("FLASHCOMM_") and name not in SETTINGS and name not in _warned:
            _warned.add(name)
            _log.warning("unknown variable %s is ignored.%s", name, did_you_mean(name, SETTINGS))


_warned: set[str] = set()
