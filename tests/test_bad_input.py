"""Wrong input to the three scripts: code 2, one line of where, what and how to fix, and no output.

In the order in which a script reads its input. A parameter `name` runs through the stages.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers
import tyro
from conftest import (
    CHAT_TEMPLATE,
    MODULES,
    ROOT,
    STAGES,
    as_chat,
    command,
    error_line,
    make_gpt2,
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

import encoding
import utils

NAN, INF = float("nan"), float("inf")
each_stage = pytest.mark.parametrize("name", STAGES)
ROWS = {"sft": sft_rows, "reward_model": preference_rows, "ppo": prompt_rows}


# ---- files


def broken_data(folder: Path, name: str, line: object, split: str = "train") -> tuple[str, str]:
    """A data set with `line` as the third line of a split: (folder, the place to be named)."""
    rows, path = ROWS[name]()[:8], folder / f"{split}.jsonl"
    write_data(folder, rows, 2)  # few enough that one is more than a tenth
    write_jsonl(path, [*rows[:2], "x" if isinstance(line, bytes) else line, *rows[3:]])
    if isinstance(line, bytes):
        path.write_bytes(path.read_bytes().replace(b"\nx\n", b"\n" + line + b"\n"))
    return str(folder), f"{path}:3"


@each_stage
def test_data_that_are_not_there(refused, name, tmp_path):
    """A folder, a file, the file of a split, or its rows."""
    for missing in ("nowhere", "nowhere.jsonl", "nowhere.parquet"):
        refused(name, str(tmp_path / missing), dataset=str(tmp_path / missing))
    folder = write_data(tmp_path / "data", ROWS[name]()[:20], 4)
    refused(name, "no split test", dataset=folder, eval_split="test")
    for nothing in ("", "\n \r\n", "\ufeff"):
        (tmp_path / "data" / "train.jsonl").write_text(nothing, encoding="utf-8")
        refused(name, "holds no rows", dataset=folder)
        refused(name, "holds no rows", dataset=folder, columns=("prompt=question",))
    (tmp_path / "data" / "train.jsonl").unlink()
    refused(name, "no split train", dataset=folder)


NO_JSON = {
    "JSON object": ["[1, 2]", '"text"', "null"],
    "JSON": ["{'prompt': 'a'}", '{"prompt": "a"', "é{", b"\x00" * 9, b'{"prompt": "a\x00b"}'],
    "UTF-8": ['{"prompt": "é"}'.encode("latin-1"), b'\xff\xfe{\x00"\x00'],
    "digits": [b'{"prompt": ' + b"9" * 5000 + b"}"],
    "RecursionError": [b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"],
}


@each_stage
@pytest.mark.parametrize("what", NO_JSON)
def test_a_line_that_is_no_json_object(refused, name, what, tmp_path):
    """File and line number in either split: slips of the pen, and what no text editor shows."""
    for line in NO_JSON[what]:
        for split in ("train", "validation"):
            folder, place = broken_data(tmp_path / split, name, line, split)
            refused(name, place, what, dataset=folder)


@each_stage
def test_a_file_of_another_kind(refused, name, tmp_path):
    """By its ending, or by what is in it."""
    for file in ("data.xlsx", "data.pkl", "data", "data.parquet", "data.csv", "data.json"):
        path, known = str(tmp_path / file), file.endswith(("parquet", "csv", "json"))
        (tmp_path / file).write_bytes(b"\x00\x01" if known else b"x")
        refused(name, path, *([] if known else ["known kind"]), dataset=path)


def test_a_file_that_cannot_be_read(refused, tmp_path):
    """The system says no while it is read."""
    path = tmp_path / "data.jsonl"
    path.symlink_to("/proc/self/mem")
    refused("sft", f"{path} (train): cannot be read", dataset=str(path))


# ---- columns and fields

COLUMNS = {"sft": "completion", "reward_model": "rejected", "ppo": "prompt"}


@each_stage
def test_a_wrong_column_name(refused, name, tmp_path):
    """The line says which there are and which there should be; other files name the row."""
    column, other = COLUMNS[name], COLUMNS[name].upper()
    rows = [{other if k == column else k: v for k, v in row.items()} for row in ROWS[name]()[:20]]
    folder = write_data(tmp_path / "data", rows, 4)
    refused(name, f"{folder}/train.jsonl:1", other, "rename", column, dataset=folder)
    path = tmp_path / "data.csv"
    path.write_text(f"{other},text2\na, b\n" * 2)
    refused(name, f"{path}:2", f"{other},text2", column, dataset=str(path))


NO_TEXT = {
    "empty": ["", " \n", [], [{"role": "user", "content": " "}]],
    "chat message": [[{"role": "user"}], ["hello"]],
    "missing": [None, ...],
    "type": [3, 0.5, True, {"text": "a"}],
    "surrogate": ["hi \ud83d"],
}


@each_stage
@pytest.mark.parametrize("what", NO_TEXT)
def test_a_field_that_is_no_text(refused, name, what, tmp_path):
    """File, line and column of an empty, missing or ill-typed field."""
    for value in NO_TEXT[what]:
        for column in {COLUMNS[name], "prompt"}:
            row = ROWS[name]()[2] | {column: value}
            if value is ...:
                del row[column]
            folder, place = broken_data(tmp_path / column, name, row)
            kind = type(value).__name__ if what == "type" else what
            refused(name, f"{place}: {column}", kind, dataset=folder)


# ---- chats

USER, SYSTEM = {"role": "user", "content": "two figs?"}, {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "Yes."}
NO_MESSAGE = [{"role": None, "content": "Yes."}, {"role": "assistant"}, {"value": "Yes."}]
NO_MESSAGE += [ASSISTANT | {"content": content} for content in (None, 3, [{"type": "image"}])]
NOTHING_TO_LEARN = {
    "chat": ["hello"],  # a text is no `messages`, though it may be `chosen`
    "empty": [[], [USER, ASSISTANT | {"content": "\n"}]],
    "'role': 'human'": [[USER | {"role": "human"}, ASSISTANT]],
    **{f"'role': '{x}'": [[USER, ASSISTANT | {"role": x}]] for x in ("Assistant", "")},
    "chat message": [[USER, message] for message in NO_MESSAGE],
    "not the assistant's": [[SYSTEM], [USER, ASSISTANT, SYSTEM]],
}
NOTHING_TO_ANSWER = {
    "empty": [[]],
    "'role': '": [[USER | {"role": "human"}], [USER | {"role": "\x1b[31muser"}]],
    "chat message": [[message] for message in NO_MESSAGE],
}


def chats(folder: Path, column: str, good: list, messages: object) -> tuple[str, str]:
    """A data set of chats with a bad one as the fifth: (folder, the place to be named)."""
    no = [[USER, ASSISTANT | {"content": f"No {i}."}] for i in range(8)]
    rows = [{column: good, "rejected": chat} for chat in no]
    write_data(folder, rows, 2)
    rows[4] = rows[4] | {column: messages}
    return str(folder), f"{write_jsonl(folder / 'train.jsonl', rows)}:5"


@pytest.mark.parametrize("what", NOTHING_TO_LEARN)
@pytest.mark.parametrize(("name", "column"), [("sft", "messages"), ("reward_model", "chosen")])
def test_a_chat_to_learn_from(refused, base, name, column, what, tmp_path):
    """Its messages, their roles, and that the assistant has the last word; for `tiny` too."""
    for messages in NOTHING_TO_LEARN[what]:
        folder, place = chats(tmp_path / "data", column, [USER, ASSISTANT], messages)
        for model in (base.chat, "tiny") if name == "sft" else (base.chat,):
            refused(name, place, what, dataset=folder, model=model)


@pytest.mark.parametrize("what", NOTHING_TO_ANSWER)
def test_a_chat_to_answer(refused, base, rewards, what, tmp_path):
    """Its messages, their roles, and that there is something to answer."""
    model = {"model": base.chat, "reward_fn": f"{rewards}:length"}
    for messages in NOTHING_TO_ANSWER[what]:
        folder, place = chats(tmp_path / "data", "prompt", [USER], messages)
        refused("ppo", place, "prompt", what, dataset=folder, **model)


@each_stage
def test_a_chat_without_a_chat_template(refused, name, data):
    """Messages need a tokenizer that knows chats."""
    kind = {"sft": "sft", "reward_model": "preferences", "ppo": "prompts"}[name]
    folder = getattr(data, f"chat_{kind}")
    refused(name, f"{folder}/train.jsonl:1", "chat template", dataset=folder)


def test_a_chat_that_the_template_refuses(refused, base, tmp_path):
    """Many templates ask for turns that alternate."""
    model = Path(shutil.copytree(base.chat, tmp_path / "model"))
    refusal = "{{ raise_exception('turns must alternate') }}"
    template = "{% if messages | length > 2 %}" + refusal + "{% endif %}"
    (model / "chat_template.jinja").write_text(template + CHAT_TEMPLATE)
    folder, place = chats(tmp_path / "data", "messages", [USER, ASSISTANT], [USER, USER, ASSISTANT])
    refused("sft", place, "turns must alternate", dataset=folder, model=str(model))


# ---- what does not go together, or does not fit


PAIR = preference_rows()[2]
EQUAL, MIXED = PAIR | {"rejected": PAIR["chosen"]}, PAIR | {"rejected": [ASSISTANT]}


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        ("reward_model", EQUAL, "equal"),
        ("reward_model", as_chat(EQUAL), "equal"),
        ("reward_model", MIXED, "one answer is a text, the other a chat"),
        ("sft", {"prompt": "two figs?", "completion": [ASSISTANT]}, "write both alike"),
    ],
)
def test_fields_that_do_not_go_together(refused, base, name, row, what, tmp_path):
    """A pair without a better side, a text beside a chat, which the template would lose."""
    folder, place = broken_data(tmp_path / "data", name, row)
    refused(name, place, what, dataset=folder, model=base.chat)


def test_a_prompt_that_fills_the_context(refused, tokenizer, tmp_path):
    """sft.py needs room for a completion, ppo_rlhf.py for the response; the line is named."""
    long = "Q: " + "two figs " * 60
    folder, place = broken_data(tmp_path / "sft", "sft", {"prompt": long, "completion": " Yes."})
    refused("sft", place, dataset=folder)
    n = len(tokenizer(long)["input_ids"])
    refused("sft", place, f"no room for a completion within {n}", dataset=folder, max_length=n)
    folder, place = broken_data(tmp_path / "ppo", "ppo", {"prompt": long, "fruit": "figs"})
    refused("ppo", place, dataset=folder)
    refused("ppo", "response", response_length=128)


def test_a_prompt_without_tokens(refused, models, tmp_path):
    """A tokenizer that drops what it does not know leaves nothing of this one."""
    for name, source in (("policy", models.sft), ("judge", models.reward_model)):
        folder = Path(shutil.copytree(source, tmp_path / name))
        whole = json.loads((folder / "tokenizer.json").read_text())
        whole["normalizer"] = {"type": "Replace", "pattern": {"String": "☃"}, "content": ""}
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    folder, place = broken_data(tmp_path / "data", "ppo", {"prompt": "☃"})
    flags = {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "judge")}
    refused("ppo", place, "no token", dataset=folder, **flags)


@pytest.fixture
def short(tmp_path) -> str:
    """A GPT-2, whose learned positions end at 48: what is longer fails."""
    tokenizer = make_tokenizer()
    model = make_gpt2(len(tokenizer), tokenizer.eos_token_id, n_positions=48)
    return save_pair(tmp_path / "short", model, tokenizer)


def test_a_response_that_overflows_the_reward_model(refused, reward_model, data, short, tmp_path):
    """Prompt, response and EOS must fit into its context too, which may be the shorter one."""
    judge = reward_model(tmp_path / "judge", model=short, max_length=48)
    where = f"{data.prompts}/train.jsonl:"
    refused("ppo", where, reward_model=str(judge), response_length=45)


def test_ptx_data_are_checked_before_training(refused, ppo, rewards, short, tmp_path):
    """They are demonstrations as in sft.py, and cut as there: no IndexError in the midst of it."""
    folder, place = broken_data(tmp_path / "data", "sft", "x")
    refused("ppo", place, ptx_coef=1.0, ptx_dataset=folder)
    refused("ppo", "nowhere", ptx_coef=1.0, ptx_dataset=str(tmp_path / "nowhere"))
    write_jsonl(tmp_path / "ptx" / "train.jsonl", [{"text": "two figs " * 60}] * 4)
    flags = {"reward_fn": f"{rewards}:length", "model": short, "ptx_coef": 1.0}
    out = ppo(tmp_path / "long", ptx_dataset=str(tmp_path / "ptx"), **flags)
    assert metrics_of(out)[-1]["loss/ptx_avg"] > 0


def test_pairs_that_are_all_too_long(refused, tmp_path):
    """--max-length below every pair, or below every demonstration, leaves nothing."""
    refused("reward_model", "--max-length", max_length=8)
    long = write_data(tmp_path / "long", [{"prompt": "Q:", "completion": " two figs" * 100}] * 8, 2)
    refused("reward_model", "--max-length", normalize_with=long)


def test_demonstrations_for_the_normalization_are_read_before_training(
    refused, data, monkeypatch, tmp_path
):
    """They are checked like the rest, and are not the embedded task's for one's own data."""
    refused("reward_model", "nowhere", normalize_with=str(tmp_path / "nowhere"))
    place = f"{data.chat_sft}/train.jsonl:1"
    refused("reward_model", place, "chat template", normalize_with=data.chat_sft)
    monkeypatch.chdir(ROOT)
    refused("reward_model", "--normalize-with", normalize_with="data/support/sft")
    refused("reward_model", "--normalize-std", normalize_std=True, normalize_with="none")


def test_the_language_model_loss_needs_tied_embeddings(refused, tokenizer, tmp_path):
    """A classifier has no output layer but its embeddings (D46)."""
    make_model(tokenizer, tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    refused("reward_model", "--lm-coef", model=str(tmp_path / "untied"), lm_coef=1.0)


# ---- models


def without(folder: Path, part: str) -> None:
    """Take the weights whose names hold `part` out of a model's file."""
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if part not in k}, file, {"format": "pt"})


DAMAGES = {
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 20),
    "a weight missing": lambda folder: without(folder, "layers.1.mlp.up_proj"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "an illegible config": lambda folder: (folder / "config.json").write_text("{"),
    "an illegible adapter": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "an unknown kind": lambda folder: (folder / "config.json").write_text('{"model_type": "no"}'),
}


@each_stage
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_holds_no_model(refused, name, damage, base, tmp_path):
    """A model's folder with a part missing or broken."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "model"))
    DAMAGES[damage](folder)
    refused(name, str(folder), model=str(folder))


@each_stage
def test_a_name_that_is_no_model(refused, name, base):
    """A path that is not there or is a file, or what no hub has."""
    file = f"{base.plain}/model.safetensors"
    for model in ("./nowhere", "nobody/nothing", "no good name", "a/b/c", file):
        refused(name, model, model=model)


def test_models_that_do_not_fit(refused, base, tmp_path):
    """Without EOS nothing could end a completion; a value model reads the policy's tokens."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.eos_token = None
    refused("sft", "EOS", model=save_pair(tmp_path / "model", model, tokenizer))
    refused("ppo", "--value-model", "another tokenizer", value_model=base.other)


def test_a_reward_model_that_is_none(refused, models, tmp_path):
    """PPO would learn from a random head's noise; two labels are not one reward."""
    refused("ppo", "nowhere", reward_model=str(tmp_path / "nowhere"))
    headless = Path(shutil.copytree(models.reward_model, tmp_path / "headless"))
    without(headless, "score.weight")
    for folder in (models.sft, headless):
        refused("ppo", f"{folder}: is no reward model", reward_model=str(folder))
    auto = transformers.AutoModelForSequenceClassification
    two = auto.from_pretrained(models.sft, num_labels=2)
    folder = save_pair(tmp_path / "two", two, encoding.load_tokenizer(str(models.sft)))
    for name, flag in (("ppo", "reward_model"), ("ppo", "value_model"), ("reward_model", "model")):
        refused(name, folder, **{flag: folder})


# ---- flags


def each(names: str, *values: object) -> list[dict]:
    """Each of some flags with each of some values."""
    return [{name: value} for name in names.split() for value in values]


ALL = [
    {"batch_size": 6, "micro_batch_size": 4},
    *each("batch_size micro_batch_size learning_rate", 0),
    *each("max_grad_norm save_every eval_every seed", -1),
    *each("batch_size", -16),  # a multiple of --micro-batch-size
    *each("learning_rate", NAN),
    *each("seed", 2**64),
    *each("device", "abacus", "meta", "cuda:77", "hpu"),
]
FIRST_TWO = [*each("epochs", 0, -1), *each("warmup_ratio", 1.1, -0.1), *each("max_length", 0)]
NOT_0 = "total_episodes num_mini_batches num_ppo_epochs samples_per_prompt response_length "
NOT_0 += "kl_horizon eval_prompts temperature cliprange cliprange_value kl_target reward_clip "
NOT_0 += "target_kl top_p value_learning_rate cliprange_high"
MAY_BE_0 = "top_k critic_warmup_updates save_rollouts missing_eos_penalty kl_coef vf_coef "
MAY_BE_0 += "entropy_coef value_lam"
PPO = [
    *each(NOT_0, 0),
    *each(MAY_BE_0, -1),
    {"ptx_coef": -1.0, "ptx_dataset": "data/support/sft"},
    *each("kl_coef temperature gamma top_p reward_clip", NAN),
    *each("temperature cliprange missing_eos_penalty", INF),
    *each("gamma lam value_lam top_p", 1.5),
    *each("stop_token", "two words", ""),
    {"kl_horizon": 1, "kl_target": 6.0},
    {"total_episodes": 7},
    {"total_episodes": 16, "critic_warmup_updates": 2},
    {"batch_size": 8, "num_mini_batches": 3},
    {"samples_per_prompt": 3},
    *({"samples_per_prompt": 1, "advantage": x} for x in ("rloo", "grpo")),
    {"critic_warmup_updates": 1, "advantage": "batch_mean"},
    {"critic_warmup_updates": 1, "samples_per_prompt": 2, "advantage": "rloo"},
    {"value_model": "x", "advantage": "batch_mean"},
    {"value_lam": 0.0, "advantage": "batch_mean"},
    {"value_learning_rate": 1.0, "advantage": "batch_mean"},
    *({name: 0.5, "advantage": "batch_mean"} for name in ("gamma", "lam", "vf_coef")),
    {"cliprange_value": 0.5, "advantage": "batch_mean"},
    {"ptx_coef": 1.0},
    {"ptx_coef": 0.0, "ptx_dataset": "x"},
    {"kl_target": 6.0, "kl_coef": 0.0},
    {"kl_horizon": 5},
]
ALL += [{"lora_alpha": 16.0}, {"lora_target": "q_proj"}]
OF_STAGE = {"sft": ALL + FIRST_TWO, "reward_model": ALL + FIRST_TWO, "ppo": ALL + PPO}


@pytest.mark.parametrize(
    ("name", "flags"), [(name, flags) for name in STAGES for flags in OF_STAGE[name]], ids=str
)
def test_flags_that_are_wrong(refused, name, flags):
    """Out of range, or at odds with one another; the first is the one to be named."""
    refused(name, "--" + next(iter(flags)).replace("_", "-"), **flags)


def test_a_flag_given_twice(refused, monkeypatch):
    """Of a list, too, only the last would count."""
    for typed in ("--reward-model a --reward-model b", "--reward-model=a --reward_model=b"):
        monkeypatch.setattr("sys.argv", ["ppo_rlhf.py", *typed.split()])
        refused("ppo", "--reward-model", "twice", reward_model=("b",))


@pytest.mark.parametrize(
    ("name", "typed", "what"),
    [
        ("sft", "--batch-size 1.5", "--batch-size"),
        ("sft", "--batchsize 4", "--batchsize"),
        ("sft", "--dtype float16", "--dtype"),
        ("reward_model", "--learning-rate fast", "--learning-rate"),
        ("reward_model", "--seed 1 2", "2"),
        ("ppo", "--kl-estimator k4", "--kl-estimator"),
        ("ppo", "--model", "--model"),
    ],
)
def test_flags_as_typed(capsys, name, typed, what):
    """Words that are no flag, values of the wrong type: tyro names them and exits with 2."""
    with pytest.raises(SystemExit) as exit_:
        tyro.cli(importlib.import_module(MODULES[name]).Args, args=typed.split())
    captured = capsys.readouterr()
    assert (exit_.value.code, captured.out) == (2, "")
    assert what in captured.err


def test_flags_that_are_right():
    """Negative numbers, None, an equals sign, an underscore: what comes out is what was typed."""
    module = importlib.import_module("ppo_rlhf")
    typed = "--kl-coef -1 --kl-target None --seed=3 --batch_size 4 --overwrite"
    typed += " --no-whiten-advantages --dtype float32"
    wanted = {"kl_coef": -1.0, "kl_target": None, "seed": 3, "batch_size": 4, "overwrite": True}
    wanted |= {"whiten_advantages": False, "dtype": "float32"}
    assert tyro.cli(module.Args, args=typed.split()) == module.Args(**wanted)


# ---- reward functions

FUNCTIONS = """
value = 3
def raises(prompts, completions, **columns):
    raise ValueError("no luck\\nat all")
def one(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [float("nan")] * len(prompts)
def text(prompts, completions, **columns): return ["good"] * len(prompts)
def none(prompts, completions, **columns): pass
def narrow(prompts, completions): return [1.0] * len(prompts)
def calls(prompts, completions, **columns):
    return [__import__("json").loads(text + "{") for text in prompts]
def runs(prompts, completions, **columns):
    exec("1 / 0", {})
"""


@pytest.mark.parametrize("name", STAGES)
def test_a_dashboard_that_is_not_installed(name, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(name, "--track", "pip install wandb", track=True)


@pytest.mark.parametrize("flag", ["reward_fn", "eval_reward_fn"])
@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("functions.py:raises", "no luck"),
        ("functions.py:raises", "see its line 4"),
        ("functions.py:calls", "see its line 11"),  # where its own file raised it or called on
        ("functions.py:runs", "see its line 13"),
        ("functions.py:one", "1 values"),
        ("functions.py:nan", "nan"),
        ("functions.py:text", "ValueError"),
        ("functions.py:none", "TypeError"),
        ("functions.py:narrow", "fruit"),
        ("functions.py:narrow", "take **columns"),
        ("functions.py:missing", "missing"),
        ("functions.py:value", "value"),
        ("functions.py", "FILE.py:FUNCTION"),
        ("nowhere.py:f", "nowhere.py"),
        ("broken.py:f", "SyntaxError"),
        ("text.txt:f", "text.txt"),
    ],
)
def test_a_reward_function_that_fails(refused, flag, spec, what, tmp_path):
    """Before any training: the file, the function, what it returns or raises."""
    for name, text in (("functions.py", FUNCTIONS), ("broken.py", "def f(:\n"), ("text.txt", "f")):
        (tmp_path / name).write_text(text)
    refused("ppo", what, **{flag: str(tmp_path / spec)})


# ---- output folders


@each_stage
def test_a_folder_that_holds_a_run_stays_as_it_is(refused, request, name, tmp_path):
    """Without --resume or --overwrite, which the line names; or with flags of another run."""
    request.getfixturevalue(name)(tmp_path / "out", save_every=1)
    refused(name, str(tmp_path / "out"), "--resume", "--overwrite")
    refused(name, "--seed", resume=True, seed=2)
    refused(name, "--learning-rate", resume=True, learning_rate=0.5)
    refused(name, "--overwrite", resume=True, overwrite=True)


@each_stage
def test_a_folder_that_holds_something_else_stays_as_it_is(refused, name, chain, tmp_path):
    """With --overwrite or --resume too: a run of another stage, or files that are none of a run."""
    other = {"sft": chain.ppo, "reward_model": chain.sft, "ppo": chain.reward_model}[name]
    shutil.copytree(other, tmp_path / "run")
    write_jsonl(tmp_path / "files" / "thesis.txt", ["x"])
    for folder in ("run", "files"):
        (tmp_path / folder).rename(tmp_path / "out")
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            refused(name, "holds no run", **flags)
        shutil.rmtree(tmp_path / "out")


@each_stage
def test_the_model_stays_where_it_is(refused, name, chain, tmp_path):
    """A run does not go into the folder that it starts from, also if that is a run of its own."""
    shutil.copytree(getattr(chain, name), tmp_path / "out")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deeper")
    refused(name, "--output-dir", model=f"{tmp_path}/link/../out", overwrite=True)
    shutil.copytree(getattr(chain, name), tmp_path / "out" / "best")
    refused(name, "--output-dir", model=str(tmp_path / "out" / "best"), overwrite=True)
    rows = write_jsonl(tmp_path / "out" / "rows.jsonl", [{"prompt": "Q"}])
    refused(name, "--output-dir", dataset=(str(rows),), overwrite=True)
    others = "value_model reward_model reward_fn eval_reward_fn ptx_dataset"
    others = {"ppo": others, "reward_model": "normalize_with"}.get(name, "").split()
    for source in others:
        flags = {source: str(tmp_path / "out" / "best")}
        flags |= {"ptx_coef": 1.0} if source == "ptx_dataset" else {}
        refused(name, f"is or holds {utils.flag(source)}, ", **flags, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@each_stage
def test_an_output_that_cannot_be_a_folder(refused, error_of, request, name, tmp_path):
    """A file, a folder within a file, or where not even root may write."""
    (tmp_path / "out").write_text("x")
    refused(name, "cannot be written")
    for out in (tmp_path / "out" / "inner", Path("/proc/out")):
        line = error_of(request.getfixturevalue(name), out)
        assert line.startswith(f"error: {out}: cannot be written")


# ---- as one runs it


@pytest.mark.parametrize(
    ("name", "typed", "what"),
    [
        ("sft", "--batch-size 6 --micro-batch-size 4", "--batch-size"),
        ("sft", "--dataset {tmp}/broken", "{tmp}/broken/train.jsonl:3"),
        ("reward_model", "--model {tmp}/nowhere", "{tmp}/nowhere"),
        ("ppo", "--temperature 0", "--temperature"),
        ("ppo", "--model {base} --reward-model {base}", "{base}: is no reward model"),
    ],
)
def test_errors_on_the_command_line(base, name, typed, what, tmp_path):
    """The scripts themselves: code 2, on stderr that one line only, on stdout at most columns."""
    broken_data(tmp_path / "broken", "sft", '{"prompt": "a", "completion": }')
    places, out = {"tmp": tmp_path, "base": base.plain}, tmp_path / "out"
    words = ["--device", "cpu", *typed.format(**places).split(), "--output-dir", str(out)]
    result = command(f"{MODULES[name]}.py", *words)
    assert result.returncode == 2
    assert all(": reads " in line for line in result.stdout.splitlines())
    assert error_line(result.stderr) + "\n" == result.stderr
    assert what.format(**places) in result.stderr
    assert not out.exists()


def test_flags_on_the_command_line():
    """--help lists them in kebab-case with what they mean; a wrong one ends in code 2."""
    result = command("reward_model.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--micro-batch-size" in result.stdout
    assert "--normalize-with" in result.stdout
    result = command("ppo_rlhf.py", "--clip-range", "0.2")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--clip-range" in result.stderr
