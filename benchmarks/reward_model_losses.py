"""What each loss of reward_model.py gives on the embedded task: one left out at a time.

Each reward model starts from an SFT model that embedded.py has trained, with the default flags but
for one. Written down: accuracy on the held-out pairs, and what a wrong remedy and another product
cost in otherwise perfect replies (reward_model_parts.py), for seed 1; then, for three seeds, the
accuracy after 500 and 2,000 pairs, with and without the language-model loss.

    python benchmarks/reward_model_losses.py    # writes benchmarks/results/reward_model_losses.json
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from measure import ROOT, machine, run_stage
from reward_model_parts import points

VARIANTS = {
    "all three": "",
    "no language-model loss": "--lm-coef 0",
    "no loss on beginnings": "--prefix-coef 0",
    "the pairwise loss alone": "--prefix-coef 0 --lm-coef 0",
}


@dataclass
class Args:
    models: Path = Path("runs/embedded")
    """Where embedded.py has left its SFT models, of three seeds."""
    threads: int = 2
    """Threads of each process."""
    runs: Path = Path("runs/losses")
    """Where the runs go."""
    out: Path = Path("benchmarks/results/reward_model_losses.json")
    """Where the result goes."""


def accuracy(args: Args, folder: Path, seed: int, flags: str) -> float:
    """A reward model's accuracy on the held-out pairs."""
    flags = f"--model {args.models}/seed{seed}/sft --output-dir {folder} --seed {seed} {flags}"
    return run_stage(["reward_model.py", "--overwrite", *flags.split()], args.threads)["accuracy"]


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    report = {"machine": machine(args.threads), "variants": {}, "few_pairs": []}
    for name, flags in VARIANTS.items():
        folder = args.runs / name.replace(" ", "-")
        right = accuracy(args, folder, 1, flags)
        kinds = points(str(ROOT / folder), 200)
        best = kinds.pop("perfect")["reward_model"]
        lost = {kind: mean["reward_model"] - best for kind, mean in kinds.items()}
        report["dtype"] = json.loads((ROOT / folder / "args.json").read_text())["dtype"]
        report["variants"][name] = {"flags": flags, "accuracy": right, "lost": lost}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{name:24} accuracy {right:.3f}", json.dumps(lost))
    for pairs in (500, 2000):
        row = {"pairs": pairs, "seeds": [1, 2, 3]}
        for name, flags in (("with", ""), ("without", "--lm-coef 0")):
            flags += f" --train-split train[:{pairs}]"
            row[name] = [accuracy(args, args.runs / "few", seed, flags) for seed in row["seeds"]]
        report["few_pairs"].append(row)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(row)


if __name__ == "__main__":
    main(tyro.cli(Args))
