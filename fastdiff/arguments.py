"""Arguments of the engine and of `generate()`: what they resolve to, what excludes what, what is said of bad ones."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff.catalog import ItemCatalog
from fastdiff.config import AGGREGATIONS, RANKINGS, SCHEDULERS, GenerationConfig, ModelConfig
from fastdiff.device_histories import DeviceHistories
from fastdiff.errors import CatalogError, InvalidArgument
from fastdiff.histories import ParsedHistories
from fastdiff.models.base import Model
from fastdiff.noise import (
    MAX_SAMPLES,
    GeneratorNoise,
    GivenNoise,
    Noise,
    PhiloxNoise,
    StartNoise,
    request_row_key,
)
from fastdiff.ops.score_topk import UserLists
from fastdiff.plan import StepPlan
from fastdiff.staging import finish, upload

Generators = torch.Generator | Sequence[torch.Generator]


# --- which sampler ----------------------------------------------------------------------------------------------------


@dataclass
class SamplerRequest:
    """The arguments of one call that say how to sample; None means the generation config's."""

    scheduler: str | StepPlan | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[int] | None = None
    eta: float | None = None

    @property
    def is_default(self) -> bool:
        if self.scheduler is not None or self.num_inference_steps is not None:
            return False
        return self.timesteps is None and self.eta is None

    def resolve(self, defaults: GenerationConfig, make_plan: Callable[..., StepPlan]) -> tuple[StepPlan, bool]:
        """The table to run, and whether it is to be run in closed form.

        make_plan  (scheduler, num_steps, timesteps, eta, spacing) -> StepPlan, the model's own; may be cached
        """
        num_steps, call_eta = self.num_inference_steps, self.eta
        if num_steps is not None:
            num_steps = as_int("num_inference_steps", num_steps, at_least=1)
        if call_eta is not None:
            call_eta = as_float("eta", call_eta)
        shape = {"num_inference_steps": num_steps, "timesteps": self.timesteps, "eta": call_eta}
        given = [name for name, value in shape.items() if value is not None]
        if isinstance(self.scheduler, StepPlan):
            if given:
                raise InvalidArgument(
                    f"generate: a StepPlan as scheduler excludes {', '.join(given)}; the plan holds them"
                )
            return self.scheduler, False
        name = defaults.scheduler if self.scheduler is None else self.scheduler
        if name not in SCHEDULERS:
            raise InvalidArgument(
                f"generate: scheduler must be one of {', '.join(SCHEDULERS)} or a StepPlan (got {name!r})"
            )
        if len(given) > 1 and "eta" not in given:
            raise InvalidArgument("generate: num_inference_steps excludes timesteps; give one of them")
        if name == "one_step" and given:
            if self.scheduler is not None:
                raise InvalidArgument(
                    f"generate: scheduler='one_step' excludes {', '.join(given)}; use another scheduler"
                )
            if given == ["eta"]:
                raise InvalidArgument(
                    "generate: eta belongs to scheduler='ddim', and this model's own setting is 'one_step', which has "
                    "none; name the scheduler, or the number of steps"
                )
            name = "ddpm" if call_eta is None else "ddim"  # more steps asked of a model whose default is one
        if name == "ddpm" and call_eta is not None:
            raise InvalidArgument("generate: eta belongs to scheduler='ddim'; 'ddpm' has none")
        eta = defaults.eta if call_eta is None else call_eta
        closed = name == "closed_form"
        if closed:  # it collapses the ancestral chain, or DDIM's where eta is set
            name = "ddim" if call_eta is not None or defaults.eta else "ddpm"
        if num_steps is None and self.timesteps is None:
            num_steps = defaults.num_inference_steps
        return make_plan(name, num_steps, self._timesteps(), eta, defaults.timestep_spacing), closed

    def _timesteps(self) -> tuple[int, ...] | None:
        if self.timesteps is None:
            return None
        given = self.timesteps.tolist() if isinstance(self.timesteps, Tensor) else self.timesteps
        values = [_index(t) for t in given] if isinstance(given, Iterable) else [None]
        if any(t is None for t in values):
            raise InvalidArgument(f"generate: timesteps must be a sequence of ints (got {self.timesteps!r})")
        return tuple(t for t in values if t is not None)


class Settings(NamedTuple):
    """The numbers of one call; `GenerationConfig` says what they mean."""

    top_k: int
    guidance_scale: float
    num_samples: int
    aggregation: str


def resolve_settings(
    defaults: GenerationConfig,
    top_k: int | None = None,
    guidance_scale: float | None = None,
    num_samples: int | None = None,
    aggregation: str | None = None,
) -> Settings:
    """The arguments of the call; `defaults` where they are None."""
    if aggregation is not None and aggregation not in AGGREGATIONS:
        raise InvalidArgument(f"generate: aggregation must be one of {', '.join(AGGREGATIONS)} (got {aggregation!r})")
    if num_samples is not None and as_int("num_samples", num_samples, at_least=1) > MAX_SAMPLES:
        raise InvalidArgument(f"generate: num_samples must be at most {MAX_SAMPLES} (got {num_samples})")
    return Settings(
        defaults.top_k if top_k is None else as_int("top_k", top_k, at_least=1),
        defaults.guidance_scale if guidance_scale is None else as_float("guidance_scale", guidance_scale),
        defaults.num_samples if num_samples is None else as_int("num_samples", num_samples, at_least=1),
        defaults.aggregation if aggregation is None else aggregation,
    )


def as_int(name: str, value: Any, at_least: int) -> int:
    """An int from anything that is one (numpy's too)."""
    number = _index(value)
    if number is None or number < at_least:
        raise InvalidArgument(f"generate: {name} must be an int of at least {at_least} (got {value!r})")
    return number


def as_float(name: str, value: Any) -> float:
    """A float from any real number."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
        raise InvalidArgument(f"generate: {name} must be a finite number (got {value!r})")
    return float(value)


def _index(value: Any) -> int | None:
    """The int that `value` is; None where it is none."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


# --- which noise ------------------------------------------------------------------------------------------------------


@dataclass
class NoiseRequest:
    """The arguments of one call that say where its draws come from."""

    noise: Tensor | None = None
    generator: Generators | None = None
    seed: int | None = None
    request_ids: Sequence[int] | Tensor | None = None

    def resolve(
        self,
        histories: ParsedHistories | DeviceHistories,
        num_samples: int,
        model: Model[Any, Any],
        plan: StepPlan,
        closed: bool,
    ) -> tuple[Noise, int | None]:
        """The call's draws, and the seed where there is one. Draws are of the model's dtype, on its device."""
        n_users, dim, dtype, device = histories.n_users, model.config.hidden_size, model.dtype, model.device
        if self.generator is not None:
            others = {"seed": self.seed, "request_ids": self.request_ids, "noise": self.noise}
            _exclude("generator", others, "a generator's draws depend on their order alone")
            each = self.generator if isinstance(self.generator, (list, tuple)) else [self.generator]
            wrong = [given for given in each if not isinstance(given, torch.Generator)]
            if wrong or (each is self.generator and len(each) != n_users):
                got = f"a {type(wrong[0]).__name__}" if wrong else str(len(each))
                raise InvalidArgument(
                    f"generate: generator must be one torch.Generator, or a list of one per history, {n_users} of them "
                    f"(got {got})"
                )
            return GeneratorNoise(self.generator, n_users, num_samples, dim, dtype, device), None
        start = None
        if self.noise is not None:
            given, only_start = self._check_given(self.noise, (n_users, num_samples, dim), plan, closed, device)
            given = given.to(dtype)
            if only_start and not closed and not model.uses_start:
                raise InvalidArgument(
                    f"generate: noise holds the starting draw alone, which a {model.config.method} model never reads; "
                    f"give every draw, [{plan.num_steps + 1}, B, D], or a seed"
                )
            if closed or not only_start or not bool(plan.draws_noise.any()):
                _exclude("noise", {"seed": self.seed, "request_ids": self.request_ids}, "every draw is given")
                return GivenNoise(given), None
            start = given[0]
        seed, row_key = self.keys(histories)
        row_key = row_key if row_key.device == device else upload([row_key], device)[0]
        philox = philox_noise(model, seed, row_key, num_samples, _sample_index(n_users, num_samples, device))
        return (philox if start is None else StartNoise(start, philox)), seed

    def keys(self, histories: ParsedHistories | DeviceHistories) -> tuple[int, Tensor]:
        """The seed of a call without generators, drawn where none was given, and each user's row key [B] int64."""
        seed = draw_seed() if self.seed is None else _check_seed(self.seed)
        if self.request_ids is None:
            return seed, histories.row_key
        return seed, request_row_key(self.request_ids, histories.n_users)

    @staticmethod
    def _check_given(
        noise: Tensor, size: tuple[int, int, int], plan: StepPlan, closed: bool, device: torch.device
    ) -> tuple[Tensor, bool]:
        """Given noise as [draws, R, D], and whether it is the starting draw alone."""
        n_users, num_samples, dim = size
        row = [n_users, dim] if num_samples == 1 else [n_users, num_samples, dim]
        if not isinstance(noise, Tensor):
            raise InvalidArgument(f"generate: noise must be a tensor (got {type(noise).__name__})")
        shape, steps = list(noise.shape), plan.num_steps
        accepted = [row]
        if not closed:
            counts = [steps + 1] if bool(plan.draws_noise[-1]) else [steps + 1, steps]
            accepted += [[count, *row] for count in counts]
        if shape not in accepted:
            meaning = "one draw, the closed form has no steps" if closed else "the starting draw, or every draw"
            raise InvalidArgument(
                f"generate: noise has shape {shape}; {' or '.join(map(str, accepted))} is accepted ({meaning})"
            )
        if not noise.is_floating_point():
            raise InvalidArgument(f"generate: noise must be floating (got {noise.dtype})")
        if noise.device != device:
            raise InvalidArgument(
                f"generate: noise is on {noise.device}, the model on {device}; move it with noise.to({str(device)!r})"
            )
        if not bool(torch.isfinite(noise).all()):
            raise InvalidArgument("generate: noise holds NaN or infinity; standard normal draws are wanted")
        draws = 1 if shape == row else shape[0]
        return noise.reshape(draws, n_users * num_samples, dim), shape == row


def philox_noise(
    model: Model[Any, Any], seed: int | Tensor, row_key: Tensor, num_samples: int, sample: Tensor
) -> PhiloxNoise:
    """The draws of users whose keys are `row_key` [B]; sample [B * num_samples]: which of its user's each row is."""
    row_key = row_key if num_samples == 1 else row_key.repeat_interleave(num_samples)
    return PhiloxNoise(seed, row_key, sample, model.config.hidden_size, model.dtype, model.bound["philox_normals"])


def _sample_index(n_users: int, num_samples: int, device: torch.device) -> Tensor:
    """[B * num_samples] int64: which sample of its user each row is."""
    few = n_users * num_samples <= 4096
    return (_kept_sample_index if few else make_sample_index)(n_users, num_samples, device)


def make_sample_index(n_users: int, num_samples: int, device: torch.device) -> Tensor:
    return torch.arange(num_samples, device=device).repeat(n_users)


@lru_cache(maxsize=64)
def _kept_sample_index(n_users: int, num_samples: int, device: torch.device) -> Tensor:
    index = make_sample_index(n_users, num_samples, device)  # nobody writes into it
    finish(device)
    return index


def draw_seed() -> int:
    """A seed from torch's default generator, so that `torch.manual_seed` governs calls without one."""
    return int(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64))


def _check_seed(seed: int) -> int:
    value = _index(seed)
    if value is None or not -(1 << 63) <= value < 1 << 64:
        raise InvalidArgument(f"generate: seed must be an integer of 64 bits (got {seed!r})")
    return value


# --- which candidates -------------------------------------------------------------------------------------------------


@dataclass
class RankingRequest:
    """The arguments of one call that say which items may be recommended."""

    ranking: str = "clean"
    filter_seen: bool | None = None
    exclude_items: Sequence[Any] | None = None
    candidate_items: Sequence[Any] | None = None
    user_exclude_items: Sequence[Sequence[Any]] | None = None
    user_candidate_items: Sequence[Sequence[Any]] | None = None

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise InvalidArgument(f"generate: ranking must be one of {', '.join(RANKINGS)} (got {self.ranking!r})")
        if self.filter_seen is not None and not isinstance(self.filter_seen, (bool, np.bool_)):
            raise InvalidArgument(f"generate: filter_seen must be True, False or None (got {self.filter_seen!r})")
        if self.ranking == "published":
            filters = {name: value for name, value in vars(self).items() if name != "ranking"}
            _exclude(
                "ranking='published'", filters, "candidates and seen policy are the authors' own; 'clean' takes filters"
            )

    def filters_seen(self, default: bool) -> bool:
        """Whether the items of a user's own history are left out; `default` is the generation config's."""
        return default if self.filter_seen is None else bool(self.filter_seen)

    @property
    def has_lists(self) -> bool:
        """Whether items are named, for all users or for each."""
        lists = (self.exclude_items, self.candidate_items, self.user_exclude_items, self.user_candidate_items)
        return any(items is not None for items in lists)

    def resolve(
        self,
        catalog: ItemCatalog,
        config: ModelConfig,
        histories: ParsedHistories | DeviceHistories,
        filter_seen_default: bool,
    ) -> dict[str, Any]:
        """Candidates and filters, under the names of `ItemCatalog.topk`'s arguments."""
        if self.ranking == "published":
            # items added later are no rows of the authors' table
            zeroed = None if config.published_seen_score is None else histories.only_seen
            if zeroed is not None and catalog.n_rows > config.n_rows:
                zeroed = zeroed.below(config.n_rows)
            return {"published": True, "n_published_rows": config.n_rows, "zeroed": zeroed}
        n_users = histories.n_users
        exclude = _user_rows(catalog, self.user_exclude_items, n_users, "user_exclude_items")
        if self.filters_seen(filter_seen_default):
            exclude = histories.seen if exclude is None else histories.seen.union(exclude)
        return {
            "exclude_rows": _rows(catalog, self.exclude_items, "exclude_items"),
            "candidate_rows": _rows(catalog, self.candidate_items, "candidate_items"),
            "user_exclude": exclude,
            "user_candidates": _user_rows(catalog, self.user_candidate_items, n_users, "user_candidate_items"),
        }


def _rows(catalog: ItemCatalog, items: Sequence[Any] | None, name: str) -> Tensor | None:
    if items is None:
        return None
    read = _read_lists(catalog, [items])
    return torch.from_numpy(_known(catalog, items, name)) if read is None else read.values


def _user_rows(
    catalog: ItemCatalog, lists: Sequence[Sequence[Any]] | None, n_users: int, name: str
) -> UserLists | None:
    if lists is None:
        return None
    if not isinstance(lists, Sequence) or isinstance(lists, (str, bytes)) or len(lists) != n_users:
        got = len(lists) if isinstance(lists, Sequence) else f"a {type(lists).__name__}"
        raise InvalidArgument(f"generate: {name} must hold one list per history, {n_users} of them (got {got})")
    read = _read_lists(catalog, lists)
    if read is not None:
        return read
    return UserLists.from_lists([_known(catalog, items, f"{name}[{user}]") for user, items in enumerate(lists)])


def _read_lists(catalog: ItemCatalog, lists: Sequence[Any]) -> UserLists | None:
    """The same in C++, where fastdiff._C is there and knows every id for right."""
    read = None if catalog.index is None else catalog.index.lists(lists)
    return None if read is None else UserLists.trusted(torch.from_numpy(read[0]), torch.from_numpy(read[1]))


def _known(catalog: ItemCatalog, items: Sequence[Any], name: str) -> npt.NDArray[np.int64]:
    if isinstance(items, (str, bytes)) or not isinstance(items, (Iterable, Tensor)):
        raise InvalidArgument(f"generate: {name} must be a list of item ids (got {type(items).__name__})")
    values = items if isinstance(items, (np.ndarray, Tensor)) else list(items)
    try:
        rows: npt.NDArray[np.int64] = catalog.known(values)
    except CatalogError as error:
        reason = str(error).removeprefix("ItemCatalog.known: ids").lstrip(": ")
        raise InvalidArgument(f"generate: {name} must be a flat list of item ids: {reason}") from error
    if (rows < 0).any():
        unknown = np.asarray(values, dtype=object).tolist()[int(np.flatnonzero(rows < 0)[0])]
        raise InvalidArgument(
            f"generate: {name} holds item id {unknown!r}, the catalogue has {catalog.describe_ids()}; leave it out"
        )
    return rows


# --- what an engine is made of --------------------------------------------------------------------------------------


def check_catalog(catalog: ItemCatalog, model: Model[Any, Any]) -> None:
    """A catalogue serves a model whose item table its rows begin with: histories are read there."""
    config = model.config
    where, remedy = "engine.catalog", "make it from engine.catalog with add(), update() or remove()"
    if not isinstance(catalog, ItemCatalog):
        raise InvalidArgument(f"{where}: must be an ItemCatalog (got {type(catalog).__name__}); {remedy}")
    facts = {
        "dimensions": (catalog.dim, config.hidden_size),
        "metric": (catalog.metric, config.metric),
        "device": (catalog.device, model.device),
        "special rows": (catalog.special_rows, config.special_rows),
    }
    for name, (given, wanted) in facts.items():
        if given != wanted:
            raise InvalidArgument(f"{where}: {name} must be {wanted}, the model's own (got {given}); {remedy}")
    if catalog.n_rows < config.n_rows:
        raise InvalidArgument(
            f"{where}: must begin with the {config.n_rows} rows of the model's item table (got {catalog.n_rows} rows); "
            f"{remedy}"
        )


def check_device(device: str | torch.device | None, current: torch.device) -> torch.device:
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


# --- words ------------------------------------------------------------------------------------------------------------


def _exclude(name: str, others: Mapping[str, object], why: str) -> None:
    clash = [other for other, value in others.items() if value is not None]
    if clash:
        raise InvalidArgument(f"generate: {name} excludes {', '.join(clash)}: {why}; leave one of them out")


_ELSEWHERE = {
    **dict.fromkeys(("device", "dtype", "backend"), "it belongs to from_pretrained and accelerate"),
    "batch_size": "it belongs to generate_batches",
    **dict.fromkeys(("k", "n"), "did you mean 'top_k'?"),
}
"""What people write who look for something else."""


def refuse_unknown(unknown: dict[str, Any], accepted: Sequence[str]) -> None:
    """Raise a TypeError that names each unknown argument and the accepted one that it looks like."""
    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, accepted, n=1)
        if "step" in name and "timestep" not in name:  # spelled more like timesteps, and not meant
            close = ["num_inference_steps"]
        hint = _ELSEWHERE.get(name) or (f"did you mean {close[0]!r}?" if close else "")
        parts.append(repr(name) + (f" ({hint})" if hint else ""))
    raise TypeError(f"generate: unknown argument {', '.join(parts)}; accepted: {', '.join(accepted)}")
