"""Which models are trained on what, in the order in which they are run; and what others report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A way to train a method.

    what      for people
    settings  on top of the settings that ship for the data set, or of the defaults where there are none
    """

    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_AUTHORS_DREAMREC = {
    "num_train_timesteps": 500,
    "beta_schedule": "exp",
    "guidance_scale": 3.0,
    "ranking_weight": 0.0,
    "stop_gradient": False,
    "embedding_std": 1.0,
    "dropout": 0.1,
    "epochs": 200,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "validate_every": 5,
}

_ONE_LAYER = {"denoiser": "mlp1", "cosine_epochs": None, "patience": 6}

VARIANTS: dict[str, dict[str, Variant]] = {
    "adrec": {"recipe": Variant("the authors' three stages")},
    "dreamrec": {
        "paper": Variant(
            "the authors' loss, embeddings and settings (their YooChoose command), stopped early by us",
            _AUTHORS_DREAMREC,
        ),
        "ranking": Variant("our cross-entropy added, the authors' denoiser of one layer, constant learning rate"),
        "two_layers": Variant(
            "our cross-entropy added, two layers, cosine: TA-Rec's first stage, less its consistency",
            {"denoiser": "mlp2", "cosine_epochs": 40, "patience": 15},
        ),
    },
    "tarec": {
        "aligned": Variant("temporal consistency with our cross-entropy, two layers, cosine; preference alignment"),
        "consistency": Variant("the first of these stages alone", {"alignment_epochs": 0}),
        "one_layer": Variant("both stages, DreamRec's denoiser of one layer, constant learning rate", _ONE_LAYER),
        "one_layer_consistency": Variant(
            "the first stage alone, one layer, constant learning rate", {**_ONE_LAYER, "alignment_epochs": 0}
        ),
    },
    "dimerec": {
        "recipe": Variant("the paper's losses; what it leaves open is ours"),
        "no_recon": Variant("without the reconstruction of x_0", {"recon_weight": 0.0}),
        "no_ssm": Variant("without the sampled-softmax loss", {"ssm_weight": 0.0}),
    },
    "cddrec": {
        "two_steps": Variant("the authors' losses, two of the steps drawn per batch (ours)", {"steps_per_batch": 2}),
        "recipe": Variant("the authors' losses, all steps in every batch"),
        "small": Variant(
            "two steps per batch, 64 wide: the model that ships",
            {"steps_per_batch": 2, "hidden_size": 64, "epochs": 300},
        ),
    },
    "sasrec": {
        "ce": Variant("cross-entropy over the catalogue", {"loss": "ce"}),
        "bce": Variant("binary cross-entropy, one negative each", {"loss": "bce"}),
    },
}

TITLES = {"adrec": "ADRec", "dreamrec": "DreamRec", "tarec": "TA-Rec", "dimerec": "DimeRec", "cddrec": "CDDRec"}
TITLES["sasrec"] = "SASRec (no diffusion; a yardstick)"

DATA: dict[str, str] = {
    "adrec-ml-100k": "MovieLens 100K, ADRec's file",
    "amazon-office": "Amazon Office, CDDRec's file",
    "amazon-beauty": "Amazon Beauty, CDDRec's file",
    "adrec-beauty": "Amazon Beauty, ADRec's file",
    "adrec-sports": "Amazon Sports, ADRec's file",
    "adrec-baby": "Amazon Baby, ADRec's file",
    "adrec-toys": "Amazon Toys, ADRec's file",
}
"""Folder -> what it is, in the order of the document."""

BATCH_MEANS: dict[str, int] = {data: 512 for data in DATA if data.startswith("adrec-")}
"""Users of a batch, where what is reported is the mean of the batches' means: ADRec's authors."""


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluations."""

    method: str
    data: str
    variant: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.method}/{self.data}/{self.variant}/{self.seed}"

    @property
    def settings(self) -> Mapping[str, Any]:
        return VARIANTS[self.method][self.variant].settings

    def matches(self, pattern: str) -> bool:
        """adrec, adrec/ml-100k, adrec/adrec-ml-100k/recipe/2025: as many parts as are given; "" and "*" take any."""
        given = pattern.split("/")
        own = self.id.split("/")
        same = (want in ("", "*", has) or want == has.partition("-")[2] for want, has in zip(given, own, strict=False))
        return len(given) <= len(own) and all(same)


def _cells() -> list[Cell]:
    first, more = 2025, (2026, 2027)
    on_amazon = [
        ("dreamrec", "paper"),
        ("dreamrec", "ranking"),
        ("dreamrec", "two_layers"),
        ("tarec", "consistency"),
        ("tarec", "aligned"),
        ("tarec", "one_layer_consistency"),
        ("tarec", "one_layer"),
        ("sasrec", "ce"),
        ("sasrec", "bce"),
        ("dimerec", "recipe"),
        ("cddrec", "two_steps"),
        ("cddrec", "recipe"),
    ]
    order = [Cell("adrec", "adrec-ml-100k", "recipe", seed) for seed in (first, *more)]
    order += [Cell("sasrec", "adrec-ml-100k", "ce", first)]
    for data in ("amazon-office", "amazon-beauty"):
        order += [Cell(method, data, variant, first) for method, variant in on_amazon]
    order += [Cell("adrec", "amazon-office", "recipe", first), Cell("cddrec", "amazon-office", "small", first)]
    order += [Cell("dimerec", "amazon-office", variant, first) for variant in ("no_recon", "no_ssm")]
    order += [Cell("adrec", data, "recipe", first) for data in ("adrec-beauty", "adrec-sports")]
    order += [Cell("adrec", data, "recipe", first) for data in ("adrec-baby", "adrec-toys")]
    order += [Cell("sasrec", data, "ce", first) for data in ("adrec-beauty", "adrec-sports")]
    # once everything has a figure: its spread, where a paper's figure is at stake and where runs are short
    order += [Cell("adrec", data, "recipe", seed) for data in ("adrec-beauty", "adrec-sports") for seed in more]
    order += [Cell("sasrec", "adrec-ml-100k", "ce", seed) for seed in more]
    order += [Cell(method, "amazon-office", variant, seed) for seed, (method, variant) in product(more, on_amazon)]
    return order


CELLS: Sequence[Cell] = _cells()


# --- what others report -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reported:
    """HR@20 and NDCG@20 in per cent, and where and how they were obtained."""

    method: str
    variant: str
    data: str
    hr: float
    ndcg: float
    source: str


_ADREC = "ADRec's Table 2 (arXiv 2505.19544), as quoted in public reading notes"
_TAREC = (
    "TA-Rec's Table 11 (arXiv 2510.17245), of another protocol: a chronological 8:1:1 split by user with every "
    "prefix as an instance"
)

REPORTED: Sequence[Reported] = (
    Reported(
        "adrec",
        "recipe",
        "adrec-ml-100k",
        22.4,
        8.55,
        "the authors' public code, trained on this file; the same weights averaged over users: 22.28 / 8.42",
    ),
    Reported("adrec", "recipe", "adrec-beauty", 16.82, 8.32, _ADREC),
    Reported("sasrec", "ce", "adrec-beauty", 15.20, 7.65, f"{_ADREC}: its SASRec+"),
    Reported("adrec", "recipe", "adrec-sports", 8.16, 3.64, _ADREC),
    Reported("dreamrec", "paper", "amazon-beauty", 10.32, 4.88, _TAREC),
    Reported("tarec", "aligned", "amazon-beauty", 10.99, 5.54, _TAREC),
    Reported("dimerec", "recipe", "amazon-beauty", 10.46, 5.44, _TAREC),
)


# --- ablations --------------------------------------------------------------------------------------------------------

ABLATIONS: Sequence[tuple[str, str, str, str]] = (
    ("preference alignment", "tarec", "consistency", "aligned"),
    ("preference alignment, one layer", "tarec", "one_layer_consistency", "one_layer"),
    ("a second layer in the denoiser, a cosine, more patience", "tarec", "one_layer", "aligned"),
    ("a second layer in the denoiser, a cosine, more patience", "dreamrec", "ranking", "two_layers"),
    ("our ranking loss and settings instead of the authors'", "dreamrec", "paper", "ranking"),
    ("the reconstruction of x_0", "dimerec", "no_recon", "recipe"),
    ("the sampled-softmax loss", "dimerec", "no_ssm", "recipe"),
    ("cross-entropy over the catalogue instead of one negative", "sasrec", "bce", "ce"),
)
"""(what is added, method, variant without, variant with)"""
