"""Several requests at once with an exported hybrid under plain onnxruntime: continuous batching, streaming, abort.

    python examples/onnxruntime_batch.py runs/NAME/onnx/int4
    python examples/onnxruntime_batch.py runs/NAME/onnx/int4 --prompt "The capital of France is" --prompt "Two and two"

All prompts begin with the same instructions (--system), which are computed once. The last prompt is aborted after a few
tokens, as a server would when a client goes away.
"""

import argparse
import time
from pathlib import Path

from tokenizers import Tokenizer

from dtr_deploy.engines.ort_runner import OrtRunner
from dtr_deploy.engines.sampling import Sampling

SYSTEM = "Facts, told shortly and in plain words, one sentence for each of them, without an introduction. "
PROMPTS = ("The capital of France is", "The largest planet is", "Water boils at", "Once upon a time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder written by dtr-deploy export (fp32, int8 or int4)")
    parser.add_argument("--prompt", action="append", help="repeatable")
    parser.add_argument("--system", default=SYSTEM, help="what all prompts begin with")
    parser.add_argument("--slots", type=int, default=3, help="requests at once; the others wait in line")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--abort-after", type=int, default=4, help="tokens of the last prompt")
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    runner = OrtRunner(arguments.folder, slots=arguments.slots, capacity=1024)
    system = tokenizer.encode(arguments.system).ids
    prompts = arguments.prompt or PROMPTS
    began = time.perf_counter()
    names = {}
    for number, prompt in enumerate(prompts):
        # Encoded apart, so that all begin with the same tokens.
        request = runner.submit(
            system + tokenizer.encode(prompt).ids,
            arguments.max_new_tokens,
            shared=len(system),
            sampling=Sampling(arguments.temperature, top_p=0.95, seed=number),
        )
        names[request] = number
    for request, token in runner.stream():
        name = names[request]
        if token is not None:
            print(f"{name}: {tokenizer.decode([token])!r}")
            if name == len(prompts) - 1 and len(request.tokens) == arguments.abort_after:
                runner.abort(request)
            continue
        answer = tokenizer.decode(request.tokens)
        print(f"{name} ended ({request.finish_reason}, {request.cached_tokens} tokens not computed): {answer!r}")
    tokens = sum(len(request.tokens) for request in names)
    print(
        f"[{tokens} tokens in {time.perf_counter() - began:.2f} s; {runner.slots} slots of "
        f"{runner.bytes_per_slot / 2**20:.1f} MiB, {runner.free_slots} free]"
    )


if __name__ == "__main__":
    main()
