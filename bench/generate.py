"""The whole way, from histories to the ids of the top K: what the `bench_*` files of whole models share.

Both sides get histories as one padded integer tensor and return the K best rows under the authors' ranking (every row
of the table, pad row included, nothing filtered), so that their answers can be compared. Ours goes through
`Engine.generate`, with its checks of the input, and draws Philox noise; the published algorithm draws with torch.randn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import GOLDEN, Gate, bindings, ranking_error, relative_error
from fastdiff.checkpoint import Checkpoint
from fastdiff.config import GenerationConfig, ModelConfig
from fastdiff.engine import Engine, GenerateOutput
from fastdiff.models import model_class
from fastdiff.ops.score_topk import score_topk


def our_engines(
    config: ModelConfig, generation_config: GenerationConfig, weights: dict[str, Tensor], device: torch.device
) -> dict[str, Engine]:
    """An engine per way to run the model's ops and the ranking: label -> engine."""
    checkpoint = Checkpoint(config, generation_config, weights)
    ops = [*model_class(config.method).ops, score_topk]
    return {
        label: Engine.from_checkpoint(checkpoint, device=device, backend=backend)
        for label, backend in bindings(ops, device).items()
    }


def generate_gate(output: GenerateOutput, x_0: Tensor, table: Tensor, against: str) -> Gate:
    """Embeddings against the truth `x_0 [B, D]`, and the ids against the scores that it gives; both float64."""
    assert output.embeddings is not None
    rows: Any = output.item_ids
    errors = [
        relative_error(output.embeddings.cpu(), x_0),
        ranking_error(rows.cpu(), x_0 @ table.cpu().double().T),
    ]
    return Gate(max(errors), GOLDEN, against)
