"""ADRec: the restructured inference against the published algorithm and against the authors' recorded outputs."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.published.adrec import PublishedADRec
from fastdiff import plan as plans
from fastdiff.config import ADRecConfig
from fastdiff.models.adrec import ADRec
from fastdiff.models.base import Histories
from fastdiff.noise import GivenNoise
from fastdiff.plan import StepPlan
from fastdiff.schedule import ScheduleConfig
from tests.devices import GPU, place_all, places
from tests.tolerances import AGREE, FLOOR, GOLDEN, assert_agree, relative_error

FAMILIES = {"cosine": "cosine_alpha_bar"}
"""The authors' schedule names that are called differently here."""
SHORTEST_CHAIN = {"linear": 20, "pw_lin": 20}
"""Below these T their betas leave (0, 1]."""
DECODERS = {"att": "attention", "mlp": "mlp"}
PLACES = [place for place in places(*ADRec.ops) if place != "triton" or GPU]  # minutes, where it is interpreted
NOT_OF = {
    "att": ("row_linear", "denoise_mlp_loop"),
    "mlp": ("prepare_causal_prefix", "denoise_attention_loop"),
}
"""Ops that a decoder does without."""


# --- building blocks --------------------------------------------------------------------------------------------------


def schedule_of(args: Any) -> ScheduleConfig:
    scale = 1000 / args.diffusion_steps
    ends = {"beta_start": scale * 1e-4, "beta_end": scale * 0.02} if args.noise_schedule == "linear" else {}
    family = FAMILIES.get(args.noise_schedule, args.noise_schedule)
    return ScheduleConfig(family, args.diffusion_steps, beta_a=args.beta_a, beta_b=args.beta_b, **ends)


def ours_of(published: PublishedADRec, place: str = "torch", **layers: int) -> ADRec:
    """Our model on the weights and settings of a published one."""
    args = published.args
    config = ADRecConfig(
        n_items=args.item_num,
        hidden_size=args.hidden_size,
        max_seq_len=args.max_len,
        schedule=schedule_of(args),
        decoder=DECODERS[args.dif_decoder],
        lambda_uncertainty=args.lambda_uncertainty,
        rescale_timesteps=args.rescale_timesteps,
        geodesic=args.geodesic,
        **layers,
    )
    weights = {name: value.detach() for name, value in published.state_dict().items()}
    dtype = weights[ADRec.item_table_key].dtype
    ops = tuple(op for op in ADRec.ops if op.name not in NOT_OF[args.dif_decoder])
    return ADRec(config, weights, place_all(ops, place, dtype))


def make_published(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PublishedADRec:
    """A published model whose every parameter is off its initial value, the pad row and the norms included."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "max_len": 6, "item_num": 11, "diffusion_steps": 5, "lambda_uncertainty": 0.3}
    layers = {name: settings.pop(name) for name in ("heads", "encoder_blocks", "decoder_blocks") if name in settings}
    model = PublishedADRec({**sizes, **settings}, **layers).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_histories(lengths: list[int], n_items: int, seed: int = 0) -> Histories:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths, default=0)
    items = torch.randint(1, n_items + 1, (len(lengths), width), generator=generator)
    filled = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64).unsqueeze(1)
    return Histories(items * filled, torch.tensor(lengths, dtype=torch.int64))


def left_padded(histories: Histories, max_len: int) -> Tensor:
    padded = torch.zeros(histories.batch_size, max_len, dtype=torch.int64)
    for row, (items, length) in enumerate(zip(histories.items, histories.lengths.tolist(), strict=True)):
        padded[row, max_len - length :] = items[:length]
    return padded


def unpadded(history: Tensor) -> Histories:
    """Left-padded histories [B, L] as the model takes them."""
    lengths = (history > 0).sum(1)
    rows = [row[len(row) - n :] for row, n in zip(history, lengths.tolist(), strict=True)]
    return Histories(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)


def random_noise(model: ADRec, rows: int, plan: StepPlan, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (plan.num_steps + 1, rows, model.config.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(model.dtype)


def run(
    model: ADRec, histories: Histories, noise: Tensor, plan: StepPlan | None = None, guidance: float = 1.0
) -> Tensor:
    plan = plan or model.plan("ddpm")
    state = model.prepare(model.encode(histories, model.item_table), plan, guidance)
    samples = noise.shape[1] // max(histories.batch_size, 1)
    return model.sample(model.repeat(state, samples) if samples > 1 else state, plan, GivenNoise(noise))


# --- the authors' recorded outputs ------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("name", "weights_of"),
    [("adrec_ml100k", None), ("adrec_ml100k_cfg", "adrec_ml100k"), ("adrec_mlp_decoder", None)],
)
def test_recorded_outputs(golden: Callable[..., dict[str, Any]], name: str, weights_of: str | None, place: str) -> None:
    record = golden(name, weights_of)
    published = PublishedADRec(record["args"])
    published.load_state_dict(record["weights"])
    model = ours_of(published, place)
    histories = unpadded(record["history"])

    theirs = published(record["history"], record["noise"])
    ours = run(model, histories, record["noise"], guidance=float(record["args"]["cfg_scale"]))

    assert relative_error(theirs, record["x0"]) <= GOLDEN, "the yardstick is not the authors' algorithm"
    assert relative_error(ours, record["x0"]) <= GOLDEN
    assert_same_top(ours @ model.item_table.T, record["topk_items"], record["topk_scores"])


def assert_same_top(scores: Tensor, items: Tensor, recorded: Tensor) -> None:
    """The same items in the same order; where they differ, their scores are a tie."""
    tie = GOLDEN * float(scores.abs().max())
    ours = scores.topk(items.shape[1])
    assert float((ours.values - recorded).abs().max()) <= tie
    differs = ours.indices != items
    assert not bool((differs & ((scores.gather(1, items) - ours.values).abs() > tie)).any())


# --- restructured equals published ------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    schedule = draw(st.sampled_from(["trunc_lin", "linear", "cosine", "sqrt", "trunc_cos", "pw_lin"]))
    shortest = SHORTEST_CHAIN.get(schedule, 1)
    window = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, window), min_size=1, max_size=4))
    return {
        "noise_schedule": schedule,
        "diffusion_steps": draw(st.integers(shortest, max(7, shortest + 2))),
        "max_len": window,
        "hidden_size": draw(st.sampled_from([4, 8, 20])),
        "item_num": draw(st.integers(1, 30)),
        "dif_decoder": draw(st.sampled_from(["att", "att", "mlp"])),
        "cfg_scale": draw(st.sampled_from([1, 0.0, 2.5])),
        "geodesic": draw(st.booleans()),
        "rescale_timesteps": draw(st.booleans()),
        "lambda_uncertainty": draw(st.sampled_from([0.001, 0.3, 1.0])),
        "lengths": [*lengths, *draw(st.sampled_from([[], [0], [1], [window], [0, 1, window]]))],
        "seed": draw(st.integers(0, 1000)),
    }


def check_against_published(case: dict[str, Any], place: str) -> None:
    settings = {name: value for name, value in case.items() if name != "lengths"}
    published = make_published(**settings)
    model = ours_of(published, place)
    histories = random_histories(case["lengths"], case["item_num"], case["seed"])
    noise = random_noise(model, histories.batch_size, model.plan("ddpm"), case["seed"])
    ours = run(model, histories, noise, guidance=float(case["cfg_scale"]))
    theirs = published(left_padded(histories, case["max_len"]), noise)

    exact_published = published.double()
    truth = exact_published(left_padded(histories, case["max_len"]), noise.double())
    exact = run(ours_of(exact_published), histories, noise.double(), guidance=float(case["cfg_scale"]))

    assert_agree(exact, truth, torch.float64)
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + FLOOR[torch.float32]


@pytest.mark.parametrize("place", [place for place in PLACES if place != "triton"])  # each draw compiles kernels
@given(case=cases())
def test_equals_published(place: str, case: dict[str, Any]) -> None:
    check_against_published(case, place)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="the schedule 'beta' needs scipy")
@pytest.mark.parametrize("decoder", ["att", "mlp"])
def test_equals_published_on_the_beta_schedule(decoder: str) -> None:
    check_against_published(
        {"noise_schedule": "beta", "item_num": 11, "dif_decoder": decoder, "max_len": 6, "cfg_scale": 1, "seed": 0}
        | {"lengths": [0, 1, 4, 6]},
        "torch",
    )


@pytest.mark.parametrize(("heads", "encoder_blocks", "decoder_blocks"), [(1, 1, 1), (2, 3, 1), (8, 1, 3)])
@pytest.mark.parametrize("decoder", ["att", "mlp"])
def test_any_number_of_heads_and_blocks(decoder: str, heads: int, encoder_blocks: int, decoder_blocks: int) -> None:
    published = make_published(
        torch.float64,
        dif_decoder=decoder,
        cfg_scale=1.5,
        heads=heads,
        encoder_blocks=encoder_blocks,
        decoder_blocks=decoder_blocks,
    )
    model = ours_of(published, n_heads=heads, n_encoder_layers=encoder_blocks, n_decoder_layers=decoder_blocks)
    histories = random_histories([0, 1, 3, 6], 11)
    noise = random_noise(model, 4, model.plan("ddpm"))
    truth = published(left_padded(histories, 6), noise)
    assert_agree(run(model, histories, noise, guidance=1.5), truth, torch.float64)


@pytest.mark.parametrize("decoder", ["att", "mlp"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_few_steps_of_ddim(decoder: str, guidance: float, num_steps: int) -> None:
    """Against DDIM (eta = 0) written out on the published network, all slots recomputed at every step."""
    published = make_published(torch.float64, dif_decoder=decoder, cfg_scale=guidance)
    model = ours_of(published)
    plan = model.plan("ddim", num_steps)
    histories = random_histories([0, 1, 3, 6], 11)
    noise = random_noise(model, 4, plan)

    hist, target, mask = published.inputs(left_padded(histories, 6))
    abar = torch.tensor([*published.diffu.alphas_cumprod, 1.0], dtype=torch.float64)
    steps = plan.timesteps.tolist()
    with torch.no_grad():
        c, x_t = published.diffu.ag_encoder(hist, mask), noise[0]
        for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
            slots = torch.cat([target[:, :-1], x_t.unsqueeze(1)], dim=1)
            times = torch.tensor([0] * 5 + [t]).expand(4, 6)
            x_0 = published.diffu.predict(c, slots, times, mask)[:, -1]
            epsilon = (x_t - abar[t].sqrt() * x_0) / (1 - abar[t]).sqrt()
            x_t = abar[t_prev].sqrt() * x_0 + (1 - abar[t_prev]).sqrt() * epsilon
    assert_agree(run(model, histories, noise, plan, guidance), x_t, torch.float64)


def test_items_added_later_are_known_to_histories() -> None:
    """The item table handed to `encode` may go on after the model's own rows."""
    larger = make_published(torch.float64, item_num=14)
    weights = {name: value.detach() for name, value in larger.state_dict().items()}
    table = weights["item_embedding.weight"]
    small = make_published(torch.float64, item_num=11)
    small.load_state_dict({**weights, "item_embedding.weight": table[:12]})
    model, plan = ours_of(small), ours_of(small).plan("ddpm")
    histories = random_histories([2, 6], 14)
    noise = random_noise(model, 2, plan)
    x_0 = model.sample(model.prepare(model.encode(histories, table), plan, 1.0), plan, GivenNoise(noise))
    assert_agree(x_0, larger(left_padded(histories, 6), noise), torch.float64)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoder", "place"),
    [
        (decoder, place)
        for decoder, unused in NOT_OF.items()
        for place in places(*(op for op in ADRec.ops if op.name not in unused))
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
class TestLaws:
    lengths = (3, 0, 6, 1, 5, 0)

    def setting(self, decoder: str, place: str) -> tuple[ADRec, Histories]:
        return ours_of(make_published(dif_decoder=decoder), place), random_histories(list(self.lengths), 11)

    def test_a_row_does_not_depend_on_its_batch(self, decoder: str, guidance: float, place: str) -> None:
        model, histories = self.setting(decoder, place)
        noise = random_noise(model, len(self.lengths), model.plan("ddpm"))
        together = run(model, histories, noise, guidance=guidance)
        for row, length in enumerate(self.lengths):
            alone = Histories(histories.items[row : row + 1, :length], histories.lengths[row : row + 1])
            x_0 = run(model, alone, noise[:, row : row + 1], guidance=guidance)
            if place == "cpu":
                assert torch.equal(x_0, together[row : row + 1])
            else:
                assert_agree(x_0, together[row : row + 1], torch.float32)

    def test_what_stands_beyond_a_history_does_not_matter(self, decoder: str, guidance: float, place: str) -> None:
        model, histories = self.setting(decoder, place)
        noise = random_noise(model, len(self.lengths), model.plan("ddpm"))
        inside = torch.arange(9) < histories.lengths.unsqueeze(1)
        wider = torch.cat([histories.items, histories.items.new_zeros(len(self.lengths), 3)], dim=1)
        wider = torch.where(inside, wider, torch.full_like(wider, 7))
        assert_agree(
            run(model, Histories(wider, histories.lengths), noise, guidance=guidance),
            run(model, histories, noise, guidance=guidance),
            torch.float32,
        )

    def test_step_by_step_equals_the_loop(self, decoder: str, guidance: float, place: str) -> None:
        model, histories = self.setting(decoder, place)
        plan = model.plan("ddpm")
        noise = random_noise(model, len(self.lengths), plan)
        state = model.prepare(model.encode(histories, model.item_table), plan, guidance)
        seen: list[tuple[int, int]] = []
        stepped = model.sample(state, plan, GivenNoise(noise), lambda i, t, x: seen.append((i, t)))
        same_or_close(place, model.sample(state, plan, GivenNoise(noise)), stepped)
        assert seen == [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]

    def test_samples_of_a_user_are_separate_runs(self, decoder: str, guidance: float, place: str) -> None:
        model, histories = self.setting(decoder, place)
        users, samples = len(self.lengths), 3
        noise = random_noise(model, users * samples, model.plan("ddpm"))
        together = run(model, histories, noise, guidance=guidance).view(users, samples, -1)
        for sample in range(samples):
            own = noise.view(noise.shape[0], users, samples, -1)[:, :, sample]
            assert_agree(together[:, sample], run(model, histories, own, guidance=guidance), torch.float32)

    def test_a_batch_of_nobody(self, decoder: str, guidance: float, place: str) -> None:
        model, _ = self.setting(decoder, place)
        nobody = Histories(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        assert run(model, nobody, random_noise(model, 0, model.plan("ddpm")), guidance=guidance).shape == (0, 16)

    def test_one_step_is_one_call_of_the_denoiser(self, decoder: str, guidance: float, place: str) -> None:
        model, histories = self.setting(decoder, place)
        plan = model.plan("one_step")
        noise = random_noise(model, len(self.lengths), plan)
        state = model.prepare(model.encode(histories, model.item_table), plan, guidance)
        same_or_close(place, model.sample(state, plan, GivenNoise(noise)), model.denoise(noise[0], 0, state))


def same_or_close(place: str, loop: Tensor, stepped: Tensor) -> None:
    """A step alone runs in plain PyTorch, whatever the loop's backend."""
    if place == "torch":
        assert torch.equal(loop, stepped)
    else:
        assert_agree(loop, stepped, torch.float32)


def test_guidance_of_one_is_off() -> None:
    """u + 1 (c - u) = c: asking for the unconditional pass anyway changes nothing."""
    model, histories = ours_of(make_published(torch.float64)), random_histories([0, 2, 6], 11)
    noise = random_noise(model, 3, model.plan("ddpm"))
    nearly = run(model, histories, noise, guidance=1.0 + 1e-15)
    assert_agree(nearly, run(model, histories, noise), torch.float64)


def test_samples_share_the_prefix() -> None:
    model, histories = ours_of(make_published()), random_histories([2, 4], 11)
    state = model.prepare(model.encode(histories, model.item_table), model.plan("ddpm"), 1.0)
    assert model.repeat(state, 5).prefix is state.prefix


def test_geodesic_queries_lie_on_the_sphere() -> None:
    model, histories = ours_of(make_published(geodesic=True)), random_histories([0, 2, 6], 11)
    plan = model.plan("ddpm")
    assert plan.normalize
    norms = run(model, histories, random_noise(model, 3, plan)).norm(dim=-1)
    assert float((norms - 1).abs().max()) <= AGREE[torch.float32]


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["att", "mlp"])
def test_weight_shapes_are_those_of_the_authors(decoder: str) -> None:
    published = make_published(dif_decoder=decoder)
    shapes = {name: tuple(value.shape) for name, value in published.state_dict().items()}
    assert ADRec.weight_shapes(ours_of(published).config) == shapes


@pytest.mark.parametrize("name", ["trunc_lin", "linear", "cosine", "sqrt", "trunc_cos", "pw_lin"])
def test_plan_is_the_authors_posterior(name: str) -> None:
    """Posterior mean, and sigma = sqrt(beta) but for the last step."""
    published = make_published(noise_schedule=name, diffusion_steps=25)
    diffusion = published.diffu
    sigma = torch.tensor(diffusion.betas).sqrt()
    sigma[0] = 0.0
    rows = [torch.tensor(diffusion.posterior_mean_coef1), torch.tensor(diffusion.posterior_mean_coef2), sigma]
    plan = ours_of(published).plan("ddpm")
    assert plan.timesteps.tolist() == list(range(25))[::-1]
    assert_agree(plan.coef, torch.stack(rows, dim=1).flip(0), torch.float64)


def test_a_plan_may_feed_any_timestep() -> None:
    model, histories = ours_of(make_published()), random_histories([2], 11)
    plan = plans.one_step(model.schedule, 5)
    assert run(model, histories, random_noise(model, 1, plan), plan).isfinite().all()
