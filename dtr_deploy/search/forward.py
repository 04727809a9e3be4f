"""Hidden states of many layouts: what they share is computed once, what an earlier call kept is not computed again.

A search runs hundreds of layouts that share most of their layers. `LayerPool` holds one decoder layer per (layer,
form), all sharing the backbone's weights, so that a layout is a choice among modules and never a copy of the model.
`PrefixForward` runs a fixed set of batches. The layouts of one call are walked as a tree: as long as they agree they
are one hidden state. Between calls it keeps the hidden states at the borders between layers of one layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.model import Twins, make_twin
from dtr_deploy.search.layer_runs import LayerRuns, ModuleRuns
from dtr_deploy.search.packed_runs import PackedRuns
from dtr_deploy.tasks.scoring import ScoringBatch

CALL_TOKENS = 2048
"""Padded tokens that layouts are put together for in one call of a layer: more are no faster."""
LAYOUTS_AT_ONCE = 16
"""Layouts walked side by side at most: all of them are finished together."""
LIVE_BYTES = 1 << 30
"""Hidden states alive at once in a walk, at most (but for one layout's)."""


class LayerPool:
    """The backbone's decoder layers and, for every distilled twin, the same layer with the twin as its attention.

    Modules are shared with the backbone, which is not modified: a twin costs the memory of its own weights.
    """

    def __init__(self, backbone: Any, twins: Twins, window: int) -> None:
        self.backbone, self.twins, self.window = backbone, twins, window
        self.layers: list[dict[str | None, nn.Module]] = []
        self._runs: dict[torch.dtype, LayerRuns] = {}
        for index, layer in enumerate(backbone.model.layers):
            forms: dict[str | None, nn.Module] = {None: layer}
            for form in sorted(form for number, form in twins if number == index):
                mixer = make_twin(layer.self_attn, backbone.config, index, form, window, twins)
                forms[form] = _with_attention(layer, mixer.train(backbone.training))
            self.layers.append(forms)

    def check(self, layout: Layout) -> None:
        """Raises `UsageError` for a layout of another length or without a distilled twin."""
        if len(layout) != len(self.layers):
            raise UsageError(f"layout has {len(layout)} entries, the model has {len(self.layers)} layers")
        for index, form in enumerate(layout):
            if form not in self.layers[index]:
                raise UsageError(f"no distilled twin for layer {index}, form {form!r}")

    def runs(self, products: torch.dtype) -> LayerRuns:
        """How layers are run with products in this dtype; one for all that ask, since it may hold converted weights."""
        if products not in self._runs:
            if PackedRuns.fits(self.backbone, products):
                self._runs[products] = PackedRuns(self.backbone, self.layers, products)
            else:
                self._runs[products] = ModuleRuns(self.backbone, self.layers, self.window, products)
        return self._runs[products]


class _Group(NamedTuple):
    """A hidden state and the layouts (by number) that have it in common so far."""

    hidden: Tensor
    members: list[int]


class PrefixForward:
    """Final-norm hidden states of `batches` under layouts of `pool`.

    stride: hidden states are kept at every `stride`-th border between layers, of one layout of the last call; 0 keeps
    none. A layout starts at the last kept border before its first layer that differs from the kept one. `border_bytes`
    says what a set takes at stride 1.
    products: dtype that linear layers multiply in; hidden states are float32 all the same.
    runs: how layers are run, the pool's own way if None.

    Columns shared by the rows of neighbouring batches (few-shot examples) are run once for every distinct beginning of
    the layouts of a call, and each layer's cache of them is repeated over a batch's rows for the time of that layer.
    `layer_forwards` counts decoder layers run, each over one sequence; `shares` is what the layouts of the last call
    had of them, a layer that served several being divided among them.
    """

    def __init__(
        self,
        pool: LayerPool,
        batches: Sequence[ScoringBatch],
        stride: int = 1,
        products: torch.dtype = torch.float32,
        runs: LayerRuns | None = None,
    ) -> None:
        self.pool, self.batches, self.stride = pool, list(batches), stride
        self.runs = pool.runs(products) if runs is None else runs
        self.layer_forwards = 0
        self.shares: list[float] = []
        self._plans = _plans(self.batches)
        self._last: Layout | None = None
        self._borders: list[dict[int, Tensor]] = []
        self._shared_borders: list[dict[int, Tensor]] = []
        self.forget()
        self._check_lengths()

    @staticmethod
    def border_bytes(batches: Sequence[ScoringBatch], config: Any) -> int:
        """Bytes of the hidden states (float32) at every border between layers, at most."""
        return 4 * config.hidden_size * config.num_hidden_layers * sum(batch.tokens for batch in batches)

    @property
    def kept_bytes(self) -> int:
        """Bytes of hidden states kept now."""
        kept = [tensor for borders in [*self._borders, *self._shared_borders] for tensor in borders.values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)

    def hidden(self, layout: Layout) -> Iterator[Tensor]:
        """Of each batch in order, lazily: [B, T - shared, H]. Exhaust it before the next call."""
        for _, _, hidden in self.hidden_many([layout]):
            yield hidden

    def hidden_many(self, layouts: Sequence[Layout]) -> Iterator[tuple[int, int, Tensor]]:
        """(number of the layout, number of the batch, hidden [B, T - shared, H]), lazily; each pair once.

        Of one layout the batches come in order, and a layout's last batch comes before the walk of the next layouts
        begins. Exhaust it before the next call. Raises `UsageError` for a layout that the pool does not have.
        """
        for layout in layouts:
            self.pool.check(layout)
        self.shares = [0.0] * len(layouts)
        if not layouts:
            return
        starts = [self._first_change(layout) for layout in layouts]
        keep = _most_shared(layouts)
        self._last = None  # an abandoned run leaves borders of two layouts behind
        for members in self._walks(layouts, keep):
            walk = _Walk(layouts, members, starts, keep if keep in members else None)
            for plan, numbers in enumerate(self._plans):
                pasts = self._run_shared(walk, plan)
                for number in numbers:
                    for group in self._run_batch(walk, number, pasts):
                        with torch.no_grad():
                            finished = self.runs.finish(self.batches[number], group.hidden)
                        for member in group.members:
                            yield member, number, finished
        self._last = layouts[keep]

    def forget(self) -> None:
        """Free all kept hidden states."""
        self._last = None
        self._borders = [{} for _ in self.batches]
        self._shared_borders = [{} for _ in self._plans]

    def _first_change(self, layout: Layout) -> int:
        """The kept border to start from: no layer before it differs from the layout that was kept."""
        if self._last is None or self.stride == 0:
            return 0
        # A layout equal to the last one runs its last stretch again: outputs of the last layer are not kept.
        same = next((i for i, (a, b) in enumerate(zip(self._last, layout, strict=True)) if a != b), len(layout) - 1)
        return same - same % self.stride

    def _walks(self, layouts: Sequence[Layout], keep: int) -> list[list[int]]:
        """Layouts to walk side by side, neighbours in the tree together; the one that is kept comes last, since it
        overwrites what the others start from."""
        order = sorted(range(len(layouts)), key=lambda i: [form or "" for form in layouts[i]])
        largest = max((batch.tokens for batch in self.batches), default=1) * self.pool.backbone.config.hidden_size * 4
        size = max(1, min(LAYOUTS_AT_ONCE, LIVE_BYTES // (2 * max(1, largest))))
        walks = [order[first : first + size] for first in range(0, len(order), size)]
        return sorted(walks, key=lambda members: keep in members)

    @torch.no_grad()
    def _run_shared(self, walk: _Walk, plan: int) -> dict[Layout, Any]:
        """What later columns need of the shared ones, by the beginning of a layout up to the layer it belongs to."""
        pasts: dict[Layout, Any] = {}
        batch = self.batches[self._plans[plan][0]]
        if batch.shared == 0:
            return pasts
        context = self.runs.context(batch, of_shared=True)

        def run(layer: int, form: str | None, groups: list[_Group]) -> list[Tensor]:
            outputs = []
            for group in groups:
                layout = walk.layouts[group.members[0]]
                output, pasts[layout[: layer + 1]] = self.runs.run_shared(layer, layout, group.hidden, context)
                outputs.append(output)
            return outputs

        self._descend(walk, self._shared_borders[plan], lambda: self.runs.embed(batch, of_shared=True), run, 1)
        return pasts

    @torch.no_grad()
    def _run_batch(self, walk: _Walk, number: int, pasts: dict[Layout, Any]) -> list[_Group]:
        """Outputs of the last layer, before the final norm."""
        batch = self.batches[number]
        contexts: dict[int, Any] = {}
        # What was kept of shared columns is one layout's: with those, each state has a call of its own.
        most = 1 if batch.shared else max(1, CALL_TOKENS // max(1, batch.tokens))

        def context(copies: int) -> Any:
            if copies not in contexts:
                contexts[copies] = self.runs.context(batch, copies)
            return contexts[copies]

        def run(layer: int, form: str | None, groups: list[_Group]) -> list[Tensor]:
            outputs: list[Tensor] = []
            for first in range(0, len(groups), most):
                some = groups[first : first + most]
                past = pasts[walk.layouts[some[0].members[0]][: layer + 1]] if batch.shared else None
                hidden = some[0].hidden if len(some) == 1 else torch.cat([group.hidden for group in some])
                output = self.runs.run(layer, form, hidden, context(len(some)), past)
                outputs += output.chunk(len(some))
            return outputs

        return self._descend(walk, self._borders[number], lambda: self.runs.embed(batch), run, batch.input_ids.shape[0])

    def _descend(
        self,
        walk: _Walk,
        borders: dict[int, Tensor],
        embed: Callable[[], Tensor],
        run: Callable[[int, str | None, list[_Group]], list[Tensor]],
        rows: int,
    ) -> list[_Group]:
        """All layers for the layouts of one walk, splitting where they differ. Returns what comes out at the end."""
        groups: list[_Group] = []
        for layer in range(min(walk.starts[member] for member in walk.members), len(self.pool.layers)):
            # Those that start here have the kept layout's layers before this border, so they are one group, and no
            # group on its way can be equal to it.
            if joining := [member for member in walk.members if walk.starts[member] == layer]:
                groups.append(_Group(borders[layer] if layer else embed(), joining))
            by_form: dict[str | None, list[_Group]] = {}
            for group in groups:
                if walk.keep in group.members:
                    self._keep(borders, layer, group.hidden)
                for form, members in walk.split(group.members, layer).items():
                    by_form.setdefault(form, []).append(_Group(group.hidden, members))
            groups = []
            for form, jobs in by_form.items():
                groups += [_Group(out, job.members) for out, job in zip(run(layer, form, jobs), jobs, strict=True)]
                for job in jobs:
                    self.layer_forwards += rows
                    for member in job.members:
                        self.shares[member] += rows / len(job.members)
        return groups

    def _keep(self, borders: dict[int, Tensor], index: int, hidden: Tensor) -> None:
        if index and self.stride and index % self.stride == 0:
            whole = hidden.untyped_storage().nbytes() == hidden.numel() * hidden.element_size()
            borders[index] = hidden if whole else hidden.clone()  # a part of a call's output holds all of it

    def _check_lengths(self) -> None:
        limit = self.pool.backbone.config.max_position_embeddings
        longest = max((batch.input_ids.shape[1] for batch in self.batches), default=0)
        if longest > limit:
            raise UsageError(f"tasks: a prompt of {longest} tokens is longer than the model's context of {limit}")


class _Walk(NamedTuple):
    """Which of `layouts` are walked side by side, the border each starts at, and whose states are kept."""

    layouts: Sequence[Layout]
    members: list[int]
    starts: list[int]
    keep: int | None

    def split(self, members: list[int], layer: int) -> dict[str | None, list[int]]:
        """`members` by the form that they have in this layer."""
        parts: dict[str | None, list[int]] = {}
        for member in members:
            parts.setdefault(self.layouts[member][layer], []).append(member)
        return parts


def _plans(batches: Sequence[ScoringBatch]) -> list[list[int]]:
    """Numbers of neighbouring batches that share the same leading columns (or none)."""
    plans: list[list[int]] = []
    for number, batch in enumerate(batches):
        before = batches[number - 1] if number else None
        head = batch.input_ids[0, : batch.shared]
        if before is not None and before.shared == batch.shared and head.equal(before.input_ids[0, : batch.shared]):
            plans[-1].append(number)
        else:
            plans.append([number])
    return plans


def _most_shared(layouts: Sequence[Layout]) -> int:
    """The layout that has most layers from the first on in common with the others: the likeliest to be gone on from."""

    def shared(layout: Layout) -> int:
        return sum(
            next((i for i, (a, b) in enumerate(zip(layout, other, strict=True)) if a != b), len(layout))
            for other in layouts
        )

    return max(range(len(layouts)), key=lambda i: (shared(layouts[i]), i))


def _with_attention(layer: nn.Module, attention: nn.Module) -> nn.Module:
    """`layer` with another attention, everything else the same objects."""
    twin = copy.copy(layer)
    twin._modules = {**layer._modules, "self_attn": attention}
    return twin
