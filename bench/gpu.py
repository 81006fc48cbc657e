"""`python -m bench.gpu --output DIR`: everything that has to be tried on a GPU, in order, in a few short calls.

    python -m bench.gpu --dry-run                                  # what would run, and for how long at most
    python -m bench.gpu --output build/gpu --minutes 9             # as much of it as nine minutes hold
    python -m bench.gpu --output build/gpu --minutes 9             # goes on with what is not done
    python -m bench.gpu --output build/gpu --part tune ops --again # these once more

Each job is a process with a time limit of its own, and what it found is in DIR before the next one starts, so that a
kill at any moment loses the job under way alone:

    jobs.jsonl   a line per job: status, seconds, command, failed tests, clocks and power before and after, the machine
    rows.jsonl   the measurements of `python -m bench`   ops.jsonl  those of `python -m bench.ops`
    log.txt      what the jobs said                      summary.xml  the jobs as JUnit test cases
    <gpu>.json   the winners of the tuning, as they stand in kernels/configs

A job that was cut off by --minutes runs again in the next call; one that failed, or outran its own limit, only with
--again. The command fails where a job of this call did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.machine import ROOT
from fastdiff.ops.backend import why_not
from fastdiff.ops.cpu import library

PARTS = ("build", "tests", "sanitizer", "tune", "ops", "bench")
LEAST_SECONDS = 20
"""With less time than that left, no job is started."""
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
_BAD = r"(?:FAILED|ERROR)"
FAILED_TEST = re.compile(
    rf"^(?:{_BAD} (tests/.+?)(?: - .*)?|\[gw\d+\] \[ *\d+%\] {_BAD} (tests/.+?) *|(tests/.+?) {_BAD} .*)$",
    re.M,
)
"""What pytest says of one: at the end, and as they end with and without workers, for a run that is killed."""
ENDED = ("ok", "failed", "too long", "absent")


@dataclass(frozen=True)
class Job:
    """One process: `python` with these arguments, or another program, for at most `seconds`.

    absent  why it cannot run on this machine        needs  a job: where that one ran and failed, this one is absent
    """

    part: str
    name: str
    seconds: int
    arguments: list[str]
    program: list[str] = field(default_factory=lambda: [sys.executable])
    environment: dict[str, str] = field(default_factory=dict)
    absent: str | None = None
    needs: str | None = None

    @property
    def id(self) -> str:
        return f"{self.part}/{self.name}"

    @property
    def command(self) -> list[str]:
        return [*self.program, *self.arguments]


# --- what there is to do ----------------------------------------------------------------------------------------------


def jobs(output: Path) -> list[Job]:
    """All jobs, the quick and telling ones of each part first."""
    return [*_build(), *_tests(), *_sanitizer(), *_tune(), *_ops(output), *_bench(output)]


def _build() -> list[Job]:
    # a checkout that was never installed has no fastdiff.kernels: a link stands for what setup.py maps
    link = "import pathlib; link = pathlib.Path('fastdiff/kernels'); link.exists() or link.symlink_to('../kernels')"
    return [
        Job("build", "kernels", 20, ["-c", link]),
        Job("build", "ops", 240, ["setup.py", "-q", "build_ops", "--if-possible", "--and-module"]),
    ]


def _pytest(*arguments: str, workers: bool = True) -> list[str]:
    """Tests of what runs on a GPU alone; each is named as it ends; one that hangs is stopped where a plugin can."""
    options = ["-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", "triton or cuda"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options.append("--timeout=240")
    if workers and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]
    return ["-m", "pytest", *options, *arguments]


TESTED_FIRST = ("sampler_step", "row_linear", "philox_normals", "sample_affine")


def _tests() -> list[Job]:
    first = [f"tests/ops/test_{name}.py" for name in TESTED_FIRST]
    apart = [*first, "tests/ops/test_score_topk.py"]
    return [
        Job("tests", "first", 180, _pytest(*first)),
        Job("tests", "ops", 400, _pytest("tests/ops", *(f"--ignore={path}" for path in apart))),
        Job("tests", "score_topk", 300, _pytest("tests/ops/test_score_topk.py")),
        Job("tests", "engines", 300, _pytest("tests/test_cuda.py", "tests/models")),
    ]


SANITIZED = {
    "sampler_step": ("tests/ops/test_sampler_step.py", "triton and equals and float32 and 33"),
    "loops": ("tests/ops/test_denoise_attention_loop.py", "in_triton and formula and float16"),
    "mlp": ("tests/ops/test_denoise_mlp_loop.py", "triton and step_by_step and float32 and (layers or wide)"),
    "histories": ("tests/ops/test_causal_history.py", "in_triton and float32 and formula"),
    "padded": ("tests/ops/test_encode_padded_history.py", "triton and half_precision and float16"),
    "context": ("tests/ops/test_decode_context.py", "triton and half_precision and float16"),
    "interests": ("tests/ops/test_encode_interests.py", "triton and formula and float32 and 50"),
    "last_item": ("tests/ops/test_encode_last_item.py", "triton and whole_block and float32"),
    "score_topk": ("tests/ops/test_score_topk.py", "triton and cuda and (real_size or wide_vectors or many_of_many)"),
}
"""Name -> a file of tests, and which of them are small and go through the kernels' paths."""


def _sanitizer() -> list[Job]:
    tool = next((path for name in SANITIZER if (path := shutil.which(name))), None)
    absent = None if tool else "compute-sanitizer is not on this machine (it comes with the CUDA toolkit)"
    # each tensor in an allocation of its own: a read beyond it is one beyond the memory of the process
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # some machines have the tool and refuse it the GPU
    program = [tool or SANITIZER[0], "--error-exitcode=9", sys.executable]
    code = "import torch; torch.zeros(9, device='cuda').sum().item()"
    works = Job("sanitizer", "works", 90, ["-c", code], program, environment, absent)
    found = [works]
    for check in ("memcheck", "racecheck"):
        program = [tool or SANITIZER[0], f"--tool={check}", "--error-exitcode=9", "--print-limit=20", sys.executable]
        for name, (path, which) in SANITIZED.items():
            arguments = ["-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", path, "-k", which]
            found.append(Job("sanitizer", f"{check}-{name}", 150, arguments, program, environment, absent, works.id))
    return found


def _tune() -> list[Job]:
    if importlib.util.find_spec("triton") is None:
        return [Job("tune", "all", 1, [], absent="the package 'triton' is not installed")]
    from fastdiff.kernels.tuning import tunable

    return [Job("tune", op, 240, ["-m", "fastdiff.kernels.tuning", "--op", op]) for op in tunable()]


def _ops(output: Path) -> list[Job]:
    from fastdiff.ops import ALL

    found = []
    for dtype in ("float32", "bfloat16"):
        for op in ALL:
            if op.name == "score_topk" and dtype != "float32":
                continue  # its scans are cases of the part "bench"
            arguments = ["-m", "bench.ops", op.name, "--device", "cuda", "--dtype", dtype, "--seconds", "0.3"]
            arguments += ["--batch", "1", "32", "1024", "--output", str(output / "ops.jsonl")]
            found.append(Job("ops", f"{op.name}-{dtype}", 150, arguments))
    return [*found, *(_compiled(job) for job in found)]


def _bench(output: Path) -> list[Job]:
    from bench.bench_score_topk import GPU_SIZES

    def job(name: str, seconds: int, *cases: str) -> Job:
        arguments = ["-m", "bench", "--device", "cuda", "--seconds", "0.4", "--case", *cases]
        return Job("bench", name, seconds, [*arguments, "--output", str(output / "rows.jsonl")])

    batches = (1, 32, 1024, 8192)
    of_size = {
        (n_items, dim): [f"score_topk/items={n_items}/dim={dim}/k=100/batch={batch}" for batch in batches]
        for n_items, dim in GPU_SIZES
    }
    found = [
        job("adrec", 240, *(f"adrec/lengths=full/batch={batch}" for batch in (1, 1024))),
        job("adrec_generate", 240, "adrec_generate"),
        job("dreamrec", 300, *(f"dreamrec/denoiser=mlp1/batch={batch}" for batch in (1, 1024))),
        *(job(f"score_topk-{n_items}-{dim}", 400, *cases) for (n_items, dim), cases in sorted(of_size.items())),
        job("dreamrec-mlp2", 300, *(f"dreamrec/denoiser=mlp2/batch={batch}" for batch in (1, 1024))),
        job("others", 300, "tarec", "cddrec", "dimerec", "dreamrec_generate"),
    ]
    return [*found, *(_compiled(job) for job in found if not job.name.startswith("dreamrec"))]


def _compiled(job: Job) -> Job:
    """The same with torch.compile among the rivals, which takes minutes and comes last."""
    return Job(job.part, f"{job.name}-compiled", 2 * job.seconds, [*job.arguments, "--compile"])


# --- doing it ---------------------------------------------------------------------------------------------------------


def ended(output: Path) -> dict[str, dict[str, Any]]:
    """The last row of each job that need not run again."""
    path = output / "jobs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    found = {row["job"]: row for row in rows if row["status"] in ENDED}
    if why_not("triton", "cuda") is not None or library.why_not() is not None:  # another machine, or a clean checkout
        found = {name: row for name, row in found.items() if not name.startswith("build/")}
    return found


def run(job: Job, output: Path, most_seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Run a job, add what it says to log.txt and its row to jobs.jsonl; the row."""
    began, before = time.monotonic(), machine.nvidia_smi(machine.GPU_STATE)
    limit = min(float(job.seconds), most_seconds)
    said = ""
    if job.absent is not None:
        status, code = "absent", None
    else:
        with (output / "log.txt").open("a+", encoding="utf-8", errors="replace") as log:
            log.write(f"\n=== {job.id}: {' '.join(job.command)}\n")
            log.flush()
            start = log.tell()
            code = _run(job, limit, log)
            log.seek(start)
            said = log.read()
        status = "ok" if code == 0 else "failed"
        if code is None:
            status = "too long" if limit >= job.seconds else "cut off"
    row = {
        "job": job.id,
        "status": status,
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "limit": round(limit),
        "command": job.command,
        "why": job.absent,
        "failed_tests": sorted({"".join(names) for names in FAILED_TEST.findall(said)}),
        "end": said.strip().splitlines()[-5:],
        "gpu_before": before,
        "gpu_after": machine.nvidia_smi(machine.GPU_STATE),
        "commit": machine.commit(),
        "machine": facts,
    }
    with (output / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for config in (ROOT / "kernels" / "configs").glob("*.json"):
        shutil.copy(config, output)
    return row


def _run(job: Job, limit: float, log: Any) -> int | None:
    """The exit status, or None where the process, and all that it started, were ended at the limit."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **job.environment}
    process = subprocess.Popen(
        job.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_summary(output: Path) -> None:
    """summary.xml, of all jobs that have ended so far."""
    rows = list(ended(output).values())
    suite = ET.Element("testsuite", name="bench.gpu", tests=str(len(rows)))
    for row in rows:
        part, _, name = row["job"].partition("/")
        case = ET.SubElement(suite, "testcase", classname=part, name=name, time=str(row["seconds"]))
        if row["status"] == "absent":
            ET.SubElement(case, "skipped", message=row["why"])
        elif row["status"] != "ok":
            failure = ET.SubElement(case, "failure", message=row["status"])
            failure.text = "\n".join([*row["failed_tests"], *row["end"]])
    suite.set("failures", str(len(suite.findall("*/failure"))))
    temporary = output / "summary.xml.part"
    ET.ElementTree(suite).write(temporary, encoding="unicode")
    temporary.replace(output / "summary.xml")


def main(arguments: Sequence[str] | None = None) -> int:
    command = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument(
        "--output", type=Path, default=Path("build/gpu"), metavar="DIR", help="where everything is written (build/gpu)"
    )
    command.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts (all)")
    command.add_argument("--job", nargs="+", metavar="PART/NAME", help="only these jobs (--dry-run lists them)")
    command.add_argument("--minutes", type=float, default=9.0, help="start and run jobs for that long (default 9)")
    command.add_argument("--again", action="store_true", help="run also what has run to its end before")
    command.add_argument("--compile", action="store_true", help="also the jobs with torch.compile, which take long")
    command.add_argument("--dry-run", action="store_true", help="list the jobs and their limits, run nothing")
    given = command.parse_args(arguments)
    output = given.output.resolve()
    chosen = [job for job in jobs(output) if job.part in given.part]
    if given.job:
        unknown = sorted(set(given.job) - {job.id for job in chosen})
        if unknown:
            command.error(f"--job: unknown {', '.join(unknown)}; --dry-run lists the jobs")
        chosen = [job for job in chosen if job.id in given.job]
    elif not given.compile:
        chosen = [job for job in chosen if not job.name.endswith("-compiled")]
    done = {} if given.again else ended(output)
    left = [job for job in chosen if job.id not in done]
    if given.dry_run:
        for job in chosen:
            state = f"done: {done[job.id]['status']}" if job.id in done else job.absent or f"at most {job.seconds} s"
            print(f"{job.id:<44} {state}")
        print(f"{len(left)} of {len(chosen)} jobs to run, {sum(job.seconds for job in left) / 60:.0f} minutes at most")
        return 0
    if os.environ.get("TRITON_INTERPRET") == "1":
        command.error("TRITON_INTERPRET=1: kernels would be interpreted, not run on the GPU; unset it")
    if not torch.cuda.is_available():
        command.error("torch sees no CUDA device here; run it on a machine with a GPU (--dry-run lists what it does)")
    output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    facts = machine.facts(torch.device("cuda"))
    print(machine.describe(facts), flush=True)
    ran = []
    statuses = {name: row["status"] for name, row in ended(output).items()}
    for job in left:
        seconds = deadline - time.monotonic()
        if seconds < LEAST_SECONDS:
            break
        if job.absent is None and job.needs is not None and statuses.get(job.needs, "ok") != "ok":
            job = replace(job, absent=f"{job.needs}: {statuses[job.needs]}")
        print(f"{job.id} ...", flush=True)
        row = run(job, output, seconds, facts)
        ran.append(row)
        statuses[job.id] = row["status"]
        write_summary(output)
        print(f"{job.id}: {row['status']} in {row['seconds']:.0f} s", flush=True)
        for line in (row["failed_tests"] or row["end"]) if row["status"] != "ok" else []:
            print(f"    {line}", flush=True)
    waiting = len(left) - sum(row["status"] in ENDED for row in ran)
    print(f"{len(ran)} jobs in this call; {waiting} still to run" + (": call it again" if waiting else ""))
    return 1 if any(row["status"] in ("failed", "too long") for row in ran) else 0


if __name__ == "__main__":
    sys.exit(main())
