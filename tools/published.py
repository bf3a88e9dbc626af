"""Published figures of others next to the predictions of `flashcomm plan`; `make docs` writes them to docs/plan.md.

Settings that a source leaves open are named as ours. Where a figure has gone into the table of machines, its row says so.
"""

from collections.abc import Callable
from typing import NamedTuple

from flashcomm.codecs import parse
from flashcomm.planner.hardware import ACCELERATORS, LINKS, Cluster, cluster
from flashcomm.planner.prefill import CODECS, Prediction, advise, compare, predict
from flashcomm.planner.shapes import SHAPES

MIB = 1 << 20


class Figure(NamedTuple):
    """One published figure."""

    source: str
    setting: str
    what: str
    published: float
    predict: Callable[[], float]
    unit: str = "x"
    note: str = ""


def _prompts(model: str, ranks: Cluster, codec: str, tokens: int, rows: int) -> Prediction:
    return predict(SHAPES[model], ranks, codec, tokens=tokens, rows=rows)


def _share(model: str, ranks: Cluster, tokens: int, rows: int) -> Callable[[], float]:
    return lambda: 100 * _prompts(model, ranks, "none", tokens, rows).share


def _faster(model: str, ranks: Cluster, codec: str, tokens: int, rows: int) -> Callable[[], float]:
    """Speedup of the first token over plain, in one piece."""
    plain, compressed = (
        lambda spec=spec: _prompts(model, ranks, spec, tokens, rows).ttft_s for spec in ("none", codec)
    )
    return lambda: plain() / compressed()


def _saved(model: str, ranks: Cluster, codec: str, tokens: int, rows: int) -> Callable[[], float]:
    """Percent of the prefill that parts save, in the same codec."""

    def percent() -> float:
        one = _prompts(model, ranks, codec, tokens, rows)
        return 100 * (1 - one.overlapped_s / one.ttft_s)

    return percent


def _sum_us(ranks: Cluster, codec: str, values: int) -> Callable[[], float]:
    """Microseconds of one all-reduce of 16-bit values."""
    costs = ranks.group.costs
    assert costs is not None
    if codec == "none":
        return lambda: 1e6 * costs.plain.seconds(2 * values)
    two_step = next(cost for way, cost in costs.compressed.items() if way.name == "two_step")
    return lambda: 1e6 * two_step.seconds(2 * values, parse(codec).bits_per_value(4096))


def _times(ranks: Cluster, codec: str, values: int) -> Callable[[], float]:
    return lambda: _sum_us(ranks, "none", values)() / _sum_us(ranks, codec, values)()


def figures() -> list[Figure]:
    """All published figures with enough detail to predict them."""
    l40, l40_sys, a100 = cluster("l40", 4), cluster("l40", 4, link="pcie4-sys"), cluster("a100", 4)
    h100, h100s = cluster("h100", 4), cluster("h100", 8)
    b200, mi2, mi4, mi8 = cluster("b200", 8), *(cluster("mi300x", n) for n in (2, 4, 8))
    paper, iso = "Flash Communication, 2412.04964", "ISO, 2409.11155"
    readme, sglang, nvfp4 = "QuickReduce, README", "QuickReduce, SGLang #6619", "NVFP4 all-reduce, README"
    return [
        Figure(paper, "LLaMA-3-70B, 4 L40 across sockets, 8 x 1,024", "share of sums", 65, _share("llama-3-70b", l40_sys, 1024, 8), "%"),
        Figure(paper, "the same, if all were on one socket", "share of sums", 65, _share("llama-3-70b", l40, 1024, 8), "%", "so the paper's machine is not that"),
        Figure(paper, "LLaMA-3-70B, 4 A100, 8 x 1,024", "share of sums", 20, _share("llama-3-70b", a100, 1024, 8), "%", "the plan takes large messages at 208 GB/s, the share says about 110"),
        Figure(paper, "4 L40 across sockets, int4g128", "first token", 2.06, _faster("llama-3-70b", l40_sys, "int4g128", 1024, 8), note="the paper's best of several models and batches; its own share and kernel give 1.80"),
        Figure(paper, "4 A100, int4g128", "first token", 1.19, _faster("llama-3-70b", a100, "int4g128", 1024, 8), note="the paper's best; one fused kernel, where ours has three and two NCCL calls"),
        Figure(paper, "all-reduce of 64 MiB, INT4, 4 L40 across sockets", "over NCCL", 3.18, _times(l40_sys, "int4g128", 32 * MIB)),
        Figure(iso, "8 RTX 4090, 70B, 4,096 tokens (ours), int8", "prefill saved", 35, _saved("llama-2-70b", cluster("rtx4090", 8), "int8g128", 4096, 1), "%", "ranks and lengths are not known to us"),
        Figure(iso, "8 RTX 4090, 30B, 4,096 tokens (ours), int8", "prefill saved", 35, _saved("llama-30b", cluster("rtx4090", 4), "int8g128", 4096, 1), "%", "4 ranks, as 52 heads divide"),
        Figure(iso, "8 A800, 70B, 4,096 tokens (ours), plain", "prefill saved", 15, _saved("llama-2-70b", cluster("a800", 8), "none", 4096, 1), "%", "ranks and lengths are not known to us, nor what transfers take from the products there: 18 % here"),
        *(
            Figure(sglang, f"Qwen2.5-72B, {n} MI300X, INT{bits}, 8,192 tokens (ours)", "first token", published, _faster("qwen2.5-72b", ranks, f"int{bits}sg32", 8192, 1), note=_SERVED)
            for n, ranks, all_of in ((8, mi8, (1.06, 1.08, 1.12)), (4, mi4, (1.14, 1.18, 1.27)))
            for bits, published in zip((8, 6, 4), all_of, strict=True)
        ),
        Figure("vLLM #39783", "Llama-3.3-70B, 4 H100, int8, 2,048 tokens (ours)", "first token, least", 1.03, _faster("llama-3-70b", h100, "int8g128", 2048, 1), note=_FUSED),
        Figure("vLLM #39783", "the same, 8,192 tokens (ours)", "first token, most", 1.08, _faster("llama-3-70b", h100, "int8g128", 8192, 1), note=_FUSED),
        Figure("TokenWeave, 2505.11329", "70B, 8 H100, 4,096 tokens (ours)", "share of sums, most", 23, _share("llama-3-70b", h100s, 4096, 1), "%", "plain NCCL rings here, multicast there"),
        *(
            Figure(nvfp4, f"8 B200, two-shot {name}, {millions}M values", "one sum", published, _sum_us(b200, codec, millions << 20), "us", note)
            for name, codec, all_of in (("NVFP4", "nvfp4", (94, 303, 1037)), ("FP8", "fp8g128", (176, 581, 1861)))
            for millions, published, note in zip((32, 128, 512), all_of, (_FUSED, "", ""), strict=True)
        ),
        Figure(readme, "2 MI300X, 64 MB, RCCL", "one sum", 1464, _sum_us(mi2, "none", 32 * MIB), "us", "went into the table"),
        Figure(readme, "2 MI300X, 64 MB, INT8", "one sum", 829, _sum_us(mi2, "int8sg32", 32 * MIB), "us"),
        Figure(readme, "2 MI300X, 64 MB, INT4", "one sum", 468, _sum_us(mi2, "int4sg32", 32 * MIB), "us"),
        Figure(readme, "8 MI300X, 64 MB, RCCL", "one sum", 426, _sum_us(mi8, "none", 32 * MIB), "us"),
        Figure(readme, "8 MI300X, 64 MB, INT8", "one sum", 482, _sum_us(mi8, "int8sg32", 32 * MIB), "us", "slower than RCCL there: not the link, their kernel is the limit"),
        Figure(readme, "8 MI300X, 64 MB, INT4", "one sum", 273, _sum_us(mi8, "int4sg32", 32 * MIB), "us", "their kernel again"),
        Figure("vLLM #19744", "4 MI300X, 16 MB, plain", "one sum", 230, _sum_us(mi4, "none", 8 * MIB), "us"),
    ]  # fmt: skip


_FUSED = "theirs is one kernel, ours two NCCL calls and three kernels"
_SERVED = "of 200 requests at once: queueing and decode steps are in their time, not in ours"


def published_table() -> str:
    """The table of docs/plan.md."""
    lines = [
        "| source | setting | what | published | predicted | ratio | |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for one in figures():
        predicted = one.predict()
        lines.append(
            f"| {one.source} | {one.setting} | {one.what} | {_with(one.published, one.unit)} | "
            f"{_with(predicted, one.unit)} | {predicted / one.published:.2f} | {one.note} |"
        )
    return "\n".join(lines)


def machines_table() -> str:
    """The machines and links of docs/plan.md."""
    lines = [
        "| machine | bf16 TFLOPS | reached | memory GB/s | link | source |",
        "| --- | ---: | ---: | ---: | --- | --- |",
        *(
            f"| `{name}` | {one.tflops:g} | {one.matmul_share:.0%} | {one.memory_gbytes_s:,g} | `{one.link}` | {one.source} |"
            for name, one in ACCELERATORS.items()
        ),
        "",
        "| link | GB/s of a rank, each way | reached | us per call | source |",
        "| --- | ---: | ---: | ---: | --- |",
        *(
            f"| `{name}` | {one.gbytes_s:g}{' to each peer' if one.per_peer else ''} | {one.achieved:g} | "
            f"{1e6 * one.call_s:g} | {one.source} |"
            for name, one in LINKS.items()
        ),
    ]
    return "\n".join(lines)


def _with(value: float, unit: str) -> str:
    return f"{value:.0f} %" if unit == "%" else f"{value:.2f}x" if unit == "x" else f"{value:,.0f} {unit}"


def choices_table() -> str:
    """The plan's advice for each GPU, in docs/choosing.md."""
    lines = [
        "| machine | share of sums | `int8g128` | `int4g128` | `int8g128` in parts | advice |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, link in ((name, one.link) for name, one in ACCELERATORS.items() if not name.startswith("cpu")):
        links = [link, "pcie4-sys"] if link == "pcie4" else [link]
        for one in links:
            made = list(compare(SHAPES["llama-3-70b"], cluster(name, 4, link=one), CODECS, tokens=1024, rows=8))
            plain, eight, four = (next(p for p in made if p.codec == spec) for spec in ("none", "int8g128", "int4g128"))
            advice = advise(made)
            what = "leave it plain" if advice.codec == "none" else f"`{advice.codec}`"
            parts = f" in {len(advice.parts)} parts" if len(advice.parts) > 1 else ""
            lines.append(
                f"| `{name}`, `{one}` | {plain.share:.0%} | {plain.ttft_s / eight.ttft_s:.2f}x | "
                f"{plain.ttft_s / four.ttft_s:.2f}x | {plain.ttft_s / eight.overlapped_s:.2f}x | {what}{parts} |"
            )
    return "\n".join(lines)
