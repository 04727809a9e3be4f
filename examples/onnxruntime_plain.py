"""Generate with an exported hybrid under plain onnxruntime: nothing but a session, a tokenizer and numpy.

    python examples/onnxruntime_plain.py runs/NAME/onnx/int4 --prompt "The capital of France is"

Shows what the graph wants: the inputs by name, zeros as the first states, and one buffer for past and present.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def first_states(
    session: onnxruntime.InferenceSession, capacity: int, head_size: int
) -> dict[str, onnxruntime.OrtValue]:
    """Zeros for every state, by input name.

    past_key_values.N.key / .value: [1, kv heads, capacity, head size], a full-attention layer's cache.
    past.N.recurrent: [1, kv heads, key size, value size], a linear layer's state.
    past.N.conv: [1, window, 2 * kv heads * head size], the last keys and values of its softmax window (3 rows of values
        where a layer is jet and there is no window).
    """
    states = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            shape = [1, value.shape[1], capacity, head_size]
        elif value.name.startswith("past."):
            shape = [1, *value.shape[1:]]
        else:
            continue
        states[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder written by dtr-deploy export (fp32, int8 or int4)")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    config = json.loads((arguments.folder / "genai_config.json").read_text())["model"]
    ends = config["eos_token_id"]
    ends = set(ends) if isinstance(ends, list) else {ends}
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(arguments.folder / "model.onnx"), providers=["CPUExecutionProvider"])

    tokens = tokenizer.encode(arguments.prompt).ids
    prompt_length, capacity = len(tokens), len(tokens) + arguments.max_new_tokens
    states = first_states(session, capacity, config["decoder"]["head_size"])
    binding = session.io_binding()
    for name, state in states.items():
        # In place: the graph reads each state before it writes it.
        binding.bind_ortvalue_input(name, state)
        binding.bind_ortvalue_output(name.replace("past_key_values.", "present.").replace("past.", "present."), state)

    new, began, first_token = tokens, time.perf_counter(), 0.0
    while len(tokens) < capacity:
        # The mask covers everything so far; zeros at the end of the new tokens would be right padding.
        binding.bind_cpu_input("input_ids", np.array([new], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, len(tokens)), np.int64))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()  # outputs come in the order they were first bound in
        new = [int(logits[0, -1].argmax())]
        first_token = first_token or time.perf_counter() - began
        if new[0] in ends:
            break
        tokens.extend(new)

    seconds = time.perf_counter() - began
    print(tokenizer.decode(tokens))
    generated = len(tokens) - prompt_length
    print(f"[{generated} tokens; the first after {first_token * 1e3:.0f} ms, all after {seconds * 1e3:.0f} ms]")


if __name__ == "__main__":
    main()
