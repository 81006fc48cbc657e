"""The engine: binds ops once, owns `generate()`. Read top to bottom, it is the way from histories to item ids."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.catalog import ItemCatalog
from fastdiff.checkpoint import Checkpoint, write_folder
from fastdiff.closed_form import ClosedForm, collapse
from fastdiff.config import AGGREGATIONS, RANKINGS, SCHEDULERS, GenerationConfig, ModelConfig
from fastdiff.errors import InvalidArgument
from fastdiff.histories import ArrayLike, ParsedHistories, parse_histories
from fastdiff.models import model_class
from fastdiff.models.base import Histories, Model, OnStep
from fastdiff.noise import (
    MAX_SAMPLES,
    GeneratorNoise,
    GivenNoise,
    Noise,
    PhiloxNoise,
    StartNoise,
    history_row_key,
    request_row_key,
)
from fastdiff.ops.score_topk import UserLists, score_topk
from fastdiff.plan import StepPlan
from fastdiff.stopwatch import Stopwatch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Generators = torch.Generator | Sequence[torch.Generator]
Callback = Callable[[int, int, Tensor], Tensor | None]


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate()` returns.

    item_ids    [B, K] external ids, best first; int64 tensor, or a numpy object array where the ids are strings.
                Places that no allowed item fills hold -1 (None for strings)
    scores      [B, K] float32, -inf at such places
    num_valid   [B] int64, how many of the K places are filled
    embeddings  [B, D], or [B, num_samples, D]: the generated queries, where `output_embeddings`
    seed        the seed of the call's noise; None where the noise was given or came from a generator
    """

    item_ids: Tensor | npt.NDArray[Any]
    scores: Tensor
    num_valid: Tensor
    embeddings: Tensor | None
    seed: int | None
    _stopwatch: Stopwatch

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of each stage: "prepare" (check, map and pack the histories), "encode", "denoise", "rank"."""
        return self._stopwatch.seconds()

    def to_tuple(self) -> tuple[Tensor | npt.NDArray[Any], Tensor]:
        """(item_ids, scores)."""
        return self.item_ids, self.scores


class Engine:
    """A loaded model with its catalogue: `generate()` turns histories into item ids.

    catalog            the current `ItemCatalog` snapshot; assign an updated one at any time, calls under way keep theirs
    generation_config  what `generate()` does where its argument is None
    backends           op name -> the backend that runs it
    """

    def __init__(
        self,
        model: Model[Any, Any],
        catalog: ItemCatalog,
        generation_config: GenerationConfig,
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.catalog = catalog
        self.generation_config = generation_config
        self._topk_op = score_topk.bind(backend, model.device)
        self.backends = {name: op.backend for name, op in model.bound.items()} | {"score_topk": self._topk_op.backend}
        self._lock = threading.Lock()
        self._closed_forms: dict[tuple[bytes, bytes], ClosedForm] = {}
        self._history_table: tuple[ItemCatalog, Tensor] | None = None
        if generation_config.scheduler == "closed_form":  # a chain that cannot be collapsed is refused at load
            cold = Histories(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
            plan = self._resolve_plan(_Request())
            state = self.model.prepare(self._encode(cold, catalog), plan, generation_config.guidance_scale)
            self._closed_form(state, plan)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> Engine:
        """An engine for a checkpoint in memory.

        device  None keeps where the weights are    dtype  of the model's arithmetic; None is float32. The catalogue keeps
        the table as it was stored, so ranking stays exact under any dtype
        """
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in DTYPES:
            raise InvalidArgument(f"dtype: must be one of {', '.join(map(str, DTYPES))} (got {dtype})")
        place = _check_device(device, next(iter(checkpoint.weights.values())).device)
        kind = model_class(checkpoint.config.method)
        bound = {op.name: op.bind(backend, place) for op in kind.ops}
        stored = {name: weight.detach().to(place) for name, weight in checkpoint.weights.items()}
        weights = {name: weight.to(dtype) for name, weight in stored.items()}
        model = kind(checkpoint.config, weights, bound)
        catalog = ItemCatalog.from_table(
            stored[kind.item_table_key],
            checkpoint.config.special_rows,
            checkpoint.item_ids,
            metric=checkpoint.config.metric,
        )
        return cls(model, catalog, checkpoint.generation_config, backend)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder that `from_pretrained` loads; items added to the catalogue are saved with the
        catalogue's own `save`."""
        catalog = self.catalog
        original = ItemCatalog.from_table(self.model.item_table, self.config.special_rows, metric=self.config.metric)
        if catalog.n_rows != original.n_rows or not torch.equal(catalog.is_item.cpu(), original.is_item.cpu()):
            raise InvalidArgument(
                "save_pretrained: the catalogue has gained or lost items since it was loaded, which a model folder cannot "
                "hold; save it with engine.catalog.save(folder) and assign the original before saving the model"
            )
        ids = None if catalog.has_row_ids else list(catalog.item_ids)
        checkpoint = Checkpoint(self.config, self.generation_config, self.model.weights, ids)
        write_folder(folder, checkpoint)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __repr__(self) -> str:
        backends = ", ".join(f"{op}={backend}" for op, backend in sorted(self.backends.items()))
        return f"Engine({self.config.method}, {self.catalog!r}, {self.device}, {self.model.dtype}, {backends})"

    # --- the call --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
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
        callback_on_step_end: Callback | None = None,
        **unknown: Any,
    ) -> GenerateOutput:
        """The top K items that each user wants next. None means the model's own setting (`generation_config`).

        histories            a list of lists of external item ids, oldest first, any length, [] for a cold user; or a
                             padded integer array [B, L] (either side, pads are -1 or the model's pad id)
        top_k                K
        num_inference_steps  S steps spread over the chain; or `timesteps`, the exact descending indices
        guidance_scale       g of u + g (c - u), 1 = off
        eta                  DDIM's stochasticity, 0 = deterministic
        scheduler            "ddpm", "ddim", "one_step", "closed_form" (linear denoisers: the whole chain as one draw, equal
                             in law), or a `StepPlan`
        num_samples          embeddings per user; `aggregation` of their scores: "max" or "mean"
        seed                 64 bits; with it a row's noise depends on (seed, row key, sample, step, dim) only. None draws
                             one, returned in the output. The row key is `request_ids[b]`, or else a hash of the history
        generator            torch generator(s) instead of a seed: one, or one per user
        noise                the draws themselves: [S + 1, B, D] ([S, B, D] where the last step draws none;
                             [.., B, num_samples, D] with samples), or only the starting draw [B, D]
        filter_seen          leave out the items of the user's whole history
        ranking              "clean": real items, filters as asked; "published": candidates and seen policy as the authors
                             rank (all rows of the table, pad row included), no filters
        exclude_items, candidate_items            for all users; with the per-user lists below they intersect
        user_exclude_items, user_candidate_items  one list per user
        callback_on_step_end (step, timestep, x [B * num_samples, D]) -> None or a tensor that replaces x; selects the
                             step-by-step path
        Returns a `GenerateOutput`. An empty batch returns an empty output.
        """
        if unknown:
            _refuse_unknown(unknown)
        watch = Stopwatch(self.device)
        catalog = self.catalog  # one snapshot for the whole call
        request = _Request(
            top_k=top_k,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            guidance_scale=guidance_scale,
            eta=eta,
            scheduler=scheduler,
            num_samples=num_samples,
            aggregation=aggregation,
        )
        settings = self._resolve_settings(request)
        plan = self._resolve_plan(request)
        closed = request.scheduler == "closed_form" or (scheduler is None and settings.scheduler == "closed_form")
        _check_ranking(ranking, filter_seen, exclude_items, candidate_items, user_exclude_items, user_candidate_items)
        if closed and callback_on_step_end is not None:
            raise InvalidArgument("generate: callback_on_step_end excludes scheduler='closed_form', which has no steps")
        parsed = parse_histories(histories, catalog, self.config)
        window = Histories(parsed.window.items.to(self.device), parsed.window.lengths.to(self.device))
        n_users, n_samples = window.batch_size, settings.num_samples
        draws, used_seed = self._noise(parsed, n_samples, plan, closed, noise, generator, seed, request_ids)
        if n_users == 0:
            return self._empty(catalog, settings, used_seed, output_embeddings, watch)
        watch.lap("prepare")

        condition = self._encode(window, catalog)
        watch.lap("encode")

        state = self.model.prepare(condition, plan, settings.guidance_scale)
        state = self.model.repeat(state, n_samples) if n_samples > 1 else state
        if closed:
            affine = self.model.affine(state, plan)
            x_0 = self._closed_form(state, plan).sample(affine.cond, draws.draw(0))  # type: ignore[union-attr]
        else:
            with _progress(plan, show_progress, callback_on_step_end) as on_step:
                x_0 = self.model.sample(state, plan, draws, on_step)
        query = self.model.readout(x_0)
        watch.lap("denoise")

        top = catalog.topk(
            query.view(n_users, n_samples, -1).to(torch.float32),
            settings.top_k,
            aggregation=settings.aggregation,
            topk_op=self._topk_op,
            **self._ranking_arguments(
                catalog,
                parsed.seen,
                ranking,
                settings.filter_seen if filter_seen is None else filter_seen,
                exclude_items,
                candidate_items,
                user_exclude_items,
                user_candidate_items,
            ),
        )
        item_ids = catalog.external(top.rows)
        watch.lap("rank")
        embeddings = None
        if output_embeddings:
            embeddings = query if n_samples == 1 else query.view(n_users, n_samples, -1)
        return GenerateOutput(item_ids, top.scores, top.num_valid, embeddings, used_seed, watch)

    def generate_batches(
        self,
        histories: Iterable[Any],
        batch_size: int = 256,
        request_ids: Iterable[int] | None = None,
        seed: int | None = None,
        show_progress: bool = False,
        **arguments: Any,
    ) -> Iterator[GenerateOutput]:
        """`generate()` over any number of histories, `batch_size` at a time; holds one batch, yields one output per batch.

        histories    any iterable of histories, also an endless one
        request_ids  an iterable beside it
        seed         None draws one for the whole run, returned in every output
        arguments    as for `generate()`; those that hold one entry per user (noise, the per-user lists) are refused here
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InvalidArgument(f"generate_batches: batch_size must be an int of at least 1 (got {batch_size!r})")
        per_user = {"noise", "user_exclude_items", "user_candidate_items"} & {
            name for name, value in arguments.items() if value is not None
        }
        if per_user:
            raise InvalidArgument(
                f"generate_batches: {', '.join(sorted(per_user))} holds one entry per user of one batch; "
                "call generate() batch by batch instead"
            )
        if seed is None and arguments.get("generator") is None:
            seed = _draw_seed()
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
        total = len(histories) if hasattr(histories, "__len__") else None
        source, ids = iter(histories), None if request_ids is None else iter(request_ids)
        with tqdm(total=total, unit="history", disable=not show_progress) as bar:
            while batch := list(islice(source, batch_size)):
                keys = None if ids is None else list(islice(ids, len(batch)))
                yield self.generate(batch, seed=seed, request_ids=keys, **arguments)
                bar.update(len(batch))

    # --- settings --------------------------------------------------------------------------------------------------------

    def _resolve_settings(self, request: _Request) -> GenerationConfig:
        given = {name: value for name, value in vars(request).items() if value is not None}
        for name in ("top_k", "num_samples"):
            value = given.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidArgument(f"generate: {name} must be an int of at least 1 (got {value!r})")
        for name in ("guidance_scale", "eta"):
            value = given.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value != value):
                raise InvalidArgument(f"generate: {name} must be a number (got {value!r})")
        aggregation = given.get("aggregation", self.generation_config.aggregation)
        if aggregation not in AGGREGATIONS:
            raise InvalidArgument(f"generate: aggregation must be one of {', '.join(AGGREGATIONS)} (got {aggregation!r})")
        if given.get("num_samples", 1) > MAX_SAMPLES:
            raise InvalidArgument(f"generate: num_samples must be at most {MAX_SAMPLES} (got {given['num_samples']})")
        simple = ("top_k", "num_inference_steps", "guidance_scale", "eta", "num_samples", "aggregation")
        return replace(self.generation_config, **{name: given[name] for name in simple if name in given})

    def _resolve_plan(self, request: _Request) -> StepPlan:
        """The table that the call runs; refuses arguments that exclude each other."""
        defaults, scheduler = self.generation_config, request.scheduler
        shape = {name: getattr(request, name) for name in ("num_inference_steps", "timesteps", "eta")}
        given = [name for name, value in shape.items() if value is not None]
        if isinstance(scheduler, StepPlan):
            if given:
                raise InvalidArgument(f"generate: a StepPlan as scheduler excludes {', '.join(given)}; the plan holds them")
            return scheduler
        if request.num_inference_steps is not None and request.timesteps is not None:
            raise InvalidArgument("generate: num_inference_steps excludes timesteps; give one of them")
        if scheduler is None and defaults.scheduler == "one_step" and given and given != ["eta"]:
            scheduler = "ddim" if request.eta is not None else "ddpm"  # few steps asked of a one-step model
        name = defaults.scheduler if scheduler is None else scheduler
        if name not in SCHEDULERS:
            raise InvalidArgument(
                f"generate: scheduler must be one of {', '.join(SCHEDULERS)} or a StepPlan (got {scheduler!r})"
            )
        if name == "one_step" and given:
            raise InvalidArgument(f"generate: scheduler='one_step' excludes {', '.join(given)}; use 'ddpm' or 'ddim'")
        if name == "ddpm" and request.eta is not None:
            raise InvalidArgument("generate: eta belongs to scheduler='ddim'; 'ddpm' has none")
        eta = defaults.eta if request.eta is None else request.eta
        num_steps, timesteps = request.num_inference_steps, request.timesteps
        if num_steps is None and timesteps is None:
            num_steps = defaults.num_inference_steps
        if name == "closed_form":  # it collapses the ancestral chain, or DDIM's where eta is given
            name = "ddpm" if request.eta is None else "ddim"
        return self.model.plan(name, num_steps, timesteps, eta, defaults.timestep_spacing)

    # --- noise -----------------------------------------------------------------------------------------------------------

    def _noise(
        self,
        parsed: ParsedHistories,
        n_samples: int,
        plan: StepPlan,
        closed: bool,
        noise: Tensor | None,
        generator: Generators | None,
        seed: int | None,
        request_ids: Sequence[int] | Tensor | None,
    ) -> tuple[Noise, int | None]:
        """The call's draws, and the seed where there is one."""
        n_users, dim = parsed.window.batch_size, self.config.hidden_size
        if generator is not None:
            others = {"seed": seed, "request_ids": request_ids, "noise": noise}
            _exclude("generator", others, "a generator's draws depend on their order alone")
            generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
            if not isinstance(generator, torch.Generator) and len(generators) != n_users:
                raise InvalidArgument(f"generate: generator holds {len(generators)} generators for {n_users} histories")
            return GeneratorNoise(generator, n_users, n_samples, dim, self.model.dtype, self.device), None
        given, only_start = None, False
        if noise is not None:
            given, only_start = self._check_noise(noise, n_users, n_samples, plan, closed)
            if not only_start or closed or not bool(plan.draws_noise.any()):
                _exclude("noise", {"seed": seed, "request_ids": request_ids}, "all draws are given")
                return GivenNoise(given), None
        seed = _draw_seed() if seed is None else _check_seed(seed)
        if request_ids is not None:
            row_key = request_row_key(request_ids, n_users)
        else:
            row_key = history_row_key(parsed.window.items, parsed.window.lengths)
        rows = row_key.to(self.device).repeat_interleave(n_samples)
        sample = torch.arange(n_samples, device=self.device).repeat(n_users)
        philox = PhiloxNoise(seed, rows, sample, dim, self.model.dtype)
        return (philox if given is None else StartNoise(given[0], philox)), seed

    def _check_noise(
        self, noise: Tensor, n_users: int, n_samples: int, plan: StepPlan, closed: bool
    ) -> tuple[Tensor, bool]:
        """Given noise as [draws, R, D], and whether it is the starting draw alone."""
        rows = (n_users, self.config.hidden_size)
        per_user = rows if n_samples == 1 else (n_users, n_samples, self.config.hidden_size)
        steps = plan.num_steps
        counts = {steps + 1} if closed or bool(plan.draws_noise[-1]) else {steps + 1, steps}
        shape = tuple(noise.shape) if isinstance(noise, Tensor) else None
        only_start = shape in (per_user, (1, *per_user)) and not (shape == (1, *per_user) and closed is False and steps == 0)
        if closed and not only_start:
            raise InvalidArgument(
                "generate: scheduler='closed_form' takes one draw, noise [B, D] = "
                f"{list(per_user)} (got {list(shape or ())}); per-step noise needs scheduler='ddpm' or 'ddim'"
            )
        if shape is None or not (only_start or (shape[1:] == per_user and shape[0] in counts)):
            wanted = " or ".join(str([count, *per_user]) for count in sorted(counts, reverse=True))
            got = list(shape) if shape is not None else type(noise).__name__
            raise InvalidArgument(
                f"generate: noise must be a tensor {wanted} (every draw), or {list(per_user)} (the starting draw), "
                f"got {got}"
            )
        if not noise.is_floating_point():
            raise InvalidArgument(f"generate: noise must be floating (got {noise.dtype})")
        if noise.device != self.device:
            raise InvalidArgument(
                f"generate: noise is on {noise.device}, the model on {self.device}; move it with noise.to({str(self.device)!r})"
            )
        draws = noise.to(self.model.dtype)
        draws = draws.reshape(-1, n_users * n_samples, self.config.hidden_size)
        return draws, only_start and draws.shape[0] == 1

    # --- stages ----------------------------------------------------------------------------------------------------------

    def _encode(self, window: Histories, catalog: ItemCatalog) -> Any:
        table = catalog.table
        if table.dtype != self.model.dtype or table.device != self.device:
            cached = self._history_table
            if cached is None or cached[0] is not catalog:
                cached = (catalog, table.to(self.device, self.model.dtype))
                self._history_table = cached
            table = cached[1]
        window = Histories(window.items.to(self.device), window.lengths.to(self.device))
        return self.model.encode(window, table)

    def _closed_form(self, state: Any, plan: StepPlan) -> ClosedForm:
        affine = self.model.affine(state, plan)
        if affine is None:
            raise InvalidArgument(
                f"generate: scheduler='closed_form' needs a linear denoiser, and this {self.config.method} model's is not "
                "linear; use 'ddpm' or 'ddim'"
            )
        key = (plan.timesteps.numpy().tobytes(), plan.coef.numpy().tobytes())
        with self._lock:
            if key not in self._closed_forms:
                if len(self._closed_forms) >= 16:
                    self._closed_forms.pop(next(iter(self._closed_forms)))
                self._closed_forms[key] = collapse(plan, affine.w_x, affine.time)
            return self._closed_forms[key]

    def _ranking_arguments(
        self,
        catalog: ItemCatalog,
        seen: UserLists,
        ranking: str,
        filter_seen: bool,
        exclude_items: Sequence[Any] | None,
        candidate_items: Sequence[Any] | None,
        user_exclude_items: Sequence[Sequence[Any]] | None,
        user_candidate_items: Sequence[Sequence[Any]] | None,
    ) -> dict[str, Any]:
        n_users = len(seen.offsets) - 1
        if ranking == "published":
            zeroed = seen if self.config.published_seen_score is not None else None
            return {"published": True, "n_published_rows": self.config.n_rows, "zeroed": zeroed}
        exclude = _user_rows(catalog, user_exclude_items, n_users, "user_exclude_items")
        if filter_seen:
            exclude = seen if exclude is None else seen.union(exclude)
        return {
            "exclude_rows": _rows(catalog, exclude_items, "exclude_items"),
            "candidate_rows": _rows(catalog, candidate_items, "candidate_items"),
            "user_exclude": exclude,
            "user_candidates": _user_rows(catalog, user_candidate_items, n_users, "user_candidate_items"),
        }

    def _empty(
        self, catalog: ItemCatalog, settings: GenerationConfig, seed: int | None, embeddings: bool, watch: Stopwatch
    ) -> GenerateOutput:
        rows = torch.empty(0, settings.top_k, dtype=torch.int64)
        shape = (0, self.config.hidden_size) if settings.num_samples == 1 else (0, settings.num_samples, self.config.hidden_size)
        return GenerateOutput(
            catalog.external(rows),
            torch.empty(0, settings.top_k),
            torch.empty(0, dtype=torch.int64),
            torch.empty(shape, dtype=self.model.dtype) if embeddings else None,
            seed,
            watch,
        )


# --- small pieces -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """The arguments of one call that `generation_config` has defaults for."""

    top_k: int | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    scheduler: str | StepPlan | None = None
    num_samples: int | None = None
    aggregation: str | None = None


class _progress:  # noqa: N801 (used like the function that it would be, were it not a context manager)
    """A step callback that moves a progress bar and calls the caller's; None where neither is wanted."""

    def __init__(self, plan: StepPlan, show: bool, callback: Callback | None) -> None:
        self._plan, self._show, self._callback = plan, show, callback
        self._bar: Any = None

    def __enter__(self) -> OnStep | None:
        if not self._show:
            return self._callback
        self._bar = tqdm(total=self._plan.num_steps, unit="step")
        return self._step

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _step(self, step: int, timestep: int, x: Tensor) -> Tensor | None:
        self._bar.update()
        return self._callback(step, timestep, x) if self._callback is not None else None


def _rows(catalog: ItemCatalog, items: Sequence[Any] | None, name: str) -> Tensor | None:
    if items is None:
        return None
    if isinstance(items, (str, bytes)) or not hasattr(items, "__len__"):
        raise InvalidArgument(f"generate: {name} must be a list of item ids (got {type(items).__name__})")
    return torch.from_numpy(_known(catalog, items, name))


def _user_rows(
    catalog: ItemCatalog, lists: Sequence[Sequence[Any]] | None, n_users: int, name: str
) -> UserLists | None:
    if lists is None:
        return None
    if len(lists) != n_users:
        raise InvalidArgument(f"generate: {name} must hold one list per history, {n_users} of them (got {len(lists)})")
    return UserLists.from_lists([_known(catalog, items, f"{name}[{user}]") for user, items in enumerate(lists)])


def _known(catalog: ItemCatalog, items: Sequence[Any], name: str) -> npt.NDArray[np.int64]:
    values = items.cpu().numpy() if isinstance(items, Tensor) else items
    rows = catalog.lookup(values)
    if (rows < 0).any():
        unknown = list(values)[int(np.flatnonzero(rows < 0)[0])]
        raise InvalidArgument(
            f"generate: {name} holds item id {unknown!r}, the catalogue has {catalog.describe_ids()}; leave it out"
        )
    return rows


def _check_ranking(ranking: str, filter_seen: bool | None, *lists: object) -> None:
    if ranking not in RANKINGS:
        raise InvalidArgument(f"generate: ranking must be one of {', '.join(RANKINGS)} (got {ranking!r})")
    if filter_seen is not None and not isinstance(filter_seen, bool):
        raise InvalidArgument(f"generate: filter_seen must be True, False or None (got {filter_seen!r})")
    if ranking == "published":
        if filter_seen is not None:
            raise InvalidArgument(
                "generate: ranking='published' excludes filter_seen: the authors' own policy applies; use ranking='clean'"
            )
        if any(value is not None for value in lists):
            raise InvalidArgument(
                "generate: ranking='published' excludes exclude_items, candidate_items and the per-user lists: the authors "
                "rank all rows; use ranking='clean'"
            )


def _exclude(name: str, others: dict[str, object], why: str) -> None:
    clash = [other for other, value in others.items() if value is not None]
    if clash:
        raise InvalidArgument(f"generate: {name} excludes {', '.join(clash)}: {why}; give one of them")


def _check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not -(1 << 63) <= seed.__index__() < 1 << 64:
        raise InvalidArgument(f"generate: seed must be an integer of 64 bits (got {seed!r})")
    return seed.__index__()


def _draw_seed() -> int:
    return int(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64))


def _check_device(device: str | torch.device | None, current: torch.device) -> torch.device:
    if device is None:
        return current
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgument(f"device: {device!r} is no device that torch knows; 'cpu' or 'cuda' are") from error
    if place.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device: must be 'cpu' or 'cuda' (got {device!r})")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidArgument(f"device: {device!r} was asked for, and torch sees no CUDA device here; use 'cpu'")
        return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    return place


def _refuse_unknown(unknown: dict[str, Any]) -> None:
    accepted = [name for name in Engine.generate.__annotations__ if name not in ("return", "unknown")]
    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, accepted, n=1)
        parts.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    raise TypeError(f"generate: unknown argument {', '.join(parts)}; accepted: {', '.join(accepted)}")
