"""B23 to B34: inputs that people have, each read right or refused out loud."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_tokenizer, write_jsonl

import dataset
import generate
import reward_model as reward_model_stage
import utils

PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
USER, GOOD = {"role": "user", "content": "two figs?"}, {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "No."}


def read(tmp_path, rows, formats=dataset.SFT_FORMATS, columns=(), split="train[:]"):
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    return dataset.load_data(path, split, formats, SimpleNamespace(columns=columns))


def only(row, *names):
    return {name: row[name] for name in names}


def test_b23_ids_that_the_tokenizer_does_not_know(models, tmp_path):
    """A vocabulary padded by 64 ids, and made to prefer them: none is sampled, none counts."""
    tokenizer = utils.load_tokenizer(str(models.sft))
    plain = utils.load_causal_lm(str(models.sft), torch.device("cpu"), tokenizer)
    known = len(tokenizer)
    plain.resize_token_embeddings(known + 64, mean_resizing=False)
    plain.get_input_embeddings().weight.data[known:] *= 50
    plain.save_pretrained(tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")
    model = utils.load_causal_lm(str(tmp_path / "padded"), torch.device("cpu"), tokenizer)
    prompt = torch.tensor([tokenizer("Q: two ripe plums?\nA:")["input_ids"]] * 64)
    rng = torch.Generator().manual_seed(1)
    stops, pad = [tokenizer.eos_token_id], tokenizer.pad_token_id
    flags = {"pad_id": pad, "temperature": 5.0, "rng": rng}
    ids, _ = generate.generate(model, prompt, torch.ones_like(prompt), 20, stops, **flags)
    assert ids.max() < known
    with torch.no_grad():
        logits = utils.logits_of(model, utils.hidden_states(model, prompt)[:, -1])
    assert (logits.softmax(-1)[:, known:] == 0).all()
    assert logits.log_softmax(-1)[:, :known].isfinite().all()


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
    ],
)
def test_b24_slices_count_the_files_own_rows(tmp_path, split, wanted):
    rows = [{"text": f"row {i}"} for i in range(40)]
    assert read(tmp_path, rows, split=split) == [rows[i] for i in wanted]


def test_b24_other_names_of_the_evaluation_split(tmp_path, error_of):
    """`validation` takes `test`; shards are one split; a name that is not there is refused."""
    for name, n in (("train-00000-of-00002", 1), ("train-00001-of-00002", 2), ("test", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(n)])
    given = (str(tmp_path), dataset.SFT_FORMATS)
    assert len(dataset.load_data(given[0], "train", given[1])) == 3
    assert len(dataset.load_data(given[0], "validation", given[1])) == 3
    line = error_of(dataset.load_data, given[0], "tset", given[1])
    assert "no split tset; pass test, train" in line


def test_b24_rows_in_both_splits_are_said(tmp_path, capsys):
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i}"} for i in range(8)]))
    flags = {"dataset": (path,), "train_split": "train[:6]", "eval_split": "train[4:]"}
    flags |= {"columns": (), "dataset_weights": (), "revision": None}
    dataset.load_splits(SimpleNamespace(**flags), dataset.SFT_FORMATS)
    assert "2 of 4 evaluation rows are training rows too" in capsys.readouterr().out


def test_b25_a_folder_of_save_to_disk(tmp_path):
    """The cache files that `map` leaves in it are not rows; one table alone is a `train`."""
    import datasets

    table = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(24)])
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "two")
    again = datasets.load_from_disk(tmp_path / "two")
    again.map(lambda row: {"text": row["text"].upper()})
    for name in ("train", "validation"):
        rows = dataset.load_data(str(tmp_path / "two"), name, dataset.SFT_FORMATS)
        assert rows == table.to_list()
    table.save_to_disk(tmp_path / "one")
    assert len(dataset.load_data(str(tmp_path / "one"), "train", dataset.SFT_FORMATS)) == 23


def test_b26_a_column_that_matters_is_never_ignored(tmp_path, error_of):
    rows = [{"question": "Q", "text": "a"}] * 2
    assert "question ignored" in error_of(read, tmp_path, rows)
    assert only(read(tmp_path, rows, columns=["question="])[0], "text") == {"text": "a"}
    found = read(tmp_path, rows, columns=["prompt=question", "completion=text"])[0]
    assert only(found, "prompt", "completion") == {"prompt": "Q", "completion": "a"}
    assert "--columns" in error_of(read, tmp_path, rows, columns=["prompt=nowhere"])
    rows = [{"question": [USER], "chosen": "a", "rejected": "b"}]  # a chat, where Orca has text
    assert "question ignored" in error_of(read, tmp_path, rows, PAIRS)


def test_b26_known_layouts(tmp_path):
    """LLaMA-Factory's and Orca's pairs, Alpaca, ShareGPT, KTO."""
    two = {"chosen": "a", "rejected": "b"}
    layouts = [
        ({"instruction": "I", "input": "X", **two}, "I\n\nX\n\n"),
        ({"system": "S", "question": "Q", **two}, "S\n\nQ\n\n"),
        ({"system": "", "question": "Q", **two}, "Q\n\n"),
    ]
    for row, prompt in layouts:
        assert read(tmp_path, [row], PAIRS)[0]["prompt"] == prompt
    found = read(tmp_path, [{"instruction": "I", "input": "", "output": "O"}])[0]
    assert only(found, "prompt", "completion") == {"prompt": "I\n\n", "completion": "O"}
    turns = [{"from": "human", "value": "two figs?"}, {"from": "gpt", "value": "Yes."}]
    assert read(tmp_path, [{"conversations": turns}])[0]["messages"] == [USER, GOOD]
    kto = [{"prompt": "Q", "completion": c, "label": c == "good"} for c in ("bad", "good", "bad")]
    assert [row["completion"] for row in read(tmp_path, kto)] == ["good"]


def test_b27_a_trained_head_is_kept(models, reward_model, tmp_path, capsys):
    """A trained reward model goes on from its own head."""
    before = utils.load_classifier(str(models.reward_model), torch.device("cpu"), trained=True)
    out = reward_model(tmp_path / "out", model=str(models.reward_model), learning_rate=1e-6)
    assert "has a trained head, which is kept" in capsys.readouterr().out
    after = utils.load_classifier(str(out), torch.device("cpu"), trained=True)
    assert torch.allclose(before.score.weight, after.score.weight, atol=1e-3)


def test_b28_the_models_own_ends(models):
    """Ids of the generation config end a response beside EOS; each once."""
    tokenizer = utils.load_tokenizer(str(models.sft))
    model = utils.load_causal_lm(str(models.sft), torch.device("cpu"), tokenizer)
    eos = tokenizer.eos_token_id
    assert generate.stop_token_ids(tokenizer, "eos", model.generation_config) == [eos]
    model.generation_config.eos_token_id = [eos, 3, 99]  # 99 is an ordinary token
    assert generate.stop_token_ids(tokenizer, "eos", model.generation_config) == [eos, 3]
    model.generation_config.eos_token_id = None
    assert generate.stop_token_ids(tokenizer, "eos", model.generation_config) == [eos]


def test_b29_asked_as_it_was_trained():
    """A line break that the template puts after a turn is no part of an answer: sampling stops."""
    chat_tokenizer = make_tokenizer(chat=True)
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<|end|>'", "<|end|>\\n'")
    rendered = dataset.render(chat_tokenizer, [USER], [GOOD])
    [(ids, _)] = dataset.encode(chat_tokenizer, [rendered])
    assert ids[-1] == chat_tokenizer.eos_token_id
    assert chat_tokenizer.decode(ids[:-1]).endswith("<|end|>")


def test_b30_one_bos():
    bos_tokenizer = make_tokenizer(bos="<bos>")
    bos = bos_tokenizer.bos_token
    for prompt, completion in ((bos + "Q: two figs?", " Yes."), ("", bos + "Q: two figs?")):
        rendered = dataset.render(bos_tokenizer, prompt, completion)
        [(ids, _)] = dataset.encode(bos_tokenizer, [rendered])
        assert ids.count(bos_tokenizer.bos_token_id) == 1


def test_b32_called_by_keyword():
    """Whatever the order of a function's parameters."""
    asked = [dataset.Prompt([1], "p", {"prompt": "p"}, [])]
    given = utils.call_reward_function(
        lambda completions, prompts=None, **kw: [len(completions[0])], "f", asked, ["four"]
    )
    assert given == [4.0]


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_b33_a_chat_kept_as_text(tmp_path, write):
    assert read(tmp_path, [{"messages": write([USER, GOOD])}])[0]["messages"] == [USER, GOOD]
    for text in ("[{not a chat}]", '[{"a": 1, "b": 2}]'):  # a prompt may hold data
        assert dataset.parsed_chat(text) == text


@pytest.mark.parametrize("prompt", ["two figs?", [USER]])
def test_b34_a_prompt_that_is_the_answers_head_too(tmp_path, prompt):
    rows = [{"prompt": prompt, "chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    tokenizer = make_tokenizer(chat=True)
    [pair] = reward_model_stage.encode(tokenizer, read(tmp_path, rows, PAIRS), 99)
    whole = tokenizer.apply_chat_template([USER, GOOD], tokenize=False)
    assert tokenizer.decode(pair.chosen) == whole + tokenizer.eos_token
    rows = [{"prompt": "two figs?", "messages": [USER, GOOD]}]
    assert read(tmp_path, rows) == [{"messages": [USER, GOOD]}]


def test_the_embedded_task_is_read_whole():
    """No column of it is one that matters and is ignored."""
    for name, formats in (("sft", dataset.SFT_FORMATS), ("preferences", PAIRS)):
        assert dataset.load_data(str(ROOT / f"data/support/{name}"), "train", formats)


def test_each_stage_shows_its_first_example(sft, reward_model, ppo, tmp_path, capsys):
    """As the model sees it: special tokens and line breaks are to be seen."""
    for stage, ends in ((sft, 1), (reward_model, 2), (ppo, 0)):
        stage(tmp_path / str(ends))
        lines = capsys.readouterr().out.splitlines()
        shown = "\n".join(line for line in lines if line.startswith("first example"))
        assert "Q: " in shown
        assert "\\nA:" in shown
        assert shown.count("<eos>") == ends


ANSWERS = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "formats", "columns", "lost"),
    [
        ({"messages": [USER], **ANSWERS}, PAIRS, [], "messages"),
        ({"system": "s", "input": "q", **ANSWERS}, PAIRS, ["system="], "input"),
        (
            {"instruction": "I", "input": "x", "output": "O"},
            dataset.SFT_FORMATS,
            ["prompt=instruction", "completion=output", "instruction="],
            "input",
        ),
        ({"text": "toxic", "label": True}, dataset.SFT_FORMATS, [], "label"),
    ],
)
def test_b26_more_columns_that_matter(tmp_path, error_of, row, formats, columns, lost):
    assert f"{lost} ignored" in error_of(read, tmp_path, [row] * 2, formats, columns)


def test_b26_a_later_row_has_a_column_that_matters(tmp_path, error_of):
    rows = [{"text": "a"}, {"text": "b", "system": "s"}]
    assert "system ignored" in error_of(read, tmp_path, rows)


def test_columns_are_read_before_any_is_written(tmp_path):
    """So that two can change places."""
    rows = [{"prompt": "P", "completion": "C"}]
    swapped = read(tmp_path, rows, columns=["prompt=completion", "completion=prompt"])
    assert swapped == [{"prompt": "C", "completion": "P"}]


def test_what_only_looks_like_a_chat(tmp_path, error_of):
    """A template with brackets stays a text; a field of another type is refused, no traceback."""
    rows = [{"prompt": text, "completion": "c"} for text in ('[{{"a": 1}}]', "[{[]: 1}]", "[{{}}]")]
    assert read(tmp_path, rows) == rows
    for row in ({"messages": {"a": 1}}, {"conversations": [{"from": ["x"], "value": "q"}]}):
        assert "messages" in error_of(read, tmp_path, [row])


def test_ppo_keeps_its_prompt_and_columns(tmp_path):
    rows = [{"prompt": "two figs?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    assert read(tmp_path, rows, dataset.PROMPT_FORMATS) == rows
