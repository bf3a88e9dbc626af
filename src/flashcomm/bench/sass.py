"""Machine code of NVIDIA's GPUs, read: registers, spills, widths of memory accesses, instructions per value.

The disassembler comes with Triton, so no CUDA toolkit is needed. Instructions are counted up to the end of a kernel's
usual path; what the compiler puts behind it are fallbacks. A loop that lies inside another, or that runs over ranks, is
counted as often as there are ranks. Branches inside are counted as if all were taken, so counts are upper bounds.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+((?:\{\s*)?(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)[^;]*)", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """One kernel's machine code."""

    registers: int
    """Registers of a thread."""
    spilled_bytes: int
    """Bytes of a thread's stack and local memory."""
    operations: tuple[str, ...]
    """The usual path's instructions, without their operands, in order."""
    loop: int
    """Number of them in the inner loop, 0 if there is none."""

    def executed(self, ranks: int = 1, peeled: int = 0) -> int:
        """Instructions of a thread that adds `ranks` payloads, `peeled` of which come before the loop.

        The count is an upper bound of the path that a tile or a pack takes.
        """
        return len(self.operations) + max(ranks - peeled - 1, -1) * self.loop

    def accesses(self, kind: str) -> dict[str, int]:
        """Counts of the loads (``LDG``) or stores (``STG``) by width, "" for 32 bits: ``{"128": 2, "U8": 1}``."""
        found: dict[str, int] = {}
        for operation in self.operations:
            name, *parts = operation.split(".")
            if name == kind:
                width = next((part for part in parts if part in ("U8", "S8", "U16", "S16", "64", "128")), "")
                found[width] = found.get(width, 0) + 1
        return found


def read(cubin: bytes) -> Code:
    """Disassemble a kernel.

    Raises:
        RuntimeError: Triton, which brings the disassembler, is not installed.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    facts = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    marks = sorted(
        [(m.start(), "label", m[1]) for m in _LABEL.finditer(text)]
        + [(m.start(), m[2] or "", m[1]) for m in _INSTRUCTION.finditer(text)]
    )
    operations, labels, loops = [], {}, []
    for _, guard, what in marks:
        if guard == "label":
            labels[what] = len(operations)
            continue
        found = re.search(r"[A-Z][A-Z0-9_.]+", what.removeprefix(guard))
        assert found
        operations.append(found[0])
        target = re.search(r"\(\.L_x_\d+\)", what)
        if found[0] == "BRA" and target and target[0][1:-1] in labels:
            loops.append((labels[target[0][1:-1]], len(operations)))
        if found[0] == "EXIT" and not guard:
            break
    inner = [
        loop
        for loop in loops
        if len(loops) == 1 or any(o != loop and o[0] <= loop[0] <= loop[1] <= o[1] for o in loops)
    ]
    return Code(
        registers=facts["REG"],
        spilled_bytes=facts["STACK"] + facts["LOCAL"],
        operations=tuple(operation for operation in operations if operation != "NOP"),
        loop=max((stop - start for start, stop in inner), default=0),
    )


@lru_cache(maxsize=1)
def _tools() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("the disassembler comes with triton, which is not installed (pip install triton)")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tools() / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedRow:
    """Instructions per value of one verb of a format, in CUDA C++ and in Triton."""

    target: str
    codec: str
    kernel: str
    cuda: float
    cuda_registers: int
    triton: float | None
    """None for a format that Triton does not serve."""
    triton_registers: int | None


VALUES_OF_A_LANE = 32
"""Values of a pack that a thread of the CUDA C++ kernels holds, where rows are aligned."""


def cuda_kinds(spec: str) -> dict[str, Mapping[str, str]]:
    """Macros of the kernels of a format's verbs on bf16, for aligned rows of whole packs."""
    from flashcomm import codecs
    from flashcomm.kernels.gpu import cuda

    form = cuda.spell(codecs.parse(spec))
    assert form, spec
    return {
        "encode": dict(cuda.macros("Values<BF16>", form, "Wide<16>", False)),
        "decode": dict(cuda.macros(form, "Values<BF16>", "Wide<16>", False)),
        "decode_sum_encode": dict(cuda.macros(form, form, "Wide<16>", True)),
    }


def counted(spec: str, target: str, ranks: int = 4) -> list[CountedRow]:
    """Compile the three verbs of a format both ways and count.

    Args:
        spec: a format that CUDA C++ serves.
        target: architecture, such as ``sm_90``.
        ranks: payloads that `decode_sum_encode` adds.
    """
    import torch

    from flashcomm import codecs
    from flashcomm.bench.gpu import ahead_of_time
    from flashcomm.kernels import gpu
    from flashcomm.kernels.gpu.cuda import compiler
    from flashcomm.kernels.gpu.tiles.move import move

    codec, cols, rows = codecs.parse(spec), 4096, []
    for kernel, macros in cuda_kinds(spec).items():
        sums = ranks if kernel == "decode_sum_encode" else 1
        ours = read(compiler.cubin(dict(macros), target))
        triton = triton_registers = None
        if gpu.why_not(codec) is None:
            form, values = gpu.describe(codec, cols), gpu.VALUES[torch.bfloat16]
            pair = {"encode": (values, form), "decode": (form, values), "decode_sum_encode": (form, form)}[kernel]
            constants = gpu.constants_of(*pair, cols)
            binary, options = ahead_of_time(move, constants, target)
            code = read(binary.asm["cubin"])
            triton = code.executed(sums, peeled=1) * options["num_warps"] * 32 / constants["V"]
            triton_registers = code.registers
        rows.append(
            CountedRow(
                target=target,
                codec=spec,
                kernel=kernel,
                cuda=ours.executed(sums) / VALUES_OF_A_LANE,
                cuda_registers=ours.registers,
                triton=triton,
                triton_registers=triton_registers,
            )
        )
    return rows
