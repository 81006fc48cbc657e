"""The engine: binds ops once, owns `generate()`. Read top to bottom, it is the way from histories to item ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.arguments import (
    Generators,
    NoiseRequest,
    RankingRequest,
    SamplerRequest,
    Settings,
    check_catalog,
    check_device,
    draw_seed,
    refuse_unknown,
    resolve_settings,
)
from fastdiff.arithmetic import in_plain_arithmetic, plain_arithmetic
from fastdiff.catalog import ItemCatalog, TopK
from fastdiff.checkpoint import Checkpoint, write_folder
from fastdiff.closed_form import ClosedForms
from fastdiff.config import DTYPES, GenerationConfig, ModelConfig
from fastdiff.device_histories import DeviceHistories, can_parse, parse_on_device
from fastdiff.errors import InvalidArgument
from fastdiff.graphs import Graphs, why_off
from fastdiff.histories import ArrayLike, ParsedHistories, parse_histories
from fastdiff.models import model_class
from fastdiff.models.base import Histories, Model, OnStep
from fastdiff.ops.score_topk import check_finite, score_topk
from fastdiff.output import GenerateOutput, Pending
from fastdiff.pipeline import Pipeline
from fastdiff.plan import StepPlan
from fastdiff.sampler import Sampler
from fastdiff.staging import finish
from fastdiff.stopwatch import Stopwatch


class Engine:
    """A loaded model with its catalogue: `generate()` turns histories into item ids.

    catalog            the current `ItemCatalog` snapshot; assign an updated one any time, calls under way keep theirs
    generation_config  what `generate()` does where its argument is None
    backends           op name -> the backend that runs it
    graphs             the CUDA graphs: which calls were replayed, and why the others were not
    """

    def __init__(
        self,
        model: Model[Any, Any],
        catalog: ItemCatalog,
        generation_config: GenerationConfig,
        backend: str = "auto",
        cuda_graphs: bool | str = "auto",
    ) -> None:
        self.model = model
        self.device = model.device
        self._on_cpu = model.device.type == "cpu"
        self._how = backend, cuda_graphs
        self._topk_op = score_topk.bind(backend, model.device)
        self.backends = {name: op.backend for name, op in model.bound.items()} | {"score_topk": self._topk_op.backend}
        self.graphs = Graphs(model.device, why_off(cuda_graphs, model.device, self.backends))
        self._history_table: tuple[ItemCatalog, Tensor] | None
        self.catalog = self._loaded_catalog = catalog
        self.generation_config = generation_config
        self._make_plan = lru_cache(maxsize=64, typed=True)(model.plan)  # a table takes longer to make than to run
        self._closed_forms = ClosedForms()
        self._default_sampler: tuple[GenerationConfig, tuple[StepPlan, bool]] | None = None
        if generation_config.scheduler == "closed_form":  # a chain that cannot be collapsed is refused at load
            none = torch.zeros(1, 0, dtype=torch.int64, device=self.device)
            with plain_arithmetic(self.device):
                plan, closed = self._sampler(SamplerRequest(), generation_config)
                pipeline = self._pipeline(catalog, plan, closed, resolve_settings(generation_config))
                pipeline.collapsed(Histories(none, none.sum(dim=1)))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        cuda_graphs: bool | str = "auto",
    ) -> Engine:
        """An engine for a checkpoint in memory.

        device       None keeps where the weights are
        dtype        of the model's arithmetic; None is float32. The catalogue keeps the table as it was stored, so
                     ranking stays exact under any dtype
        cuda_graphs  whether calls are captured and replayed (`fastdiff.graphs`). "auto", for now, leaves it off; True
                     raises `BackendUnavailable` where it cannot be had
        """
        wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype or torch.float32
        if wanted is None or wanted not in DTYPES.values():
            accepted = ", ".join(map(str, DTYPES.values()))
            raise InvalidArgument(f"dtype: must be one of {accepted} or its name (got {dtype!r})")
        place = check_device(device, next(iter(checkpoint.weights.values())).device)
        kind = model_class(checkpoint.config.method)
        bound = {op.name: op.bind(backend, place, wanted) for op in kind.ops}
        stored = {name: weight.detach().to(place) for name, weight in checkpoint.weights.items()}
        weights = {name: weight.to(wanted) for name, weight in stored.items()}
        with plain_arithmetic(place):
            model = kind(checkpoint.config, weights, bound)
            catalog = ItemCatalog.from_table(
                stored[kind.item_table_key],
                checkpoint.config.special_rows,
                checkpoint.item_ids,
                metric=checkpoint.config.metric,
            )
        return cls(model, catalog, checkpoint.generation_config, backend, cuda_graphs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Engines travel to other processes, and are copied, as what they are made of."""
        return _rebuild, (self.model, self.catalog, self._loaded_catalog, self.generation_config, *self._how)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, in the dtype that it runs in, as a folder that `from_pretrained` loads. A catalogue that has
        changed since it was loaded is refused: it has a `save` of its own."""
        catalog = self.catalog
        if catalog is not self._loaded_catalog:
            raise InvalidArgument(
                "save_pretrained: the catalogue is not the one that was loaded (items were added, updated or removed), "
                "which a model folder cannot hold; save the catalogue with engine.catalog.save(folder)"
            )
        ids = None if catalog.has_row_ids else catalog.item_ids
        checkpoint = Checkpoint(self.config, self.generation_config, self.model.weights, ids)
        write_folder(folder, checkpoint)

    @property
    def catalog(self) -> ItemCatalog:
        """The current snapshot. One that is assigned must go on from this model's table: same rows in front."""
        return self._catalog

    @catalog.setter
    def catalog(self, catalog: ItemCatalog) -> None:
        check_catalog(catalog, self.model)
        self._catalog = catalog
        self._history_table = None  # of the snapshot before
        self.graphs.renew(catalog)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def __repr__(self) -> str:
        backends = ", ".join(f"{op}={backend}" for op, backend in sorted(self.backends.items()))
        sampler = Sampler.of(self.generation_config, self.config)
        what = f"{self.config.method}, {sampler}, {self.catalog!r}, {self.device}, {self.model.dtype}"
        return f"Engine({what}, {backends})"

    # --- the call -----------------------------------------------------------------------------------------------------

    @in_plain_arithmetic
    def generate(
        self,
        histories: ArrayLike,
        top_k: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        scheduler: str | StepPlan | None = None,
        num_samples: int | None = None,
        aggregation: str | None = None,
        generator: Generators | None = None,
        seed: int | None = None,
        request_ids: Sequence[int] | Tensor | None = None,
        noise: Tensor | None = None,
        filter_seen: bool | None = None,
        ranking: str = "clean",
        exclude_items: Sequence[Any] | None = None,
        candidate_items: Sequence[Any] | None = None,
        user_exclude_items: Sequence[Sequence[Any]] | None = None,
        user_candidate_items: Sequence[Sequence[Any]] | None = None,
        output_embeddings: bool = False,
        show_progress: bool = False,
        callback_on_step_end: OnStep | None = None,
        **unknown: Any,
    ) -> GenerateOutput:
        """The top K items that each user wants next. None means the model's own setting (`generation_config`).

        histories            a list of lists of external item ids, oldest first, any length, [] for a cold user; or a
                             padded integer array [B, L] (either side, pads are -1 or the model's pad id). A tensor that
                             is on the model's CUDA device stays there: what is wrong in it is said at the output
        top_k                K
        num_inference_steps  S steps spread over the chain; or `timesteps`, the exact descending indices. Asked of a
                             model whose own setting is one step, they run DDPM, or DDIM where eta is given
        guidance_scale       g of u + g (c - u), 1 = off
        eta                  DDIM's stochasticity, from 0 = deterministic to 1 = as DDPM
        scheduler            "ddpm", "ddim", "one_step", "closed_form" (linear denoisers: the whole chain as one draw,
                             equal in law), or a `StepPlan`
        num_samples          embeddings per user; `aggregation` of their scores: "max" or "mean"
        seed                 64 bits; with it a row's noise depends on (seed, row key, sample, step, dim) only. None
                             draws one, returned in the output. The row key is `request_ids[b]`, or else a hash of the
                             history
        generator            torch generator(s) instead of a seed: one, or one per user
        noise                the draws themselves: [S + 1, B, D] ([S, B, D] where the last step draws none;
                             [.., B, num_samples, D] with samples), or only the starting draw [B, D]
        filter_seen          leave out the items of the user's whole history
        ranking              "clean": real items, filters as asked; "published": candidates and seen policy as the
                             authors rank (all rows of the table, pad row included), no filters
        exclude_items, candidate_items            for all users; with the per-user lists below they intersect
        user_exclude_items, user_candidate_items  one list per user
        callback_on_step_end (step, timestep, x [B * num_samples, D]) -> None or a tensor that replaces x; selects the
                             step-by-step path
        Returns a `GenerateOutput`. An empty batch returns an empty output.
        """
        if unknown:
            refuse_unknown(unknown, _generate_arguments())
        watch = Stopwatch(self.device)
        catalog = self.catalog  # one snapshot for the whole call
        defaults = self.generation_config
        settings = resolve_settings(defaults, top_k, guidance_scale, num_samples, aggregation)
        plan, closed = self._sampler(SamplerRequest(scheduler, num_inference_steps, timesteps, eta), defaults)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InvalidArgument(
                "generate: callback_on_step_end must be a function of (step, timestep, x) "
                f"(got {type(callback_on_step_end).__name__})"
            )
        if closed and callback_on_step_end is not None:
            raise InvalidArgument("generate: callback_on_step_end excludes scheduler='closed_form', which has no steps")
        candidates = RankingRequest(
            ranking, filter_seen, exclude_items, candidate_items, user_exclude_items, user_candidate_items
        )
        parsed = self._parse(histories, catalog)
        request = NoiseRequest(noise, generator, seed, request_ids)
        pipeline = self._pipeline(catalog, plan, closed, settings)
        inputs = None
        if self.graphs.why_off is None:
            watched = show_progress or callback_on_step_end is not None
            inputs = self.graphs.inputs(parsed, request, candidates, self.config, defaults.filter_seen, watched)
        if inputs is not None:
            used_seed: int | None = inputs.seed
            watch.lap("prepare")
            query, top = self.graphs.run(pipeline, inputs)
        else:
            if not self._on_cpu and isinstance(parsed, ParsedHistories):
                parsed = DeviceHistories.of(parsed, self.device)
            draws, used_seed = request.resolve(parsed, settings.num_samples, self.model, plan, closed)
            filters = candidates.resolve(catalog, self.config, parsed, defaults.filter_seen)
            watch.lap("prepare")
            if parsed.n_users == 0:
                return self._empty(catalog, settings, used_seed, output_embeddings, watch)
            if show_progress:
                with _progress(plan, callback_on_step_end) as on_step:
                    query, top = pipeline(parsed.window, draws, filters, on_step, watch.lap)
            else:
                query, top = pipeline(parsed.window, draws, filters, callback_on_step_end, watch.lap)

        embeddings = query if output_embeddings else None
        item_ids = catalog.external(top.rows) if self._on_cpu else None
        watch.lap("rank" if inputs is None else "graph")
        pending = None
        if not self._on_cpu:
            pending = Pending([*parsed.checks, partial(check_finite, query)], catalog.external, pipeline)
        return GenerateOutput(item_ids, top, embeddings, used_seed, watch, pending)

    def generate_batches(
        self,
        histories: Iterable[Any],
        batch_size: int = 256,
        request_ids: Iterable[int] | None = None,
        seed: int | None = None,
        show_progress: bool = False,
        **arguments: Any,
    ) -> Iterator[GenerateOutput]:
        """`generate()` over any number of histories: holds one batch of `batch_size`, yields one output for each.

        histories    any iterable of histories, also an endless one
        request_ids  an iterable beside it
        seed         None draws one for the whole run, returned in every output
        arguments    as for `generate()`; those that hold one entry per user (noise, the per-user lists) are refused
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InvalidArgument(f"generate_batches: batch_size must be an int of at least 1 (got {batch_size!r})")
        if unknown := {name: value for name, value in arguments.items() if name not in _generate_arguments()}:
            refuse_unknown(unknown, _generate_arguments())
        per_user = {"noise", "user_exclude_items", "user_candidate_items"} & {
            name for name, value in arguments.items() if value is not None
        }
        if per_user:
            raise InvalidArgument(
                f"generate_batches: {', '.join(sorted(per_user))} holds one entry per user of one batch; "
                "call generate() batch by batch instead"
            )
        if not isinstance(histories, Iterable):
            raise InvalidArgument(
                f"generate_batches: histories must be an iterable of histories (got {type(histories).__name__})"
            )
        if seed is None and arguments.get("generator") is None:
            seed = draw_seed()
        return self._batches(histories, batch_size, request_ids, seed, show_progress, arguments)

    def _batches(
        self,
        histories: Iterable[Any],
        batch_size: int,
        request_ids: Iterable[int] | None,
        seed: int | None,
        show_progress: bool,
        arguments: dict[str, Any],
    ) -> Iterator[GenerateOutput]:
        total = len(histories) if isinstance(histories, Sized) else None
        ids = None if request_ids is None else iter(request_ids)
        done = 0
        with tqdm(total=total, unit="history", disable=not show_progress) as bar:
            for batch in _cut(histories, batch_size):
                keys = None if ids is None else list(islice(ids, len(batch)))
                try:
                    output = self.generate(batch, seed=seed, request_ids=keys, **arguments)
                except InvalidArgument as error:
                    if done == 0:
                        raise
                    raise type(error)(
                        f"{error} (in the batch from histories[{done}] on, counted from there)"
                    ) from error
                yield output
                done += len(batch)
                bar.update(len(batch))

    # --- stages -------------------------------------------------------------------------------------------------------

    def _sampler(self, request: SamplerRequest, defaults: GenerationConfig) -> tuple[StepPlan, bool]:
        """The table to run, and whether in closed form."""
        if not request.is_default:
            return request.resolve(defaults, self._make_plan)
        kept = self._default_sampler
        if kept is None or kept[0] is not defaults:
            kept = self._default_sampler = (defaults, request.resolve(defaults, self._make_plan))
        return kept[1]

    def _parse(self, histories: ArrayLike, catalog: ItemCatalog) -> ParsedHistories | DeviceHistories:
        if self._on_cpu:
            return parse_histories(histories, catalog, self.config)
        if isinstance(histories, Tensor) and histories.device == self.device and can_parse(histories, catalog):
            return parse_on_device(histories, catalog, self.config)
        return parse_histories(histories, catalog, self.config)

    def _pipeline(self, catalog: ItemCatalog, plan: StepPlan, closed: bool, settings: Settings) -> Pipeline:
        kept = self._history_table
        if kept is None or kept[0] is not catalog:
            kept = (catalog, catalog.table.to(self.device, self.model.dtype))
            finish(self.device)
            self._history_table = kept
        forms = self._closed_forms if closed else None
        return Pipeline(self.model, catalog, kept[1], plan, forms, settings, self._topk_op)

    def _empty(
        self, catalog: ItemCatalog, settings: Settings, seed: int | None, embeddings: bool, watch: Stopwatch
    ) -> GenerateOutput:
        rows = torch.empty(0, settings.top_k, dtype=torch.int64, device=self.device)
        top = TopK(rows, rows.to(torch.float32))
        dim = self.config.hidden_size
        shape = (0, dim) if settings.num_samples == 1 else (0, settings.num_samples, dim)
        queries = torch.empty(shape, dtype=self.model.dtype, device=self.device) if embeddings else None
        return GenerateOutput(catalog.external(rows), top, queries, seed, watch)


def _generate_arguments() -> list[str]:
    return [name for name in Engine.generate.__annotations__ if name not in ("return", "unknown")]


@contextmanager
def _progress(plan: StepPlan, callback: OnStep | None) -> Iterator[OnStep]:
    """A step callback that moves a progress bar and calls the caller's."""
    with tqdm(total=plan.num_steps, unit="step") as bar:

        def on_step(step: int, timestep: int, x: Tensor) -> Tensor | None:
            bar.update()
            return callback(step, timestep, x) if callback is not None else None

        yield on_step


def _rebuild(
    model: Model[Any, Any],
    catalog: ItemCatalog,
    loaded_catalog: ItemCatalog,
    generation_config: GenerationConfig,
    backend: str,
    cuda_graphs: bool | str,
) -> Engine:
    engine = Engine(model, loaded_catalog, generation_config, backend, cuda_graphs)
    engine.catalog = catalog
    return engine


def _cut(histories: Iterable[Any], batch_size: int) -> Iterator[Any]:
    """Batches of histories; a padded array is cut into padded arrays, all else into lists."""
    if isinstance(histories, (np.ndarray, Tensor)):
        for start in range(0, len(histories), batch_size):
            yield histories[start : start + batch_size]
        return
    source = iter(histories)
    while batch := list(islice(source, batch_size)):
        yield batch
