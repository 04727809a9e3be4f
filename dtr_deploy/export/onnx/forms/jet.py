"""`dtr_kernels.forms.Jet` as nodes: Gated DeltaNet's, and the taps of its convolution."""

from typing import ClassVar

from dtr_deploy.export.onnx.call import LEAD
from dtr_deploy.export.onnx.forms.gated_deltanet import GatedDeltaNetEmitter
from dtr_deploy.export.onnx.graph import FLOAT, parameter_name


class JetEmitter(GatedDeltaNetEmitter):
    name: ClassVar[str] = "jet"

    def taps(self, hidden: str) -> str:
        graph, form, at = self.graph, self.form, f"{self.at}/taps"
        kernel, channels, width = form.tap_weight.shape
        inner = graph.linear(hidden, form.tap_down.weight, f"{at}/down")
        gate = graph.node("Sigmoid", [inner], f"{at}/silu/Sigmoid", FLOAT, [*LEAD, width])
        inner = graph.node("Mul", [inner, gate], f"{at}/silu/Mul", FLOAT, [*LEAD, width])
        taps = graph.linear(inner, form.tap_weight.flatten(0, 1), f"{at}/up")
        bias = graph.initializer(form.tap_bias.flatten(), f"{parameter_name(at)}.bias")
        return graph.node("Add", [taps, bias], f"{at}/Add", FLOAT, [*LEAD, kernel * channels])
