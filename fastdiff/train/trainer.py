"""The loop that trains any recipe: epochs, validation with the engine, early stopping, a state that survives a kill.

    for each stage:
        for each epoch:
            for each batch of a permutation drawn from (seed, stage, epoch):
                gradient of the recipe's losses; one step of the stage's optimizer
            every `validate_every` epochs: validate; keep the best weights; stop after `patience` without better ones
        the best weights become the recipe's; the next stage begins with them

The state is written after each epoch and every minute in between: weights, optimizer, best weights, place in the epoch,
random generators, log. A run that is killed and resumed goes through the same batches with the same draws, so on one
machine with one number of threads it ends with the same weights as an unbroken run.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastdiff.errors import FastdiffError, InvalidArgument
from fastdiff.train.recipe import Recipe, Stage
from fastdiff.train.run_folder import RunFolder, State
from fastdiff.train.validation import measure

SAVE_SECONDS = 60.0
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class TrainingFailed(FastdiffError, RuntimeError):
    """The loss is not finite; the message says where. The state before the epoch is kept."""


class Interrupted(FastdiffError):
    """The run was asked to stop (a signal, or its time is up); its state is saved and it can be resumed."""


@dataclass
class Progress:
    """Where a run stands: what is stored beside weights and generators.

    stage, epoch, batch  numbers of the stage, of its epochs that are complete, of the batches done in the one under way
    bad                  validations since the best one
    best, best_epoch     the highest value of each metric that the stage watches, and where the kept weights are from
    seconds              spent so far
    sums, examples       of the loss terms over the epoch under way, weighted by examples
    """

    stage: int = 0
    entered: bool = False
    epoch: int = 0
    batch: int = 0
    bad: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None
    seconds: float = 0.0
    examples: int = 0
    epoch_seconds: float = 0.0
    done: bool = False


class Trainer:
    """Trains `recipe` in `folder`.

    seed       of the order of examples and of every random draw; the recipe's initial weights are the caller's
    precision  "float32", or "bfloat16" for autocast on CUDA
    minutes    stop after so long, with the state saved
    say        where lines about the progress go
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        seed: int,
        precision: str = "float32",
        minutes: float | None = None,
        show_progress: bool = True,
        say: Callable[[str], None] = lambda line: tqdm.write(line),
    ) -> None:
        self.recipe, self.folder, self.seed = recipe, folder, seed
        self.precision, self.show_progress, self.say = precision, show_progress, say
        self.stages = tuple(recipe.stages())
        self.progress = Progress()
        self.log: list[tuple[Any, ...]] = []
        self._sums: dict[str, float] = {}
        self._best: dict[str, Tensor] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._asked_to_stop = False
        self._since = time.monotonic()
        self._last_save = time.monotonic()

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self, state: State | None = None) -> None:
        """From the beginning, or from a state; returns when the last stage is complete. Raises `Interrupted` with the
        state saved, `TrainingFailed` with the last good state kept."""
        devices = [self.recipe.device] if self.recipe.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._stopping_at_signals():
            torch.manual_seed(self.seed)
            if state is not None:
                self._restore(state)
            while self.progress.stage < len(self.stages):
                self._run_stage(self.stages[self.progress.stage])
                self._next_stage()
            self.progress.done = True
            self._save()

    def _run_stage(self, stage: Stage) -> None:
        recipe, progress = self.recipe, self.progress
        if not progress.entered:
            recipe.enter(stage)
            progress.entered = True
        parameters = self._freeze_others(stage)
        if self._optimizer is None:
            self._optimizer = self._make_optimizer(stage)
        n_batches = math.ceil(recipe.n_examples(stage) / stage.batch_size)
        recipe.train()
        with tqdm(
            total=stage.epochs * n_batches,
            initial=progress.epoch * n_batches + progress.batch,
            desc=stage.name,
            unit="batch",
            disable=None if self.show_progress else True,
        ) as bar:
            while progress.epoch < stage.epochs and not self._out_of_patience(stage):
                self._run_epoch(stage, parameters, n_batches, bar)
                self._finish_epoch(stage, n_batches)

    def _run_epoch(self, stage: Stage, parameters: list[nn.Parameter], n_batches: int, bar: Any) -> None:
        recipe, progress, optimizer = self.recipe, self.progress, self._optimizer
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(stage, progress.epoch)
        order = _permutation(recipe.n_examples(stage), self.seed, progress.stage, progress.epoch)
        while progress.batch < n_batches:
            examples = order[progress.batch * stage.batch_size :][: stage.batch_size]
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                losses = recipe.losses(stage, examples)
            values = {name: loss.item() for name, loss in losses.items()}
            self._check_finite(stage, values)
            recipe.backward(stage, losses)
            if stage.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
            optimizer.step()

            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value * len(examples)
            progress.examples += len(examples)
            progress.batch += 1
            bar.update()
            if bar.n % 10 == 0 or n_batches < 10:
                name = stage.watch[-1]
                best = f", best {name} {progress.best[name]:.4f}" if name in progress.best else ""
                bar.set_postfix_str(f"epoch {progress.epoch + 1}, loss {sum(values.values()):.4f}{best}", refresh=False)
            self._pause_if_asked()

    def _finish_epoch(self, stage: Stage, n_batches: int) -> None:
        """Log the epoch, validate where it is due, save."""
        progress = self.progress
        progress.epoch, progress.batch = progress.epoch + 1, 0
        self._count_time()
        mean = {name: total / progress.examples for name, total in self._sums.items()}
        rows = {
            "loss": sum(mean.values()),
            **({} if len(mean) == 1 else mean),
            "learning_rate": _learning_rate(stage, progress.epoch - 1),
            "examples_per_second": progress.examples / max(progress.epoch_seconds, 1e-9),
        }
        if stage.validate_every and (progress.epoch % stage.validate_every == 0 or progress.epoch == stage.epochs):
            metrics = measure(self.recipe, stage, self.recipe.data.valid)
            rows |= metrics
            higher = higher_than(progress.best, metrics, stage)
            if better := bool(higher):
                progress.best |= higher
                progress.best_epoch, progress.bad = progress.epoch, 0
                self._best = {name: weight.clone() for name, weight in self.recipe.state_dict().items()}
            else:
                progress.bad += 1
            self.say(_line(stage, progress, rows, better))
        self._count_time()
        step = progress.epoch * n_batches
        self.log += [
            (stage.name, progress.epoch, step, round(progress.seconds, 3), name, value) for name, value in rows.items()
        ]
        self._sums, progress.examples, progress.epoch_seconds = {}, 0, 0.0
        self._save()
        self._pause_if_asked()

    def _next_stage(self) -> None:
        if self._best is not None:
            self.recipe.load_state_dict(self._best)
        self._best = self._optimizer = None
        done = self.progress
        self.progress = Progress(stage=done.stage + 1, seconds=done.seconds)
        self._save()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _freeze_others(self, stage: Stage) -> list[nn.Parameter]:
        for parameter in self.recipe.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        parameters = list(self.recipe.trained(stage))
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def _make_optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.recipe.parameters() if parameter.requires_grad]
        return OPTIMIZERS[stage.optimizer](parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)

    def _autocast(self) -> Any:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.recipe.device.type, torch.bfloat16)

    def _check_finite(self, stage: Stage, values: dict[str, float]) -> None:
        wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            progress = self.progress
            raise TrainingFailed(
                f"train: the loss is not finite in stage {stage.name}, epoch {progress.epoch + 1}, batch "
                f"{progress.batch + 1} ({', '.join(wrong)}); what was saved before stays in {self.folder.path}; begin "
                f"again in another folder with a lower learning rate (now {_learning_rate(stage, progress.epoch):g})"
            )

    def _out_of_patience(self, stage: Stage) -> bool:
        return stage.patience is not None and self.progress.bad >= stage.patience

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self.progress.epoch_seconds += now - self._since
        self._since = now

    # --- the state ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._count_time()
        device = self.recipe.device
        self.folder.save_state(
            {
                "progress": vars(self.progress),
                "recipe": self.recipe.state_dict(),
                "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
                "best": self._best,
                "sums": self._sums,
                "log": self.log,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            }
        )
        self.folder.write_log(self.log)
        self._last_save = time.monotonic()

    def _restore(self, state: State) -> None:
        self.progress = Progress(**state["progress"])
        self.recipe.load_state_dict(state["recipe"])
        self._best, self._sums = state["best"], state["sums"]
        self.log = [tuple(row) for row in state["log"]]
        if state["optimizer"] is not None:
            stage = self.stages[self.progress.stage]
            self._freeze_others(stage)
            self._optimizer = self._make_optimizer(stage)
            self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.recipe.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.recipe.device)

    def _pause_if_asked(self) -> None:
        now = time.monotonic()
        if self._asked_to_stop or now > self._deadline:
            self._save()
            why = "interrupted" if self._asked_to_stop else "the time given is up"
            raise Interrupted(f"train: {why}; {self.folder.path} holds the run so far: --resume goes on with it")
        if now - self._last_save > SAVE_SECONDS:
            self._save()

    @contextmanager
    def _stopping_at_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop after the batch under way; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        before: dict[int, Any] = {}

        def ask(number: int, frame: Any) -> None:
            self._asked_to_stop = True
            signal.signal(number, before[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def higher_than(best: Mapping[str, float], metrics: Mapping[str, float], stage: Stage) -> dict[str, float]:
    """The watched metrics that are higher than ever: where there is one, the weights of this epoch are kept."""
    return {name: metrics[name] for name in stage.watch if metrics.get(name, -1.0) > best.get(name, -1.0)}


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise InvalidArgument where a setting leaves nothing to train with."""
    for stage in stages:
        for name, least in (("epochs", 0), ("batch_size", 1), ("validate_every", 0), ("patience", 1)):
            value = getattr(stage, name)
            if value is not None and value < least:
                raise InvalidArgument(f"train: {name} of stage {stage.name} must be at least {least} (got {value})")
    if not any(stage.epochs for stage in stages):
        names = ", ".join(stage.name for stage in stages)
        raise InvalidArgument(f"train: no stage has an epoch to run (stages: {names}); give at least one")


def _permutation(n: int, seed: int, stage: int, epoch: int) -> Tensor:
    """The order of the examples of one epoch, a function of its numbers: a resumed run needs no state for it."""
    (mixed,) = np.random.SeedSequence([seed, stage, epoch]).generate_state(1, np.uint64)
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(mixed) >> 1))


def _learning_rate(stage: Stage, epoch: int) -> float:
    if stage.cosine_epochs is None:
        return stage.learning_rate
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / stage.cosine_epochs))


def _line(stage: Stage, progress: Progress, rows: dict[str, float], better: bool) -> str:
    metrics = "  ".join(f"{name} {100 * rows[name]:5.2f} %" for name in ("HR@20", "NDCG@20") if name in rows)
    mark = "best" if better else f"best was epoch {progress.best_epoch}"
    return (
        f"{stage.name:<10} epoch {f'{progress.epoch}/{stage.epochs}':>7}  loss {rows['loss']:8.4f}  {metrics}  "
        f"{rows['examples_per_second']:8,.0f} examples/s  {_duration(progress.seconds)}  {mark}"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
