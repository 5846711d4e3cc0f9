"""The lab: each experiment fits the code as it is, and its first update runs."""

import importlib
import json
import sys

import pytest
import tyro
from conftest import ROOT, metrics_of, summary_of, weights_of

sys.path.insert(0, str(ROOT / "experiments"))
import run as lab

EXPERIMENTS = {name: lab.read(name) for name in lab.names()}
STAGES = {"sft.py", "reward_model.py", "ppo_rlhf.py"}
OURS = [path.stem for path in ROOT.glob("*.py")]


def hunks(diff: str) -> list[tuple[str, list[str]]]:
    """Of each hunk the changed file and its lines, with their first character."""
    found, file = [], ""
    for line in diff.splitlines():
        if line.startswith("--- a/"):
            file = line.removeprefix("--- a/")
        elif line.startswith("@@"):
            found.append((file, []))
        elif not line.startswith(("+++", "diff --git", "index ")):
            found[-1][1].append(line)
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_a_small_change(name):
    """At most 15 lines of a stage and of one helper, at a place that occurs once."""
    experiment = EXPERIMENTS[name]
    changes = hunks(experiment.diff)
    lines = [line for _, hunk in changes for line in hunk]
    assert sum(line.startswith("+") for line in lines) <= 15
    assert sum(line.startswith("-") for line in lines) <= 15
    files = {file for file, _ in changes}
    assert len(files & STAGES) <= 1 and len(files - STAGES) <= 1
    for file, hunk in changes:
        old = "\n".join(line[1:] for line in hunk if line[:1] != "+")
        assert f"\n{(ROOT / file).read_text()}".count(f"\n{old}\n") == 1, old


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "baseline"])
def test_an_experiment_says_what_it_is(name):
    experiment = EXPERIMENTS[name]
    assert experiment.title and {"Kind", "Source", "Expected"} <= experiment.facts.keys()
    assert experiment.facts["Kind"] in ("Ablation", "Variant")
    assert experiment.stages[-1][0] == "ppo_rlhf"
    assert experiment.diff or any(flags for _, flags in experiment.stages)


@pytest.fixture
def small(data, models) -> dict[str, str]:
    """Flags with which a stage takes a second."""
    few = "--batch-size 8 --micro-batch-size 4 --eval-every 0 --device cpu"
    pairs = f"{few} --max-length 64 --dataset {data.preferences} --normalize-with {data.sft}"
    answers = f"--eval-prompts 2 --response-length 8 --temperature 1 {few}"
    return {
        "sft": f"{few} --max-length 64 --dataset {data.sft}",
        "reward_model": pairs,
        "ppo_rlhf": f"{answers} --dataset {data.prompts}",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_first_update_of_an_experiment(name, small, models, tmp_path, monkeypatch):
    """In this process, on the changed code; after its warm-up, if it has one."""
    experiment, own = EXPERIMENTS[name], tmp_path / "own"
    lab.copy_with(experiment, tmp_path / "code")
    monkeypatch.chdir(tmp_path / "code")
    monkeypatch.syspath_prepend(tmp_path / "code")
    for module in OURS:
        if module in sys.modules:
            monkeypatch.delitem(sys.modules, module)
    baseline = tmp_path / "models"
    for seed in (1, 2, 3):
        (baseline / f"seed{seed}").mkdir(parents=True)
        for model in ("sft", "reward_model"):
            (baseline / f"seed{seed}" / model).symlink_to(getattr(models, model))
    for stage, flags in experiment.stages:
        module = importlib.import_module(stage)
        assert str(tmp_path) in module.__file__
        flags = small[stage].split() + lab.flags_of(experiment, stage, 1, own, baseline)
        args = tyro.cli(module.Args, args=flags)
        if stage == "ppo_rlhf":
            updates = args.critic_warmup_updates + 1
            args.total_episodes = args.batch_size * updates
        module.main(args)
    assert len(metrics_of(own / "ppo_rlhf")) == updates
    assert summary_of(own / "ppo_rlhf")["eval"]["policy"]["judge"] is None
    assert all(weight.isfinite().all() for weight in weights_of(own / "ppo_rlhf").values())


@pytest.fixture
def args(tmp_path) -> lab.Args:
    return lab.Args(seeds=2, jobs=1, runs=tmp_path / "runs", out=tmp_path / "results")


def test_what_has_a_result_is_not_run_again(args, monkeypatch, capsys):
    """Until its recipe changes; a run that fails is tried again, and does not stop the others."""
    ran = []

    def run(experiment, seed, args):
        ran.append((experiment.name, seed))
        if experiment.name == "kl_k2" and seed == 1:
            raise lab.Failed("error: no")
        return {"recipe": experiment.recipe, "diverged": True}

    monkeypatch.setattr(lab, "train_models", lambda *_: None)
    monkeypatch.setattr(lab, "run", run)
    two = [lab.read("kl_k2"), lab.read("kl_k3")]
    with pytest.raises(SystemExit, match="1 of 4 runs failed"):
        lab.run_all(two, args)
    assert ran == [("kl_k2", 1), ("kl_k3", 1), ("kl_k2", 2), ("kl_k3", 2)]
    assert "kl_k2, seed 1: failed: error: no" in capsys.readouterr().out
    ran.clear()
    changed = lab.dataclasses.replace(two[1], stages=(("ppo_rlhf", "--kl-coef 1"),))
    with pytest.raises(SystemExit):
        lab.run_all([two[0], changed], args)
    assert ran == [("kl_k2", 1), ("kl_k3", 1), ("kl_k3", 2)]


def test_a_result_has_the_evaluations_and_says_what_diverged(args, monkeypatch):
    """By what a stage says of NaN or infinity; any other error ends the run."""
    said = "update 3: nan in loss/policy_avg; lower --learning-rate and start again"

    def run_stage(code, stage, flags, log):
        assert "(update - 1) / 50" in (code / "ppo_rlhf.py").read_text()
        assert flags[:2] == ["--total-episodes", "2560"]
        if said:
            raise lab.Failed(said)
        out = lab.Path(flags[flags.index("--output-dir") + 1])
        out.mkdir(parents=True)
        rows = [{"update": i, "objective/entropy": 1.0} for i in (1, 2)]
        names = ("kl", "score", "judge", "win_rate")
        rows[1] |= {f"eval/{name}": 2.0 for name in names}
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"eval": {}}

    monkeypatch.setattr(lab, "run_stage", run_stage)
    result = lab.run(lab.BASELINE, 1, args)
    assert result["diverged"] and result["error"] == said
    said = "update 3: no space left"
    with pytest.raises(lab.Failed, match="no space"):
        lab.run(lab.BASELINE, 1, args)
    said = ""
    result = lab.run(lab.BASELINE, 1, args)
    assert not result["diverged"] and [row["update"] for row in result["trace"]] == [2]
