"""A vLLM engine with worker processes, for test_parallel.py: JSON in, tokens and log-probabilities as JSON out.

A program of its own, because vLLM starts its workers by running the main module again.
"""

import json
import sys


def main() -> None:
    given = json.load(sys.stdin)
    import dtr_vllm

    dtr_vllm.register()
    from vllm import LLM, SamplingParams

    llm = LLM(**given["options"])
    sampling = SamplingParams(
        temperature=0.0, max_tokens=given["new_tokens"], logprobs=0, ignore_eos=True, detokenize=False
    )
    results = []
    for _ in range(2):  # the second time in slots that were used
        outputs = llm.generate([{"prompt_token_ids": p} for p in given["prompts"]], sampling, use_tqdm=False)
        for output in outputs:
            completion = output.outputs[0]
            chosen = zip(completion.token_ids, completion.logprobs, strict=True)
            results.append([list(completion.token_ids), [found[token].logprob for token, found in chosen]])
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
