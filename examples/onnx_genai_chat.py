"""Chat with an exported hybrid under stock onnxruntime-genai, streaming, with the conversation kept in the states.

    python examples/onnx_genai_chat.py runs/NAME/onnx/int4
    python examples/onnx_genai_chat.py runs/NAME/onnx/int4 --message "Name three rivers." --message "Which is longest?"

Each turn appends only its own tokens: nothing of the conversation is computed twice.
"""

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np
import onnxruntime_genai as og


class Chat:
    """One conversation: a generator whose states hold all of it, and the same as text."""

    def __init__(self, folder: str, max_length: int) -> None:
        model = og.Model(folder)
        self.tokenizer = og.Tokenizer(model)
        self.ends = {int(token) for token in self.tokenizer.eos_token_ids}
        self.max_length = max_length
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=max_length, do_sample=False)
        self.generator = og.Generator(model, parameters)
        self.messages: list[dict[str, str]] = []
        self.text = ""

    def say(self, message: str, max_new_tokens: int) -> Iterator[str]:
        """The answer to `message`, in pieces as they come."""
        self.messages.append({"role": "user", "content": message})
        text = self.tokenizer.apply_chat_template(json.dumps(self.messages), add_generation_prompt=True)
        if self.text and not text.startswith(self.text):
            # The template changed what was said (some trim answers). States cannot go back a few tokens, only to 0.
            self.generator.rewind_to(0)
            self.text = ""
        tokens = self.tokenizer.encode(text[len(self.text) :])
        room = self.max_length - self.generator.token_count() - len(tokens)
        if room < 1:
            raise SystemExit(f"the conversation is longer than --max-length {self.max_length}")
        self.generator.append_tokens(np.array([tokens], np.int32))
        stream, answer = self.tokenizer.create_stream(), ""
        for _ in range(min(max_new_tokens, room)):
            # Choosing from the logits and appending keeps every token in the states for the next turn;
            # generate_next_token() would leave the last one out, and closes the generator at end-of-text.
            token = int(self.generator.get_logits()[0, -1].argmax())
            if token in self.ends:
                break
            self.generator.append_tokens(np.array([[token]], np.int32))
            piece = stream.decode(token)
            answer += piece
            yield piece
        self.messages.append({"role": "assistant", "content": answer})
        self.text = text + answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder written by dtr-deploy export")
    parser.add_argument("--message", action="append", help="ask this instead of reading from the terminal; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=4096, help="tokens of the whole conversation")
    arguments = parser.parse_args()
    chat = Chat(arguments.folder, arguments.max_length)
    turns = arguments.message or (line.strip() for line in sys.stdin)
    for message in turns:
        if not message:
            continue
        print(f"> {message}")
        for piece in chat.say(message, arguments.max_new_tokens):
            print(piece, end="", flush=True)
        print(f"\n[{chat.generator.token_count()} tokens]")


if __name__ == "__main__":
    main()
