"""B23 to B39 and B45: inputs that people have, each read right or refused out loud."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import (
    CHAT_TEMPLATE,
    ROOT,
    change_config,
    make_model,
    make_tokenizer,
    metrics_of,
    rows_of,
    save_pair,
    write_data,
    write_jsonl,
)

import dataset
import encoding
import generate
import reward_model as reward_model_stage
import utils

CPU = torch.device("cpu")
PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
USER, GOOD = {"role": "user", "content": "two figs?"}, {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "No."}


TALK = [USER, GOOD, {"role": "user", "content": "six limes?"}, BAD]
TURNS = [{"from": "human", "value": "two figs?"}, {"from": "gpt", "value": "Yes."}]
ANSWERS = {"chosen": "a", "rejected": "b"}


def load(path, split="train[:]", formats=dataset.SFT_FORMATS, columns=()):
    return dataset.load_data(str(path), split, formats, SimpleNamespace(columns=columns))


def read(tmp_path, rows, formats=dataset.SFT_FORMATS, columns=(), split="train[:]"):
    return load(write_jsonl(tmp_path / "rows.jsonl", rows), split, formats, columns)


def flags_of(*names, train="train", evaluation="validation", **more):
    """A stage's flags about its data."""
    flags = {"dataset": [str(n) for n in names], "train_split": train, "eval_split": evaluation}
    flags |= {"columns": (), "dataset_weights": (), "revision": None, "seed": 1}
    return SimpleNamespace(**flags | more)


def chatty(template=None):
    """A tokenizer with a chat template, another one than ours if told so."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def only(row, *names):
    return {name: row[name] for name in names}


def test_b23_ids_that_the_tokenizer_does_not_know(models, tmp_path):
    """A vocabulary padded by 64 ids, and made to prefer them: none is sampled, none counts."""
    tokenizer = encoding.load_tokenizer(str(models.sft))
    plain = utils.load_causal_lm(str(models.sft), CPU, tokenizer)
    known = len(tokenizer)
    plain.resize_token_embeddings(known + 64, mean_resizing=False)
    plain.get_input_embeddings().weight.data[known:] *= 50
    folder = save_pair(tmp_path / "padded", plain, tokenizer)
    model = utils.load_causal_lm(folder, CPU, tokenizer)
    prompt = torch.tensor([tokenizer("Q: two ripe plums?\nA:")["input_ids"]] * 64)
    flags = {"pad_id": tokenizer.pad_token_id, "temperature": 5.0}
    uniform = generate.random_numbers(64, 20, torch.Generator().manual_seed(1))
    given = (model, prompt, torch.ones_like(prompt), uniform, [tokenizer.eos_token_id])
    ids, _ = generate.generate(*given, **flags)
    assert ids.max() < known
    with torch.no_grad():
        logits = utils.logits_of(model, utils.hidden_states(model, prompt)[:, -1])
    assert (logits.softmax(-1)[:, known:] == 0).all()
    assert logits.log_softmax(-1)[:, :known].isfinite().all()
    gaps = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": known + 2})  # more ids than tokens
    assert utils.load_causal_lm(folder, CPU, gaps).known_tokens == known + 3


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("train[:16]", range(16)),
        ("train[16:]", range(16, 40)),
        ("train[-10%:]", range(36, 40)),
        ("train[-50:3]", range(3)),
        ("train[:-1%]", range(40)),
        ("train", range(38)),
        ("validation", range(38, 40)),
        ("validation[-1:]", range(39, 40)),
        ("validation[:50%]", range(38, 39)),
    ],
)
def test_b24_slices_count_the_files_own_rows(tmp_path, split, wanted):
    rows = [{"text": f"row {i}"} for i in range(40)]
    assert read(tmp_path, rows, split=split) == [rows[i] for i in wanted]


def test_b24_other_names_of_the_evaluation_split(tmp_path, error_of):
    """`validation` takes `test`; shards are one split; a name that is not there is refused."""
    for name, n in (("train-00000-of-00002", 1), ("train-00001-of-00002", 2), ("test", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(n)])
    assert len(load(tmp_path, "train")) == 3
    assert len(load(tmp_path, "validation")) == 3
    assert "no split tset; pass test, train" in error_of(load, tmp_path, "tset")
    (own := tmp_path / "validation.jsonl").write_text('{"text": "own"}\n')
    assert [row["text"] for row in load(tmp_path, "validation")] == ["own"]  # beside `test`
    own.unlink()
    (tmp_path / "test.jsonl").rename(tmp_path / "validation_matched.jsonl")
    args = flags_of(tmp_path, evaluation="validation_matched")  # so nothing of train is held out
    assert list(map(len, dataset.load_splits(args, dataset.SFT_FORMATS))) == [3, 3]


def test_b24_rows_in_both_splits_are_said(tmp_path, capsys):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i}"} for i in range(8)])
    args = flags_of(path, train="train[:6]", evaluation="train[4:]")
    dataset.load_splits(args, dataset.SFT_FORMATS)
    assert "2 of 4 evaluation rows are training rows too" in capsys.readouterr().out
    rows = [{"id": i, "text": f"row {i % 4}"} for i in range(8)]  # another id, the same row
    args.dataset = [str(write_jsonl(path, rows))]
    dataset.load_splits(args, dataset.SFT_FORMATS)
    assert "4 of 4 evaluation rows are training rows too" in capsys.readouterr().out


def test_b25_a_folder_of_save_to_disk(tmp_path):
    """The cache files that `map` leaves in it are not rows; one table alone is a `train`."""
    import datasets

    table = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(24)])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    again = datasets.load_from_disk(tmp_path / "two")
    again.map(lambda row: {"text": row["text"].upper()})
    for name in ("train", "validation"):
        assert load(tmp_path / "two", name) == table.to_list()
    table.save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one", "train")) == 23


def test_b26_a_column_that_matters_is_never_ignored(tmp_path, error_of):
    rows = [{"question": "Q", "text": "a"}] * 2
    assert "question ignored" in error_of(read, tmp_path, rows)
    assert only(read(tmp_path, rows, columns=["question="])[0], "text") == {"text": "a"}
    found = read(tmp_path, rows, columns=["prompt=question", "completion=text"])[0]
    assert only(found, "prompt", "completion") == {"prompt": "Q", "completion": "a"}
    swapped = read(tmp_path, rows, columns=["question=text", "text=question"])[0]
    assert swapped == {"question": "a", "text": "Q"}  # all are read before any is written
    assert "--columns" in error_of(read, tmp_path, rows, columns=["prompt=nowhere"])
    rows = [{"question": [USER], "chosen": "a", "rejected": "b"}]  # a chat, where Orca has text
    assert "question ignored" in error_of(read, tmp_path, rows, PAIRS)


def test_b26_known_layouts(tmp_path):
    """LLaMA-Factory's and Orca's pairs, Alpaca, ShareGPT, KTO."""
    for row, prompt in (
        ({"instruction": "I", "input": "X"}, "I\n\nX\n\n"),
        ({"system": "S", "question": "Q"}, "S\n\nQ\n\n"),
        ({"system": "", "question": "Q"}, "Q\n\n"),
    ):
        assert read(tmp_path, [row | ANSWERS], PAIRS)[0]["prompt"] == prompt
    found = read(tmp_path, [{"instruction": "I", "input": "", "output": "O"}])[0]
    assert only(found, "prompt", "completion") == {"prompt": "I\n\n", "completion": "O"}
    assert read(tmp_path, [{"conversations": TURNS}])[0]["messages"] == [USER, GOOD]
    answer = {"from": "gpt", "value": "No."}  # one message each, no list
    row = {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": answer}
    wanted = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert read(tmp_path, [row], PAIRS) == [wanted]
    kto = [{"prompt": "Q", "completion": c, "label": c == "good"} for c in ("bad", "good", "bad")]
    assert [row["completion"] for row in read(tmp_path, kto)] == ["good"]


def test_b27_a_trained_head_is_kept(models, reward_model, tmp_path, capsys):
    """A trained reward model goes on from its own head."""
    before = utils.load_classifier(str(models.reward_model), CPU, trained=True)
    out = reward_model(tmp_path / "out", model=str(models.reward_model), learning_rate=1e-6)
    assert "has a trained head, which is kept" in capsys.readouterr().out
    after = utils.load_classifier(str(out), CPU, trained=True)
    assert torch.allclose(before.score.weight, after.score.weight, atol=1e-3)
    out = reward_model(tmp_path / "raw", model=str(models.reward_model), normalize_with="none")
    config = utils.load_classifier(str(out), CPU).config
    assert before.config.reward_mean != 0  # its shift, which is no part of the head, is not
    assert (config.reward_mean, config.reward_std) == (0.0, 1.0)


def test_b28_the_models_own_ends(models):
    """Ids of the generation config end a response beside EOS; each once."""
    tokenizer = encoding.load_tokenizer(str(models.sft))
    config = utils.load_causal_lm(str(models.sft), CPU, tokenizer).generation_config
    eos = tokenizer.eos_token_id
    assert generate.stop_token_ids(tokenizer, "eos", config) == [eos]
    for ids, wanted in (([eos, 3, 99], [eos, 3]), (None, [eos])):  # 99 is an ordinary token
        config.eos_token_id = ids
        assert generate.stop_token_ids(tokenizer, "eos", config) == wanted


def test_b29_asked_as_it_was_trained():
    """A line break that the template puts after a turn is no part of an answer: sampling stops."""
    tokenizer = chatty(CHAT_TEMPLATE.replace("<|end|>'", "<|end|>\\n'"))
    [(ids, _)] = encoding.encode(tokenizer, [encoding.render(tokenizer, [USER], [GOOD])])
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]).endswith("<|end|>")


def test_b29_texts_and_chats_in_one_batch():
    """Each response ends as the reward model has learned it of its kind."""
    tokenizer = chatty()
    rows = [dataset.Row({"prompt": prompt}, "f:1") for prompt in ("two figs?", [USER], "six?")]
    prompts = encoding.encode_prompts(tokenizer, rows, 99)
    answers = [tokenizer("Yes.")["input_ids"]] * 3
    sequences, _ = encoding.as_judged((tokenizer, 99), prompts, answers)
    chat = "<|user|>two figs?<|end|><|assistant|>Yes.<|end|><eos>"
    assert [*map(tokenizer.decode, sequences)] == ["two figs?Yes.<eos>", chat, "six?Yes.<eos>"]


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\\n", "<~end~>\\n"])
def test_b29_what_ends_a_response_is_there_once(end):
    """Whichever token ended it, and where a turn's end is of ordinary tokens, as those of a text.

    Nothing of the response itself is taken for such a token.
    """
    tokenizer = chatty(CHAT_TEMPLATE.replace("<|end|>'", f"{end}'"))
    [prompt] = encoding.encode_prompts(tokenizer, [dataset.Row({"prompt": [USER]}, "f:1")], 99)
    turn_end = tokenizer(end.removesuffix("\\n"))["input_ids"]
    eos, another = [tokenizer.eos_token_id], [tokenizer.pad_token_id]
    for text in ("Yes.", "Yes, ~end~", "Yes.\n\n"):
        answer = tokenizer(text)["input_ids"]
        for ended in ([], turn_end[:1], turn_end, eos, turn_end + eos, another):
            given = ((tokenizer, 99), [prompt], [answer + ended], eos + another)
            assert encoding.as_judged(*given)[0] == [prompt.ids + answer + turn_end + eos]
        role = tokenizer("<|user|>")["input_ids"]  # no stop: it is part of the response
        for ended in (role, role + eos):
            given = ((tokenizer, 99), [prompt], [answer + ended], eos + another)
            assert encoding.as_judged(*given)[0] == [prompt.ids + answer + role + turn_end + eos]


def test_a_pad_token_without_an_embedding(models, sft, reward_model, tmp_path):
    """Added to the tokenizer alone: EOS is used for padding."""
    tokenizer = encoding.load_tokenizer(str(models.sft))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = save_pair(tmp_path / "model", utils.load_causal_lm(str(models.sft), CPU), tokenizer)
    assert encoding.load_tokenizer(folder).pad_token == tokenizer.eos_token
    sft(tmp_path / "sft", model=folder)
    reward_model(tmp_path / "reward_model", model=folder)


def test_b30_one_bos():
    tokenizer = make_tokenizer(bos="<bos>")
    for prompt, answer in (("<bos>Q: two figs?", " Yes."), ("", "<bos>Q: two figs?")):
        [(ids, _)] = encoding.encode(tokenizer, [encoding.render(tokenizer, prompt, answer)])
        assert ids.count(tokenizer.bos_token_id) == 1


def test_b32_called_by_keyword():
    """Whatever the order of a function's parameters."""
    asked = [encoding.Prompt([1], "p", {"prompt": "p"})]
    function = lambda completions, prompts=None, **kw: [len(completions[0])]  # noqa: E731
    assert utils.call_reward_function(function, "f", asked, ["four"], [[1]])[0] == [4.0]


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_b33_a_chat_kept_as_text(tmp_path, write):
    assert read(tmp_path, [{"messages": write([USER, GOOD])}])[0]["messages"] == [USER, GOOD]
    pair = {"prompt": [USER], "chosen": write(GOOD), "rejected": write(BAD)}  # a message each
    assert read(tmp_path, [pair], PAIRS)[0]["chosen"] == [GOOD]
    data = '{"role": "user", "content": "Hi", "id": 1}'  # a prompt may hold some
    for text in ("[{not a chat}]", '[{"a": 1, "b": 2}]', data):
        assert dataset.parsed_chat(text) == text


def test_b33_an_answer_in_json_is_a_text(tmp_path, error_of):
    """A list of objects is a chat where one has a role; what looks like a chat must be whole."""
    for text in (
        '[{"value": 3, "unit": "m"}]',
        '[{"content": "two figs"}]',
        '[{"from": "Paris", "to": "Rome"}]',
        '[{"name": "Ann", "role": "engineer"}]',
    ):
        [row] = read(tmp_path, [{"prompt": "two figs?", "completion": text}])
        assert row["completion"] == text
    for text, what in (
        ('[{"role": "user", "content": "two figs?"}, {"role": "assis', "cannot be parsed"),
        ('[{"role": "user", "text": "two figs?"}]', "no chat message"),
        ('[{"from": "human", "text": "two figs?"}]', "no chat message"),
        ('[{"role": "assistant", "content": "Yes."}, {"content": "No."}]', "no chat message"),
        ('[{"role": "critic", "content": "Yes."}]', "no chat message"),
    ):
        assert what in error_of(read, tmp_path, [{"prompt": "two figs?", "completion": text}])


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_b45_nulls_that_a_table_adds(tmp_path, kind):
    """A call has its own tool's arguments, not those of other rows; what a row lacks it lacks."""
    calls = [("weather", {"city": "Paris"}), ("write", {"content": "Hi", "to": None})]
    rows = []
    for name, arguments in calls:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        rows.append({"messages": [USER, answer], "note": None if name == "write" else "a"})
    import datasets

    table, path = datasets.Dataset.from_list(rows), tmp_path / "t.parquet"
    if kind == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path := tmp_path / "saved")
    for row, (name, arguments) in zip(load(path), calls, strict=True):
        question, answer = row["messages"]
        assert question == USER
        assert answer["content"] is None
        own = {k: x for k, x in arguments.items() if x is not None}
        function = {"name": name, "arguments": own}
        assert answer["tool_calls"] == [{"type": "function", "function": function}]
        assert "note" in row


def test_a_first_row_without_a_column(tmp_path, capsys, error_of):
    """It is left out like any other; where most rows lack one, the columns that are there help."""
    rows = [{"prompt": "two figs?"}, *({"prompt": "p", "completion": "c"} for _ in range(20))]
    assert len(read(tmp_path, rows)) == 20
    assert "1 of 21 rows are left out" in capsys.readouterr().out
    line = error_of(read, tmp_path, [{"question": "two figs?", "answer": "Yes."}])
    assert "most rows have no prompt,completion or messages or text, but question,answer" in line


@pytest.mark.parametrize("prompt", ["two figs?", [USER]])
def test_b34_a_prompt_that_is_the_answers_head_too(tmp_path, prompt):
    rows = [{"prompt": prompt, "chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    tokenizer = chatty()
    [pair] = reward_model_stage.encode(tokenizer, read(tmp_path, rows, PAIRS), 99)
    whole = tokenizer.apply_chat_template([USER, GOOD], tokenize=False)
    assert tokenizer.decode(pair.chosen) == whole + tokenizer.eos_token
    rows = [{"prompt": "two figs?", "messages": [USER, GOOD]}]
    assert read(tmp_path, rows) == [{"messages": [USER, GOOD]}]


def test_the_embedded_task_is_read_whole():
    """No column of it is one that matters and is ignored."""
    for name, formats in (("sft", dataset.SFT_FORMATS), ("preferences", PAIRS)):
        assert load(ROOT / "data" / "support" / name, "train", formats)


def test_each_stage_shows_its_first_example(sft, reward_model, ppo, tmp_path, capsys):
    """As the model sees it: special tokens and line breaks are to be seen."""
    for stage, ends in ((sft, 1), (reward_model, 2), (ppo, 0)):
        stage(tmp_path / str(ends))
        lines = capsys.readouterr().out.splitlines()
        shown = "\n".join(line for line in lines if line.startswith("first example"))
        assert "Q: " in shown
        assert "\\nA:" in shown
        assert shown.count("<eos>") == ends


SFT, ALPACA = dataset.SFT_FORMATS, {"instruction": "I", "input": "x", "output": "O"}


@pytest.mark.parametrize(
    ("row", "formats", "columns", "lost"),
    [
        ({"messages": [USER], **ANSWERS}, PAIRS, [], "messages"),
        ({"system": "s", "input": "q", **ANSWERS}, PAIRS, ["system="], "input"),
        (ALPACA, SFT, ["prompt=instruction", "completion=output", "instruction="], "input"),
        ({"text": "toxic", "label": True}, SFT, [], "label"),
        ({"messages": [USER, GOOD], "videos": ["v.mp4"]}, SFT, [], "videos"),
    ],
)
def test_b26_more_columns_that_matter(tmp_path, error_of, row, formats, columns, lost):
    assert f"{lost} ignored" in error_of(read, tmp_path, [row] * 2, formats, columns)


def test_b26_a_later_row_has_a_column_that_matters(tmp_path, error_of):
    rows = [{"text": "a"}, {"text": "b", "system": "s"}]
    assert "system ignored" in error_of(read, tmp_path, rows)


def test_ppo_keeps_its_prompt_and_columns(tmp_path):
    """A last word of the user too, which SFT leaves off."""
    chats = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    rows = [{"prompt": "two figs?"} | chats, {"prompt": [USER, GOOD, USER]} | chats]
    assert read(tmp_path, rows, dataset.PROMPT_FORMATS) == rows


def test_what_only_looks_like_a_chat(tmp_path, error_of):
    """A template with brackets stays a text; a field of another type is refused, no traceback."""
    rows = [{"prompt": text, "completion": "c"} for text in ('[{{"a": 1}}]', "[{[]: 1}]", "[{{}}]")]
    assert read(tmp_path, rows) == rows
    for row in ({"messages": {"a": 1}}, {"conversations": [{"from": ["x"], "value": "q"}]}):
        assert "messages" in error_of(read, tmp_path, [row])


def test_b33_a_chat_as_numpy_writes_it(tmp_path):
    """Without commas, as pandas does for what it has read from parquet; what is broken is left."""
    text = repr([USER, GOOD]).replace("}, {", "}\n {")
    assert read(tmp_path, [{"messages": text}])[0]["messages"] == [USER, GOOD]
    for broken in ("[{'role': 'user', 'content': ...", "[{'id': 1, 'role': 'user', 'content': ..."):
        rows = [{"text": "a"}] * 20 + [{"text": broken}]
        assert len(read(tmp_path, rows)) == 20


def test_b34_a_text_prompt_that_is_the_answers_head_too(tokenizer, tmp_path, error_of, capsys):
    """Texts that begin with the whole prompt, in most rows; in a single one it is by chance."""
    row = {"prompt": "Q: figs?", "chosen": "Q: figs? Yes.", "rejected": "Q: figs? No."}
    other = {"prompt": "Hi", "chosen": "Hi! How are you?", "rejected": "Hi there."}
    whole = read(tmp_path, [row, row, other], PAIRS)
    pair = reward_model_stage.encode(tokenizer, whole, 99)[0]
    assert tokenizer.decode(pair.chosen) == "Q: figs? Yes.<eos>"
    assert pair.chosen_length == len(tokenizer(" Yes.")["input_ids"]) + 1
    apart = row | {"chosen": " Yes.", "rejected": " No."}
    assert read(tmp_path, [other, apart, apart], PAIRS)[0]["chosen"] == "Hi! How are you?"
    assert read(tmp_path, [apart | {"completion": row["chosen"]}])[0]["completion"] == " Yes."
    assert "3 of 3 rows have the prompt in their answers" in capsys.readouterr().out
    copied = [{"prompt": "I is.", "completion": text} for text in ("I is.", "I is.", "I am.")]
    assert read(tmp_path, copied) == copied  # to be corrected, most are right
    assert "the other does not" in error_of(
        read, tmp_path, [row, row | {"chosen": "Yes."}, row], PAIRS
    )


def test_one_bad_row_among_good_ones_is_left_out(tmp_path):
    """Its columns are not held against the others."""
    rows = [{"conversations": TURNS}] * 19 + [{"conversations": None}]
    assert len(read(tmp_path, rows)) == 19
    row = {"prompt": "two figs?", "messages": [USER, GOOD]}
    assert len(read(tmp_path, [row] * 19 + [row | {"messages": [USER]}])) == 19


def test_fields_that_are_no_text(tmp_path, error_of):
    """A chat as `text`, an image among the parts, a null character."""
    contents = ([{"type": "image", "text": None}], "a\0b")
    rows = [{"messages": [USER | {"content": content}, GOOD]} for content in contents]
    for row in ({"text": [USER, GOOD]}, *rows):
        assert "cannot be used" in error_of(read, tmp_path, [row] * 2)


# ---- B31, B35, B36, D44


def test_b31_prompts_have_room_in_every_model(models, base):
    """Also in a reward model with another tokenizer and a shorter context, from the start on."""
    tokenizer = encoding.load_tokenizer(str(models.sft))
    rows = [dataset.Row({"prompt": f"Q: two figs?{' figs' * n}\nA:"}, f"f:{n}") for n in range(20)]
    judge = encoding.load_tokenizer(base.other)
    [(ids, _)] = encoding.encode(judge, [encoding.render(judge, rows[18]["prompt"], "a")])
    kept = encoding.encode_prompts(tokenizer, rows, 99, (judge, len(ids)))
    assert [prompt.row.place for prompt in kept] == [f"f:{n}" for n in range(19)]
    assert all(encoding.answer_end(judge, prompt) == [judge.eos_token_id] for prompt in kept)


def test_b31_prompt_and_response_fit_into_the_value_model(models, refused, data, tmp_path):
    """Which may have a shorter context than the policy."""
    tokenizer = encoding.load_tokenizer(str(models.sft))
    longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in rows_of(data.prompts))
    folder = shutil.copytree(models.reward_model, tmp_path / "short")
    short = change_config(folder, max_position_embeddings=longest + 5)  # of a response's 10
    refused("ppo", "leave the response no room", value_model=short)


@pytest.mark.parametrize("other", [True, False])
def test_b31_a_long_response_is_cut_before_its_end(
    models, ppo, reward_model, base, monkeypatch, tmp_path, other
):
    """And counted: the reward model reads as much as its context holds, and the end token."""
    folder = shutil.copytree(base.other if other else base.plain, tmp_path / "base")
    short = change_config(folder, max_position_embeddings=40)
    judge = reward_model(tmp_path / "judge", model=short, max_length=40, normalize_with="none")
    seen, last_token_scores = [], utils.last_token_scores

    def scores(model, ids, mask):
        seen.extend(zip(ids.tolist(), mask.sum(1).tolist(), strict=True))
        return last_token_scores(model, ids, mask)

    monkeypatch.setattr(utils, "last_token_scores", scores)
    flags = {"reward_model": str(judge), "value_model": str(models.sft), "response_length": 60}
    flags |= {"eval_every": 0, "missing_eos_penalty": 0.1, "temperature": 3.0}
    out = ppo(tmp_path / "out", **flags)
    assert 0 < metrics_of(out)[0]["response/cut_rate"] <= 1
    eos = encoding.load_tokenizer(str(judge)).eos_token_id
    assert max(n for _, n in seen) == 40
    assert all(ids[n - 1] == eos for ids, n in seen)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_b31_the_answer_is_cut_not_the_prompt(kind):
    """By token ids and by text alike; as many are left as leave room for the end."""
    tokenizer = chatty() if kind == "chat" else make_tokenizer(bos="<bos>")
    rows = [dataset.Row({"prompt": [USER] if kind == "chat" else "Q: two figs?"}, "f:1")]
    prompts, text = encoding.encode_prompts(tokenizer, rows, 99), " Yes, two figs." * 9
    end = tokenizer("<|end|><eos>" if kind == "chat" else "<eos>", add_special_tokens=False)
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = (prompts[0].ids + answer)[: 30 - len(end["input_ids"])] + end["input_ids"]
    whole = prompts[0].ids + answer + end["input_ids"]
    for given in (answer, text):
        assert encoding.as_judged((tokenizer, 30), prompts, [given]) == ([expected], [True])
        reader = (tokenizer, len(whole))  # where it just fits
        assert encoding.as_judged(reader, prompts, [given]) == ([whole], [False])
    assert len(expected) == 30 and len(prompts[0].ids) < 20


def test_b35_logits_are_not_rounded_to_bfloat16(tokenizer):
    """At logits of 14: log-probabilities within 0.01 of float64's, a floor of 2e-5 in approxkl."""
    model = make_model(tokenizer, hidden_size=64)
    model.get_output_embeddings().weight.data *= 2.5
    ids = torch.randint(6, len(tokenizer), (16, 60))
    with torch.no_grad(), utils.autocast(CPU, "bfloat16"):
        hidden = utils.hidden_states(model, ids).flatten(0, 1)
        logprobs = utils.logits_of(model, hidden).log_softmax(-1).double()
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    assert 10 < exact.abs().max() < 20
    error = logprobs - exact.log_softmax(-1)
    assert error.abs().max() < 0.01
    assert (error.square() / 2).mean() < 2e-5


def test_b35_sampling_reads_the_same_logits(tokenizer, monkeypatch):
    """The decoding loop takes its logits from the function that training takes them from."""
    model, asked = make_model(tokenizer), []
    monkeypatch.setattr(utils, "logits_of", lambda m, h: asked.append(h) or m.lm_head(h))
    prompt = torch.tensor([[7, 8, 9]])
    real, uniform = torch.ones_like(prompt), generate.random_numbers(1, 4)
    generate.generate(model, prompt, real, uniform, [1], pad_id=0, temperature=0)
    assert asked


def trained(texts, before, decoder, unknown=None, **flags):
    """A tokenizer for the texts."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown))
    bpe.pre_tokenizer, bpe.decoder = before, decoder
    flags |= {"special_tokens": ["<pad>", "</s>"], "show_progress": False}
    bpe.train_from_iterator(texts * 9, tokenizers.trainers.BpeTrainer(**flags))
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def metaspace():
    """A tokenizer that puts a space before each text, as SentencePiece's does."""
    before, decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    return trained(["Answer:\n it is", "it is\n", "Answer: so it is"], before, decoder, "<pad>")


def line_breaks():
    """A tokenizer that joins a colon and line breaks to one token, as Llama 3's and Qwen's do."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|[^\w]+"), "isolated")
    before = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    flags = {"vocab_size": 400, "initial_alphabet": byte_level.alphabet()}
    texts = ["Answer:\n\nit is", "Answer:\nit is", "is\n\n\nit", ":\n"]
    return trained(texts, before, tokenizers.decoders.ByteLevel(), **flags)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Answer:\n", "it is"),
        ("Answer:", " it is"),
        ("Answer: ", "it is"),
        ("", "it is"),
        ("Answer:", "\nit is"),
        ("Answer:\n", "\n\nit is"),
    ],
)
@pytest.mark.parametrize("make", [metaspace, make_tokenizer, line_breaks])
def test_b36_tokens_of_the_joined_text(make, prompt, answer):
    """The text is the joined one; the prompt's tokens are those that it has alone."""
    tokenizer = make()
    [(ids, learned)] = encoding.encode(tokenizer, [encoding.render(tokenizer, prompt, answer)])
    assert tokenizer.decode(ids) == prompt + answer + tokenizer.eos_token
    n = len(ids) - sum(learned)
    assert ids[:n] == tokenizer(prompt)["input_ids"]


MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def taught(tokenizer, messages) -> str:
    """What is learned of a conversation."""
    row = dataset.Row({"messages": messages}, "f:1")
    [(ids, learned)] = encoding.encode_demonstrations(tokenizer, [row], 500)
    return tokenizer.decode([i for i, x in zip(ids, learned, strict=True) if x])


@pytest.mark.parametrize("marked", [False, True])
def test_d44_every_turn_of_the_assistant_is_learned(marked):
    """And nothing else: found by rendering prefixes, or by the template's own marks."""
    tokenizer = chatty(MARKED if marked else None)
    row = dataset.Row({"messages": TALK}, "f:1")
    [(ids, learned)] = encoding.encode_demonstrations(tokenizer, [row], 500)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False) + tokenizer.eos_token
    assert tokenizer.decode(ids) == whole
    assert taught(tokenizer, TALK) == "Yes.<|end|>No.<|end|><eos>"
    [(_, last)] = encoding.encode_demonstrations(tokenizer, [row], 500, all_turns=False)
    assert sum(last) < sum(learned)


def test_d44_only_the_last_turn(sft, base, tmp_path, capsys):
    """With --last-turn-only; what the first example shows behind every other arrow is learned."""
    folder = write_data(tmp_path / "data", [{"messages": TALK}] * 20, 2)
    for last, turns in ((False, ["'Yes.<|end|>'", "'No.<|end|>'"]), (True, ["'No.<|end|>'"])):
        out = tmp_path / str(last)
        sft(out, model=base.chat, dataset=folder, last_turn_only=last, epochs=1)
        shown = re.search("^first example: (.*)$", capsys.readouterr().out, re.M)[1]
        assert shown.split(" -> ")[1::2] == turns


def test_d44_two_messages_of_the_assistant_stay_two():
    """As after a tool call; only a text goes on with a message that is begun."""
    assert taught(chatty(), [USER, GOOD, BAD]) == "Yes.<|end|>No.<|end|><eos>"


def test_d44_a_template_that_rewrites_earlier_turns(error_of):
    """It is refused, and the way out is named."""
    tokenizer = chatty(
        "{% for m in messages %}<|{{ m.role }}|>{{ 'Hm. ' if loop.last and m.role == 'assistant' }}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = dataset.Row({"messages": TALK}, "f:1")
    line = error_of(encoding.encode_demonstrations, tokenizer, [row], 500)
    assert "rewrites earlier turns" in line
    assert "--last-turn-only" in line
    assert encoding.encode_demonstrations(tokenizer, [row], 500, all_turns=False)


# ---- chats of other forms


def rendered(prompt, answer=None, template=None):
    return encoding.render(chatty(template), prompt, answer).pieces


def test_a_prompt_that_begins_the_answer():
    """A last message of the assistant is continued, in sampling and in scoring."""
    begun = [USER, {"role": "assistant", "content": "Yes, two"}]
    start = "<|user|>two figs?<|end|><|assistant|>Yes, two"
    assert rendered(begun) == [start]
    assert rendered(begun, " figs.") == [start, " figs.<|end|>"]


THINK = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def test_a_template_whose_prompt_opens_think():
    """The answer is learned after it, as sampling will find it."""
    given, learned = rendered([USER], "Yes.", THINK)
    assert given == "<|user|>two figs?<|end|><|assistant|><think>\n"
    assert learned == "Yes.<|end|>"


def test_parts_tool_calls_and_a_last_word_of_the_user(tmp_path):
    """Texts in parts are joined, a call needs no content, SFT leaves a last question off."""
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "figs?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": "2"}
    talk = [USER | {"content": parts}, call, result, GOOD, USER]
    assert read(tmp_path, [{"messages": talk}])[0]["messages"] == [USER, call, result, GOOD]


def test_an_answer_that_the_reward_models_template_cannot_render():
    """An empty one, say, is put where another stood; without a template, the policy's text."""
    tokenizer = chatty(
        "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}"
        "<|{{ m.role }}|>{{ 'final: ' if m.role == 'assistant' }}{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = dataset.Row({"prompt": [USER]}, "f:1")
    pieces = encoding.answered(tokenizer, row, "", "").pieces
    assert pieces == ["<|user|>two figs?<|end|><|assistant|>", "final: <|end|>"]
    [prompt] = encoding.encode_prompts(tokenizer, [row], 999, (tokenizer, 999))
    assert tokenizer.decode(encoding.answer_end(tokenizer, prompt)) == "<|end|><eos>"
    given = ["<|user|>two figs?", "Yes."]
    assert encoding.answered(make_tokenizer(), row, *given).pieces == given


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_a_tokenizer_that_knows_no_letter_a(unknown):
    """As one of digits: prompts begin with BOS alone, answers end with EOS alone."""
    names = ["<pad>", "<eos>", "<bos>", *"0123456789", *([unknown] if unknown else [])]
    ids = {name: i for i, name in enumerate(names)}
    digits = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token=unknown))
    digits.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    digits.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos")}
    reader = transformers.PreTrainedTokenizerFast(tokenizer_object=digits, **special)
    row = dataset.Row({"prompt": "12"}, "f:1")
    [prompt] = encoding.encode_prompts(reader, [row], 99, (reader, 99))
    assert reader.convert_ids_to_tokens(prompt.ids) == ["<bos>", "1", "2"]
    for answer in ("34", [6, 7]):
        [ids], _ = encoding.as_judged((reader, 99), [prompt], [answer])
        assert reader.convert_ids_to_tokens(ids) == ["<bos>", "1", "2", "3", "4", "<eos>"]


def test_a_tiny_model_of_conversations(sft, tmp_path):
    """It gets a small template, with which it can be asked again."""
    rows = [{"messages": TALK}, {"messages": TALK[:2]}] * 20
    out = sft(tmp_path / "out", model="tiny", dataset=write_data(tmp_path / "data", rows, 4))
    asked, _ = encoding.render(encoding.load_tokenizer(str(out)), TALK[:3], "No.").pieces
    assert asked.endswith("user: six limes?\nassistant:")


def test_a_chat_template_that_is_not_applied_is_said(sft, base, data, tmp_path, capsys):
    sft(tmp_path / "out", model=base.chat, dataset=data.sft)
    assert "the tokenizer's chat template is not applied" in capsys.readouterr().out


# ---- where rows come from


def test_several_data_sets(tmp_path, capsys, error_of):
    """Joined; with weights, as many training rows as the shares allow; held-out rows whole."""
    names = []
    for name, n in (("a", 40), ("b", 100)):
        rows = [{"text": f"{name} {i}"} for i in range(n)]
        names.append(write_data(tmp_path / name, rows, 4))
    args = flags_of(*names)
    train, held_out = dataset.load_splits(args, dataset.SFT_FORMATS)
    assert (len(train), len(held_out)) == (36 + 96, 8)
    rows_of_b = [row["text"] for row in train[36:]]
    for args.dataset_weights, taken in (((0.5, 0.5), 36), ((1, 1), 36), ((1, 2), 72)):
        train, held_out = dataset.load_splits(args, dataset.SFT_FORMATS)
        texts = [row["text"] for row in train]
        assert len({*texts}) == len(texts) == 36 + taken
        assert sum(text.startswith("a") for text in texts) == 36
        assert {*texts[36:]} < {*rows_of_b} and texts[36:] != rows_of_b[:taken]  # from all over
        assert len(held_out) == 8
        assert f"{taken} of 96 training rows" in capsys.readouterr().out
    for args.dataset_weights in ((1.0,), (1.0, float("nan")), (1.0, float("inf"))):
        assert "--dataset-weights" in error_of(dataset.load_splits, args, dataset.SFT_FORMATS)
    (tmp_path / "b" / "train.jsonl").write_text('{"other": 1}\n')
    args.dataset_weights = ()
    assert f"{tmp_path}/b/train.jsonl:1" in error_of(dataset.load_splits, args, dataset.SFT_FORMATS)


def test_a_column_that_a_row_lacks_is_none(tmp_path):
    """Reward functions get one value a row."""
    rows = [{"prompt": "p", "answer": 1}, {"prompt": "q", "kind": "x"}] * 10
    args = flags_of(write_data(tmp_path / "data", rows, 2))
    for row in sum(dataset.load_splits(args, dataset.PROMPT_FORMATS), []):
        own = {"answer": 1} if row["prompt"] == "p" else {"kind": "x"}
        assert row == {"prompt": row["prompt"], "answer": None, "kind": None} | own


def test_names_of_files(tmp_path, error_of):
    """Patterns, brackets in a path, a folder with `train` alone; doubled or missing parts."""
    rows, folder = [{"text": "a"}, {"text": "b"}], tmp_path / "d[1]"
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        write_jsonl(folder / f"{name}.jsonl", rows)

    def texts(path, split="train[:]"):
        return [row["text"] for row in load(path, split)]

    assert texts(folder) == texts(tmp_path / "d?1?" / "train-*.jsonl") == ["a", "b", "a", "b"]
    assert texts(folder / "train-00001-of-00002.jsonl") == ["a", "b"]
    assert texts(folder, "validation") == ["b"]
    for part in ("00000", "00001"):
        write_jsonl(tmp_path / "v" / f"train.v1-{part}-of-00002.jsonl", rows)
    assert texts(tmp_path / "v", "train.v1") == ["a", "b", "a", "b"]
    (folder / "train-00001-of-00002.jsonl").unlink()
    assert "leave one copy, whole" in error_of(load, folder, "train")
    write_jsonl(folder / "train.jsonl", rows)
    assert "leave one copy, whole" in error_of(load, folder, "train")


def test_csv_fields_are_text(tmp_path, error_of):
    """`None`, `NA` and numbers too; a row with too many fields is refused."""
    path = tmp_path / "x.csv"
    path.write_text('prompt,completion\nNA,None\n"a, b",007\n')
    wanted = [("NA", "None"), ("a, b", "007")]
    assert load(path) == [{"prompt": prompt, "completion": answer} for prompt, answer in wanted]
    path.write_text("prompt,completion\na,b,c\n")
    assert "x.csv:2: has more fields" in error_of(load, path)


def test_configurations_and_revisions_of_hub_data_sets(monkeypatch):
    import datasets

    asked, table = [], datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table)
    args = SimpleNamespace(columns=(), revision="v2", eval_split="validation")
    rows = dataset.load_data("openai/gsm8k:main", "train[:1]", dataset.SFT_FORMATS, args)
    assert rows == [{"text": "a"}]
    assert rows[0].place == "openai/gsm8k:main/train (row 1)"
    assert asked == [(("openai/gsm8k", "main"), {"revision": "v2", "split": "train"})]


# ---- models as others save them


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
def test_a_lora_folder_is_merged(refused, models, ppo, tmp_path):
    """As --model and as --reward-model, whose head is among what was trained."""
    peft = pytest.importorskip("peft")
    folders = {}
    for kind, source in (("CAUSAL_LM", models.sft), ("SEQ_CLS", models.reward_model)):
        load_model = utils.load_causal_lm if kind == "CAUSAL_LM" else utils.load_classifier
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type=kind)
        adapted = peft.get_peft_model(load_model(str(source), CPU), config)
        for name, p in adapted.named_parameters():
            if "lora_B" in name or "score" in name:
                torch.nn.init.normal_(p, std=0.3)
        adapted.save_pretrained(tmp_path / kind)
        merged = adapted.merge_and_unload()
        folders[kind] = str(tmp_path / kind)
        loaded = load_model(folders[kind], CPU)
        for a, b in zip(merged.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)
    ppo(tmp_path / "run", model=folders["CAUSAL_LM"], reward_model=folders["SEQ_CLS"])
    # a language model's adapter may start a reward model; its head is then zero
    started = utils.load_classifier(folders["CAUSAL_LM"], CPU)
    adapted = utils.load_causal_lm(folders["CAUSAL_LM"], CPU)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(*(utils.hidden_states(model, ids) for model in (started, adapted)))
    assert not started.score.weight.any()
    # what fits no weight would leave the base as it is
    file = tmp_path / "CAUSAL_LM" / "adapter_model.safetensors"
    saved = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k.replace("layers", "blocks"): v for k, v in saved.items()}, file)
    refused("sft", "Found missing adapter keys", model=folders["CAUSAL_LM"])
    file.unlink()
    refused("sft", "its adapter cannot be merged", model=folders["CAUSAL_LM"])


def test_a_checkpoint_is_a_model(sft, reward_model, ppo, tmp_path):
    """A step's folder has configuration and tokenizer, and goes in as any model does."""
    learned = sft(tmp_path / "sft", save_every=1) / "checkpoint"
    start = str(max(learned.iterdir()))
    judged = reward_model(tmp_path / "judge", model=start, save_every=1) / "checkpoint"
    ppo(tmp_path / "ppo", model=start, reward_model=str(max(judged.iterdir())))
    transformers.AutoModelForCausalLM.from_pretrained(start)


def test_a_head_is_used_whatever_architectures_says(models, tmp_path):
    folder = shutil.copytree(models.reward_model, tmp_path / "judge")
    change_config(folder, architectures=["LlamaForCausalLM"])
    assert utils.load_classifier(str(folder), CPU, trained=True).score.weight.any()


# ---- B37 to B40: what is lost or added between row, template and text


HEADED = (  # as Qwen's: a system message where there is none, answers without their reasoning
    "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}{% for m in messages "
    "if m.role in ('system', 'user', 'assistant') %}<|{{ m.role }}|>"
    "{{ (m.content or '').split('</think>')[-1] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "figs"}}}


@pytest.mark.parametrize(
    ("lost", "messages"),
    [
        ("Be brief", [{"role": "developer", "content": "Be brief."}, USER, GOOD]),
        ("4 figs", [USER, GOOD, {"role": "tool", "content": "4 figs"}, GOOD]),
        ("<think>", [USER, GOOD | {"content": "<think>two</think>Yes."}]),
        ("tool_calls", [USER, GOOD | {"tool_calls": [CALL]}]),
        ("tool_calls", [USER, GOOD | {"tool_calls": [CALL], "content": None}]),
        ("reasoning_content", [USER, GOOD | {"reasoning_content": "two"}]),
    ],
)
def test_b37_what_a_template_leaves_out(lost, messages):
    """A message, a call or the reasoning of what is learned: such a row cannot be used."""
    tokenizer = chatty(HEADED)
    row = dataset.Row({"messages": messages}, "f:1")
    with pytest.raises(dataset.Unusable, match=f"leaves out .*{lost}"):
        encoding.render_row(tokenizer, row, all_turns=False)
    if lost == "Be brief":
        with pytest.raises(dataset.Unusable, match="leaves out"):
            encoding.render(tokenizer, messages[:-1])


def test_b37_what_a_template_writes_otherwise():
    """Other line breaks, a tool's result as JSON, no earlier reasoning: all is said."""
    result = {"role": "tool", "content": 'a "fig"\nhere'}
    answer = GOOD | {"content": " <think>two</think>\n\nYes. "}
    as_json = "{% for m in messages %}{{ m.content | tojson if m.role == 'tool' else m.content }}"
    messages = [USER, GOOD, result, answer]
    row = dataset.Row({"messages": messages}, "f:1")
    pieces = encoding.render_row(chatty(as_json + "{% endfor %}"), row, all_turns=False).pieces
    assert "".join(pieces).endswith('a \\"fig\\"\\nhere" <think>two</think>\n\nYes.')
    earlier = dataset.Row({"messages": [USER, answer, USER, GOOD]}, "f:1")
    assert encoding.render_row(chatty(HEADED), earlier, all_turns=False).pieces[-1] == "Yes.<|end|>"


ALTERNATE = (  # as Mistral's: turns alternate, but for calls and their results
    "{% set turns = messages | rejectattr('tool_calls', 'defined') "
    "| rejectattr('role', 'eq', 'tool') | list %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ (m.tool_calls | tojson) if m.tool_calls is defined else m.content }}<|end|>{% endfor %}"
)


CALLS = ALTERNATE[ALTERNATE.rindex("{% for") :]  # turns in any order


def test_b37_a_call_that_is_said():
    """Also by a template that would refuse the chat without it."""
    talk = [USER, GOOD | {"tool_calls": [CALL], "content": ""}]
    talk += [{"role": "tool", "content": "4 figs"}, GOOD]
    row = dataset.Row({"messages": talk}, "f:1")
    assert "look" in encoding.render_row(chatty(ALTERNATE), row, all_turns=False).pieces[0]
    assert "look" in encoding.render(chatty(ALTERNATE), talk[:-1]).pieces[0]
    for template in (HEADED.replace("'user', ", "'user', 'tool', "), None):
        with pytest.raises(dataset.Unusable, match="leaves out tool_calls"):
            encoding.render(chatty(template), talk[:-1])


def test_b37_arguments_of_a_call_that_are_a_text():
    """As OpenAI's API writes them; most templates would quote them once more, a few would not."""
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "fïgs"}'}}
    chat = [USER, GOOD | {"tool_calls": [call], "content": ""}]
    quotes = ALTERNATE.replace("(m.tool_calls |", "(m.tool_calls[0].function.arguments |")
    writes = quotes.replace("| tojson", "")
    with pytest.raises(dataset.Unusable, match="quotes a call's arguments"):
        encoding.render(chatty(quotes), chat[:1], chat[1:])
    assert '{"at": "fïgs"}' in encoding.render(chatty(writes), chat[:1], chat[1:]).pieces[1]
    call["function"]["arguments"] = {"at": "fïgs"}
    assert '{"at": "fïgs"}' in encoding.render(chatty(quotes), chat[:1], chat[1:]).pieces[1]


def test_b37_switches_that_a_template_acts_on():
    """As those of Qwen, SmolLM and Nemotron."""
    template = "{% for m in messages %}{{ m.content | replace('/no_think', '') }}{% endfor %}"
    asked = USER | {"content": "two figs? /no_think"}
    assert encoding.render(chatty(template), [asked]).pieces == ["two figs? "]
    template = template.replace("no_", "")
    with pytest.raises(dataset.Unusable, match="leaves out"):
        encoding.render(chatty(template), [USER | {"content": "see docs/thinking.md"}])


def test_b47_a_template_that_always_begins_another_answer():
    """As Llama 3's first one, whatever the flag says; what only ends a turn is none."""
    turns, flag, head = HEADED.partition("{% if add_generation_prompt %}")
    always = turns + head.removesuffix("{% endif %}")
    for chat in ([USER, GOOD], [USER, GOOD, USER, BAD], [GOOD]):
        with pytest.raises(dataset.Unusable, match="head of another answer"):
            encoding.render(chatty(always), chat[:-1], chat[-1:])
    assert encoding.render(chatty(always), [USER]).pieces[0].endswith("<|assistant|>")
    assert encoding.render(chatty(turns), [USER], [GOOD]).pieces[1] == "<|assistant|>Yes.<|end|>"
    last = "{% if messages[-1].role == 'assistant' %}<eos>{% endif %}"  # not in earlier turns
    pieces = encoding.render(chatty(turns + last + flag + head), [USER], [GOOD]).pieces
    assert pieces[1] == "Yes.<|end|><eos>"


def test_b37_a_chat_that_the_assistant_opens():
    """Its header and the template's own system message are given, not learned."""
    assert taught(chatty(HEADED), [GOOD, USER, BAD]) == "Yes.<|end|>No.<|end|><eos>"
    assert taught(chatty(HEADED), [GOOD]) == "Yes.<|end|><eos>"


def test_b37_marks_that_leave_the_end_of_a_turn_out():
    """The last turn's end is learned all the same, as EOS after it would not be sampled."""
    inside = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    assert taught(chatty(inside), TALK) == "Yes.No.<|end|><eos>"


def test_b37_turns_that_must_not_be_learned(tmp_path, error_of):
    """One of weight 0; those of users and tools in a completion; tools that the prompt lacks."""
    for talk in (
        [USER, BAD | {"weight": 0}, USER, GOOD],
        [*TURNS[:1], TURNS[1] | {"weight": 0.0}, *TURNS],
    ):
        [row] = read(tmp_path, [{"messages": talk}])
        with pytest.raises(dataset.Unusable, match="weight 0"):
            encoding.render_row(chatty(), row)
        assert encoding.render_row(chatty(), row, all_turns=False)
    row = {"prompt": [USER], "completion": [GOOD, USER, GOOD]}
    assert "turns of others" in error_of(read, tmp_path, [row] * 2)
    row = {"messages": [USER, GOOD], "tools": []}
    assert read(tmp_path, [row] * 2) == [row] * 2
    assert "tools ignored" in error_of(read, tmp_path, [row, row | {"tools": [CALL]}])


def test_b37_a_last_call_with_an_empty_text(tmp_path):
    """As OpenAI's API writes it."""
    message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert len(read(tmp_path, [{"messages": [USER, message]}])) == 1


def test_b38_an_answer_keeps_its_first_space():
    """Which SentencePiece drops from what it decodes alone; a message has none."""
    tokenizer = metaspace()
    text = dataset.Row({"prompt": "Answer:"}, "f:1")
    ids = tokenizer("Answer:")["input_ids"]
    chat, begun = ({"prompt": [USER, *more]} for more in ([], [GOOD]))
    answer = tokenizer("Answer: it is")["input_ids"][len(ids) :]
    assert tokenizer.decode(answer) == "it is"
    prompts = [encoding.Prompt(ids, "", row) for row in (text, chat, begun)]
    texts = encoding.answer_texts(tokenizer, prompts, [[*answer, tokenizer.eos_token_id]] * 3)
    assert texts == [" it is", "it is", " it is"]
    empty = encoding.Prompt([], "", dataset.Row({"prompt": ""}, "f:2"))  # a line in a pipe
    assert encoding.answer_texts(tokenizer, [empty], [answer]) == ["it is"]


def test_a_folder_as_the_hub_keeps_it(tmp_path):
    """What describes it is no split: `datasets` reads it."""
    (tmp_path / "dataset_infos.json").write_text("{}")
    write_jsonl(tmp_path / "data" / "train-00000-of-00001.jsonl", [{"text": "a"}] * 2)
    assert len(load(tmp_path)) == 2


@pytest.mark.parametrize("name", ["chosen", "messages"])
def test_b39_conversations_beside_what_is_named(tmp_path, error_of, name):
    """They take no column's place."""
    row = {"conversations": TURNS, "clean": [USER, BAD]}
    columns = [f"{'prompt' if name == 'chosen' else name}=clean"]
    rows, formats = ([row | ANSWERS], PAIRS) if name == "chosen" else ([row], dataset.SFT_FORMATS)
    assert "conversations ignored" in error_of(read, tmp_path, rows, formats, columns)
    [row] = read(tmp_path, rows, formats, [*columns, "conversations="])
    assert row["prompt" if name == "chosen" else name] == [USER, BAD]


def test_b39_columns_that_are_named_but_not_read(tmp_path, error_of):
    rows = [{"prompt": "Q", "completion": "A", "dialog": [USER, GOOD]}] * 2
    assert "messages ignored" in error_of(read, tmp_path, rows, columns=["messages=dialog"])
    columns = ["prompt=dialog", "prompt=completion+"]
    assert "names prompt twice" in error_of(read, tmp_path, rows, columns=columns)


def test_b39_held_out_rows_of_several_data_sets_are_mixed(tmp_path):
    """PPO evaluates on the first of them; those of one stay in their order."""
    for name, count in (("a", 40), ("b", 20)):
        rows = [{"prompt": f"{name}{i}"} for i in range(count)]
        for split in ("train", "validation"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
    names = [tmp_path / "a", tmp_path / "b"]
    _, held_out = dataset.load_splits(flags_of(*names), dataset.PROMPT_FORMATS)
    assert sorted(row["prompt"] for row in held_out[:6]) == ["a0", "a1", "a2", "a3", "b0", "b1"]
    _, held_out = dataset.load_splits(flags_of(names[0]), dataset.PROMPT_FORMATS)
    assert [row["prompt"] for row in held_out] == [f"a{i}" for i in range(40)]


def test_pairs_that_are_equal_once_they_are_rendered():
    row = dataset.Row({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD | {"id": 2}]}, "f:1")
    good = dataset.Row({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "f:2")
    assert len(reward_model_stage.encode(chatty(), [row] + [good] * 9, 99)) == 9


def test_a_chat_as_prompt_and_texts_as_answers():
    row = dataset.Row({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}, "f:1")
    [pair] = reward_model_stage.encode(chatty(), [row], 99)
    assert chatty().decode(pair.chosen).endswith("<|assistant|>Yes.<|end|><eos>")


def test_b33_braces_in_a_chat_that_numpy_wrote(tmp_path):
    talk = [{"id": 1} | USER, {"id": 2} | GOOD | {"content": "\\frac{1} {2}"}]
    text = repr(talk).replace("}, {", "} {")
    assert read(tmp_path, [{"messages": text}])[0]["messages"] == talk


def test_kto_labels_that_are_no_booleans(tmp_path, capsys):
    labels = (True, "false", None, False, 1)
    rows = [{"prompt": "Q", "completion": str(x), "label": x} for x in labels]
    assert [row["completion"] for row in read(tmp_path, rows)] == ["True"]
    assert "1 of 5 are labelled true" in capsys.readouterr().out


def test_labels_that_are_all_false(tmp_path, error_of):
    """As at the end of a file that has the bad answers last: none is learned."""
    bad = {"prompt": "Q", "completion": "A", "label": False}
    assert "holds no rows" in error_of(read, tmp_path, [bad] * 4)
    for row in ({"messages": [USER, BAD], "label": False}, {"text": "toxic", "label": 0}):
        assert "label ignored" in error_of(read, tmp_path, [row] * 4)
        assert len(read(tmp_path, [row] * 4, columns=["label="])) == 4


def test_columns_that_have_no_name(tmp_path, error_of):
    """pandas writes its index as one; `question+` does not join it, and `question` is no flag."""
    (path := tmp_path / "x.csv").write_text(",question,answer\n0,Why?,So.\n1,How?,Thus.\n")
    columns = ["prompt=question+", "completion=answer"]
    assert [row["prompt"] for row in load(path, columns=columns)] == ["Why?\n\n", "How?\n\n"]
    assert "--columns: question:" in error_of(load, path, columns=["question"])
    path.write_text("prompt,completion,completion\nQ,A,B\n")
    assert f"{path}:1: names a column twice" in error_of(load, path)
    path.write_text('text\nfine\n"a"b\n')
    assert f"{path}:3: " in error_of(load, path)


def test_a_chat_that_opens_with_a_call_learns_it():
    """The call stands after the header, which alone is given."""
    talk = [GOOD | {"content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, GOOD]
    given, learned, *_ = encoding.render_row(
        chatty(CALLS), dataset.Row({"messages": talk}, "")
    ).pieces
    assert given == "<|assistant|>" and "look" in learned


def test_a_null_character_where_no_one_looks():
    """It would be taken for a mark of what is learned."""
    thought = GOOD | {"reasoning_content": "a\0b"}
    template = MARKED.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}{{ m.content }}")
    assert template != MARKED
    row = dataset.Row({"messages": [USER, thought, USER, GOOD]}, "")
    learned = encoding.render_row(chatty(template), row).pieces[1::2]
    assert [x.count("Yes.") for x in learned] == [1, 1] and "figs" not in "".join(learned)


def test_a_prompt_that_is_null_in_some_rows():
    """It says as little as one that is not there."""
    pairs = [{"chosen": "a b", "rejected": "a c"} | more for more in ({}, {"prompt": None})]
    rows = [dataset.Row(pair, "f:1") for pair in pairs]
    first, second = reward_model_stage.encode(chatty(), rows, 99)
    assert first == second
    row = dataset.Row({"messages": [USER, GOOD], "prompt": None, "completion": "No."}, "f:1")
    assert "Yes." in encoding.render_row(chatty(), row).pieces[-1]
    row = dataset.Row({"text": "figs", "messages": None}, "f:1")
    assert encoding.render_row(chatty(), row).pieces == ["", "figs"]


def test_texts_beside_chats_are_said(capsys):
    """UltraFeedback's prompt is a text, which PPO reads; its messages are left."""
    tokenizer = chatty()
    row = dataset.Row({"prompt": "two figs?", "messages": [USER, GOOD]}, "f:1")
    encoding.show_example(tokenizer, row, [5])
    assert "the data are texts" in capsys.readouterr().out
    encoding.show_example(tokenizer, row | {"prompt": [USER]}, [5])
    assert "the data are texts" not in capsys.readouterr().out
