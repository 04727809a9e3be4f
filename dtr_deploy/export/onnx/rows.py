"""The rows of keys and values that a linear layer carries from call to call: its `past.N.conv`.

Two readers: the softmax window (keys and values of the last W tokens) and the dynamic convolution of a form (values of
the last K - 1 tokens, which are the window's own where it is as long). onnxruntime-genai wants one shape for all
layers, so the state is as large as the layer with most rows needs it; a layer that needs fewer has its own in the
corner behind them, and zeros before. Zeros are an empty state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dtr_deploy.export.onnx.call import LEAD, Call
from dtr_deploy.export.onnx.graph import END, FLOAT, INT64, Graph, Shape


@dataclass(frozen=True)
class CarriedRows:
    """Rows [batch, count, width] of one layer, or of `past.N.conv` in a model, oldest row first.

    A row is k and v side by side, each kv_size = Hkv * D wide, or v alone without a window. `width` is 1 and `count` is
    1, unused, where nothing is carried: stock onnxruntime-genai wants such a state for every layer.
    """

    window: int
    conv: int
    kv_size: int

    @classmethod
    def of(cls, forms: Iterable[Any], kv_size: int) -> "CarriedRows":
        """The rows that fit every one of the forms: all of a model's, or one layer's."""
        forms = list(forms)
        window = max((form.config.window for form in forms), default=0)
        return cls(window, max((form.conv_kernel - 1 for form in forms if form.conv_kernel), default=0), kv_size)

    @property
    def used(self) -> bool:
        return self.window > 0 or self.conv > 0

    @property
    def count(self) -> int:
        return max(self.window, self.conv, 1)

    @property
    def width(self) -> int:
        return (2 * self.kv_size if self.window else self.kv_size) if self.used else 1


def make_kept(graph: Graph, call: Call, count: int) -> str:
    """int64 [B, count, 1]: which of the count + T rows of a call the next one gets, those that end at a row's last real
    token. For GatherND with batch_dims 1; once a call and count."""
    at = f"/model/rows/kept_{count}"
    shape: Shape = ["batch_size", count]
    ages = graph.initializer(torch.arange(count), f"model.rows.ages_{count}", INT64)
    kept = graph.node("Add", [call.new.real_count, ages], f"{at}/Add", INT64, shape)
    return graph.node("Unsqueeze", [kept, graph.int64([2])], f"{at}/Unsqueeze", INT64, [*shape, 1])


def make_zero_row(graph: Graph, call: Call, width: int) -> str:
    """[B,1,width] of zeros, behind a call's rows: the key of what lies outside the window. Once a call and width."""
    at = f"/model/rows/zeros_{width}"
    stored = graph.initializer(torch.zeros(1, 1, width), f"model.rows.zeros_{width}")
    of_rows = graph.node("Gather", [call.real, graph.int64([0])], f"{at}/Gather", FLOAT, ["batch_size", 1, 1], axis=1)
    return graph.node("Mul", [of_rows, stored], f"{at}/Mul", FLOAT, ["batch_size", 1, width])


def make_rows(
    graph: Graph,
    at: str,
    rows: CarriedRows,
    largest: CarriedRows,
    kept: str,
    zeros: str,
    k: str,
    v: str,
    past: str,
    present: str,
) -> str:
    """k, v [B,T,kv_size] float32 -> the carried rows and the new ones, and with a window the row of `zeros` behind
    them, [B, count + T (+ 1), width]; writes the graph output `present`.

    rows: the layer's own, largest: the model's. `past` is read by one node only, on whose result the node that writes
    `present` depends: the two may be one buffer.
    """
    before, beside = largest.count - rows.count, largest.width - rows.width
    fits = before == beside == 0
    if not fits:
        own: Shape = ["batch_size", rows.count, rows.width]
        inputs = [past, graph.int64([before, beside]), graph.int64([END, END]), graph.int64([1, 2])]
        past = graph.node("Slice", inputs, f"{at}/past/Slice", FLOAT, own)
    new = v
    if rows.window:
        new = graph.node("Concat", [k, v], f"{at}/new/Concat", FLOAT, [*LEAD, rows.width], axis=2)
    parts = [past, new, zeros] if rows.window else [past, new]
    every = graph.node(
        "Concat", parts, f"{at}/Concat", FLOAT, ["batch_size", _with_new(rows, rows.count), rows.width], axis=1
    )
    name = f"{at}/present/GatherND"
    carried = present if fits else f"{name}/output_0"
    graph.builder.make_node("GatherND", inputs=[every, kept], outputs=[carried], name=name, batch_dims=1)
    if not fits:
        graph.builder.make_value(carried, FLOAT, shape=own)
        pads = graph.int64([0, before, beside, 0, 0, 0])
        graph.builder.make_node("Pad", inputs=[carried, pads], outputs=[present], name=f"{at}/present/Pad")
    return every


def window_rows(graph: Graph, at: str, rows: CarriedRows, every: str) -> str:
    """The W rows before a call's first token, its own, and one of zeros, [B, W + T + 1, 2*kv_size]."""
    return _last(graph, at, every, rows, rows.window, rows.width)


def conv_rows(graph: Graph, at: str, rows: CarriedRows, every: str, kernel: int) -> str:
    """v of the kernel - 1 rows before a call's first token and of its own, [B, kernel - 1 + T, kv_size]; with a window
    there is one more row behind them."""
    return _last(graph, at, every, rows, kernel - 1, rows.kv_size)


def _last(graph: Graph, at: str, every: str, rows: CarriedRows, before: int, width: int) -> str:
    """The last `before` + T rows and `width` channels of `every`."""
    starts = [rows.count - before, rows.width - width]
    if starts == [0, 0]:
        return every
    inputs = [every, graph.int64(starts), graph.int64([END, END]), graph.int64([1, 2])]
    return graph.node("Slice", inputs, f"{at}/Slice", FLOAT, ["batch_size", _with_new(rows, before), width])


def _with_new(rows: CarriedRows, before: int) -> str:
    """Name of the dimension of `before` + T rows and the zeros. onnxruntime takes dimensions of one name for equal."""
    return f"{before + (rows.window > 0)}+sequence_length"
