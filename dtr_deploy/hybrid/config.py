"""Configurations of the hybrid checkpoint: a family's own, plus `layer_types` and one dictionary, `dtr`.

Imports transformers only, so that a serving engine can read a checkpoint without the rest of the toolkit.

`dtr` holds: `version` (of this layout of the dictionary), `forms` (one name per layer, null for full attention),
`window` (tokens of the softmax branch, 0 for none), `state_dtype` (of the recurrent state), and where layers differ in
their windows `windows` (one number per layer, null for full attention), which then outranks `window`. Versions that
know no `windows` refuse it in one line, so it is only written where it is needed.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import FULL, LINEAR, Entry, Layout, entries, format_entry, layer_types

DTR_VERSION = 2
"""2: the linear branch is one more key of the window. In 1 a constant share per head mixed the two: other weights."""
STATE_DTYPES = ("float32", "bfloat16")


class HybridConfigMixin:
    """What the three families' configurations have in common."""

    def check_dtr(self) -> None:
        """Raise UsageError in one line if `dtr` and `layer_types` do not fit the model."""
        layers = self.num_hidden_layers  # type: ignore[attr-defined]
        dtr, types = getattr(self, "dtr", None) or {}, getattr(self, "layer_types", None) or []
        unknown = set(dtr) - {"version", "forms", "window", "windows", "state_dtype"}
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
        if not _is_window(window):
            raise UsageError(f"config.json: dtr.window {window!r}: accepted are {WINDOWS}")
        if "windows" in dtr:
            _check_windows(dtr["windows"], forms)

    @property
    def forms(self) -> tuple[str | None, ...]:
        """A form's name or None for each layer."""
        return tuple(self.dtr["forms"])  # type: ignore[attr-defined]

    @property
    def window(self) -> int:
        """Tokens of the softmax branch, 0 for none, of layers for which `dtr.windows` says nothing else."""
        return self.dtr["window"]  # type: ignore[attr-defined]

    @property
    def entries(self) -> tuple[Entry | None, ...]:
        """Form and window of each layer, None for full attention."""
        own = self.dtr.get("windows") or [self.window] * len(self.forms)  # type: ignore[attr-defined]
        return tuple(None if form is None else Entry(form, w) for form, w in zip(self.forms, own, strict=True))

    @property
    def layout(self) -> Layout:
        """The layout, with entries as in a recipe whose `window` is this configuration's."""
        return tuple(None if entry is None else format_entry(*entry, self.window) for entry in self.entries)

    @property
    def number_of_conv_states(self) -> int:
        """States of a linear layer in transformers' cache: the recurrent one, the window's and the convolution's. What
        a layer does not have stays empty."""
        return 3


WINDOWS = "whole numbers of tokens, 0 for none"


def _is_window(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_windows(own: Any, forms: list[str | None]) -> None:
    if not isinstance(own, list) or len(own) != len(forms):
        raise UsageError(f"config.json: dtr.windows needs {len(forms)} entries, one a layer")
    for layer, (window, form) in enumerate(zip(own, forms, strict=True)):
        if form is None and window is not None:
            raise UsageError(f"config.json: dtr.windows[{layer}] is {window!r}: accepted is null, as in dtr.forms")
        if form is not None and not _is_window(window):
            raise UsageError(f"config.json: dtr.windows[{layer}] is {window!r}: accepted are {WINDOWS}")


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
    """The configuration of `backbone` with layers replaced as `layout` says. window: of entries that name none.

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
    mixers = entries(layout, window)
    forms = [None if entry is None else entry.form for entry in mixers]
    dtr: dict[str, Any] = {"version": DTR_VERSION, "forms": forms, "window": window, "state_dtype": state_dtype}
    if any(entry is not None and entry.window != window for entry in mixers):
        dtr["windows"] = [None if entry is None else entry.window for entry in mixers]
    config = FAMILIES[family](**values, layer_types=layer_types(layout), dtr=dtr, architectures=[architecture(family)])
    config.check_dtr()  # type: ignore[attr-defined]
    return config
