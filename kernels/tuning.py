"""Which blocks, warps and stages a kernel runs with, and the winners that were recorded for a GPU.

A kernel with a choice lists a few `Config`s, the one that should serve everywhere first, and its launcher asks:

    config = choose("sampler_step", (bucket(n_rows), block_d), candidates, device)
    _sampler_step_kernel[grid](..., **config.launch())

Nothing is timed in a call. Where configs/<gpu>.json records a winner for the key, and it is still among the candidates,
that one is taken; else the first candidate whose shared memory the GPU has; interpreted, the first. The files are made
on the GPU itself, by timing the candidates of the problems that each kernel module names in `tuning_problems()`:

    python -m fastdiff.kernels.tuning [--op NAME ..]
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastdiff.errors import InvalidArgument
from fastdiff.kernels import runtime
from fastdiff.kernels.runtime import next_power_of_2

FOLDER = Path(__file__).parent / "configs"
Key = tuple[int | str, ...]
WRONG_BY = 2.0**-6
"""A candidate whose output differs from the first one's by more, relative to the largest magnitude, cannot win."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    constants   its tl.constexpr arguments that are free to choose, by name
    maxnreg     the most registers a thread may have; None: the compiler's choice
    shared      bytes of shared memory that it needs, where that can exceed what a GPU has (see the table of precompile)
    """

    constants: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    shared: int = 0

    def launch(self) -> dict[str, Any]:
        """The keyword arguments of the launch."""
        return {**self.constants, **self.options()}

    def words(self) -> str:
        """For tables: the constants, and how many warps."""
        return " ".join([*map(str, self.constants.values()), f"warps={self.num_warps}"])

    def options(self) -> dict[str, int]:
        """Those of them that are no arguments of the kernel: what `precompile.Case.options` takes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Problem:
    """A size at which candidates are timed: what a launcher gives to `choose`, and a call of it."""

    op: str
    key: Key
    candidates: Sequence[Config]
    run: Callable[[], Tensor]


def bucket(n: int, least: int = 1, most: int = 1 << 20) -> int:
    """n rounded up to a power of two within bounds: sizes of one bucket share a configuration."""
    return min(max(next_power_of_2(n), least), most)


def choose(op: str, key: Key, candidates: Callable[..., Sequence[Config]], device: torch.device) -> Config:
    """The configuration for a launch of `op` on `device`.

    key         what decides it: bucketed sizes, and dtypes by name; the answer for one is kept
    candidates  called with the members of `key`: at least one Config, the best guess first
    """
    if op in _forced:
        return _forced[op]
    place = (op, key, device)
    found = _chosen.get(place)
    if found is None:
        found = _chosen[place] = _choose(op, key, candidates(*key), device)
    return found


_chosen: dict[tuple[str, Key, torch.device], Config] = {}
_forced: dict[str, Config] = {}


def _choose(op: str, key: Key, candidates: Sequence[Config], device: torch.device) -> Config:
    if runtime.INTERPRETED or device.type != "cuda":
        return candidates[0]
    properties: Any = torch.cuda.get_device_properties(device)
    winner = recorded(path_of(properties.name)).get((op, key))
    for config in candidates:
        if winner is not None and config.launch() == winner.launch():
            return config
    return first_that_fits(op, candidates, properties.shared_memory_per_block_optin)


def first_that_fits(op: str, candidates: Sequence[Config], shared_memory: int) -> Config:
    """The first candidate for a GPU whose blocks may have `shared_memory` bytes."""
    for config in candidates:
        if config.shared <= shared_memory:
            return config
    needed = min(config.shared for config in candidates)
    raise InvalidArgument(
        f"{op}: no configuration fits this GPU: they need at least {needed} bytes of shared memory per block (got "
        f"{shared_memory}); use a smaller model, or backend='torch'"
    )


# --- the records ------------------------------------------------------------------------------------------------------


def path_of(gpu: str) -> Path:
    """The file of a GPU, by the name that torch.cuda gives it: configs/NVIDIA_H200.json."""
    return FOLDER / (re.sub(r"\W+", "_", gpu) + ".json")


def recorded(path: Path) -> dict[tuple[str, Key], Config]:
    """The winners in a file, read once; none where there is no file."""
    winners = _records.get(path)
    if winners is None:
        winners = _records[path] = _read(path) if path.is_file() else {}
    return winners


_records: dict[Path, dict[tuple[str, Key], Config]] = {}


def _read(path: Path) -> dict[tuple[str, Key], Config]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["winners"]
        return {
            (entry["op"], tuple(entry["key"])): Config(
                {str(name): int(value) for name, value in entry["constants"].items()},
                int(entry["num_warps"]),
                int(entry["num_stages"]),
                None if entry["maxnreg"] is None else int(entry["maxnreg"]),
            )
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"{path}: holds no records of kernel configurations (got {type(error).__name__}: {error}); remove it, "
            "which costs only the tuning, or measure again: python -m fastdiff.kernels.tuning"
        ) from error


def write(path: Path, gpu: str, found: Mapping[tuple[str, Key], tuple[Config, float]]) -> None:
    """Add winners, and the seconds that they took, to the file of a GPU; those of other problems stay in it."""
    kept: list[dict[str, Any]] = []
    if path.is_file():
        _read(path)  # raises where the file is broken
        kept = json.loads(path.read_text(encoding="utf-8"))["winners"]
    kept = [entry for entry in kept if (entry["op"], tuple(entry["key"])) not in found]
    kept += [
        {
            "op": op,
            "key": list(key),
            "constants": dict(config.constants),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.maxnreg,
            "microseconds": round(1e6 * seconds, 2),
        }
        for (op, key), (config, seconds) in found.items()
    ]
    kept.sort(key=lambda entry: (entry["op"], [str(part).zfill(9) for part in entry["key"]]))
    lines = ",\n  ".join(json.dumps(entry) for entry in kept)
    head = f'"gpu": {json.dumps(gpu)}, "torch": "{torch.__version__}", "triton": "{triton.__version__}"'
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{{head}, "winners": [\n  {lines}\n]}}\n', encoding="utf-8")
    _records.pop(path, None)
    _chosen.clear()


# --- measuring --------------------------------------------------------------------------------------------------------


@contextmanager
def forced(op: str, config: Config) -> Iterator[None]:
    """Inside, `choose` answers `config` for `op`. For measuring and tests: it holds for all threads."""
    _forced[op] = config
    try:
        yield
    finally:
        del _forced[op]


def fastest(problem: Problem, seconds_of: Callable[[Callable[[], Tensor]], float]) -> tuple[Config, float]:
    """The fastest of a problem's candidates, and its time; one that fails, or computes something else, is left out.

    Raises what the first candidate raises.
    """
    with forced(problem.op, problem.candidates[0]):
        expected = problem.run()
    scale = max(float(expected.abs().max()), 1e-30)
    best: tuple[Config, float] | None = None
    for config in problem.candidates:
        try:
            with forced(problem.op, config):
                error = float((problem.run().double() - expected.double()).abs().max()) / scale
                taken = seconds_of(problem.run) if error <= WRONG_BY else None
        except Exception as failure:  # too large, not compilable, ..: a candidate may fail in every way
            print(f"  {_words(config)}: {_first_line(failure)}", flush=True)
            continue
        if taken is None:
            print(f"  {_words(config)}: WRONG by {error:.2g} of the largest magnitude", flush=True)
            continue
        print(f"  {_words(config)}: {1e6 * taken:.1f} us", flush=True)
        if best is None or taken < best[1]:
            best = config, taken
    if best is None:
        raise RuntimeError(f"{problem.op} {problem.key}: no candidate could be timed; what each said stands above")
    return best


def _first_line(failure: Exception) -> str:
    """ "ValueError: what it says first"; some say nothing."""
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def _words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.launch().items())


def tunable() -> list[str]:
    """The kernel modules that have `tuning_problems()`."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if re.search(r"^def tuning_problems\(", file.read_text("utf-8"), re.M)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastdiff.kernels.tuning", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--op", nargs="+", default=tunable(), choices=tunable(), help="only the problems of these")
    parser.add_argument("--again", action="store_true", help="also the problems whose winners are on record")
    asked = parser.parse_args(arguments)
    if runtime.INTERPRETED:
        parser.error("kernels are interpreted here, which says nothing of their time; unset TRITON_INTERPRET")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; run it on the GPU whose configurations are wanted")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = path_of(gpu)
    measured, failed = 0, []
    for op in asked.op:
        for problem in importlib.import_module(f"fastdiff.kernels.{op}").tuning_problems(device):
            name = f"{problem.op} {problem.key}"
            if (problem.op, problem.key) in recorded(path) and not asked.again:
                print(f"{name}: on record; --again measures it again", flush=True)
                continue
            print(name, flush=True)
            try:
                winner = fastest(problem, _seconds)
            except Exception as failure:  # the others are still worth knowing
                print(f"  {_first_line(failure)}", flush=True)
                failed.append(name)
                continue
            try:  # one by one: a run that is stopped keeps what it has found
                write(path, gpu, {(problem.op, problem.key): winner})
            except OSError as error:
                parser.error(
                    f"{path} cannot be written ({error.strerror}); run it in a checkout that was installed with -e"
                )
            measured += 1
    print(f"{path}: {measured} winners added" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _seconds(run: Callable[[], Tensor]) -> float:
    """The median of a call, as a GPU sees it, with a cold L2 cache."""
    return float(triton.testing.do_bench(run, return_mode="median")) / 1e3


if __name__ == "__main__":
    from fastdiff.kernels.tuning import main as imported  # the module that the kernels import, not a second one

    sys.exit(imported())
