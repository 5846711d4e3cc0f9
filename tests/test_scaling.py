"""What torchrun does to a run: it starts it again after a kill, ends it where one process fails,
and spreads it over machines; what --fsdp leaves to each process. All on the CPU, by gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    STANDALONE,
    assert_same_run,
    make_model,
    metrics_of,
    prompt_rows,
    weights_of,
    write_data,
)

import distributed
import encoding
import utils

pytestmark = pytest.mark.slow


def torchrun(*words: str, cwd: Path = ROOT) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=cwd, **pipes)


def finished(process: subprocess.Popen, seconds: float = 150) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; nothing is left running."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        process.terminate()
        process.wait(40)
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def words(models, tmp_path_factory) -> list[str]:
    """Flags of a run of six updates, without the output folder."""
    data = write_data(tmp_path_factory.mktemp("prompts"), prompt_rows(), 4)
    flags = {"model": models.sft, "reward_model": models.reward_model, "dataset": data}
    flags |= {"device": "cpu", "dtype": "float32", "batch_size": 8, "micro_batch_size": 2}
    flags |= {"total_episodes": 48, "num_ppo_epochs": 1, "response_length": 10, "eval_prompts": 4}
    flags |= {"save_every": 1, "eval_every": 0, "learning_rate": 1e-3, "keep_checkpoints": 9}
    return [word for name, x in flags.items() for word in (utils.flag(name), str(x))]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Path:
    """The run by one process without torchrun."""
    out = tmp_path_factory.mktemp("alone") / "out"
    command = [sys.executable, "ppo_rlhf.py", *words, "--output-dir", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


def wait_for(path: Path, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"{path} does not come"
        time.sleep(0.01)


def workers(agent: int) -> dict[int, int]:
    """Process ids of a torchrun's workers, by rank."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, where they are listed")
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        facts = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [fact[5:] for fact in facts if fact.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0])] = int(child)
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--fsdp"]])
def test_a_killed_process_loses_nothing(words, alone, tmp_path, rank, more):
    """torchrun starts the group again, which goes on from the last checkpoint, whatever its flags;
    what another run left in the folder is not taken for it."""
    out = tmp_path / "out"
    if more == ["--overwrite"]:
        (out / "checkpoint").mkdir(parents=True)
        (out / "args.json").write_text(json.dumps({"stage": "ppo_rlhf", "seed": 7}))
    given = ["ppo_rlhf.py", *words, *more, "--output-dir", str(out)]
    run = torchrun(*STANDALONE, "--nproc-per-node", "2", "--max-restarts", "2", *given)
    wait_for(out / "checkpoint" / "000002")
    os.kill(workers(run.pid)[rank], signal.SIGKILL)
    code, stdout, stderr = finished(run)
    assert code == 0, stderr[-3000:]
    assert_same_run(alone, out, tolerance=1e-4)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert stdout.count("ppo_rlhf: wins") == 1


def test_the_first_start_does_not_resume_what_is_there(tmp_path, monkeypatch):
    """A group that starts again resumes its own run only: --overwrite still holds for another's."""
    from ppo_rlhf import Args

    alone = distributed.Process(0, 1, torch.device("cpu"))
    monkeypatch.setattr(distributed, "join", lambda device: alone)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/a_x1y2/attempt_0/0/error.json")
    first = distributed.launch()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/a_x1y2/attempt_1/0/error.json")
    (tmp_path / "checkpoint").mkdir()
    for launch, resumes in ((first, True), ("another", False), (None, False)):
        facts = {"stage": "ppo_rlhf", "launch": launch}
        (tmp_path / "args.json").write_text(json.dumps(facts))
        args = Args(output_dir=str(tmp_path), overwrite=True, device="cpu")
        args, _ = utils.start_process(args)
        assert (args.resume, args.overwrite) == (resumes, not resumes)


@pytest.mark.parametrize("fsdp", [[], ["--fsdp"]])
def test_one_that_fails_ends_all_with_its_line(words, tmp_path, fsdp):
    """Within 30 seconds; the others say only that it has ended."""
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import os\n"
        "def score(prompts, completions, **columns):\n"
        "    if os.environ['RANK'] == '1' and os.path.exists(os.environ['HOME_OF'] + '/000001'):\n"
        "        raise ValueError('no more')\n"
        "    return [0.0] * len(prompts)\n"
    )
    out = tmp_path / "out"
    os.environ["HOME_OF"] = str(out / "checkpoint")
    given = ["ppo_rlhf.py", *words, *fsdp, "--reward-fn", f"{judge}:score"]
    run = torchrun(*STANDALONE, "--nproc-per-node", "2", *given, "--output-dir", str(out))
    wait_for(out / "checkpoint" / "000001")
    started = time.monotonic()
    code, _, stderr = finished(run, 60)
    assert code != 0
    assert time.monotonic() - started < 30
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert sum("raised ValueError: no more" in line for line in lines) == 1, stderr
    others = [line for line in lines if "no more" not in line]
    assert all("another process has ended" in line for line in others), others
    assert len(lines) <= 2
    # torchrun's own report has no traceback of ours
    assert 'ppo_rlhf.py", line' not in stderr


SAVING = ["--fsdp", "--cpu-offload", "--gradient-checkpointing"]


@pytest.mark.parametrize("more", [SAVING, ["--gradient-checkpointing"], ["--compile"]])
def test_what_goes_with_several_processes(words, alone, tmp_path, more):
    """The result is that of one process without these flags."""
    given = ["ppo_rlhf.py", *words, *more, "--output-dir", str(tmp_path / "out")]
    code, _, stderr = finished(torchrun(*STANDALONE, "--nproc-per-node", "2", *given), 300)
    assert code == 0, stderr[-3000:]
    assert_same_run(alone, tmp_path / "out", tolerance=1e-4)
    assert "Warning" not in stderr


def test_shards_in_bfloat16(words, tmp_path):
    """Rollout and training round alike, policy and reference too: ratio 1 and KL 0 at the start."""
    given = [*words, "--fsdp", "--dtype", "bfloat16", "--output-dir", str(tmp_path / "out")]
    run = torchrun(*STANDALONE, "--nproc-per-node", "2", "ppo_rlhf.py", *given)
    code, _, stderr = finished(run)
    assert code == 0, stderr[-3000:]
    rows = metrics_of(tmp_path / "out")
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert all(row["val/ratio_start_error"] < 1e-4 for row in rows)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"fsdp": True}, "--fsdp: shards models over processes; start it by torchrun"),
        ({"cpu_offload": True}, "--cpu-offload: goes with --fsdp; pass both or neither"),
    ],
)
def test_sharding_alone_is_refused(ppo, error_of, tmp_path, flags, line):
    assert line in error_of(ppo, tmp_path / "out", **flags)


@pytest.mark.parametrize("name", ["lora_rank", "compile"])
def test_what_sharding_does_not_go_with_is_refused(ppo, error_of, monkeypatch, tmp_path, name):
    alone = distributed.Process(0, 1, torch.device("cpu"))
    monkeypatch.setattr(distributed, "join", lambda device: alone)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    line = error_of(ppo, tmp_path / "out", fsdp=True, **{name: 1})
    assert f"--fsdp: does not go with {utils.flag(name)}; leave one out" in line


@pytest.mark.parametrize("killed", [False, True])
def test_two_machines(words, alone, monkeypatch, tmp_path, killed):
    """Two torchruns that meet on the loopback, with one output folder, as it must be.

    Where a process of one is killed, both start theirs again.
    """
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    meet += [
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--rdzv-id",
        "two",
        "--local-addr",
        "127.0.0.1",
    ]
    given = ["ppo_rlhf.py", *words, "--output-dir", str(tmp_path / "out")]
    runs = [torchrun(*meet, "--max-restarts", "2", *given) for _ in range(2)]
    if killed:
        wait_for(tmp_path / "out" / "checkpoint" / "000002")
        os.kill([*workers(runs[1].pid).values()][0], signal.SIGKILL)
    results = [finished(run) for run in runs]
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-2000:] + results[1][2][-2000:]
    assert_same_run(alone, tmp_path / "out", tolerance=1e-4)


def test_shards_are_resumed_by_more_or_fewer_processes(words, alone, tmp_path):
    """Two write them, one goes on and then four; the result is an ordinary folder."""
    out = tmp_path / "out"
    given = ["ppo_rlhf.py", *words, "--fsdp", "--output-dir", str(out)]
    for processes, update in ((2, 1), (1, 3), (4, None)):
        resume = ["--resume"] if processes != 2 else []
        run = torchrun(*STANDALONE, "--nproc-per-node", str(processes), *given, *resume)
        if update:
            wait_for(out / "checkpoint" / f"{update:06d}")
            run.send_signal(signal.SIGTERM)
        code, _, stderr = finished(run)
        assert (code == 0) == (update is None), stderr[-3000:]
    assert_same_run(alone, out, tolerance=1e-4)
    shards = out / "checkpoint" / "000002" / "shards"
    files = [*shards.iterdir()]
    assert {path.suffix for path in files} == {".safetensors"}, "a pickle may run code"
    assert weights_of(out).keys() == weights_of(alone).keys()


def test_a_sharded_checkpoint_is_no_model(error_of, tmp_path):
    (tmp_path / "shards").mkdir()
    line = error_of(lambda: encoding.load_tokenizer(str(tmp_path)))
    assert "holds no model; run the stage that makes it" in line


DRIVER = """
import json, sys
import torch, transformers
import distributed, generate, utils
torch.set_num_threads(1)
device = torch.device("cpu")
process = distributed.join(device)
folder, how = sys.argv[1:]
model = utils.load_causal_lm(folder, device)
weights = sum(p.numel() for p in model.parameters())
calls = []
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group
if how == "shard":
    distributed.shard(model, device, "float32")
    gather = group.foreach_all_gather
    group.foreach_all_gather = lambda *a, **k: calls.append("gather") or gather(*a, **k)
else:
    distributed.replicate(model)


def held(tensors):
    return sum(getattr(x, "to_local", lambda x=x: x)().numel() for x in tensors)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.arange(24).view(4, 6) + 2

@distributed.forward_pass
def loss(model, ids):
    return utils.logits_of(model, utils.hidden_states(model, ids)).log_softmax(-1)[..., 3].sum()

report = {"weights": weights, "own": held(model.parameters())}
for step in range(2):
    for part in distributed.sums_in_last([ids[:2], ids[2:]], [model]):
        loss(model, part).backward()
    grads = [p.grad for p in model.parameters()]
    if how == "replicate":
        report["storages"] = len({g.untyped_storage().data_ptr() for g in grads})
        report["bytes"] = sum({g.untyped_storage().data_ptr(): g.untyped_storage().nbytes()
                               for g in grads}.values())
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
moments = [x for s in optimizer.state.values() for k, x in s.items() if k != "step"]
report["moments"] = held(moments)
calls.clear()
uniform = generate.random_numbers(4, 12, torch.Generator().manual_seed(1))
generate.generate(model, ids, torch.ones_like(ids), uniform, [1], pad_id=0)
parts = vars(model)["across"].modules()
report["gathers"], report["units"] = len(calls), sum(map(distributed.is_shard, parts))
report["left"] = held(model.parameters())
json.dump(report, open(f"{folder}/{how}{process.rank}.json", "w"))
distributed.depart()
"""


@pytest.fixture(scope="module")
def reports(tokenizer, tmp_path_factory):
    """What each of two processes holds of a model, `shard` and `replicate`."""
    folder = tmp_path_factory.mktemp("held")
    model = make_model(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "driver.py").write_text(DRIVER)
    found = {}
    for how in ("shard", "replicate"):
        words = (
            *STANDALONE,
            "--nproc-per-node",
            "2",
            str(folder / "driver.py"),
            str(folder),
            how,
        )
        code, _, stderr = finished(torchrun(*words))
        assert code == 0, stderr[-3000:]
        found[how] = [json.loads((folder / f"{how}{rank}.json").read_text()) for rank in range(2)]
    return found


def test_each_process_holds_half(reports):
    """--fsdp: of weights and of Adam's two moments; also after a rollout."""
    for report in reports["shard"]:
        assert report["own"] <= 0.55 * report["weights"]
        assert report["moments"] == 2 * report["own"]
        assert report["left"] == report["own"]


def test_weights_are_gathered_once_per_rollout(reports):
    """Not once per token: as often as there are parts of the model."""
    for report in reports["shard"]:
        assert report["units"] > 1
        assert report["gathers"] == report["units"]


def test_gradients_are_views_of_what_is_sent(reports):
    """Without --fsdp: fewer buffers than weights, and no byte more than the gradients."""
    for report in reports["replicate"]:
        assert report["storages"] < 5
        assert report["bytes"] == 4 * report["weights"]
