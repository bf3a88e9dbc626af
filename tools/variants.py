"""Measure formats that were tried and rejected on the bundled model: the rows of results/variants_cpu.json.

    OMP_NUM_THREADS=1 python tools/variants.py --json results/variants_cpu.json

Each variant is a function from values to the decoded values, so its "payload" is fp32; `bits` are those that the format
would have. docs/negative-results.md draws the conclusions.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

import flashcomm
from flashcomm import machine
from flashcomm.accuracy.on_ranks import accuracy
from flashcomm.codecs import Codec
from flashcomm.codecs.elements import ELEMENTS
from flashcomm.demo import MODEL
from flashcomm.integrations.transformers import compressed
from flashcomm.lab import launch
from flashcomm.models import text
from flashcomm.models.load import load
from flashcomm.models.windows import windows
from flashcomm.report.rows import write_json


class Variant(Codec):
    """A format that exists only as its effect on values."""

    def __init__(self, name, bits, function):
        self.name, self.bits, self.function = name, bits, function

    def __str__(self):
        return self.name

    def bits_per_value(self, cols, dtype=torch.bfloat16):
        return self.bits

    def payload_bytes(self, cols, dtype=torch.bfloat16):
        return 4 * cols

    def encode(self, x):
        return self.function(x.float()).contiguous().view(torch.uint8)

    def decode(self, payload, cols, dtype):
        return payload.contiguous().view(torch.float32).to(dtype)

    def step(self, x):
        return torch.full_like(x.float(), float("nan"))


def grouped(group):
    """Let a function work on the groups of rows."""
    return lambda function: lambda x: function(x.unflatten(1, (-1, group))).flatten(1)


def up(scale, mantissa=7):
    """Round positive fp32 up to `mantissa` bits behind the leading one."""
    mask = (1 << 23 - mantissa) - 1
    return ((scale.view(torch.int32) + mask) & ~mask).view(torch.float32).clamp_min(1e-30)


def affine(x, bits, middles):
    """Codes over the range; levels at its ends, or in the middles of equal parts."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    parts = 2**bits if middles else 2**bits - 1
    scale = up((high - low) / parts)
    zero = low + scale / 2 if middles else low
    return torch.round((x - zero) / scale).clamp(0, 2**bits - 1) * scale + zero


def spike(x, bits, middles, mantissa):
    """Keep extremes; code the others like `affine`, with a scale of `mantissa` bits behind the leading one."""
    places = [x.argmin(-1, keepdim=True), x.argmax(-1, keepdim=True)]
    inf = float("inf")
    low = x.scatter(-1, places[0], inf).scatter(-1, places[1], inf).amin(-1, keepdim=True)
    high = x.scatter(-1, places[0], -inf).scatter(-1, places[1], -inf).amax(-1, keepdim=True)
    scale = up((high - low) / (2**bits * 63 / 64 if middles else 2**bits - 1 - 1 / 16), mantissa)
    zero = (low + high) / 2 - (2**bits - 1) / 2 * scale if middles else low
    value = torch.round((x - zero) / scale).clamp(0, 2**bits - 1) * scale + zero
    for place in places:
        value = value.scatter(-1, place, x.gather(-1, place))
    return value


def block(x, scale_of):
    """E2M1 elements with a scale from the largest magnitude."""
    element = ELEMENTS["fp4_e2m1"]
    scale = scale_of(x.abs().amax(-1, keepdim=True).clamp_min(1e-30))
    return element.decode(element.encode(x / scale)) * scale


def logarithmic(x):
    """DeepEP's LogFMT-10: a sign and 511 magnitudes in equal ratios, down to 2**-32 of the largest, and zero."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    least = torch.where(x == 0, largest, x.abs()).amin(-1, keepdim=True).maximum(largest * 2.0**-32)
    step = ((largest.log() - least.log()) / 510).clamp_min(1e-9)
    place = torch.floor((x.abs().clamp_min(1e-38).log() - least.log()) / step).clamp(0, 510)
    below, above = (least.log() + place * step).exp(), (least.log() + (place + 1).clamp_max(510) * step).exp()
    value = torch.where(x.abs() - below <= above - x.abs(), below, above)
    return torch.where(x.abs() < least / 2, 0.0, value) * x.sign()


def variants():
    """All of them, by name; formats that were taken stand beside their variants."""
    made = [
        Variant("logfmt10 g128", 10.25, grouped(128)(logarithmic)),
        Variant("int2g32, middles", 3.0, grouped(32)(lambda x: affine(x, 2, True))),
        Variant("int3g32, middles", 4.0, grouped(32)(lambda x: affine(x, 3, True))),
        Variant("int4g32, middles", 5.0, grouped(32)(lambda x: affine(x, 4, True))),
        Variant("int2g32+spike, ends", 3.8125, grouped(32)(lambda x: spike(x, 2, False, 3))),
        Variant("int3g32+spike, ends", 4.8125, grouped(32)(lambda x: spike(x, 3, False, 3))),
        Variant("int2g32+spike, bf16 scale", 4.0625, grouped(32)(lambda x: spike(x, 2, True, 7))),
        Variant("mxfp4, OCP's floor", 4.25, grouped(32)(lambda x: block(x, lambda m: (m / 4).log2().floor().exp2()))),
        Variant("mxfp4, up to 6", 4.25, grouped(32)(lambda x: block(x, lambda m: (m / 6).log2().ceil().exp2()))),
        Variant("nvfp4, up to 7", 4.5, grouped(16)(lambda x: block(x, lambda m: up(m / 7, 3)))),
    ]
    taken = ("int8g128", "int2g32", "int3g32", "int4g32", "int2g32+spike", "int3g32+spike", "mxfp4", "nvfp4")
    return {codec.name: codec for codec in made} | {name: flashcomm.codec(name) for name in taken}


def rank_main(tokens: int) -> list[dict]:
    """Run on every rank: a row per variant."""
    model, tokenizer = load(MODEL, torch.bfloat16)
    ids = torch.tensor(tokenizer(text.held_out_text(), verbose=False)["input_ids"])
    with compressed(model, "none", batch_invariant=True) as handle:
        figures = accuracy(model, handle, list(variants().values()), windows(ids, tokens), "two_step")
    hidden = model.config.hidden_size
    return [
        {"codec": str(codec), "bits_per_value": codec.bits_per_value(hidden), **asdict(figure)}
        for codec, figure in figures.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    rows = launch.run(rank_main, (arguments.tokens,), ranks=4)[0]
    document = {"op": "variants", "ranks": 4, "machine": machine.describe(), "rows": rows}
    write_json(arguments.json, document)
    for row in rows:
        print(
            f"{row['codec']:28s} {row['bits_per_value']:.2f} {100 * row['perplexity_change']:+.2f} % KL {row['kl']:.1e}"
        )
