"""encode_causal_history: a causal transformer over the items of histories, with compressed pads (ADRec's encoder)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.backend import Op
from fastdiff.ops.causal_transformer import (
    BlockWeights,
    Pads,
    RaggedRows,
    attend,
    causal_bias,
    key_bias,
    log_pads,
    run_block,
    split_heads,
    with_pad_key,
)


def encode_causal_history_ref(
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    norm: tuple[Tensor, Tensor, float],
    blocks: tuple[BlockWeights, ...],
    pads: Pads,
    window: int,
    only_last: bool,
) -> tuple[Tensor, Tensor]:
    """rows = blocks(LN(item_table[items])): row j sees its user's items 0 .. j and window - n pads before them.

    items       [B, n] int64 rows of the table, left-aligned; what stands beyond a row's length is not read
    lengths     [B] int64 in 0 .. min(n, window)
    item_table  [rows, D]
    norm        (weight [D], bias [D], eps) of the LayerNorm on the items
    blocks      the transformer blocks, at least one
    pads        what the pads are in each block, for one pass
    window      the slots that items and pads together fill
    only_last   leave out the rows: the last block is then computed for the last ones alone
    Returns the rows [N, D], packed one user after another ([0, D] with `only_last`), and the last row of each user
    [B, D], which for an empty history is `pads.output`. N is at least the sum of lengths, and what stands beyond that
    sum is not to be read: a backend that does not wait for the device to tell the sum makes room for B n rows.
    """
    rows = RaggedRows.of(lengths, items.shape[1])
    embeddings = item_table[rows.pack(items)]
    weight, bias, eps = norm
    hidden = F.layer_norm(embeddings, embeddings.shape[-1:], weight, bias, eps)
    pad_logits = log_pads(lengths, window, hidden.dtype)
    seen = causal_bias(pad_logits, rows.width)
    for layer, block in enumerate(blocks[:-1] if only_last else blocks):
        hidden, _ = run_block(block, hidden, rows, pads.keys_values[layer], seen)
    if not only_last:
        return hidden, rows.last(hidden, pads.output[0])

    block = blocks[-1]
    key, value = with_pad_key(rows.pad(block.keys_values(hidden)), pads.keys_values[-1], block.n_heads)
    last = rows.last(hidden, torch.zeros_like(pads.output[0]))
    query = split_heads(block.queries(last).unsqueeze(1), block.n_heads)
    bias_of_last = key_bias(pad_logits, lengths, rows.width)[:, None, None, :]
    output = block.finish(last, attend(query, key, value, bias_of_last).squeeze(1))
    return hidden[:0], torch.where((lengths > 0).unsqueeze(1), output, pads.output)


encode_causal_history = Op(
    "encode_causal_history",
    encode_causal_history_ref,
    {
        "cpu": "fastdiff.ops.cpu.encode_causal_history:encode_causal_history",
        "triton": "fastdiff.kernels.encode_causal_history:encode_causal_history",
    },
)
