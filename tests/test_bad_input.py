"""Wrong input to the three scripts: exit code 2, one line that says where, what and how to mend it, and no output.

In the order in which a script reads its input: files, columns, fields, chats, what does not go together or does not
fit, and what is to be accepted; models; flags as numbers and as typed; reward functions; output folders; and the
scripts as processes of their own, which must be quick about it. A parameter `name` runs through the stages.
"""

import importlib
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    STAGES,
    as_chat,
    assert_same_run,
    command,
    error_line,
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

ROWS = {"sft": sft_rows, "reward_model": preference_rows, "ppo": prompt_rows}


# --------------------------------------------------------------------------------------------------------------- files


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
    for nothing in ("", "\n \r\n", "\ufeff"):
        (tmp_path / "data" / "train.jsonl").write_text(nothing, encoding="utf-8")
        refused(name, "holds no rows", dataset=folder)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "line", ["{'prompt': 'a'}", '{"prompt": "a"', "[1, 2]", '"text"', "null", "é{"]
)
def test_a_line_that_is_no_json_object(refused, name, line, tmp_path):
    """File and line number, for a slip of the pen and for JSON that is no object."""
    folder, place = broken_data(tmp_path / "data", name, line)
    refused(name, place, "JSON", dataset=folder)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "é"}'.encode("latin-1"), "UTF-8"),
        (b'\xff\xfe{\x00"\x00', "UTF-8"),
        (b"\x00" * 9, "NUL"),
        (b'{"prompt": "a\x00b"}', "NUL"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "RecursionError"),
        (b'{"prompt": "\x1b[2J', "JSON"),
    ],
    ids=["latin-1", "utf-16", "nul", "nul in text", "digits", "depth", "cut off"],
)
def test_a_line_of_strange_bytes(refused, name, line, what, tmp_path):
    """What no text editor shows, with its file and line."""
    folder, place = broken_data(tmp_path / "data", name, "x")
    path = Path(place.rpartition(":")[0])
    path.write_bytes(path.read_bytes().replace(b"\nx\n", b"\n" + line + b"\n"))
    refused(name, place, what, dataset=folder)


@pytest.mark.parametrize("name", STAGES)
def test_a_line_of_10_megabytes(refused, name, tmp_path):
    """It is refused for its length before a tokenizer gets at it."""
    row = ROWS[name]()[4] | {"prompt": "two figs " * 1_200_000}
    folder, place = broken_data(tmp_path / "data", name, row)
    refused(name, place, "10,800,000 characters", dataset=folder)


@pytest.mark.parametrize("name", STAGES)
def test_a_file_of_another_kind(refused, name, tmp_path):
    """By its ending, or by what is in it."""
    for file in ("data.xlsx", "data.tsv", "data.pkl", "data"):
        (tmp_path / file).write_text("x")
        refused(name, str(tmp_path / file), "known kind", dataset=str(tmp_path / file))
    for file in ("data.parquet", "data.csv", "data.json"):
        (tmp_path / file).write_bytes(b"\x00\x01")
        refused(name, str(tmp_path / file), dataset=str(tmp_path / file))


def test_a_file_that_cannot_be_read(refused, tmp_path):
    """The system says no while it is read."""
    path = tmp_path / "data.jsonl"
    path.symlink_to("/proc/self/mem")
    refused("sft", f"{path}: cannot be read", "permissions", dataset=str(path))


# ------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("sft", "prompt", "prompts"),
        ("sft", "completion", "Completions"),
        ("sft", "completion", "completon"),
        ("reward_model", "chosen", "choosen"),
        ("reward_model", "rejected", "REJECTED"),
        ("ppo", "prompt", "promt"),
        ("ppo", "prompt", "PROMPT"),
    ],
)
def test_a_wrong_column_name(refused, name, right, wrong, tmp_path):
    """The line says which column was meant."""
    rows = [
        {wrong if key == right else key: value for key, value in row.items()}
        for row in ROWS[name]()[:20]
    ]
    folder = write_data(tmp_path / "data", rows, 4)
    refused(name, f"{folder}/train.jsonl:1", f"rename it to '{right}'", dataset=folder)


def test_a_wrong_column_name_in_a_table(refused, tmp_path):
    """Files that are not JSON lines name the row."""
    path = tmp_path / "data.csv"
    path.write_text("prompt,completions\na, b\n" * 2)
    refused("sft", f"{path} (row 1)", "rename it to 'completion'", dataset=str(path))


COLUMNS = {"sft": "completion", "reward_model": "rejected", "ppo": "prompt"}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("", "empty"),
        (" \n", "empty"),
        (None, "missing"),
        (3, "int"),
        (0.5, "float"),
        (True, "bool"),
        ({"text": "a"}, "dict"),
        ("a\0b", "NUL"),
        ([], "empty"),
        ([{"role": "user"}], "chat message"),
        (["hello"], "chat message"),
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
    folder, place = broken_data(
        tmp_path / "data", name, {k: v for k, v in rows[4].items() if k != column}
    )
    refused(name, place, column, dataset=folder)
    others = [{"question": row["prompt"]} for row in rows]
    folder = write_data(tmp_path / "other", others, 4)
    refused(name, str(tmp_path / "other" / "train.jsonl") + ":1", "question", dataset=folder)


# --------------------------------------------------------------------------------------------------------------- chats


USER, SYSTEM = {"role": "user", "content": "two figs?"}, {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Yes."}
NOTHING_TO_LEARN = [
    ([], "empty"),
    ([USER | {"role": "human"}, ASSISTANT], "role 'human'"),
    ([USER, ASSISTANT | {"role": "Assistant"}], "role 'Assistant'"),
    ([USER, ASSISTANT | {"role": ""}], "role ''"),
    ([USER | {"role": None}, ASSISTANT], "chat message"),
    ([USER, ASSISTANT | {"content": None}], "chat message"),
    ([USER, ASSISTANT | {"content": [{"type": "text", "text": "Yes."}]}], "chat message"),
    ([USER, {"from": "gpt", "value": "Yes."}], "chat message"),
    ([SYSTEM], "not the assistant's"),
    ([USER, ASSISTANT, USER], "not the assistant's"),
    ([USER, ASSISTANT | {"content": "\n"}], "empty"),
]
NOTHING_TO_ANSWER = [
    ([], "empty"),
    ([USER | {"role": "human"}], "role 'human'"),
    ([USER | {"role": "\x1b[31muser"}], "role '"),
    ([SYSTEM], "system messages alone"),
    ([SYSTEM, SYSTEM | {"role": "developer"}], "system messages alone"),
    ([USER, ASSISTANT], "is the assistant's"),
    ([USER | {"content": 3}], "chat message"),
]


@pytest.mark.parametrize(("messages", "what"), NOTHING_TO_LEARN)
@pytest.mark.parametrize(("name", "column"), [("sft", "messages"), ("reward_model", "chosen")])
def test_a_chat_to_learn_from(refused, base, name, column, messages, what, tmp_path):
    """Its messages, their roles, and that the assistant has the last word."""
    good = [
        {column: [USER, ASSISTANT], "rejected": [USER, ASSISTANT | {"content": f"No {i}."}]}
        for i in range(20)
    ]
    folder = write_data(tmp_path / "data", good, 4)
    path = write_jsonl(
        tmp_path / "data" / "train.jsonl", [*good[:4], good[4] | {column: messages}, *good[5:]]
    )
    refused(name, f"{path}:5", column, what, dataset=folder, model=base.chat)


@pytest.mark.parametrize(("messages", "what"), NOTHING_TO_ANSWER)
def test_a_chat_to_answer(refused, chat_model, messages, what, tmp_path):
    """Its messages, their roles, and that there is something to answer."""
    good = [{"prompt": [USER]} for _ in range(20)]
    folder = write_data(tmp_path / "data", good, 4)
    path = write_jsonl(
        tmp_path / "data" / "train.jsonl", [*good[:4], {"prompt": messages}, *good[5:]]
    )
    refused("ppo", f"{path}:5", "prompt", what, dataset=folder, **chat_model)


@pytest.fixture
def chat_model(base, rewards) -> dict:
    """Flags of PPO on a model with a chat template."""
    return {"model": base.chat, "reward_fn": f"{rewards}:length"}


@pytest.mark.parametrize(
    "messages", ["hello", [{"role": "user", "content": "hi"}], [{"role": "assistant"}]]
)
def test_messages_that_are_no_conversation(refused, base, messages, tmp_path):
    """A text where messages belong, a chat that the user ends, a message without content."""
    good = [
        {"messages": row["prompt"] + row["completion"]} for row in map(as_chat, sft_rows()[:20])
    ]
    for number in (1, 5):
        folder = tmp_path / f"data{number}"
        write_data(folder, good, 4)
        path = write_jsonl(
            folder / "train.jsonl", [*good[: number - 1], {"messages": messages}, *good[number:]]
        )
        refused("sft", f"{path}:{number}", dataset=str(folder), model=base.chat)
        refused("sft", f"{path}:{number}", dataset=str(folder), model="tiny")


@pytest.mark.parametrize("name", STAGES)
def test_a_chat_without_a_chat_template(refused, name, data, tmp_path):
    """Messages need a tokenizer that knows chats."""
    kind = {"sft": "sft", "reward_model": "preferences", "ppo": "prompts"}[name]
    folder = getattr(data, f"chat_{kind}")
    refused(name, f"{folder}/train.jsonl:1", "chat template", dataset=folder)


def test_a_chat_that_the_template_refuses(refused, base, tmp_path):
    """Many templates ask for turns that alternate."""
    folder, model = tmp_path / "data", Path(shutil.copytree(base.chat, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{% if messages | length > 2 %}{{ raise_exception('turns must alternate') }}{% endif %}"
    )
    good = [{"messages": [USER, ASSISTANT]} for _ in range(20)]
    write_data(folder, good, 4)
    path = write_jsonl(
        folder / "train.jsonl", [*good[:4], {"messages": [USER, USER, ASSISTANT]}, *good[5:]]
    )
    refused("sft", f"{path}:5", "turns must alternate", dataset=str(folder), model=str(model))


# ------------------------------------------------------------------------ what does not go together, or does not fit


@pytest.mark.parametrize("chat", [False, True])
def test_a_pair_of_equals(refused, base, chat, tmp_path):
    """It has no better side; real data sets have a few such rows."""
    rows = preference_rows()[:20]
    row = rows[4] | {"rejected": rows[4]["chosen"]}
    folder, place = broken_data(tmp_path / "data", "reward_model", as_chat(row) if chat else row)
    refused("reward_model", place, "equal", "drop the row", dataset=folder, model=base.chat)


def test_a_pair_of_text_and_chat(refused, base, tmp_path):
    """One side would go through the chat template and the other would not."""
    row = preference_rows()[4] | {"rejected": [ASSISTANT]}
    folder, place = broken_data(tmp_path / "data", "reward_model", row)
    refused(
        "reward_model", place, "one is a text, the other a chat", dataset=folder, model=base.chat
    )
    row = {"prompt": [USER], "completion": " Yes."}
    folder, place = broken_data(
        tmp_path / "sft", "sft", row | {"prompt": "two figs?", "completion": [ASSISTANT]}
    )
    refused("sft", place, "write both as messages or as texts", dataset=folder, model=base.chat)


def test_a_completion_that_is_cut_away_entirely(refused, tokenizer, tmp_path):
    """A prompt of exactly --max-length tokens leaves nothing to learn; with one token more there is something."""
    row = sft_rows()[4]
    folder, place = broken_data(tmp_path / "data", "sft", row | {"prompt": row["prompt"] * 3})
    length = len(tokenizer(row["prompt"] * 3)["input_ids"])
    refused("sft", place, f"{length} tokens leave no room", dataset=folder, max_length=length)


def test_a_prompt_without_tokens(refused, models, tmp_path):
    """A tokenizer that drops what it does not know leaves nothing of this one."""
    from tokenizers import Tokenizer

    for name, source in (("policy", models.sft), ("judge", models.reward_model)):
        folder = Path(shutil.copytree(source, tmp_path / name))
        whole = json.loads((folder / "tokenizer.json").read_text())
        whole["normalizer"] = {"type": "Replace", "pattern": {"String": "☃"}, "content": ""}
        (folder / "tokenizer.json").write_text(json.dumps(whole))
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("☃").ids == []
    folder, place = broken_data(tmp_path / "data", "ppo", {"prompt": "☃"})
    flags = {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "judge")}
    refused("ppo", place, "no token", dataset=folder, **flags)


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
    config = {
        "vocab_size": len(tokenizer),
        "n_positions": 48,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    }
    config |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return save_pair(tmp_path / "short", GPT2LMHeadModel(GPT2Config(**config)), tokenizer)


def test_a_response_that_overflows_the_reward_model(refused, reward_model, data, short, tmp_path):
    """Prompt, response and EOS must fit into the reward model too, whose context may be the shorter one."""
    judge = reward_model(tmp_path / "judge", model=short, max_length=48)
    refused("ppo", f"{data.prompts}/train.jsonl:", reward_model=str(judge), response_length=45)


def test_ptx_rows_that_overflow_the_context(ppo, rewards, short, tmp_path, capsys):
    """They are cut as in sft.py, or refused with their line; they do not end in an IndexError."""
    path = write_jsonl(tmp_path / "ptx" / "train.jsonl", [{"text": "two figs " * 60}] * 4)
    flags = {
        "ptx_coef": 1.0,
        "ptx_dataset": str(path.parent),
        "reward_fn": f"{rewards}:length",
        "model": short,
    }
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
    refused(
        "reward_model",
        f"{data.chat_sft}/train.jsonl:1",
        "chat template",
        normalize_with=data.chat_sft,
    )
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


# -------------------------------------------------------------------------------------------------- what is accepted


def test_windows_text_files(sft, tmp_path):
    """A byte order mark and line ends of two bytes change nothing."""
    write_data(tmp_path / "data", sft_rows()[:40], 4)
    plain = sft(tmp_path / "plain", dataset=str(tmp_path / "data"))
    for path in (tmp_path / "data").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert_same_run(plain, sft(tmp_path / "windows", dataset=str(tmp_path / "data")))


@pytest.mark.parametrize("name", STAGES)
def test_rows_that_stand_there_twice(request, name, capsys, tmp_path):
    """They may be meant: one line with their number, and training goes on."""
    folder = tmp_path / "data"
    write_data(folder, ROWS[name]()[:20], 4)
    rows = ROWS[name]()[:12]
    write_jsonl(folder / "train.jsonl", [*rows, *rows[:3]])
    flags = {"normalize_with": "none"} if name == "reward_model" else {}
    out = request.getfixturevalue(name)(tmp_path / "out", dataset=str(folder), **flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if "repeat" in line]
    assert lines == [f"{folder} (train): 3 of 15 rows repeat another one"]
    assert metrics_of(out)


# -------------------------------------------------------------------------------------------------------------- models


DAMAGES = {
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "without weights": lambda folder: (folder / "model.safetensors").unlink(),
    "with half the weights": lambda folder: (folder / "model.safetensors").write_bytes(
        b"\x00" * 20
    ),
    "with a weight missing": lambda folder: save_file(
        {
            k: v
            for k, v in load_file(folder / "model.safetensors").items()
            if "layers.1.mlp.up_proj" not in k
        },
        folder / "model.safetensors",
        {"format": "pt"},
    ),
    "without tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "with an illegible config": lambda folder: (folder / "config.json").write_text("{"),
    "of an unknown kind": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "nothing"}'
    ),
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


@pytest.mark.parametrize("name", STAGES)
def test_a_tokenizer_larger_than_the_embedding(refused, name, tmp_path):
    """Its last token would be out of the embedding's range, in the middle of a run."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.add_tokens(["<new>"])
    folder = save_pair(tmp_path / "model", model, tokenizer)
    rows = len(tokenizer) - 1
    refused(
        name, folder, f"ids up to {rows}", f"{rows} rows", "resize_token_embeddings", model=folder
    )


def test_a_reward_model_whose_tokenizer_is_larger(refused, models, tmp_path):
    """It is read by its own tokenizer."""
    folder = Path(shutil.copytree(models.reward_model, tmp_path / "judge"))
    tokenizer = utils.load_tokenizer(str(folder))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    refused("ppo", str(folder), "resize_token_embeddings", reward_model=str(folder))


def test_a_value_model_with_another_tokenizer(refused, base):
    """It has to read the policy's tokens."""
    refused("ppo", "--value-model", "another tokenizer", value_model=base.other)


@pytest.mark.parametrize("name", STAGES)
def test_a_file_is_no_model(refused, name, base):
    """The folder that holds it would be."""
    file = f"{base.plain}/model.safetensors"
    refused(name, file, "no such model folder", model=file)


def test_a_reward_model_that_is_none(refused, models, tmp_path):
    """A language model would get a random head, and PPO would learn from noise; two labels are not one reward."""
    from transformers import AutoModelForSequenceClassification

    refused("ppo", str(models.sft), reward_model=str(models.sft))
    refused("ppo", "nowhere", reward_model=str(tmp_path / "nowhere"))
    two = AutoModelForSequenceClassification.from_pretrained(
        models.reward_model, num_labels=2, ignore_mismatched_sizes=True
    )
    folder = save_pair(tmp_path / "two", two, utils.load_tokenizer(str(models.reward_model)))
    for name, flag in (("ppo", "reward_model"), ("ppo", "value_model"), ("reward_model", "model")):
        refused(name, folder, "2 labels", "num_labels=1", **{flag: folder})
    headless = Path(shutil.copytree(models.reward_model, tmp_path / "headless"))
    weights = load_file(headless / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"},
        headless / "model.safetensors",
        {"format": "pt"},
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
        {"seed": 2**64},
        {"device": "abacus"},
        {"device": "meta"},
        {"batch_size": -16},
        {"micro_batch_size": 32},
        {"model": ""},
        {"dataset": ""},
        {"train_split": ""},
        {"eval_split": ""},
        {"model": "~nobody-of-that-name/model"},
        {"dataset": "a" * 5000},
        {"track": True},
    ],
)
def test_flags_of_all_stages(refused, name, flags, monkeypatch):
    """Numbers out of range, a device that is not there, a package that is not installed."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not, where it is
    refused(name, "--" + next(iter(flags)).replace("_", "-"), **flags)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
@pytest.mark.parametrize(
    "flags",
    [
        {"epochs": 0},
        {"max_length": 1},
        {"warmup_ratio": 1.0},
        {"warmup_ratio": -0.1},
        {"epochs": -1},
    ],
)
def test_flags_of_the_first_two_stages(refused, name, flags):
    """Out of range."""
    refused(name, "--" + next(iter(flags)).replace("_", "-"), **flags)


def test_normalization_of_nothing(refused):
    """--normalize-std without the demonstrations that it needs."""
    refused("reward_model", "--normalize-std", normalize_std=True, normalize_with="none")


NAN, INF = float("nan"), float("inf")
PPO_FLAGS = [
    *(
        {name: 0}
        for name in ("total_episodes", "num_mini_batches", "num_ppo_epochs", "samples_per_prompt")
    ),
    *({name: 0} for name in ("response_length", "kl_horizon", "eval_prompts")),
    *(
        {name: 0.0}
        for name in (
            "temperature",
            "cliprange",
            "cliprange_value",
            "kl_target",
            "reward_clip",
            "target_kl",
        )
    ),
    *({name: -1} for name in ("top_k", "critic_warmup_updates", "save_rollouts")),
    *(
        {name: -0.5}
        for name in ("missing_eos_penalty", "kl_coef", "vf_coef", "entropy_coef", "ptx_coef")
    ),
    *({name: NAN} for name in ("kl_coef", "temperature", "gamma", "top_p", "reward_clip")),
    *({name: INF} for name in ("temperature", "cliprange", "reward_clip", "missing_eos_penalty")),
    *(
        {name: -8}
        for name in ("total_episodes", "num_mini_batches", "response_length", "eval_prompts")
    ),
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
    {"critic_warmup_updates": 1, "samples_per_prompt": 2, "advantage": "rloo"},
    {"value_model": "x", "advantage": "batch_mean"},
    {"kl_target": 6.0, "kl_coef": 0.0},
    {"stop_token": "two words"},
    {"stop_token": ""},
]


@pytest.mark.parametrize(
    "flags", PPO_FLAGS, ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items())
)
def test_flags_of_ppo(refused, flags):
    """Out of range, or at odds with one another; the first is the one to be named."""
    refused("ppo", "--" + next(iter(flags)).replace("_", "-"), **flags)


MODULES = {"sft": "sft", "reward_model": "reward_model", "ppo": "ppo_rlhf"}
TYPED = [
    ("--batch-size x", "--batch-size: 'x'", "pass a whole number"),
    ("--batch-size 1.5", "--batch-size: '1.5'", "pass a whole number"),
    ("--batch-size=1e3", "--batch-size: '1e3'", "pass a whole number"),
    ("--batch-size", "--batch-size: has no value", "pass a whole number"),
    ("--learning_rate fast --seed 2", "--learning-rate: 'fast'", "pass a number"),
    ("--dtype float16", "--dtype: 'float16'", "pass float32 or bfloat16"),
    ("--model", "--model: has no value", "pass a text"),
    ("--batchsize 4", "--batchsize: is no flag", "did you mean --batch-size?"),
    ("--micro-batch 4", "--micro-batch: is no flag", "did you mean --micro-batch-size?"),
    ("-seed 4", "-seed: is no flag", "did you mean --seed?"),
    ("--no-overwrit", "--no-overwrit: is no flag", "did you mean --no-overwrite?"),
    ("--frobnicate 4", "--frobnicate: is no flag", "--help"),
    ("data/support/sft", "data/support/sft: belongs to no flag", "--help"),
    ("--overwrite yes", "yes: belongs to no flag", "--help"),
    ("--seed 1 2", "2: belongs to no flag", "--help"),
]
TYPED_FOR_PPO = [
    ("--kl-target none", "--kl-target: 'none'", "pass a number or None"),
    ("--kl-estimator k4", "--kl-estimator: 'k4'", "pass k1 or k2 or k3"),
    ("--advantage gea", "--advantage: 'gea'", "pass gae or"),
    ("--clip-range 0.2", "--clip-range: is no flag", "did you mean --cliprange?"),
    ("--reward-func f.py:f", "--reward-func: is no flag", "did you mean --reward-fn?"),
]


@pytest.mark.parametrize(
    ("name", "typed", "what", "mend"),
    [(name, *case) for name in STAGES for case in TYPED]
    + [("ppo", *case) for case in TYPED_FOR_PPO],
)
def test_flags_as_typed(capsys, name, typed, what, mend):
    """Words that are no flag, values of the wrong type: one line, with the nearest flag or what would fit."""
    with pytest.raises(SystemExit) as exit_:
        utils.parse_flags(importlib.import_module(MODULES[name]).Args, typed.split())
    captured = capsys.readouterr()
    assert (exit_.value.code, captured.out) == (2, "")
    assert error_line(captured.err).startswith(f"error: {what}")
    assert mend in captured.err
    assert captured.err.count("\n") == 1


def test_flags_that_are_right(capsys):
    """Negative numbers, None, an equals sign, an underscore: what tyro reads is what comes out."""
    module = importlib.import_module("ppo_rlhf")
    typed = "--kl-coef -1 --kl-target None --seed=3 --batch_size 4 --overwrite --no-whiten-advantages --dtype float32"
    wanted = {"kl_coef": -1.0, "kl_target": None, "seed": 3, "batch_size": 4, "overwrite": True}
    wanted |= {"whiten_advantages": False, "dtype": "float32"}
    assert utils.parse_flags(module.Args, typed.split()) == module.Args(**wanted)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------- reward functions

FUNCTIONS = """
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
def test_an_output_folder_that_cannot_be_made(request, name, capsys):
    """Where not even root may write."""
    with pytest.raises(SystemExit) as exit_:
        request.getfixturevalue(name)(Path("/proc/out"))
    assert exit_.value.code == 2
    assert error_line(capsys.readouterr().err).startswith("error: /proc/out: cannot be written")


@pytest.mark.parametrize("name", STAGES)
def test_resume_with_other_flags_is_refused(refused, request, name, tmp_path):
    """It would be another run; the flag is named, and the run stays as it was."""
    request.getfixturevalue(name)(tmp_path / "out", save_every=1)
    refused(name, "--seed", resume=True, seed=2)
    refused(name, "--learning-rate", resume=True, learning_rate=0.5)
    refused(name, "--overwrite", resume=True, overwrite=True)


# ------------------------------------------------------------------------------------------------------- as one runs it

SCRIPTS = {name: f"{module}.py" for name, module in MODULES.items()}
AT_ONCE = [
    ("sft", "--batch-size 6 --micro-batch-size 4", "--batch-size"),
    ("sft", "--dataset {tmp}/nowhere", "{tmp}/nowhere"),
    ("sft", "--dataset {broken}", "{broken}/train.jsonl:5"),
    ("sft", "--dataset {long}", "{long}/train.jsonl:5"),
    ("reward_model", "--model {tmp}/nowhere", "{tmp}/nowhere"),
    ("reward_model", "--epoch 3", "did you mean --epochs?"),
    (
        "reward_model",
        "--model {model} --dataset {ties} --normalize-with none",
        "{ties}/train.jsonl:5",
    ),
    ("ppo", "--temperature 0", "--temperature"),
    ("ppo", "--cliprange 0", "--cliprange"),
    ("ppo", "--ptx-coef 1", "--ptx-coef"),
    ("ppo", "--total-episodes many", "--total-episodes"),
    ("ppo", "--model {model} --reward-model {model}", "{model}: its files lack score.weight"),
    ("ppo", "--model {model} --reward-fn nowhere.py:f", "nowhere.py:f"),
]


@pytest.mark.parametrize(("name", "typed", "what"), AT_ONCE)
def test_errors_on_the_command_line(base, name, typed, what, tmp_path):
    """The scripts themselves: code 2 within seconds, on stderr that one line alone, on stdout nothing."""
    rows, ties = preference_rows()[:20], tmp_path / "ties"
    long = sft_rows()[4] | {"prompt": "two figs " * 1_200_000}
    broken_data(ties, "reward_model", rows[4] | {"rejected": rows[4]["chosen"]})
    broken_data(tmp_path / "broken", "sft", '{"prompt": "a", "completion": }')
    broken_data(tmp_path / "long", "sft", long)
    places = {
        "tmp": tmp_path,
        "ties": ties,
        "broken": tmp_path / "broken",
        "long": tmp_path / "long",
    }
    places["model"] = base.plain
    out, started = tmp_path / "out", time.monotonic()
    words = typed.format(**places).split()
    result = command(SCRIPTS[name], "--device", "cpu", *words, "--output-dir", str(out))
    assert time.monotonic() - started < 10
    assert (result.returncode, result.stdout) == (2, "")
    assert error_line(result.stderr) + "\n" == result.stderr
    assert what.format(**places) in result.stderr
    assert not out.exists()


def test_special_tokens_beyond_the_embedding_are_accepted(tmp_path):
    """Gemma 3's text models have one for images, which no text holds."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert (
        len(utils.load_tokenizer(save_pair(tmp_path / "model", model, tokenizer)))
        == model.vocab_size + 1
    )
