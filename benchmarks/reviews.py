"""The three stages on film reviews, from SmolLM2-135M: accuracy, win rate, time and memory.

Each stage is a process of its own. The model and the data are found, not fetched: pass a folder or
hub id, and what examples/reviews/prepare.py wrote. Every number in examples/reviews/README.md is
from the result. It takes most of an hour on two cores.

    python benchmarks/reviews.py    # benchmarks/results/reviews.json and reviews_samples.jsonl
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro
from measure import keep_samples, machine, run_stage

KINDS = ("sft", "preferences", "prompts")


@dataclass
class Args:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """The language model: a hub id or a folder."""
    data: Path = Path("data/reviews")
    """Folder with sft, preferences and prompts."""
    threads: int = 2
    """Threads of each process."""
    runs: Path = Path("runs/reviews")
    """Where the runs go."""
    out: Path = Path("benchmarks/results")
    """Folder of the result files."""
    seed: int = 1
    """Seed of all three stages."""


def main(args: Args) -> None:
    sft, reward_model, ppo = (args.runs / name for name in ("sft", "reward-model", "ppo"))
    # the flags of the README's four commands
    stages = {
        "sft": f"sft.py --model {args.model} --dataset {args.data}/sft --output-dir {sft}"
        " --epochs 1 --batch-size 64 --learning-rate 1e-4",
        "reward_model": f"reward_model.py --model {sft} --dataset {args.data}/preferences"
        f" --normalize-with {args.data}/sft --normalize-std --output-dir {reward_model}"
        " --micro-batch-size 16 --learning-rate 5e-5",
        "ppo": f"ppo_rlhf.py --model {sft} --reward-model {reward_model}"
        f" --dataset {args.data}/prompts --output-dir {ppo}"
        " --eval-reward-fn examples/reviews/vader.py:score --response-length 24 --temperature 1.0"
        " --total-episodes 2304 --batch-size 64 --num-mini-batches 2 --num-ppo-epochs 2"
        " --learning-rate 6e-5 --kl-coef 0.05 --missing-eos-penalty 0.25",
    }
    # no evaluations and checkpoints on the way
    added = f"--seed {args.seed} --eval-every 0 --save-every 0 --overwrite"
    places = {args.model: "MODEL"} | {f"{args.data}/{kind}": f"DATA/{kind}" for kind in KINDS}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    report = {"machine": machine(args.threads) | versions, "seed": args.seed}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, command in stages.items():
        flags = f"{command} {added}".split()
        shown = " ".join(places.get(flag, flag) for flag in flags)
        report[name] = run_stage(flags, args.threads) | {"command": shown}
        (args.out / "reviews.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report[name], indent=2), flush=True)
    keep_samples(ppo, args.out / "reviews_samples.jsonl", 20)


if __name__ == "__main__":
    main(tyro.cli(Args))
