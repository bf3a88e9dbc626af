"""Addresses of hosts that have only IPv6, in network namespaces, and names that no server knows."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import flashcomm
from flashcomm.lab import hosts
from flashcomm.transports import addresses

SOURCES = str(Path(flashcomm.__file__).parents[1])

ASK = """
import json, os, sys
from flashcomm.transports import addresses
found = []
for variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    try:
        found.append([addresses.own(2.0), [form for a in addresses.own(2.0) for form in addresses.seen_from_here(a)]])
    except OSError as error:
        found.append(str(error))
print(json.dumps(found))
"""

SUM = """
import json, os, sys, torch, torch.distributed as dist, flashcomm
from datetime import timedelta
from flashcomm.collectives.group import group_of
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
y = flashcomm.all_reduce(torch.ones(64, 256), "fp32", algorithm="two_step")
meeting = group_of(None).meet(torch.device("cpu"))
print(json.dumps([y.unique().tolist(), meeting.carrier, meeting.why_not.get("connections", "")]))
"""


@pytest.fixture(scope="module")
def two_hosts():
    """Two namespaces with a link between them: names of interfaces differ, and no address is IPv4's but loopback's."""
    if reason := hosts.unavailable():
        pytest.skip(f"no namespaces here: {reason}")
    names = [f"flashcomm-{os.getpid()}-v6-{number}" for number in range(2)]
    hosts._remove(names)
    try:
        for name in names:
            hosts._call("ip", "netns", "add", name)
        # gloo takes the number of another host's interface for that of its own.
        link = ("link", "add", "left", "index", "77", "type", "veth", "peer", "name", "right", "index", "77")
        hosts._call("ip", "-n", names[0], *link, "netns", names[1])
        for number, (name, interface) in enumerate(zip(names, ("left", "right"), strict=True)):
            # Addresses of our own, which nobody must look for twice.
            hosts._call("ip", "-n", name, "link", "set", interface, "addrgenmode", "none", "up")
            hosts._call("ip", "-n", name, "link", "set", "lo", "up")
            hosts._call("ip", "-n", name, "addr", "add", f"fe80::{number + 1}/64", "dev", interface, "nodad")
        yield names
    finally:
        hosts._remove(names)


@pytest.fixture(params=["global", "link-local"])
def scope(request, two_hosts):
    """The kind of address that the hosts have; every host has a link-local one."""
    if request.param == "global":
        for number, (name, interface) in enumerate(zip(two_hosts, ("left", "right"), strict=True)):
            hosts._call("ip", "-n", name, "addr", "add", f"fd00:77::{number + 1}/64", "dev", interface, "nodad")
    yield request.param
    for name, interface in zip(two_hosts, ("left", "right"), strict=True):
        hosts._call("ip", "-n", name, "addr", "flush", "dev", interface, "scope", "global")


@pytest.fixture
def start():
    """Run a Python script on a host; it is killed if the test ends before it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "GLOO_"))}
    kept |= {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with ExitStack() as stack:

        def start(host: str, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
            process = subprocess.Popen(
                ["ip", "netns", "exec", host, sys.executable, "-c", script, *arguments],
                env={**kept, **variables},
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def said(process: subprocess.Popen):
    """What the script printed last."""
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def test_hosts_with_ipv6_only_connect(two_hosts, scope, start):
    first = "fd00:77::1" if scope == "global" else "fe80::1"
    processes = []
    for rank, (host, interface) in enumerate(zip(two_hosts, ("left", "right"), strict=True)):
        address = first if scope == "global" else f"{first}%{interface}"
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "29500"}
        processes.append(start(host, SUM, GLOO_SOCKET_IFNAME=interface, **place))
    assert [said(process) for process in processes] == [[[2.0], "connections", ""]] * 2


def test_the_addresses_of_a_host_with_ipv6_only(two_hosts, scope, start):
    cases = [
        {"GLOO_SOCKET_IFNAME": "left"},
        {"GLOO_SOCKET_IFNAME": "none, left"},
        {"GLOO_SOCKET_IFNAME": "none"},
        {"GLOO_SOCKET_IFNAME": "", "MASTER_ADDR": "fd00:77::2" if scope == "global" else "fe80::2%left"},
        {"MASTER_ADDR": "[fd00:77::2]" if scope == "global" else "[fe80::2%left]"},
        {"MASTER_ADDR": "localhost"},
    ]
    named, second, wrong, plain, brackets, unknown = said(start(two_hosts[0], ASK, json.dumps(cases)))
    mine = "fd00:77::1" if scope == "global" else "fe80::1%left"
    assert named == second == [[mine], [mine]]
    assert wrong == "GLOO_SOCKET_IFNAME=none: no such interface, or it has no address"
    for found, forms in (plain, brackets):
        assert found[0] == forms[0] == mine
    # The name of this host leads nowhere, or to loopback, as in many containers.
    assert mine in unknown[0]


def test_a_link_local_address_is_written_with_the_interfaces_of_this_host(monkeypatch, tmp_path):
    lines = [f"{'fe80':0<31}{number} 07 40 20 80 eth{number}" for number in (7, 8)]
    monkeypatch.setattr(addresses, "_TABLE", tmp_path / "if_inet6")
    addresses._TABLE.write_text("\n".join(lines))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7,eth8,eth9")
    assert addresses.seen_from_here("fe80::1%ens3") == ["fe80::1%eth7", "fe80::1%eth8"]
    assert addresses.seen_from_here("192.0.2.1") == ["192.0.2.1"]
    assert addresses.seen_from_here("fd00::1") == ["fd00::1"]


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    answered = threading.Event()

    def never(*args, **kwargs):
        answered.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    start = time.monotonic()
    try:
        found = addresses.own(0.2)
        assert time.monotonic() - start < 10
    finally:
        answered.set()
    assert "127.0.0.1" in found


def test_a_name_that_cannot_be_one_is_no_error(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "a" * 70 + "." + "b" * 70)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert addresses.own(2.0)
