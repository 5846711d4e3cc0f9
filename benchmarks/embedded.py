"""Quality, time and memory of the whole pipeline on the embedded task; each run is a process of its own.

For every seed the three stages run with their defaults; then PPO runs once more, from the first seed's models, with
`--kl-coef 0`, to show reward hacking. Every number in the README's section on the embedded task is from the result.

    python benchmarks/embedded.py                  # writes benchmarks/results/embedded.json
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gold", ROOT / "data/support/gold.py")
gold = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gold)


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of all three stages."""
    threads: int = 2
    """Threads of each process."""
    runs: Path = Path("runs/embedded")
    """Where the runs go."""
    out: Path = Path("benchmarks/results/embedded.json")
    """Where the result goes."""


def main(args: Args) -> None:
    rows = [json.loads(line) for line in (ROOT / "data/support/preferences/validation.jsonl").open()]
    ceiling = gold.agreement(rows)
    seeds = []
    for seed in args.seeds:
        folder = args.runs / f"seed{seed}"
        sft, reward_model, ppo = (folder / name for name in ("sft", "reward_model", "ppo_rlhf"))
        ppo_flags = ["--model", sft, "--reward-model", reward_model, "--seed", seed]
        result = {
            "seed": seed,
            "sft": run_stage(args, "sft.py", sft, ["--seed", seed]),
            "reward_model": run_stage(args, "reward_model.py", reward_model, ["--model", sft, "--seed", seed]),
            "ppo": run_stage(args, "ppo_rlhf.py", ppo, ppo_flags) | judge_samples(ppo),
        }
        if seed == args.seeds[0]:
            flags = [*ppo_flags, "--kl-coef", 0]
            result["ppo_kl_coef_0"] = run_stage(args, "ppo_rlhf.py", folder / "kl0", flags) | judge_samples(
                folder / "kl0"
            )
        seeds.append(result)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"processor": processor(), "threads": args.threads, "python": platform.python_version()}
        report = {"machine": machine, "reward_model_ceiling": ceiling, "seeds": seeds}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(result, indent=2))


def run_stage(args: Args, script: str, folder: Path, flags: list) -> dict:
    """Run a stage in a process; its summary, wall seconds with start-up, and peak resident memory in GB."""
    command = [sys.executable, ROOT / script, "--output-dir", folder, "--overwrite", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    started = time.time()
    pid = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=environment).pid
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{script} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {"wall_seconds": time.time() - started, "peak_memory_gb": usage.ru_maxrss * unit / 1e9}
    return json.loads((ROOT / folder / "summary.json").read_text()) | measured


def judge_samples(folder: Path) -> dict:
    """What the labeler says of the held-out replies: means of its parts, and how far the policy came to the best."""
    samples = [json.loads(line) for line in (ROOT / folder / "samples.jsonl").open()]
    best = sum(gold.best_score([s["prompt"] for s in samples])) / len(samples)
    result = {}
    for who in ("reference", "policy"):
        judged = [gold.judge(s["prompt"], s[who]) for s in samples]
        right = [j["remedy_right"] and j["product_right"] for j in judged]
        names = ("remedy_right", "product_right", "polite", "rude", "words", "faults", "score")
        result[who] = {name: sum(float(j[name]) for j in judged) / len(judged) for name in names}
        result[who]["both_right"] = sum(right) / len(right)
    way = (result["policy"]["score"] - result["reference"]["score"]) / (best - result["reference"]["score"])
    return {"labeler": result, "best": best, "share_of_the_way": way}


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main(tyro.cli(Args))
