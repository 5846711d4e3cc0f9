"""The same PPO by TRL 1.11.0 (from 1.13.0 on TRL has none) and by ppo_rlhf.py.

Compared are learning curves and their ends. Both start from the same SFT model and reward
model of the embedded task and use the same prompts, hyperparameters and float32; each run is a
process of its own. Where TRL leaves no choice ppo_rlhf.py follows: no clipping of gradients, and
scores as the reward model gives them, not shifted. Needs `pip install -r requirements-bench.txt`,
and the models that benchmarks/embedded.py makes.

    python benchmarks/parity_trl.py    # writes benchmarks/results/parity_trl.json and .png
"""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from measure import ROOT, machine, run_process

# what both are given; TRL's names differ for some
EPISODES, BATCH, MICRO_BATCH, EPOCHS, RESPONSE = 6400, 128, 32, 4, 64
LEARNING_RATE, TEMPERATURE, KL_COEF, EOS_PENALTY, EVAL_EVERY = 5e-4, 0.5, 0.1, 1.0, 5
PROMPTS = "data/support/prompts"


@dataclass
class Args:
    models: Path = Path("runs/embedded/seed1")
    """Folder with the sft and reward_model that all runs start from."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    episodes: int = EPISODES
    """Episodes of each run."""
    threads: int = 2
    """Threads of each process."""
    runs: Path = Path("runs/parity")
    """Where the runs go."""
    out: Path = Path("benchmarks/results")
    """Folder of the result files."""


def main(args: Args) -> None:
    sft, reward_model = args.models / "sft", args.runs / "reward_model"
    shutil.copytree(ROOT / args.models / "reward_model", ROOT / reward_model, dirs_exist_ok=True)
    config = ROOT / reward_model / "config.json"
    unshifted = json.loads(config.read_text()) | {"reward_mean": 0.0, "reward_std": 1.0}
    config.write_text(json.dumps(unshifted))
    common = f"--model {sft} --reward-model {reward_model} --dataset {PROMPTS} --dtype float32"
    common += f" --total-episodes {args.episodes} --num-ppo-epochs {EPOCHS}"
    common += f" --batch-size {BATCH} --micro-batch-size {MICRO_BATCH}"
    common += f" --response-length {RESPONSE} --temperature {TEMPERATURE}"
    common += f" --learning-rate {LEARNING_RATE} --kl-coef {KL_COEF}"
    common += f" --missing-eos-penalty {EOS_PENALTY} --eval-every {EVAL_EVERY}"
    report = {"machine": machine(args.threads), "runs": []}
    for seed in args.seeds:
        for by, script, own in (
            ("ppo_rlhf.py", "ppo_rlhf.py", "--max-grad-norm 1e9 --save-every 0 --overwrite"),
            ("TRL 1.11.0", "benchmarks/trl_ppo.py", ""),
        ):
            folder = args.runs / f"{Path(script).stem}{seed}"
            command = f"{script} {common} {own} --seed {seed} --output-dir {folder}"
            run_process(command.split(), args.threads)
            report["runs"].append({"by": by, "seed": seed} | summary(folder))
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "parity_trl.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report["runs"], args.out / "parity_trl.png")
    print("python benchmarks/tables.py fills docs/results.md in")


def summary(folder: Path) -> dict:
    """The curves of a run: score and KL of each update, the labeler's mean of some."""
    rows = [json.loads(line) for line in (ROOT / folder / "metrics.jsonl").open()]
    names = {"score": "objective/scores", "kl": "objective/kl", "labeler": "eval/judge"}
    curves = {}
    for name, key in names.items():
        curves[name] = [(r["update"], round(r[key], 4)) for r in rows if key in r]
    return {"curves": curves}


def plot(runs: list[dict], path: Path) -> None:
    """Score, KL and labeler over the updates: a thin line for each seed, a thick one for all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    titles = {
        "score": "reward model's score",
        "kl": "KL from the reference, nats",
        "labeler": "labeler's score",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for by, color in (("ppo_rlhf.py", "tab:blue"), ("TRL 1.11.0", "tab:orange")):
            curves = [run["curves"][name] for run in runs if run["by"] == by]
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=color, alpha=0.3, linewidth=0.8)
            updates = [update for update, _ in curves[0]]
            means = [statistics.mean(c[i][1] for c in curves) for i in range(len(updates))]
            axis.plot(updates, means, color=color, label=by)
        axis.set(title=title, xlabel="update")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
