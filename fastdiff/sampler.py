"""What a generation config runs: a scheduler and its number of steps, under the names that people use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastdiff.config import GenerationConfig, ModelConfig

NAMES = {"ddpm": "DDPM", "ddim": "DDIM", "one_step": "one step", "closed_form": "closed form"}
"""What people call the schedulers."""


@dataclass(frozen=True)
class Sampler:
    """A scheduler and its number of steps."""

    scheduler: str
    steps: int

    @classmethod
    def of(cls, generation: GenerationConfig, config: ModelConfig) -> Sampler:
        """What a generation config runs."""
        if generation.scheduler == "one_step":
            return cls("one_step", 1)
        return cls(generation.scheduler, generation.num_inference_steps or config.schedule.num_train_timesteps)

    @property
    def calls(self) -> int:
        """Of the denoiser, per user: the closed form of a whole chain is as dear as one."""
        return self.steps if self.scheduler in ("ddpm", "ddim") else 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `generate()` and `evaluate()`."""
        counted = {"num_inference_steps": self.steps} if self.scheduler in ("ddpm", "ddim") else {}
        return {"scheduler": self.scheduler, **counted}

    def generation_config(self, before: GenerationConfig, config: ModelConfig) -> GenerationConfig:
        counted = self.scheduler in ("ddpm", "ddim") and self.steps < config.schedule.num_train_timesteps
        return replace(before, scheduler=self.scheduler, num_inference_steps=self.steps if counted else None)

    def __str__(self) -> str:
        named = NAMES[self.scheduler]
        return named if self.scheduler == "one_step" else f"{named}, {self.steps:,} step{'s' * (self.steps != 1)}"
