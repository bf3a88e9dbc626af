"""Real namespaces, real links, real signals; and nothing left of them afterwards."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import flashcomm
import flashcomm.bench.lab
from events import wait_for
from flashcomm.lab import Lab, launch
from flashcomm.lab import hosts as module
from thorough import thorough

COMMAND = [sys.executable, "-m", "flashcomm.cli", "lab"]
MIB = 1 << 20

real = pytest.mark.skipif(module.unavailable() is not None, reason=f"no lab here: {module.unavailable()}")


def test_both_names_are_the_lab():
    assert flashcomm.bench.lab.Lab is flashcomm.lab.Lab is Lab


def namespaces(pid: int) -> list[str]:
    listing = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return re.findall(rf"^flashcomm-{pid}-\S+", listing, re.MULTILINE)


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def seconds(number: int) -> str:
    """A time to sleep that no other process of this machine has in its command line."""
    return f"{number}{os.getpid()}"


def running(marker: str) -> list[str]:
    """Processes with `marker` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.fixture(autouse=True)
def nothing_left():
    before = interfaces()
    yield
    assert interfaces() == before
    if module.unavailable() is None:
        assert not namespaces(os.getpid())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 0}, "a lab of 0 ranks: give 1 or more"),
        ({"ranks": 4, "ranks_per_host": 3}, "4 ranks do not fill hosts of 3: give a divisor of 4"),
        ({"rate": "1gb"}, "rate '1gb': give a number and kbit, mbit or gbit"),
        ({"rate": "0mbit"}, "rate '0mbit': give a number"),
        ({"rate": "1gbit burst 1"}, "give a number"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lab(**arguments)


def test_what_a_machine_lacks_is_said_before_anything_is_created(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda tool: None if tool == "tc" else tool)
    with (
        pytest.raises(RuntimeError, match="no lab on this machine: the command 'tc' is missing: install iproute2"),
        Lab(),
    ):
        pass
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="network namespaces are Linux's, and this is darwin"), Lab():
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to drop its capabilities")
def test_without_capabilities():
    code = "from flashcomm.lab import hosts; print(hosts.unavailable())"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "need CAP_NET_ADMIN and CAP_SYS_ADMIN: run as root" in done.stdout


def test_outside_of_with():
    with pytest.raises(RuntimeError, match="the lab is not up: use it as `with Lab"):
        Lab().run(["true"])


@real
def test_ranks_get_torchruns_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Lab(ranks=4, rate="1gbit", ranks_per_host=2) as lab:
        script = (
            f"env > {tmp_path}/$RANK; echo $NAME > {tmp_path}/name$RANK; command -v python > {tmp_path}/python$RANK"
        )
        assert lab.run(["sh", "-c", script], env={"NAME": "given"}) == [0] * 4
    for rank in range(4):
        found = dict(line.split("=", 1) for line in (tmp_path / str(rank)).read_text().splitlines() if "=" in line)
        expected = {
            "RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": str(rank // 2), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1", "FLASHCOMM_LAB_RATE": "1gbit",
        }  # fmt: skip
        assert {name: found[name] for name in expected} == expected
        assert (tmp_path / f"name{rank}").read_text() == "given\n"
        assert Path((tmp_path / f"python{rank}").read_text().strip()).parent == Path(sys.executable).parent


TRANSFER = """
import os, socket, sys, time
receiver, size, rank, listens = int(sys.argv[1]), int(sys.argv[2]), int(os.environ["RANK"]), sys.argv[4]
if rank == receiver:
    with socket.create_server(("", 5000)) as server:
        open(listens, "w").close()
        peer = server.accept()[0]
    with peer:
        start = time.perf_counter()
        while size:
            size -= len(peer.recv(min(size, 1 << 16)))
        print(time.perf_counter() - start, file=open(sys.argv[3], "w"))
elif rank == 0:
    address = f"10.77.0.{1 + receiver // int(os.environ['LOCAL_WORLD_SIZE'])}"
    # A pipe, which opens when both ends do.
    open(listens).close()
    with socket.create_connection((address, 5000)) as peer:
        peer.sendall(bytes(size))
"""


@real
def test_the_rate_limits_what_leaves_a_host_and_its_interface_counts_it(tmp_path):
    seconds = []
    os.mkfifo(tmp_path / "listens")
    with Lab(ranks=4, rate="20mbit", ranks_per_host=2) as lab:
        for receiver in (1, 2):
            files = [str(tmp_path / name) for name in ("seconds", "listens")]
            command = [sys.executable, "-c", TRANSFER, str(receiver), str(2 * MIB), *files]
            assert lab.run(command, timeout_s=20) == [0] * 4
            seconds.append(float((tmp_path / "seconds").read_text()))
        sent, received = lab.bytes_sent(0), lab.counters()[1].received_bytes
        assert 2 * MIB < sent < 2.2 * MIB
        assert 2 * MIB < received < 2.2 * MIB
        assert lab.bytes_sent(1) < 0.2 * MIB
    # A bucket at each end of the link passes at once.
    least = (2 * MIB - 2 * module.FRAME_BYTES) * 8 / 20e6
    assert least < seconds[1] < 2 * least
    assert seconds[0] < least / 4


@pytest.mark.parametrize(
    ("cores", "hosts", "expected"),
    [
        ({4, 5}, 2, [[4], [5]]),
        ({0, 1}, 4, [[0], [0], [1], [1]]),
        (range(8), 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({0, 3}, 1, [[0, 3]]),
        # Some hosts would be faster than others.
        ({0, 1}, 3, [[0, 1]] * 3),
        ({0, 1, 2}, 2, [[0, 1, 2]] * 2),
    ],
)
def test_hosts_get_as_many_cores_each(cores, hosts, expected):
    assert [module._share(cores, host, hosts) for host in range(hosts)] == expected


@real
def test_a_rank_runs_on_the_cores_of_its_host():
    with Lab(ranks=2, rate=None) as lab:
        cores = launch.run(os.sched_getaffinity, (0,), ranks=2, lab=lab)
    assert cores == [set(module._share(os.sched_getaffinity(0), host, 2)) for host in range(2)]


def sum_of_ranks(count: int) -> tuple[int, float, str]:
    x = torch.full((count,), float(dist.get_rank()))
    dist.all_reduce(x)
    return dist.get_rank(), float(x.sum()), dist.get_backend()


def fail_on(rank: int, how: str):
    if dist.get_rank() == rank and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == rank:
        raise ValueError("wrong number")
    dist.barrier()


@real
def test_launch_returns_results_and_names_the_rank_that_failed():
    with Lab(ranks=2, rate=None) as lab:
        assert launch.run(sum_of_ranks, (5,), ranks=2, lab=lab) == [(0, 5.0, "gloo"), (1, 5.0, "gloo")]
        with pytest.raises(
            launch.RankError, match="rank 1 failed: ValueError: wrong number. The other ranks have been"
        ):
            launch.run(fail_on, (1, "raised"), ranks=2, lab=lab)
        with pytest.raises(
            launch.RankError, match="rank 1 was killed by signal 9 .SIGKILL.; the other ranks have been"
        ):
            launch.run(fail_on, (1, "killed"), ranks=2, lab=lab)
        with pytest.raises(ValueError, match="3 ranks in a lab of 2"):
            launch.run(sum_of_ranks, (5,), ranks=3, lab=lab)


@real
def test_a_function_that_ranks_cannot_import_is_named(monkeypatch):
    elsewhere = types.ModuleType("elsewhere")
    exec("def function(): pass", vars(elsewhere))
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere)
    with Lab(ranks=2, rate=None) as lab, pytest.raises(launch.RankError, match="No module named 'elsewhere'"):
        launch.run(vars(elsewhere)["function"], (), ranks=2, lab=lab)


def test_an_error_that_a_rank_was_stopped_in_the_middle_of_is_none(tmp_path):
    (tmp_path / "0.error").write_text("")
    (tmp_path / "1.error").write_text('{"message": {"message": "wrong number"}}')
    (tmp_path / "2.error").write_text('{"mess')
    assert launch._errors(tmp_path) == {1: {"message": "wrong number"}}


@real
def test_a_failing_rank_ends_the_others_and_their_children():
    with Lab(ranks=3, rate=None) as lab:
        codes = lab.run(["sh", "-c", f"[ $RANK = 1 ] && exit 3; setsid sleep {seconds(654)} & sleep {seconds(654)}"])
        assert codes == [-15, 3, -15]
        assert lab.failed_rank == 1
        assert not running(seconds(654))
        assert lab.run(["true"]) == [0, 0, 0]
        assert lab.failed_rank is None
        with pytest.raises(ValueError, match="cannot run 'no-such-program': give a program, by path or found in PATH"):
            lab.run(["no-such-program"])
        # On a busy machine rank 1 may not have ended yet either.
        with pytest.raises(TimeoutError, match="still running after 0.2 s: rank 0, (1, )?2. All ranks have been ended"):
            lab.run(["sh", "-c", f"[ $RANK = 1 ] || sleep {seconds(655)}"], timeout_s=0.2)
        assert not running(seconds(655))


@real
def test_a_rank_that_ignores_sigterm_is_killed(monkeypatch, tmp_path):
    # As long as a busy machine may take to list what runs in one namespace.
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    os.mkfifo(tmp_path / "ready")
    # Rank 0 fails when rank 1 ignores the signal; what a shell ignores, so does the program in its place.
    script = f"[ $RANK = 0 ] && read line < {tmp_path}/ready && exit 1; trap '' TERM; echo > {tmp_path}/ready; exec "
    with Lab(ranks=2, rate=None) as lab:
        codes = lab.run(["sh", "-c", f"{script} sleep {seconds(656)}"])
    assert codes == [1, -9]


@real
def test_two_labs_at_a_time_do_not_meet():
    with Lab(ranks=1, rate=None) as one, Lab(ranks=1, rate=None) as two:
        assert one.run(["true"]) == two.run(["true"]) == [0]
        assert len(namespaces(os.getpid())) == 4


@real
def test_a_failed_construction_leaves_nothing(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", "nonsense")
    with pytest.raises(RuntimeError, match="`tc .* limit nonsense` failed: "), Lab(ranks=1, rate="1mbit"):
        pass


@real
def test_the_command_streams_output_and_ends_like_the_first_rank_that_failed(tmp_path):
    os.mkfifo(tmp_path / "said")
    # Rank 1 fails once rank 0 has spoken: who fails ends the others.
    script = 'echo out of $RANK; if [ $RANK = 0 ]; then echo > "$0"; else read word < "$0"; exit 5; fi'
    arguments = ["--ranks", "2", "--rate", "none", "--", "sh", "-c", script, tmp_path / "said"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5
    assert sorted(done.stdout.splitlines()) == ["out of 0", "out of 1"]
    assert "rank 1 ended with 5" in done.stderr


@pytest.fixture
def running_command():
    """`flashcomm lab` with two ranks that sleep, and a word that only their command lines contain."""
    marker = seconds(789)
    process = subprocess.Popen(
        [*COMMAND, "--ranks", "2", "--rate", "1mbit", "--", "sh", "-c", f"sleep {marker}; true"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        # The command itself, two shells, two sleeps.
        wait_for(lambda: len(running(marker)) == 5)
        yield process, marker
        process.kill()


@real
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), thorough(signal.SIGHUP, 129)]
)
def test_a_signal_to_the_command_leaves_nothing(running_command, number, status):
    process, marker = running_command
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert ("interrupted; all ranks have been stopped" in errors) == (number == signal.SIGINT)
    assert not running(marker)
    assert not namespaces(process.pid)


@real
def test_a_killed_command_takes_its_ranks_along_and_the_next_lab_cleans_up(running_command):
    process, marker = running_command
    process.kill()
    process.wait()
    # The kernel does not end a rank's own children, but their namespace tells the next lab.
    wait_for(lambda: len(running(marker)) <= 2)
    assert len(namespaces(process.pid)) == 3
    with Lab(ranks=1, rate=None):
        assert not namespaces(process.pid)
        wait_for(lambda: not running(marker))
