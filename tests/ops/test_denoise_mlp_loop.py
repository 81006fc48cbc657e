"""denoise_mlp_loop on every backend that can run here, against a loop over the network with nothing split or folded."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.noise import GivenNoise, Noise, PhiloxNoise
from fastdiff.ops.denoise_mlp_loop import ACTIVATIONS, MLPWeights, denoise_mlp_loop, denoise_mlp_loop_ref, guided
from tests.tolerances import FLOOR, assert_agree, relative_error

COND = 5  # width of the condition before the first layer
TIME = 3  # width of the time embedding before the first layer


@pytest.fixture(params=denoise_mlp_loop.available("cpu"))
def loop(request):
    return denoise_mlp_loop.bind(request.param, "cpu")


@dataclass(frozen=True)
class Case:
    """A network whose first layer reads [x ; condition ; time], and a run of it; all in float64."""

    rows: int = 4
    dim: int = 6
    hidden: tuple[int, ...] = ()
    steps: int = 7
    activation: str = "gelu"
    out_norm: bool = False
    guidance: str = "none"  # or "shared": one unconditional row, or "per row"
    normalize: bool = False

    def tensors(self) -> dict[str, Tensor]:
        torch.manual_seed(self.rows * 1000 + self.dim)
        widths = (self.dim + COND + TIME, *self.hidden, self.dim)
        made = {
            "x": torch.randn(self.rows, self.dim),
            "cond": torch.randn(self.rows, COND),
            "time": torch.randn(self.steps, TIME),
            "null": torch.randn(self.rows if self.guidance == "per row" else 1, COND),
            "noise": torch.randn(self.steps + 1, self.rows, self.dim),
            "coef": torch.rand(self.steps, 3) * 0.6,
            "norm": torch.randn(2, self.dim),
        }
        made["coef"][-1, 2] = 0.0  # no noise at the last step
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            made[f"w{i}"] = torch.randn(n_out, n_in) / n_in**0.5
            made[f"b{i}"] = torch.randn(n_out) * 0.1
        return {name: value.double() for name, value in made.items()}


def truth_of(case: Case, made: dict[str, Tensor]) -> Tensor:
    """Everything recomputed at every step, as the networks are drawn in the papers."""

    def network(x: Tensor, cond: Tensor, time: Tensor) -> Tensor:
        h = torch.cat([x, cond.expand(len(x), -1), time.expand(len(x), -1)], dim=1)
        for i in range(len(case.hidden) + 1):
            h = F.linear(h if i == 0 else ACTIVATIONS[case.activation](h), made[f"w{i}"], made[f"b{i}"])
        return F.layer_norm(h, (case.dim,), *made["norm"], 1e-5) if case.out_norm else h

    x = made["noise"][0]
    for i in range(case.steps):
        output = network(x, made["cond"], made["time"][i])
        if case.guidance != "none":
            uncond = network(x, made["null"], made["time"][i])
            output = uncond + 2.5 * (output - uncond)
        c_out, c_xt, c_noise = made["coef"][i]
        x = c_out * output + c_xt * x + c_noise * made["noise"][1 + i]
        x = F.normalize(x, dim=1) if case.normalize else x
    return x


def arguments(case: Case, made: dict[str, Tensor], dtype: torch.dtype) -> tuple:
    made = {name: value.to(dtype) if name != "coef" else value for name, value in made.items()}
    first = made["w0"]
    w_c, w_t = first[:, case.dim : case.dim + COND], first[:, case.dim + COND :]
    mlp = MLPWeights(
        first[:, : case.dim],  # a slice, not contiguous
        tuple((made[f"w{i}"], made[f"b{i}"]) for i in range(1, len(case.hidden) + 1)),
        case.activation,
        (made["norm"][0], made["norm"][1], 1e-5) if case.out_norm else None,
    )
    cond = F.linear(made["cond"], w_c, made["b0"])
    uncond = None if case.guidance == "none" else F.linear(made["null"], w_c, made["b0"])
    noise = GivenNoise(made["noise"])
    return noise.draw(0), mlp, cond, uncond, 2.5, made["time"] @ w_t.T, made["coef"], case.normalize, noise


LINEAR, ONE, TWO = Case(), Case(hidden=(11,)), Case(hidden=(12, 8))
CASES = {
    "linear": LINEAR,
    "linear on the sphere": replace(LINEAR, normalize=True),
    "one row, one step": replace(LINEAR, rows=1, steps=1),
    "one dim": replace(ONE, dim=1),
    "no rows": replace(ONE, rows=0),
    "many rows": replace(ONE, rows=37, dim=64, hidden=(128,), steps=20),
    "two layers, shared null": replace(ONE, guidance="shared"),
    "two layers, a null per row": replace(ONE, guidance="per row", normalize=True),
    "three layers": replace(TWO, activation="silu"),
    "layer norm": replace(TWO, activation="silu", out_norm=True),
    "linear, shared null": replace(LINEAR, guidance="shared"),
} | {name: replace(TWO, activation=name) for name in ACTIVATIONS}


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_network_run_step_by_step(loop, case, dtype):
    made = case.tensors()
    truth = truth_of(case, made)
    given = arguments(case, made, dtype)
    ours = loop(*given)
    assert ours.dtype == dtype
    twin = relative_error(denoise_mlp_loop_ref(*given), truth)
    assert relative_error(ours, truth) <= 2 * twin + FLOOR[dtype]
    if dtype != torch.bfloat16:
        assert_agree(ours, truth, dtype)


def test_noise_is_asked_for_only_where_it_counts(loop):
    class Strict(Noise):
        def __init__(self, rest: Noise) -> None:
            self.rest, self.asked = rest, []

        def draw(self, index: int) -> Tensor:
            self.asked.append(index)
            return self.rest.draw(index)

    given = list(arguments(LINEAR, LINEAR.tensors(), torch.float64))
    given[6] = given[6].clone()
    given[6][2, 2] = 0.0
    given[8] = strict = Strict(given[8])
    loop(*given)
    assert strict.asked == [1, 2, 4, 5, 6]


def test_rows_do_not_depend_on_each_other(loop):
    case = CASES["many rows"]
    given = list(arguments(case, case.tensors(), torch.float64))
    keys = torch.arange(case.rows)
    together = loop(*given[:8], PhiloxNoise(1, keys, torch.zeros_like(keys), case.dim, torch.float64))
    for row in (0, 5, 36):
        alone = list(given)
        alone[0], alone[2] = given[0][row : row + 1], given[2][row : row + 1]
        alone[8] = PhiloxNoise(1, keys[row : row + 1], torch.zeros(1, dtype=torch.int64), case.dim, torch.float64)
        assert_agree(loop(*alone), together[row : row + 1], torch.float64)


def test_guidance_of_one_is_the_conditional_branch():
    cond, uncond = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    assert_agree(guided(uncond, cond, 1.0), cond, torch.float64)
    assert torch.equal(guided(uncond, cond, 0.0), uncond)
