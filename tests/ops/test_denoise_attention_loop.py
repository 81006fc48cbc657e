"""denoise_attention_loop against its formula, written out row by row with every pad that the pad key stands for."""

import importlib
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
from fastdiff.noise import GeneratorNoise, GivenNoise, Noise, PhiloxNoise, StartNoise
from fastdiff.ops.causal_transformer import BlockWeights
from fastdiff.ops.cpu.transformer import packed_blocks
from fastdiff.ops.denoise_attention_loop import CausalPrefix, denoise_attention_loop, denoise_attention_loop_ref
from tests.devices import place_op, places
from tests.tolerances import AGREE, FLOOR, assert_agree, relative_error

PLACES = places(denoise_attention_loop)
IN_TRITON = pytest.mark.skipif("triton" not in PLACES, reason="Triton needs a CUDA device, or TRITON_INTERPRET=1")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# --- a random problem -------------------------------------------------------------------------------------------------


def random_block(dim: int, heads: int, dtype: torch.dtype) -> BlockWeights:
    def normal(*shape: int) -> Tensor:
        scale = 0.3 if len(shape) == 1 else 0.8 / math.sqrt(shape[1])  # the size of what comes in stays
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
    users: list[tuple[int, int]],
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
    """float64 arguments by name. `users`: how many pads and how many slots each has."""
    torch.manual_seed(seed)
    dtype = torch.float64
    pads, slots = (torch.tensor([user[i] for user in users], dtype=torch.int64) for i in (0, 1))
    coef = torch.rand(steps, 3, dtype=dtype)
    coef[-1, 2] = 0.0
    return {
        "x_t": torch.randn(len(users) * samples, dim, dtype=dtype),
        "blocks": tuple(random_block(dim, heads, dtype) for _ in range(n_blocks)),
        "prefix": CausalPrefix(
            cond=torch.randn(branches, len(users), dim, dtype=dtype),
            keys_values=torch.randn(n_blocks, branches, int(slots.sum()), 2 * dim, dtype=dtype),
            lengths=slots,
            pad=torch.randn(n_blocks, branches, 2 * dim, dtype=dtype),
            log_pads=pads.to(dtype).log(),
            uniform=None if uniform is None else torch.tensor(uniform),
            n_heads=heads,
        ),
        "guidance_scale": 1.7,
        "input_scale": 0.4,
        "time": torch.randn(steps, dim, dtype=dtype),
        "coef": coef,
        "normalize": normalize,
        "noise": GivenNoise(torch.randn(steps + 1, len(users) * samples, dim, dtype=dtype)),
    }


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of the op in another dtype; but not coef."""
    if isinstance(value, dict):
        return {name: part if name == "coef" else cast(part, dtype) for name, part in value.items()}
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    if isinstance(value, (BlockWeights, CausalPrefix)):
        return replace(value, **{name: cast(getattr(value, name), dtype) for name in value.__dataclass_fields__})
    return GivenNoise(cast(value.noise, dtype)) if isinstance(value, GivenNoise) else value


def in_float32(arguments: dict[str, Any]) -> dict[str, Any]:
    return dict(cast(arguments, torch.float32))


def run(place: str, arguments: dict[str, Any]) -> Tensor:
    op = place_op(denoise_attention_loop, place)
    op.needs(arguments["x_t"].dtype)
    x_0: Tensor = op(*arguments.values())
    assert x_0.dtype == arguments["x_t"].dtype
    return x_0


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
    users: list[tuple[int, int]],
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
    samples = x_t.shape[0] // max(len(users), 1)
    dim, heads = x_t.shape[1], prefix.n_heads
    starts = [sum(slots for _, slots in users[:i]) for i in range(len(users))]
    rows = []
    for row, start in enumerate(x_t):
        user, x = row // samples, start
        pads, slots = users[user]
        even = prefix.uniform is not None and bool(prefix.uniform[user])
        for i, (c_out, c_xt, c_noise) in enumerate(coef.tolist()):
            outputs = []
            for branch in range(prefix.cond.shape[0]):
                h = prefix.cond[branch, user] + input_scale * x + time[i]
                for layer, block in enumerate(blocks):
                    own = prefix.keys_values[layer, branch, starts[user] : starts[user] + slots]
                    seen = torch.cat([prefix.pad[layer, branch].expand(pads, -1), own])
                    keys, values = seen.view(-1, 2, heads, dim // heads).permute(1, 2, 0, 3)
                    h = block_by_hand(block, h, keys, values, even)
                outputs.append(h)
            output = outputs[0] if len(outputs) == 1 else outputs[1] + guidance_scale * (outputs[0] - outputs[1])
            x = c_out * output + c_xt * x + c_noise * noise.draw(1 + i)[row]
            x = x / x.norm() if normalize else x
        rows.append(x)
    return torch.stack(rows) if rows else x_t


# --- tests ------------------------------------------------------------------------------------------------------------


@st.composite
def settings(draw: st.DrawFn) -> dict[str, Any]:
    users = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20)), min_size=1, max_size=4))
    heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "users": users,
        "branches": draw(st.integers(1, 2)),
        "samples": draw(st.integers(1, 3)),
        "heads": heads,
        "dim": heads * draw(st.sampled_from([1, 3, 8, 18])),
        "n_blocks": draw(st.integers(1, 3)),
        "steps": draw(st.integers(1, 4)),
        "uniform": draw(st.none() | st.lists(st.booleans(), min_size=len(users), max_size=len(users))),
        "normalize": draw(st.booleans()),
        "seed": draw(st.integers(0, 100)),
    }


def is_its_formula(place: str, setting: dict[str, Any], dtype: torch.dtype) -> None:
    exact = cast(cast(problem(**setting), dtype), torch.float64)  # numbers that the dtype can hold
    truth = loop_by_hand(setting["users"], **exact)
    narrow = cast(exact, dtype)
    twin = loop_by_hand(setting["users"], **narrow)
    # guidance and near-constant rows under a LayerNorm amplify rounding, in the twin or in ours
    floor = AGREE.get(dtype, FLOOR[dtype])
    assert relative_error(run(place, narrow), truth) <= 2 * relative_error(twin, truth) + floor


@pytest.mark.parametrize("place", [place for place in PLACES if place != "triton"])
@given(setting=settings())
def test_is_its_formula(place: str, setting: dict[str, Any]) -> None:
    is_its_formula(place, setting, torch.float32)
    if place.startswith("torch"):
        exact = problem(**setting)
        assert_agree(run(place, exact), loop_by_hand(setting["users"], **exact), torch.float64)


# Every draw of the sizes above would be another kernel to compile, or seconds to interpret: a few of them instead.
SETTINGS_IN_TRITON: list[dict[str, Any]] = [
    {"users": [(0, 0)], "heads": 1, "dim": 3, "n_blocks": 1, "steps": 1},
    {"users": [(3, 1), (0, 0), (2, 9)], "samples": 7, "uniform": [False, False, True], "normalize": True},
    {"users": [(5, 20), (0, 3), (1, 0)], "samples": 3, "heads": 4, "dim": 72, "branches": 2, "steps": 4},
    {"users": [(0, 2), (4, 0)], "heads": 3, "dim": 54, "branches": 2, "uniform": [False, True], "normalize": True},
]


@IN_TRITON
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS_IN_TRITON, ids=lambda setting: str(setting["users"]))
def test_is_its_formula_in_triton(dtype: torch.dtype, setting: dict[str, Any]) -> None:
    is_its_formula("triton", setting, dtype)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "cpu"])
def test_slots_beyond_the_last_are_not_read(place: str) -> None:
    arguments = in_float32(problem(users=[(3, 1), (0, 0), (2, 4)], branches=2))
    prefix = arguments["prefix"]
    nothing = torch.full((2, 2, 9, 16), torch.nan)
    roomy = replace(prefix, keys_values=torch.cat([prefix.keys_values, nothing], dim=2))
    assert_agree(run(place, arguments | {"prefix": roomy}), run(place, arguments), torch.float32)


@IN_TRITON
@pytest.mark.parametrize("branches", [1, 2])
def test_in_triton_a_row_is_the_same_in_any_batch(branches: int) -> None:
    users = [(n % 3, n) for n in (7, 0, 9, 1, 3, 2)]
    starts = [sum(n for _, n in users[:i]) for i in range(len(users) + 1)]
    arguments = in_float32(problem(users=users, samples=4, branches=branches, uniform=[n == 0 for _, n in users]))
    whole, order = run("triton", arguments).view(6, 4, -1), [4, 1, 2]
    prefix = arguments["prefix"]
    some = replace(
        prefix,
        cond=prefix.cond[:, order],
        keys_values=torch.cat([prefix.keys_values[:, :, starts[i] : starts[i + 1]] for i in order], dim=2),
        lengths=prefix.lengths[order],
        log_pads=prefix.log_pads[order],
        uniform=prefix.uniform[order],
    )
    draws = arguments["noise"].noise.view(4, 6, 4, -1)[:, order].flatten(1, 2)
    x_t = arguments["x_t"].view(6, 4, -1)[order].flatten(0, 1)
    part = run("triton", arguments | {"x_t": x_t, "prefix": some, "noise": GivenNoise(draws)})
    assert_agree(part.view(3, 4, -1), whole[order], torch.float32)


@IN_TRITON
@pytest.mark.parametrize("branches", [1, 2])
def test_in_triton_copies_of_a_row_share_its_slots_out(branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("fastdiff.kernels.denoise_attention_loop")
    tuning = importlib.import_module("fastdiff.kernels.tuning")
    users = [(n % 3, n) for n in (7, 0, 70, 1)]
    arguments = in_float32(problem(users=users, samples=2, branches=branches, uniform=[n == 0 for _, n in users]))
    truth = run("torch", arguments)
    rows = len(users) * 2 * branches
    for shares in (1, 2, 8):
        monkeypatch.setattr(kernel, "_PROGRAMS", shares * rows // 16)
        monkeypatch.setattr(tuning, "_chosen", {})
        assert_agree(run("triton", arguments), truth, torch.float32)
        assert [config.constants["SHARES"] for config in tuning._chosen.values()] == [shares]


LAYOUTS = {
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "transposed": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place: str, layout: str, nan_empty: None) -> None:
    """Also: no unwritten memory reaches the result."""
    arguments = in_float32(problem(users=[(3, 1), (0, 0), (2, 4)], samples=2, branches=2))
    expected = run(place, arguments)
    change, prefix = LAYOUTS[layout], arguments["prefix"]
    for name in ("x_t", "time"):
        arguments[name] = change(arguments[name])
    names = ("cond", "keys_values", "lengths", "pad", "log_pads")
    arguments["prefix"] = replace(prefix, **{name: change(getattr(prefix, name)) for name in names})
    arguments["noise"] = GivenNoise(change(arguments["noise"].noise))
    ours = run(place, arguments)
    assert ours.isfinite().all()
    assert ours.is_contiguous()
    if place == "cpu":
        assert torch.equal(ours, expected)
    else:
        assert_agree(ours, expected, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_a_real_size(place: str) -> None:
    """ADRec's own: 2 blocks of 4 heads on 128 dims, 49 keys before the token."""
    users = [(50 - n, n - 1) for n in (1, 6, 37, 50)]
    exact = problem(users=users, heads=4, dim=128, steps=4, branches=2)
    ours = run(place, in_float32(exact))
    truth = loop_by_hand(users, **exact)
    twin = loop_by_hand(users, **in_float32(exact))
    assert relative_error(ours, truth) <= 2 * relative_error(twin, truth) + FLOOR[torch.float32]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rest", ["given", "philox", "generator"])
def test_every_kind_of_noise(place: str, rest: str) -> None:
    """The loop asks each kind for the draws that it gives when asked one by one."""
    users, rows, dim, steps = [(2, 3), (0, 1), (1, 0)], 6, 8, 4

    def make() -> Noise:
        if rest == "given":
            return GivenNoise(torch.randn(steps, rows, dim, generator=torch.Generator().manual_seed(3)))
        if rest == "philox":
            keys = torch.tensor([3, 3, -(1 << 60), 5, 1 << 40, 5])
            return PhiloxNoise((1 << 64) - 5, keys, torch.tensor([0, 1, 0, 1, 0, 1]), dim, torch.float32)
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return GeneratorNoise(generators, 3, 2, dim, torch.float32, torch.device("cpu"))

    arguments = in_float32(problem(users=users, samples=2, dim=dim, steps=steps))
    once = make()
    arguments["noise"] = GivenNoise(torch.stack([arguments["x_t"], *(once.draw(1 + i) for i in range(steps - 1))]))
    expected = denoise_attention_loop_ref(**arguments)
    arguments["noise"] = StartNoise(arguments["x_t"], make())
    assert_agree(run(place, arguments), expected, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_noise_is_drawn_only_where_it_counts(place: str) -> None:
    class Recorder(Noise):
        def __init__(self) -> None:
            self.asked: list[int] = []

        def draw(self, index: int) -> Tensor:
            self.asked.append(index)
            return torch.zeros(2, 8)

    arguments = in_float32(problem(users=[(1, 0), (2, 0)], steps=4))
    arguments["coef"][1, 2] = 0.0
    arguments["noise"] = recorder = Recorder()
    run(place, arguments)
    assert recorder.asked == [1, 3]


@pytest.mark.parametrize("place", PLACES)
def test_nobody(place: str) -> None:
    arguments = in_float32(problem(users=[]))
    assert run(place, arguments).shape == (0, 8)


@pytest.mark.parametrize("place", PLACES)
def test_rows_must_be_shared_out_evenly(place: str) -> None:
    arguments = in_float32(problem(users=[(1, 0), (2, 0)]))
    arguments["x_t"] = torch.zeros(3, 8)
    with pytest.raises(InvalidArgument, match=r"same number of rows for each of the prefix's 2 users \(got 3 rows\)"):
        run(place, arguments)


# --- what only the C++ loop promises ----------------------------------------------------------------------------------

built = pytest.mark.skipif("cpu" not in PLACES, reason="the C++ ops are not built")


@built
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("heads", "dim"), [(2, 36), (4, 64)])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_number_of_threads(
    branches: int, heads: int, dim: int
) -> None:
    """Few rows are computed by several threads together, each some of the heads and outputs."""
    users = [(n % 3, n) for n in (7, 0, 49, 1, 16, 15, 14, 30, 2, 3, 5)]
    uniform = [n == 0 for _, n in users]
    arguments = in_float32(problem(users=users, dim=dim, heads=heads, samples=2, branches=branches, uniform=uniform))
    loop = denoise_attention_loop.bind("cpu", "cpu")
    whole = loop(*arguments.values()).view(len(users), 2, -1)
    prefix, starts = arguments["prefix"], [0, *torch.tensor([n for _, n in users]).cumsum(0).tolist()]
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(loop(*arguments.values()).view_as(whole), whole)
        for order in ([0], [2, 1], [9, 4, 2, 8, 3], list(range(10, -1, -1))):
            slots = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
            some = replace(
                prefix,
                cond=prefix.cond[:, order],
                keys_values=prefix.keys_values[:, :, slots],
                lengths=prefix.lengths[order],
                log_pads=prefix.log_pads[order],
                uniform=prefix.uniform[order],
            )
            draws = arguments["noise"].noise.view(4, len(users), 2, -1)[:, order].flatten(1, 2)
            x_t = arguments["x_t"].view(len(users), 2, -1)[order].flatten(0, 1)
            part = loop(*{**arguments, "x_t": x_t, "prefix": some, "noise": GivenNoise(draws)}.values())
            assert torch.equal(part.view(len(order), 2, -1), whole[order])


@built
def test_room_beyond_the_last_slot_is_refused() -> None:
    arguments = in_float32(problem(users=[(3, 1), (2, 4)]))
    prefix = arguments["prefix"]
    roomy = replace(prefix, keys_values=torch.cat([prefix.keys_values, prefix.keys_values], dim=2))
    with pytest.raises(RuntimeError, match=r"keys_values must have shape \[2, 1, 5, 16\] \(got \[2, 1, 10, 16\]\)"):
        run("cpu", arguments | {"prefix": roomy})


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    denoise_attention_loop.bind("cpu", "cpu")
    arguments = in_float32(problem(users=[(3, 1), (0, 2)], uniform=[True, False]))
    change, prefix, blocks = LAYOUTS[layout], arguments["prefix"], arguments["blocks"]
    torch.library.opcheck(
        torch.ops.fastdiff.denoise_attention_loop.default,
        (
            change(arguments["x_t"]),
            packed_blocks(blocks),
            16,
            prefix.n_heads,
            blocks[0].eps,
            change(prefix.cond),
            change(prefix.keys_values),
            prefix.lengths,
            change(prefix.pad),
            change(prefix.log_pads),
            prefix.uniform,
            1.0,
            0.4,
            change(arguments["time"]),
            arguments["coef"],
            False,
            change(arguments["noise"].noise[1:]),
            0,
            None,
            None,
        ),
    )
