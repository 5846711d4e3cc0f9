"""The same PPO by TRL 1.11.0 (the last release that has it) and by ppo_rlhf.py: learning curves, their ends, times.

Both start from the same SFT model and reward model of the embedded task and use the same prompts, hyperparameters and
float32; each run is a process of its own. Where TRL leaves no choice ppo_rlhf.py follows: no clipping of gradients, and
scores as the reward model gives them, not shifted. Needs `pip install -r requirements-bench.txt`, and the models that
benchmarks/embedded.py makes.

    python benchmarks/parity_trl.py          # writes benchmarks/results/parity_trl.json and parity_trl.png
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
from measure import ROOT, load_module, machine, run_stage

# what both are given; TRL's names differ for some
EPISODES, BATCH, MICRO_BATCH, EPOCHS, RESPONSE = 6400, 128, 32, 4, 64
LEARNING_RATE, TEMPERATURE, KL_COEF, EOS_PENALTY, EVAL_EVERY = 5e-4, 0.5, 0.1, 1.0, 5
PROMPTS = ROOT / "data/support/prompts"


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
    trl: int | None = None
    """Run TRL with this seed in this process; how the benchmark calls itself."""


def main(args: Args) -> None:
    sft, reward_model = args.models / "sft", args.runs / "reward_model"
    if args.trl is not None:
        run_trl(args, sft, reward_model, args.runs / f"trl{args.trl}")
        return
    shutil.copytree(ROOT / args.models / "reward_model", ROOT / reward_model, dirs_exist_ok=True)
    config = json.loads((ROOT / reward_model / "config.json").read_text())
    (ROOT / reward_model / "config.json").write_text(json.dumps(config | {"reward_mean": 0.0, "reward_std": 1.0}))
    ours = f"ppo_rlhf.py --model {sft} --reward-model {reward_model} --dtype float32 --total-episodes {args.episodes}"
    ours += f" --batch-size {BATCH} --micro-batch-size {MICRO_BATCH} --num-ppo-epochs {EPOCHS} --max-grad-norm 1e9"
    ours += f" --response-length {RESPONSE} --learning-rate {LEARNING_RATE} --temperature {TEMPERATURE}"
    ours += f" --kl-coef {KL_COEF} --missing-eos-penalty {EOS_PENALTY} --eval-every {EVAL_EVERY} --save-every 0"
    report = {"machine": machine(args.threads), "runs": []}
    for seed in args.seeds:
        folder = args.runs / f"ours{seed}"
        command = [*ours.split(), "--output-dir", str(folder), "--seed", str(seed), "--overwrite"]
        measured = run_stage(command, args.threads)
        report["runs"].append({"by": "ppo_rlhf.py", "seed": seed} | summary(folder, measured["wall_seconds"]))
        command = [sys.executable, __file__, "--trl", str(seed), "--models", str(args.models), "--runs", str(args.runs)]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        started = time.time()
        subprocess.run([*command, "--episodes", str(args.episodes)], cwd=ROOT, env=environment, check=True)
        by = {"by": "TRL 1.11.0", "seed": seed}
        report["runs"].append(by | summary(args.runs / f"trl{seed}", time.time() - started))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "parity_trl.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report["runs"], args.out / "parity_trl.png")
    for run in report["runs"]:
        print({name: value for name, value in run.items() if name != "curves"})


def summary(folder: Path, wall_seconds: float) -> dict:
    """The curves of a run, the means of their last five points, and the seconds of its updates and of all of it."""
    rows = [json.loads(line) for line in (ROOT / folder / "metrics.jsonl").open()]
    names = {"score": "objective/scores", "kl": "objective/kl", "labeler": "eval/judge"}
    curves = {name: [(r["update"], round(r[key], 4)) for r in rows if key in r] for name, key in names.items()}
    ends = {name: statistics.mean(y for _, y in curve[-5:]) for name, curve in curves.items()}
    parts = ("time/rollout", "time/score", "time/train")
    seconds = [r.get("seconds") or sum(r[part] for part in parts) for r in rows]
    return {"ends": ends, "update_seconds": statistics.median(seconds), "wall_seconds": wall_seconds, "curves": curves}


def run_trl(args: Args, sft: Path, reward_model: Path, folder: Path) -> None:
    """PPO by TRL; writes metrics.jsonl with the names that ppo_rlhf.py uses, and the seconds of each update."""
    sys.path.insert(0, str(ROOT))
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    import utils

    gold = load_module("data/support/gold.py")
    device = torch.device("cpu")
    tokenizer = utils.load_tokenizer(str(sft))
    tokenizer.padding_side = "left"
    policy, reference = (utils.load_causal_lm(str(sft), device) for _ in range(2))
    value_model, judge = (utils.load_classifier(str(reward_model), device, trained=True) for _ in range(2))
    train, held_out = (utils.load_prompts(tokenizer, str(PROMPTS), split, 512) for split in ("train", "validation"))
    held_out = held_out[:200]
    datasets = [Dataset.from_list([{"input_ids": p.ids} for p in prompts]) for prompts in (train, held_out)]
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=args.episodes,
        learning_rate=LEARNING_RATE,
        adam_epsilon=1e-5,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        response_length=RESPONSE,
        temperature=TEMPERATURE,
        stop_token="eos",
        missing_eos_penalty=EOS_PENALTY,
        kl_coef=KL_COEF,
        local_rollout_forward_batch_size=BATCH,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        seed=args.trl,
    )
    folder.mkdir(parents=True, exist_ok=True)

    def labeler() -> float:
        """Mean score by the labeler of replies to the held-out prompts."""
        ids, mask = utils.pad([p.ids for p in held_out], tokenizer.pad_token_id, "left", device)
        rng, stops = utils.generator(device, args.trl), [tokenizer.eos_token_id]
        pad = tokenizer.pad_token_id
        replies, real = utils.generate(policy, ids, mask, RESPONSE, stops, pad, TEMPERATURE, rng=rng)
        texts = tokenizer.batch_decode(
            [r[m.bool()] for r, m in zip(replies, real, strict=True)], skip_special_tokens=True
        )
        return statistics.mean(gold.score([p.text for p in held_out], texts))

    class Record(TrainerCallback):
        """Writes what TRL logs after each update, and every few updates what the labeler says."""

        def __init__(self):
            self.file, self.update, self.started = (folder / "metrics.jsonl").open("w", buffering=1), 0, time.time()

        def on_log(self, config, state, control, logs=None, **kwargs):
            if "objective/kl" not in logs:
                return
            self.update += 1
            row = {"update": self.update, "seconds": time.time() - self.started}
            row |= {name: value for name, value in logs.items() if isinstance(value, float | int)}
            if self.update % EVAL_EVERY == 0:
                row["eval/judge"] = labeler()
            self.file.write(json.dumps(row) + "\n")
            self.started = time.time()

    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value_model,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        callbacks=[Record()],
    )
    trainer.train()


def plot(runs: list[dict], path: Path) -> None:
    """Score, KL and labeler over the updates: a thin line for each seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    titles = {"score": "reward model's score", "kl": "KL from the reference, nats", "labeler": "labeler's score"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for by, color in (("ppo_rlhf.py", "tab:blue"), ("TRL 1.11.0", "tab:orange")):
            curves = [run["curves"][name] for run in runs if run["by"] == by]
            for curve in curves:
                axis.plot(*zip(*curve, strict=True), color=color, alpha=0.3, linewidth=0.8)
            mean = [(x, statistics.mean(curve[i][1] for curve in curves)) for i, (x, _) in enumerate(curves[0])]
            axis.plot(*zip(*mean, strict=True), color=color, label=by)
        axis.set(title=title, xlabel="update")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Args))
