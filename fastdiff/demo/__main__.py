"""`python -m fastdiff.demo`: recommendations by name, and how close they come to the best possible ones."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fastdiff
from fastdiff.demo.measure import draw_users, measure, numbers_of
from fastdiff.demo.simulate import build_catalogue, build_law
from fastdiff.engine import Engine
from fastdiff.sampler import Sampler

MODELS = Path(__file__).parent / "models"
MODEL = MODELS / "tarec"
METHODS = {"tarec": "TA-Rec", "dreamrec": "DreamRec", "adrec": "ADRec", "cddrec": "CDDRec", "dimerec": "DimeRec"}
SEED = 2025


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastdiff.demo", description=__doc__)
    parser.add_argument("--users", type=int, default=2000, help="users to measure on (default 2000)")
    parser.add_argument("--seed", type=int, default=SEED, help="which users, and the noise of the sampler")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--method", choices=METHODS, default="tarec", help="whose model is shown (default tarec)")
    which.add_argument("--model", type=Path, help="another model, from a run of `fastdiff.demo.train`")
    arguments = parser.parse_args(argv)
    if arguments.users < 1 or arguments.seed < 0:
        parser.error("--users must be at least 1, --seed at least 0")

    torch.set_num_threads(1)  # a model this small gains nothing from more, and loses much where other work runs
    engine = fastdiff.from_pretrained(arguments.model or MODELS / arguments.method)
    config = engine.config
    catalogue = build_catalogue()
    print(f"A simulated catalogue: {len(catalogue)} episodes of {len(set(catalogue.series))} series in 10 genres.")
    print("Viewers go on with a series, come back to the one before, or try a related one; the exact law is known.")
    name = f"{METHODS[config.method]}, {config.hidden_size} dimensions"
    print(f"{name}: {calls(engine)} noise to what the viewer wants next.")
    print("Below, in the model's own order: what it recommends, and how probable that is under the law.\n")
    show_users(engine, arguments.seed)

    measured = measure(engine, arguments.users, arguments.seed)
    print(f"{measured.n_users:,} new viewers: {measured}.")
    rate = measured.n_users / measured.seconds
    print(f"{rate:,.0f} histories per second ({measured.seconds:.2f} s in all) on one CPU thread.")


def calls(engine: Engine) -> str:
    """What the model does by default, as the subject of a sentence."""
    sampler = Sampler.of(engine.generation_config, engine.config)
    if sampler.scheduler == "closed_form":
        return f"the closed form of all {sampler.steps} steps takes"
    return "one denoiser call takes" if sampler.calls == 1 else f"{sampler.steps} steps take"


def show_users(engine: Engine, seed: int, top_k: int = 5) -> None:
    """Three viewers and one who has seen nothing yet: history, recommendations, and their probability under the law."""
    law = build_law()
    users = draw_users(law, 200, seed)
    chosen = [int((users.lengths == length).argmax()) for length in (2, 4, 7)]
    items, lengths = users.items[[*chosen, 0]], users.lengths[[*chosen, 0]]
    lengths[-1] = 0
    histories = [[catalogue_name(item) for item in row[:n]] for row, n in zip(items, lengths, strict=True)]
    output = engine.generate(histories, top_k=top_k, seed=seed)
    recommended = numbers_of(output.item_ids)
    probabilities = law.next_item(items, lengths)

    for history, numbers, chance in zip(histories, recommended, probabilities, strict=True):
        seen = " > ".join(history[-3:]) or "nothing yet"
        print(f"has seen  {'.. > ' if len(history) > 3 else ''}{seen}")
        for place, item in enumerate(numbers, start=1):
            print(f"  {place}  {catalogue_name(item):<32} {chance[item]:6.1%}")
        best = sorted(chance, reverse=True)[:top_k]
        print(f"     {'these five together':<32} {chance[numbers].sum():6.1%}   the best five: {sum(best):.1%}\n")


def catalogue_name(item: int) -> str:
    return build_catalogue().names[item]


if __name__ == "__main__":
    main()
