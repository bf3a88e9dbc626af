"""What tests ask a worker of vLLM: a worker extension, whose methods the server's /collective_rpc calls."""

import dataclasses
import hashlib
import os
import signal

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

import flashcomm
from flashcomm import collectives
from flashcomm.integrations import vllm
from flashcomm.policy import Hops

_all_reduce = collectives.all_reduce
_digest = hashlib.blake2b(digest_size=16)


def _digesting(*args, **kwargs):
    result = _all_reduce(*args, **kwargs)
    _digest.update(result.contiguous().view(torch.uint8).numpy())
    return result


_own_sync = GPUModelRunner.sync_and_gather_intermediate_tensors


def _with_buffers(self, *args):
    """Make the buffers of a later stage, which vLLM 0.32 makes in a warm-up that eager CPU workers skip."""
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return _own_sync(self, *args)


GPUModelRunner.sync_and_gather_intermediate_tensors = _with_buffers


class Probe:
    """Methods of every worker."""

    def flashcomm_watch(self) -> str:
        """From now on every compressed sum is a part of the digest."""
        collectives.all_reduce = _digesting
        return "watching"

    def flashcomm_digest(self) -> str:
        """Of all compressed sums since `flashcomm_watch`."""
        return _digest.hexdigest()

    def flashcomm_stats(self) -> dict:
        """`flashcomm.stats()` of this worker, which starts from zero again."""
        stats = flashcomm.stats()
        flashcomm.reset_stats()
        return stats

    def flashcomm_from(self, min_bytes: int) -> str:
        """Compress larger or smaller messages than the policy says."""
        vllm.worker.use(dataclasses.replace(vllm.worker.policy, min_bytes=min_bytes))
        return str(vllm.worker.policy)

    def flashcomm_use(self, codec: str) -> str:
        """Another codec for all sums from the next step on; ``none`` leaves them to vLLM."""
        vllm.worker.use(dataclasses.replace(vllm.worker.policy, codec=codec))
        return str(vllm.worker.policy)

    def flashcomm_hops(self, codec: str) -> str:
        """Another codec for hops between pipeline stages from the next step on; ``none`` leaves them to vLLM."""
        vllm.worker.use(dataclasses.replace(vllm.worker.policy, hops=Hops(pp=codec)))
        return str(vllm.worker.policy)

    def flashcomm_overlap(self, overlap: "str | int") -> str:
        """Run steps in another number of parts from the next one on; ``off`` for one piece."""
        vllm.worker.use(dataclasses.replace(vllm.worker.policy, overlap=overlap))
        return str(vllm.worker.policy)

    def flashcomm_die(self, steps: int) -> str:
        """Kill the second rank where it would begin the step after the next `steps`."""
        if self.rank == 1:
            execute, left = self.execute_model, iter(range(steps))

            def executing(*args, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return execute(*args, **kwargs)

            self.execute_model = executing
        return "waiting"

    def flashcomm_die_in_a_part(self, sums: int) -> str:
        """Kill the second rank at one of the sums of the next step that runs in parts."""
        if self.rank == 1:
            wait, left = vllm.worker.overlap.wait, iter(range(sums))

            def waiting(start, name):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return wait(start, name)

            vllm.worker.overlap.wait = waiting
        return "waiting"

    def flashcomm_memory(self) -> int:
        """Bytes of this worker that no other process shares."""
        with open("/proc/self/smaps_rollup") as lines:
            return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))
