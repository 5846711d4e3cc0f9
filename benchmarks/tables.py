"""Fills the documentation's measured numbers in from the result files of the benchmarks.

A number, sentence or table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of
the functions below, which gives its text.

    python benchmarks/tables.py
"""

import functools
import json
import re
import statistics
from collections.abc import Callable

from measure import ROOT, interval

RESULTS = ROOT / "benchmarks/results"
PAGES = ("README.md", "docs/results.md", "docs/scaling.md", "docs/lab.md")
PAGES += ("examples/reviews/README.md",)


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def samples(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def table(header: list[str], rows: list[list[object]]) -> str:
    cells = [[re.sub(r"\s+", " ", str(x)).replace("|", "\\|").strip() for x in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(report: dict, dtype: bool = False) -> str:
    """The machine that a result is from, and by choice the precision it ran in."""
    machine = report["machine"]
    processor = re.sub(r"\(\w+\)| Processor", "", machine["processor"])
    if "bfloat16_instructions" in machine:
        has = machine["bfloat16_instructions"]  # the widest first
        processor += f" with {has[0]}" if has else " without bfloat16 instructions"
    words = [processor]
    words += [f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)]
    words += [f"torch {machine['torch']}"] if "torch" in machine else []
    words += [report["dtype"]] if dtype and "dtype" in report else []
    words += [f"commit {machine['commit']}"] if machine.get("commit") else []
    return ", ".join(words)


def measured_on() -> str:
    """Which results of the page are from which machine and commit."""
    names = "embedded embedded_float32 reward_model_parts reward_model_losses throughput memory"
    names += " soak parity_trl reviews avx2/embedded"
    names += " amx/embedded amx/embedded_float32 amx/throughput"
    files: dict[str, list[str]] = {}
    for name in names.split():
        files.setdefault(where(result(f"{name}.json")), []).append(f"`{name}.json`")
    return "\n".join(f"- {machine}: {', '.join(some)}" for machine, some in files.items())


def span(numbers: list[float], form: str) -> str:
    """Least and greatest of some numbers, `94% to 96%`; one where they read alike."""
    low, high = format(min(numbers), form), format(max(numbers), form)
    return low if low == high else f"{low} to {high}"


# ---- the embedded task

EMBEDDED = ("embedded", "embedded_float32", "amx/embedded", "amx/embedded_float32", "avx2/embedded")


def wall_seconds(seed: dict) -> float:
    """Of the three stages, start-up included."""
    return sum(seed[stage]["wall_seconds"] for stage in ("sft", "reward_model", "ppo"))


def embedded_line() -> str:
    """The result in a sentence or two."""
    reports = [result(f"{name}.json") for name in EMBEDDED]
    ppo = [seed["ppo"] for of in reports for seed in of["seeds"]]
    wins = span([run["eval"]["win_rate"] for run in ppo], ".0%")
    before, after = (
        statistics.mean(run["labeler"][who]["score"] for run in ppo)
        for who in ("reference", "policy")
    )
    times: dict[str, list[str]] = {}
    for of in reports:
        minutes = span([wall_seconds(seed) / 60 for seed in of["seeds"]], ".1f")
        on = where(of).partition(",")[0]
        times.setdefault(on, []).append(f"{of['dtype']} {minutes}")
    minutes = "; ".join(f"{on}: {', '.join(each)}" for on, each in times.items())
    free = [of["seeds"][0] for of in reports if "ppo_kl_coef_0" in of["seeds"][0]]
    hacked, kept = (
        {name: [run[key]["eval"]["policy"][name] for run in free] for name in ("score", "judge")}
        for key in ("ppo_kl_coef_0", "ppo")
    )
    return (
        f"On {ppo[0]['eval']['prompts']} held-out prompts the labeler prefers the policy's reply to"
        f" the SFT model's in **{wins}** (3 seeds, 2\nprecisions, 3 processors); its mean"
        f" score rises from {before:.1f} to {after:.1f} of {ppo[0]['best']:.0f}. Minutes on 2"
        f" threads:\n{minutes}.\n\n"
        f"With `--kl-coef 0` the policy hacks the reward model: it names the product again and"
        f" again. The reward\nmodel's score rises to {span(hacked['score'], '.1f')}, from"
        f" {span(kept['score'], '.1f')} with the KL penalty; the labeler's falls to"
        f" {span(hacked['judge'], '.1f')}."
    )


def embedded_samples(count: int | None = None) -> str:
    """The first held-out prompts of the embedded task and both replies."""
    rows = []
    for s in samples("embedded_samples.jsonl")[:count]:
        customer = s["prompt"].removeprefix("Customer: ").removesuffix("\nAgent:")
        row = [customer, s["reference"], f"{s['reference_judge']:.1f}"]
        rows.append([*row, s["policy"], f"{s['policy_judge']:.1f}"])
    return table(["customer", "before: SFT model", "labeler", "after: PPO", "labeler"], rows)


def embedded_two_samples() -> str:
    """The first two of them."""
    return embedded_samples(2)


def embedded_openings() -> str:
    """How much the policy's replies are alike."""
    seed = result("embedded.json")["seeds"][0]
    openings = seed["ppo"]["openings"]
    common = " and ".join(f'"{words}" ({count})' for words, count in openings["policy"])
    return (
        f"PPO costs variety: with seed {seed['seed']} the commonest beginnings of the 200 replies"
        f" are {common}; no three words begin more than {openings['reference'][0][1]} replies of"
        f" the SFT model."
    )


def embedded_hacked() -> str:
    """A reply that has hacked the reward model."""
    run = result("embedded.json")["seeds"][0]["ppo_kl_coef_0"]
    return f"The first reply without the penalty:\n\n> {run['first_reply'].strip()}"


def embedded_seeds() -> str:
    """What PPO makes of the SFT model, for each seed."""
    report, rows = result("embedded.json"), []
    for seed in report["seeds"]:
        ppo = seed["ppo"]
        before, after = ppo["labeler"]["reference"], ppo["labeler"]["policy"]
        row = [seed["seed"], f"{ppo['eval']['win_rate']:.3f}", f"{before['score']:.2f}"]
        row += [f"{after['score']:.2f}", f"{ppo['best']:.0f}", f"{ppo['share_of_the_way']:.3f}"]
        row += [f"{before['both_right']:.3f}", f"{after['both_right']:.3f}"]
        rows.append([*row, f"{ppo['eval']['policy']['eos_rate']:.3f}"])
    header = ["seed", "win rate", "labeler, SFT model", "labeler, PPO", "best", "share of the way"]
    header += ["right product and remedy, SFT model", "the same, PPO", "ends in EOS"]
    return table(header, rows) + f"\n\n{where(report, dtype=True)}."


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
    """What the reward models take off for each thing that is wrong."""
    means = list(result("reward_model_parts.json")["means"].values())

    def lost(kinds: dict, name: str, who: str) -> str:
        return f"{kinds[name][who] - kinds['perfect'][who]:+.2f}"

    rows = [
        [
            name,
            lost(means[0], name, "labeler"),
            *(lost(each, name, "reward_model") for each in means),
        ]
        for name in means[0]
        if name != "perfect"
    ]
    seeds = [f"reward model, seed {i + 1}" for i in range(len(means))]
    return table(["instead of the perfect reply", "labeler", *seeds], rows)


def embedded_losses() -> str:
    """The reward model of seed 1 without one or both of the two losses that help it to read."""
    report = result("reward_model_losses.json")
    rows = [
        [
            name,
            f"`{x['flags']}`" if x["flags"] else "",
            f"{x['accuracy']:.3f}",
            *(
                f"{x['lost'][kind]:+.2f}"
                for kind in ("a wrong remedy", "no remedy", "another product")
            ),
        ]
        for name, x in report["variants"].items()
    ]
    heads = ["losses", "flags", "accuracy", "a wrong remedy", "no remedy", "another product"]
    return table(heads, rows) + f"\n\n{where(report, dtype=True)}."


def embedded_few_pairs() -> str:
    """What the language-model loss gives where pairs are few."""
    rows = []
    for row in result("reward_model_losses.json")["few_pairs"]:
        accuracies = [", ".join(f"{x:.3f}" for x in row[key]) for key in ("with", "without")]
        rows.append([f"{row['pairs']:,}", *accuracies])
    return table(["pairs", "with the language-model loss", "without"], rows)


def embedded_times() -> str:
    """Time and memory of the stages."""
    report, rows = result("embedded.json"), []
    for stage, name in (("sft", "sft"), ("reward_model", "reward_model"), ("ppo", "ppo_rlhf")):
        runs = [seed[stage] for seed in report["seeds"]]
        seconds = ", ".join(f"{run['wall_seconds']:.0f}" for run in runs)
        memory = ", ".join(f"{run['peak_memory_gb']:.2f}" for run in runs)
        rows.append([f"`{name}.py`", seconds, memory])
    seeds = ", ".join(str(seed["seed"]) for seed in report["seeds"])
    text = f"{where(report, dtype=True)}; start-up included."
    return table(["stage", f"seconds, seeds {seeds}", "peak memory, GB"], rows) + f"\n\n{text}"


def embedded_kl() -> str:
    """The run without a KL penalty beside the default one."""
    rows = []
    for report in map(result, ("embedded.json", "amx/embedded.json", "avx2/embedded.json")):
        processor = where(report).partition(",")[0]
        default, free = (report["seeds"][0][key] for key in ("ppo", "ppo_kl_coef_0"))
        for who, run, of in (
            ("SFT model", default, "reference"),
            ("`--kl-coef 0.1`, the default", default, "policy"),
            ("`--kl-coef 0`", free, "policy"),
        ):
            mean, right = run["eval"][of], run["labeler"][of]["both_right"]
            row = [who, processor, f"{mean['score']:.2f}", f"{mean['judge']:.2f}", f"{right:.3f}"]
            rows.append([*row, f"{mean['kl']:.1f}", f"{mean['length']:.1f}"])
    header = ["seed 1", "processor", "reward model's score", "labeler's score"]
    header += ["right product and remedy", "KL from the reference, nats", "length, tokens"]
    return table(header, rows)


def embedded_precision() -> str:
    """The precision that `--dtype auto` picks and the others, seed by seed."""
    rows = []
    for name in EMBEDDED:
        report = result(f"{name}.json")
        for seed in report["seeds"]:
            ppo = seed["ppo"]
            instructions = " ".join(report["machine"].get("bfloat16_instructions", [])) or "none"
            row = [report["dtype"], instructions, seed["seed"], f"{ppo['eval']['win_rate']:.3f}"]
            row += [f"{ppo['share_of_the_way']:.3f}", f"{seed['reward_model']['accuracy']:.3f}"]
            row += [f"{abs(ppo['first_kl_per_token']):.1g}"]
            row += [f"{ppo['largest_ratio_start_error']:.1g}", f"{wall_seconds(seed):.0f}"]
            rows.append(row)
    header = ["precision", "bfloat16 instructions", "seed", "win rate", "share of the way"]
    header += ["reward model", "first update's KL per token", "ratio's largest error at the start"]
    return table([*header, "seconds, three stages"], rows)


# ---- the film reviews


def reviews_results() -> str:
    """What the three stages reach on the film reviews."""
    report = result("reviews.json")
    reward_model, ppo = report["reward_model"], report["ppo"]["eval"]
    low, high = reward_model["accuracy_interval"]
    before, after = ppo["reference"], ppo["policy"]
    stages = ("sft", "reward_model", "ppo")
    minutes = ", ".join(f"{report[stage]['wall_seconds'] / 60:.0f}" for stage in stages)
    memory = ", ".join(f"{report[stage]['peak_memory_gb']:.1f}" for stage in stages)
    accuracy = f"{reward_model['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f})"
    judge = f"{before['judge']:.2f} and {after['judge']:.2f}"
    ended = f"{before['eos_rate']:.3f} and {after['eos_rate']:.3f}"
    prompts = f"{ppo['prompts']} held-out prompts"
    machine = where(report, dtype=True)
    rows = [
        ["reward model: accuracy", f"{reward_model['pairs']} held-out pairs", accuracy],
        ["win rate of the policy over the SFT model, by VADER", prompts, f"{ppo['win_rate']:.3f}"],
        ["mean VADER score, SFT model and policy", "the same", judge],
        ["KL from the reference", "the same", f"{after['kl']:.1f} nats a response"],
        ["responses that end by themselves, SFT model and policy", "the same", ended],
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


# ---- beside TRL, and the project by itself


def parity_trl() -> str:
    """Where both PPOs end from the same start, and where they are furthest apart on the way."""
    report, rows, curves, labeler = result("parity_trl.json"), [], {}, []
    names = ("ppo_rlhf.py", "TRL 1.11.0")
    for by in names:
        runs = [run for run in report["runs"] if run["by"] == by]
        for run in runs:
            points = {name: dict(run["curves"][name]) for name in ("score", "kl", "labeler")}
            # TRL is judged after the last update too
            points["labeler"].pop(max(points["score"]), None)
            ends = [statistics.mean([*each.values()][-5:]) for each in points.values()]
            rows.append([by, run["seed"], *(f"{end:.2f}" for end in ends)])
            labeler.append(ends[-1])
        for name in ("score", "labeler"):
            each = [dict(run["curves"][name]) for run in runs]
            curves[name, by] = {u: statistics.mean(one[u] for one in each) for u in each[0]}
    ours, theirs = (curves["score", by] for by in names)
    update = max(ours, key=lambda u: abs(ours[u] - theirs[u]))
    judged = [curves["labeler", by] for by in names]
    later = max(judged[0], key=lambda u: abs(judged[0][u] - judged[1][u]))
    half = len(labeler) // 2
    apart = [a - b for a, b in zip(labeler[:half], labeler[half:], strict=True)]
    low, high = interval(apart)
    text = (
        f"The labeler's end by `ppo_rlhf.py`, less TRL's of the same seed, is"
        f" {statistics.mean(apart):+.2f} (95% interval {low:+.2f} to {high:+.2f}). The mean scores"
        f" over the seeds are furthest apart at update {update}: {ours[update]:.2f} by"
        f" `ppo_rlhf.py`, {theirs[update]:.2f} by TRL; the labeler's at update {later}:"
        f" {judged[0][later]:.2f} and {judged[1][later]:.2f}. {where(report)}."
    )
    return table(["by", "seed", "score", "KL, nats", "labeler"], rows) + f"\n\n{text}"


def throughput(folder: str = "") -> str:
    """Seconds per update beside TRL's."""
    report, rows = result(f"{folder}throughput.json"), []
    for name, entry in report.items():
        if not name.startswith("W"):
            continue
        medians = entry["medians"]
        ours, theirs = medians["ppo_rlhf.py"], medians["benchmarks/trl_ppo.py"]
        row = [*name.split(), *(f"{ours[p]:.2f}" for p in ("rollout", "score", "train", "update"))]
        turns = medians["speedup_by_turn"]
        row += [f"{theirs['update']:.2f}", f"**{medians['speedup']:.1f}x**"]
        row[-1] += f" ({min(turns):.1f} to {max(turns):.1f})"
        row += [f"{ours['tokens_per_second']:,.0f}", f"{ours['peak_memory_gb']:.2f}"]
        rows.append([*row, f"{theirs['peak_memory_gb']:.2f}"])
    header = ["", "precision", "rollout, s", "score, s", "train, s", "update, s", "TRL 1.11.0, s"]
    header += ["faster", "tokens/s", "peak GB", "TRL's peak GB"]
    return table(header, rows) + f"\n\n{where(report)}."


def rollouts(folder: str = "") -> str:
    """The decoding loop beside model.generate."""
    rows = []
    for name, entry in result(f"{folder}throughput.json")["rollout"].items():
        rates = entry["tokens_per_second"]
        row = [*name.split(), f"{rates['generate']:,.0f}", f"{rates['model.generate']:,.0f}"]
        rows.append([*row, f"**{entry['ratio']:.2f}x**"])
    return table(["", "precision", "tokens/s", "`model.generate`, tokens/s", "faster"], rows)


def machine_share(folder: str = "") -> str:
    """The train step beside torch's matrix product."""
    rows = []
    for name, entry in result(f"{folder}throughput.json").items():
        if name.startswith("W") and "ceiling" in entry:
            rate, (part, dtype) = entry["medians"]["ppo_rlhf.py"]["train_gflops"], name.split()
            products = [entry["ceiling"][product] for product in ("float32", dtype)]
            shares = [f"{rate / product:.0%} of {product:.0f}" for product in products]
            rows.append([part, dtype, f"{rate:.0f}", *shares])
    header = ["", "precision", "train step, GFLOP/s", "of torch's float32 product"]
    return table([*header, "of torch's product in the run's precision"], rows)


def scaling() -> str:
    """How the cost of an update of W1 grows."""
    rows = []
    for flag, by_size in result("throughput.json")["scaling"].items():
        growth = f"{by_size['growth']:.2f}x for 4x"
        cells = [f"{size}: {by_size[size]:.2f} s" for size in by_size if size.isdigit()]
        rows.append([f"`--{flag}`", *cells, growth])
    return table(["", "1x", "2x", "4x", "growth"], rows)


def startup() -> str:
    """Seconds of start-up."""
    times, first = result("throughput.json")["startup"], "embedded task's first update"
    rows = [["`python ppo_rlhf.py --help`", f"{times['help']:.1f}"]]
    rows.append([f"the command to the end of the {first}", f"{times['first_update']:.1f}"])
    return table(["start-up", "seconds, median of 5"], rows)


def memory() -> str:
    """Which model fits which GPU, by the formula."""
    rows, head = [], ["model"]
    for how in ("`gae`", "`gae` with `--lora-rank 16`", "`rloo`"):
        head += [f"{how} needs, GB", "fits"]
    for name, by_column in result("memory.json")["largest"].items():
        row: list[object] = [name]
        for needs in by_column.values():
            gb, fits = f"{needs['needs_gb']:.1f}", needs["fits_gb_in_parts"]
            if fits != needs["fits_gb"]:
                gb += f", in parts {needs['needs_gb_in_parts']:.1f}"
            row += [gb, f"{fits} GB" if fits else "none of these"]
        rows.append(row)
    return table(head, rows)


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
    both = (report["early"], report["late"])
    memory_mb, ratio = [f"{x['memory_mb']:.0f}" for x in both], f"{report['memory_ratio']:.3f}x"
    rows: list[list[object]] = [["resident memory, MB", *memory_mb, ratio]]
    for name, key in (("open files", "files"), ("threads", "threads")):
        rows.append([name, *(f"{x[key]:.0f}" for x in both), ""])
    return table(["", f"update {report['settled']}", f"update {report['updates']}", ""], rows)


# ---- several GPUs


def scaling_measured() -> str:
    """Two processes beside one, on a CPU."""
    report = result("scaling.json").get("measure")
    if report is None:
        return "Not measured yet."
    ways, rows = report["ways"], []
    one, apart = (ways[name]["update"] for name in ("1 process", "2 apart, half the batch each"))
    for name, way in ways.items():
        row = [name, *(f"{way[p]:.2f}" for p in ("rollout", "score", "train", "update"))]
        both = name.startswith("2 processes")
        gain = [f"{one / way['update']:.2f}x", f"{1 - apart / way['update']:.0%}"]
        rows.append([*row, *(gain if both else ["", ""])])
    header = ["", "rollout, s", "score, s", "train, s", "update, s", "faster than 1 process"]
    where = f"{report['machine']['processor']}, one thread for each process, gloo."
    return table([*header, "communication"], rows) + f"\n\n{where}"


def scaling_inputs() -> str:
    """What the numbers on paper come from."""
    x = result("scaling.json")["paper"]["inputs"]
    return (
        f"Work: {x['batch']} responses of {x['response']} tokens to prompts of {x['prompt']},"
        f" {x['epochs']} epochs, 1 mini-batch, `--micro-batch-size {x['micro_batch']}`,"
        f" `--gradient-checkpointing`, a reward model of the policy's size.\n"
        f"GPU: {x['gpu_gb']:.0f} GB, of which {x['usable']:.0%} can be used; {x['tflops']} TFLOP/s"
        f" in bfloat16, of which {x['of_tflops']:.0%} are reached; memory at {x['hbm']} GB/s,"
        f" {x['of_hbm']:.0%} reached.\nLinks, each way: {x['nvlink']} GB/s in a machine of"
        f" {x['gpus_per_machine']} GPUs, {x['nic']} GB/s per GPU between machines;"
        f" {x['of_links']:.0%} reached."
    )


def scaling_paper() -> str:
    """Memory and seconds on GPUs by the formula."""
    rows = []
    for x in result("scaling.json")["paper"]["rows"]:
        how = "`--fsdp`" if x["fsdp"] else "plain"
        how += "" if x["advantage"] == "gae" else f", `--advantage {x['advantage']}`"
        alike = not x["fsdp"] and "update" not in x  # plain, too large: however many GPUs
        if alike and x["gpus"] > 8:
            continue
        row = [x["model"], "8, 32" if alike else x["gpus"], how, f"{x['gb']:.0f}"]
        parts = ("decode", "score", "train", "communication")
        if "update" in x:
            row += [*(f"{x[part]:.1f}" for part in (*parts, "sent", "update"))]
            row.append(max(parts, key=x.__getitem__))
        else:
            row += ["does not fit"] + [""] * 5 + ["memory"]
        rows.append(row)
    header = ["model", "GPUs", "", "GB per GPU", "decode, s", "score, s", "train, s"]
    header += ["waits for links, s", "links busy, s", "update, s", "limited by"]
    return table(header, rows)


def scaling_limits() -> str:
    """The largest models that --fsdp can train."""
    most = result("scaling.json")["paper"]["largest_billions"]
    words = [f"{x:.1f}B on {gpus}" for gpus, x in most.items()]
    return f"With 80 GB each the largest policy is about {', '.join(words)} GPUs."


def scaling_published() -> str:
    """DeepSpeed-Chat's published times beside the formula on the same GPUs."""
    rows = []
    for x in result("scaling.json")["paper"]["published"]:
        ours = f"{x['update']:.0f}" if "update" in x else f"does not fit: {x['gb']:.0f} GB per GPU"
        rows.append([x["gpus"], x["theirs"], f"{x['seconds']:.0f}", x["model"], ours])
    header = ["A100s of 80 GB", "DeepSpeed-Chat trained", "published, s", "here"]
    return table([*header, "on paper, not measured, s"], rows)


# ---- the lab


def seeds(count: int) -> str:
    return f"{count} seed" + "s" * (count != 1)


DIFFERENCES = ("difference", "early_difference")  # to the baseline, at the end and early


def lab_baseline() -> str:
    """What the baseline reaches in the short setting, and where it was measured."""
    report = result("lab.json")
    row = next(row for row in report["effects"] if row["name"] == "baseline")
    return (
        f"The baseline's policy gets {row['judge']:.2f} points of the labeler at the end and"
        f" {row['early']:.2f} after 640 episodes, a win rate\nof {row['win_rate']:.3f} and a KL of"
        f" {row['kl']:.1f} nats, in {row['cpu_seconds']:.0f} seconds of one processor core"
        f" ({seeds(row['seeds'])}; {where(report)}, bfloat16)."
    )


def difference(row: dict, key: str) -> str:
    """A difference in points, with its interval."""
    low, high = row[f"{key}_interval"]
    return f"{row[key]:+.2f} ({low:+.2f} to {high:+.2f})"


def holds_0(row: dict, key: str) -> bool:
    low, high = row[f"{key}_interval"]
    return low <= 0 <= high


def change(row: dict, key: str) -> str:
    """A difference in points; with its interval if that holds 0."""
    return difference(row, key) if holds_0(row, key) else f"{row[key]:+.2f}"


def lab_findings() -> str:
    """What stands out, in sentences."""
    rows = {row["name"]: row for row in result("lab.json")["effects"]}
    others = [row for row in rows.values() if row["name"] != "baseline"]
    end = {row["name"]: change(row, "difference") for row in others}
    early = {row["name"]: change(row, "early_difference") for row in others}

    def means(key: str, form: str) -> dict[str, str]:
        return {name: f"{row[key]:{form}}" for name, row in rows.items()}

    # and the baseline's of the same seeds
    kl, baseline_kl = means("kl", ".1f"), means("baseline_kl", ".1f")
    entropy, baseline_entropy = means("entropy", ".1f"), means("baseline_entropy", ".1f")
    seconds, baseline_seconds = means("cpu_seconds", ".0f"), means("baseline_cpu_seconds", ".0f")
    accuracy = {k: f"{row['accuracy']:.3f}" for k, row in rows.items() if "accuracy" in row}
    beside = {k: change(row, "beside_difference") for k, row in rows.items() if "beside" in row}
    alike = sum(abs(row["difference"]) < 0.1 for row in others)
    alike_early = sum(abs(row["early_difference"]) < 0.1 for row in others)
    sure = sum(not holds_0(row, "difference") for row in others)
    noise = {key: difference(rows["no_normalization"], key) for key in DIFFERENCES}
    found = [
        f"**Most changes do little**: {alike} of {len(others)} are within 0.1 points at the end,"
        f" where the baseline's {rows['baseline']['judge']:.2f} of 9 leave no room for more;"
        f" {alike_early} are after 640 episodes. {sure} of the {len(others)} intervals at the end"
        f" leave out 0, as about {0.05 * len(others):.0f} would by chance. `no_normalization`"
        f" changes nothing but rounding, since the value function starts from the same reward"
        f" model; it differs by {noise['difference']} at the end and by"
        f" {noise['early_difference']} after 640 episodes: such differences say nothing.",
        f"**A wrong value function costs much, none costs little.** Read one token late, after the"
        f" action that it should be a baseline for (B14), it changes the labeler's mean by"
        f" {end['value_one_late']}; as a head on the policy's body by {end['value_shares_body']};"
        f" started from the SFT model in place of the reward model by {early['value_from_sft']}"
        f" after 640 episodes and {end['value_from_sft']} at the end. Without one, `batch_mean`"
        f" differs by {end['batch_mean']}, `rloo` by {end['rloo']}, `grpo` by {end['grpo']}.",
        f"**The KL penalty is the dial to set.** In place of 0.1, a coefficient of 0.4 changes the"
        f" labeler's mean by {end['kl_coef_04']}, 0.2 by {end['kl_coef_02']}, 0.05 by"
        f" {end['kl_coef_005']}, 0.02 by {end['kl_coef_002']}, none by {end['kl_coef_0']}, at a KL"
        f" of {kl['kl_coef_0']} nats.",
        f"**Passes over a batch**: one in place of four changes the labeler's mean by"
        f" {end['epochs_1']}, two by {end['epochs_2']}, in {seconds['epochs_2']} s beside"
        f" {baseline_seconds['epochs_2']}; eight by {end['epochs_8']}, in {seconds['epochs_8']} s."
        f" After 640 episodes: {early['epochs_1']}, {early['epochs_2']} and {early['epochs_8']}.",
        f"**Without PPO's clip entropy falls faster at first**: after 512 episodes a reply"
        f" has {entropy['no_ratio_clip']} nats of it without the clip, {entropy['cispo']} with"
        f" CISPO; the baseline of the same seeds {baseline_entropy['no_ratio_clip']} and"
        f" {baseline_entropy['cispo']}. What that does to the reply differs from seed to seed: the"
        f" labeler's mean differs by {early['no_ratio_clip']} and {early['cispo']} after 640, by"
        f" {end['no_ratio_clip']} and {end['cispo']} at the end.",
        f"**Training the values alone first**: {early['critic_warmup']} after 640 episodes and"
        f" {end['critic_warmup']} at the end; on Monte-Carlo returns {early['value_pretraining']}"
        f" and {end['value_pretraining']}. The value function starts from the reward model and is"
        f" good at once; what is missing are the updates.",
        f"**The temperature left out of the log-probabilities**: {early['temperature_left_out']}"
        f" after 640 episodes, {end['temperature_left_out']} at the end, at a KL of"
        f" {kl['temperature_left_out']} nats beside {baseline_kl['temperature_left_out']}.",
        f"**k2 and k3 in the reward** pull less on a policy that is near the"
        f" reference ([details](details.md#kl-estimators)): their KL at the end differs from k1's"
        f" {baseline_kl['kl_k2']} nats by {change(rows['kl_k2'], 'kl_difference')} and"
        f" {change(rows['kl_k3'], 'kl_difference')}. In the loss, at the weight that the penalty"
        f" has in the reward, k2 ends at {kl['kl_in_loss_k2']} and k3 at {kl['kl_in_loss_k3']}; the"
        f" labeler's mean differs by {end['kl_in_loss_k2']} and {end['kl_in_loss_k3']}.",
        f"**Clipping the score changes what is sought**: to 2, it changes the labeler's mean by"
        f" {end['reward_clip']}, since a good reply scores more.",
        f"**Variants beside what they change**: `gspo` differs from `grpo` by {beside['gspo']},"
        f" `dr_grpo` by {beside['dr_grpo']}, `dynamic_sampling`, which samples twice as much, by"
        f" {beside['dynamic_sampling']};"
        f" `reinforce_pp` from `batch_mean` by {beside['reinforce_pp']};"
        f" `length_adaptive_lambda` from `decoupled_lambda` by"
        f" {beside['length_adaptive_lambda']}.",
        f"**The reward model's own losses**: without the language-model loss its accuracy is"
        f" {accuracy['reward_no_lm_loss']}, without the loss on beginnings"
        f" {accuracy['reward_no_prefix_loss']}, after two passes {accuracy['reward_epochs_2']},"
        f" with both losses and one pass {accuracy['no_normalization']}. The policies differ by"
        f" {end['reward_no_lm_loss']}, {end['reward_no_prefix_loss']} and {end['reward_epochs_2']}"
        f" at the end, by {early['reward_no_lm_loss']}, {early['reward_no_prefix_loss']} and"
        f" {early['reward_epochs_2']} after 640 episodes. What the losses give where pairs are"
        f" few is in [results.md](results.md#the-embedded-task).",
        f"**Bugs that others shipped are not all seen in the result**: beside the value read late,"
        f" a score past the EOS differs by {end['score_past_eos']}, padding in the whitening by"
        f" {end['padding_whitened']}, a mean of means by {end['mean_of_means']}, an EOS taken for"
        f" padding by {end['eos_taken_for_pad']}, dropout in the update by {end['dropout']}.",
    ]
    return "\n".join(f"- {line}" for line in found)


def lab_why_ppo() -> str:
    """Four sentences."""
    gae, *others = result("lab.json")["methods"]
    at_episodes = [row for row in others if row["episodes"] == gae["episodes"]]
    at_time = [row for row in others if row["episodes"] != gae["episodes"]]
    times = span([row["cpu_seconds"] / gae["cpu_seconds"] for row in at_episodes], ".0%")
    memory = span([row["peak_memory_gb"] for row in at_episodes], ".2f")
    points = span([row["judge"] for row in at_episodes], ".2f")
    kls = span([row["kl"] for row in at_episodes], ".1f")
    effects = {row["name"]: row for row in result("lab.json")["effects"]}
    differ = [
        f"`{row['method']}` {change(effects[row['method']], 'difference')}" for row in at_episodes
    ]
    more = span([row["judge"] for row in at_time], ".2f")
    return (
        f"On short replies with one score each, a value function buys nothing: {gae['judge']:.2f}"
        f" points with it, {points} without, at the same episodes and about the same KL"
        f" ({gae['kl']:.1f} nats, {kls}), of {gae['runs']} seeds; of"
        f" {effects['rloo']['seeds']}, as above, the differences from it are"
        f" {', '.join(differ[:-1])} and {differ[-1]}. Without it a run takes {times}"
        f" of the time; memory is libraries here ({memory} GB, {gae['peak_memory_gb']:.2f} with"
        f" it), but at scale half of what is trained is gone"
        f" ([memory](results.md#memory-which-model-fits-which-gpu)); with the episodes"
        f" that its time would pay for, the methods without it end at {more}."
        f" A value function that is wrong costs far more than a right one gains, and it is the part"
        f" with the most ways to be wrong. PPO's clipped steps are what all four share; its value"
        f" function is worth having where credit within a response matters: long responses, rewards"
        f" for single tokens, one response to a prompt."
    )


def lab_effects(kind: str) -> str:
    """Experiments of a kind, sorted by what they change at the end."""
    rows = [row for row in result("lab.json")["effects"] if row.get("kind") == kind]
    rows.sort(key=lambda row: row["difference"])
    lines = []
    for row in rows:
        line = [f"[{row['name']}](../experiments/{row['name']}.diff): {row['title']}"]
        line += [difference(row, key) for key in DIFFERENCES]
        line += [f"{row['judge']:.2f}", f"{row['win_rate']:.3f}", f"{row['kl']:.1f}"]
        line += [f"{row['diverged']:.0%}", f"{row['cpu_seconds']:.0f}", row["seeds"]]
        lines.append([*line, row.get("paper", "")])
    header = ["experiment", "labeler, difference at the end", "difference after 640 episodes"]
    header += ["labeler", "wins", "KL", "diverged", "CPU s of PPO", "seeds"]
    header.append("what its source found")
    return table(header, lines)


def lab_ablations() -> str:
    return lab_effects("Ablation")


def lab_variants() -> str:
    return lab_effects("Variant")


def lab_order() -> str:
    """Labeler's means of eight experiments in both settings."""
    report = result("lab.json")["full"]
    rows = sorted(report["rows"], key=lambda row: row["full"])
    lines = [[row["name"], f"{row['short']:.2f}", f"{row['full']:.2f}"] for row in rows]
    later = [f"{x:.2f} after {n}" for n, x in report["by_updates"].items() if int(n) > 20]
    return (
        table(["experiment", "labeler after 20 updates", "after 50"], lines)
        + f"\n\nThe rank correlation of the two settings is {report['rank_correlation']:.2f}"
        + f" ({seeds(report['seeds'])}). In the full setting ranks correlate with those at its"
        + f" end by {' and '.join(later)} updates, and those of two seeds by"
        + f" {span(report['between_seeds'], '.2f')}."
    )


def lab_overoptimization() -> str:
    """Labeler and reward model at the end of each --kl-coef, means over seeds."""
    points = [p for p in result("lab.json")["overoptimization"]["points"] if p["end"]]
    lines = []
    for pairs in ("500", "2000", "all", "ensemble"):
        for coefficient in sorted({p["kl_coef"] for p in points}):
            some = [p for p in points if (p["pairs"], p["kl_coef"]) == (pairs, coefficient)]
            if some:
                means = [statistics.mean(p[k] for p in some) for k in ("kl", "score", "judge")]
                of = "least of three" if pairs == "ensemble" else pairs
                numbers = [f"{means[0]:.1f}", f"{means[1]:+.2f}", f"{means[2]:+.2f}"]
                lines.append([of, f"{coefficient:g}", *numbers, len(some)])
    header = ["pairs", "`--kl-coef`", "KL, nats", "reward model", "labeler", "seeds"]
    return table(header, lines)


def lab_least_of_three() -> str:
    """What three reward models change where nothing else holds the policy."""
    more = result("lab.json")["overoptimization"]["least_of_three"]
    return (
        f"Without a KL penalty the labeler's mean under the least of three differs by"
        f" {difference(more, 'difference')} points from that under one reward model"
        f" ({seeds(more['seeds'])}); both end far below their peaks. The three learned from the"
        f" same pairs, and may share errors."
    )


def lab_fits() -> str:
    """Coefficients of Gao et al.'s forms, alpha in points per square root of a nat."""
    report, lines = result("lab.json"), []
    for part, form in (("overoptimization", "PPO"), ("best_of_n", "best of n")):
        for name, found in report[part]["fits"].items():
            pairs, of = name.split()
            of = {"score": "reward model", "judge": "labeler"}[of]
            pairs = "least of three" if pairs == "ensemble" else pairs
            numbers = [f"{found[k]:.2f}" for k in ("alpha", "beta", "explained")]
            lines.append([form, pairs, of, *numbers])
    return table(["", "pairs", "score of", "alpha", "beta", "variance explained"], lines)


def lab_best_of_n() -> str:
    """Points above the SFT model of the best of n."""
    points = result("lab.json")["best_of_n"]["points"]
    lines = []
    for n in sorted({p["n"] for p in points}):
        line = [n, f"{next(p['kl'] for p in points if p['n'] == n):.2f}"]
        for pairs in ("500", "2000", "all"):
            some = [p for p in points if (p["pairs"], p["n"]) == (pairs, n)]
            line += [f"{statistics.mean(p[of] for p in some):+.2f}" for of in ("score", "judge")]
        lines.append(line)
    header = ["n", "KL, nats"]
    for pairs in ("500", "2,000", "all"):
        header += [f"reward model of {pairs} pairs", "labeler"]
    return table(header, lines)


def lab_methods() -> str:
    """The four methods at the same episodes and at the same CPU time."""
    lines = []
    for row in result("lab.json")["methods"]:
        line = [row["method"], f"{row['episodes']:,}", f"{row['judge']:.2f}", f"{row['early']:.2f}"]
        line += [f"{row['win_rate']:.3f}", f"{row['kl']:.1f}", f"{row['cpu_seconds']:.0f}"]
        lines.append([*line, f"{row['peak_memory_gb']:.2f}", row["runs"]])
    header = ["`--advantage`", "episodes", "labeler", "labeler after 640", "wins", "KL"]
    return table([*header, "CPU s", "peak GB", "seeds"], lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        measured_on, embedded_line, embedded_two_samples, embedded_samples, embedded_openings,
        embedded_seeds, embedded_reward_model, embedded_parts, embedded_losses, embedded_few_pairs,
        embedded_times, embedded_kl, embedded_hacked, embedded_precision, reviews_results,
        reviews_samples, parity_trl, throughput, rollouts,
        machine_share, scaling, startup, memory, memory_runs, soak,
        scaling_measured, scaling_inputs, scaling_paper, scaling_limits, scaling_published,
        lab_baseline,
        lab_ablations, lab_variants, lab_order, lab_overoptimization, lab_least_of_three, lab_fits,
        lab_best_of_n, lab_methods, lab_findings, lab_why_ppo,
    )
}  # fmt: skip
for function in (throughput, rollouts, machine_share):  # the same on another processor
    TABLES[f"{function.__name__}_amx"] = functools.partial(function, "amx/")


def fill(page: str) -> str:
    """The page with every table as the result files have it now."""

    def filled(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", filled, page, flags=re.S)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
