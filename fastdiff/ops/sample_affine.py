"""sample_affine: the closed form of a linear denoiser's whole chain, x_0 = G u + k + L z."""

from __future__ import annotations

from torch import Tensor

from fastdiff.closed_form import ClosedForm
from fastdiff.noise import Noise
from fastdiff.ops.backend import Op


def sample_affine_ref(form: ClosedForm, cond: Tensor, noise: Noise) -> Tensor:
    """x_0 [R, D] = cond gain^T + offset + z factor^T, with z draw 0 of `noise` and cond [R, D] the users' shares."""
    return form.sample(cond, noise.draw(0))


sample_affine = Op("sample_affine", sample_affine_ref, {"cpu": "fastdiff.ops.cpu.sample_affine:sample_affine"})
