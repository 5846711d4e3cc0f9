"""Two and four processes of torchrun on the CPU (gloo) against one: the same, one set of files."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    STANDALONE,
    assert_same_run,
    metrics_of,
    preference_rows,
    prompt_rows,
    rollouts_of,
    samples_of,
    sft_rows,
    summary_of,
    write_data,
    write_jsonl,
)
from safetensors.torch import load_file
from test_rollouts import FIRST_PASS, check_first_pass, check_rewards

import distributed
import generate
import utils

DRIVER = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
import ppo_rlhf, reward_model, sft, utils
modules = {"sft": sft, "reward_model": reward_model, "ppo": ppo_rlhf}
start_process = utils.start_process
if os.environ["RANK"] == "1":  # late: the main process has made its folder long before
    utils.start_process = lambda args: (start_process(args), time.sleep(0.4))[0]
runs = json.load(open(sys.argv[1]))
destroy = torch.distributed.destroy_process_group
for i, (name, flags) in enumerate(runs, 1):
    # one group for all runs: torch reuses a group's keys when it is made again, and may hang
    torch.distributed.destroy_process_group = destroy if i == len(runs) else lambda: None
    several = [name for name in ("dataset", "reward_model", "reward_fn") if name in flags]
    flags |= {name: (flags[name],) for name in several}
    modules[name].main(modules[name].Args(**flags))
"""


def launch(*words: str, processes: int = 2, **env: str) -> str:
    """Run torchrun and return its stdout; nothing is left running."""
    command = [sys.executable, "-m", "torch.distributed.run", *STANDALONE]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    command, env = [*command, "--nproc-per-node", str(processes), *words], os.environ | env
    process = subprocess.Popen(command, env=env | {"OMP_NUM_THREADS": "1"}, **pipes)
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.terminate()  # torchrun then ends its workers
        process.wait(30)
    assert process.returncode == 0, stderr[-6000:]
    return stdout


@pytest.fixture(scope="module")
def flags(models, base, rewards, tmp_path_factory) -> dict[str, tuple[str, dict]]:
    """The runs by name: of 33 rows in sixteens one is left for the last batch, of process 0."""
    folder, common = tmp_path_factory.mktemp("uneven"), {"device": "cpu", "dtype": "float32"}
    kinds = {"sft": sft_rows(), "preferences": preference_rows(), "prompts": prompt_rows()}
    data = {kind: str(folder / kind) for kind in kinds}
    for kind, rows in kinds.items():
        write_jsonl(folder / kind / "train.jsonl", rows[::4][:33])
        write_jsonl(folder / kind / "validation.jsonl", rows[1::4][:5])
    alike = write_data(folder / "alike", prompt_rows()[:1] * 20, 4)
    common |= {"learning_rate": 1e-3}
    learn = common | {"model": base.plain, "batch_size": 16, "micro_batch_size": 4}
    learn |= {"max_length": 64, "epochs": 1}
    ppo = common | {"model": str(models.sft), "reward_model": str(models.reward_model)}
    ppo |= {"dataset": data["prompts"], "batch_size": 8, "micro_batch_size": 2, "eval_prompts": 5}
    ppo |= {"num_ppo_epochs": 2, "response_length": 10, "total_episodes": 16, "save_rollouts": 1}
    ppo |= {"temperature": 1.0, "kl_coef": 0.05}
    rloo = {"advantage": "rloo", "samples_per_prompt": 2, "whiten_advantages": False}
    rloo |= {"reward_fn": f"{rewards}:letter"}
    batch_mean = {"advantage": "batch_mean", "dataset": alike, "num_mini_batches": 2}
    batch_mean |= {"ptx_coef": 0.1, "ptx_dataset": data["sft"]}
    often = {"eval_every": 1, "save_every": 1, "total_episodes": 24, "num_mini_batches": 2}
    warm = {"total_episodes": 24, "critic_warmup_updates": 1, "save_every": 2}
    preferences = {"dataset": data["preferences"], "normalize_with": data["sft"]}
    embeddings = {"lm_coef": 1.0, "prefix_coef": 1.0}
    return {
        "sft": ("sft", learn | {"dataset": data["sft"], "eval_every": 2}),
        "reward_model": ("reward_model", learn | preferences),
        "reward_model_lm": ("reward_model", learn | preferences | embeddings),
        "ppo": ("ppo", ppo | {"whiten_rewards": True, "keep_best": True} | often),
        "ppo_one_step": ("ppo", ppo | FIRST_PASS),
        "ppo_rloo": ("ppo", ppo | rloo),
        "ppo_batch_mean": ("ppo", ppo | batch_mean),
        "ppo_warm": ("ppo", ppo | warm),
    }


def run_all(folder, flags, processes: int, **more) -> None:
    """The runs by several processes; the late ones find a folder that the main one has made."""
    folder.mkdir(exist_ok=True)
    runs = [
        (kind, f | more | {"output_dir": str(folder / name)}) for name, (kind, f) in flags.items()
    ]
    (folder / "driver.py").write_text(DRIVER)
    (folder / "runs.json").write_text(json.dumps(runs))
    words = (str(folder / "driver.py"), str(folder / "runs.json"))
    launch(*words, processes=processes, PYTHONPATH=str(ROOT))
    assert all((folder / name / "summary.json").exists() for name in flags)


@pytest.fixture(scope="module")
def two(flags, one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_all(folder, flags, 2)
    return folder


@pytest.fixture(scope="module")
def two_sharded(flags, one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_sharded")
    run_all(folder, flags, 2, fsdp=True)
    return folder


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory, sft, reward_model, ppo):
    """The same runs by one process, without torchrun.

    PPO's with the first seed, left in `flags`, at which no random number is where rounding would
    decide between two tokens: there another processor, or number of processes, draws another.
    """
    folder, sample, margins = tmp_path_factory.mktemp("one"), generate.sample, []
    stages = {"sft": sft, "reward_model": reward_model, "ppo": ppo}

    def measured(logits, temperature, top_k, top_p, uniform):
        ends = (logits / temperature).double().softmax(-1).cumsum(-1)
        margins.append((ends - uniform[:, None]).abs().min().item())
        return sample(logits, temperature, top_k, top_p, uniform)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "sample", measured)
        for name, (kind, f) in flags.items():
            for f["seed"] in range(1, 50):
                margins[:] = [1.0]
                stages[kind](folder / name, overwrite=True, **f)
                if min(margins) > 2e-6:
                    break
            assert min(margins) > 2e-6, name
    return folder


NAMES = [
    "sft",
    "reward_model",
    "reward_model_lm",
    "ppo",
    "ppo_one_step",
    "ppo_rloo",
    "ppo_batch_mean",
    "ppo_warm",
]


def approx(x):
    return pytest.approx(x, rel=1e-4, abs=1e-4)


def assert_same_results(one, several, name):
    """Weights, rollouts, metrics, normalization and files of a run, up to rounding."""
    one, several = one / name, several / name
    assert_same_run(one, several, tolerance=1e-5)
    a, b = (json.loads((out / "config.json").read_text()) for out in (one, several))
    assert b.get("reward_mean") == pytest.approx(a.get("reward_mean"), abs=1e-5)
    a, b = summary_of(one), summary_of(several)
    assert a.keys() == b.keys()
    for key in a.keys() - {"seconds", "eval"}:
        assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5)
    if (one / "samples.jsonl").exists():
        for x, y in zip(samples_of(one), samples_of(several), strict=True):
            close = {k: v if isinstance(v, str | None) else approx(v) for k, v in x.items()}
            assert y == close
        rollouts = zip(rollouts_of(one), rollouts_of(several), strict=True)
        for x, y in rollouts:
            assert x.tensors.keys() == y.tensors.keys()
            for key, tensor in x.tensors.items():
                torch.testing.assert_close(y.tensors[key], tensor, rtol=1e-4, atol=1e-4)
            assert torch.equal(x.tensors["response_ids"], y.tensors["response_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_do_what_one_does(one, two, name):
    """D7, D9, B22: the same prompts, responses, statistics and weights, though of the last batch
    one process has no rows."""
    assert_same_results(one, two, name)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_share_models(one, two_sharded, name):
    """--fsdp: the same again."""
    assert_same_results(one, two_sharded, name)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_four_processes_do_what_one_does(one, flags, tmp_path, fsdp):
    """Some have no rows of a mini-batch, or of the held-out data."""
    run_all(tmp_path, flags, 4, fsdp=fsdp)
    for name in NAMES:
        assert_same_results(one, tmp_path, name)


def test_three_processes_continue_exactly(flags, tmp_path):
    """Of three a sum depends on its order, which torch changes after the first one of a process."""
    learn = flags["sft"][1] | {"batch_size": 12, "epochs": 2, "save_every": 1}
    run_all(tmp_path / "whole", {"sft": ("sft", learn)}, 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    out = tmp_path / "again/sft"
    for path in (out / "summary.json", *utils.checkpoints(out)[:1]):
        utils.discard(path)
    assert [int(path.name) for path in utils.checkpoints(out)] == [4]
    run_all(tmp_path / "again", {"sft": ("sft", learn)}, 3, resume=True)
    assert_same_run(tmp_path / "whole/sft", out)


def test_two_processes_leave_one_set_of_files(two):
    """One line an update, one event file, one checkpoint; samples in the order of the prompts."""
    out = two / "ppo"
    assert [row["update"] for row in metrics_of(out)] == [1, 2, 3]
    assert len(list(out.glob("events.out.tfevents.*"))) == 1
    assert [p.name for p in sorted((out / "checkpoint").iterdir())] == ["000001", "000002"]
    assert (out / "best" / "model.safetensors").exists()
    samples = samples_of(out)
    assert [s["prompt"] for s in samples] == [row["prompt"] for row in prompt_rows()[1::4][:5]]
    assert summary_of(out)["eval"]["prompts"] == 5


def test_each_episode_has_its_own_numbers(two):
    """D7: where all prompts are alike, the responses are not."""
    rollout = rollouts_of(two / "ppo_batch_mean")[0]
    assert (rollout.a["prompt_ids"] == rollout.a["prompt_ids"][:1]).all()
    assert len({tuple(row) for row in rollout.a["response_ids"].tolist()}) == 8


@pytest.mark.parametrize("name", ["ppo", "ppo_one_step", "ppo_rloo", "ppo_batch_mean", "ppo_warm"])
def test_statistics_are_over_all_processes(two, name):
    """D20, D22, D34, D35: those of the whole batch; D26: ratio 1 and KL 0 on every process."""
    check_rewards(two / name)
    rows = metrics_of(two / name)
    assert all(row["val/ratio_start_error"] < 1e-5 for row in rows)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    for row in rows:  # the score is the sum of the rewards, less 1 for those without an end
        total = sum(x for key, x in row.items() if key.startswith("scores/"))
        expected = total + row["response/eos_rate"] - 1
        assert row["objective/scores"] == pytest.approx(expected, abs=1e-5)


def test_metrics_and_gradient_are_those_of_the_whole_batch(two, models):
    """D9, B12: losses, entropy and the norm of the summed gradient."""
    check_first_pass(two / "ppo_one_step", models)


def test_critic_warmup_counts_no_policy_steps(one, two):
    """D32: Adam's step count of the policy starts after the warm-up, as with one process."""
    steps = []
    for out in (one / "ppo_warm", two / "ppo_warm"):
        state = load_file(out / "checkpoint" / "000002" / "optimizer.safetensors")
        steps.append({key: value.item() for key, value in state.items() if key.endswith(".step")})
    assert steps[0] == steps[1]
    assert {*steps[0].values()} == {2.0, 4.0}


@pytest.mark.parametrize("disable", [False, True])
def test_a_process_that_fails_says_in_which_step(error_of, monkeypatch, tmp_path, disable):
    """Any of them may run out of memory, not only the one that shows a progress bar, and where
    none is shown too (TQDM_DISABLE=1)."""
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(utils, "tqdm", functools.partial(utils.tqdm, disable=disable))

    def fail():
        with utils.stage():
            logger = utils.Logger(tmp_path, None, "step", 2, 9, "loss")
            logger.log(3, {"loss": 1.0})
            raise torch.OutOfMemoryError("out of memory")

    assert error_of(fail, code=1).startswith("error: step 4: ")


@pytest.mark.slow
def test_torchrun_on_the_script_itself(flags, tmp_path):
    """`torchrun ppo_rlhf.py` as in its header."""
    given = (flags["ppo"][1] | {"output_dir": str(tmp_path / "out")}).items()
    words = [[utils.flag(k)] if v is True else [utils.flag(k), str(v)] for k, v in given]
    stdout = launch("ppo_rlhf.py", *sum(words, []))
    assert stdout.count("ppo_rlhf: wins") == 1
    assert summary_of(tmp_path / "out")["updates"] == 3
