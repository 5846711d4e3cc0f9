"""Writes the tables of the READMEs that hold measured numbers, from the committed result files.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of the functions below.

    python benchmarks/tables.py
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = ("README.md", "examples/reviews/README.md")


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def samples(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def table(header: list[str], rows: list[list[object]]) -> str:
    cells = [
        [str(cell).replace("|", "\\|").replace("\n", " ").strip() for cell in row] for row in rows
    ]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def embedded_samples() -> str:
    """The first held-out prompts of the embedded task and both replies."""
    rows = []
    for s in samples("embedded_samples.jsonl"):
        customer = s["prompt"].removeprefix("Customer: ").removesuffix("\nAgent:")
        rows.append(
            [
                customer,
                s["reference"],
                f"{s['reference_judge']:.1f}",
                s["policy"],
                f"{s['policy_judge']:.1f}",
            ]
        )
    return table(["customer", "before: SFT model", "labeler", "after: PPO", "labeler"], rows)


def embedded_seeds() -> str:
    """What PPO makes of the SFT model, for each seed."""
    header = ["seed", "win rate", "labeler, SFT model", "labeler, PPO", "best", "share of the way"]
    header += ["right product and remedy, SFT model", "the same, PPO", "ends in EOS"]
    rows = []
    for seed in result("embedded.json")["seeds"]:
        ppo = seed["ppo"]
        before, after = ppo["labeler"]["reference"], ppo["labeler"]["policy"]
        row = [
            seed["seed"],
            f"{ppo['eval']['win_rate']:.3f}",
            f"{before['score']:.2f}",
            f"{after['score']:.2f}",
        ]
        row += [
            f"{ppo['best']:.0f}",
            f"{ppo['share_of_the_way']:.3f}",
            f"{before['both_right']:.3f}",
        ]
        rows.append(
            [*row, f"{after['both_right']:.3f}", f"{ppo['eval']['policy']['eos_rate']:.3f}"]
        )
    return table(header, rows)


def embedded_reward_model() -> str:
    """The reward model's accuracy against what the noise of the labels allows, for each seed."""
    report, rows = result("embedded.json"), []
    for seed in report["seeds"]:
        low, high = seed["reward_model"]["accuracy_interval"]
        accuracy, pairs = seed["reward_model"]["accuracy"], seed["reward_model"]["pairs"]
        ceiling = f"{report['reward_model_ceiling']:.3f}"
        rows.append([seed["seed"], f"{accuracy:.3f}", f"{low:.3f} to {high:.3f}", ceiling, pairs])
    return table(["seed", "accuracy", "95% interval", "ceiling", "pairs"], rows)


def embedded_parts() -> str:
    """What the reward model takes off for each thing that is wrong."""
    means = result("reward_model_parts.json")["means"]
    best = means.pop("perfect")
    rows = [
        [name, *(f"{mean[who] - best[who]:+.2f}" for who in ("labeler", "reward_model"))]
        for name, mean in means.items()
    ]
    return table(["instead of the perfect reply", "labeler", "reward model"], rows)


def embedded_times() -> str:
    """Time and memory of the stages."""
    report, rows = result("embedded.json"), []
    names = {"sft": "sft.py", "reward_model": "reward_model.py", "ppo": "ppo_rlhf.py"}
    for stage, name in names.items():
        runs = [seed[stage] for seed in report["seeds"]]
        seconds = ", ".join(f"{run['wall_seconds']:.0f}" for run in runs)
        rows.append(
            [f"`{name}`", seconds, ", ".join(f"{run['peak_memory_gb']:.2f}" for run in runs)]
        )
    machine = report["machine"]
    where = f"On {machine['threads']} threads of an {machine['processor']}, start-up included."
    seeds = ", ".join(str(seed["seed"]) for seed in report["seeds"])
    return table(["stage", f"seconds, seeds {seeds}", "peak memory, GB"], rows) + f"\n\n{where}"


def embedded_kl() -> str:
    """The run without a KL penalty beside the default one."""
    seed = result("embedded.json")["seeds"][0]
    default, free = seed["ppo"], seed["ppo_kl_coef_0"]
    rows = []
    for name, run, who in (
        ("SFT model", default, "reference"),
        ("`--kl-coef 0.1`, the default", default, "policy"),
        ("`--kl-coef 0`", free, "policy"),
    ):
        mean, right = run["eval"][who], run["labeler"][who]["both_right"]
        row = [name, f"{mean['score']:.2f}", f"{mean['judge']:.2f}", f"{right:.3f}"]
        rows.append([*row, f"{mean['kl']:.1f}", f"{mean['length']:.1f}"])
    header = [
        f"seed {seed['seed']}",
        "reward model's score",
        "labeler's score",
        "right product and remedy",
    ]
    return table([*header, "KL from the reference, nats", "length, tokens"], rows)


def embedded_precision() -> str:
    """bfloat16 products against float32, seed by seed."""
    rows = []
    for dtype, name in (("bfloat16", "embedded.json"), ("float32", "embedded_float32.json")):
        for seed in result(name)["seeds"]:
            ppo = seed["ppo"]
            row = [
                dtype,
                seed["seed"],
                f"{ppo['eval']['win_rate']:.3f}",
                f"{ppo['share_of_the_way']:.3f}",
            ]
            row += [
                f"{seed['reward_model']['accuracy']:.3f}",
                f"{abs(ppo['first_kl_per_token']):.1g}",
            ]
            seconds = sum(seed[stage]["wall_seconds"] for stage in ("sft", "reward_model", "ppo"))
            rows.append([*row, f"{ppo['largest_ratio_start_error']:.1g}", f"{seconds:.0f}"])
    header = [
        "products",
        "seed",
        "win rate",
        "share of the way",
        "reward model",
        "first update's KL per token",
    ]
    return table([*header, "ratio's largest error at the start", "seconds, three stages"], rows)


def reviews_results() -> str:
    """What the three stages reach on the film reviews."""
    report = result("reviews.json")
    reward_model, ppo = report["reward_model"], report["ppo"]["eval"]
    low, high = reward_model["accuracy_interval"]
    before, after = ppo["reference"], ppo["policy"]
    stages = ("sft", "reward_model", "ppo")
    minutes = ", ".join(f"{report[stage]['wall_seconds'] / 60:.0f}" for stage in stages)
    memory = ", ".join(f"{report[stage]['peak_memory_gb']:.1f}" for stage in stages)
    machine = f"{report['machine']['threads']} threads of an {report['machine']['processor']}"
    held_out = f"{ppo['prompts']} held-out prompts"
    rows = [
        [
            "reward model: accuracy",
            f"{reward_model['pairs']} held-out pairs",
            f"{reward_model['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f})",
        ],
        ["win rate of the policy over the SFT model, by VADER", held_out, f"{ppo['win_rate']:.3f}"],
        [
            "mean VADER score, SFT model and policy",
            "the same",
            f"{before['judge']:.2f} and {after['judge']:.2f}",
        ],
        ["KL from the reference", "the same", f"{after['kl']:.1f} nats a response"],
        [
            "responses that end by themselves, SFT model and policy",
            "the same",
            f"{before['eos_rate']:.3f} and {after['eos_rate']:.3f}",
        ],
        ["minutes of the three stages", machine, minutes],
        ["peak memory of the three stages, GB", machine, memory],
    ]
    return table(["what", "on", "measured"], rows)


def reviews_samples() -> str:
    """The first held-out prompts of the film reviews and both continuations."""
    rows = []
    for i, s in enumerate(samples("reviews_samples.jsonl"), 1):
        row = [i, s["prompt"], s["reference"], f"{s['reference_judge']:+.2f}"]
        rows.append([*row, s["policy"], f"{s['policy_judge']:+.2f}"])
    return table(["#", "prompt", "SFT model", "VADER", "PPO", "VADER"], rows)


def parity_trl() -> str:
    """Where both PPOs end from the same start."""
    rows = []
    for by in ("ppo_rlhf.py", "TRL 1.11.0"):
        runs = [run for run in result("parity_trl.json")["runs"] if run["by"] == by]
        for run in runs:
            ends = [f"{run['ends'][name]:.2f}" for name in ("score", "kl", "labeler")]
            rows.append([by, run["seed"], *ends])
    return table(["by", "seed", "score", "KL, nats", "labeler"], rows)


def throughput() -> str:
    """Seconds per update beside TRL's."""
    report, rows = result("throughput.json"), []
    for name, entry in report.items():
        if not name.startswith("W"):
            continue
        medians = entry["medians"]
        ours, theirs = medians["ppo_rlhf.py"], medians["benchmarks/trl_ppo.py"]
        row = [*name.split(), *(f"{ours[p]:.2f}" for p in ("rollout", "score", "train", "update"))]
        row += [
            f"{theirs['update']:.2f}",
            f"**{medians['speedup']:.1f}x**",
            f"{ours['tokens_per_second']:,.0f}",
        ]
        rows.append([*row, f"{ours['peak_memory_gb']:.2f}", f"{theirs['peak_memory_gb']:.2f}"])
    header = [
        "",
        "products",
        "rollout, s",
        "score, s",
        "train, s",
        "update, s",
        "TRL 1.11.0, s",
        "faster",
    ]
    machine = report["machine"]
    where = (
        f"On {machine['threads']} threads of an {machine['processor']}, torch {machine['torch']}."
    )
    return table([*header, "tokens/s", "peak GB", "TRL's peak GB"], rows) + f"\n\n{where}"


def rollouts() -> str:
    """The decoding loop beside model.generate."""
    rows = []
    for name, entry in result("throughput.json")["rollout"].items():
        rates = entry["tokens_per_second"]
        row = [*name.split(), f"{rates['generate']:,.0f}", f"{rates['model.generate']:,.0f}"]
        rows.append([*row, f"**{entry['ratio']:.2f}x**"])
    return table(["", "products", "tokens/s", "`model.generate`, tokens/s", "faster"], rows)


def machine_share() -> str:
    """The train step beside the machine's matrix product."""
    report, rows = result("throughput.json"), []
    for name in ("W1", "W3"):
        for dtype in ("float32", "bfloat16"):
            measured = report[f"{name} {dtype}"]
            rate, ceiling = measured["medians"]["ppo_rlhf.py"]["train_gflops"], measured["ceiling"]
            fastest = max(c for product, c in ceiling.items() if product.startswith(dtype))
            shares = [f"{rate / c:.0%} of {c:.0f}" for c in (ceiling["float32"], fastest)]
            rows.append([name, dtype, f"{rate:.0f}", *shares])
    torch_product = "of torch's float32 product"
    return table(
        [
            "",
            "products",
            "train step, GFLOP/s",
            torch_product,
            "of the fastest one in that precision",
        ],
        rows,
    )


def scaling() -> str:
    """How the cost of an update of W1 grows."""
    rows = []
    for flag, by_size in result("throughput.json")["scaling"].items():
        growth = by_size["growth"]
        sizes = [
            f"{size}: {seconds:.2f} s" for size, seconds in by_size.items() if size != "growth"
        ]
        rows.append([f"`--{flag}`", *sizes, f"{growth:.2f}x for 4x"])
    return table(["", "1x", "2x", "4x", "growth"], rows)


def startup() -> str:
    """Seconds of start-up."""
    times = result("throughput.json")["startup"]
    rows = [["`python ppo_rlhf.py --help`", f"{times['help']:.1f}"]]
    rows.append(
        [
            "the command to the end of the embedded task's first update",
            f"{times['first_update']:.1f}",
        ]
    )
    return table(["start-up", "seconds, median of 5"], rows)


def memory() -> str:
    """Which model fits which GPU, by the formula."""
    report, rows = result("memory.json"), []
    for name, by_advantage in report["largest"].items():
        row: list[object] = [name]
        for needs in by_advantage.values():
            fits = needs["fits_gb"]
            row += [f"{needs['needs_gb']:.1f}", f"{fits} GB" if fits else "none of these"]
        rows.append(row)
    return table(["model", "`gae` needs, GB", "fits", "`rloo` needs, GB", "fits"], rows)


def memory_runs() -> str:
    """The formula beside measured runs."""
    rows = []
    for name, run in result("memory.json")["runs"].items():
        predicted, took = run["predicted_gb"], run["measured_gb"]
        rows.append([name, f"{predicted:.2f}", f"{took:.2f}", f"{predicted / took - 1:+.0%}"])
    return table(["run", "formula, GB", "measured, GB", "off by"], rows)


def soak() -> str:
    """What many updates leave behind."""
    report = result("soak.json")
    early, late = report["early"], report["late"]
    rows = [
        [
            "resident memory, MB",
            *(f"{x['memory_mb']:.0f}" for x in (early, late)),
            f"{report['memory_ratio']:.3f}x",
        ]
    ]
    rows += [
        [f"open {name}" if name == "files" else name, early[name], late[name], ""]
        for name in ("files", "threads")
    ]
    return table(["", f"update {report['settled']}", f"update {report['updates']}", ""], rows)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        embedded_samples, embedded_seeds, embedded_reward_model, embedded_parts, embedded_times, embedded_kl,
        embedded_precision,
        reviews_results, reviews_samples, parity_trl, throughput, rollouts, machine_share, scaling, startup, memory,
        memory_runs,
        soak,
    )
}  # fmt: skip


def fill(page: str) -> str:
    """The page with every table as the result files have it now."""

    def filled(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", filled, page, flags=re.S)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
