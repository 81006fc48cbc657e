"""Trained models, one per method, on Amazon Office: from histories to the top 20 of its 2,420 items.

The other cases draw their weights. Training makes some items long and many scores close, which is what the search for
the best has to cope with; here the weights are those of `bench/models/amazon-office`. Histories are drawn, the sampler
is the paper's, and each side is the one of the method's own case: the published algorithm, and fastdiff, which has to
give the same ranking. ADRec goes to x_0.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench import bench_adrec, bench_cddrec, bench_dimerec, bench_dreamrec_generate, bench_tarec
from bench.cases import Case
from bench.generate import TOP_K
from bench.ours import engine_ops
from fastdiff.checkpoint import read_folder
from fastdiff.models.adrec import ADRec

MODELS = Path(__file__).parent / "models" / "amazon-office"

PROVIDERS: Mapping[str, Any] = {
    "adrec": partial(bench_adrec.providers, lengths="uniform"),
    "tarec": bench_tarec.providers,
    "dreamrec": partial(bench_dreamrec_generate.providers, guidance=1.0),
    "dimerec": bench_dimerec.providers,
    "cddrec": bench_cddrec.providers,
}
NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "adrec": {"others": bench_adrec.OTHERS},
    "tarec": {"others": bench_tarec.OTHERS},
    "dreamrec": {"ours": bench_dreamrec_generate.OURS},
}


def office_case(method: str, batch: int) -> Case:
    checkpoint = read_folder(MODELS / method)
    config = checkpoint.config
    setting = (
        f"trained on Amazon Office: histories to the top {TOP_K} of {config.n_items:,} items (ADRec: to x_0); the "
        "paper's sampler"
    )
    build = partial(PROVIDERS[method], config, batch, weights_of=lambda _: dict(checkpoint.weights))
    ops = ADRec.ops if method == "adrec" else engine_ops(config)
    return Case("office", {"method": method, "batch": batch}, setting, build, ops, **NAMES.get(method, {}))


CASES = [office_case(method, batch) for method in PROVIDERS for batch in (1, 256)]
