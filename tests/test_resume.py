"""Nothing is lost: runs that are killed or interrupted, damaged checkpoints, full disks, two runs on one folder."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, make_model, metrics_of, save_pair, weights_of
from safetensors.torch import load_file
from test_errors import error_line

import utils

STAGES = ["sft", "reward_model", "ppo"]
FLAGS = {  # with everything that has a state
    "sft": {"epochs": 1, "save_every": 2, "eval_every": 2, "micro_batch_size": 4},
    "reward_model": {"save_every": 2, "eval_every": 2, "micro_batch_size": 4},
    "ppo": {"total_episodes": 40, "save_every": 1, "eval_every": 2, "kl_target": 0.5, "kl_horizon": 20}
    | {"save_rollouts": 1, "critic_warmup_updates": 1, "num_mini_batches": 2, "micro_batch_size": 2},
}


def assert_same_records(a: Path, b: Path) -> None:
    """Weights, metrics, summary, samples and rollouts of two runs, to the bit; and nothing half-written is left."""
    assert_same_run(a, b)
    assert [*a.rglob("*.part")] == [*b.rglob("*.part")] == []
    assert {p.name for p in a.iterdir()} - {"metrics.jsonl"} >= {"model.safetensors", "args.json", "summary.json"}
    if (a / "samples.jsonl").exists():
        assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
        assert [p.name for p in sorted((a / "rollouts").iterdir())] == [
            p.name for p in sorted((b / "rollouts").iterdir())
        ]
        for path in (a / "rollouts").iterdir():
            x, y = load_file(path), load_file(b / "rollouts" / path.name)
            assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """`whole(stage)`: the folder of an undisturbed run with FLAGS."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = request.getfixturevalue(name)(folder / name, **FLAGS[name])
        return made[name]

    return run


# ----------------------------------------------------------------------------------------------------------------- kill


@pytest.mark.slow
def test_runs_killed_at_any_moment_go_on_exactly(whole, tmp_path):
    """kill -9, twenty times and more, some in the middle of a save: the three runs end as if nothing had been."""
    usual = ["args.json.part", None, "checkpoint/*.part", "metrics.jsonl.part", None, "checkpoint/*.part", "model.part"]
    moments = {name: usual for name in STAGES} | {"ppo": ["rollouts/*.part", *usual, "samples.jsonl.part"]}
    plan = []
    for name in STAGES:
        args = json.loads((whole(name) / "args.json").read_text()) | {"output_dir": str(tmp_path / name)}
        module = "ppo_rlhf" if name == "ppo" else name
        plan.append({"module": module, "flags": args, "moments": moments[name], "seconds": 0.7})
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), str(tmp_path / "plan.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr + "".join(p.read_text()[-2000:] for p in tmp_path.glob("*.log"))
    kills = [int(line.split()[1]) for line in run.stdout.splitlines()]
    assert kills == [len(moments[name]) for name in STAGES]
    for name in STAGES:
        assert_same_records(whole(name), tmp_path / name)
        assert "error:" not in (tmp_path / f"{name}.log").read_text()
