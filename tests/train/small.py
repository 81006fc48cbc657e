"""Every recipe in sizes that are trained in a second, in the variants whose losses differ."""

from __future__ import annotations

from typing import Any

from fastdiff.train.recipe import Settings
from fastdiff.train.run import recipe_class

_SIZES: dict[str, dict[str, Any]] = {
    "sasrec": {"hidden_size": 16, "max_seq_len": 6, "n_heads": 2, "epochs": 1, "validate_every": 1},
    "adrec": {
        **{"hidden_size": 16, "max_seq_len": 6, "n_heads": 2, "num_train_timesteps": 4, "validate_every": 1},
        **{"pretrain_epochs": 1, "warmup_epochs": 1, "epochs": 1},
    },
    "dreamrec": {"hidden_size": 16, "max_seq_len": 4, "num_train_timesteps": 8, "epochs": 1, "validate_every": 1},
    "tarec": {
        **{"hidden_size": 16, "max_seq_len": 4, "num_train_timesteps": 8, "epochs": 1, "validate_every": 1},
        "alignment_epochs": 1,
    },
    "cddrec": {
        **{"hidden_size": 16, "max_seq_len": 6, "n_heads": 2, "num_train_timesteps": 4, "epochs": 1},
        "augmentation": "random",
    },
    "dimerec": {"hidden_size": 16, "max_seq_len": 6, "num_train_timesteps": 4, "epochs": 1},
}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("sasrec", {}),
    ("sasrec", {"loss": "bce"}),
    ("adrec", {"guidance_scale": 2.0}),
    ("adrec", {"decoder": "mlp", "geodesic": True, "pcgrad": True}),
    ("dreamrec", {"ranking_weight": 0.5}),
    ("dreamrec", {"denoiser": "mlp2", "ranking_weight": 0.5, "ranking_at": "last"}),
    ("tarec", {"negatives": "ranked"}),
    ("cddrec", {}),
    ("cddrec", {"batch_coupling": "none", "linear_infonce": True, "published_slips": True}),
    ("dimerec", {}),
    ("dimerec", {"guidance_extractor": "last_items"}),
]


def small_settings(method: str, changes: dict[str, Any]) -> Settings:
    return recipe_class(method).Settings(**(_SIZES[method] | changes))


def variant_name(changes: object) -> str | None:
    if not isinstance(changes, dict):
        return None
    return ",".join(f"{name}={value}" for name, value in changes.items()) or "as_is"
