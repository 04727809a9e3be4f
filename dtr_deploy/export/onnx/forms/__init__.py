"""One emitter a form: the ONNX counterpart of `dtr_kernels.forms`. A new form is a file here and a line below."""

from dtr_deploy.export.onnx.forms.base import FormEmitter
from dtr_deploy.export.onnx.forms.gated_deltanet import GatedDeltaNetEmitter
from dtr_deploy.export.onnx.forms.gla import GatedLinearAttentionEmitter
from dtr_deploy.export.onnx.forms.hedgehog import HedgehogEmitter
from dtr_deploy.export.onnx.forms.jet import JetEmitter

EMITTERS: dict[str, type[FormEmitter]] = {
    emitter.name: emitter
    for emitter in (GatedDeltaNetEmitter, GatedLinearAttentionEmitter, JetEmitter, HedgehogEmitter)
}

__all__ = ["EMITTERS", "FormEmitter"]
