"""Two processes of torchrun on the CPU (gloo) against one: the same result where that can be, one set of files."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    metrics_of,
    preference_rows,
    prompt_rows,
    sft_rows,
    summary_of,
    write_data,
    write_jsonl,
)
from safetensors.torch import load_file
from test_rollouts import expected_advantages, expected_rewards, first_pass, rollouts_of

import utils

DRIVER = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
import ppo_rlhf, reward_model, sft, utils
modules = {"sft": sft, "reward_model": reward_model, "ppo": ppo_rlhf}
start_process = utils.start_process
if os.environ["RANK"] == "1":  # late: the main process has made its folder long before
    utils.start_process = lambda *args: (start_process(*args), time.sleep(0.4))[0]
runs = json.load(open(sys.argv[1]))
end_process = utils.end_process
for i, (name, flags) in enumerate(runs, 1):
    # one process group for all runs: torch reuses a group's keys when it is made again, and may hang
    utils.end_process = end_process if i == len(runs) else torch.distributed.barrier
    modules[name].main(modules[name].Args(**flags))
"""


def launch(*flags: str, **kwargs) -> str:
    """Run torchrun with these flags and return its stdout; nothing is left running, whatever happens."""
    command = [sys.executable, "-m", "torch.distributed.run", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes, **kwargs)
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.terminate()  # torchrun then ends its workers
        process.wait(30)
    if process.returncode:
        wanted = ("error: ", "Error: ", "File ")
        pytest.fail(
            "\n".join(line for line in stderr.splitlines() if any(w in line for w in wanted))[:3000]
        )
    return stdout


@pytest.fixture(scope="module")
def flags(models, base, tmp_path_factory) -> dict[str, tuple[str, dict]]:
    """The runs by name: 33 rows in sixteens leave one for the last batch, where the second process has none."""
    folder = tmp_path_factory.mktemp("uneven")
    for name, rows in (
        ("sft", sft_rows()),
        ("preferences", preference_rows()),
        ("prompts", prompt_rows()),
    ):
        write_jsonl(folder / name / "train.jsonl", rows[::4][:33])
        write_jsonl(folder / name / "validation.jsonl", rows[1::4][:5])
    write_data(folder / "alike", prompt_rows()[:1] * 20, 4)
    data = SimpleNamespace(
        **{name: str(folder / name) for name in ("sft", "preferences", "prompts")}
    )
    common = {"device": "cpu", "dtype": "float32", "learning_rate": 1e-3}
    learn = common | {
        "model": base.plain,
        "batch_size": 16,
        "micro_batch_size": 4,
        "max_length": 64,
        "epochs": 2,
    }
    ppo = common | {
        "model": str(models.sft),
        "reward_model": str(models.reward_model),
        "dataset": data.prompts,
    }
    ppo |= {
        "batch_size": 8,
        "micro_batch_size": 2,
        "num_ppo_epochs": 2,
        "response_length": 10,
        "eval_prompts": 5,
    }
    ppo |= {"total_episodes": 16, "save_rollouts": 1, "temperature": 1.0}
    one_step = {
        "num_ppo_epochs": 1,
        "total_episodes": 8,
        "whiten_advantages": False,
        "temperature": 0.8,
        "vf_coef": 0.3,
    }
    ptx = {"ptx_coef": 0.1, "ptx_dataset": data.sft, "num_mini_batches": 2}
    warm = {"total_episodes": 24, "critic_warmup_updates": 1, "save_every": 2}
    return {
        "sft": ("sft", learn | {"dataset": data.sft, "eval_every": 2}),
        "reward_model": (
            "reward_model",
            learn | {"dataset": data.preferences, "normalize_with": data.sft},
        ),
        "ppo": ("ppo", ppo | {"whiten_rewards": True, "eval_every": 1, "save_every": 1}),
        "ppo_one_step": ("ppo", ppo | one_step),
        "ppo_rloo": (
            "ppo",
            ppo | {"advantage": "rloo", "samples_per_prompt": 2, "whiten_advantages": False},
        ),
        "ppo_batch_mean": (
            "ppo",
            ppo | {"advantage": "batch_mean", "dataset": str(folder / "alike")} | ptx,
        ),
        "ppo_warm": ("ppo", ppo | warm),
    }


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """The folders of the runs by two processes; they start once, for all runs."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        (kind, args | {"output_dir": str(folder / name)}) for name, (kind, args) in flags.items()
    ]
    (folder / "driver.py").write_text(DRIVER)
    (folder / "runs.json").write_text(json.dumps(runs))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch(
        "--standalone",
        "--nproc-per-node",
        "2",
        str(folder / "driver.py"),
        str(folder / "runs.json"),
        env=env,
    )
    return folder


def test_a_late_process_does_not_mistake_the_folder_for_an_old_run(two, flags):
    """The main process has made the output folder before the other one, which the driver delays, looks at it."""
    assert all((two / name / "summary.json").exists() for name in flags)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_two_processes_learn_what_one_does(two, flags, request, name, tmp_path):
    """D7, D9, B22: the same weights, metrics and normalization, though the last batch leaves one process idle."""
    alone = request.getfixturevalue(name)(tmp_path / "out", **flags[name][1])
    assert_same_run(alone, two / name, tolerance=1e-5)
    a, b = (json.loads((out / "config.json").read_text()) for out in (alone, two / name))
    assert b.get("reward_mean") == pytest.approx(a.get("reward_mean"), abs=1e-5)
    a, b = summary_of(alone), summary_of(two / name)
    assert a.keys() == b.keys()
    for key in a.keys() - {"seconds"}:
        assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5)


def test_two_processes_leave_one_set_of_files(two):
    """One line an update, one event file, one checkpoint, samples in the order of the data."""
    out = two / "ppo"
    assert [row["update"] for row in metrics_of(out)] == [1, 2]
    assert len(list(out.glob("events.out.tfevents.*"))) == 1
    assert [p.name for p in (out / "checkpoint").iterdir()] == ["000001"]
    assert sorted(p.name for p in (out / "rollouts").iterdir()) == [
        "000001.safetensors",
        "000002.safetensors",
    ]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["prompt"] for s in samples] == [row["prompt"] for row in prompt_rows()[1::4][:5]]
    assert summary_of(out)["eval"]["prompts"] == 5


def test_rollouts_hold_the_whole_batch(two, flags, ppo, tmp_path):
    """The prompts are those of one process, in that order."""
    alone = ppo(tmp_path / "out", **flags["ppo"][1])
    for a, b in zip(rollouts_of(alone), rollouts_of(two / "ppo"), strict=True):
        assert b.tensors["prompt_ids"].shape[0] == 8
        assert torch.equal(a.tensors["prompt_ids"], b.tensors["prompt_ids"])


def test_each_process_samples_with_its_own_numbers(two):
    """D7: where all prompts are alike, the responses of the two processes are not."""
    rollout = rollouts_of(two / "ppo_batch_mean")[0]
    assert (rollout.a["prompt_ids"] == rollout.a["prompt_ids"][:1]).all()
    responses = rollout.a["response_ids"]
    assert not np.array_equal(responses[0::2], responses[1::2])


@pytest.mark.parametrize("name", ["ppo", "ppo_one_step", "ppo_rloo", "ppo_batch_mean"])
def test_statistics_are_over_all_processes(two, name):
    """D20, D22, D34, D35: rewards, whitening and baselines of the whole batch follow from the saved file."""
    for rollout in rollouts_of(two / name):
        rewards = expected_rewards(rollout)
        np.testing.assert_allclose(rollout.a["rewards"], rewards, rtol=1e-5, atol=1e-5)
        advantages, _ = expected_advantages(rollout, rewards)
        np.testing.assert_allclose(rollout.a["advantages"], advantages, rtol=1e-5, atol=1e-5)
        if rollout.on("whiten_advantages"):
            real = rollout.a["advantages"][rollout.real]
            assert real.mean() == pytest.approx(0, abs=1e-5)
            assert real.std() == pytest.approx(1, abs=1e-4)


def test_samples_of_a_prompt_stay_together(two):
    """D35: in the file too, the responses to a prompt stand side by side."""
    for rollout in rollouts_of(two / "ppo_rloo"):
        prompts = rollout.a["prompt_ids"].reshape(4, 2, -1)
        assert (prompts == prompts[:, :1]).all()


@pytest.mark.parametrize("name", ["ppo", "ppo_one_step", "ppo_rloo", "ppo_batch_mean", "ppo_warm"])
def test_the_ratio_starts_at_one(two, name):
    """D26, and the KL at 0, on every process."""
    rows = metrics_of(two / name)
    assert all(row["val/ratio_start_error"] < 1e-5 for row in rows)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_metrics_and_gradient_are_those_of_the_whole_batch(two, models):
    """D9, B12: losses, entropy and the norm of the summed gradient, from the whole rollout on one process."""
    out = two / "ppo_one_step"
    (rollout,), (row,) = rollouts_of(out), metrics_of(out)
    expected = first_pass(rollout, models, temperature=0.8, vf_coef=0.3)
    expected |= {
        "objective/scores": rollout.a["scores"].mean(),
        "objective/entropy": -rollout.a["logprobs"].sum(1).mean(),
        "response/length": rollout.lengths.mean(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_critic_warmup_counts_no_policy_steps(two, flags, ppo, tmp_path):
    """D32: Adam's step count of the policy starts after the warm-up, as it does with one process."""
    alone = ppo(tmp_path / "out", **flags["ppo_warm"][1])
    steps = []
    for out in (alone, two / "ppo_warm"):
        state = load_file(out / "checkpoint" / "000002" / "optimizer.safetensors")
        steps.append({key: value.item() for key, value in state.items() if key.endswith(".step")})
    assert steps[0] == steps[1]
    assert set(steps[0].values()) == {2.0, 4.0}


@pytest.mark.slow
def test_torchrun_on_the_script_itself(flags, tmp_path):
    """`torchrun ppo_rlhf.py` as in its header."""
    words = []
    for key, value in flags["ppo"][1].items():
        name = utils.flag(key)
        words += [name] if value is True else [name, str(value)]
    out = tmp_path / "out"
    stdout = launch(
        "--standalone", "--nproc-per-node", "2", "ppo_rlhf.py", *words, "--output-dir", str(out)
    )
    assert stdout.count("ppo_rlhf: the policy wins") == 1
    assert summary_of(out)["updates"] == 2
