"""The two ONNX examples run as a reader would run them."""

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


def test_genai_chat_of_two_turns(exported):
    _, folder = exported()
    output = run("onnx_genai_chat.py", str(folder), "--max-new-tokens", "5", "--message", "ab", "--message", "cd")
    assert output.count("tokens]") == 2
