"""Where a step of stage 1 spends its time: timers around public functions, without a change to what is timed.

The teacher pass is `FusedTeacher` or `attention_activations`, whichever `dtr_deploy.distill.stage` calls, forward is
`HybridMixer.forward`, backward is `torch.autograd.backward` (which `Tensor.backward` calls), the optimiser is
`torch.optim.Optimizer.step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

PARTS = ("teacher", "forward", "backward", "optimizer")


def device_clock() -> float:
    """Seconds, read when all GPUs have done what was launched on them: parts that only launch would cost nothing."""
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.synchronize(number)
    return time.perf_counter()


class StepTimes:
    """Seconds of each part, step after step.

    steps: one dictionary a step, with `PARTS`, "other" (what no timer saw) and "total". seen: parts whose function
    was called at all; one that never was is not a part that costs nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.steps: list[dict[str, float]] = []
        self.seen: set[str] = set()
        self._clock = clock
        self._now = dict.fromkeys(PARTS, 0.0)
        self._began: float | None = None
        self._open: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`; a part inside a part belongs to the outer one."""
        if self._open is not None:
            yield
            return
        self._open, began = name, self._clock()
        self.seen.add(name)
        try:
            yield
        finally:
            self._now[name] += self._clock() - began
            self._open = None

    def step_done(self) -> None:
        """A step ended, and the next one begins. What came before the first call is not a step: it set things up."""
        now = self._clock()
        if self._began is not None:
            total = now - self._began
            self.steps.append({**self._now, "other": total - sum(self._now.values()), "total": total})
        self._began = now
        self._now = dict.fromkeys(PARTS, 0.0)


def _timed(times: StepTimes, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with times.part(name):
            return function(*args, **options)

    return call


@contextmanager
def timed_parts(times: StepTimes) -> Iterator[None]:
    """While this is open, the functions above are timed. Optimisers made before are not."""
    from dtr_deploy.distill import stage
    from dtr_deploy.distill.fused_teacher import FusedTeacher
    from dtr_deploy.hybrid.mixer import HybridMixer

    began: list[Any] = []

    def before_step(*_: Any) -> None:
        context = times.part("optimizer")
        context.__enter__()
        began.append(context)

    def after_step(*_: Any) -> None:
        began.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for owner, attribute, name in (
            (stage, "attention_activations", "teacher"),
            (FusedTeacher, "__call__", "teacher"),
            (HybridMixer, "forward", "forward"),
            (torch.autograd, "backward", "backward"),
        ):
            function = getattr(owner, attribute, None)
            if function is not None:  # what is not there under its name is "not seen"
                stack.enter_context(patch.object(owner, attribute, _timed(times, name, function)))
        for handle in (
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
        ):
            stack.callback(handle.remove)
        yield
