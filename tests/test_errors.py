"""Wrong input: exit code 2, one line that says where, what and how to mend it, and an untouched output folder.

What goes wrong later: exit code 1, one line that says when, and the last checkpoint in place.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    as_chat,
    assert_same_run,
    make_model,
    make_tokenizer,
    metrics_of,
    preference_rows,
    prompt_rows,
    save_pair,
    sft_rows,
    write_data,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import utils

STAGES = ["sft", "reward_model", "ppo"]
ROWS = {"sft": sft_rows, "reward_model": preference_rows, "ppo": prompt_rows}
LINE = re.compile(r"error: .+: .+; .+")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file in a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_line(text: str) -> str:
    """The only error line in what went to stderr; progress bars and warnings of libraries may stand on other lines."""
    lines = [line for line in text.splitlines() if "error:" in line]
    assert "Traceback" not in text
    assert len(lines) == 1, text
    assert LINE.fullmatch(lines[0]), lines[0]
    return lines[0]


@pytest.fixture
def refused(request, capsys, tmp_path):
    """`refused(stage, *parts, **flags)`: the stage stops with code 2, a line that holds `parts`, and writes nothing."""

    def check(name: str, *parts: str, **flags) -> None:
        stage, out = request.getfixturevalue(name), tmp_path / "out"
        before = snapshot(out) if out.is_dir() else out.exists()
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            stage(out, **flags)
        line = error_line(capsys.readouterr().err)
        assert exit_.value.code == 2
        for part in parts:
            assert part in line, line
        assert (snapshot(out) if out.is_dir() else out.exists()) == before

    return check


# ---------------------------------------------------------------------------------------------------------------- data


def broken_data(folder: Path, name: str, line: object, number: int = 5) -> tuple[str, str]:
    """A data set whose training file has `line` as its `number`-th: (folder, the place to be named)."""
    rows = ROWS[name]()[:20]
    write_data(folder, rows, 4)
    path = write_jsonl(folder / "train.jsonl", [*rows[: number - 1], line, *rows[number:]])
    return str(folder), f"{path}:{number}"


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_data_set(refused, name, tmp_path):
    """A folder or file that is not there is named."""
    for missing in (tmp_path / "nowhere", tmp_path / "nowhere.jsonl", tmp_path / "nowhere.parquet"):
        refused(name, str(missing), dataset=str(missing))


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_split(refused, name, tmp_path):
    """The file of a split that is not there is named."""
    folder = write_data(tmp_path / "data", ROWS[name]()[:20], 4)
    refused(name, "test.jsonl", dataset=folder, eval_split="test")
    (tmp_path / "data" / "train.jsonl").unlink()
    refused(name, "train.jsonl", dataset=folder)


@pytest.mark.parametrize("name", STAGES)
def test_a_data_set_without_rows(refused, name, tmp_path):
    """An empty file."""
    folder = write_data(tmp_path / "data", ROWS[name]()[:20], 4)
    (tmp_path / "data" / "train.jsonl").write_text("\n")
    refused(name, "holds no rows", dataset=folder)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("line", ["{'prompt': 'a'}", '{"prompt": "a"', "[1, 2]", '"text"', "null", "é{"])
def test_a_line_that_is_no_json_object(refused, name, line, tmp_path):
    """File and line number, for a slip of the pen and for JSON that is no object."""
    folder, place = broken_data(tmp_path / "data", name, line)
    refused(name, place, "JSON", dataset=folder)


def test_a_file_that_is_not_utf8(refused, tmp_path):
    """Latin-1 text is named with its line."""
    folder, place = broken_data(tmp_path / "data", "sft", "x")
    path = Path(place.rpartition(":")[0])
    path.write_bytes(path.read_bytes().replace(b"\nx\n", '\n{"prompt": "é"}\n'.encode("latin-1")))
    refused("sft", place, "UTF-8", dataset=folder)


COLUMNS = {"sft": "completion", "reward_model": "rejected", "ppo": "prompt"}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (None, "missing"),
        (3, "int"),
        ([], "empty"),
        ([{"role": "user"}], "chat message"),
        ([{"role": "user", "content": " "}], "last message is empty"),
        ("hi \ud83d", "surrogate"),
    ],
)
def test_a_field_that_is_no_text(refused, name, value, what, tmp_path):
    """File, line and column of an empty, missing or ill-typed field."""
    column = COLUMNS[name]
    folder, place = broken_data(tmp_path / "data", name, ROWS[name]()[4] | {column: value})
    refused(name, place, column, what, dataset=folder)


@pytest.mark.parametrize("name", STAGES)
def test_an_empty_prompt(refused, name, tmp_path):
    """The other column that all three stages share."""
    folder, place = broken_data(tmp_path / "data", name, ROWS[name]()[4] | {"prompt": "  "})
    refused(name, place, "prompt", "empty", dataset=folder)


@pytest.mark.parametrize("name", STAGES)
def test_a_missing_column(refused, name, tmp_path):
    """In a single row, where the line is named, and in all of them."""
    rows, column = ROWS[name]()[:20], COLUMNS[name]
    folder, place = broken_data(tmp_path / "data", name, {k: v for k, v in rows[4].items() if k != column})
    refused(name, place, column, dataset=folder)
    others = [{"question": row["prompt"]} for row in rows]
    folder = write_data(tmp_path / "other", others, 4)
    refused(name, str(tmp_path / "other" / "train.jsonl") + ":1", "question", dataset=folder)


@pytest.mark.parametrize("messages", ["hello", [{"role": "user", "content": "hi"}], [{"role": "assistant"}]])
def test_messages_that_are_no_conversation(refused, base, messages, tmp_path):
    """A text where messages belong, a chat that the user ends, a message without content."""
    good = [{"messages": row["prompt"] + row["completion"]} for row in map(as_chat, sft_rows()[:20])]
    for number in (1, 5):
        folder = tmp_path / f"data{number}"
        write_data(folder, good, 4)
        path = write_jsonl(folder / "train.jsonl", [*good[: number - 1], {"messages": messages}, *good[number:]])
        refused("sft", f"{path}:{number}", dataset=str(folder), model=base.chat)
        refused("sft", f"{path}:{number}", dataset=str(folder), model="tiny")


@pytest.mark.parametrize("name", STAGES)
def test_a_chat_without_a_chat_template(refused, name, data, tmp_path):
    """Messages need a tokenizer that knows chats."""
    kind = {"sft": "sft", "reward_model": "preferences", "ppo": "prompts"}[name]
    folder = getattr(data, f"chat_{kind}")
    refused(name, f"{folder}/train.jsonl:1", "chat template", dataset=folder)


def test_a_prompt_that_fills_the_context(refused, tmp_path):
    """sft.py needs room for a completion, ppo_rlhf.py for the response; the line is named."""
    long = "Q: " + "two figs " * 60
    folder, place = broken_data(tmp_path / "sft", "sft", {"prompt": long, "completion": " Yes."})
    refused("sft", place, dataset=folder)
    folder, place = broken_data(tmp_path / "ppo", "ppo", {"prompt": long, "fruit": "figs"})
    refused("ppo", place, dataset=folder)
    refused("ppo", "response", response_length=128)


@pytest.fixture
def short(tmp_path) -> str:
    """A GPT-2, whose learned positions end at 48: what is longer does not merely work badly, it fails."""
    tokenizer = make_tokenizer()
    config = {"vocab_size": len(tokenizer), "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return save_pair(tmp_path / "short", GPT2LMHeadModel(GPT2Config(**config)), tokenizer)


def test_a_response_that_overflows_the_reward_model(refused, reward_model, data, short, tmp_path):
    """Prompt, response and EOS must fit into the reward model too, whose context may be the shorter one."""
    judge = reward_model(tmp_path / "judge", model=short, max_length=48)
    refused("ppo", f"{data.prompts}/train.jsonl:", reward_model=str(judge), response_length=45)


def test_ptx_rows_that_overflow_the_context(ppo, functions, short, tmp_path, capsys):
    """They are cut as in sft.py, or refused with their line; they do not end in an IndexError."""
    path = write_jsonl(tmp_path / "ptx" / "train.jsonl", [{"text": "two figs " * 60}] * 4)
    flags = {"ptx_coef": 1.0, "ptx_dataset": str(path.parent), "reward_fn": f"{functions}:third", "model": short}
    try:
        out = ppo(tmp_path / "out", **flags)
    except SystemExit as exit_:
        assert exit_.code == 2
        assert f"{path}:1" in error_line(capsys.readouterr().err)
    else:
        assert metrics_of(out)[-1]["loss/ptx_avg"] > 0


def test_pairs_that_are_all_too_long(refused):
    """--max-length below every pair leaves nothing to learn from."""
    refused("reward_model", "max-length", max_length=8)


def test_demonstrations_for_the_normalization_are_read_before_training(refused, data, tmp_path):
    """What --normalize-with names is checked like the rest, not after hours of training."""
    refused("reward_model", "nowhere", normalize_with=str(tmp_path / "nowhere"))
    refused("reward_model", f"{data.chat_sft}/train.jsonl:1", "chat template", normalize_with=data.chat_sft)
    long = write_data(tmp_path / "long", [{"prompt": "Q:", "completion": " two figs" * 100}] * 8, 2)
    refused("reward_model", long, normalize_with=long)


def test_normalization_does_not_fall_back_on_the_embedded_task(refused, monkeypatch):
    """Preferences of one's own with the default --normalize-with would be normalized on another task's texts."""
    monkeypatch.chdir(ROOT)
    refused("reward_model", "--normalize-with", normalize_with="data/support/sft")


def test_ptx_data_are_checked_before_training(refused, tmp_path):
    """They are demonstrations as in sft.py."""
    folder, place = broken_data(tmp_path / "data", "sft", "x")
    refused("ppo", place, ptx_coef=1.0, ptx_dataset=folder)
    refused("ppo", "nowhere", ptx_coef=1.0, ptx_dataset=str(tmp_path / "nowhere"))


# -------------------------------------------------------------------------------------------------------------- models


DAMAGES = {
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "without weights": lambda folder: (folder / "model.safetensors").unlink(),
    "with half the weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 20),
    "with a weight missing": lambda folder: save_file(
        {k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.1.mlp.up_proj" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    ),
    "without tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "with an illegible config": lambda folder: (folder / "config.json").write_text("{"),
    "of an unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "nothing"}'),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_holds_no_model(refused, name, damage, base, tmp_path):
    """A model's folder with a part missing or broken."""
    folder = tmp_path / "model"
    shutil.copytree(base.plain, folder)
    DAMAGES[damage](folder)
    refused(name, str(folder), model=str(folder))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("model", ["./nowhere", "nobody/nothing", "no good name", "a/b/c"])
def test_a_name_that_is_no_model(refused, name, model):
    """A path that is not there, or what no hub has."""
    refused(name, model, model=model)


def test_a_tokenizer_without_eos(refused, tmp_path):
    """Nothing could end a completion."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.eos_token = None
    refused("sft", "EOS", model=save_pair(tmp_path / "model", model, tokenizer))


def test_a_reward_model_that_is_none(refused, models, tmp_path):
    """A language model would get a random head, and PPO would learn from noise; two labels are not one reward."""
    from transformers import AutoModelForSequenceClassification

    refused("ppo", str(models.sft), reward_model=str(models.sft))
    refused("ppo", "nowhere", reward_model=str(tmp_path / "nowhere"))
    two = AutoModelForSequenceClassification.from_pretrained(
        models.reward_model, num_labels=2, ignore_mismatched_sizes=True
    )
    folder = save_pair(tmp_path / "two", two, utils.load_tokenizer(str(models.reward_model)))
    refused("ppo", folder, reward_model=folder)
    headless = Path(shutil.copytree(models.reward_model, tmp_path / "headless"))
    weights = load_file(headless / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"}, headless / "model.safetensors", {"format": "pt"}
    )
    refused("ppo", str(headless), "score.weight", reward_model=str(headless))


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 6, "micro_batch_size": 4},
        {"batch_size": 0},
        {"micro_batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"max_grad_norm": -1.0},
        {"save_every": -1},
        {"eval_every": -1},
        {"seed": -1},
        {"device": "abacus"},
        {"track": True},
    ],
)
def test_flags_of_all_stages(refused, name, flags, monkeypatch):
    """Numbers out of range, a device that is not there, a package that is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not, where it is
    refused(name, "--" + next(iter(flags)).replace("_", "-"), **flags)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
@pytest.mark.parametrize("flags", [{"epochs": 0}, {"max_length": 1}, {"warmup_ratio": 1.0}, {"warmup_ratio": -0.1}])
def test_flags_of_the_first_two_stages(refused, name, flags):
    """Out of range."""
    refused(name, "--" + next(iter(flags)).replace("_", "-"), **flags)


NAN = float("nan")
PPO_FLAGS = [
    *({name: 0} for name in ("total_episodes", "num_mini_batches", "num_ppo_epochs", "samples_per_prompt")),
    *({name: 0} for name in ("response_length", "kl_horizon", "eval_prompts")),
    *({name: 0.0} for name in ("temperature", "cliprange", "cliprange_value", "kl_target", "reward_clip", "target_kl")),
    *({name: -1} for name in ("top_k", "critic_warmup_updates", "save_rollouts")),
    *({name: -0.5} for name in ("missing_eos_penalty", "kl_coef", "vf_coef", "entropy_coef", "ptx_coef")),
    *({name: NAN} for name in ("kl_coef", "temperature", "gamma", "top_p", "reward_clip")),
    *({name: 1.5} for name in ("gamma", "lam", "top_p")),
    {"top_p": 0.0},
    {"kl_horizon": 1, "kl_target": 6.0},
    {"total_episodes": 7},
    {"num_mini_batches": 3},
    {"num_mini_batches": 4},  # leaves mini-batches of 2 for micro-batches of 4
    {"samples_per_prompt": 3},
    {"samples_per_prompt": 1, "advantage": "rloo"},
    {"samples_per_prompt": 1, "advantage": "grpo"},
    {"critic_warmup_updates": 1, "advantage": "batch_mean"},
    {"ptx_coef": 1.0},
    {"ptx_coef": 0.0, "ptx_dataset": "x"},
    {"stop_token": "two words"},
    {"stop_token": ""},
]


@pytest.mark.parametrize("flags", PPO_FLAGS, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()))
def test_flags_of_ppo(refused, flags):
    """Out of range, or at odds with one another; the first is the one to be named."""
    refused("ppo", "--" + next(iter(flags)).replace("_", "-"), **flags)


# --------------------------------------------------------------------------------------------------- reward functions

FUNCTIONS = """
LIMIT = calls = 0
value = 3
def raises(prompts, completions, **columns):
    raise ValueError("no luck\\nat all")
def one(prompts, completions, **columns):
    return [1.0]
def nan(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
def text(prompts, completions, **columns):
    return ["good"] * len(prompts)
def none(prompts, completions, **columns):
    pass
def narrow(prompts, completions):
    return [1.0] * len(prompts)
def third(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == LIMIT:
        raise ValueError("tired")
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def functions(tmp_path):
    """A file of reward functions that fail."""
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.mark.parametrize("flag", ["reward_fn", "eval_reward_fn"])
@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("functions.py:raises", "no luck"),
        ("functions.py:one", "1 values"),
        ("functions.py:nan", "nan"),
        ("functions.py:text", "ValueError"),
        ("functions.py:none", "TypeError"),
        ("functions.py:narrow", "fruit"),
        ("functions.py:missing", "missing"),
        ("functions.py:value", "value"),
        ("functions.py", "FILE.py:FUNCTION"),
        ("nowhere.py:f", "nowhere.py"),
        ("broken.py:f", "SyntaxError"),
        ("text.txt:f", "text.txt"),
    ],
)
def test_a_reward_function_that_fails(refused, functions, flag, spec, what, tmp_path):
    """Before any training and before the output folder is made: the file, the function, what it returns or raises."""
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "text.txt").write_text("f")
    refused("ppo", what, **{flag: str(tmp_path / spec)})


# ------------------------------------------------------------------------------------------------------ output folders


@pytest.mark.parametrize("name", STAGES)
def test_a_folder_that_holds_a_run_is_left_alone(refused, request, name, tmp_path):
    """Without --resume or --overwrite, which the line names."""
    request.getfixturevalue(name)(tmp_path / "out")
    refused(name, str(tmp_path / "out"), "--resume", "--overwrite")


def test_a_folder_that_holds_something_else_is_left_alone(refused, tmp_path):
    """Also with --overwrite or --resume, for it holds no run."""
    write_jsonl(tmp_path / "out" / "thesis.txt", ["x"])
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        refused("sft", "holds no run", **flags)


def test_an_output_that_cannot_be_a_folder(refused, sft, tmp_path, capsys):
    """A file, or a folder within a file."""
    (tmp_path / "out").write_text("x")
    refused("sft", "is a file")
    with pytest.raises(SystemExit) as exit_:
        sft(tmp_path / "out" / "inner")
    assert exit_.value.code == 2
    assert "inner" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", STAGES)
def test_resume_with_other_flags_is_refused(refused, request, name, tmp_path):
    """It would be another run; the flag is named, and the run stays as it was."""
    request.getfixturevalue(name)(tmp_path / "out", save_every=1)
    refused(name, "--seed", resume=True, seed=2)
    refused(name, "--learning-rate", resume=True, learning_rate=0.5)
    refused(name, "--overwrite", resume=True, overwrite=True)


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
    function = "last_token_scores" if name == "reward_model" else "target_logits"
    original = getattr(utils, function)

    def spoiled(*args):
        result = original(*args)
        spoil = logged[-1:] == [2] and torch.is_grad_enabled()
        logits, *rest = result if isinstance(result, tuple) else (result,)
        logits = logits * float("nan") if spoil else logits
        return (logits, *rest) if rest else logits

    with monkeypatch.context() as patch:
        patch.setattr(utils.Logger, "log", lambda self, step, metrics: (logged.append(step), log(self, step, metrics)))
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
        monkeypatch.setattr(os, "replace", lambda a, b: full() if Path(b).name == file else replace(a, b))
    else:
        import torch.utils.tensorboard

        monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, "add_scalar", full)
    line = fails(request.getfixturevalue(name), tmp_path / "out", capsys)
    assert "No space left" in line


def test_a_reward_function_that_fails_later(ppo, functions, capsys, tmp_path):
    """It has worked for a while, so it is no wrong input: code 1, the update, and the last checkpoint in place."""
    # the calls are the start's evaluation, updates 1 and 2, and update 3, which fails
    functions.write_text(FUNCTIONS.replace("LIMIT = calls = 0", "LIMIT, calls = 4, 0"))
    out = tmp_path / "out"
    flags = {"reward_fn": f"{functions}:third", "total_episodes": 40, "save_every": 1}
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


def command(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_errors_on_the_command_line(base, tmp_path):
    """The scripts themselves: code 2, and on stderr that one line alone."""
    folder, place = broken_data(tmp_path / "data", "sft", '{"prompt": "a", "completion": }')
    out = tmp_path / "out"
    result = command("sft.py", "--dataset", folder, "--output-dir", str(out))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {place}: is not JSON")
    assert result.stderr.count("\n") == 1
    result = command("ppo_rlhf.py", "--model", str(tmp_path / "nowhere"), "--output-dir", str(out))
    assert (result.returncode, result.stdout) == (2, "")
    assert error_line(result.stderr) + "\n" == result.stderr
    assert not out.exists()


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
    result = command("sft.py", *flags.split(), "--max-length", "64", "--output-dir", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "sft: held-out loss" in result.stdout
    for noise in ("Traceback", "Warning", "LOAD REPORT", "Loading weights", "Writing model shards"):
        assert noise not in result.stderr
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert (args["model"], args["epochs"], args["max_length"]) == (base.plain, 1, 64)
