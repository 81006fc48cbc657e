"""From a window of histories to the ranking: the part of a call that is a function of tensors and waits for nothing.

What comes before it (reading arguments, checking and mapping ids) belongs to the host; this may be captured in a CUDA
graph (`fastdiff.graphs`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.arguments import Settings
from fastdiff.catalog import ItemCatalog, TopK
from fastdiff.closed_form import AffineDenoiser, ClosedForm, ClosedForms
from fastdiff.errors import InvalidArgument
from fastdiff.models.base import Histories, Model, OnStep
from fastdiff.noise import Noise
from fastdiff.ops.backend import BoundOp
from fastdiff.plan import StepPlan


class Ranked(NamedTuple):
    """query [B, D], or [B, num_samples, D]: what was generated; top: its ranking."""

    query: Tensor
    top: TopK


class Pipeline(NamedTuple):
    """What a call runs, apart from its users.

    table  the snapshot's item table where the model reads histories, in its dtype
    forms  of the model; None where the plan is run step by step, and not in closed form
    """

    model: Model[Any, Any]
    catalog: ItemCatalog
    table: Tensor
    plan: StepPlan
    forms: ClosedForms | None
    settings: Settings
    topk_op: BoundOp

    def __call__(
        self,
        window: Histories,
        noise: Noise,
        filters: dict[str, Any],
        on_step: OnStep | None = None,
        lap: Callable[[str], None] = lambda stage: None,
    ) -> Ranked:
        """filters: arguments of `ItemCatalog.topk`; lap: told the name of each stage when its work has been given."""
        model, catalog, table, plan, forms, (top_k, guidance_scale, n_samples, aggregation), topk_op = self
        condition = model.encode(window, table)
        lap("encode")

        state = model.prepare(condition, plan, guidance_scale)
        state = model.repeat(state, n_samples) if n_samples > 1 else state
        if forms is None:
            x_0 = model.sample(state, plan, noise, on_step)
        else:
            form, affine = self._closed_form(forms, state)
            x_0 = model.bound["sample_affine"](form, affine.cond, affine.uncond, affine.guidance_scale, noise)
        query = model.readout(x_0)
        query = query if n_samples == 1 else query.view(window.batch_size, n_samples, -1)
        lap("denoise")

        return Ranked(query, catalog.topk(query, top_k, aggregation=aggregation, topk_op=topk_op, **filters))

    def collapsed(self, window: Histories) -> None:
        """Raises where the plan cannot be run in closed form, which is made and kept."""
        if self.forms is not None:
            condition = self.model.encode(window, self.table)
            self._closed_form(self.forms, self.model.prepare(condition, self.plan, self.settings.guidance_scale))

    def _closed_form(self, forms: ClosedForms, state: Any) -> tuple[ClosedForm, AffineDenoiser]:
        affine = self.model.affine(state, self.plan)
        if affine is None:
            raise InvalidArgument(
                f"generate: scheduler='closed_form' needs a linear denoiser, and this {self.model.config.method} "
                "model's is not linear; use another scheduler"
            )
        return forms.of(self.plan, affine), affine
