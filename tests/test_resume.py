"""Nothing is lost: kills, signals, numbers that are not finite, damage, full disks, two at once."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from conftest import (
    MODULES,
    ROOT,
    STAGES,
    STANDALONE,
    args_of,
    assert_same_run,
    change_config,
    make_model,
    metrics_of,
    save_pair,
    snapshot,
    weights_of,
)
from safetensors.torch import load_file
from test_stages import assert_board_has_metrics

import distributed
import encoding
import generate
import saving
import utils

FLAGS = {  # with everything that has a state
    "sft": {"save_every": 2, "eval_every": 2, "micro_batch_size": 4},
    "reward_model": {"save_every": 2, "eval_every": 2, "micro_batch_size": 4},
    "ppo": {"total_episodes": 32, "save_every": 1, "eval_every": 2, "save_rollouts": 1},
}
FLAGS["ppo"] |= {"kl_target": 0.5, "kl_horizon": 20, "critic_warmup_updates": 1}
FLAGS["ppo"] |= {"num_mini_batches": 2, "micro_batch_size": 2, "whiten_rewards": True}
SFT = FLAGS["sft"]


def assert_same_records(a: Path, b: Path) -> None:
    """Weights, metrics, summary, samples and rollouts of two runs, to the bit; nothing is half."""
    assert_same_run(a, b)
    assert [*a.rglob("*.part")] == [*b.rglob("*.part")] == []
    names = ("model.safetensors", "config.json", "tokenizer.json", "args.json", "summary.json")
    assert all((out / name).is_file() for out in (a, b) for name in names)
    assert snapshot(a).get("samples.jsonl") == snapshot(b).get("samples.jsonl")
    x, y = ([load_file(p) for p in sorted((out / "rollouts").glob("*"))] for out in (a, b))
    for one, other in zip(x, y, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """`whole(stage)`: the folder of an undisturbed run with FLAGS."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = request.getfixturevalue(name)(folder / name, **FLAGS[name])
        return made[name]

    return run


@pytest.fixture(scope="module")
def saved(sft, tmp_path_factory) -> Path:
    """A run of sft.py with the checkpoints 2, 4, 6 and 8."""
    return sft(tmp_path_factory.mktemp("saved") / "out", **SFT, keep_checkpoints=4)


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(saved, tmp_path / "out"))


@pytest.mark.slow
def test_runs_killed_at_any_moment_continue_exactly(whole, tmp_path):
    """kill -9, twenty times and more, some in the middle of a save: the three runs end the same."""
    usual = ["args.json.part", None, "checkpoint/*.part", "metrics.jsonl.part", None]
    usual += ["checkpoint/*.part", "model.part"]
    moments = dict.fromkeys(STAGES, usual)
    moments["ppo"] = ["rollouts/*.part", *usual, "samples.jsonl.part"]
    plan = []
    for name, module in MODULES.items():
        flags = flags_of(whole(name)) | {"output_dir": str(tmp_path / name)}
        plan.append({"module": module, "flags": flags, "moments": moments[name], "seconds": 0.7})
    kills = killed_again_and_again(plan, tmp_path)
    assert kills == [len(moments[name]) for name in STAGES]
    for name in STAGES:
        assert_same_records(whole(name), tmp_path / name)


def killed_again_and_again(plan: list[dict], folder: Path) -> list[int]:
    """Run a plan of kill_runs.py until each run is whole; returns how many kills each had."""
    if sys.platform == "darwin":
        pytest.skip("a fork of a process that has loaded torch may crash there")
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), str(folder / "plan.json")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    logs = [Path(f"{each['flags']['output_dir']}.log").read_text() for each in plan]
    assert run.returncode == 0, run.stderr + "".join(log[-2000:] for log in logs)
    assert not any("error:" in log for log in logs)
    return [int(line.split()[1]) for line in run.stdout.splitlines()]


def flags_of(out: Path) -> dict:
    """The flags of a run."""
    return {name: value for name, value in args_of(out).items() if name != "stage"}


def in_step(monkeypatch, step: int, where, name: str, act) -> None:
    """Pass what `where.name` gives through act(result, *args), from this step or update on."""
    logged, log, function = [0], utils.Logger.log, getattr(where, name)

    def logging(self, at, metrics):
        logged.append(at)
        log(self, at, metrics)

    def acting(*args, **kwargs):
        result = function(*args, **kwargs)
        return act(result, *args) if logged[-1] == step - 1 else result

    monkeypatch.setattr(utils.Logger, "log", logging)
    monkeypatch.setattr(where, name, acting)


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("name", STAGES)
def test_a_crash_between_checkpoints(request, whole, name, step, monkeypatch, tmp_path):
    """Steps since the last one are made again; half a line of metrics.jsonl is no hindrance."""
    stage, out = request.getfixturevalue(name), tmp_path / "out"
    flags = FLAGS[name] | {"save_every": 2, "keep_checkpoints": 1}  # which may change
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        in_step(patch, step, torch.optim.AdamW, "step", lambda *args: 1 / 0)
        stage(out, **flags)
    assert len(metrics_of(out)) == step - 1
    assert len(utils.checkpoints(out)) == (step == 4)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 2.')
    stage(out, **flags, resume=True)
    assert_same_records(whole(name), out)
    assert_board_has_metrics(out, "update" if name == "ppo" else "step")


def test_what_never_changes_the_result_may_change(sft, copy, saved):
    """The micro-batch size, on a GPU with less memory; and a flag that was not there then."""
    flags = {name: value for name, value in args_of(copy).items() if name != "compile"}
    (copy / "args.json").write_text(json.dumps(flags))
    sft(copy, **SFT | {"micro_batch_size": 2, "save_every": 4}, resume=True)
    assert_same_run(saved, copy, tolerance=1e-4)


# ---- signals


FORWARD, GENERATION = (utils, "hidden_states"), (generate, "generate")
SCORING, WHITENING = (utils, "last_token_scores"), (utils, "whiten")
BACKWARD, STEP = (torch.Tensor, "backward"), (torch.optim.AdamW, "step")
MOMENTS = [  # stage, in which step the signal comes, at what, and after which step the state is
    ("sft", 4, FORWARD, 4),
    ("sft", 1, STEP, 1),
    ("reward_model", 4, BACKWARD, 4),
    ("ppo", 3, GENERATION, 2),
    ("ppo", 3, SCORING, 2),
    ("ppo", 3, BACKWARD, 3),  # then the update is finished first
    ("ppo", 4, STEP, 4),
    ("ppo", 1, WHITENING, 0),  # nothing to save: the run starts again
]


def send(number: int):
    """For `in_step`: send this process a signal, once."""
    sent = []

    def act(result, *args):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return result

    return act


@pytest.mark.parametrize(("name", "step", "moment", "kept"), MOMENTS)
def test_a_signal_saves_and_resume_continues_exactly(
    request, whole, name, step, moment, kept, monkeypatch, capfd, tmp_path
):
    """SIGTERM and Ctrl-C, with --save-every 0: the last whole step is saved and named."""
    number = (signal.SIGTERM, signal.SIGINT)[step % 2]
    stage, flags = request.getfixturevalue(name), FLAGS[name] | {"save_every": 0}
    expected, out = whole(name), tmp_path / "out"
    capfd.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        in_step(patch, step, *moment, send(number))
        stage(out, **flags)
    assert exit_.value.code == 128 + number
    unit = "update" if name == "ppo" else "step"
    lines = [line for line in capfd.readouterr().err.splitlines() if "interrupted" in line]
    assert lines == [f"interrupted after {unit} {kept}; add --resume to continue"]
    assert [int(path.name) for path in utils.checkpoints(out)] == ([kept] if kept else [])
    assert len(metrics_of(out)) == kept
    stage(out, **flags, resume=True)
    assert_same_records(expected, out)


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    """One that comes within a second of the first is the same one, passed on by torchrun."""
    ended, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interruption = distributed.Interruption(torch.device("cpu"))
    assert not interruption.came()
    for seconds, number in ((0, signal.SIGINT), (0.6, signal.SIGTERM), (0.6, signal.SIGTERM)):
        now[0] += seconds
        assert ended == []
        os.kill(os.getpid(), number)
        assert interruption.came()
    assert ended == [143]
    assert interruption.signal == signal.SIGINT


def test_before_training_a_signal_is_pythons_own(ppo, monkeypatch, tmp_path):
    """Nothing is there to be saved: Ctrl-C ends the script while it loads and evaluates.

    It is Python's own again after the run, however it ends: a notebook goes on.
    """
    seen, load, log = [], utils.load_causal_lm, utils.Logger.log
    look = lambda *args: seen.append(signal.getsignal(signal.SIGINT))  # noqa: E731
    monkeypatch.setattr(utils, "load_causal_lm", lambda *args: look() or load(*args))
    monkeypatch.setattr(utils.Logger, "log", lambda *args: look() or log(*args))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ppo(tmp_path / "out", total_episodes=8)
    assert seen[:2] == [before[0]] * 2
    assert seen[2] != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    monkeypatch.setattr(utils.Logger, "log", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit):
        ppo(tmp_path / "again", total_episodes=16)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_worker_of_a_reward_function_ends_when_it_is_told_to(tmp_path):
    """A forked process shares handlers and lock: it does not note a signal, nor free the folder."""
    distributed.Interruption(torch.device("cpu"))
    lock, other = (filelock.FileLock(tmp_path / "run.lock", is_singleton=False) for _ in range(2))
    ready, told = os.pipe()
    with lock:
        child = os.fork()
        if not child:
            os.write(told, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGINT)  # Ctrl-C comes to it too: it goes on, or its pool would hang
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        with pytest.raises(filelock.Timeout):
            other.acquire(timeout=0)


# ---- numbers that are not finite


def in_training(*args) -> bool:
    return torch.is_grad_enabled()


def in_rollout(*args) -> bool:
    return not torch.is_grad_enabled()


def of_the_reference(*args) -> bool:
    models = [arg for arg in args if isinstance(arg, torch.nn.Module)]
    return in_rollout() and not any(p.requires_grad for m in models for p in m.parameters())


def of_a_learner(*args) -> bool:
    return in_rollout() and not of_the_reference(*args)


NAN, INF = float("nan"), float("inf")
QUANTITIES = [
    ("sft", "in_chunks", in_training, NAN, "nan in loss"),
    ("reward_model", "head_outputs", in_training, NAN, "nan in loss"),
    ("reward_model", "head_outputs", in_training, INF, "nan in gradient_norm"),  # loss: 0
    ("ppo", "last_token_scores", in_rollout, NAN, "nan in scores"),
    ("ppo", "in_chunks", of_a_learner, NAN, "nan in logprobs"),
    ("ppo", "in_chunks", of_the_reference, NAN, "nan in ref_logprobs"),
    ("ppo", "head_outputs", of_a_learner, NAN, "nan in values"),
    ("ppo", "in_chunks", in_training, NAN, "nan in loss/policy_avg"),
    ("ppo", "head_outputs", in_training, NAN, "nan in loss/value_avg"),
]


@pytest.mark.parametrize(("name", "function", "when", "value", "what"), QUANTITIES)
def test_what_is_not_finite_stops_before_the_step(
    request, whole, name, function, when, value, what, monkeypatch, error_of, tmp_path
):
    """The line says which quantity and where; no step is made of it, and --resume continues."""
    stage, out, steps = request.getfixturevalue(name), tmp_path / "out", []
    flags, step = FLAGS[name] | {"save_every": 2}, torch.optim.AdamW.step
    unit = "update" if name == "ppo" else "step"

    def spoil(result, *args):
        return torch.cat([result[:1] * value, result[1:]]) if when(*args) else result

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), step(self))[1])
        in_step(patch, 3, utils, function, spoil)
        line = error_of(stage, out, code=1, **flags)
    assert line.startswith(f"error: {unit} 3: {what}; ")
    assert len(metrics_of(out)) == 2
    assert len(steps) == (2 * 4 if name == "ppo" else 2)
    assert [path.name for path in utils.checkpoints(out)] == ["000002"]
    stage(out, **flags, resume=True)
    assert_same_records(whole(name), out)


# ---- damaged checkpoints and folders


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file around."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


DAMAGES = {
    "weight": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors: checksum"),
    "state": (lambda folder: flip(folder / "state.json"), "state.json: checksum differs"),
    "half": (lambda folder: os.truncate(folder / "optimizer.safetensors", 999), "optimizer.safete"),
    "missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no sums": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS"),
    "half sums": (lambda folder: os.truncate(folder / "SHA256SUMS", 30), "SHA256SUMS is cut"),
    "last sum": (lambda folder: cut_last_line(folder / "SHA256SUMS"), "SHA256SUMS is cut"),
    "empty sums": (lambda folder: os.truncate(folder / "SHA256SUMS", 0), "SHA256SUMS is cut"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(sft, copy, saved, damage, capsys):
    """It is named with what is wrong, and the one before is used: the result is the same."""
    harm, what = DAMAGES[damage]
    for name in ("000008", "000006"):
        harm(copy / "checkpoint" / name)
    capsys.readouterr()
    sft(copy, **SFT, resume=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert [Path(line.split(" ")[0]).name for line in lines] == ["000008", "000006"]
    assert all("is damaged (" in line and what in line for line in lines)
    assert_same_records(saved, copy)
    # made again, and whole
    assert [path.name for path in utils.checkpoints(copy)] == ["000008", "000006"]
    for path in utils.checkpoints(copy):
        (path / ".DS_Store").touch()  # no file of ours
        assert not saving.damage(path)


@pytest.mark.parametrize("damage", ["weight", "no sums"])
def test_damaged_checkpoints_are_no_reason_to_start_again(sft, copy, damage, error_of):
    """Where none is whole the code is 1, and they are left as they were."""
    for folder in utils.checkpoints(copy):
        DAMAGES[damage][0](folder)
    before = snapshot(copy)
    assert "none is whole" in error_of(sft, copy, **SFT, resume=True, code=1)
    changed = {"args.json": (copy / "args.json").read_bytes()}  # "resume"
    assert snapshot(copy) == before | changed


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum")
def test_checksums_are_those_of_sha256sum(saved):
    """Anybody can check a checkpoint without this code."""
    folder, command = saved / "checkpoint" / "000008", ["sha256sum", "--check", "--strict"]
    run = subprocess.run([*command, "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(": OK") == len(list(folder.iterdir())) - 1 > 2


@pytest.mark.parametrize("source", ["model", "dataset"])
def test_what_is_read_may_not_change(sft, base, data, source, error_of, tmp_path):
    """A model that was trained again, or a row that was added, would give another run."""
    model = shutil.copytree(base.plain, tmp_path / "model")
    rows = shutil.copytree(data.sft, tmp_path / "data")
    flags = {"model": str(model), "dataset": str(rows), "save_every": 4}
    out = sft(tmp_path / "out", **flags)
    if source == "model":
        tokenizer = encoding.load_tokenizer(base.plain)
        save_pair(model, make_model(tokenizer, seed=1), tokenizer)
    else:
        file = rows / "train.jsonl"
        file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    line = error_of(sft, out, **flags, resume=True)
    what = "AutoModelForCausalLM" if source == "model" else "train"
    assert line.startswith(f"error: {flags[source]} ({what}): is not what the run began with")
    sft(out, **flags, overwrite=True)
    sft(out, **flags, resume=True)


def test_a_reward_model_with_another_shift_is_another(models, tmp_path):
    """Of the same weights: its scores would move by the difference."""
    folder, digests = shutil.copytree(models.reward_model, tmp_path / "judge"), []
    for mean in (1.0, 2.0, 1.0):
        utils.load_classifier(change_config(folder, reward_mean=mean), torch.device("cpu"))
        digests.append({**utils.digests})
    assert digests[0] == digests[2] != digests[1]


def test_a_folder_that_was_only_begun(sft, saved, tmp_path):
    """Half an args.json and a lock that nobody holds are no run: it starts."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "args.json.part").write_text('{"model": "')
    (out / "run.lock").touch()
    sft(out, **SFT, resume=True)
    assert_same_records(saved, out)


def test_a_finished_run(sft, saved, copy, error_of):
    """Resumed, its last steps are made again, the same; without a checkpoint it is refused."""
    sft(copy, **SFT, resume=True)
    assert_same_records(saved, copy)
    shutil.rmtree(copy / "checkpoint")
    assert "is finished" in error_of(sft, copy, **SFT, resume=True)
    assert_same_records(saved, copy)


def test_overwrite_leaves_nothing_of_the_old_run(sft, saved, copy, monkeypatch, error_of):
    """An interrupted run does not look as if the old model were its own; its start is spared."""
    assert "--model" in error_of(sft, copy, model=str(copy), overwrite=True)
    assert_same_records(saved, copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    flags = SFT | {"seed": 2}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        in_step(patch, 3, *FORWARD, send(signal.SIGTERM))
        sft(copy, **flags, overwrite=True)
    names = {"args.json", "metrics.jsonl", "checkpoint", "run.lock"}
    assert {path.name for path in copy.iterdir() if "tfevents" not in path.name} == names
    sft(copy, **flags, resume=True)
    assert not (copy / "chat_template.jinja").exists()
    assert_board_has_metrics(copy, "step")
    assert not torch.equal(*(weights_of(out)["model.norm.weight"] for out in (copy, saved)))


# ---- full disks

MOVED = ["checkpoint/000004", "model.safetensors", "tokenizer.json", "config.json", "summary.json"]


@pytest.mark.parametrize("file", MOVED)
def test_a_checkpoint_or_a_model_is_whole_or_none(
    sft, saved, file, monkeypatch, error_of, tmp_path
):
    """Without space to move it into place: code 1, the step, no half file; --resume continues."""
    out, replace = tmp_path / "out", os.replace

    def full(part, path):
        if Path(path) == out / file:
            raise OSError(28, "No space left on device")
        replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = error_of(sft, out, **SFT, code=1)
    assert line.startswith("error: step ")
    assert "No space left" in line
    assert (out / "config.json").exists() == (file == "summary.json")
    sft(out, **SFT, resume=True)
    assert_same_records(saved, out)


def test_files_may_be_read_by_whom_the_umask_allows(ppo, tmp_path):
    """Also weights, which safetensors writes for their owner alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)  # which says nothing of the files in it
    before = os.umask(0o027)
    try:
        out = ppo(tmp_path / "out", **FLAGS["ppo"], keep_best=True)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert len([path for path in modes if path.suffix == ".safetensors"]) > 6
    assert {*modes.values()} == {0o640}


def test_a_disk_that_cannot_say_when_a_folder_is_written(tmp_path, monkeypatch):
    """As some shared folders: a file's own error still counts."""

    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    utils.sync(tmp_path)
    (file := tmp_path / "x").write_text("x")
    with pytest.raises(OSError, match="Invalid"):
        utils.sync(file)


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(kilobytes)`: a folder on a file system of that size."""
    mounted = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run(command, capture_output=True).returncode == 0:
                mounted.append(folder)
                return folder
        pytest.skip("needs the right to mount a file system")

    yield mount
    for folder in mounted:  # this process holds files in it
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_full_disk_leaves_the_last_checkpoint(sft, saved, small_disk, room, error_of, tmp_path):
    """Room for so many checkpoints of 400 kB, where four are needed at a time."""
    out = small_disk(400 * room + 200) / "out"
    line = error_of(sft, out, **SFT, keep_checkpoints=3, code=1)
    assert line.startswith("error: step ")
    assert "No space left" in line
    assert [int(path.name) for path in utils.checkpoints(out)] == [6, 4, 2][-room:]
    moved = Path(shutil.copytree(out, tmp_path / "roomy"))
    sft(moved, **SFT, resume=True)
    assert_same_records(saved, moved)


# TensorBoard's thread shows it too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kilobytes", [8, 12, 100, 160])
def test_a_disk_that_is_full_before_the_first_checkpoint(sft, small_disk, kilobytes, error_of):
    """No room for events, metrics or the model: one line, after what TensorBoard's thread shows."""
    out = small_disk(kilobytes) / "out"
    assert "No space left" in error_of(sft, out, batch_size=4, save_every=0, code=1)
    assert not (out / "config.json").exists()


# ---- two runs, one folder

HOLDER = """
import filelock, sys, time
with filelock.FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {}])
def test_a_second_run_on_a_folder_is_refused(sft, saved, copy, flags, error_of):
    """As long as the first one lives, be it new itself; after kill -9 its lock is no hindrance."""
    if not flags:  # both have found the folder free
        shutil.rmtree(copy)
        copy.mkdir()
    before = snapshot(copy)
    command = [sys.executable, "-c", HOLDER, str(copy / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"locked\n"
            line = error_of(sft, copy, **SFT, **flags)
        finally:
            first.kill()
    assert f"{copy}: is in use" in line
    assert snapshot(copy) == before | {"run.lock": b""}
    sft(copy, **SFT, **flags)
    assert_same_records(saved, copy)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_are_interrupted_together(whole, number, tmp_path):
    """torchrun passes a signal on to both: they stop at the same place, one saves; both resume."""
    out = tmp_path / "out"
    args = flags_of(whole("ppo")) | {"output_dir": str(out), "save_every": 0, "eval_every": 0}
    args |= {"save_rollouts": 0, "num_mini_batches": 1, "total_episodes": 8 * 200}
    command = [sys.executable, "-m", "torch.distributed.run", *STANDALONE]
    command += ["--nproc-per-node", "2", "ppo_rlhf.py", *words_of(args)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = 0
    for more in ([], ["--resume"]):
        with subprocess.Popen([*command, *more], cwd=ROOT, env=env, **pipes) as run:
            try:
                while run.poll() is None and not [*out.glob("metrics.jsonl")]:
                    time.sleep(0.1)
                while run.poll() is None and len(metrics_of(out)) <= done:
                    time.sleep(0.1)
                run.send_signal(number)
                _, stderr = run.communicate(timeout=60)
            finally:
                run.terminate()
        lines = [line for line in stderr.splitlines() if "interrupted" in line]
        assert len(lines) == 1, stderr
        kept = utils.checkpoints(out)[0]
        assert f"interrupted after update {int(kept.name)}; " in lines[0]
        assert not saving.damage(kept)
        assert len(metrics_of(out)) == int(kept.name) > done
        done = int(kept.name)


def words_of(args: dict) -> list[str]:
    """Flags as they stand on a command line."""
    words = []
    for name, value in args.items():
        if isinstance(value, bool):
            words += [utils.flag(name) if value else "--no-" + name.replace("_", "-")]
        elif value not in (None, []):
            words += [utils.flag(name), *map(str, value if isinstance(value, list) else [value])]
    return words
