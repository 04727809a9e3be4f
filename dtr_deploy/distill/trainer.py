"""One twin in training: its weights, its optimiser and one update; and the file that holds many of them half-way."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dtr_deploy.distill.files import write_safetensors
from dtr_deploy.distill.peers import Alone
from dtr_deploy.hybrid.mixer import HybridMixer, own_parameters

CHECKPOINT = "half_way-"
"""Of files of runs between two steps, before the step's number."""


@dataclass(frozen=True)
class DistillSettings:
    """tokens: budget of training tokens; batch_size: sequences a step; teacher_sequences: of one pass of the teacher,
    which several steps share, since large products are faster than small ones; learning_rate: of inherited projections;
    form_learning_rate: of a form's own parameters; calibrate: start forms from statistics of their teachers;
    checkpoint_seconds: how much a kill may cost.

    precision: of the products with large projections, in the teacher and in twins: "float32", "bfloat16" (through
    autocast; weights, optimiser, states and losses stay float32) or "auto", which is bfloat16 where the processor
    multiplies it natively. Errors are always reported in float32.
    """

    tokens: int = 100_000
    batch_size: int = 1
    teacher_sequences: int = 4
    learning_rate: float = 1e-3
    form_learning_rate: float = 2e-2
    warmup_steps: int = 10
    clip_norm: float = 1.0
    calibrate: bool = True
    seed: int = 0
    checkpoint_seconds: float = 60.0
    precision: str = "auto"


class Trainer:
    """One twin and its optimiser."""

    def __init__(self, backbone: Any, layer: int, form: str, window: int, settings: DistillSettings) -> None:
        # The seed depends on the twin alone, so that which other twins are trained does not matter.
        torch.manual_seed(settings.seed * 1_000_003 + layer)
        teacher = backbone.model.layers[layer].self_attn
        self.mixer = HybridMixer(teacher, backbone.config, form, window, layer)
        self.teacher = HybridMixer(teacher, backbone.config, form, window, layer)
        self.teacher.form.load_state_dict(self.mixer.form.state_dict())
        own_parameters(self.mixer)
        device = self.mixer.q_proj.weight.device
        self.mixer.form.to(device)
        self.teacher.form.to(device)
        self.mixer.requires_grad_(True)
        self.settings = settings
        inherited = [p for n, p in self.mixer.named_parameters() if not n.startswith("form.")]
        own = [p for n, p in self.mixer.named_parameters() if n.startswith("form.")]
        self.groups = [(inherited, settings.learning_rate), (own, settings.form_learning_rate)]
        self.optimizer = torch.optim.AdamW(
            [{"params": params, "lr": rate} for params, rate in self.groups], weight_decay=0.0, fused=True
        )

    def steps(
        self,
        first: int,
        steps: int,
        hidden: Tensor,
        target: Tensor,
        where: tuple[Tensor, Tensor],
        mixed: AbstractContextManager[Any],
    ) -> Tensor:
        """Updates `first`, `first` + 1, ... on `batch_size` sequences each; returns the last relative error, a scalar
        on the twin's device: to read it is to wait for all that was launched there."""
        size, error = self.settings.batch_size, hidden.new_full((), math.nan)
        for index, (x, y) in enumerate(zip(hidden.split(size), target.split(size), strict=True)):
            error = self._step(first + index, steps, x, y.float(), where, mixed)
        return error

    def _step(
        self,
        step: int,
        steps: int,
        hidden: Tensor,
        target: Tensor,
        where: tuple[Tensor, Tensor],
        mixed: AbstractContextManager[Any],
    ) -> Tensor:
        """One update; returns the relative error before it."""
        schedule = min(1.0, (step + 1) / self.settings.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, (_, rate) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = rate * max(schedule, 1e-3)
        with mixed:
            out, _ = self.mixer(hidden, where)
        loss = (out.float() - target).square().sum() / target.square().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.mixer.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        # Now, not before the next step: between steps all other twins' gradients would lie in memory too.
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        state = {f"weight.{n}": p.detach() for n, p in self.mixer.named_parameters()}
        state |= {f"start.{n}": p.detach() for n, p in self.teacher.form.named_parameters()}
        for n, p in self.mixer.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"optimizer.{key}.{n}"] = value.detach()
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for n, p in self.mixer.named_parameters():
            p.copy_(state[f"weight.{n}"])
            self.optimizer.state[p] = {
                key: state[f"optimizer.{key}.{n}"].to(p.device, copy=True) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        for n, p in self.teacher.form.named_parameters():
            p.copy_(state[f"start.{n}"])


class HalfWay:
    """The file that holds a run between two steps, named by the step. A kill leaves the old one or the new, or both;
    where several processes train together, those of each hold the last step that all of them had written."""

    def __init__(self, folder: Path, peers: Alone | None = None) -> None:
        self.folder, self.peers = folder, peers or Alone()

    def save(self, trainers: dict[tuple[int, str], Trainer], step: int, seconds: float) -> None:
        """seconds: spent until now."""
        tensors = {
            f"{layer}.{form}.{name}": tensor.contiguous()
            for (layer, form), trainer in trainers.items()
            for name, tensor in trainer.tensors().items()
        }
        write_safetensors(self._file(step), tensors, {"step": str(step), "seconds": str(seconds)})
        self.peers.gather(None)  # all of them have written it
        self.remove(but=step)

    def load(self, trainers: dict[tuple[int, str], Trainer]) -> tuple[int, float]:
        """(steps done, seconds spent), restoring the trainers; (0, 0.0) if there is nothing to go on from."""
        step = max(set.intersection(*self.peers.gather(set(self._steps()))), default=0)
        if not step:
            return 0, 0.0
        from safetensors import safe_open

        with safe_open(self._file(step), "pt") as file:
            metadata = file.metadata()
        tensors = load_file(self._file(step))
        for (layer, form), trainer in trainers.items():
            prefix = f"{layer}.{form}."
            trainer.restore({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        return step, float(metadata["seconds"])

    def remove(self, but: int | None = None) -> None:
        """The files of all steps but one, and what a kill left of writing them."""
        for path in self.folder.glob(f"{CHECKPOINT}*"):
            if but is None or path != self._file(but):
                path.unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self.folder / f"{CHECKPOINT}{step}.safetensors"

    def _steps(self) -> dict[int, Path]:
        return {
            int(path.stem.removeprefix(CHECKPOINT)): path for path in self.folder.glob(f"{CHECKPOINT}*.safetensors")
        }
