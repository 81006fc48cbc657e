"""What the C++ ops return, in shape and dtype, for torch.export, torch.compile and opcheck."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("fastdiff::sampler_step")
def _sampler_step(
    model_output: Tensor,
    x_t: Tensor,
    noise: Tensor | None,
    c_out: float,
    c_xt: float,
    c_noise: float,
    normalize: bool,
) -> Tensor:
    return model_output.new_empty(model_output.shape)


@torch.library.register_fake("fastdiff::philox_normals")
def _philox_normals(seed: int, row_key: Tensor, sample: Tensor, first_draw: int, n_draws: int, dim: int) -> Tensor:
    return row_key.new_empty((n_draws, row_key.shape[0], dim), dtype=torch.float32)


@torch.library.register_fake("fastdiff::denoise_attention_loop")
def _denoise_attention_loop(x_t: Tensor, *_: object) -> Tensor:
    return x_t.new_empty(x_t.shape)


@torch.library.register_fake("fastdiff::denoise_mlp_loop")
def _denoise_mlp_loop(x_t: Tensor | None, network: Tensor, steps: Tensor, dim: int, cond: Tensor, *_: object) -> Tensor:
    return cond.new_empty((cond.shape[0], dim))


@torch.library.register_fake("fastdiff::score_topk")
def _score_topk(query: Tensor, item_emb: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape)


@torch.library.register_fake("fastdiff::topk_pack")
def _topk_pack(item_emb: Tensor, stored: int) -> tuple[Tensor, Tensor]:
    n_rows, dim = item_emb.shape
    dtype = {1: torch.bfloat16, 3: torch.float16}.get(stored, torch.uint8)
    rows = item_emb.new_empty((n_rows if stored else 0, dim), dtype=dtype)
    return rows, item_emb.new_empty(((n_rows + 63) // 64, 4))


@torch.library.register_fake("fastdiff::encode_padded_history")
def _encode_padded_history(items: Tensor, lengths: Tensor, item_table: Tensor, *_: object) -> Tensor:
    return item_table.new_empty((items.shape[0], item_table.shape[1]))


@torch.library.register_fake("fastdiff::decode_context")
def _decode_context(
    context: Tensor,
    weights: Tensor,
    heads: int,
    coupled: bool,
    gelu: bool,
    eps: float,
    cross: Tensor,
    coef: Tensor,
    normalize: bool,
    num_samples: int,
    *_: object,
) -> Tensor:
    return context.new_empty((context.shape[0] * num_samples, context.shape[1]))


@torch.library.register_fake("fastdiff::encode_causal_history")
def _encode_causal_history(
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    blocks: list[Tensor],
    hidden: int,
    heads: int,
    eps: float,
    pads: Tensor,
    pad_output: Tensor,
    window: int,
    only_last: bool,
) -> tuple[Tensor, Tensor]:
    dim = item_table.shape[1]
    rows = 0 if only_last else torch.library.get_ctx().new_dynamic_size()
    return item_table.new_empty(rows, dim), item_table.new_empty(items.shape[0], dim)


@torch.library.register_fake("fastdiff::prepare_causal_prefix")
def _prepare_causal_prefix(
    condition: Tensor,
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    input_scale: float,
    normalize: bool,
    time: Tensor,
    blocks: list[Tensor],
    hidden: int,
    heads: int,
    eps: float,
    pads: Tensor,
    window: int,
    guided: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    slots = torch.library.get_ctx().new_dynamic_size()
    shape = (len(blocks), 2 if guided else 1, slots, 2 * item_table.shape[1])
    return item_table.new_empty(shape), torch.empty_like(lengths), item_table.new_empty(lengths.shape)


@torch.library.register_fake("fastdiff::encode_last_item")
def _encode_last_item(
    items: Tensor, lengths: Tensor, item_table: Tensor, weights: Tensor, window: int, outputs: int, *_: object
) -> Tensor:
    return item_table.new_empty((items.shape[0], outputs or item_table.shape[1]))


@torch.library.register_fake("fastdiff::encode_interests")
def _encode_interests(
    items: Tensor,
    lengths: Tensor,
    item_table: Tensor,
    weights: Tensor | None,
    window: int,
    hidden: int,
    interests: int,
    *_: object,
) -> Tensor:
    return item_table.new_empty((items.shape[0], interests, item_table.shape[1]))


@torch.library.register_fake("fastdiff::row_linear")
def _row_linear(x: Tensor, weights: Tensor, n_out: int) -> Tensor:
    return x.new_empty((x.shape[0], n_out))


@torch.library.register_fake("fastdiff::sample_affine")
def _sample_affine(cond: Tensor, *_: object) -> Tensor:
    return cond.new_empty(cond.shape)
