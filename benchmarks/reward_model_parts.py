"""What the reward model has learned of the labeler: one thing goes wrong in a perfect reply.

For each held-out prompt a reply that the labeler gives full marks, and variants of it with another
remedy, another product, another tone and so on. Printed: how many points each variant loses, by the
labeler and by each reward model. By default these are the three that embedded.py has trained.

    python benchmarks/reward_model_parts.py
    python benchmarks/reward_model_parts.py --reward-models runs/reward_model
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from measure import ROOT, load_module, machine

sys.path.insert(0, str(ROOT))
import encoding
import utils

make = load_module("data/support/make.py")
gold, wordings = make.gold, make.w


@dataclass
class Args:
    reward_models: tuple[str, ...] = tuple(f"runs/embedded/seed{i}/reward_model" for i in (1, 2, 3))
    """Their folders."""
    prompts: int = 200
    """Held-out prompts, each with one reply of every kind."""
    threads: int = 2
    """Threads of the process."""
    out: Path = Path("benchmarks/results/reward_model_parts.json")
    """Where the result goes."""


def replies(rng: random.Random, product: str, problem: str) -> dict[str, str]:
    """The perfect reply and its variants, by name."""
    # layouts: an opening, no closing, no product in the body; the product in the opening or not
    named, unnamed = [0.0, 1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.5]
    apology = ("apology", rng.choice(wordings.APOLOGIES), "")
    lead = rng.choice(wordings.LEADS)
    right = (True, rng.choice(wordings.REMEDIES[problem]))
    wrong = (True, rng.choice(wordings.REMEDIES[make.other(rng, wordings.PROBLEMS, problem)]))
    middle, end = rng.choice(wordings.RAMBLE_MIDDLES), rng.choice(wordings.RAMBLE_ENDS)
    ramble = f"{wordings.RAMBLE_STARTS[0]} {middle}{end}"
    perfect = {"tone": apology, "remedy": right, "product": product}
    perfect |= {"ramble": None, "promise": (lead, ""), "layout": named}
    variants = {
        "perfect": {},
        "a wrong remedy": {"remedy": wrong},
        "no remedy": {"remedy": (False, rng.choice(wordings.STALLS))},
        "another product": {"product": make.other(rng, wordings.PRODUCTS, product)},
        "no product": {"product": None, "layout": unnamed},
        "curt": {"tone": ("curt", rng.choice(wordings.CURT), "")},
        "rude": {"tone": ("rude", rng.choice(wordings.RUDE), "")},
        "rambling": {"ramble": ramble},
    }
    return {name: make.write(perfect | change) for name, change in variants.items()}


@torch.no_grad()
def points(folder: str, prompts: int) -> dict[str, dict[str, float]]:
    """Mean points of each kind of reply, by the labeler and by the reward model in `folder`."""
    device = torch.device("cpu")
    model = utils.load_classifier(folder, device, trained=True)
    tokenizer = encoding.load_tokenizer(folder)
    validation = ROOT / "data/support/prompts/validation.jsonl"
    rows = [json.loads(line) for line in validation.open()][:prompts]
    rng = random.Random(1)
    by_prompt = [replies(rng, row["product"], row["problem"]) for row in rows]
    means = {}
    for name in by_prompt[0]:
        pairs = [(row["prompt"], reply[name]) for row, reply in zip(rows, by_prompt, strict=True)]
        whole = [encoding.render(tokenizer, *pair) for pair in pairs]
        texts = [ids for ids, _ in encoding.encode(tokenizer, whole)]
        ids, mask = encoding.pad(texts, tokenizer.pad_token_id, "right", device)
        scores = utils.normalize_scores(model, utils.last_token_scores(model, ids, mask))
        labels = gold.score([p for p, _ in pairs], [c for _, c in pairs])
        means[name] = {"labeler": sum(labels) / len(labels), "reward_model": scores.mean().item()}
    return means


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    means = {folder: points(folder, args.prompts) for folder in args.reward_models}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(args.threads), "prompts": args.prompts, "means": means}
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    for folder, kinds in means.items():
        print(folder)
        perfect = kinds["perfect"]
        for name, mean in kinds.items():
            labeler = mean["labeler"] - perfect["labeler"]
            learned = mean["reward_model"] - perfect["reward_model"]
            print(f"  {name:16} labeler {labeler:+6.2f}  reward model {learned:+6.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
