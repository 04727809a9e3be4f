"""The ONNX examples run as a reader would run them."""

import shutil
import subprocess
import sys
from pathlib import Path

from dtr_deploy.engines.torch import TorchEngine

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_onnxruntime(exported):
    import tiny

    model, folder = exported()
    tokenizer = tiny.tiny_tokenizer()
    prompt = tokenizer("abcd")["input_ids"]
    expected = TorchEngine(model).generate([prompt], 6)[0]
    if 2 in expected:
        expected = expected[: expected.index(2)]
    output = run("onnxruntime_plain.py", str(folder), "--prompt", "abcd", "--max-new-tokens", "6")
    assert tokenizer.decode(prompt + expected, skip_special_tokens=True) in output
    assert f"[{len(expected)} tokens" in output


def turns(output: str) -> list[str]:
    """What came after each message."""
    return [part.split("\n", 1)[1] for part in output.split("> ")[1:]]


def chat(folder: Path, *messages: str) -> list[str]:
    arguments = [part for message in messages for part in ("--message", message)]
    return turns(run("onnx_genai_chat.py", str(folder), "--max-new-tokens", "5", *arguments))


def test_genai_chat_of_two_turns(exported):
    _, folder = exported()
    assert [answer.count("tokens]") for answer in chat(folder, "ab", "cd")] == [1, 1]


def test_genai_chat_takes_a_turn_back(exported):
    _, folder = exported()
    first, second, undone, again, *rest = chat(folder, "ab", "cd", "/undo", "cd", "/undo", "/undo", "ef")
    assert second == again and "taken back" in undone
    assert "taken back" in rest[0] and "nothing to take back" in rest[1]
    assert [first, rest[2]] == chat(folder, "ab", "ef")


def test_genai_chat_with_a_template_that_changes_answers(exported, tmp_path):
    """It leaves out what was answered, so the states have to go back to where the last turn began."""
    _, folder = exported()
    shutil.copytree(folder, tmp_path / "onnx")
    template = tmp_path / "onnx" / "chat_template.jinja"
    told = template.read_text()
    told = told.replace("message['content']", "'---' if message['role'] == 'assistant' else message['content']")
    assert told != template.read_text()
    template.write_text(told)
    counts = [answer.splitlines()[-1] for answer in chat(tmp_path / "onnx", "ab", "cd", "ef")]
    # <|user|>ab<|end|><|assistant|> and 5 tokens; each earlier turn then has ---<|end|> instead of its 5 tokens.
    assert counts == [f"[{5 * turn + 4 * (turn - 1) + 5} tokens]" for turn in (1, 2, 3)]


def test_batch_on_plain_onnxruntime(exported):
    import tiny

    model, folder = exported()
    tokenizer, system = tiny.tiny_tokenizer(), "the same beginning of all "
    arguments = ("--prompt", "abcd", "--prompt", "xyz", "--prompt", "q", "--abort-after", "2", "--slots", "2")
    output = run("onnxruntime_batch.py", str(folder), "--system", system, "--max-new-tokens", "6", *arguments)
    for number, (prompt, length) in enumerate((("abcd", 6), ("xyz", 6), ("q", 2))):
        expected = TorchEngine(model).generate([tokenizer(system + prompt)["input_ids"]], length)[0]
        assert 2 not in expected
        end = "aborted" if prompt == "q" else "length"
        answer = tokenizer.decode(expected, skip_special_tokens=True)
        assert f"{number} ended ({end}, {16 if number else 0} tokens not computed): {answer!r}" in output
    assert "2 slots" in output and "2 free]" in output
