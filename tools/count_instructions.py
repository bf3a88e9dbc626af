"""Count the instructions per value of the CUDA C++ kernels beside Triton's, for the table of docs/gpu.md.

    python tools/count_instructions.py sm_80 sm_90

Needs NVRTC (pip install nvidia-cuda-nvrtc) and Triton, and no GPU.
"""

import sys

from flashcomm.bench import sass

BASES = ("int8g128", "int4g128", "int4g32", "mxfp4", "mxfp8_e4m3", "fp8g128")


def main(targets: list[str]):
    """Print a table in Markdown: encode, decode and decode_sum_encode of four payloads."""
    print("| codec | " + " | ".join(f"{target}: CUDA C++ | {target}: Triton" for target in targets) + " |")
    print("| --- |" + " ---: |" * (2 * len(targets)))
    for spec in (*BASES, *(f"{base}+hadamard" for base in BASES)):
        cells = []
        for target in targets:
            rows = sass.counted(spec, target)
            cells.append(" / ".join(f"{row.cuda:.0f}" for row in rows))
            cells.append(" / ".join(f"{row.triton:.0f}" for row in rows if row.triton is not None) or "-")
        print(f"| `{spec}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["sm_90"])
