"""philox_normals: standard normal draws that are a function of (seed, row key, sample, draw, dim), by Philox4x32-10.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": a function from (key, counter) to four 32-bit words.
Fixed here for every backend:

    key      (seed low 32 bits, seed high 32 bits)
    counter  (row key low, row key high, draw, sample << 16 | dim // 4)
             sample < 2^16; dim < 2^18

    words w0..w3 serve dims 4j .. 4j+3 in two Box-Muller pairs (w0, w1) and (w2, w3). For a pair (a, b), in float32:
        u = ((a >> 8) + 1) * 2^-24  in (0, 1]        v = (b >> 8) * 2^-24  in [0, 1)
        r = sqrt(-2 ln u)           angle = 6.2831855 * v
        first = r cos(angle)        second = r sin(angle)

u, v and angle are exact or one rounding, so normals agree between backends to the few ulp of their log, sin and cos.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.ops.backend import Op

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_TWO_PI = 6.2831855  # 2 pi rounded to float32


def philox_normals_ref(
    seed: int | Tensor, row_key: Tensor, sample: Tensor, first_draw: int, n_draws: int, dim: int
) -> Tensor:
    """Standard normals `[n, R, dim]` float32 for the draws numbered first_draw .. first_draw + n - 1.

    seed     int of 64 bits, signed or not; or a tensor [1] int64 on the device
    row_key  [R] int64      sample  [R] int64 in 0 .. 2^16 - 1
    first_draw, n_draws     0 or more, their sum at most 2^32
    """
    blocks = torch.arange((dim + 3) // 4, device=row_key.device, dtype=torch.int64)
    draws = torch.arange(first_draw, first_draw + n_draws, device=row_key.device, dtype=torch.int64)
    key = row_key[None, :, None]
    counter = (
        key & _MASK32,
        (key >> 32) & _MASK32,
        draws[:, None, None] & _MASK32,
        (sample[None, :, None] << 16) | blocks,
    )
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    first, second = _box_muller(words[0], words[1])
    third, fourth = _box_muller(words[2], words[3])
    return torch.stack([first, second, third, fourth], dim=-1).flatten(2)[..., :dim].contiguous()


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 tensors (which broadcast against each other)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # a 32 x 32 bit product wraps in int64, but its 64 bits are right; only c0 and c2 are multiplied again, so only
        # they are cut to 32 bits in every round
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = ((product_1 >> 32) ^ c1 ^ k0) & _MASK32, ((product_0 >> 32) ^ c3 ^ k1) & _MASK32
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1 & _MASK32, c2, c3 & _MASK32


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    scale = 2.0**-24
    u = ((a >> 8) + 1).to(torch.float32) * scale
    v = (b >> 8).to(torch.float32) * scale
    radius = torch.sqrt(-2.0 * torch.log(u))
    angle = _TWO_PI * v
    return radius * torch.cos(angle), radius * torch.sin(angle)


philox_normals = Op(
    "philox_normals",
    philox_normals_ref,
    {
        "cpu": "fastdiff.ops.cpu.philox_normals:philox_normals",
        "triton": "fastdiff.kernels.philox_normals:philox_normals",
    },
)
