"""denoise_mlp_loop on every backend that can run here, against a loop over the network with nothing split or folded."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.noise import GeneratorNoise, GivenNoise, Noise, PhiloxNoise, StartNoise
from fastdiff.ops.denoise_mlp_loop import (
    ACTIVATIONS,
    MLPSampler,
    MLPWeights,
    denoise_mlp_loop,
    denoise_mlp_loop_ref,
    guided,
)
from tests.devices import place_op, places
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

CPU_MISSING = "cpu" not in denoise_mlp_loop.available("cpu")
COND = 5  # width of the condition before the first layer
TIME = 3  # width of the time embedding before the first layer


@pytest.fixture(params=places(denoise_mlp_loop))
def loop(request):
    return place_op(denoise_mlp_loop, request.param)


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
    normalize_before: bool = False
    normalize_start: bool = False

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
    x = F.normalize(x, dim=1) if case.normalize_start else x
    for i in range(case.steps):
        x = F.normalize(x, dim=1) if case.normalize_before else x
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
    on_sphere = (case.normalize, case.normalize_before, case.normalize_start)
    sampler = MLPSampler(mlp, made["time"] @ w_t.T, made["coef"], *on_sphere)
    return noise.draw(0), sampler, cond, uncond, 2.5, noise


LINEAR, ONE, TWO = Case(), Case(hidden=(11,)), Case(hidden=(12, 8))
CASES = {
    "linear": LINEAR,
    "linear on the sphere": replace(LINEAR, normalize=True),
    "normalised at the start": replace(LINEAR, normalize_start=True),
    "normalised before each step": replace(ONE, normalize_before=True, normalize_start=True),
    "linear, normalised before each step": replace(LINEAR, rows=13, dim=33, normalize_before=True),
    "one row, one step": replace(LINEAR, rows=1, steps=1),
    "one dim": replace(ONE, dim=1),
    "no rows": replace(ONE, rows=0),
    "many rows": replace(ONE, rows=37, dim=64, hidden=(128,), steps=20),
    "two layers, shared null": replace(ONE, guidance="shared"),
    "two layers, a null per row": replace(ONE, guidance="per row", normalize=True),
    "three layers": replace(TWO, activation="silu"),
    "layer norm": replace(TWO, activation="silu", out_norm=True),
    "linear, shared null": replace(LINEAR, guidance="shared"),
    "linear, a null per row": replace(LINEAR, rows=13, dim=33, guidance="per row"),
    "linear, layer norm, shared null": replace(LINEAR, guidance="shared", out_norm=True),
    "wide": replace(LINEAR, rows=3, dim=130, steps=3),
    "wide, a hidden layer of several blocks": replace(
        LINEAR, rows=18, dim=130, hidden=(300,), steps=2, guidance="per row"
    ),
    "layer norm, one hidden layer, shared null": replace(ONE, hidden=(90,), guidance="shared", out_norm=True),
    "four layers, shared null": replace(ONE, hidden=(20, 70, 12), guidance="shared", activation="relu"),
} | {name: replace(TWO, activation=name) for name in ACTIVATIONS}


@pytest.mark.usefixtures("nan_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_network_run_step_by_step(loop, case, dtype):
    loop.needs(dtype)
    made = case.tensors()
    truth = truth_of(case, made)
    given = arguments(case, made, dtype)
    ours = loop(*given)
    assert ours.dtype == dtype
    twin = relative_error(denoise_mlp_loop_ref(*given), truth)
    assert relative_error(ours, truth) <= 2 * twin + FLOOR[dtype]
    if dtype in AGREE:
        assert_agree(ours, truth, dtype)


def test_noise_is_asked_for_only_where_it_counts(loop):
    class Strict(Noise):
        def __init__(self, rest: Noise) -> None:
            self.rest, self.asked = rest, []

        def draw(self, index: int) -> Tensor:
            self.asked.append(index)
            return self.rest.draw(index)

    given = list(arguments(LINEAR, LINEAR.tensors(), torch.float32))
    coef = given[1].coef.clone()
    coef[2, 2] = 0.0
    given[1] = replace(given[1], coef=coef)
    given[5] = strict = Strict(given[5])
    loop(*given)
    assert strict.asked == [1, 2, 4, 5, 6]


def philox(rows: slice, dtype: torch.dtype, dim: int) -> PhiloxNoise:
    keys = torch.arange(1000)[rows]
    return PhiloxNoise(2**63 + 1, keys * keys * 2**40, keys % 3, dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_do_not_depend_on_each_other(loop, dtype):
    loop.needs(dtype)
    case = CASES["many rows"]
    given = list(arguments(case, case.tensors(), dtype))
    together = loop(*given[:5], philox(slice(0, case.rows), dtype, case.dim))
    for row in (0, 5, 36):
        rows = slice(row, row + 1)
        alone = loop(given[0][rows], given[1], given[2][rows], *given[3:5], philox(rows, dtype, case.dim))
        assert_agree(alone, together[rows], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_made_inside_are_the_draws_of_the_noise(loop, dtype):
    """Philox, its start given apart, and any other noise, against the same numbers handed in."""
    loop.needs(dtype)
    long = replace(ONE, dim=50, steps=12 if loop.interpreted else 90, guidance="shared")
    for case in (CASES["many rows"], LINEAR, long):
        given = arguments(case, case.tensors(), dtype)
        rows = slice(0, case.rows)
        draws = torch.stack([philox(rows, dtype, case.dim).draw(i) for i in range(case.steps + 1)])
        truth = loop(draws[0], *given[1:5], GivenNoise(draws))
        assert_agree(loop(None, *given[1:5], GivenNoise(draws)), truth, dtype)
        assert_agree(loop(None, *given[1:5], philox(rows, dtype, case.dim)), truth, dtype)
        assert_agree(loop(draws[0], *given[1:5], philox(rows, dtype, case.dim)), truth, dtype)
        start = StartNoise(given[0], philox(rows, dtype, case.dim))
        assert_agree(loop(None, *given[1:5], start), loop(given[0], *given[1:5], GivenNoise(draws)), dtype)


def test_draws_of_a_generator_are_taken_in_the_order_of_the_steps(loop):
    case = replace(LINEAR, steps=9)
    given = arguments(case, case.tensors(), torch.float32)

    def noise() -> GeneratorNoise:
        generator = torch.Generator().manual_seed(3)
        return GeneratorNoise(generator, case.rows, 1, case.dim, torch.float32, torch.device("cpu"))

    assert_agree(loop(None, *given[1:5], noise()), denoise_mlp_loop_ref(None, *given[1:5], noise()), torch.float32)


def test_weights_are_told_apart_by_the_object_that_holds_them(loop):
    """What a backend keeps of one network is never used for another."""
    for seed in range(20):
        torch.manual_seed(seed)
        w_in, cond, time = torch.randn(3, 3), torch.randn(2, 3), torch.randn(1, 3)
        x, coef = torch.randn(2, 3), torch.tensor([[1.0, 0.0, 0.0]]).double()
        ours = loop(x, MLPSampler(MLPWeights(w_in), time, coef), cond, None, 1.0, GivenNoise(x[None]))
        assert_agree(ours, x @ w_in.T + cond + time, torch.float32)


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize(
    "case",
    [
        replace(LINEAR, rows=61, dim=64, steps=30),
        replace(LINEAR, rows=61, dim=50, steps=30, normalize=True),
        replace(TWO, rows=61, dim=33, steps=9, guidance="shared", activation="gelu"),
        replace(TWO, rows=61, dim=33, steps=9, guidance="per row", activation="silu", out_norm=True),
        replace(TWO, rows=61, dim=20, steps=9, activation="tanh"),
    ],
    ids=["linear", "sphere", "guided", "norm", "tanh"],
)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(case):
    loop = denoise_mlp_loop.bind("cpu", "cpu")
    _, sampler, cond, uncond, scale, _ = arguments(case, case.tensors(), torch.float32)
    whole = loop(None, sampler, cond, uncond, scale, philox(slice(0, case.rows), torch.float32, case.dim))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 61), slice(0, 1), slice(60, 61), slice(7, 9), slice(20, 33), slice(3, 50)):
            null = uncond[rows] if case.guidance == "per row" else uncond
            part = loop(None, sampler, cond[rows], null, scale, philox(rows, torch.float32, case.dim))
            assert torch.equal(part, whole[rows]), (threads, rows)


@pytest.mark.skipif("triton" not in places(denoise_mlp_loop), reason="no Triton here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_draws_in_half_precision_are_those_that_the_noise_hands_out(dtype):
    loop = place_op(denoise_mlp_loop, "triton")
    loop.needs(dtype)
    case = replace(ONE, rows=5, dim=20, steps=4)
    given, rows = arguments(case, case.tensors(), dtype), slice(0, 5)
    draws = torch.stack([philox(rows, dtype, case.dim).draw(i) for i in range(case.steps + 1)])
    truth = loop(None, *given[1:5], GivenNoise(draws))
    assert relative_error(loop(None, *given[1:5], philox(rows, dtype, case.dim)), truth) <= FLOOR[dtype]


@pytest.mark.skipif("triton" not in places(denoise_mlp_loop), reason="no Triton here")
def test_what_does_not_fit_is_named_by_triton_too():
    loop = place_op(denoise_mlp_loop, "triton")
    x, sampler, cond, uncond, scale, noise = arguments(LINEAR, LINEAR.tensors(), torch.float32)
    for arguments_of, match in (
        ((x, sampler, cond[:, :5], uncond, scale, noise), r"cond must have shape \[4, 6\]"),
        ((x[:3], sampler, cond, uncond, scale, noise), r"x_t must have shape \[4, 6\]"),
        ((x.double(), sampler, cond, uncond, scale, noise), r"x_t must have .* dtype torch.float32"),
        ((x, sampler, cond, uncond, scale, GivenNoise(noise.noise[:4])), r"the draws of 6 steps \(got \[3, 4, 6\]\)"),
    ):
        with pytest.raises(InvalidArgument, match=f"denoise_mlp_loop: .*{match}"):
            loop(*arguments_of)


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
@pytest.mark.parametrize("turn", [lambda x: x, lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, ::2]])
def test_opcheck(turn):
    from fastdiff.ops.cpu.denoise_mlp_loop import _pack

    loop = denoise_mlp_loop.bind("cpu", "cpu")
    case = replace(ONE, rows=5, dim=8, hidden=(12,), guidance="shared")
    x, sampler, cond, uncond, scale, noise = arguments(case, case.tensors(), torch.float32)
    turned = [turn(value) for value in (x, cond, uncond)]
    keys = torch.arange(10)[::2]
    for given, row_key in ((noise.noise[1:], None), (torch.cat([noise.noise] * 2, 2)[1:, :, :8], None), (None, keys)):
        common = (turned[1], turned[2], scale, given, 7, row_key, row_key)
        torch.library.opcheck(torch.ops.fastdiff.denoise_mlp_loop.default, (turned[0], *_pack(sampler), *common))
    assert loop.backend == "cpu"


@pytest.mark.skipif(CPU_MISSING, reason="the C++ ops are not built")
def test_what_does_not_fit_is_named():
    loop = denoise_mlp_loop.bind("cpu", "cpu")
    x, sampler, cond, uncond, scale, noise = arguments(LINEAR, LINEAR.tensors(), torch.float32)
    rest = (uncond, scale)
    with pytest.raises(RuntimeError, match=r"denoise_mlp_loop: cond must have shape \[any, 6\] \(got \[4, 5\]\)"):
        loop(x, sampler, cond[:, :5], *rest, noise)
    with pytest.raises(RuntimeError, match=r"denoise_mlp_loop: x_t must have shape \[4, 6\] \(got \[3, 6\]\)"):
        loop(x[:3], sampler, cond, *rest, noise)
    with pytest.raises(RuntimeError, match=r"denoise_mlp_loop: noise must hold a draw for step 3 \(got 3 draws\)"):
        loop(x, sampler, cond, *rest, GivenNoise(noise.noise[:4]))
    with pytest.raises(RuntimeError, match=r"denoise_mlp_loop: x_t must be float32 \(got float64\)"):
        loop(x.double(), sampler, cond, *rest, noise)


def test_guidance_of_one_is_the_conditional_branch():
    cond, uncond = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    assert_agree(guided(uncond, cond, 1.0), cond, torch.float64)
    assert torch.equal(guided(uncond, cond, 0.0), uncond)
