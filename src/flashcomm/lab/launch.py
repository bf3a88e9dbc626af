"""Start ranks on this machine, with torch's elastic launcher or in a lab, and stop all of them in any case.

Each rank is a process of its own that runs one function; what rank r returns is element r of the result.
"""

import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from flashcomm import machine, settings
from flashcomm.lab.hosts import RATE_VARIABLE, Lab

INTERRUPTED = "interrupted; all ranks have been stopped"
_STOPPED = "the other ranks have been stopped"
_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LEFT_OVER = f"If no launcher, such as torchrun, has started this process as a rank: unset {' '.join(_PLACE)}"


class RankError(RuntimeError):
    """A rank failed; the others have been stopped."""


class Interrupted(RankError):
    """Ctrl-C; all ranks have been stopped."""


def run(function: Callable, args: tuple = (), *, ranks: int, timeout_s: float = 120.0, lab: Lab | None = None) -> list:
    """Run ``function(*args)`` on `ranks` processes that share a gloo (on GPUs NCCL) process group.

    Args:
        function: a module-level function; it and its arguments are pickled.
        args: its arguments.
        ranks: number of processes, all on this machine.
        timeout_s: seconds after which a collective that some rank has not joined is an error.
        lab: hosts with slow links for the ranks, which then use gloo; it has `ranks` ranks. None for no lab.

    Returns:
        Each rank's return value, in rank order.

    Raises:
        RankError: a rank raised or died; says which and why, and no process is left.
        Interrupted: Ctrl-C; no process is left.
        ValueError: `lab` has another number of ranks.
    """
    if lab is not None:
        if lab.ranks != ranks:
            raise ValueError(f"{ranks} ranks in a lab of {lab.ranks}: give both the same number")
        return _run_in_lab(lab, function, args, timeout_s)
    # The launcher's reports repeat RankError at greater length. Each of its modules has a log level of its own.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        results = elastic_launch(config, _rank_main)(function, args, timeout_s)
    except ChildFailedError as error:
        raise RankError(_explain(error)) from None
    except Exception as error:
        # The launcher turns Ctrl-C into an exception of its own, of which its stopwatches may make another one. It has
        # stopped the ranks in any case.
        if not _came_of_a_signal(error):
            raise
        raise Interrupted(INTERRUPTED) from error
    return [results[rank] for rank in range(ranks)]


def joined() -> bool:
    """True if this process is a rank that torchrun or `flashcomm lab` has started.

    Raises:
        ValueError: variables of a launcher are there that cannot be a launcher's, such as some of them alone.
    """
    place = {name: os.environ.get(name, "").strip() for name in _PLACE}
    if not (place["RANK"] or place["WORLD_SIZE"]):
        return False
    missing = [name for name, value in place.items() if not value]
    numbers = [int(value) if value.isdecimal() else -1 for value in (place["RANK"], place["WORLD_SIZE"])]
    if missing:
        why = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not"
    elif not 0 <= numbers[0] < numbers[1]:
        why = "that is no rank"
    else:
        return True
    given = " and ".join(f"{name}={place[name]}" for name in _PLACE[:2] if place[name])
    raise ValueError(f"{given} set, but {why}. {LEFT_OVER}")


def join(function: Callable, args: tuple = (), *, timeout_s: float = 120.0):
    """Run ``function(*args)`` in this process as the rank that the environment names, with the group of all ranks.

    Args:
        function, args, timeout_s: see `run`; nothing is pickled.

    Returns:
        What the function returned on this rank.

    Raises:
        RankError: the other ranks did not come.
    """
    return _rank_main(function, args, timeout_s, joins=True)


def backend() -> str:
    """Name of the backend: NCCL if every rank can have its own GPU, otherwise, and in a lab, gloo."""
    if settings.given(RATE_VARIABLE):
        return "gloo"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "gloo"


def _interrupt_once(signum: int, frame: Any):
    # Ctrl-C reaches a rank twice, from the terminal and from the launcher; the second must not disturb the way out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _heed_interrupts(handler: Any):
    # Unless one is on its way out of this process, whose second signal may still come.
    if signal.getsignal(signal.SIGINT) is _interrupt_once:
        signal.signal(signal.SIGINT, handler)


@record
def _rank_main(function: Callable, args: tuple, timeout_s: float, joins: bool = False):
    with ExitStack() as given_back:
        # A process that joins is its owner's again afterwards.
        given_back.callback(_heed_interrupts, signal.signal(signal.SIGINT, _interrupt_once))
        given_back.callback(torch.set_num_threads, torch.get_num_threads())
        local_rank = int(os.environ.get("LOCAL_RANK") or 0)
        # The hosts of a lab are one machine.
        ranks = int(os.environ.get("WORLD_SIZE" if settings.given(RATE_VARIABLE) else "LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, len(machine.cores()) // ranks))
        if not joins:
            # The parent process has compiled the kernels and logged it.
            logging.getLogger("flashcomm.kernels").setLevel(logging.ERROR)
        name = backend()
        if name == "nccl":
            torch.cuda.set_device(local_rank)
        _meet(name, timeout_s, joins)
        given_back.callback(dist.destroy_process_group)
        return function(*args)


def _meet(name: str, timeout_s: float, joins: bool):
    """Make the group of all ranks, with the backend of that name."""
    try:
        dist.init_process_group(name, timeout=timedelta(seconds=timeout_s))
        if name == "gloo":
            # A rank that leaves early, having nothing to send, would break the connections that others still make.
            dist.barrier()
    except RuntimeError as error:
        if not joins:
            raise
        rank, world_size, address, port = (os.environ[variable] for variable in _PLACE)
        raise RankError(
            f"rank {rank} of {world_size} did not find the others at {address}, port {port}, within {timeout_s:g} s: "
            f"{str(error).splitlines()[0]}. {LEFT_OVER}"
        ) from error


def _run_in_lab(lab: Lab, function: Callable, args: tuple, timeout_s: float) -> list:
    with tempfile.TemporaryDirectory(prefix="flashcomm-") as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((function, args)))
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            command = [sys.executable, "-m", "flashcomm.lab.launch", name, str(timeout_s)]
            codes = lab.run(command, env={"PYTHONPATH": paths})
        except KeyboardInterrupt as stopped:
            raise Interrupted(INTERRUPTED) from stopped
        code = 0 if lab.failed_rank is None else codes[lab.failed_rank]
        errors = _errors(folder)
        if errors and code >= 0:
            # One failure brings others down with it, so the earliest is the cause.
            rank = min(errors, key=lambda rank: float(errors[rank]["extraInfo"]["timestamp"]))
            raise RankError(_sentence(rank, 1, errors[rank]["message"]))
        if lab.failed_rank is not None:
            raise RankError(_sentence(lab.failed_rank, code, f"exit status {code}"))
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(lab.ranks)]


def _errors(folder: Path) -> dict[int, dict]:
    """Errors that ranks wrote before they ended, by rank; files that were cut off are left out."""
    errors = {}
    for path in folder.glob("*.error"):
        with suppress(ValueError):
            errors[int(path.stem)] = json.loads(path.read_text())["message"]
    return errors


def _lab_main(folder: Path, timeout_s: float):
    """Run one rank of `_run_in_lab`: read the call from its file, write the result or the error to another."""
    rank = os.environ["RANK"]
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"{rank}.error")
    try:
        result = _rank_main(_called, (folder,), timeout_s)
    except Exception:
        sys.exit(1)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))


def _called(folder: Path):
    function, args = pickle.loads((folder / "call").read_bytes())
    return function(*args)


def _came_of_a_signal(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, SignalException):
        error = error.__context__
    return error is not None


def _explain(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", json.dumps(message))
    return _sentence(rank, failure.exitcode, message)


def _sentence(rank: int, code: int, message: str) -> str:
    if code < 0:
        return f"rank {rank} was killed by signal {-code} ({signal.Signals(-code).name}); {_STOPPED}"
    return f"rank {rank} failed: {message}. {_STOPPED.capitalize()}"


if __name__ == "__main__":
    _lab_main(Path(sys.argv[1]), float(sys.argv[2]))
