"""Run lm-evaluation-harness on a model whose sums over ranks are compressed, by the harness's own command line.

    torchrun --nproc-per-node 2 -m flashcomm.integrations.lm_eval run --model flashcomm ...

This command adds one model, ``flashcomm``, to those that the harness knows: its ``hf`` over all ranks of torchrun,
tensor parallel and compressed. Every rank evaluates every document, and the first of each host reports. Sums are
compressed on any machine and at any size (``batch_invariant``), because the question is how accurate the codec is.

Hazard: ranks must run the same batches, so give ``--batch_size`` a number, not ``auto``.

Source: the harness is EleutherAI's; the compression is our own.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist

from flashcomm import codecs, collectives
from flashcomm.integrations.transformers import compress, tensor_parallel_argument


def model_class() -> Any:
    """Make the harness's ``hf`` model with two more arguments.

    Returns:
        A class whose ``codec`` (``int8g128`` by default, ``none`` for plain sums) and ``algorithm`` are as for
        `flashcomm.all_reduce`; the others are those of ``lm_eval.models.huggingface.HFLM``.

    Raises:
        RuntimeError: lm-evaluation-harness is not installed. The class raises ValueError for an unknown codec, one
            process, or a model that `flashcomm.integrations.transformers.compress` refuses.

    Example::

        lm = model_class()(pretrained="directory", codec="int4g32", batch_size=8)
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RuntimeError(f"this needs lm-evaluation-harness: pip install 'lm-eval[hf]' ({error})") from error

    class CompressedHFLM(HFLM):
        def __init__(
            self, pretrained: str, codec: str = "int8g128", algorithm: str = "auto", dtype: str = "auto", **options: Any
        ):
            import transformers

            wire = codecs.parse(codec)
            if not dist.is_initialized():
                if not dist.is_torchelastic_launched():
                    raise ValueError(
                        "one process sends nothing: start this with torchrun --nproc-per-node N "
                        "-m flashcomm.integrations.lm_eval"
                    )
                dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            model = transformers.AutoModelForCausalLM.from_pretrained(
                pretrained, dtype=dtype, **tensor_parallel_argument()
            )
            self.compression = compress(model, wire, algorithm=algorithm, batch_invariant=True)
            tokenizer = options.pop("tokenizer", None) or pretrained
            super().__init__(model, tokenizer=tokenizer, **options)  # pyright: ignore[reportCallIssue]

    return CompressedHFLM


def main():
    """Run the harness's command line with the model ``flashcomm``; then say on rank 0 what was sent."""
    model = model_class()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("flashcomm")(model)
    cli_evaluate()
    if dist.is_initialized():
        if dist.get_rank() == 0:
            stats = collectives.stats()
            print(f"flashcomm: {stats['calls']}, {stats['wire_bytes']:,} bytes instead of {stats['plain_bytes']:,}")
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
