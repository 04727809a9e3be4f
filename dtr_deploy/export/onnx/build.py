"""From a hybrid checkpoint, or an ordinary backbone, to a folder for ONNX Runtime.

The folder holds `model.onnx`, which gives the logits of each row's last token, `model_all_logits.onnx`, which gives
those of all tokens (for scores), `model.onnx.data` with the weights of both, `genai_config.json` and the tokenizer. It
appears whole or not at all.
"""

import contextlib
import copy
import importlib.metadata
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.placement import on_cpu

PRECISIONS = ("fp32", "fp16", "int8", "int4")
PROVIDERS = ("cpu", "cuda")
# The builders' API moves between releases, so the release is exact.
GENAI_VERSION = "0.18.0"
MODEL_FILE = "model.onnx"
ALL_LOGITS_FILE = "model_all_logits.onnx"

# model_type, of a backbone or of its hybrid -> the architecture whose builder and genai model type it takes.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class OnnxExport:
    """An exported folder. window: the largest of the linear layers, 0 for none; linear_layers: how many the model has;
    nodes: of the served graph."""

    folder: Path
    precision: str
    execution_provider: str
    window: int
    linear_layers: int
    nodes: int


def export_onnx(
    source: str | Path,
    out_folder: str | Path,
    precision: str = "int4",
    execution_provider: str = "cpu",
) -> OnnxExport:
    """Export a hybrid checkpoint (a folder) or a backbone (whatever `load_backbone` takes) to `out_folder`.

    Arguments as for `export_model`.
    """
    check_genai()
    check_options(precision, execution_provider)
    config = Path(source) / "config.json"
    if config.is_file() and "dtr" in json.loads(config.read_text()):
        from dtr_deploy.hybrid.model import load_hybrid

        model, tokenizer = load_hybrid(source)
    else:
        from dtr_deploy.hybrid.backbone import load_backbone

        backbone = load_backbone(str(source))
        model, tokenizer = backbone.model, backbone.tokenizer
    return export_model(model, tokenizer, out_folder, precision, execution_provider)


def export_model(
    model: Any,
    tokenizer: Any,
    out_folder: str | Path,
    precision: str = "int4",
    execution_provider: str = "cpu",
) -> OnnxExport:
    """Export a model in memory; it is not modified, and copied to the CPU if it lies elsewhere.

    Args:
        model: a hybrid, or a Llama, Qwen2 or Qwen3 causal LM, float32.
        tokenizer: saved beside the model.
        out_folder: replaced if it is there.
        precision: "fp32"; "int4" or "int8" for the weights of the large projections and the LM head (blocks of 32;
            forms, gates and states stay float32); "fp16" for weights and activations (forms and states stay float32).
        execution_provider: "cpu" or "cuda", what genai_config.json asks for.

    Raises:
        UsageError: onnxruntime-genai is missing or another release, or an option or a family is not supported.
    """
    check_genai()
    check_options(precision, execution_provider)
    family = model.config.model_type.removeprefix("dtr_")
    if family not in ARCHITECTURES:
        raise UsageError(f"model type {family!r} cannot be exported to ONNX: accepted are {', '.join(ARCHITECTURES)}")
    # Imports torch and transformers, and can only be imported where genai is installed.
    import onnx
    from onnxruntime_genai.models import builder as genai
    from onnxruntime_genai.models.builders.base import Model

    from dtr_deploy.export.onnx.builders import BUILDERS
    from dtr_deploy.export.onnx.last_token import with_all_logits

    model = on_cpu(model)
    config = _builder_config(model, ARCHITECTURES[family])
    mixers = [entry for entry in getattr(model.config, "entries", ()) if entry is not None]
    with _whole_folder(Path(out_folder)) as folder, _quiet():
        tokenizer.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        config._name_or_path = str(folder)
        genai.add_special_token_ids(config, tokenizer)
        cache = folder / ".cache"
        writer: Model = BUILDERS[ARCHITECTURES[family]](
            model,
            config,
            genai.set_io_dtype(precision, execution_provider, {}),
            genai.set_onnx_dtype(precision, {}),
            execution_provider,
            str(cache),
            {},
        )
        writer.make_model(str(folder))
        writer.save_model(str(folder))
        writer.make_genai_config(config, {}, str(folder))
        writer.save_processing(str(folder), {}, str(folder))
        shutil.rmtree(cache, ignore_errors=True)
        served = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
        onnx.save(with_all_logits(served), str(folder / ALL_LOGITS_FILE))
        for name in (MODEL_FILE, ALL_LOGITS_FILE):
            onnx.checker.check_model(str(folder / name))
        nodes = len(served.graph.node)
    window = max((entry.window for entry in mixers), default=0)
    return OnnxExport(Path(out_folder), precision, execution_provider, window, len(mixers), nodes)


def check_genai() -> None:
    """Raise UsageError unless onnxruntime-genai is the release the builders here extend."""
    for name in ("onnxruntime-genai", "onnxruntime-genai-cuda"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            if found != GENAI_VERSION:
                raise UsageError(
                    f"{name} {found} is installed, ONNX export needs {GENAI_VERSION}: "
                    f"pip install {name}=={GENAI_VERSION}"
                )
            return
    raise UsageError(f"ONNX export needs onnxruntime-genai: pip install onnxruntime-genai=={GENAI_VERSION}")


def check_options(precision: str, execution_provider: str) -> None:
    """Raise UsageError for a precision or a provider that is not supported, or not with the other."""
    if precision not in PRECISIONS:
        raise UsageError(f"ONNX precision {precision!r} is unknown; accepted: {', '.join(PRECISIONS)}")
    if execution_provider not in PROVIDERS:
        raise UsageError(f"execution provider {execution_provider!r} is unknown; accepted: {', '.join(PROVIDERS)}")
    if (precision, execution_provider) == ("fp32", "cuda"):
        # GroupQueryAttention has no float32 kernel there, and what the builders write instead has no KV cache.
        accepted = ", ".join(name for name in PRECISIONS if name != "fp32")
        raise UsageError(f"ONNX precision 'fp32' is not available for execution provider 'cuda'; accepted: {accepted}")


def _builder_config(model: Any, architecture: str) -> Any:
    """The model's configuration as the base builder wants it; a copy, since builders write into it."""
    config = copy.deepcopy(model.config)
    config.architectures = [architecture]
    # Neither hybrids nor the backbones we load have sliding layers; a left-over value would bound genai's KV cache.
    config.sliding_window = None
    return config


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes `out`'s place at the end and vanishes on an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield work
        work.chmod(0o755)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old)
            os.replace(work, out)
            shutil.rmtree(old)
        else:
            os.replace(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The builders report every layer, tensor and quantized node; errors come as exceptions all the same."""
    quantizer = logging.getLogger("onnxruntime.quantization")
    level = quantizer.level
    quantizer.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        quantizer.setLevel(level)
