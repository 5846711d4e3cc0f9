"""Nothing is lost: runs that are killed or interrupted, damaged checkpoints, full disks, two runs on one folder."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, metrics_of, weights_of
from safetensors.torch import load_file
from test_errors import error_line

import utils

STAGES = ["sft", "reward_model", "ppo"]
FLAGS = {  # with everything that has a state
    "sft": {"epochs": 1, "save_every": 2, "eval_every": 2, "micro_batch_size": 4},
    "reward_model": {"save_every": 2, "eval_every": 2, "micro_batch_size": 4},
    "ppo": {
        "total_episodes": 40,
        "save_every": 1,
        "eval_every": 2,
        "kl_target": 0.5,
        "kl_horizon": 20,
    }
    | {
        "save_rollouts": 1,
        "critic_warmup_updates": 1,
        "num_mini_batches": 2,
        "micro_batch_size": 2,
    },
}


def assert_same_records(a: Path, b: Path) -> None:
    """Weights, metrics, summary, samples and rollouts of two runs, to the bit; and nothing half-written is left."""
    assert_same_run(a, b)
    assert [*a.rglob("*.part")] == [*b.rglob("*.part")] == []
    assert {p.name for p in a.iterdir()} - {"metrics.jsonl"} >= {
        "model.safetensors",
        "args.json",
        "summary.json",
    }
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
    usual = [
        "args.json.part",
        None,
        "checkpoint/*.part",
        "metrics.jsonl.part",
        None,
        "checkpoint/*.part",
        "model.part",
    ]
    moments = dict.fromkeys(STAGES, usual) | {
        "ppo": ["rollouts/*.part", *usual, "samples.jsonl.part"]
    }
    plan = []
    for name in STAGES:
        args = json.loads((whole(name) / "args.json").read_text()) | {
            "output_dir": str(tmp_path / name)
        }
        module = "ppo_rlhf" if name == "ppo" else name
        plan.append({"module": module, "flags": args, "moments": moments[name], "seconds": 0.7})
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / "tests" / "kill_runs.py"), str(tmp_path / "plan.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr + "".join(
        p.read_text()[-2000:] for p in tmp_path.glob("*.log")
    )
    kills = [int(line.split()[1]) for line in run.stdout.splitlines()]
    assert kills == [len(moments[name]) for name in STAGES]
    for name in STAGES:
        assert_same_records(whole(name), tmp_path / name)
        assert "error:" not in (tmp_path / f"{name}.log").read_text()


# ------------------------------------------------------------------------------------------------------------- signals


def send_at(monkeypatch, moment: str, after: int, number: int) -> None:
    """Let this process get a signal once, at a moment in the step or update after the one of this number."""
    logged, sent = [0], []

    def send() -> None:
        if logged[-1] == after and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    def sending(function, when=lambda: True):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            if when():
                send()
            return result

        return wrapped

    log = utils.Logger.log
    monkeypatch.setattr(
        utils.Logger, "log", lambda self, step, row: (logged.append(step), log(self, step, row))[1]
    )
    where, name = {
        "forward": (utils, "map_logits"),  # the policy's log-probabilities, in PPO of the rollout
        "generation": (utils, "generate"),
        "scoring": (utils, "last_token_scores"),
        "backward": (torch.Tensor, "backward"),
        "step": (torch.optim.AdamW, "step"),
    }[moment]
    monkeypatch.setattr(where, name, sending(getattr(where, name)))


@pytest.mark.parametrize(
    ("name", "moment", "after", "saved"),
    [
        ("sft", "forward", 3, 3),
        ("sft", "step", 3, 4),
        ("sft", "backward", 0, 0),
        ("reward_model", "backward", 3, 3),
        ("reward_model", "scoring", 4, 4),
        ("ppo", "generation", 2, 2),
        ("ppo", "forward", 2, 2),
        ("ppo", "scoring", 2, 2),
        ("ppo", "backward", 2, 2),
        ("ppo", "step", 2, 3),  # then the update is finished first
        ("ppo", "backward", 0, 0),
    ],
)
def test_a_signal_saves_and_resume_goes_on_exactly(
    request, whole, name, moment, after, saved, monkeypatch, capfd, tmp_path
):
    """SIGTERM and Ctrl-C, with --save-every 0: the last whole step is saved and named; the code is 128 + the number."""
    number = (signal.SIGTERM, signal.SIGINT)[after % 2]
    stage, flags, out = (
        request.getfixturevalue(name),
        FLAGS[name] | {"save_every": 0},
        tmp_path / "out",
    )
    expected = whole(name)
    before = signal.getsignal(number)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        send_at(patch, moment, after, number)
        with pytest.raises(SystemExit) as exit_:
            stage(out, **flags)
    assert exit_.value.code == 128 + number
    lines = [line for line in capfd.readouterr().err.splitlines() if "interrupted" in line]
    step_name = "update" if name == "ppo" else "step"
    assert lines == [
        f"interrupted after {step_name} {saved}: the same flags with --resume go on from there"
    ]
    assert [int(path.name) for path in utils.checkpoints(out)] == ([saved] if saved else [])
    assert len(metrics_of(out)) == saved
    assert not (out / "run.lock").exists()
    assert signal.getsignal(number) == before
    stage(out, **flags, resume=True)
    assert_same_records(expected, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_quits_at_once(number, monkeypatch, capfd):
    """The first is noted, the second is not waited for; before training the first one quits."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    process = utils.start_process("cpu", 1)
    try:
        with pytest.raises(SystemExit) as exit_:
            os.kill(os.getpid(), number)
        assert exit_.value.code == 128 + number
        interruption = utils.Interruption(process)
        assert not interruption.here()
        os.kill(os.getpid(), number)
        assert interruption.here()
        assert interruption.anywhere()
        assert capfd.readouterr().err.count("quit at once") == 1
        with pytest.raises(SystemExit) as exit_:
            os.kill(os.getpid(), number)
        assert exit_.value.code == 128 + number
        assert capfd.readouterr().err.count("quit at once") == 1
    finally:
        utils.end_process()


def test_a_worker_of_a_reward_function_ends_when_it_is_told_to(tmp_path):
    """A forked process shares handlers and lock with the run: it must neither note a signal only nor unlock the run."""
    utils.lock_output(tmp_path)
    utils.Interruption(utils.start_process("cpu", 1))
    try:
        ready, told = os.pipe()
        child = os.fork()
        if not child:
            os.write(told, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        assert (tmp_path / "run.lock").exists()
    finally:
        utils.end_process()
    assert not (tmp_path / "run.lock").exists()


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file around."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a byte of a weight": (
        lambda folder: flip(folder / "model.safetensors"),
        "model.safetensors: checksum differs",
    ),
    "a byte of the state": (
        lambda folder: flip(folder / "state.json"),
        "state.json: checksum differs",
    ),
    "half a file": (
        lambda folder: os.truncate(folder / "optimizer.safetensors", 999),
        "optimizer.safetensors: checksum",
    ),
    "a missing file": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors: is missing",
    ),
    "no checksums": (lambda folder: (folder / "SHA256SUMS").unlink(), "SHA256SUMS: is missing"),
    "empty checksums": (
        lambda folder: os.truncate(folder / "SHA256SUMS", 0),
        "model.safetensors: checksum differs",
    ),
}


@pytest.fixture(scope="module")
def saved(sft, tmp_path_factory) -> Path:
    """A run of sft.py with the checkpoints 2, 4, 6 and 8."""
    return sft(tmp_path_factory.mktemp("saved") / "out", **FLAGS["sft"] | {"keep_checkpoints": 4})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(sft, saved, damage, capsys, tmp_path):
    """It is named with what is wrong, and the one before is used: the result is the same."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    harm, what = DAMAGES[damage]
    for name in ("000008", "000006"):
        harm(out / "checkpoint" / name)
    capsys.readouterr()
    sft(out, **FLAGS["sft"], resume=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "is damaged" in line]
    assert [line.split(" ")[0] for line in lines] == ["checkpoint/000008", "checkpoint/000006"]
    assert all(
        f"is damaged ({what}" in line and line.endswith("going on from checkpoint/000004")
        for line in lines
    )
    assert_same_records(saved, out)
    assert [path.name for path in utils.checkpoints(out)] == [
        "000008",
        "000006",
    ]  # made again, and whole
    assert not any(utils.damage(path, {"model": None}) for path in utils.checkpoints(out))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_alone_are_no_reason_to_start_again(
    sft, saved, damage, capsys, tmp_path
):
    """Exit code 1, what is wrong with each, and everything left as it was."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    harm, what = DAMAGES[damage]
    for folder in (out / "checkpoint").iterdir():
        harm(folder)
    before = {
        path: path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "args.json"
    }
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        sft(out, **FLAGS["sft"], resume=True)
    utils.unlock_output()  # which the end of the process does
    line = error_line(capsys.readouterr().err)
    assert exit_.value.code == 1
    assert "no checkpoint is whole" in line
    assert line.count(what) == 4
    assert {
        path: path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "args.json"
    } == before


def test_a_checkpoint_of_another_model_is_refused(sft, base, saved, capsys, tmp_path):
    """The folder that --model names may hold another model by now; one line says so."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    (out / "args.json").write_text("{}")  # as if the flags were the same
    with pytest.raises(SystemExit) as exit_:
        sft(out, **FLAGS["sft"], model=base.other, resume=True)
    assert exit_.value.code == 2
    assert f"{out / 'checkpoint' / '000008'}: does not fit" in error_line(capsys.readouterr().err)


def test_checksums_are_those_of_sha256sum(saved):
    """Anybody can check a checkpoint without this code."""
    folder = saved / "checkpoint" / "000008"
    run = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(": OK") == len(list(folder.iterdir())) - 1 == 3


# ------------------------------------------------------------------------------------------------- files half written


def test_args_json_half_written(sft, saved, capsys, tmp_path):
    """Where nothing has been saved yet the run starts; where something has, the flags cannot be compared: it stops."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "args.json.part").write_text('{"model": "')
    (out / "run.lock").write_text(f"999999999 {socket.gethostname()}\n")
    sft(out, **FLAGS["sft"], resume=True)
    assert_same_records(saved, out)
    (out / "args.json").write_text('{"model": "')
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        sft(out, **FLAGS["sft"], resume=True)
    assert exit_.value.code == 2
    assert "args.json: is illegible" in error_line(capsys.readouterr().err)
    (out / "args.json").write_text("{}")  # as the line says
    sft(out, **FLAGS["sft"], resume=True)
    assert_same_records(saved, out)
    shutil.rmtree(out / "checkpoint")
    (out / "summary.json").unlink()
    (out / "args.json").write_text("")
    sft(out, **FLAGS["sft"], resume=True)
    assert_same_records(saved, out)


def test_a_finished_run_without_checkpoints_is_not_begun_again(sft, saved, capsys, tmp_path):
    """Its model would be replaced by hours of work that have been done already."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    shutil.rmtree(out / "checkpoint")
    with pytest.raises(SystemExit) as exit_:
        sft(out, **FLAGS["sft"], resume=True)
    assert exit_.value.code == 2
    assert "is finished" in error_line(capsys.readouterr().err)
    assert_same_records(saved, out)


@pytest.mark.parametrize("failing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_model_is_whole_or_none(sft, saved, failing, monkeypatch, capsys, tmp_path):
    """Stopped while the model is moved into place, the folder is no model yet, and no file in it is a half."""
    out, replace = tmp_path / "out", os.replace

    def full(part, path):
        if Path(path) == out / failing:
            raise OSError(28, "No space left on device")
        replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(SystemExit) as exit_:
            sft(out, **FLAGS["sft"])
    assert exit_.value.code == 1
    assert "No space left" in error_line(capsys.readouterr().err)
    assert not (out / "config.json").exists()
    assert not (out / "model.part").exists()
    sft(out, **FLAGS["sft"], resume=True)
    assert_same_records(saved, out)


def test_overwrite_leaves_no_old_model(sft, saved, monkeypatch, tmp_path):
    """A run that replaces another and does not end must not look as if the old model were its own."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    (out / "chat_template.jinja").write_text("{{ messages }}")
    with monkeypatch.context() as patch:
        send_at(patch, "forward", 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            sft(out, **FLAGS["sft"] | {"seed": 2}, overwrite=True)
    assert {path.name for path in out.iterdir() if "tfevents" not in path.name} == {
        "args.json",
        "metrics.jsonl",
        "checkpoint",
    }
    sft(out, **FLAGS["sft"] | {"seed": 2}, resume=True)
    assert not (out / "chat_template.jinja").exists()
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights_of(out).values(), weights_of(saved).values(), strict=True)
    )


def test_overwrite_spares_the_model_that_the_run_starts_from(sft, saved, capsys, tmp_path):
    """Training in place would delete its own start."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    with pytest.raises(SystemExit) as exit_:
        sft(out, model=str(out), overwrite=True)
    assert exit_.value.code == 2
    assert "--model" in error_line(capsys.readouterr().err)
    assert_same_records(saved, out)


# -------------------------------------------------------------------------------------------------------- full disks


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
    for folder in mounted:
        subprocess.run(
            ["umount", "--lazy", str(folder)], check=True
        )  # this process holds files in it


@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_full_disk_leaves_the_last_checkpoint(sft, saved, small_disk, room, capfd, tmp_path):
    """Room for so many checkpoints of 400 kB, where four are needed at a time: one line, and what there is stands."""
    out = small_disk(400 * room + 200) / "out"
    with pytest.raises(SystemExit) as exit_:
        sft(out, **FLAGS["sft"] | {"keep_checkpoints": 3})
    line = error_line(capfd.readouterr().err)
    assert exit_.value.code == 1
    assert "cannot be written" in line
    assert "No space left" in line
    utils.unlock_output()
    assert [int(path.name) for path in utils.checkpoints(out)] == [6, 4, 2][-room:]
    assert not [*out.rglob("*.part")]
    moved = Path(shutil.copytree(out, tmp_path / "roomy"))
    sft(moved, **FLAGS["sft"], resume=True)
    assert_same_records(saved, moved)


@pytest.mark.parametrize("kilobytes", [8, 12, 16, 100, 160])
def test_a_disk_that_is_full_before_the_first_checkpoint(sft, small_disk, kilobytes, capfd):
    """No room for events, metrics or the model: one line, and no traceback of the thread that writes events."""
    out = small_disk(kilobytes) / "out"
    with pytest.raises(SystemExit) as exit_:
        sft(out, batch_size=4, micro_batch_size=4, save_every=0)
    assert exit_.value.code == 1
    assert "No space left" in error_line(capfd.readouterr().err)
    assert not (out / "config.json").exists()


# ------------------------------------------------------------------------------------------------ two runs, one folder

HOLDER = """
import fcntl, os, socket, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()} {socket.gethostname()}")
file.flush()
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_run_on_a_folder_is_refused(sft, saved, flags, capsys, tmp_path):
    """As long as the first one lives; after kill -9 its lock is no hindrance."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    command = [sys.executable, "-c", HOLDER, str(out / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"locked\n"
            with pytest.raises(SystemExit) as exit_:
                sft(out, **FLAGS["sft"], **flags)
        finally:
            first.kill()
    line = error_line(capsys.readouterr().err)
    assert exit_.value.code == 2
    assert f"{out}: is in use by process {first.pid} on {socket.gethostname()}" in line
    assert (out / "summary.json").exists()
    if flags:
        sft(out, **FLAGS["sft"], **flags)
        assert_same_records(saved, out)
        assert not (out / "run.lock").exists()


def test_the_lock_is_taken_where_two_start_at_once(sft, monkeypatch, capsys, tmp_path):
    """Both have found the folder free; the second finds it locked when it opens it."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(utils, "check_output", lambda args: out.mkdir(exist_ok=True))
        command = [sys.executable, "-c", HOLDER, str(out / "run.lock")]
        out.mkdir()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
            try:
                assert first.stdout.readline() == b"locked\n"
                with pytest.raises(SystemExit) as exit_:
                    sft(out)
            finally:
                first.kill()
    assert exit_.value.code == 2
    assert f"process {first.pid}" in error_line(capsys.readouterr().err)
    assert [path.name for path in out.iterdir()] == ["run.lock"]


def test_a_lock_of_another_host_stands(tmp_path, capsys):
    """Whether that process lives cannot be seen from here; the line says what to remove if it does not."""
    (tmp_path / "run.lock").write_text("12 elsewhere\n")
    with pytest.raises(SystemExit) as exit_:
        utils.lock_output(tmp_path)
    assert exit_.value.code == 2
    line = error_line(capsys.readouterr().err)
    assert "process 12 on elsewhere" in line
    assert str(tmp_path / "run.lock") in line


def test_a_folder_without_locks_goes_by_the_process(tmp_path, monkeypatch, capsys):
    """A network folder may refuse flock: then a process that is there keeps others out, one that is gone does not."""

    def flock(file, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(utils.fcntl, "flock", flock)
    (tmp_path / "run.lock").write_text(f"{os.getppid()} {socket.gethostname()}\n")
    with pytest.raises(SystemExit):
        utils.lock_output(tmp_path)
    assert f"process {os.getppid()}" in error_line(capsys.readouterr().err)
    (tmp_path / "run.lock").write_text(f"999999999 {socket.gethostname()}\n")
    utils.lock_output(tmp_path)
    assert (tmp_path / "run.lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    utils.unlock_output()
    assert not (tmp_path / "run.lock").exists()


# ---------------------------------------------------------------------------------------------- numbers gone astray


def debug_of(out: Path) -> tuple[dict, dict]:
    """What was saved of the batch that spoiled a run: the JSON and the tensors."""
    (path,) = (out / "debug").glob("*.json")
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def spoil(
    monkeypatch, function: str, after: int, when=lambda: True, value: float = float("nan")
) -> None:
    """Let what a function of utils gives hold NaN, or another value, in the step or update after this number."""
    logged, log, original = [0], utils.Logger.log, getattr(utils, function)

    def spoiled(*args):
        result = original(*args)
        if logged[-1] != after or not when():
            return result
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = torch.cat([first[:1] * value, first[1:]])
        return (first, *rest) if rest else first

    monkeypatch.setattr(
        utils.Logger, "log", lambda self, step, row: (logged.append(step), log(self, step, row))[1]
    )
    monkeypatch.setattr(utils, function, spoiled)


@pytest.mark.parametrize(
    ("name", "function", "in_training", "value", "quantity"),
    [
        ("sft", "map_logits", True, float("nan"), "nan in the loss"),
        ("reward_model", "last_token_scores", True, float("nan"), "nan in the loss"),
        (
            "reward_model",
            "last_token_scores",
            True,
            float("inf"),
            "nan in the gradient norm",
        ),  # the loss is 0
        ("ppo", "last_token_scores", False, float("nan"), "nan in the scores"),
        ("ppo", "map_logits", False, float("nan"), "nan in the logprobs"),
        ("ppo", "head_outputs", False, float("nan"), "nan in the values"),
        ("ppo", "map_logits", True, float("nan"), "nan in the policy_loss"),
        ("ppo", "head_outputs", True, float("nan"), "nan in the value_loss"),
    ],
)
def test_what_is_not_finite_stops_before_the_step(
    request, name, function, in_training, value, quantity, monkeypatch, capsys, tmp_path
):
    """The line says which quantity and where, the batch is kept, and no optimizer step is made of it."""
    stage, out, steps = request.getfixturevalue(name), tmp_path / "out", []
    step = torch.optim.AdamW.step
    flags = {"save_every": 2} | (
        {"total_episodes": 40, "num_ppo_epochs": 1} if name == "ppo" else {}
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), step(self))[1])
        spoil(patch, function, 2, lambda: torch.is_grad_enabled() == in_training, value)
        with pytest.raises(SystemExit) as exit_:
            stage(out, **flags)
    assert exit_.value.code == 1
    where = "update 3" if name == "ppo" else "step 3"
    line = error_line(capsys.readouterr().err)
    assert line.startswith(f"error: {where}: {quantity}; ")
    assert len(steps) == len(metrics_of(out)) == 2
    assert [path.name for path in utils.checkpoints(out)] == ["000002"]
    description, batch = debug_of(out)
    assert description == {"where": where, "what": quantity, "process": 0}
    if name == "sft":
        assert len(batch["prompt_lengths"]) == len(batch["ids_lengths"]) == 16
        assert batch["ids_lengths"].sum() == len(batch["ids"])
    elif name == "reward_model":
        assert len(batch["chosen_lengths"]) == len(batch["rejected_lengths"]) == 16
    else:
        assert batch["ids"].shape == batch["mask"].shape
        assert (
            batch["response_mask"].shape
            == batch["logprobs"].shape
            == batch["values"].shape
            == (8, 10)
        )
        assert batch["scores"].shape == (8,)
    stage(out, **flags, resume=True)
    assert_same_run(out, stage(tmp_path / "whole", **flags))


def test_what_is_not_finite_is_saved_where_it_can_be(monkeypatch, capsys, tmp_path):
    """On a full disk the quantity is reported all the same."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.safetensors.torch, "save_file", full)
    process = utils.Process(0, 1, torch.device("cpu"))
    utils.check_finite(tmp_path, process, "step 1", {"loss": 1.0}, {})
    with pytest.raises(SystemExit) as exit_:
        utils.check_finite(
            tmp_path, process, "step 1", {"loss": float("-inf")}, {"ids": torch.zeros(2)}
        )
    assert exit_.value.code == 1
    assert "step 1: -inf in the loss;" in error_line(capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------- reward functions


def each(prompts, completions):
    """A function that fails on a prompt."""
    return [float(score_one(p, c)) for p, c in zip(prompts, completions, strict=True)]


def score_one(prompt, completion):
    if prompt == "second":
        raise ValueError("no luck")
    return 1


def whole_batch(prompts, completions):
    """A function that fails on all at once."""
    raise ValueError("no luck")


@pytest.mark.parametrize(
    ("function", "place"),
    [(each, "at the prompt 'second'"), (whole_batch, "for 3 prompts, 'first' first")],
)
@pytest.mark.parametrize(("update", "code"), [(0, 2), (7, 1)])
def test_the_prompt_that_a_reward_function_fails_on(function, place, update, code, capsys):
    """It is named where the function's variables tell; else the batch, by its first prompt."""
    with pytest.raises(SystemExit) as exit_:
        utils.call_reward_function(
            function, "--reward-fn", ["first", "second", "third"], list("abc"), [{}] * 3, update
        )
    assert exit_.value.code == code
    line = error_line(capsys.readouterr().err)
    assert f"--reward-fn: raised ValueError: no luck, {place}; " in line
    assert line.startswith("error: update 7:") == (update == 7)


@pytest.mark.parametrize(("update", "code"), [(0, 2), (7, 1)])
def test_a_reward_function_that_takes_too_long(update, code, monkeypatch, capsys):
    """The process ends from another thread; a function that is quick enough is left alone, and stays in its thread."""
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)

    def slow(prompts, completions):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # works in the main thread alone
        time.sleep(0.5)
        return [1.0] * len(prompts)

    args = slow, "--reward-fn", ["first", "second"], ["a", "b"], [{}, {}], update
    assert (
        utils.call_reward_function(*args, 30.0) == utils.call_reward_function(*args) == [1.0, 1.0]
    )
    assert ends == []
    utils.call_reward_function(*args, 0.1)
    assert ends == [code]
    line = error_line(capsys.readouterr().err)
    assert "--reward-fn: has not returned 2 scores, 'first' first, within 0.1 seconds; " in line
    assert line.startswith("error: update 7:") == (update == 7)


# ------------------------------------------------------------------------------------------------------- as one runs it


def words_of(args: dict) -> list[str]:
    """Flags as they stand on a command line."""
    words = []
    for name, value in args.items():
        if isinstance(value, bool):
            words += [utils.flag(name) if value else "--no-" + name.replace("_", "-")]
        elif value is not None:
            words += [utils.flag(name), str(value)]
    return words


@pytest.mark.slow
def test_a_reward_function_that_hangs_ends_the_run(whole, tmp_path):
    """The script itself, with a function that never returns: it exits, with code 1 and one line, and can be resumed."""
    (tmp_path / "f.py").write_text(
        "import os, time\n"
        "def f(prompts, completions, **columns):\n"
        "    if os.path.exists(__file__ + '.hang'):\n"
        "        time.sleep(1000)\n"
        "    if len(prompts) == 8:\n"
        "        open(__file__ + '.hang', 'w').close()\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    args = json.loads((whole("ppo") / "args.json").read_text()) | {
        "output_dir": str(tmp_path / "out")
    }
    args |= {"reward_fn": f"{tmp_path}/f.py:f", "reward_timeout": 2.0, "eval_every": 0}
    command = [sys.executable, "ppo_rlhf.py", *words_of(args)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "error: update 2: " in error_line(run.stderr)
    assert "within 2 seconds" in run.stderr
    assert [path.name for path in utils.checkpoints(tmp_path / "out")] == ["000001"]
    assert not (tmp_path / "out" / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_are_interrupted_together(whole, number, tmp_path):
    """torchrun passes a signal on to both: they stop at the same place, one saves, and --resume goes on."""
    args = json.loads((whole("ppo") / "args.json").read_text())
    args |= {
        "output_dir": str(tmp_path / "out"),
        "save_every": 0,
        "total_episodes": 8 * 200,
        "eval_every": 0,
    }
    args |= {"save_rollouts": 0, "num_mini_batches": 1}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "ppo_rlhf.py",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *words_of(args)], cwd=ROOT, env=environment, **pipes) as run:
        try:
            while run.poll() is None and not (
                (tmp_path / "out/metrics.jsonl").exists() and metrics_of(tmp_path / "out")
            ):
                time.sleep(0.1)
            run.send_signal(number)
            _, stderr = run.communicate(timeout=60)
        finally:
            run.terminate()
    lines = [line for line in stderr.splitlines() if "interrupted" in line]
    assert len(lines) == 1, stderr
    (saved,) = utils.checkpoints(tmp_path / "out")
    assert f"interrupted after update {int(saved.name)}: " in lines[0]
    assert not utils.damage(saved, {"policy": None, "value_model": None})
    assert len(metrics_of(tmp_path / "out")) == int(saved.name) > 0
    assert not (tmp_path / "out" / "run.lock").exists()


def test_a_run_of_before_a_flag_was_there_goes_on(sft, saved, tmp_path):
    """The flag's value then cannot be known, so any is taken."""
    out = Path(shutil.copytree(saved, tmp_path / "out"))
    flags = json.loads((out / "args.json").read_text())
    del flags["compile"]
    (out / "args.json").write_text(json.dumps(flags))
    sft(out, **FLAGS["sft"], resume=True)
    assert_same_run(out, saved)
