"""TA-Rec: Mao et al., "On Efficiency-Effectiveness Trade-off of Diffusion-based Recommenders" (NeurIPS 2025,
arXiv 2510.17245).

Two losses make a diffusion recommender consistent along its chain, so that one call takes noise to the clean embedding
(Algorithm 3 of the paper):

    g = encoder(history);   x_T ~ N(0, I);   x_0 = f(x_T, g, T);   scores = x_0 . E

and a few steps of ordinary ancestral sampling are its slower variant (Fig. 5):
`generate(scheduler="ddpm", num_inference_steps=5)`.

The paper's own code is not public. What it leaves open is chosen here as follows:
  - encoder, denoiser and parameter names are DreamRec's, which the paper says it follows ("mlp1", or "mlp2");
  - the paper's T is index T-1 of a chain that counts from 0 (`one_step_timestep`);
  - Algorithm 3 has no guidance weight: guidance_scale 1, the null token is kept for those who want it;
  - the beta schedule is the checkpoint's; linear from 1e-4 to 0.02 in float32 where nothing is said;
  - all items are candidates; the pad row only in the published ranking.
"""

from __future__ import annotations

from fastdiff import plan as plans
from fastdiff.config import TARecConfig
from fastdiff.models.dreamrec import DreamRec
from fastdiff.plan import StepPlan


class TARec(DreamRec):
    """DreamRec's network with the one-step sampler."""

    config: TARecConfig

    def one_step_plan(self) -> StepPlan:
        return plans.one_step(self.schedule, self.config.one_step_timestep)
