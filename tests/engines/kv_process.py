"""One vLLM process for test_vllm_kv: reads what to do from its arguments, and prints its answers as JSON."""

import json
import sys


def main(transfer: dict, prompts: list[list[int]], new_tokens: int):
    from vllm import LLM, SamplingParams

    from flashcomm.demo import MODEL

    llm = LLM(
        str(MODEL), dtype="bfloat16", enforce_eager=True, max_model_len=2048, kv_transfer_config=transfer,
        enable_prefix_caching=False, max_num_batched_tokens=512, disable_log_stats=True,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    found = [
        {"tokens": list(answer.outputs[0].token_ids), "cached": answer.num_cached_tokens or 0} for answer in answers
    ]
    print("answers:", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
