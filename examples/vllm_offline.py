"""Generate with a hybrid checkpoint in vLLM, without a server: python examples/vllm_offline.py FOLDER [PROMPT ...]

Nothing here is special to hybrids: with dtr-deploy installed, vLLM's plugin mechanism finds `dtr_vllm` and knows the
architecture. Chat templates, batching, chunked prefill and prefix caching are vLLM's own.
"""

import argparse
import os
from importlib.util import find_spec

PROMPTS = ["Why is the sky blue?", "Name three uses of a paper clip.", "What does a hash table do?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a checkpoint written by dtr-deploy (runs/NAME/hybrid)")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="one chat each, answered together")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_intermixed_args()
    if find_spec("vllm") is None:
        parser.exit(1, "vLLM is not installed: see docs/serving-vllm.md\n")

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; read on a CPU only
    from vllm import LLM, SamplingParams

    # Eager mode starts in less than half the time. To serve for long, and on any GPU, leave it out.
    llm = LLM(arguments.folder, dtype=arguments.dtype, max_model_len=2048, enforce_eager=True)
    chats = [[{"role": "user", "content": prompt}] for prompt in arguments.prompts]
    answers = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens))
    for prompt, answer in zip(arguments.prompts, answers, strict=True):
        print(f"\n> {prompt}\n{answer.outputs[0].text.strip()}")


if __name__ == "__main__":  # vLLM starts its worker as a new process, which imports this file
    main()
