"""Write a Llama as a mixture of experts that computes the same, to measure what an exchange of tokens costs.

    python tools/dense_as_experts.py MODEL_DIRECTORY OUT_DIRECTORY --experts 8
    flashcomm accuracy OUT_DIRECTORY --ep 4

No package of the Python registry that was found ships a trained mixture of experts. This makes one whose hidden states
and weights are those of a trained model: each MLP is cut into as many experts as asked for, of which every token takes
all with equal weights. The down projections are multiplied by the number of experts, which a power of two does without
rounding, and the weights divide by it. So nothing differs but the order of additions.

What it does not show: tokens that take few of many experts, whose sums on a rank have fewer terms.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rope_parameters", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
)
"""Keys of the configuration that both have."""


def cut(dense: Any, experts: int) -> Any:
    """Return a Mixtral with the weights of the Llama `dense`.

    Raises:
        ValueError: a number of experts that is no power of two, or does not divide the MLP.
    """
    config = dense.config
    if experts < 2 or experts & (experts - 1) or config.intermediate_size % experts:
        raise ValueError(
            f"--experts {experts}: give a power of two that divides the MLP's {config.intermediate_size} features"
        )
    same = {key: getattr(config, key) for key in SAME}
    size = config.intermediate_size // experts
    made = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **same, intermediate_size=size, num_local_experts=experts, num_experts_per_tok=experts, sliding_window=None
        )
    ).to(dense.dtype)
    weights = dense.state_dict()
    for layer in range(config.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        pairs = zip(gate.chunk(experts), up.chunk(experts), strict=True)
        weights[f"{mlp}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        weights[f"{mlp}.experts.down_proj"] = experts * torch.stack(down.chunk(experts, 1))
        # Equal logits, so that all experts have the same weight.
        weights[f"{mlp}.gate.weight"] = down.new_zeros(experts, config.hidden_size)
    made.load_state_dict(weights)
    return made


def main():
    """Write the model and its tokenizer."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("model", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--experts", type=int, default=8)
    given = options.parse_args()
    dense = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
    try:
        made = cut(dense, given.experts)
    except ValueError as error:
        options.error(str(error))
    made.save_pretrained(given.out)
    for file in given.model.glob("*token*"):
        shutil.copy(file, given.out)


if __name__ == "__main__":
    main()
