"""What each loss of reward_model.py gives on the embedded task: one left out at a time.

Each reward model starts from the same SFT model, one that embedded.py has trained, with the default
flags but for one. Written down: accuracy on the held-out pairs, and what a wrong remedy and another
product cost in otherwise perfect replies (reward_model_parts.py).

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
    model: str = "runs/embedded/seed1/sft"
    """The SFT model."""
    threads: int = 2
    """Threads of each process."""
    runs: Path = Path("runs/losses")
    """Where the runs go."""
    out: Path = Path("benchmarks/results/reward_model_losses.json")
    """Where the result goes."""


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    report = {"machine": machine(args.threads), "variants": {}}
    for name, flags in VARIANTS.items():
        folder = args.runs / name.replace(" ", "-")
        command = f"reward_model.py --model {args.model} --output-dir {folder} --overwrite {flags}"
        summary = run_stage(command.split(), args.threads)
        kinds = points(str(ROOT / folder), 200)
        best = kinds.pop("perfect")["reward_model"]
        lost = {kind: mean["reward_model"] - best for kind, mean in kinds.items()}
        report["dtype"] = json.loads((ROOT / folder / "args.json").read_text())["dtype"]
        report["variants"][name] = {"flags": flags, "accuracy": summary["accuracy"], "lost": lost}
        args.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{name:24} accuracy {summary['accuracy']:.3f}", json.dumps(lost))


if __name__ == "__main__":
    main(tyro.cli(Args))
