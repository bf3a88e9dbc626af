"""Show the counts of a server's workers in the server's metrics, or else in its log.

Workers are separate processes, and their counts do not reach the process that answers /metrics. So each worker writes
its counts to a small file, and that process reads the files when it is asked. Workers on another host, or behind
several API servers, put a line into the log instead.

    flashcomm_calls_total{call="all_reduce/one_step/int8g128",rank="0"} 1088
    flashcomm_plain_total{rank="0",reason="decode step"} 5440
    flashcomm_sent_bytes_total{rank="0"} 36765696
    flashcomm_saved_bytes_total{rank="0"} 34537472
    flashcomm_errors_total{error="PeerLost",rank="0"} 1
    flashcomm_prefills_total{how="2 parts",rank="0"} 32
    flashcomm_prefill_predicted_seconds_total{how="2 parts",rank="0"} 28.1
    flashcomm_prefill_measured_seconds_total{how="2 parts",rank="0"} 28.6

Source: our own.
"""

import json
import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashcomm import collectives, settings

FOLDER_VARIABLE = "FLASHCOMM_STATS"
"""Folder to which workers write their counts; the process that answers /metrics makes and removes it."""
_KEPT = ("calls", "plain", "errors", "prefills", "prefill_ms", "wire_bytes", "plain_bytes")
"""Keys of `flashcomm.stats()`, and the errors, that workers write."""
FILE_EVERY_S, LOG_EVERY_S = 1.0, 60.0

_folder: "tempfile.TemporaryDirectory | None" = None
_errors: Counter[str] = Counter()


def serve():
    """Show the counts of all workers that this process will start on its /metrics page.

    Does nothing if there is no such page: prometheus_client is missing, or several servers share the work.
    """
    global _folder
    if _folder or "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return
    try:
        import prometheus_client
    except ImportError:
        return
    _folder = tempfile.TemporaryDirectory(prefix="flashcomm-stats-")
    os.environ[FOLDER_VARIABLE] = _folder.name
    prometheus_client.REGISTRY.register(Metrics(Path(_folder.name)))


class Metrics:
    """The counts of all workers on this host, for prometheus_client's registry."""

    def __init__(self, folder: Path):
        self._folder = folder

    def collect(self) -> Iterable[Any]:
        """Make one counter of each kind, with a sample for every worker."""
        from prometheus_client.core import CounterMetricFamily as Counts

        calls = Counts("flashcomm_calls", "Collectives, as what was sent.", labels=["rank", "call"])
        plain = Counts("flashcomm_plain", "Collectives that were not compressed, by reason.", labels=["rank", "reason"])
        sent = Counts("flashcomm_sent_bytes", "Bytes that this rank sent to others.", labels=["rank"])
        saved = Counts("flashcomm_saved_bytes", "Bytes that plain would have sent beyond these.", labels=["rank"])
        errors = Counts("flashcomm_errors", "Collectives that failed.", labels=["rank", "error"])
        prefills = Counts("flashcomm_prefills", "Steps with prompts, as what ran.", labels=["rank", "how"])
        times = [
            Counts(f"flashcomm_prefill_{kind}_seconds", f"Seconds of such steps, {kind}.", labels=["rank", "how"])
            for kind in ("predicted", "measured")
        ]
        for path in sorted(self._folder.glob("*.json")):
            rank, counts = path.stem, json.loads(path.read_text())
            families = {"calls": calls, "plain": plain, "errors": errors, "prefills": prefills}
            for kind, family in families.items():
                for name, count in counts[kind].items():
                    family.add_metric([rank, name], count)
            for how, of_how in counts["prefill_ms"].items():
                for family, kind in zip(times, ("predicted", "measured"), strict=True):
                    family.add_metric([rank, how], of_how[kind] * of_how["prompts"] / 1e3)
            sent.add_metric([rank], counts["wire_bytes"])
            saved.add_metric([rank], counts["plain_bytes"] - counts["wire_bytes"])
        return calls, plain, sent, saved, errors, prefills, *times


class Reporter:
    """Keeps a worker's file up to date, or logs a line a minute, while its counts change.

    Args:
        rank: this worker's, among all.
        log: for the lines.
    """

    def __init__(self, rank: int, log: logging.Logger):
        self._rank, self._log = rank, log
        self._folder = settings.text(FOLDER_VARIABLE) or None
        self._last: dict = {}
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="flashcomm-reporter", daemon=True).start()

    def report(self):
        """Write or log the counts, if they have changed."""
        counts = {**collectives.stats(), "errors": dict(_errors)}
        if counts == self._last:
            return
        self._last = counts
        if self._folder:
            self._write(Path(self._folder), counts)
        else:
            self._log.info("flashcomm: %s", line(counts))

    def close(self):
        """Stop reporting."""
        self._stop.set()

    def _run(self):
        while not self._stop.wait(FILE_EVERY_S if self._folder else LOG_EVERY_S):
            self.report()

    def _write(self, folder: Path, counts: dict):
        kept = {name: counts[name] for name in _KEPT}
        partial = folder / f"{self._rank}.partial"
        try:
            partial.write_text(json.dumps(kept))
            partial.replace(folder / f"{self._rank}.json")
        except FileNotFoundError:
            # The server that made the folder has ended before its workers.
            self.close()


def count_error(error: BaseException):
    """Count a collective that failed, by the class of `flashcomm.errors`."""
    _errors[type(error).__name__] += 1


def line(counts: dict) -> str:
    """Write counts as a sentence.

    >>> line({"calls": {"all_reduce/one_step/int8g128": 17}, "plain": {"decode step": 34}, "errors": {},
    ...       "prefills": {}, "wire_bytes": 33 << 20, "plain_bytes": 64 << 20})
    '17 all_reduce/one_step/int8g128; 34 plain (decode step); sent 33.0 MiB, 31.0 MiB less than plain'
    """
    parts = [f"{count} {call}" for call, count in counts["calls"].items()]
    parts += [f"{count} plain ({reason})" for reason, count in counts["plain"].items()]
    parts += [f"{count} failed ({error})" for error, count in counts["errors"].items()]
    parts += [f"{count} prefills: {how}" for how, count in counts["prefills"].items()]
    sent, plain = counts["wire_bytes"] / 2**20, counts["plain_bytes"] / 2**20
    return "; ".join([*parts, f"sent {sent:.1f} MiB, {plain - sent:.1f} MiB less than plain"])
