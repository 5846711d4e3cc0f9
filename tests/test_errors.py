"""What goes wrong after the start: exit code 1, one line that says when, and the last checkpoint in place.

Wrong input, which stops a script before it starts, is in test_bad_input.py.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import STAGES, assert_same_run, command, error_line, metrics_of

import utils

# ----------------------------------------------------------------------------------------------- what goes wrong later


def fails(stage, out: Path, capsys, **flags) -> str:
    """The stage starts and stops with code 1 and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        stage(out, **flags)
    line = error_line(capsys.readouterr().err)
    assert exit_.value.code == 1
    assert not (out / "summary.json").exists()
    return line


@pytest.mark.parametrize("name", STAGES)
def test_nan_stops_the_run_and_the_checkpoint_stands(request, name, monkeypatch, capsys, tmp_path):
    """Step 3 meets NaN: it is named, its update is not made, and --resume goes on from step 2 as if nothing was."""
    stage, out = request.getfixturevalue(name), tmp_path / "out"
    flags = {"save_every": 1} | ({"total_episodes": 32} if name == "ppo" else {})
    logged = []
    log = utils.Logger.log
    function = "last_token_scores" if name == "reward_model" else "map_logits"
    original = getattr(utils, function)

    def spoiled(*args):
        result = original(*args)
        spoil = logged[-1:] == [2] and torch.is_grad_enabled()
        return result * float("nan") if spoil else result

    with monkeypatch.context() as patch:
        patch.setattr(
            utils.Logger,
            "log",
            lambda self, step, metrics: (logged.append(step), log(self, step, metrics)),
        )
        patch.setattr(utils, function, spoiled)
        line = fails(stage, out, capsys, **flags)
    assert ("update 3" if name == "ppo" else "step 3") in line
    assert "nan" in line
    assert len(metrics_of(out)) == 2
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["000001", "000002"]
    stage(out, **flags, resume=True)
    assert_same_run(out, stage(tmp_path / "whole", **flags))


@pytest.mark.parametrize("name", STAGES)
def test_an_absurd_learning_rate_ends_in_one_line(request, name, capsys, tmp_path):
    """Weights that run away to infinity, with no help from the test."""
    line = fails(request.getfixturevalue(name), tmp_path / "out", capsys, learning_rate=1e38)
    assert re.search(r"error: (step|update) \d+: ", line)


@pytest.mark.parametrize("name", STAGES)
def test_no_space_for_a_checkpoint(request, name, monkeypatch, capsys, tmp_path):
    """The second checkpoint does not fit: its step is named and the first one stands."""
    import safetensors.torch

    save, stage, out = safetensors.torch.save_file, request.getfixturevalue(name), tmp_path / "out"
    flags = {"save_every": 1} | ({"total_episodes": 32} if name == "ppo" else {})

    def full(tensors, path, *args, **kwargs):
        if "000002" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        line = fails(stage, out, capsys, **flags)
    assert "No space left" in line
    assert "000002" in line
    stage(out, **flags, resume=True)
    assert_same_run(out, stage(tmp_path / "whole", **flags))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("file", ["model", "summary.json", "metrics.jsonl"])
def test_no_space_for_the_results(request, name, file, monkeypatch, capsys, tmp_path):
    """The model, the summary or a line of metrics: one line, code 1."""
    import os

    from transformers import PreTrainedModel

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    replace = os.replace
    if file == "model":
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    elif file == "summary.json":
        monkeypatch.setattr(
            os, "replace", lambda a, b: full() if Path(b).name == file else replace(a, b)
        )
    else:
        import torch.utils.tensorboard

        monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, "add_scalar", full)
    line = fails(request.getfixturevalue(name), tmp_path / "out", capsys)
    assert "No space left" in line


TIRED = """
calls = 0
def f(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 4:
        raise ValueError("tired")
    return [float(len(c)) for c in completions]
"""


def test_a_reward_function_that_fails_later(ppo, capsys, tmp_path):
    """It has worked for a while, so it is no wrong input: code 1, the update, and the last checkpoint in place."""
    # the calls are the start's evaluation, updates 1 and 2, and update 3, which fails
    (tmp_path / "tired.py").write_text(TIRED)
    out = tmp_path / "out"
    flags = {"reward_fn": f"{tmp_path / 'tired.py'}:f", "total_episodes": 40, "save_every": 1}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        ppo(out, **flags)
    line = error_line(capsys.readouterr().err)
    assert exit_.value.code == 1
    assert "tired" in line
    assert "update 3" in line
    assert len(metrics_of(out)) == 2
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["000001", "000002"]


# ------------------------------------------------------------------------------------------------------- as one runs it


@pytest.mark.parametrize("script", ["reward_model.py"])
def test_help_on_the_command_line(script):
    """--help lists the flags in kebab-case with what they mean."""
    result = command(script, "--help")
    assert result.returncode == 0
    assert "--micro-batch-size" in result.stdout
    assert "--normalize-with" in result.stdout
    assert result.stderr == ""


def test_a_stage_on_the_command_line(base, data, tmp_path):
    """A run by its flags, from the command line."""
    flags = f"--model {base.plain} --dataset {data.sft} --device cpu --batch-size 16 --micro-batch-size 16 --epochs 1"
    result = command(
        "sft.py", *flags.split(), "--max-length", "64", "--output-dir", str(tmp_path / "out")
    )
    assert result.returncode == 0, result.stderr
    assert "sft: held-out loss" in result.stdout
    for noise in ("Traceback", "Warning", "LOAD REPORT", "Loading weights", "Writing model shards"):
        assert noise not in result.stderr
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert (args["model"], args["epochs"], args["max_length"]) == (base.plain, 1, 64)
