"""Run experiments: a stage with a small change, everything else as in the baseline.

An experiment is a file NAME.diff in this folder: a few lines of text, the stages to run with their
flags, and a change of the code, if any (README.md). Each runs on a copy of the project, for several
seeds, on the embedded task; stages that it does not name are the baseline's. One JSON file per
experiment and seed is left in results/; what is there is not run again.

    python experiments/run.py                                # the baseline and all experiments
    python experiments/run.py baseline clip_higher --seeds 5
    python experiments/run.py clip_higher --setting full     # the stage's own number of episodes
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

import filelock
import tyro
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.append(str(ROOT / "benchmarks"))
from measure import machine, run_process  # noqa: E402

# short: the first 20 of the 50 updates of a full run; docs/lab.md compares the two
SETTINGS = {"short": "--total-episodes 2560 --eval-every 5", "full": "--eval-every 10"}
MODELS = ("sft", "reward_model")  # of the baseline, in order


@dataclasses.dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Experiments, or `baseline`; none: all."""
    seeds: int = 3
    """Seeds 1 to this, the same for each experiment."""
    setting: Literal["short", "full"] = "short"
    """How many episodes PPO learns from."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each on one thread."""
    runs: Path = ROOT / "runs/experiments"
    """Where the runs go."""
    out: Path = FOLDER / "results"
    """Folder of the result files."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    facts: dict[str, str]  # what stands above the diff: Source, Kind, Expected, Paper
    stages: tuple[tuple[str, str], ...]  # names and flags, in order
    diff: str  # "" where flags are all

    @property
    def recipe(self) -> str:
        """A number that changes with what is run, not with the code around it."""
        changes = [line for line in self.diff.splitlines() if line[:1] in "+-"]
        return hashlib.sha1(repr((self.stages, changes)).encode()).hexdigest()[:12]


class Failed(Exception):
    """A run that ended with an error, with its last line."""


BASELINE = Experiment("baseline", "The stages as they are", {}, (("ppo_rlhf", ""),), "")


def read(name: str) -> Experiment:
    """An experiment from its file. Lines are `Word: text`, indented where one goes on."""
    if name == "baseline":
        return BASELINE
    if not (path := FOLDER / f"{name}.diff").exists():
        sys.exit(f"error: {path}: no such experiment; pass names without .diff")
    text, *diff = re.split(
        r"\n(?=diff --git |--- a/)", path.read_text(encoding="utf-8"), maxsplit=1
    )
    title, *lines = re.sub(r"\n +", " ", text.strip()).splitlines()
    facts, stages = {}, []
    for line in lines:
        word, _, rest = line.partition(": ")
        if word == "Run":
            file, _, flags = rest.partition(" ")
            stages.append((file.removesuffix(".py"), flags))
        else:
            facts[word] = rest
    return Experiment(name, title, facts, tuple(stages), "".join(diff))


def names() -> list[str]:
    return ["baseline", *sorted(path.stem for path in FOLDER.glob("*.diff"))]


def copy_with(experiment: Experiment, folder: Path) -> None:
    """The project's scripts and data in `folder`, changed by the experiment's diff."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "data", folder / "data")
    if diff := experiment.diff:
        # in the repository around the folder, git would apply nothing
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
        subprocess.run(["git", "apply"], input=diff, text=True, cwd=folder, env=alone, check=True)


def flags_of(experiment: Experiment, stage: str, seed: int, own: Path, models: Path) -> list[str]:
    """A stage's command line; models come from the experiment's runs, else the baseline's.

    Flags name them {sft} and {reward_model}; {second} and {third} are other seeds' reward models.
    """
    own_models = [name for name, _ in experiment.stages if name != stage]
    use = {m: (own if m in own_models else models / f"seed{seed}") / m for m in MODELS}
    second, third = (models / f"seed{(seed + i) % 3 + 1}/reward_model" for i in (0, 1))
    words = shlex.split(dict(experiment.stages)[stage])
    extra = [word.format(**use, second=second, third=third) for word in words]
    flags = ["--seed", str(seed), "--output-dir", str(own / stage), "--overwrite"]
    if stage != "sft":
        flags += ["--model", str(use["sft"])]
    if stage == "ppo_rlhf" and "--reward-model" not in extra:
        flags += ["--reward-model", str(use["reward_model"])]
    return [*flags, "--save-every", "0", *extra]


def run_stage(code: Path, stage: str, flags: list[str], log: Path) -> dict:
    """Run a stage of the copy on one thread: its summary.json, CPU seconds and peak memory."""
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        cost = run_process([f"{stage}.py", *flags], 1, code, log)
    except SystemExit:
        raise Failed(log.read_text().strip().rpartition("\n")[2]) from None
    out = Path(flags[flags.index("--output-dir") + 1])
    return json.loads((out / "summary.json").read_text()) | cost


def train_models(seed: int, models: Path) -> None:
    """The baseline's models of a seed, which all its experiments start from."""
    code, own = models / f"code{seed}", models / f"seed{seed}"
    first = dataclasses.replace(BASELINE, stages=tuple((name, "") for name in MODELS))
    for stage in MODELS:
        if not (own / stage / "summary.json").exists():
            copy_with(first, code)
            run_stage(code, stage, flags_of(first, stage, seed, own, models), own / f"{stage}.log")
    shutil.rmtree(code, ignore_errors=True)


def run(experiment: Experiment, seed: int, args: Args) -> dict:
    """All stages of an experiment for a seed; what goes into its result file."""
    own = (args.runs / args.setting / f"{experiment.name}-seed{seed}").resolve()
    code = own / "code"
    copy_with(experiment, code)
    if args.setting == "short":  # the learning rate falls as in a full run
        text = (file := code / "ppo_rlhf.py").read_text()
        file.write_text(text.replace("1) / num_updates", "1) / 50"))
    result = {"experiment": experiment.name, "recipe": experiment.recipe, "seed": seed}
    result |= {"setting": args.setting, "machine": machine(threads=1), "diverged": False}
    for stage, _ in experiment.stages:
        flags = flags_of(experiment, stage, seed, own, args.runs.resolve() / "models")
        if stage == "ppo_rlhf":
            flags = SETTINGS[args.setting].split() + flags
        try:
            result[stage] = run_stage(code, stage, flags, own / f"{stage}.log")
        except Failed as error:
            if "lower --learning-rate" not in str(error):  # what a stage says of NaN or infinity
                raise
            return result | {"diverged": True, "error": str(error)}
    rows = map(json.loads, (own / "ppo_rlhf/metrics.jsonl").open())
    kept = ("update", "eval/kl", "eval/score", "eval/judge", "eval/win_rate", "objective/entropy")
    result["trace"] = [{k: row[k] for k in kept} for row in rows if "eval/judge" in row]
    shutil.rmtree(code)
    return result


def result_file(experiment: Experiment, seed: int, args: Args) -> Path:
    return args.out / args.setting / f"{experiment.name}-seed{seed}.json"


def is_done(experiment: Experiment, seed: int, args: Args) -> bool:
    path = result_file(experiment, seed, args)
    return path.exists() and json.loads(path.read_text())["recipe"] == experiment.recipe


def run_and_write(experiment: Experiment, seed: int, args: Args) -> str:
    """Write the result file; return what to say."""
    result, path = run(experiment, seed, args), result_file(experiment, seed, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    (part := path.with_suffix(".part")).write_text(json.dumps(result, indent=1) + "\n")
    part.rename(path)
    if result["diverged"]:
        return "diverged"
    return "labeler {judge:.2f}, KL {kl:.1f}".format(**result["ppo_rlhf"]["eval"]["policy"])


def run_all(experiments: list[Experiment], args: Args) -> None:
    """Run those without a result; one may fail without the others."""
    seeds = range(1, args.seeds + 1)
    work = [(e, seed) for seed in seeds for e in experiments if not is_done(e, seed, args)]
    failed, pool = 0, ThreadPoolExecutor(args.jobs)
    try:
        if work:  # the models of three seeds at least, which an ensemble needs
            models, needed = args.runs.resolve() / "models", range(1, max(args.seeds, 3) + 1)
            list(pool.map(train_models, needed, [models] * len(needed)))
        runs = {pool.submit(run_and_write, *one, args): one for one in work}
        for future in tqdm(as_completed(runs), total=len(work), unit="run"):
            experiment, seed = runs[future]
            if error := future.exception():
                failed += 1
            what = f"failed: {error}" if error else future.result()
            tqdm.write(f"{experiment.name}, seed {seed}: {what}")
    except Failed as error:
        sys.exit(f"error: the baseline's models: {error}")
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        sys.exit(f"error: {failed} of {len(work)} runs failed")


def main(args: Args) -> None:
    args.runs.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(args.runs / "run.lock", timeout=0):  # two would share folders
        run_all([read(name) for name in dict.fromkeys(args.names or names())], args)


if __name__ == "__main__":
    main(tyro.cli(Args))
