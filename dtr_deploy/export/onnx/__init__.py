"""Export to ONNX: a folder that stock onnxruntime-genai and plain onnxruntime run.

`export_onnx` and `export_model` are in `build`; importing this package imports neither torch nor onnxruntime.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtr_deploy.export.onnx.build import OnnxExport, export_model, export_onnx

__all__ = ["OnnxExport", "export_model", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dtr_deploy.export.onnx import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
