"""CUDA graphs: what a call runs on the device is captured for a bucket of sizes, and replayed for every call of it.

A replay is one copy up, one launch and three small copies, in place of the tens of launches of a call. It gives the
same bits as the call that it stands for, which runs on the same padded tensors (`fastdiff.graph_inputs`).

A graph is captured when its key comes a second time, so that odd sizes cost nothing: the key is the bucket, the plan,
the numbers of the call (top_k, guidance_scale, num_samples, aggregation), and whether seen items are filtered. The
capturing call waits for the device, and other calls that could be replayed wait for it; no other call does. But CUDA
fails a capture during which another thread waits for the whole device (`torch.cuda.synchronize`), not for a stream;
with PyTorch 2.11, the process can capture no more then (https://github.com/pytorch/pytorch/pull/180395).

Memory. All graphs of an engine share one input buffer and one pool, so only one runs at a time, whatever the streams:
each replay waits, on the device, for the one before. They are dropped together: where the catalogue changes, so that no
table outlives its snapshot for them; and where they have reached their number or their bytes, though not more often
than once in `PATIENCE` calls. One by one would not do: they share the workspace of cuBLAS for the stream on which they
were captured, which recent releases of PyTorch free when the first of these graphs dies
(https://github.com/pytorch/pytorch/issues/193402); and their pool gives memory back only when the last has died.

A captured graph reads what it was captured with: the pipeline is kept with it, and what models and launchers work out
for a plan lives as long as the plan. Switches of torch (TF32) keep the position that they had.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.arguments import NoiseRequest, RankingRequest
from fastdiff.catalog import ItemCatalog, TopK
from fastdiff.config import ModelConfig
from fastdiff.device_histories import DeviceHistories
from fastdiff.errors import BackendUnavailable, InvalidArgument
from fastdiff.graph_inputs import MOST_NUMBERS, Inputs, pack_inputs, run_padded
from fastdiff.histories import ParsedHistories
from fastdiff.ops.backend import CAPTURABLE
from fastdiff.per_object import PerObject
from fastdiff.pipeline import Pipeline, Ranked
from fastdiff.recorder import CudaRecorder, Recorder, Recording

AUTO = False
"""What "auto" means on a CUDA device with ops that can be captured. Graphs have been tested with stand-ins for the
device, but not been run on one yet, so nobody gets them unasked."""

MOST_GRAPHS = 64
MOST_BYTES = 2 << 30
"""The pool's: no graph is captured where it has grown to this, so it may be exceeded by one graph."""
PATIENCE = 1000


# --- graphs -----------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """pipeline: whose tensors the recording reads, and whose plan and snapshot its key means."""

    recording: Recording
    pipeline: Pipeline


class Graphs:
    """The graphs of one engine.

    why_off   why no call is captured; None where calls are
    calls     how calls ran: "replayed", "captured", or the reason why the device was given kernel after kernel.
              Empty where graphs are off
    """

    def __init__(
        self,
        device: torch.device,
        why_off: str | None = None,
        make_recorder: Callable[[torch.device], Recorder] = CudaRecorder,
        most_graphs: int = MOST_GRAPHS,
        most_bytes: int = MOST_BYTES,
        patience: int = PATIENCE,
    ) -> None:
        self.device, self.why_off = device, why_off
        self._make_recorder, self._most_graphs, self._most_bytes = make_recorder, most_graphs, most_bytes
        self._patience = self._since_drop = patience
        self._lock = threading.Lock()
        self._catalog: ItemCatalog | None = None
        self._calls: Counter[str] = Counter()
        self._seen: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._names: PerObject[object] = PerObject()  # of plans; a number may come again when a plan has gone
        self._recorder: Recorder | None = None
        self._buffer: Tensor | None = None
        self._n_bytes = 0

    @property
    def calls(self) -> dict[str, int]:
        with self._lock:
            return dict(self._calls)

    @property
    def n_bytes(self) -> int:
        """Of the device's memory, that graphs hold for what they compute."""
        return self._n_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        if self.why_off is not None:
            return f"Graphs(off: {self.why_off})"
        counts = ", ".join(f"{how}: {count}" for how, count in sorted(self.calls.items()))
        return f"Graphs({len(self)} graphs, {self._n_bytes >> 20} MiB{', ' if counts else ''}{counts})"

    def renew(self, catalog: ItemCatalog) -> None:
        """Graphs are of this snapshot from now on."""
        if self.why_off is None:
            with self._lock:
                self._catalog = catalog
                self._seen.clear()
                self._drop()

    def inputs(
        self,
        histories: ParsedHistories | DeviceHistories,
        noise: NoiseRequest,
        ranking: RankingRequest,
        config: ModelConfig,
        filter_seen_default: bool,
        watched: bool,
    ) -> Inputs | None:
        """What `run` takes; None where the call cannot be replayed, or graphs are off.

        watched  whether a function or a progress bar is to be told of each step
        """
        if self.why_off is not None:
            return None
        reason, inputs = why_no_graph(histories, noise, ranking, config, watched), None
        if isinstance(histories, ParsedHistories) and reason is None:
            inputs = pack_inputs(histories, noise, ranking.filters_seen(filter_seen_default), config, self.device)
            reason = "too many histories, or too long ones"
        if inputs is None and reason is not None:
            with self._lock:
                self._calls[reason] += 1
        return inputs

    def run(self, pipeline: Pipeline, inputs: Inputs) -> Ranked:
        """The call's own rows of what `run_padded` gives, in memory that is the caller's."""
        plan = self._names.get(pipeline.plan, lambda plan: object())
        key = (inputs.bucket, inputs.filters_seen, plan, pipeline.forms is None, pipeline.settings)
        with self._lock:
            self._since_drop += 1
            kept = self._kept.get(key) if pipeline.catalog is self._catalog else None
            reason = None if kept is not None else self._why_not_yet(key, pipeline)
            if reason is None:
                return self._replay(key, kept, pipeline, inputs)
            self._calls[reason] += 1
        flat = inputs.flat.to(self.device, non_blocking=True)
        return _own(run_padded(pipeline, flat, inputs.bucket, inputs.filters_seen), inputs.n_users)

    def _why_not_yet(self, key: tuple[Any, ...], pipeline: Pipeline) -> str | None:
        if pipeline.catalog is not self._catalog:
            return "an older catalogue"
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > 16 * self._most_graphs:
                self._seen.popitem(last=False)
            return "the first of its sizes"
        if len(self._kept) < self._most_graphs and self._n_bytes < self._most_bytes:
            return None
        if self._since_drop < self._patience:
            return "no room for another graph"
        self._since_drop = 0
        self._drop()
        return None

    def _replay(self, key: tuple[Any, ...], kept: _Kept | None, pipeline: Pipeline, inputs: Inputs) -> Ranked:
        if self._recorder is None or self._buffer is None:
            self._recorder = self._make_recorder(self.device)
            with torch.inference_mode(False):  # which marks tensors: they could not be written to outside of it
                self._buffer = torch.empty(MOST_NUMBERS, dtype=torch.int64, device=self.device)
        buffer, recorder = self._buffer, self._recorder
        with recorder.turn(buffer):
            buffer[: inputs.bucket.numbers].copy_(inputs.flat, non_blocking=True)
            if kept is None:
                recording = recorder.record(lambda: run_padded(pipeline, buffer, inputs.bucket, inputs.filters_seen))
                kept = self._kept[key] = _Kept(recording, pipeline)
                self._n_bytes = recorder.n_bytes
                self._calls["captured"] += 1
            else:
                self._calls["replayed"] += 1
            kept.recording.replay()
            query, top = _own(kept.recording.ranked, inputs.n_users)
            return Ranked(query.clone(), TopK(top.rows.clone(), top.scores.clone()))

    def _drop(self) -> None:
        if self._recorder is not None:
            self._recorder.finish()
        self._kept.clear()
        self._n_bytes = 0


def _own(ranked: Ranked, n_users: int) -> Ranked:
    """Without the rows of users that are none."""
    query, top = ranked
    return Ranked(query[:n_users], TopK(top.rows[:n_users], top.scores[:n_users]))


# --- who gets graphs --------------------------------------------------------------------------------------------------


def why_off(cuda_graphs: bool | str, device: torch.device, backends: Mapping[str, str]) -> str | None:
    """Why an engine has no graphs, None where it has them; raises where they were asked for and cannot be had.

    cuda_graphs  True, False, or "auto", which is what `AUTO` says where graphs can be had
    """
    if not isinstance(cuda_graphs, bool) and cuda_graphs != "auto":
        raise InvalidArgument(f"cuda_graphs: must be True, False or 'auto' (got {cuda_graphs!r})")
    if cuda_graphs is False:
        return "cuda_graphs=False"
    waiting = sorted(f"{op}={backend}" for op, backend in backends.items() if backend not in CAPTURABLE)
    reason = None
    if device.type != "cuda":
        reason = f"they need a CUDA device (got {device})"
    elif waiting:
        reason = f"only ops on {' or '.join(CAPTURABLE)} can be captured (got {', '.join(waiting)})"
    if cuda_graphs is True and reason is not None:
        raise BackendUnavailable(f"cuda_graphs: True was asked for, and {reason}; use 'auto' or False")
    if reason is None and cuda_graphs == "auto" and not AUTO:
        reason = "'auto' leaves them off as long as they have not been run on a GPU; cuda_graphs=True turns them on"
    return reason


def why_no_graph(
    histories: ParsedHistories | DeviceHistories,
    noise: NoiseRequest,
    ranking: RankingRequest,
    config: ModelConfig,
    watched: bool,
) -> str | None:
    """Why a call cannot be replayed, whatever its sizes; None where it can. watched: by a function or a progress bar"""
    if histories.n_users == 0:
        return "no histories"
    if config.coupled:
        return "users attend to each other, so none may be added"
    if isinstance(histories, DeviceHistories):
        return "histories on the device"
    if watched:
        return "callback_on_step_end or show_progress"
    if noise.noise is not None or noise.generator is not None:
        return "noise or generator"
    if isinstance(noise.request_ids, Tensor) and not noise.request_ids.is_cpu:
        return "request_ids on the device"
    if ranking.has_lists:
        return "lists of items"
    return "ranking='published'" if ranking.ranking == "published" else None
