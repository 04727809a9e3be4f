"""The truth a contender is held to before it is timed, in float64, and the error it is held by.

The rule is the token loop of `dtr_kernels.reference`; softmax and the form are written out here, independently of the
modules that are timed. Gradients of long sequences come from the chunked form in float64, since autograd through the
token loop keeps every state; the outputs of that form are then held to the token loop's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.problem import Inputs
from dtr_kernels.chunked import linear_attention_chunked
from dtr_kernels.reference import linear_attention_reference

LOOP_GRADIENTS = 256
"""Longest sequence whose gradients are taken through the token loop."""

TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest error, by the contender's dtype, at which it still computes the same thing. Wide on purpose: this separates
a different function from rounding; the error itself is in the table."""

QUERY_BLOCK = 1024


def relative_error(got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """max |got - truth| / max |truth|, of the worst of the tensors that the contender gave. inf if one is not finite.

    Raises ValueError for a tensor of another shape, or if there is nothing to compare.
    """
    if not got:
        raise ValueError("the contender returned nothing to compare")
    worst = 0.0
    for name, tensor in got.items():
        expected = truth[name]
        if tensor.shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
        difference = (tensor.detach().double().to(expected.device) - expected).abs().max() / expected.abs().max()
        worst = max(worst, difference.item()) if torch.isfinite(difference) else float("inf")
    return worst


class Oracle:
    """Answers for one problem, each computed when it is first asked for."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._known: dict[str, tuple[dict[str, Tensor], str]] = {}

    def truth(self, computes: str) -> tuple[dict[str, Tensor], str]:
        """(tensors by name, how they were computed). Names: out, state; with d_ for gradients."""
        if computes not in self._known:
            self._known[computes] = self._compute(computes)
        return self._known[computes]

    def _compute(self, computes: str) -> tuple[dict[str, Tensor], str]:
        x, problem = self.inputs, self.inputs.problem
        with torch.no_grad():
            if computes == "rule":
                out, state = self._rule(x.q, x.k, x.v, x.log_decay, x.beta, x.state)
                answer = {"out": out, "state": state}
            elif computes == "softmax":
                answer = {"out": self._softmax(0)}
            elif computes == "window":
                answer = {"out": self._softmax(problem.window)}
            else:
                return {"out": self._form(computes == "form + window")}, "token loop, float64"
        if problem.direction != "backward":
            return answer, "token loop, float64" if computes == "rule" else "float64"
        gradients, method = self._gradients(computes, answer["out"])
        return {"out": answer["out"], **gradients}, method

    def _rule(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        problem = self.inputs.problem
        return linear_attention_reference(
            q, k, v, rule=problem.rule, log_decay=log_decay, beta=beta, scale=q.shape[-1] ** -0.5, state=state
        )

    def _gradients(self, computes: str, out: Tensor) -> tuple[dict[str, Tensor], str]:
        x = self.inputs
        names = ["q", "k", "v"] + (["log_decay", "beta"] if computes == "rule" else [])
        leaves = {name: getattr(x, name).clone().requires_grad_() for name in names if getattr(x, name) is not None}
        if computes != "rule":
            window = x.problem.window if computes == "window" else 0
            again = _causal_softmax(leaves["q"], leaves["k"], leaves["v"], window)
            method = "autograd, float64"
        elif x.problem.length <= LOOP_GRADIENTS:
            operands = [leaves.get(name) for name in ("log_decay", "beta")]
            again, _ = self._rule(leaves["q"], leaves["k"], leaves["v"], operands[0], operands[1], x.state)
            method = "autograd through the token loop, float64"
        else:
            again, _ = linear_attention_chunked(
                leaves["q"],
                leaves["k"],
                leaves["v"],
                rule=x.problem.rule,
                log_decay=leaves.get("log_decay"),
                beta=leaves.get("beta"),
                scale=x.q.shape[-1] ** -0.5,
                state=x.state,
            )
            if relative_error({"out": again}, {"out": out}) > TOLERANCES["float64"]:
                raise RuntimeError("the chunked form in float64 is not the token loop: no gradients to compare with")
            method = "autograd through the chunked form in float64, its output held to the token loop"
        gradients = torch.autograd.grad(again, list(leaves.values()), x.cotangent)
        return {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}, method

    def _softmax(self, window: int, logit: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """logit [Hq], value [B,T,Hq,D]: of one more key that every query sees."""
        x = self.inputs
        if x.problem.direction != "decode":
            return _causal_softmax(x.q, x.k, x.v, window, logit, value)
        keys, values = x.context(window or x.problem.length)
        rows = []
        for r in range(x.problem.batch):  # one sequence at a time: the context in float64 is large
            k = torch.cat([keys[r : r + 1].double(), x.k[r : r + 1]], 1)[:, -window:]
            v = torch.cat([values[r : r + 1].double(), x.v[r : r + 1]], 1)[:, -window:]
            rows.append(_causal_softmax(x.q[r : r + 1], k, v, 0, logit, None if value is None else value[r : r + 1]))
        return torch.cat(rows)

    def _form(self, with_window: bool) -> Tensor:
        """Gated DeltaNet with the parameters of `form_parameters`: arXiv 2412.06464, and the mix of both branches."""
        x = self.inputs
        p = {name: value.to(x.q.device).double() for name, value in form_parameters(x).items()}
        hidden = x.hidden
        log_decay = -p["decay_log_rate"].exp() * torch.nn.functional.softplus(
            hidden @ p["decay_proj.weight"].T + p["decay_proj.bias"]
        )
        beta = torch.sigmoid(hidden @ p["beta_proj.weight"].T + p["beta_proj.bias"])
        unit = lambda a: a / (a.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
        state = x.state if x.problem.direction == "decode" else torch.zeros_like(x.state)
        out, _ = self._rule(unit(x.q), unit(x.k), x.v, log_decay, beta, state)
        out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["out_gain"]
        if not with_window:
            return out
        return self._softmax(x.problem.window, p["rest_logit"], out)


def form_parameters(inputs: Inputs) -> dict[str, Tensor]:
    """Parameters of a Gated DeltaNet with a window, float32: at random, so that every one of them shows."""
    s = inputs.problem.shape
    generator = torch.Generator().manual_seed(1)
    width = s.query_heads * s.head_dim

    def draw(spread: float, *size: int) -> Tensor:
        return spread * torch.randn(size, generator=generator)

    return {
        "decay_proj.weight": draw(width**-0.5, s.kv_heads, width),
        "decay_proj.bias": draw(0.5, s.kv_heads),
        "decay_log_rate": draw(0.5, s.kv_heads) - 3.0,
        "beta_proj.weight": draw(width**-0.5, s.kv_heads, width),
        "beta_proj.bias": draw(0.5, s.kv_heads),
        "out_gain": 1 + draw(0.3, s.query_heads, s.head_dim),
        "rest_logit": 2 + draw(0.5, s.query_heads),
    }


def _causal_softmax(
    q: Tensor, k: Tensor, v: Tensor, window: int, logit: Tensor | None = None, value: Tensor | None = None
) -> Tensor:
    """q [B,T,Hq,D] are the last T of the tokens of k, v [B,N,Hkv,D] -> [B,T,Hq,D]; window 0 sees all before it.

    A block of queries of one kv head at a time, so that the weights of a long sequence fit the memory.
    """
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    behind = k.shape[1] - length
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        i = torch.arange(start, stop, device=q.device)[:, None] + behind
        j = torch.arange(behind + stop, device=q.device)[None]
        hidden = (j > i) if not window else (j > i) | (j <= i - window)
        heads = []
        for h in range(k.shape[2]):
            queries = q[:, start:stop, h * group : (h + 1) * group].transpose(1, 2)  # [B,group,C,D]
            logits = queries @ k[:, None, : behind + stop, h].mT * q.shape[-1] ** -0.5
            weights = logits.masked_fill(hidden, -torch.inf)
            own = slice(h * group, (h + 1) * group)
            if logit is not None:
                weights = torch.cat([weights, logit[own, None, None].expand(*weights.shape[:-1], 1)], -1)
            weights = weights.softmax(-1)
            out = (weights[..., : behind + stop] @ v[:, None, : behind + stop, h]).transpose(1, 2)
            if value is not None:
                out = out + weights[..., -1].transpose(1, 2)[..., None] * value[:, start:stop, own]
            heads.append(out)
        blocks.append(torch.cat(heads, 2))
    return torch.cat(blocks, 1)
