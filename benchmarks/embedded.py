"""Quality, time and memory of the whole pipeline on the embedded task.

For every seed the three stages run with their defaults, each as a process of its own; then PPO runs
once more, from the first seed's models, with `--kl-coef 0`, to show reward hacking. Every number on
the embedded task in the docs is from the results, files in benchmarks/results:

    python benchmarks/embedded.py                    # embedded.json and embedded_samples.jsonl
    python benchmarks/embedded.py --dtype float32    # embedded_float32.json; no run for hacking
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from measure import ROOT, keep_samples, load_module, machine, run_stage

gold = load_module("data/support/gold.py")


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of all three stages."""
    threads: int = 2
    """Threads of each process."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of all three stages; the result file says which `auto` was."""
    runs: Path = Path("runs/embedded")
    """Where the runs go."""
    out: Path = Path("benchmarks/results")
    """Folder of the result files."""


def main(args: Args) -> None:
    validation = ROOT / "data/support/preferences/validation.jsonl"
    ceiling = gold.agreement([json.loads(line) for line in validation.open()])
    default = args.dtype == Args.dtype
    name = "embedded" if default else f"embedded_{args.dtype}"
    seeds = []
    for seed in args.seeds:
        folder = args.runs / (f"seed{seed}" if default else f"{args.dtype}-seed{seed}")
        sft, reward_model = folder / "sft", folder / "reward_model"
        ppo, kl0 = folder / "ppo_rlhf", folder / "kl0"
        commands = {
            "sft": f"sft.py --output-dir {sft}",
            "reward_model": f"reward_model.py --output-dir {reward_model} --model {sft}",
            "ppo": f"ppo_rlhf.py --output-dir {ppo} --model {sft} --reward-model {reward_model}",
        }
        if default and seed == args.seeds[0]:
            models = f"--model {sft} --reward-model {reward_model}"
            commands["ppo_kl_coef_0"] = f"ppo_rlhf.py --output-dir {kl0} {models} --kl-coef 0"
        result = {"seed": seed}
        for stage, command in commands.items():
            flags = [*command.split(), "--seed", str(seed), "--dtype", args.dtype, "--overwrite"]
            result[stage] = run_stage(flags, args.threads)
        for stage, out in (("ppo", ppo), ("ppo_kl_coef_0", kl0)):
            if stage in result:
                result[stage] |= judge_samples(out) | first_update(out)
        args.out.mkdir(parents=True, exist_ok=True)
        if default and seed == args.seeds[0]:
            keep_samples(ppo, args.out / f"{name}_samples.jsonl", 6)
        seeds.append(result)
        dtype = json.loads((ROOT / ppo / "args.json").read_text())["dtype"]
        report = {"machine": machine(args.threads), "dtype": dtype}
        report |= {"reward_model_ceiling": ceiling, "seeds": seeds}
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(result, indent=2))


def first_update(folder: Path) -> dict:
    """How far KL and ratio are from 0 and 1 where they must start: rounding, in bfloat16."""
    rows = [json.loads(line) for line in (ROOT / folder / "metrics.jsonl").open()]
    kl_per_token = rows[0]["objective/kl"] / rows[0]["response/length"]
    ratio_error = max(row["val/ratio_start_error"] for row in rows)
    return {"first_kl_per_token": kl_per_token, "largest_ratio_start_error": ratio_error}


def judge_samples(folder: Path) -> dict:
    """What the labeler says of the held-out replies, the policy's and the reference's.

    Means of its parts, how far the policy came on the way from the reference to the best, the
    commonest beginnings of three words, and the policy's first reply.
    """
    samples = [json.loads(line) for line in (ROOT / folder / "samples.jsonl").open()]
    best = sum(gold.best_score([s["prompt"] for s in samples])) / len(samples)
    result, openings = {}, {}
    for who in ("reference", "policy"):
        starts = Counter(" ".join(s[who].split()[:3]) for s in samples)
        openings[who] = starts.most_common(2)
        judged = [gold.judge(s["prompt"], s[who]) for s in samples]
        right = [j["remedy_right"] and j["product_right"] for j in judged]
        names = ("remedy_right", "product_right", "polite", "rude", "words", "faults", "score")
        result[who] = {name: sum(float(j[name]) for j in judged) / len(judged) for name in names}
        result[who]["both_right"] = sum(right) / len(right)
    start, end = result["reference"]["score"], result["policy"]["score"]
    way = (end - start) / (best - start)
    report = {"labeler": result, "best": best, "share_of_the_way": way}
    return report | {"openings": openings, "first_reply": samples[0]["policy"]}


if __name__ == "__main__":
    main(tyro.cli(Args))
