"""TA-Rec, one step, the whole way: from histories to the top 20 of 12,101 items, each side drawing its own noise.

Of the two others, "published" recomputes the network as DreamRec's code does, and "eager" is the rival that counts: the
same in as few calls of PyTorch as its user would write (`LeanTARec`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import Calls, Wrap, eager_and_compiled, in_float64, load_weights
from bench.cases import Absent, Case, Options, Provider
from bench.generate import TOP_K, Truth, best_rows, our_generate
from bench.inputs import draw_histories, draw_noise, padded
from bench.ours import engine_ops
from bench.published.tarec import TARec as PublishedTARec
from bench.weights import WeightsOf, random_weights
from fastdiff.config import TARecConfig
from fastdiff.schedule import ScheduleConfig

OTHERS = ("published", "published-compiled", "eager")


def tarec_config(num_train_timesteps: int = 1000, hidden_size: int = 64, n_items: int = 12_101) -> TARecConfig:
    schedule = ScheduleConfig("linear", num_train_timesteps, arithmetic="float32")
    return TARecConfig(n_items=n_items, hidden_size=hidden_size, max_seq_len=10, schedule=schedule)


def published_tarec(config: TARecConfig, weights: dict[str, Tensor], device: torch.device) -> PublishedTARec:
    module = PublishedTARec(config.hidden_size, config.n_items, config.max_seq_len, config.denoiser)
    load_weights(module, config, weights, device)
    return module


class LeanTARec:
    """TA-Rec as one would write it for speed in eager PyTorch: attention for the last item alone, the time embedding
    looked up, one call of the MLP, one product with the table, one topk. Histories hold at least one item."""

    def __init__(self, module: PublishedTARec, timestep: int) -> None:
        self.module = module
        table = module.item_embeddings.weight
        self.time = module._time(torch.tensor([timestep], device=table.device), table.dtype).detach()
        self.places = torch.arange(module.state_size, device=table.device)

    def scores(self, states: Tensor, lengths: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, item_num + 1]."""
        net, users = self.module, torch.arange(len(states), device=states.device)
        attention, feed_forward = net.mh_attn, net.feed_forward
        e = net.item_embeddings(states) + net.positional_embeddings.weight
        last = net.ln_1(e[users, lengths - 1])
        logits = torch.bmm(attention.linear_k(e), attention.linear_q(last).unsqueeze(2)).squeeze(2)
        logits = (logits / math.sqrt(net.hidden_size)).masked_fill(self.places >= lengths[:, None], -torch.inf)
        weights = torch.softmax(logits, dim=1)
        mixed = torch.bmm(weights.unsqueeze(1), attention.linear_v(e)).squeeze(1)
        z = net.ln_2(mixed + last)
        hidden = F.relu(F.linear(z, feed_forward.w_1.weight.squeeze(2), feed_forward.w_1.bias))
        hidden = F.linear(hidden, feed_forward.w_2.weight.squeeze(2), feed_forward.w_2.bias)
        g = net.ln_3(feed_forward.layer_norm(hidden + z))
        x = torch.randn_like(g) if noise is None else noise
        x_0 = net.diffuser(torch.cat([x, g, self.time.expand(len(g), -1)], dim=1))
        return torch.mm(x_0, net.item_embeddings.weight.T)


def providers(
    config: TARecConfig, batch: int, options: Options, weights_of: WeightsOf = random_weights
) -> Iterator[Provider | Absent]:
    device, timestep = options.device, config.schedule.num_train_timesteps - 1
    weights = weights_of(config)
    published = published_tarec(config, weights, device)
    exact = in_float64(published)
    drawn = draw_histories(config, batch, "uniform")
    states, lengths = padded(drawn, config), drawn.lengths
    x_t = draw_noise(batch, config.hidden_size)
    x_0 = exact.one_step(exact.condition(states, lengths), timestep, noise=x_t.double())
    truth = Truth(x_0, x_0 @ exact.item_embeddings.weight.detach().T)
    states, lengths, x_t = states.to(device), lengths.to(device), x_t.to(device)

    def as_published(wrap: Wrap) -> Calls:
        module = published_tarec(config, weights, device)
        module.condition, module.forward = wrap(module.condition), wrap(module.forward)
        recommend = partial(best_rows, module.recommend, states, lengths, timestep)
        return recommend, partial(recommend, noise=x_t)

    lean = partial(best_rows, LeanTARec(published, timestep).scores, states, lengths)
    yield from eager_and_compiled("published", as_published, truth.check_rows, options)
    yield Provider("eager", lean, truth.check_rows, partial(lean, x_t))
    yield from our_generate(config, weights, device, states, x_t, truth)


def tarec_case(batch: int, **sizes: int) -> Case:
    config = tarec_config(**sizes)
    setting = (
        f"histories to the top {TOP_K} of {config.n_items} items, one step, D = {config.hidden_size}, mlp1, own noise"
    )
    return Case("tarec", {"batch": batch}, setting, partial(providers, config, batch), engine_ops(config), OTHERS)


CASES = [tarec_case(batch) for batch in (1, 32, 256)]
