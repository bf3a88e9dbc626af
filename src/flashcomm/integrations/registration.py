"""Make ``flashcomm`` the name of a torch backend, which loads when a program first uses it.

    import flashcomm
    dist.init_process_group("flashcomm")

Apart from `torch_backend`, so that `import flashcomm` stays cheap.
"""

from typing import Any

import torch.distributed as dist


def register():
    """Register the backend with torch."""
    dist.Backend.register_backend("flashcomm", _create, extended_api=True, devices=["cpu", "cuda"])


def _create(*given: Any) -> Any:
    from flashcomm.integrations import torch_backend

    return torch_backend.create(*given)
