"""Configurations of the hybrid checkpoint: a family's own, plus `layer_types` and one dictionary, `dtr`.

Imports transformers only, so that a serving engine can read a checkpoint without the rest of the toolkit.

`dtr` holds: `version` (of this layout of the dictionary), `forms` (one entry per layer, null for full attention),
`window` (tokens of the softmax branch, 0 for none), `state_dtype` (of the recurrent state).
"""

from typing import Any, ClassVar

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import FULL, LINEAR, Layout, layer_types

DTR_VERSION = 1
STATE_DTYPES = ("float32", "bfloat16")


class HybridConfigMixin:
    """What the three families' configurations have in common."""

    def check_dtr(self) -> None:
        """Raise UsageError in one line if `dtr` and `layer_types` do not fit the model."""
        layers = self.num_hidden_layers  # type: ignore[attr-defined]
        dtr, types = getattr(self, "dtr", None) or {}, getattr(self, "layer_types", None) or []
        unknown = set(dtr) - {"version", "forms", "window", "state_dtype"}
        if unknown:
            raise UsageError(f"config.json: unknown key dtr.{sorted(unknown)[0]}: made by a newer dtr-deploy?")
        if dtr.get("version") != DTR_VERSION:
            raise UsageError(f"config.json: dtr.version is {dtr.get('version')!r}, this version reads {DTR_VERSION}")
        forms = dtr.get("forms") or []
        if len(forms) != layers or len(types) != layers:
            raise UsageError(f"config.json: dtr.forms and layer_types need {layers} entries, one a layer")
        if list(types) != layer_types(forms):
            raise UsageError(
                f"config.json: layer_types has to be {LINEAR!r} where dtr.forms names a form, else {FULL!r}"
            )
        if all(form is not None for form in forms):
            raise UsageError("config.json: dtr.forms replaces every layer: at least one has to keep full attention")
        if dtr.get("state_dtype") not in STATE_DTYPES:
            raise UsageError(f"config.json: dtr.state_dtype {dtr.get('state_dtype')!r}: accepted are {STATE_DTYPES}")
        window = dtr.get("window")
        if not isinstance(window, int) or window < 0:
            raise UsageError(f"config.json: dtr.window {window!r}: accepted are whole numbers of tokens, 0 for none")

    @property
    def forms(self) -> Layout:
        """The layout: a form's name or None for each layer."""
        return tuple(self.dtr["forms"])  # type: ignore[attr-defined]

    @property
    def window(self) -> int:
        """Tokens of the softmax branch, 0 for none."""
        return self.dtr["window"]  # type: ignore[attr-defined]

    @property
    def number_of_conv_states(self) -> int:
        """States of a linear layer in transformers' cache: the recurrent one, the window's and the convolution's. What
        a layer does not have stays empty."""
        return 3


class DtrLlamaConfig(HybridConfigMixin, LlamaConfig):
    model_type: ClassVar[str] = "dtr_llama"
    layer_types: list[str] | None = None
    dtr: dict[str, Any] | None = None


class DtrQwen2Config(HybridConfigMixin, Qwen2Config):
    model_type: ClassVar[str] = "dtr_qwen2"
    dtr: dict[str, Any] | None = None


class DtrQwen3Config(HybridConfigMixin, Qwen3Config):
    model_type: ClassVar[str] = "dtr_qwen3"
    dtr: dict[str, Any] | None = None


FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": DtrLlamaConfig,
    "qwen2": DtrQwen2Config,
    "qwen3": DtrQwen3Config,
}


def architecture(family: str) -> str:
    """'qwen2' -> 'DtrQwen2ForCausalLM', the name in a checkpoint's config.json."""
    return {"llama": "DtrLlama", "qwen2": "DtrQwen2", "qwen3": "DtrQwen3"}[family] + "ForCausalLM"


def register_configs() -> None:
    """Make AutoConfig read hybrid checkpoints. May be called any number of times."""
    for config in FAMILIES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)


def hybrid_config(backbone: PreTrainedConfig, layout: Layout, window: int, state_dtype: str = "float32") -> Any:
    """The configuration of `backbone` with layers replaced as `layout` says.

    Raises UsageError for a family that is not supported or a layout that does not fit.
    """
    family = backbone.model_type
    if family not in FAMILIES:
        raise UsageError(f"model type {family!r} is not supported: accepted are {', '.join(FAMILIES)}")
    values = backbone.to_dict()
    for key in ("model_type", "architectures", "layer_types", "transformers_version", "quantization_config"):
        values.pop(key, None)
    if len(layout) != backbone.num_hidden_layers:
        raise UsageError(f"layout has {len(layout)} entries, the model has {backbone.num_hidden_layers} layers")
    dtr = {"version": DTR_VERSION, "forms": list(layout), "window": window, "state_dtype": state_dtype}
    config = FAMILIES[family](**values, layer_types=layer_types(layout), dtr=dtr, architectures=[architecture(family)])
    config.check_dtr()  # type: ignore[attr-defined]
    return config
