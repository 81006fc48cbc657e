"""The two ways to an engine: a folder on disk, or a live model of the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff.checkpoint import from_module, read_folder
from fastdiff.engine import Engine

if TYPE_CHECKING:
    import torch


def from_pretrained(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    cuda_graphs: bool | str = "auto",
) -> Engine:
    """Load a native folder (`config.json`, `generation_config.json`, `model.safetensors`), as `fastdiff convert` and
    `Engine.save_pretrained` write it.

    device       "cpu" or "cuda"; None is the CPU
    dtype        of the model's arithmetic: torch.float32 (None), float64, bfloat16 or float16
    backend      "auto", or one of `available_backends()`: a named backend either runs or raises `BackendUnavailable`
    cuda_graphs  whether calls are captured in CUDA graphs and replayed: True, False, or "auto", which is False until
                 they have been run on a GPU (see `fastdiff.graphs`)
    Raises `CheckpointError` naming what is wrong with the folder.
    """
    return Engine.from_checkpoint(read_folder(folder), device, dtype, backend, cuda_graphs)


def accelerate(
    model: torch.nn.Module,
    settings: object = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    cuda_graphs: bool | str = "auto",
) -> Engine:
    """An engine for a live model of the authors' code: the drop-in for its slow `predict`.

    model     the authors' `nn.Module`, recognised by its parameters and attributes
    settings  what those cannot tell, under the authors' own names (for example DreamRec's timesteps, beta_sche and w);
              missing ones are named. A mapping, or an object with such attributes: the `Namespace` of their parser,
              DreamRec's `diffusion` object. `{"method": "tarec"}` tells TA-Rec from DreamRec, whose parameters are the
              same; `{"batch_coupling": "none"}` answers each user of a CDDRec alone
    A snapshot: the weights are copied, later training of the model does not reach the engine; call accelerate again.
    Raises `CheckpointError` naming the settings that are missing, or that contradict the model.
    """
    return Engine.from_checkpoint(from_module(model, settings), device, dtype, backend, cuda_graphs)
