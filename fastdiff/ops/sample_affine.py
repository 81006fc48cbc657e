"""sample_affine: the closed form of a linear denoiser's whole chain, x_0 = G u + k + L z, u the guided condition."""

from __future__ import annotations

from torch import Tensor

from fastdiff.closed_form import ClosedForm
from fastdiff.noise import Noise
from fastdiff.ops.backend import Op
from fastdiff.ops.denoise_mlp_loop import guided


def sample_affine_ref(
    form: ClosedForm, cond: Tensor, uncond: Tensor | None, guidance_scale: float, noise: Noise
) -> Tensor:
    """x_0 [R, D] = u gain^T + offset + z factor^T, with z draw 0 of `noise` and u = uncond + g (cond - uncond).

    cond            [R, D] the users' shares
    uncond          [R, D] or [1, D], the same for the unconditional pass; None where guidance is off: u = cond
    guidance_scale  g; used only with `uncond`
    """
    share = cond if uncond is None else guided(uncond, cond, guidance_scale)
    return form.sample(share, noise.draw(0))


sample_affine = Op(
    "sample_affine",
    sample_affine_ref,
    {"cpu": "fastdiff.ops.cpu.sample_affine:sample_affine", "triton": "fastdiff.kernels.sample_affine:sample_affine"},
)
