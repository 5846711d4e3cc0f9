"""Quality, time and memory of the whole pipeline on the embedded task; each run is a process of its own.

For every seed the three stages run with their defaults; then PPO runs once more, from the first seed's models, with
`--kl-coef 0`, to show reward hacking. Every number in the README's section on the embedded task is from the result.

    python benchmarks/embedded.py       # writes benchmarks/results/embedded.json and embedded_samples.jsonl
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from measure import ROOT, machine, run_stage

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
        sft, reward_model, ppo, kl0 = (folder / name for name in ("sft", "reward_model", "ppo_rlhf", "kl0"))
        commands = {
            "sft": f"sft.py --output-dir {sft}",
            "reward_model": f"reward_model.py --output-dir {reward_model} --model {sft}",
            "ppo": f"ppo_rlhf.py --output-dir {ppo} --model {sft} --reward-model {reward_model}",
        }
        if seed == args.seeds[0]:
            models = f"--model {sft} --reward-model {reward_model}"
            commands["ppo_kl_coef_0"] = f"ppo_rlhf.py --output-dir {kl0} {models} --kl-coef 0"
        result = {"seed": seed}
        for name, command in commands.items():
            result[name] = run_stage([*command.split(), "--seed", str(seed), "--overwrite"], args.threads)
        for name, out in (("ppo", ppo), ("ppo_kl_coef_0", kl0)):
            if name in result:
                result[name] |= judge_samples(out)
        if seed == args.seeds[0]:
            first = (ROOT / ppo / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:6]
            args.out.with_name(f"{args.out.stem}_samples.jsonl").write_text("".join(first), encoding="utf-8")
        seeds.append(result)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(args.threads), "reward_model_ceiling": ceiling, "seeds": seeds}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(result, indent=2))


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


if __name__ == "__main__":
    main(tyro.cli(Args))
