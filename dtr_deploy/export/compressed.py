"""A checkpoint with its large projections in 8 bits, in the compressed-tensors format that vLLM reads.

Round-to-nearest, without data: weights get one scale an output channel, activations one a token while serving (the
schemes "W8A8" and "FP8_DYNAMIC" of compressed-tensors). Projections of attention and MLP are quantized; forms, norms,
embedding and head are left as they are. Scales, rounding and the configuration are compressed-tensors' own.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dtr_deploy.errors import UsageError

SCHEMES = {"int8": ("W8A8", "int-quantized"), "fp8": ("FP8_DYNAMIC", "float-quantized")}
"""Precision -> compressed-tensors' name of the scheme, and of the format on disk."""

PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
IGNORED = ["lm_head", r"re:.*\.self_attn\.form\..*"]
INDEX = "model.safetensors.index.json"


def quantize_checkpoint(source: str | Path, target: str | Path, precision: str = "int8") -> list[Path]:
    """Write the checkpoint folder `source`, a hybrid or an ordinary backbone, to `target` with quantized projections.

    One file of safetensors is held in memory at a time. `target` appears when all of it is written, or not at all.

    Args:
        source: a folder with config.json and safetensors in float32, bfloat16 or float16.
        target: a folder that does not exist yet.
        precision: "int8" or "fp8" (e4m3).

    Returns:
        The files written.

    Raises:
        UsageError: a precision, source or target that cannot be used, or compressed-tensors is not installed (it comes
            with vLLM).
    """
    source, target = Path(source), Path(target)
    _check(source, target, precision)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(source, scratch, precision)
        scratch.chmod(0o755)  # mkdtemp's folders are for their owner alone
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return sorted(file for file in target.rglob("*") if file.is_file())


def _check(source: Path, target: Path, precision: str) -> None:
    if find_spec("compressed_tensors") is None:
        raise UsageError("quantized checkpoints need compressed-tensors, which vLLM brings: it is not installed")
    if precision not in SCHEMES:
        raise UsageError(f"precision {precision!r}: accepted are {', '.join(SCHEMES)}")
    if target.exists():
        raise UsageError(f"{target}: exists already; expected a folder to be made")
    config = source / "config.json"
    if not config.is_file():
        raise UsageError(f"{source}: no config.json there; a Hugging Face checkpoint folder is needed")
    if "quantization_config" in json.loads(config.read_text()):
        raise UsageError(f"{config}: the checkpoint is quantized already; expected one that is not")
    if not any(source.glob("*.safetensors")):
        raise UsageError(f"{source}: no safetensors there; a checkpoint with its weights is needed")


def _write(source: Path, folder: Path, precision: str) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from safetensors.torch import save_file

    name, disk_format = SCHEMES[precision]
    scheme = preset_name_to_scheme(name, ["Linear"])
    weight_map, size = {}, 0
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file() and file.name not in ("config.json", INDEX):
                shutil.copyfile(file, folder / file.name)
            continue
        tensors = dict(_quantized(file, scheme, disk_format))
        save_file(tensors, folder / file.name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file.name))
        size += sum(tensor.nbytes for tensor in tensors.values())
    if not any(PROJECTION.fullmatch(tensor) for tensor in weight_map):
        raise UsageError(f"{source}: no projections of a Llama, Qwen2 or Qwen3 in its safetensors")
    if (source / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _quantization_config(scheme, disk_format)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _quantized(file: Path, scheme: Any, disk_format: str) -> Iterator[tuple[str, Any]]:
    """The tensors of a file, with each projection's weight replaced by its integers (or float8) and its scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors import safe_open

    compressor = BaseCompressor.get_value_from_registry(disk_format)
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            tensor = opened.get_tensor(name)
            if not PROJECTION.fullmatch(name):
                yield name, tensor
                continue
            lowest, highest = tensor.aminmax(dim=1, keepdim=True)
            scale, _ = calculate_qparams(lowest.float(), highest.float(), scheme.weights)
            # Scales keep the weight's dtype on disk, so the rounding has to see them in it.
            state = {"weight": tensor, "weight_scale": scale.to(tensor.dtype)}
            module = name.removesuffix(".weight")
            for part, value in compressor.compress(state, scheme).items():
                yield f"{module}.{part}", value.contiguous()


def _quantization_config(scheme: Any, disk_format: str) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=disk_format,
        ignore=IGNORED,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return config.model_dump(mode="json", exclude_none=True)
