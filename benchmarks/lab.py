"""What the lab measures beyond single experiments, its statistics and its figures.

    python experiments/run.py                    # first: the baseline and all experiments
    python benchmarks/lab.py                     # all parts that follow
    python benchmarks/lab.py --parts effects     # only the statistics of what is there

Parts, each into its entry of benchmarks/results/lab.json:

- full: eight experiments in the stages' own number of episodes; is their order the short setting's?
- overoptimization: --kl-coef, for reward models of 500, 2,000 and all pairs, and an ensemble
- best_of_n: the best of n replies of the SFT model by the reward model, n up to 64
- methods: batch_mean, rloo and grpo with the episodes that the value function's time would pay for
- effects: each experiment's difference to the baseline, with an interval over seeds; the figures
"""

import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from measure import ROOT, interval, load_module

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "experiments"))
import run as lab

import dataset
import encoding
import generate
import utils

gold = load_module("data/support/gold.py")

PARTS = ("full", "overoptimization", "methods", "best_of_n", "effects")
# chosen before the full setting had run, from the largest loss to nearly none
EIGHT = ("dropout", "reward_clip", "epochs_1", "kl_coef_0", "kl_coef_04", "ptx", "critic_warmup")
EIGHT += ("lambda_09",)
KL_COEFS = ("0", "0.02", "0.05", "0.1", "0.2", "0.4")
PAIRS = ("500", "2000", "all")
METHODS = ("batch_mean", "rloo", "grpo")
# experiments that change another one, beside which they are compared too
BESIDE = {"gspo": "grpo", "dr_grpo": "grpo", "dynamic_sampling": "grpo"}
BESIDE |= {"reinforce_pp": "batch_mean", "length_adaptive_lambda": "decoupled_lambda"}


@dataclasses.dataclass
class Args:
    parts: tuple[Literal[PARTS], ...] = PARTS
    """Which parts to run."""
    seeds: int = 3
    """Seeds of what is run here."""
    runs: Path = ROOT / "runs/experiments"
    """Where the runs of experiments are."""
    results: Path = ROOT / "experiments/results"
    """Where their results are."""
    out: Path = ROOT / "benchmarks/results"
    """Folder of lab.json and the figures."""


def experiment(name: str, ppo_flags: str, reward_model_flags: str | None = None) -> lab.Experiment:
    """One that is flags alone."""
    stages = (("ppo_rlhf", ppo_flags),)
    if reward_model_flags is not None:
        stages = (("reward_model", reward_model_flags), *stages)
    return lab.Experiment(name, name, {}, stages, "")


def ppo_flags_of(name: str) -> str:
    """The flags that an experiment runs PPO with."""
    return dict(lab.read(name).stages)["ppo_rlhf"]


def run_all(experiments: list[lab.Experiment], args: Args, setting: str = "short") -> None:
    flags = {"seeds": args.seeds, "setting": setting, "runs": args.runs, "out": args.results}
    lab.run_all(experiments, lab.Args(**flags))


def results_of(one: lab.Experiment, args: Args, setting: str = "short") -> dict[int, dict]:
    """An experiment's results by seed, of what it is now."""
    files = (args.results / setting).glob(f"{one.name}-seed*.json")
    found = [json.loads(path.read_text()) for path in files]
    return {r["seed"]: r for r in found if r["recipe"] == one.recipe and r["seed"] <= args.seeds}


def judged(result: dict) -> float:
    """The labeler's mean of the policy's replies; of a run that ended in NaN -inf."""
    return -math.inf if result["diverged"] else result["ppo_rlhf"]["eval"]["policy"]["judge"]


def kl_of(result: dict) -> float:
    """The policy's KL at the end, in nats."""
    return result["ppo_rlhf"]["eval"]["policy"]["kl"]


def early(result: dict) -> float:
    """The labeler's mean at the first evaluation, after a quarter of the updates."""
    return result["trace"][0]["eval/judge"]


def finished(results: dict[int, dict]) -> dict[int, dict]:
    """Results by seed, without those that ended in NaN."""
    return {seed: result for seed, result in results.items() if not result["diverged"]}


def means_of(results: Collection[dict]) -> dict[str, float]:
    """Means of what the tables show of finished runs."""
    runs = [result["ppo_rlhf"] for result in results]
    means = {
        key: statistics.mean(run["eval"]["policy"][key] for run in runs)
        for key in ("judge", "kl", "score", "length")
    }
    means["win_rate"] = statistics.mean(run["eval"]["win_rate"] for run in runs)
    means["early"] = statistics.mean(map(early, results))
    # nats a response, in the rollout of the update before the first evaluation
    means["entropy"] = statistics.mean(r["trace"][0]["objective/entropy"] for r in results)
    for key in ("cpu_seconds", "peak_memory_gb"):
        means[key] = statistics.mean(run[key] for run in runs)
    return means


# ---- the short setting beside the full one


def full(args: Args) -> dict[str, Any]:
    """Labeler's means of both settings, and how the ranks correlate.

    Also of the full setting's own seeds, two by two, and of its evaluations with its end.
    """
    run_all([lab.read(name) for name in EIGHT], args, "full")
    results = {
        setting: [results_of(lab.read(name), args, setting) for name in EIGHT]
        for setting in ("short", "full")
    }

    def means(setting: str, score: Callable[[dict], float] = judged) -> list[float]:
        return [statistics.mean(map(score, runs.values())) for runs in results[setting]]

    def after(i: int) -> list[float]:
        return means("full", lambda result: result["trace"][i]["eval/judge"])

    short, end = means("short"), means("full")
    seeds = range(1, args.seeds + 1)
    ends = [[judged(runs[seed]) for runs in results["full"]] for seed in seeds]
    trace = results["full"][0][1]["trace"]
    return {
        "rows": [
            {"name": name, "short": x, "full": y}
            for name, x, y in zip(EIGHT, short, end, strict=True)
        ],
        "rank_correlation": rank_correlation(short, end),
        "between_seeds": [rank_correlation(*two) for two in itertools.combinations(ends, 2)],
        "by_updates": {e["update"]: rank_correlation(after(i), end) for i, e in enumerate(trace)},
        "seeds": args.seeds,
    }


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's, of values that are all different."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


# ---- over-optimization (Gao et al. 2022)


def overoptimization_runs() -> dict[tuple[str, str], lab.Experiment]:
    """By pairs of the reward model and --kl-coef; `ensemble` is the least of three of all pairs."""
    runs = {("all", c): lab.read(f"kl_coef_{c.replace('.', '')}") for c in KL_COEFS if c != "0.1"}
    runs["all", "0.1"] = lab.BASELINE
    for pairs, c in itertools.product(PAIRS[:-1], KL_COEFS):
        name = f"pairs_{pairs}_kl_coef_{c.replace('.', '')}"
        runs[pairs, c] = experiment(name, f"--kl-coef {c}", f"--train-split train[:{pairs}]")
    for c in KL_COEFS:
        name = f"ensemble_min_kl_coef_{c.replace('.', '')}"
        runs["ensemble", c] = experiment(name, f"{ppo_flags_of('ensemble_min')} --kl-coef {c}")
    runs["ensemble", "0.1"] = lab.read("ensemble_min")
    return runs


def overoptimization(args: Args) -> dict[str, Any]:
    """KL, reward model's and labeler's score of every evaluation, and the fits of both.

    A score above the reference's is d (alpha - beta log d), d the root of the KL: Gao et al. 2022,
    section 3.1, for reinforcement learning.
    """
    runs = overoptimization_runs()
    run_all([*runs.values()], args)
    points = []
    for (pairs, c), one in runs.items():
        for seed, result in results_of(one, args).items():
            if result["diverged"]:
                continue
            evaluation = result["ppo_rlhf"]["eval"]
            start, end = evaluation["reference"], evaluation["policy"]
            trace = [
                {k: row[f"eval/{k}"] for k in ("kl", "score", "judge")} for row in result["trace"]
            ]
            for last, row in enumerate([*trace, end], 1):
                point = {"pairs": pairs, "kl_coef": float(c), "seed": seed, "kl": row["kl"]}
                point |= {"score": row["score"] - start["score"], "end": last > len(trace)}
                points.append(point | {"judge": row["judge"] - start["judge"]})
    fits = {}
    for pairs in (*PAIRS, "ensemble"):
        some = [p for p in points if p["pairs"] == pairs and p["kl"] > 0.1]
        d = np.sqrt([p["kl"] for p in some])
        for of in ("score", "judge"):
            columns = np.stack([d, -d * np.log(d)], 1)
            fits[f"{pairs} {of}"] = fit(columns, [p[of] for p in some])
    # where nothing else holds the policy
    three, one = (finished(results_of(runs[of, "0"], args)) for of in ("ensemble", "all"))
    more = {"seeds": len(three)} | paired("difference", three, one, judged)
    return {"points": points, "fits": fits, "least_of_three": more}


def fit(columns: np.ndarray, y: list[float]) -> dict[str, float]:
    """alpha and beta by least squares, and the share of the variance that they explain."""
    (alpha, beta), *_ = np.linalg.lstsq(columns, np.array(y), rcond=None)
    left = np.array(y) - columns @ [alpha, beta]
    return {
        "alpha": alpha,
        "beta": beta,
        "explained": float(1 - np.square(left).mean() / np.var(y)),
    }


@torch.no_grad()
def best_of_n(args: Args, most: int = 64, prompts: int = 200) -> dict[str, Any]:
    """Mean scores of the best of n by the reward model, over all subsets of `most` replies.

    Its KL to the SFT model is at most log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3); the
    form of the fits is d (alpha - beta d) (Gao et al. 2022).
    """
    torch.set_num_threads(2)
    device, points = torch.device("cpu"), []
    for seed in range(1, args.seeds + 1):
        models = args.runs.resolve() / f"models/seed{seed}"
        readers = {pairs: reward_model_of(pairs, seed, args) for pairs in PAIRS}
        tokenizer = encoding.load_tokenizer(str(models / "sft"))
        policy = utils.load_causal_lm(str(models / "sft"), device, tokenizer)
        rows = dataset.load_data("data/support/prompts", "validation", dataset.PROMPT_FORMATS)
        asked = encoding.encode_prompts(tokenizer, rows[:prompts], 400)
        asked = [prompt for prompt in asked for _ in range(most)]
        stops, texts, sequences = [tokenizer.eos_token_id], [], []
        for i in range(0, len(asked), 256):
            some = [prompt.ids for prompt in asked[i : i + 256]]
            ids, mask = encoding.pad(some, tokenizer.pad_token_id, "left", device)
            rng = utils.generator("cpu", seed, 5, i)
            uniform = generate.random_numbers(len(some), 64, rng)
            replies, real = generate.generate(
                policy, ids, mask, uniform, stops, pad_id=tokenizer.pad_token_id, temperature=0.5
            )
            replies = [r[: m.sum()].tolist() for r, m in zip(replies, real, strict=True)]
            texts += tokenizer.batch_decode(replies, skip_special_tokens=True)
            ends = [r if r[-1] in stops else [*r, *stops] for r in replies]
            sequences += [prompt + reply for prompt, reply in zip(some, ends, strict=True)]
        judge = torch.tensor(gold.score([p.text for p in asked], texts)).view(-1, most)
        for pairs, folder in readers.items():
            model = utils.load_classifier(str(folder), device, trained=True)
            scores = []
            for i in range(0, len(sequences), 512):
                ids, mask = encoding.pad(
                    sequences[i : i + 512], tokenizer.pad_token_id, "right", device
                )
                raw = utils.last_token_scores(model, ids, mask)
                scores.append(utils.normalize_scores(model, raw))
            score = torch.cat(scores).view(-1, most)
            start = np.array(best_of(1, score, judge))
            for n in (1, 2, 4, 8, 16, 32, 64):
                gain = best_of(n, score, judge) - start
                point = {"pairs": pairs, "seed": seed, "n": n, "kl": math.log(n) - (n - 1) / n}
                points.append(point | {"score": gain[0], "judge": gain[1]})
    fits = {}
    for pairs, of in itertools.product(PAIRS, ("score", "judge")):
        some = [p for p in points if p["pairs"] == pairs]
        d = np.sqrt([p["kl"] for p in some])
        fits[f"{pairs} {of}"] = fit(np.stack([d, -d * d], 1), [p[of] for p in some])
    return {"points": points, "fits": fits}


def reward_model_of(pairs: str, seed: int, args: Args) -> Path:
    """A reward model of so many pairs, trained if its run is not there any more."""
    models = args.runs.resolve() / "models"
    lab.train_models(seed, models)
    if pairs == "all":
        return models / f"seed{seed}/reward_model"
    own = args.runs.resolve() / f"short/pairs_{pairs}_kl_coef_0-seed{seed}"
    if not (own / "reward_model/summary.json").exists():
        one = overoptimization_runs()[pairs, "0"]
        lab.copy_with(one, own / "code")
        flags = lab.flags_of(one, "reward_model", seed, own, models)
        lab.run_stage(own / "code", "reward_model", flags, own / "reward_model.log")
    return own / "reward_model"


def best_of(n: int, score: torch.Tensor, judge: torch.Tensor) -> tuple[float, float]:
    """Means of score and judge, both [prompts, replies], of the best by score of n replies.

    Over all ways to draw n of a prompt's replies without replacement.
    """
    score, order = score.double().sort(1)
    count = score.shape[1]
    # how often the one of rank i is the best of those drawn
    chance = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    weights = torch.tensor(chance, dtype=torch.float64)
    ranked = (score, judge.double().gather(1, order))
    return tuple(float((x @ weights).mean()) for x in ranked)


# ---- which method when


def methods(args: Args) -> list[dict[str, Any]]:
    """Each at the baseline's episodes and, for those without a value function, at its CPU time."""

    def means(one: lab.Experiment) -> dict[str, float]:
        return means_of(finished(results_of(one, args)).values())

    names = {"gae": lab.BASELINE} | {name: lab.read(name) for name in METHODS}
    run_all([*names.values()], args)
    rows = [("gae", lab.BASELINE, 2560)]
    seconds = {name: means(one)["cpu_seconds"] for name, one in names.items()}
    for name in METHODS:
        more = round(2560 * seconds["gae"] / seconds[name] / 640) * 640
        longer = experiment(f"{name}_same_time", f"{ppo_flags_of(name)} --total-episodes {more}")
        rows += [(name, names[name], 2560), (name, longer, more)]
    run_all([one for _, one, _ in rows], args)
    return [
        {"method": method, "episodes": episodes, "runs": len(finished(results_of(one, args)))}
        | means(one)
        for method, one, episodes in rows
    ]


# ---- effects


def effects(args: Args) -> list[dict[str, Any]]:
    """Of each experiment its means over seeds and its paired difference to the baseline."""
    baseline, rows = results_of(lab.BASELINE, args), []
    for name in lab.names():
        one = lab.read(name)
        runs = {s: r for s, r in results_of(one, args).items() if s in baseline}
        kept = finished(runs)
        if len(kept) < 2:
            what = f"{len(kept)} runs of what it is now ended without NaN"
            print(f"{name}: {what}, too few for the tables")
            continue
        row = {"name": name, "title": one.title, "seeds": len(runs)}
        row |= {key.lower(): text for key, text in one.facts.items()} | means_of(kept.values())
        evals = [run["ppo_rlhf"]["eval"] for run in kept.values()]
        better = sum(e["policy"]["judge"] > e["reference"]["judge"] for e in evals)
        row["diverged"] = 1 - better / len(runs)
        beside = [baseline[seed] for seed in kept]  # of the same seeds
        row |= {f"baseline_{key}": x for key, x in means_of(beside).items()}
        if "reward_model" in dict(one.stages):
            accuracies = [run["reward_model"]["accuracy"] for run in kept.values()]
            row["accuracy"] = statistics.mean(accuracies)
        row |= paired("kl_difference", kept, baseline, kl_of)
        row |= paired("difference", kept, baseline, judged)
        row |= paired("early_difference", kept, baseline, early)
        if name in BESIDE:
            others = finished(results_of(lab.read(BESIDE[name]), args))
            row |= {"beside": BESIDE[name]} | paired("beside_difference", kept, others, judged)
        rows.append(row)
    return rows


def paired(name: str, runs: dict[int, dict], others: dict[int, dict], of: Callable) -> dict:
    """Mean difference of what `of` reads in runs of the same seeds, with its interval."""
    pairs = [of(run) - of(others[seed]) for seed, run in runs.items() if seed in others]
    return {name: statistics.mean(pairs), f"{name}_interval": interval(pairs)}


# ---- figures


def plot(report: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot_effects(report["effects"], plt, out / "lab_effects.png")
    if "overoptimization" in report:
        plot_overoptimization(report, plt, out)


def plot_effects(rows: list[dict], plt: Any, path: Path) -> None:
    """Differences to the baseline, sorted, at the end and after a quarter of the updates."""
    rows = [row for row in rows if row["name"] != "baseline"]
    rows.sort(key=lambda row: row["difference"])
    size = (9.5, 0.19 * len(rows) + 1.4)
    figure, axes = plt.subplots(1, 2, figsize=size, sharex=True, sharey=True)
    places = range(len(rows))
    for axis, key, title in (
        (axes[0], "difference", "at the end: most changes do little"),
        (axes[1], "early_difference", "after 640 of the 2,560 episodes"),
    ):
        middle = [row[key] for row in rows]
        low, high = zip(*(row[f"{key}_interval"] for row in rows), strict=True)
        axis.hlines(places, low, high, color="0.6", linewidth=2)
        for kind, mark in (("Ablation", "o"), ("Variant", "s")):
            some = [i for i in places if rows[i]["kind"] == kind]
            face = "black" if kind == "Ablation" else "white"
            axis.plot(
                [middle[i] for i in some],
                some,
                mark,
                color="black",
                mfc=face,
                ms=4.5,
                label=kind.lower(),
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=0.5)
        ticks = (-10, -5, -2, -1, -0.5, 0, 0.5, 1)
        axis.set_xticks(ticks, [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
        axis.set_title(title, fontsize=9)
        label = "difference to the baseline, labeler's points\n(logarithmic beyond 0.5)"
        axis.set_xlabel(label, fontsize=8)
        axis.grid(color="0.92")
        axis.tick_params(labelsize=7.5)
    axes[0].set_yticks(places, [row["name"] for row in rows])
    axes[0].legend(fontsize=8, loc="lower right")
    axes[0].set_ylim(-1, len(rows))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_overoptimization(report: dict[str, Any], plt: Any, out: Path) -> None:
    """The README's figure, and one of all reward models."""
    both, bon = report["overoptimization"], report.get("best_of_n")
    most = max(p["kl"] for p in both["points"])
    titles = {
        "500": "500 pairs",
        "2000": "2,000 pairs",
        "all": "all pairs",
        "ensemble": "least of three",
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), sharex=True, sharey=True)
    for axis, (pairs, title) in zip(axes, titles.items(), strict=True):
        draw(axis, both, pairs, bon if pairs in PAIRS else None, most)
        axis.set_title(
            f"reward model of {title}" if pairs in PAIRS else f"{title} reward models", fontsize=9
        )
    axes[0].set_ylabel("gain over the SFT model: labeler's points,\nreward model's own scale")
    axes[0].legend(fontsize=7)
    figure.suptitle(
        "Beyond some ten nats the labeler's score falls, whichever the reward model", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(out / "lab_overoptimization.png", dpi=110)
    figure, axis = plt.subplots(figsize=(5.6, 3.8))
    draw(axis, both, "all", None, max(p["kl"] for p in both["points"] if p["pairs"] == "all"))
    axis.set_title(
        "Far from the SFT model the labeler's score falls,\nthe reward model's does not",
        fontsize=10,
    )
    axis.set_ylabel("gain over the SFT model: labeler's points,\nreward model's own scale")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "lab_proxy.png", dpi=110)


def draw(axis: Any, both: dict, pairs: str, bon: dict | None, most: float) -> None:
    """Points and fits of reward model and labeler against a KL up to `most`, on a root's axis."""
    points = [p for p in both["points"] if p["pairs"] == pairs]
    for of, name, mark, line in (
        ("judge", "labeler", "o", "-"),
        ("score", "reward model", "x", "--"),
    ):
        gray = "black" if of == "judge" else "0.45"
        axis.plot(
            [math.sqrt(p["kl"]) for p in points],
            [p[of] for p in points],
            mark,
            color=gray,
            ms=3.5,
            alpha=0.6,
            label=name,
        )
        d = np.linspace(0.05, math.sqrt(max(p["kl"] for p in points)), 200)
        found = both["fits"][f"{pairs} {of}"]
        axis.plot(
            d, d * (found["alpha"] - found["beta"] * np.log(d)), line, color=gray, linewidth=1.3
        )
        if bon:
            some = [p for p in bon["points"] if p["pairs"] == pairs]
            kls = sorted({p["kl"] for p in some})
            axis.plot(
                np.sqrt(kls),
                [statistics.mean(p[of] for p in some if p["kl"] == kl) for kl in kls],
                "^" + line,
                color=gray,
                ms=4,
                linewidth=0.8,
                mfc="white",
                label=f"best of n, {name}",
            )
    ticks = [kl for kl in (0, 1, 4, 9, 16, 25, 49, 81, 121) if kl <= 1.1 * most]
    axis.set_xticks([math.sqrt(kl) for kl in ticks], [str(kl) for kl in ticks])
    axis.set_xlabel("KL to the SFT model, nats (square-root axis)", fontsize=8.5)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.grid(color="0.92")


def main(args: Args) -> None:
    path = args.out / "lab.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    functions = {f.__name__: f for f in (full, overoptimization, best_of_n, methods, effects)}
    for part in PARTS:
        if part in args.parts:
            report[part] = functions[part](args)
            # runs of several commits
            report["machine"] = results_of(lab.BASELINE, args)[1]["machine"] | {"commit": ""}
            path.write_text(json.dumps(report, indent=1) + "\n")
    if "effects" in report:
        plot(report, args.out)


if __name__ == "__main__":
    main(tyro.cli(Args))
