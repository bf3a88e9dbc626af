"""Several hosts on one machine, with slow links between them: `flashcomm lab`.

A host is a network namespace with one way out: a veth pair to a bridge, shaped by `tc` in both directions. The bridge
has its own namespace, so nothing appears among the machine's interfaces and its firewall sees no packet.

Hazards: the rate is limited, not the delay; the first 72 KiB after a pause pass at full speed; hosts share the CPU.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from flashcomm import machine
from flashcomm.units import bits_per_second

RATE_VARIABLE = "FLASHCOMM_LAB_RATE"
"""Set in every rank of a lab: the rate of its host's link, empty if unlimited."""
MASTER_PORT = 29500
LIMIT = "4mb"
FRAME_BYTES = 72 << 10
"""Smallest burst: a frame of 64 KiB, which the kernel hands to a veth at once, with a header for each of its packets.
Half of that carries 86 % of 1 Gbit/s instead of 95."""
LATE_S = 200e-6
"""Delay of a timer that the burst makes up for: 72 KiB carry 83 % of 5 Gbit/s, the bytes of 200 us 94."""
_GRACE_S, _POLL_S = 5.0, 0.02
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "setpriv": "util-linux", "taskset": "util-linux"}
_NET_ADMIN, _SYS_ADMIN = 1 << 12, 1 << 21
_numbers = itertools.count()


class Traffic(NamedTuple):
    """Bytes on a host's link since the lab began, with headers; bytes between ranks of one host are not counted."""

    sent_bytes: int
    received_bytes: int


class Lab:
    """Hosts behind slow links; a context manager that leaves no process, namespace or interface behind.

    Args:
        ranks: number of processes that `run` starts.
        rate: rate of each host's link in each direction, a number and kbit, mbit or gbit (per second); None: unlimited.
        ranks_per_host: ranks on each host, where they reach each other without the link.

    Raises:
        ValueError: a wrong argument.
        RuntimeError: on entry, if this machine lacks something; nothing has been created then.

    Example: ``with Lab(ranks=4, rate="1gbit") as lab: lab.run([sys.executable, "train.py"])``
    """

    def __init__(self, ranks: int = 4, rate: str | None = "1gbit", ranks_per_host: int = 1):
        if ranks < 1:
            raise ValueError(f"a lab of {ranks} ranks: give 1 or more")
        if ranks_per_host < 1 or ranks % ranks_per_host:
            raise ValueError(f"{ranks} ranks do not fill hosts of {ranks_per_host}: give a divisor of {ranks}")
        if rate is not None:
            bits_per_second(rate)
            rate = rate.strip().lower()
        self.ranks, self.rate, self.ranks_per_host = ranks, rate, ranks_per_host
        self.failed_rank: int | None = None
        """The rank whose failure ended the latest `run`, if any."""
        self._switch, self._hosts = "", [""] * (ranks // ranks_per_host)
        self._up: ExitStack | None = None

    def __enter__(self) -> "Lab":
        if reason := unavailable():
            raise RuntimeError(f"no lab on this machine: {reason}")
        ending = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
        with ExitStack() as stack:
            stack.enter_context(_handled(ending, _leave))
            _remove(_stale())
            lab = f"flashcomm-{os.getpid()}-{next(_numbers)}"
            self._switch, self._hosts = f"{lab}-switch", [f"{lab}-{host}" for host in range(len(self._hosts))]
            stack.callback(_remove, [*self._hosts, self._switch])
            self._build()
            self._up = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object):
        assert self._up is not None
        self._up.close()
        self._up = None

    def _build(self):
        _call("ip", "netns", "add", self._switch)
        _call("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", self._switch, "link", "set", "bridge", "addrgenmode", "none", "up")
        for number, host in enumerate(self._hosts):
            port = f"host{number}"
            _call("ip", "netns", "add", host)
            _call("ip", "-n", host, "link", "set", "lo", "up")
            _call("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            # Without an IPv6 address the kernel sends nothing of its own that would be counted.
            _call("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "addrgenmode", "none", "up")
            _call("ip", "-n", host, "link", "set", "eth0", "addrgenmode", "none", "up")
            _call("ip", "-n", host, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
            if self.rate is not None:
                burst = max(FRAME_BYTES, round(bits_per_second(self.rate) / 8 * LATE_S))
                for namespace, interface in ((host, "eth0"), (self._switch, port)):
                    shape = ("tbf", "rate", self.rate, "burst", str(burst), "limit", LIMIT)
                    _call("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *shape)

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float | None = None
    ) -> list[int]:
        """Run a command once per rank, with the environment that torchrun would give it.

        Ranks write to this process's output. ``python`` is this process's Python, unless `env` has a PATH. When a rank
        fails, the others are ended by SIGTERM and 5 s later by SIGKILL.

        Args:
            argv: program and arguments.
            env: variables beyond those of this process; the ranks' own win.
            timeout_s: seconds after which all ranks are ended; None for never.

        Returns:
            Exit codes in rank order, -N for a rank that signal N ended; `failed_rank` is the one that failed first.

        Raises:
            ValueError: no such program.
            TimeoutError: ranks that still ran after `timeout_s`; they have been ended.
            RuntimeError: outside ``with``.
        """
        if self._up is None:
            raise RuntimeError("the lab is not up: use it as `with Lab(...) as lab: lab.run(...)`")
        python = str(Path(sys.executable).parent)
        shared = {**os.environ, "PATH": os.pathsep.join((python, os.environ.get("PATH", os.defpath))), **(env or {})}
        if not argv or shutil.which(argv[0], path=shared["PATH"]) is None:
            raise ValueError(f"cannot run {argv[0] if argv else 'nothing'!r}: give a program, by path or found in PATH")
        processes: list[subprocess.Popen] = []
        self.failed_rank = None
        start = time.monotonic()
        try:
            processes.extend(self._start(rank, argv, shared) for rank in range(self.ranks))
            while True:
                codes = [process.poll() for process in processes]
                failed = [(code, rank) for rank, code in enumerate(codes) if code]
                if failed or None not in codes:
                    # A signal comes first: that others fail may be its consequence.
                    self.failed_rank = min(failed)[1] if failed else None
                    break
                if timeout_s is not None and time.monotonic() - start > timeout_s:
                    running = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
                    raise TimeoutError(
                        f"still running after {timeout_s:g} s: rank {running}. All ranks have been ended"
                    )
                time.sleep(_POLL_S)
        finally:
            with _handled(_ENDING, signal.SIG_IGN):
                self._end(processes)
        return [process.returncode for process in processes]

    def _start(self, rank: int, argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
        host, local_rank = divmod(rank, self.ranks_per_host)
        own = {
            "RANK": rank,
            "WORLD_SIZE": self.ranks,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": self.ranks_per_host,
            "GROUP_RANK": host,
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": MASTER_PORT,
            "GLOO_SOCKET_IFNAME": "eth0",
            "TP_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            RATE_VARIABLE: self.rate or "",
        }
        # If this process is killed, the kernel kills the ranks. A session of their own keeps Ctrl-C from them.
        enter = ("ip", "netns", "exec", self._hosts[host], "setpriv", "--pdeathsig", "KILL")
        cores = ",".join(map(str, _share(machine.cores(), host, len(self._hosts))))
        return subprocess.Popen(
            [*enter, "taskset", "--cpu-list", cores, *argv],
            # torch warns of every peer without a host name, and a lab has no name server.
            env={
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                **env,
                **{name: str(value) for name, value in own.items()},
            },
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _end(self, processes: Sequence[subprocess.Popen]):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + _GRACE_S
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        _kill(self._hosts)
        for process in processes:
            process.kill()
            process.wait()

    def counters(self) -> list[Traffic]:
        """Bytes that have crossed each host's link, in host order, from the counters of its interface."""
        listing = json.loads(_call("ip", "-n", self._switch, "-s", "-j", "link", "show", "type", "veth"))
        by_name = {link["ifname"]: link["stats64"] for link in listing}
        ports = [by_name[f"host{number}"] for number in range(len(self._hosts))]
        # The bridge receives what a host sends.
        return [Traffic(port["rx"]["bytes"], port["tx"]["bytes"]) for port in ports]

    def bytes_sent(self, host: int) -> int:
        """Bytes that host number `host` has sent to others."""
        return self.counters()[host].sent_bytes


def _share(cores: Iterable[int], host: int, hosts: int) -> list[int]:
    """Cores of a host: its own, or one that it shares, if all hosts get equally many; otherwise all."""
    cores = sorted(cores)
    if len(cores) % hosts and hosts % len(cores):
        return cores
    first = host * len(cores) // hosts
    return cores[first : first + max(1, len(cores) // hosts)]


def unavailable() -> str | None:
    """The reason that this machine cannot have a lab, with its remedy; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces are Linux's, and this is {sys.platform}"
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            return f"the command {tool!r} is missing: install {package}"
    capabilities = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)  # pyright: ignore
    if not (capabilities & _NET_ADMIN and capabilities & _SYS_ADMIN):
        return "namespaces need CAP_NET_ADMIN and CAP_SYS_ADMIN: run as root, a container with --privileged"
    return None


def interface_bytes() -> int:
    """Bytes that this rank's host has sent since the lab began, from its interface's counter; only inside a lab."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def _address(host: int) -> str:
    # Each lab has a bridge of its own, so all may use the same addresses.
    return f"10.77.0.{host + 1}"


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _stale() -> list[str]:
    """Namespaces that labs left behind because their process was killed."""
    names = [line.split()[0] for line in _call("ip", "netns", "list").splitlines() if line]
    owners = {name: match[1] for name in names if (match := re.match(r"flashcomm-(\d+)-", name))}
    return [name for name, pid in owners.items() if not Path("/proc", pid).exists()]


def _remove(namespaces: Iterable[str]):
    """Kill the processes in namespaces and remove these with their interfaces; missing ones are ignored."""
    with _handled(_ENDING, signal.SIG_IGN):
        _kill(namespaces)
        for name in namespaces:
            subprocess.run(("ip", "netns", "delete", name), capture_output=True)


def _kill(namespaces: Iterable[str]):
    end = time.monotonic() + _GRACE_S
    for name in namespaces:
        # New processes may start while others are killed. A busy machine may take long to list them, so they are killed
        # once at least.
        while pids := _pids(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > end:
                break


def _pids(namespace: str) -> list[int]:
    listing = subprocess.run(("ip", "netns", "pids", namespace), capture_output=True, text=True).stdout
    return [int(pid) for pid in listing.split()]


_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _handled(signals: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """Handle these signals with `handler`; does nothing outside the main thread, which alone may and gets them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(signum: int, frame: Any):
    raise SystemExit(128 + signum)
