"""Chat with an exported hybrid under stock onnxruntime-genai, streaming, with the conversation kept in the states.

    python examples/onnx_genai_chat.py runs/NAME/onnx/int4
    python examples/onnx_genai_chat.py runs/NAME/onnx/int4 --message "Name three rivers." --message "Which is longest?"

Each turn appends only its own tokens: nothing of the conversation is computed twice. `/undo` takes the last turn back.
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
        # Beam search would run, and be wrong: genai does not move recurrent states when beams change places.
        parameters.set_search_options(max_length=max_length, do_sample=False, num_beams=1)
        self.generator = og.Generator(model, parameters)
        self.messages: list[dict[str, str]] = []
        self.text = ""
        # Tokens, text and messages where the last turn began, which is where the generator's snapshot was taken. There
        # is one snapshot, and states can go back to it or to 0, to nowhere else.
        self.turn = (0, "", 0)

    def say(self, message: str, max_new_tokens: int) -> Iterator[str]:
        """The answer to `message`, in pieces as they come."""
        history = self._render(self.messages, False) if self.messages else ""
        messages = [*self.messages, {"role": "user", "content": message}]
        text = self._render(messages, True)
        if not text.startswith(self.text):
            # The template tells the last answer in another way than it was given, for example without its reasoning.
            self._go_back(self.turn if text.startswith(self.turn[1]) else (0, "", 0))
        if text.startswith(history):
            self._append(history)
        self.generator.snapshot_state()
        self.turn = (self.generator.token_count(), self.text, len(self.messages))
        self._append(text)
        stream, answer = self.tokenizer.create_stream(), ""
        for _ in range(min(max_new_tokens, self.max_length - self.generator.token_count())):
            # Choosing from the logits and appending keeps every token in the states for the next turn;
            # generate_next_token() would leave the last one out, and closes the generator at end-of-text.
            token = int(self.generator.get_logits()[0, -1].argmax())
            if token in self.ends:
                break
            self.generator.append_tokens(np.array([[token]], np.int32))
            piece = stream.decode(token)
            answer += piece
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.text += answer

    def undo(self) -> bool:
        """Take the last turn back. False if there is none, or if it was the turn before that was taken back last."""
        if len(self.messages) <= self.turn[2]:
            return False
        self.messages = self.messages[: self.turn[2]]
        self._go_back(self.turn)
        return True

    def _render(self, messages: list[dict[str, str]], ask: bool) -> str:
        return self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=ask)

    def _go_back(self, turn: tuple[int, str, int]) -> None:
        # What get_logits() gives now is still of the text taken back: a token has to be appended first.
        self.generator.rewind_to(turn[0])
        self.text = turn[1]

    def _append(self, text: str) -> None:
        """Bring the states from `self.text` to `text`."""
        tokens = self.tokenizer.encode(text[len(self.text) :])
        if self.generator.token_count() + len(tokens) >= self.max_length:
            raise SystemExit(f"the conversation is longer than --max-length {self.max_length}")
        if len(tokens):
            self.generator.append_tokens(np.array([tokens], np.int32))
            self.text = text


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
        if message == "/undo":
            print("[the last turn is taken back]" if chat.undo() else "[nothing to take back]")
            continue
        for piece in chat.say(message, arguments.max_new_tokens):
            print(piece, end="", flush=True)
        print(f"\n[{chat.generator.token_count()} tokens]")


if __name__ == "__main__":
    main()
