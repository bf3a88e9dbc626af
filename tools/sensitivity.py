"""Find the sums of the bundled model that suffer from a codec: compress some modules only, and compare with plain.

python tools/sensitivity.py [--tp 4] [--tokens 8192] [--json results/sensitivity_cpu.json]
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from flashcomm import machine
from flashcomm.accuracy.on_ranks import accuracy
from flashcomm.demo import MODEL
from flashcomm.integrations.transformers import compressed
from flashcomm.lab import launch
from flashcomm.models import text
from flashcomm.models.load import load
from flashcomm.models.windows import windows
from flashcomm.report.rows import write_json

PARTS = {
    "all": "",
    "embedding": "embed_tokens",
    "attention": "o_proj",
    "mlp": "down_proj",
    **{f"layer {i}": rf"layers\.{i}\." for i in range(8)},
}
CODECS = ("int4g128", "int4g32", "int5g128", "int8g128")


def rank_main(tokens: int) -> list[dict]:
    """Rows of one part and one codec each."""
    llama, tokenizer = load(MODEL, torch.bfloat16)
    held_out = windows(torch.tensor(tokenizer(text.held_out_text(), verbose=False)["input_ids"]), tokens)
    rows = []
    for part, pattern in PARTS.items():
        with compressed(llama, "none", modules=pattern) as handle:
            found = accuracy(llama, handle, CODECS, held_out)
            for codec, figures in found.items():
                row = {"part": part, "sums": len(handle.modules), "codec": codec}
                rows.append(row | {"perplexity_change": figures.perplexity_change, "kl": figures.kl})
        if dist.get_rank() == 0:
            print(
                part,
                {row["codec"]: f"{100 * row['perplexity_change']:+.3f} %" for row in rows[-len(CODECS) :]},
                flush=True,
            )
    return rows


def main(
    tp: Annotated[int, typer.Option(help="Ranks.")] = 4,
    tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 8192,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
):
    """Measure every part with every codec."""
    rows = launch.run(rank_main, (tokens,), ranks=tp)[0]
    if json_file is not None:
        document = {"ranks": tp, "tokens": tokens, "machine": machine.describe(), "rows": rows}
        write_json(json_file, document)


if __name__ == "__main__":
    typer.run(main)
