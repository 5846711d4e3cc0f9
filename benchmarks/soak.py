"""Five hundred small updates of PPO on the embedded task: do memory, open files or threads grow?

The run is a process of its own, looked at from outside when it has logged an update; evaluations
and checkpoints are part of it. Exits with 1 if memory at the end is more than 5% above that at
update 50, or if there are more open files or threads. Needs Linux (/proc) and the models that
benchmarks/embedded.py makes.

    python benchmarks/soak.py          # writes benchmarks/results/soak.json
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from measure import ROOT, machine

BATCH, WINDOW = 16, 10  # responses of an update; updates over which a median is taken


@dataclass
class Args:
    models: Path = Path("runs/embedded/seed1")
    """Folder with the sft and reward_model that the run starts from."""
    updates: int = 500
    """Updates in all."""
    settled: int = 50
    """Update by which all that is allocated once has been."""
    dtype: str = "bfloat16"
    """Precision of matrix products, as for ppo_rlhf.py."""
    threads: int = 2
    """Threads of the process."""
    runs: Path = Path("runs/soak")
    """Where the run goes."""
    out: Path = Path("benchmarks/results/soak.json")
    """The result file."""


def main(args: Args) -> None:
    if not WINDOW <= args.settled <= args.updates - WINDOW:
        sys.exit(f"--settled: must leave {WINDOW} updates before and after; pass another")
    command = f"ppo_rlhf.py --model {args.models}/sft --reward-model {args.models}/reward_model"
    command += f" --dtype {args.dtype} --total-episodes {args.updates * BATCH}"
    command += f" --batch-size {BATCH} --micro-batch-size 8 --num-mini-batches 2"
    command += " --num-ppo-epochs 2 --response-length 24 --learning-rate 5e-5"
    command += " --eval-prompts 16 --eval-every 50 --save-every 100 --save-rollouts 100"
    command += f" --output-dir {args.runs}"
    shutil.rmtree(ROOT / args.runs, ignore_errors=True)
    environment, started = os.environ | {"OMP_NUM_THREADS": str(args.threads)}, time.time()
    process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, env=environment)
    seen = watch(process, ROOT / args.runs / "metrics.jsonl")
    if process.returncode or max(seen, default=0) != args.updates:
        sys.exit(f"ppo_rlhf.py failed, or was seen at only {len(seen)} of {args.updates} updates")
    report = {
        "machine": machine(args.threads),
        "updates": args.updates,
        "settled": args.settled,
        "seconds": time.time() - started,
    }
    report |= {"early": summary(seen, args.settled), "late": summary(seen, args.updates)}
    ratio = report["late"]["memory_mb"] / report["early"]["memory_mb"]
    report["memory_ratio"] = ratio
    report["curve_mb"] = [(u, round(seen[u]["memory_mb"], 1)) for u in sorted(seen)[::10]]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print({name: value for name, value in report.items() if name != "curve_mb"})
    grown = [name for name in ("files", "threads") if report["late"][name] > report["early"][name]]
    if ratio > 1.05 or grown:
        memory = f"memory at the end is {ratio:.3f} of that at update {args.settled}"
        sys.exit(f"{memory}; grown: {grown}")


def watch(process: subprocess.Popen, metrics: Path) -> dict[int, dict[str, float]]:
    """Memory, files and threads of the process at each update, once its line is in `metrics`."""
    seen: dict[int, dict[str, float]] = {}
    while process.poll() is None:
        lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if lines and lines not in seen:
            try:
                seen[lines] = look(process.pid)
            except (FileNotFoundError, KeyError):  # it has ended in between
                continue
        time.sleep(0.005)
    return seen


def look(pid: int) -> dict[str, float]:
    """Resident memory in MB, open files and threads of a process now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    memory = int(status["VmRSS"].split()[0]) * 1024 / 1e6
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return {"memory_mb": memory, "files": files, "threads": int(status["Threads"])}


def summary(seen: dict[int, dict[str, float]], update: int) -> dict[str, float]:
    """Medians over the updates up to this one."""
    window = [seen[u] for u in range(update - WINDOW + 1, update + 1) if u in seen]
    return {name: statistics.median(numbers[name] for numbers in window) for name in window[0]}


if __name__ == "__main__":
    main(tyro.cli(Args))
