"""TA-Rec: Mao et al., "On Efficiency-Effectiveness Trade-off of Diffusion-based Recommenders" (NeurIPS 2025,
arXiv 2510.17245).

DreamRec's instances, network and forward process (`dreamrec.py`), trained so that one call takes noise to the clean
embedding x of the next item. Stage 1, "pretraining", of everything; one noise for x_t and x_{t-1}:

    L_pre  = L_diff + lambda_c L_TCR                                   temporal consistency, t ~ U{1 .. T-1}
    L_diff = E mean_D (x - f(x_t, h', t))^2
    L_TCR  = E mean_D (f(x_t, h', t) - f(x_{t-1}, h', t-1))^2

Stage 2, "alignment", adaptive preference alignment: of the denoiser f alone, against f_ref, the denoiser as stage 1
left it; encoder and embeddings are frozen. One negative x- for each x+ = x, one noise for both, t ~ U{0 .. T-1}:

    L_APA  = -E log sigmoid(-lambda(t) (gain(x+) - gain(x-)))          gain(x) = |x - f(x_t)|^2 - |x - f_ref(x_t)|^2
    lambda(t) = lambda_base ((1 - t/T) + (1 - cos(x+, x-)))

The authors' code is not public, and the text at hand lacks its display equations. Chosen where it is silent:

  - L_APA is written as Diffusion-DPO's loss, which the paper adapts; L_TCR shares its noise and stops no gradient;
  - negatives: section 4.3 takes them from the batch, section 4.4 takes random other items: `negatives` "batch" and
    "random". "ranked" is ours: drawn from what the model itself would recommend, with probability proportional to
    exp(x_T-call . E / sqrt(D)), so that they are items that stand in the way of x+;
  - stage 2 runs the frozen encoder without dropout and never drops the guidance;
  - guidance p, dropout, AdamW and the initial table are DreamRec's; T and lambda_c lie in the paper's search grid.

Ours, and off by default, as for DreamRec: `ranking_weight` adds a cross-entropy over the catalogue to stage 1, and
`stop_gradient` holds x in L_diff. Stage 2 is the paper's loss in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.config import TARecConfig
from fastdiff.errors import InvalidArgument
from fastdiff.train.data import TrainingData
from fastdiff.train.dreamrec import Denoiser, DreamRecRecipe, DreamRecSettings
from fastdiff.train.recipe import Settings, Stage

NEGATIVES = ("random", "batch", "ranked")
PRETRAINING, ALIGNMENT = "pretraining", "alignment"


@dataclass(frozen=True)
class TARecSettings(DreamRecSettings):
    """DreamRec's settings, which are those of stage 1, with a linear chain of 1000 steps and without guidance, and

    consistency_weight  lambda_c; the paper searches 0.1 to 1 and finds 0.4 to 0.8 best
    alignment_weight    lambda_base
    negatives           "random", any other item; "batch", another target of the batch; "ranked", ours
    alignment_epochs    0 leaves stage 2 out; further ones as in stage 1
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    guidance_scale: float = 1.0
    consistency_weight: float = 0.6
    alignment_weight: float = 0.5
    negatives: str = "random"
    alignment_epochs: int = 50
    alignment_batch_size: int = 32
    alignment_learning_rate: float = 1e-4
    alignment_validate_every: int = 1
    alignment_patience: int | None = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives not in NEGATIVES:
            raise InvalidArgument(
                f"TARecSettings: negatives must be one of {', '.join(NEGATIVES)} (got {self.negatives!r})"
            )


class TARecRecipe(DreamRecRecipe):
    """Stages "pretraining" and "alignment"."""

    method: ClassVar[str] = "tarec"
    Settings: ClassVar[type[Settings]] = TARecSettings
    config_class = TARecConfig
    settings: TARecSettings

    def __init__(self, settings: TARecSettings, data: TrainingData) -> None:
        super().__init__(settings, data)
        self.reference = Denoiser(self.config)

    # --- the stages ---------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        settings = self.settings
        pretraining = self.diffusion_stage(PRETRAINING)
        if settings.alignment_epochs == 0:
            return [pretraining]
        alignment = Stage(
            ALIGNMENT,
            settings.alignment_epochs,
            settings.alignment_batch_size,
            settings.alignment_learning_rate,
            "adamw",
            settings.weight_decay,
            validate_every=settings.alignment_validate_every,
            patience=settings.alignment_patience,
        )
        return [pretraining, alignment]

    def trained(self, stage: Stage) -> Iterable[nn.Parameter]:
        if stage.name == PRETRAINING:
            return self.network.parameters()
        return [*self.network.step_mlp.parameters(), *self.network.diffuser.parameters()]

    def enter(self, stage: Stage) -> None:
        if stage.name == ALIGNMENT:
            self.reference.step_mlp.load_state_dict(self.network.step_mlp.state_dict())
            self.reference.diffuser.load_state_dict(self.network.diffuser.state_dict())

    def losses(self, stage: Stage, examples: Tensor) -> dict[str, Tensor]:
        return self._pretraining(examples) if stage.name == PRETRAINING else self._alignment(examples)

    # --- stage 1 ------------------------------------------------------------------------------------------------------

    def _pretraining(self, examples: Tensor) -> dict[str, Tensor]:
        h, targets = self.passes.encode(self.network, examples, self.device)
        t = torch.randint(1, self.config.schedule.num_train_timesteps, targets.shape, device=self.device)
        x = self.target_embeddings(targets)
        noise = torch.randn_like(x)
        guidance = self.drop_guidance(h)
        estimate = self.network.denoise(self.add_noise(x, t, noise), guidance, t)
        earlier = self.network.denoise(self.add_noise(x, t - 1, noise), guidance, t - 1)
        return {
            "diffusion": F.mse_loss(estimate, x),
            "consistency": self.settings.consistency_weight * F.mse_loss(estimate, earlier),
            **self.ranking(estimate, guidance, targets),
        }

    # --- stage 2 ------------------------------------------------------------------------------------------------------

    def _alignment(self, examples: Tensor) -> dict[str, Tensor]:
        self.network.eval()
        total = self.config.schedule.num_train_timesteps
        with torch.no_grad():
            h, targets = self.passes.encode(self.network, examples, self.device)
            chosen = self.network.item_embeddings(targets)
            rejected = self.network.item_embeddings(self.draw_negatives(h, targets))
            t = torch.randint(0, total, targets.shape, device=self.device)
            noise = torch.randn_like(chosen)
            noisy = [self.add_noise(x, t, noise) for x in (chosen, rejected)]
            pairs = list(zip((chosen, rejected), noisy, strict=True))
            before = [_squared_distance(x, self.reference.denoise(x_t, h, t)) for x, x_t in pairs]
            closeness = F.cosine_similarity(chosen, rejected)
            weight = self.settings.alignment_weight * ((1 - t / total) + (1 - closeness))
        after = [_squared_distance(x, self.network.denoise(x_t, h, t)) for x, x_t in pairs]
        margin = (after[0] - before[0]) - (after[1] - before[1])
        return {"alignment": -F.logsigmoid(-weight * margin).mean()}

    def draw_negatives(self, h: Tensor, targets: Tensor) -> Tensor:
        """An item other than the target for each instance `[R]`."""
        n_items, kind = self.config.n_items, self.settings.negatives
        if kind == "batch":
            others = targets[torch.randperm(len(targets), device=targets.device)]
            return torch.where(others == targets, self._any_other(targets), others)
        if kind == "random":
            return self._any_other(targets)
        last = torch.full_like(targets, self.config.schedule.num_train_timesteps - 1)
        query = self.reference.denoise(torch.randn_like(h), h, last)
        scores = query @ self.network.item_embeddings.weight[:n_items].T / math.sqrt(h.shape[1])
        scores.scatter_(1, targets[:, None], -math.inf)
        return torch.multinomial(scores.softmax(dim=1), 1).squeeze(1)

    def _any_other(self, targets: Tensor) -> Tensor:
        n_items = self.config.n_items
        return (targets + torch.randint(1, n_items, targets.shape, device=targets.device)) % n_items


def _squared_distance(x: Tensor, estimate: Tensor) -> Tensor:
    return (x - estimate).square().sum(dim=1)
