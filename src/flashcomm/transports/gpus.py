"""The links between the GPUs of a group, from what each rank sees of its own.

A process may not see all GPUs of its host, and one that it does not see is not guessed at.

Source: the classes of NVIDIA's ``nvidia-smi topo -m``, as far as they decide what a sum costs.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

NVLINK, PEER, HOST, NETWORK = "NVLink", "PCIe", "PCIe through the host", "network"
LINKS = (NVLINK, PEER, HOST, NETWORK)
"""Links from fast to slow: NVLink or NVSwitch, PCIe with peer access, PCIe without, and between hosts."""


def name_of(device: torch.device) -> str:
    """The identity of a GPU, the same in all processes; "" of another device."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def reach(device: torch.device) -> dict[str, str]:
    """The link from a GPU to each one that this process sees, itself too, by `name_of`; empty for another device."""
    if device.type != "cuda":
        return {}
    mine = torch.cuda.current_device() if device.index is None else device.index
    nvlinks, links = _nvlinks(), {}
    for other in range(torch.cuda.device_count()):
        if other == mine or (nvlinks and nvlinks[mine][other]):
            link = NVLINK
        else:
            link = PEER if torch.cuda.can_device_access_peer(mine, other) else HOST
        links[name_of(torch.device("cuda", other))] = link
    return links


def slowest(hosts: Sequence[object], gpus: Sequence[str], reaches: Sequence[Mapping[str, str]]) -> str:
    """The slowest link between two ranks, the same on all ranks; "" if one is not known.

    Args:
        hosts: of each rank.
        gpus: of each rank, by `name_of`.
        reaches: what each rank says by `reach`.

    >>> slowest("aa", ["x", "y"], [{"x": NVLINK, "y": PEER}, {"x": PEER, "y": NVLINK}])
    'PCIe'
    >>> slowest("ab", ["x", "x"], [{}, {}]), slowest("aa", ["x", "y"], [{"x": NVLINK}, {}])
    ('network', '')
    """
    if len(set(hosts)) > 1:
        return NETWORK
    links = [mine.get(gpu, "") for mine in reaches for gpu in gpus]
    return "" if "" in links or "" in gpus else max(links, key=LINKS.index, default="")


def _nvlinks() -> Any:
    """Number of NVLinks between the GPUs that this process sees, [device][device]; None if torch cannot tell."""
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _detect_dma_connectivity  # pyright: ignore[reportAttributeAccessIssue]

        return _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    return None
