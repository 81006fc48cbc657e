"""denoise_attention_loop against its formula, written out row by row with every key that a biased key stands for."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.noise import GivenNoise, Noise
from fastdiff.ops.denoise_attention_loop import BlockWeights, CausalPrefix, denoise_attention_loop
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

BACKENDS = denoise_attention_loop.available("cpu")


# --- a random problem -------------------------------------------------------------------------------------------------


def random_block(dim: int, heads: int, dtype: torch.dtype) -> BlockWeights:
    def normal(*shape: int, scale: float = 0.3) -> Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype)

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + normal(dim), normal(dim)

    return BlockWeights(
        qkv_weight=normal(3 * dim, dim),
        qkv_bias=normal(3 * dim),
        out_weight=normal(dim, dim),
        out_bias=normal(dim),
        norm_1=norm(),
        up_weight=normal(2 * dim, dim),
        up_bias=normal(2 * dim),
        down_weight=normal(dim, 2 * dim),
        down_bias=normal(dim),
        norm_2=norm(),
        n_heads=heads,
    )


def problem(
    *,
    multiplicities: list[list[int]],
    branches: int = 1,
    samples: int = 1,
    heads: int = 2,
    dim: int = 8,
    n_blocks: int = 2,
    steps: int = 3,
    uniform: list[bool] | None = None,
    normalize: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """float64 arguments by name. `multiplicities[b]` says how many equal keys each of user b's keys stands for."""
    torch.manual_seed(seed)
    dtype = torch.float64
    users, length = len(multiplicities), max((len(m) for m in multiplicities), default=0)
    counts = torch.tensor([m + [0] * (length - len(m)) for m in multiplicities], dtype=dtype).view(users, length)
    shape = (n_blocks, branches, users, heads)
    coef = torch.rand(steps, 3, dtype=dtype)
    coef[-1, 2] = 0.0
    return {
        "x_t": torch.randn(users * samples, dim, dtype=dtype),
        "blocks": tuple(random_block(dim, heads, dtype) for _ in range(n_blocks)),
        "prefix": CausalPrefix(
            cond=torch.randn(branches, users, dim, dtype=dtype),
            keys=torch.randn(*shape, dim // heads, length, dtype=dtype),
            values=torch.randn(*shape, length, dim // heads, dtype=dtype),
            key_bias=counts.log(),
            uniform=None if uniform is None else torch.tensor(uniform),
        ),
        "guidance_scale": 1.7,
        "input_scale": 0.4,
        "time": torch.randn(steps, dim, dtype=dtype),
        "coef": coef,
        "normalize": normalize,
        "noise": GivenNoise(torch.randn(steps + 1, users * samples, dim, dtype=dtype)),
    }


def in_float32(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same problem in float32; coef stays float64, as the contract says."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.float() if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(cast(item) for item in value)
        if isinstance(value, (BlockWeights, CausalPrefix)):
            names = value.__dataclass_fields__
            return replace(value, **{name: cast(getattr(value, name)) for name in names})
        return GivenNoise(value.noise.float()) if isinstance(value, GivenNoise) else value

    return {name: value if name == "coef" else cast(value) for name, value in arguments.items()}


# --- the formula, one row at a time -----------------------------------------------------------------------------------


def block_by_hand(block: BlockWeights, x: Tensor, keys: Tensor, values: Tensor, even: bool) -> Tensor:
    """x [D]; keys, values [H, P, D / H], every key of the prefix on its own."""
    query, key, value = (block.qkv_weight @ x + block.qkv_bias).view(3, block.n_heads, -1)
    gathered = []
    for head in range(block.n_heads):
        all_keys = torch.cat([keys[head], key[head].unsqueeze(0)])
        all_values = torch.cat([values[head], value[head].unsqueeze(0)])
        logits = all_keys @ query[head]
        weights = torch.softmax(torch.zeros_like(logits) if even else logits, dim=0)
        gathered.append(weights @ all_values)
    attended = block.out_weight @ torch.cat(gathered) + block.out_bias
    h = F.layer_norm(x + attended, x.shape, *block.norm_1, eps=block.eps)
    up = block.up_weight @ h + block.up_bias
    up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return F.layer_norm(h + block.down_weight @ up + block.down_bias, x.shape, *block.norm_2, eps=block.eps)


def loop_by_hand(
    multiplicities: list[list[int]],
    x_t: Tensor,
    blocks: tuple[BlockWeights, ...],
    prefix: CausalPrefix,
    guidance_scale: float,
    input_scale: float,
    time: Tensor,
    coef: Tensor,
    normalize: bool,
    noise: Noise,
) -> Tensor:
    samples = x_t.shape[0] // max(len(multiplicities), 1)
    rows = []
    for row, start in enumerate(x_t):
        user, x = row // samples, start
        copies = torch.tensor([j for j, m in enumerate(multiplicities[user]) for _ in range(m)], dtype=torch.int64)
        even = prefix.uniform is not None and bool(prefix.uniform[user])
        for i, (c_out, c_xt, c_noise) in enumerate(coef.tolist()):
            outputs = []
            for branch in range(prefix.cond.shape[0]):
                h = prefix.cond[branch, user] + input_scale * x + time[i]
                for layer, block in enumerate(blocks):
                    keys = prefix.keys[layer, branch, user][:, :, copies].transpose(1, 2)
                    h = block_by_hand(block, h, keys, prefix.values[layer, branch, user][:, copies], even)
                outputs.append(h)
            output = outputs[0] if len(outputs) == 1 else outputs[1] + guidance_scale * (outputs[0] - outputs[1])
            x = c_out * output + c_xt * x + c_noise * noise.draw(1 + i)[row]
            x = x / x.norm() if normalize else x
        rows.append(x)
    return torch.stack(rows) if rows else x_t


# --- tests ------------------------------------------------------------------------------------------------------------


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    """Users with 0 to 4 keys, each standing for 0 (absent) to 5 equal ones."""
    multiplicities = draw(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4))
    heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "multiplicities": multiplicities,
        "branches": draw(st.integers(1, 2)),
        "samples": draw(st.integers(1, 3)),
        "heads": heads,
        "dim": heads * draw(st.sampled_from([1, 3, 8])),
        "n_blocks": draw(st.integers(1, 3)),
        "steps": draw(st.integers(1, 4)),
        "uniform": draw(
            st.none() | st.lists(st.booleans(), min_size=len(multiplicities), max_size=len(multiplicities))
        ),
        "normalize": draw(st.booleans()),
        "seed": draw(st.integers(0, 100)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@given(setting=settings())
def test_is_its_formula(backend: str, setting: dict[str, Any]) -> None:
    exact = problem(**setting)
    truth = loop_by_hand(setting["multiplicities"], **exact)
    single = in_float32(exact)
    twin = loop_by_hand(setting["multiplicities"], **single)
    op = denoise_attention_loop.bind(backend, "cpu")
    ours = op(*single.values())
    assert ours.dtype == torch.float32
    # guidance and near-constant rows under a LayerNorm amplify rounding, in the twin or in ours
    assert relative_error(ours, truth) <= 2 * relative_error(twin, truth) + AGREE[torch.float32]
    if backend == "torch":
        assert_agree(op(*exact.values()), truth, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_layouts_of_x_t(backend: str, layout: str, nan_empty: None) -> None:
    """Also: no unwritten memory reaches the result."""
    arguments = in_float32(problem(multiplicities=[[3, 1], [0, 0], [2]], samples=2, branches=2))
    op = denoise_attention_loop.bind(backend, "cpu")
    x_t = arguments["x_t"]
    expected = op(*arguments.values())
    if layout == "sliced":
        arguments["x_t"] = torch.cat([x_t, x_t], dim=1)[:, : x_t.shape[1]]
    elif layout == "transposed":
        arguments["x_t"] = x_t.T.contiguous().T
    ours = op(*arguments.values())
    assert ours.isfinite().all()
    assert ours.is_contiguous()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_size(backend: str) -> None:
    """ADRec's own: 2 blocks of 4 heads on 128 dims, 49 keys before the token."""
    multiplicities = [[50 - n, *[1] * (n - 1)] for n in (1, 6, 37, 50)]
    exact = problem(multiplicities=multiplicities, heads=4, dim=128, steps=4, branches=2)
    ours = denoise_attention_loop.bind(backend, "cpu")(*in_float32(exact).values())
    truth = loop_by_hand(multiplicities, **exact)
    twin = loop_by_hand(multiplicities, **in_float32(exact))
    assert relative_error(ours, truth) <= 2 * relative_error(twin, truth) + FLOOR[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_drawn_only_where_it_counts(backend: str) -> None:
    class Recorder(Noise):
        def __init__(self) -> None:
            self.asked: list[int] = []

        def draw(self, index: int) -> Tensor:
            self.asked.append(index)
            return torch.zeros(2, 8)

    arguments = in_float32(problem(multiplicities=[[1], [2]], steps=4))
    arguments["coef"][1, 2] = 0.0
    arguments["noise"] = recorder = Recorder()
    denoise_attention_loop.bind(backend, "cpu")(*arguments.values())
    assert recorder.asked == [1, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody(backend: str) -> None:
    arguments = in_float32(problem(multiplicities=[]))
    assert denoise_attention_loop.bind(backend, "cpu")(*arguments.values()).shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_must_be_shared_out_evenly(backend: str) -> None:
    arguments = in_float32(problem(multiplicities=[[1], [2]]))
    arguments["x_t"] = torch.zeros(3, 8)
    with pytest.raises(InvalidArgument, match=r"same number of rows for each of the prefix's 2 users \(got 3 rows\)"):
        denoise_attention_loop.bind(backend, "cpu")(*arguments.values())
