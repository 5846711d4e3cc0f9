"""What goes wrong after the start: code 1, one line that says when, the last checkpoint in place.

Wrong input, which stops a script before it starts, is in test_bad_input.py.
"""

import os
import re
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.utils.tensorboard
from conftest import STAGES, args_of, assert_same_run, command, metrics_of
from test_resume import STEP, in_step, send
from transformers import PreTrainedModel


@pytest.fixture(params=STAGES)
def run(request, tmp_path):
    """`run(out, **flags)`: a stage of four steps or more, called `run.unit`, each saved."""
    stage = request.getfixturevalue(request.param)
    flags = {"save_every": 1} | ({"total_episodes": 32} if request.param == "ppo" else {})

    def call(out: str = "out", **more) -> Path:
        return stage(tmp_path / out, **flags | more)

    call.unit = "update" if request.param == "ppo" else "step"
    return call


def assert_it_resumes(run, tmp_path: Path) -> None:
    """From the second step's checkpoint, as if nothing had been."""
    saved = (tmp_path / "out" / "checkpoint").glob("*[0-9]")
    assert sorted(p.name for p in saved) == ["000001", "000002"]
    assert not (tmp_path / "out" / "summary.json").exists()
    assert_same_run(run(resume=True), run("whole"))


def raising(error: Exception):
    """A function that raises the error, whatever it is given."""

    def fail(*args, **kwargs):
        raise error

    return fail


CUDA_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs")
CPU_IS_FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [CUDA_IS_FULL, CPU_IS_FULL], ids=["cuda", "cpu"])
def test_out_of_memory_names_the_step_and_the_flag_to_lower(
    run, error, monkeypatch, error_of, tmp_path
):
    """Micro-batches may be smaller when the run is resumed; they change rounding only."""
    with monkeypatch.context() as patch:
        in_step(patch, 3, torch.Tensor, "backward", raising(error))
        line = error_of(run, code=1)
    assert line.startswith(f"error: {run.unit} 3: ")
    assert "--micro-batch-size" in line
    assert "memory" in line.partition(";")[0]
    assert len(metrics_of(tmp_path / "out")) == 2
    assert_it_resumes(run, tmp_path)
    assert metrics_of(run(resume=True, micro_batch_size=2))


def test_out_of_memory_at_the_start(run, error_of, monkeypatch):
    """When the models are loaded; cuBLAS, CUDA itself and Python have words of their own for it."""
    full = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")
    for error in (CUDA_IS_FULL, full, RuntimeError("CUDA error: out of memory"), MemoryError()):
        monkeypatch.setattr(torch.nn.Module, "to", raising(error))
        line = error_of(run, code=1)
        assert line.startswith("error: start: ")
        assert "--micro-batch-size" in line


def test_an_illegal_memory_access_is_a_bug(run, monkeypatch):
    """Smaller micro-batches would not help."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.nn.Module, "to", raising(error))
    with pytest.raises(RuntimeError, match="illegal"):
        run()


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    """What is neither of these is no line, but an exception with the place where it was raised."""
    in_step(monkeypatch, 3, torch.Tensor, "backward", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run()


def test_an_absurd_learning_rate_ends_in_one_line(run, error_of):
    """Weights that run away to infinity, with no help from the test."""
    line = error_of(run, code=1, learning_rate=1e18)
    assert re.match(rf"error: {run.unit} \d+: (nan|inf|-inf) in ", line)


FULL = {  # what there is no space for by a part of its name, and the function that finds out
    "000003.part": (safetensors.torch, "save_file"),
    "model.part": (PreTrainedModel, "save_pretrained"),
    "summary.json": (os, "replace"),
    "grad_norm": (torch.utils.tensorboard.SummaryWriter, "add_scalar"),
}


@pytest.mark.parametrize("name", FULL)
def test_no_space(run, name, error_of, monkeypatch, tmp_path):
    """For a checkpoint, the model, the summary, metrics: a line; older checkpoints stand."""
    module, written = FULL[name]
    write = getattr(module, written)

    def full(*args, **kwargs):
        if name in str(args[1]):
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, written, full)
        line = error_of(run, code=1)
    [step] = re.findall(rf"{run.unit} (\d+): .*No space left", line)
    assert not (tmp_path / "out" / "summary.json").exists()
    if name == "summary.json":  # after all steps
        assert int(step) == len(metrics_of(tmp_path / "out"))
    if name == "000003.part":
        assert_it_resumes(run, tmp_path)


TIRED = """
calls = 0
def f(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 4:
        raise ValueError("tired")
    return [float(len(c)) for c in completions]
"""


def test_a_reward_function_that_fails_later(ppo, error_of, tmp_path):
    """It has worked for a while, so it is no wrong input: code 1, and the update."""
    # the calls are the start's evaluation, updates 1 and 2, and update 3, which fails
    (tmp_path / "tired.py").write_text(TIRED)
    out = tmp_path / "out"
    flags = {"reward_fn": f"{tmp_path / 'tired.py'}:f", "total_episodes": 40, "save_every": 1}
    line = error_of(ppo, out, code=1, **flags)
    assert "tired" in line
    assert "update 3" in line
    assert len(metrics_of(out)) == 2
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["000001", "000002"]


def test_a_reward_function_that_fails_at_the_end_of_a_resumed_run(
    ppo, error_of, monkeypatch, tmp_path
):
    """The last evaluation is all that was left to do: code 1, as without an interruption."""
    # a run without interruption has three calls, of evaluations at the start and at the end
    (tmp_path / "tired.py").write_text(TIRED.replace("== 4", "== 3"))
    flags = {"eval_reward_fn": f"{tmp_path / 'tired.py'}:f", "total_episodes": 16}
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        in_step(patch, 2, *STEP, send(signal.SIGTERM))
        ppo(tmp_path / "out", **flags)
    assert exit_.value.code == 143
    line = error_of(ppo, tmp_path / "out", code=1, resume=True, **flags)
    assert line.startswith("error: update 2: ") and "tired" in line


def test_a_stage_on_the_command_line(base, data, tmp_path):
    """A run by its flags: the result on stdout, on stderr no noise of libraries."""
    out = tmp_path / "out"
    flags = f"--model {base.plain} --dataset {data.sft} --device cpu --batch-size 16 --epochs 1"
    result = command("sft.py", *flags.split(), "--max-length", "64", "--output-dir", str(out))
    assert result.returncode == 0, result.stderr
    assert "sft: held-out loss" in result.stdout
    for noise in ("Traceback", "Warning", "LOAD REPORT", "Loading weights", "Writing model shards"):
        assert noise not in result.stderr
    args = args_of(out)
    assert (args["model"], args["epochs"], args["max_length"]) == (base.plain, 1, 64)
