"""Which numbers of ranks a model directory allows, and what is said about the others."""

import json

import pytest

from flashcomm.models.heads import heads_of, replicated
from flashcomm.models.load import check_directory


@pytest.mark.parametrize(
    ("heads", "kv_heads", "allowed"),
    [
        (9, 3, [1, 3, 9]),  # SmolLM2-135M
        (64, 8, [1, 2, 4, 8, 16, 32, 64]),  # Llama-3-70B
        (12, 4, [1, 2, 4, 12]),  # over 6 ranks, a rank would need parts of two key/value heads
        (71, 1, [1, 71]),
    ],
)
def test_ranks_hold_whole_heads(heads, kv_heads, allowed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads, "num_key_value_heads": kv_heads}))
    for ranks in range(1, heads + 2):
        if ranks in allowed:
            check_directory(tmp_path, ranks)
            continue
        numbers = ", ".join(map(str, allowed))
        sentence = rf"--tp {ranks} does not divide the {heads} attention heads and {kv_heads} key.*Allowed: {numbers}$"
        with pytest.raises(ValueError, match=sentence):
            check_directory(tmp_path, ranks)


def test_without_a_number_there_are_as_many_key_value_heads_as_heads():
    assert heads_of({"num_attention_heads": 8}) == heads_of({"num_attention_heads": 8, "num_key_value_heads": 8})
    with pytest.raises(ValueError, match="only one number for all is known"):
        heads_of({"num_attention_heads": [8, 16]})


def test_a_fused_projection_is_refused_where_heads_would_be_copied():
    plan = {"layers.*.attention.query_key_value": "colwise", "layers.*.mlp.v_proj": "rowwise"}
    assert replicated(plan, 4, 4) == replicated({"layers.*.self_attn.qkv_proj": "colwise_gather_output"}, 1, 4) == []
    with pytest.raises(NotImplementedError, match=r"1 key/value heads over 4 ranks: .*query_key.* at most 1 rank"):
        replicated(plan, 1, 4)
