"""Addresses by which the other ranks may reach this one, of IPv4 and IPv6.

IPv6 has two kinds of addresses that matter here. Global ones, among them unique local ones (fd00::/8), are like those
of IPv4. Link-local ones (fe80::/10) mean nothing without the interface that leads to them, which has another name on
each host; so a rank tells its own, and whoever connects adds the interfaces of its own host.

Names are looked up with a deadline, because a name server that does not answer would stop all ranks.

Source: Linux's ``/proc/net/if_inet6``, and netdevice(7) for ``SIOCGIFADDR``.
"""

import contextlib
import ipaddress
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

# SIOCGIFADDR, which Python has no name for; it knows IPv4 only.
_GET_ADDRESS = 0x8915
_TABLE = Path("/proc/net/if_inet6")
_GLOBAL, _LINK = 0x00, 0x20
# IFA_F_DADFAILED and IFA_F_TENTATIVE: another host has the address, or may have it.
_UNUSABLE = 0x08 | 0x40


def own(patience_s: float) -> list[str]:
    """This rank's addresses, the likeliest first.

    They are those of the interfaces that gloo is told to use. Without any, that of the interface which leads to rank 0
    comes first, then those of the host's name, then, if all of these are loopback's, those of all interfaces.

    Args:
        patience_s: seconds to wait for name servers.

    Raises:
        OSError: ``GLOO_SOCKET_IFNAME`` names an interface that is not there, or has no address.
    """
    if named := _named():
        found = [address for interface in named for address in of_interface(interface)]
        if not found:
            raise OSError(f"GLOO_SOCKET_IFNAME={','.join(named)}: no such interface, or it has no address")
        return found
    found = []
    # As in a URL, an IPv6 address may be in brackets.
    for family, place in _look_up(os.environ.get("MASTER_ADDR", "").strip("[] ") or "localhost", patience_s / 2):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Sends nothing; only asks the kernel for the route.
            probe.connect(place)
            found.append(_written(probe.getsockname()))
    found += [_written(place) for _, place in _look_up(socket.gethostname(), patience_s / 2)]
    if all(_is_loopback(address) for address in found):
        found += [address for _, interface in socket.if_nameindex() for address in of_interface(interface)]
    return list(dict.fromkeys(found))


def of_interface(interface: str) -> list[str]:
    """The addresses of an interface; link-local ones, with their scope, only if it has no other."""
    found = []
    if address := _ipv4(interface):
        found.append(address)
    by_scope = _ipv6(interface)
    found += by_scope[_GLOBAL]
    return found or [f"{address}%{interface}" for address in by_scope[_LINK]]


def seen_from_here(address: str) -> list[str]:
    """Another rank's address as this host must write it: a link-local one with each interface that may lead there."""
    plain = address.partition("%")[0]
    if not plain.startswith("fe80:"):
        return [address]
    interfaces = _named() or [name for _, name in socket.if_nameindex()]
    return [f"{plain}%{interface}" for interface in interfaces if _ipv6(interface)[_LINK]]


def _named() -> list[str]:
    """The interfaces that gloo is told to use."""
    return [name for part in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if (name := part.strip())]


def _written(place: Any) -> str:
    """The address in a socket address, with its interface if it has one."""
    scope = place[3] if len(place) == 4 else 0
    return f"{place[0].partition('%')[0]}%{socket.if_indextoname(scope)}" if scope else place[0]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _ipv4(interface: str) -> str:
    """The address of IPv4, or ""."""
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", interface.encode()))
        return socket.inet_ntoa(answer[20:24])
    return ""


def _ipv6(interface: str) -> dict[int, list[str]]:
    """The usable addresses of IPv6 by their scope."""
    found: dict[int, list[str]] = {_GLOBAL: [], _LINK: []}
    with contextlib.suppress(OSError):
        for line in _TABLE.read_text().splitlines():
            digits, _, _, scope, flags, name = line.split()
            if name == interface and not int(flags, 16) & _UNUSABLE and int(scope, 16) in found:
                found[int(scope, 16)].append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found


def _look_up(host: str, patience_s: float) -> list[tuple[int, Any]]:
    """Families and socket addresses of a host; none if the name servers do not answer in time."""
    found: list[tuple[int, Any]] = []

    def ask():
        # UnicodeError: no name can be like this one.
        with contextlib.suppress(OSError, UnicodeError):
            answers = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
            found.extend((family, place) for family, _, _, _, place in answers)

    # The resolver has no deadline of its own.
    asking = threading.Thread(target=ask, daemon=True, name="flashcomm-look-up")
    asking.start()
    asking.join(patience_s)
    return list(found)
