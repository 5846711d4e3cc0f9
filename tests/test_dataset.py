"""dataset.py, encoding.py: rows of any layout, their token ids; with what went wrong elsewhere.

Errors in rows, as the stages meet them, are in test_bad_input.py.
"""

import json
import re

import pandas
import pytest
import tokenizers
import torch
from conftest import ROOT, make_tokenizer, write_jsonl

import dataset
import encoding
import ppo_rlhf

CPU = torch.device("cpu")
ROWS = [{"prompt": f"Say {i}:", "completion": f" No {i}.", "extra": i} for i in range(40)]
PAIR = [("prompt", "completion")]
USER, REPLY = {"role": "user", "content": "two figs?"}, {"role": "assistant", "content": "Yes."}


# ---- reading the rows


def load(path, split="train[:]", formats=PAIR):
    return dataset.load_data(str(path), split, formats)


def test_a_folder_of_files(tmp_path):
    """Splits are files; the places that errors name are lines, counted with the empty ones."""
    write_jsonl(tmp_path / "train.jsonl", ["", *ROWS[:3], "", ROWS[3]])
    pandas.DataFrame(ROWS[4:6]).to_parquet(tmp_path / "validation.parquet")
    data = load(tmp_path, "train")
    assert data == ROWS[:4]
    assert [row.place for row in data] == [f"{tmp_path}/train.jsonl:{n}" for n in (2, 3, 4, 6)]
    assert load(tmp_path, "validation") == ROWS[4:6]


def test_utf8_with_and_without_a_byte_order_mark(tmp_path):
    """Windows editors put U+FEFF before the first line and end lines in two bytes."""
    row = {"prompt": "Größe?\u2028日本", "completion": " é"}
    line = json.dumps(row, ensure_ascii=False).encode() + b"\r\n"
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "train.jsonl").write_bytes(mark + line + line)
        assert load(tmp_path) == [row, row]


def write_table(path, rows):
    """Rows in the format that the file's name tells."""
    kind, table = path.name.lower().partition(".")[2].removesuffix(".gz"), pandas.DataFrame(rows)
    if kind in ("csv", "tsv"):
        table.to_csv(path, index=False, sep="," if kind == "csv" else "\t", compression="infer")
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        flags = {"orient": "records", "lines": kind != "json", "compression": "infer"}
        table.to_json(path, **flags)
    return path


KINDS = ["jsonl", "ndjson", "jsonl.gz", "JSONL", "json", "csv", "TSV", "tsv.gz", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file(tmp_path, kind):
    """A single file has its last twentieth held out, whatever its format."""
    path, rows, lines = write_table(tmp_path / f"rows.{kind}", ROWS), ROWS, ["39", "40"]
    if "sv" in kind.lower():  # whose fields are all text, below a line of names
        rows = [{name: str(value) for name, value in row.items()} for row in ROWS]
        lines = ["40", "41"]
    assert load(path, "train") == rows[:38]
    held_out = load(path, "validation")
    assert held_out == rows[38:]
    assert all(row.place.startswith(str(path)) for row in held_out)
    assert [re.findall(r"\d+", row.place)[-1] for row in held_out] == lines
    assert ("(row " in held_out[0].place) == (kind in ("json", "parquet"))  # others have lines


def test_the_embedded_task_is_known_however_its_path_is_written(monkeypatch):
    """Its own flags and labeler hold for it, and for nothing else."""
    monkeypatch.chdir(ROOT)
    prompts = "data/support/prompts"
    for path in (prompts, prompts + "/", "./" + prompts, str(ROOT / prompts)):
        assert dataset.is_default(ppo_rlhf.Args(dataset=(path,)))
    for paths in ((), (prompts, prompts), ("prompts",), ("data/support/sft",)):
        assert not dataset.is_default(ppo_rlhf.Args(dataset=paths))


def test_a_hub_id_with_a_dot_is_no_missing_file(error_of):
    """Many hub ids hold a version; offline, they fail as what cannot be fetched."""
    assert "no such file" not in error_of(load, "nobody/data-v2.5-mixture", "train")


def test_hold_out_splits_a_single_file(tmp_path):
    """The last twentieth, 500 rows at most: no row is in both parts, places stay with rows."""

    def parts(n):
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": str(i)} for i in range(n)])
        train, rest = (load(path, split, dataset.SFT_FORMATS) for split in ("train", "validation"))
        for row in (*train, *rest):
            assert row.place == f"{path}:{int(row['text']) + 1}"
        assert [int(row["text"]) for row in train + rest] == [*range(n)] or n == 1
        return len(train), len(rest)

    assert [parts(n) for n in (20_000, 100, 2)] == [(19_500, 500), (95, 5), (1, 1)]
    assert parts(1) == (1, 1)  # the only row serves as both


def test_the_first_format_that_fits(tmp_path, tokenizer):
    """A row with prompt and completion is read as such even if it has a text too."""
    rows = [{"text": "a b", "prompt": "a", "completion": " b"}] * 2
    data = load(write_jsonl(tmp_path / "x.jsonl", rows), formats=dataset.SFT_FORMATS)
    assert encoding.render_row(tokenizer, data[0]) == (["a", " b"], False)


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys, error_of):
    """Up to a tenth of them; the first is named. More stop the stage, and so does none."""
    bad = [{"text": ""}, {"text": 3}, {"text": None}]
    path = write_jsonl(tmp_path / "x.jsonl", [*bad[:1], *[{"text": "a"}] * 19, *bad[1:]])
    line = error_of(load, path, formats=dataset.SFT_FORMATS)
    assert "x.jsonl:1: text: is empty (3 of 22 rows cannot be used); fill" in line
    write_jsonl(path, [*[{"text": "a"}] * 28, *bad[1:]])
    assert len(load(path, formats=dataset.SFT_FORMATS)) == 28
    assert f"2 of 30 rows are left out, the first {path}:29: text: is of" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["messages", "completion", "chosen", "rejected"])
def test_a_chat_that_the_user_ends_is_refused(column):
    """Nothing is learned from a user's last word; a prompt, though, ends with it."""
    with pytest.raises(dataset.Unusable, match=f"{column}: its last message"):
        dataset.check_field([USER], column)
    dataset.check_field([USER], "prompt")


# ---- token ids


def encode(tokenizer, prompt, completion):
    [(ids, learned)] = encoding.encode(tokenizer, [encoding.render(tokenizer, prompt, completion)])
    n = len(ids) - sum(learned)
    assert learned == [False] * n + [True] * sum(learned)
    return ids[:n], ids[n:]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "completion", "learned"),
    [
        *(("Q:", f" Yes.{end}", " Yes.<eos>") for end in ("", "<eos>", "<eos>\n", "<eos> ")),
        *((prompt, " Yes.", " Yes.<eos>") for prompt in ("Q:<eos>A:", "Q: A.<eos>")),
        ("Q:", "", "<eos>"),
        *((prompt, None, "") for prompt in ("Q:", "Q:<eos>")),
    ],
)
def test_a_completion_ends_with_one_eos(tokenizer, prompt, completion, learned):
    """B3, B19, B20: it is added where it is missing; a prompt keeps its own; None gets none."""
    wanted = ids_of(tokenizer, prompt), ids_of(tokenizer, learned)
    assert encode(tokenizer, prompt, completion) == wanted


def test_a_prompt_gets_the_tokenizers_bos_once():
    """A plain prompt gets BOS, a completion none; an EOS that the tokenizer adds to both goes."""
    tokenizer = make_tokenizer(bos="<bos>")
    bos, eos, text = tokenizer.bos_token_id, tokenizer.eos_token_id, "Q: two figs?"
    prompt, completion = encode(tokenizer, text, " Yes.")
    assert prompt == [bos, *ids_of(tokenizer, text)]
    assert bos not in completion
    assert encode(tokenizer, "", text) == ([bos], [*ids_of(tokenizer, text), eos])
    special = [("<bos>", bos), ("<eos>", eos)]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=special
    )
    assert encode(tokenizer, text, " Yes.") == (prompt, completion)


@pytest.mark.parametrize(("eos", "added"), [("<|end|>", ""), ("<eos>", "<eos>")])
@pytest.mark.parametrize("answer", ["Yes.", [REPLY]])
def test_chat_goes_through_the_template(eos, added, answer):
    """B3: both are what the template renders, and where turns do not end in EOS, this follows."""
    tokenizer = make_tokenizer(eos=eos, bos="<bos>", chat=True)
    prompt, completion = encode(tokenizer, [USER], answer)
    # no BOS but what the template puts in
    assert tokenizer.decode(prompt) == "<|user|>two figs?<|end|><|assistant|>"
    assert tokenizer.decode(completion) == "Yes.<|end|>" + added
    assert (tokenizer.eos_token_id in prompt) == (not added)
    assert completion.count(tokenizer.eos_token_id) == 1


def test_chats_and_texts_mix():
    """Rows of both kinds in one list keep their order."""
    tokenizer = make_tokenizer(eos="<|end|>", chat=True)
    pairs = [("one", " a"), ([USER], "b"), ("two", " c")]
    texts = [encoding.render(tokenizer, *pair) for pair in pairs]
    encoded = [tokenizer.decode(ids) for ids, _ in encoding.encode(tokenizer, texts)]
    chat = "<|user|>two figs?<|end|><|assistant|>"
    assert encoded == ["one a<|end|>", f"{chat}b<|end|>", "two c<|end|>"]


def test_what_cannot_be_rendered(tokenizer):
    """A chat without a template, one that it refuses or rewrites, a text that a chat answers."""
    chatty = make_tokenizer(chat=True)

    def why(tokenizer, prompt):
        with pytest.raises(dataset.Unusable) as error:
            encoding.render(tokenizer, prompt, [REPLY])
        return str(error.value)

    assert "is a chat" in why(tokenizer, [USER])
    assert "write both alike" in why(chatty, "two figs?")
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in why(chatty, [USER])
    chatty.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert "the chat template rewrites" in why(chatty, [USER])


def test_demonstrations_are_cut_to_a_length(tokenizer, error_of):
    """Of prompt and completion together; a prompt that leaves no room is named."""
    rows = [dataset.Row(row, f"f:{i}") for i, row in enumerate(ROWS[:2], 1)]
    whole = encoding.encode_demonstrations(tokenizer, rows, 500)
    assert [ids[-1] for ids, _ in whole] == [tokenizer.eos_token_id] * 2
    ids, learned = whole[0]
    n = len(ids) - sum(learned) + 2
    assert encoding.encode_demonstrations(tokenizer, rows, n)[0] == (ids[:n], learned[:n])
    assert "f:1: prompt" in error_of(encoding.encode_demonstrations, tokenizer, rows, n - 2)


def test_encode_prompts_keeps_rows_and_places(tokenizer, tmp_path, error_of):
    """Prompts come with their text and all columns; one that is too long is named by its line."""
    rows = [{"prompt": "Q: two figs?", "n": 1}, {"prompt": "Q: six ripe limes? " * 10, "n": 2}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    data = load(tmp_path, formats=dataset.PROMPT_FORMATS)
    prompts = encoding.encode_prompts(tokenizer, data, 500)
    assert [p.row for p in prompts] == rows
    assert [p.text for p in prompts] == [row["prompt"] for row in rows]
    assert [p.ids for p in prompts] == [ids_of(tokenizer, row["prompt"]) for row in rows]
    assert [p.row.place for p in prompts] == [f"{path}:1", f"{path}:2"]
    room = len(prompts[1].ids)
    assert len(encoding.encode_prompts(tokenizer, data, room)) == 2
    assert f"{path}:2" in error_of(encoding.encode_prompts, tokenizer, data, room - 1)


# ---- batches


def test_pad_masks_by_length():
    """D3, B4: the pad id inside a sequence is a real token; the mask counts lengths."""
    sequences = [[7, 1, 7], [7], [1, 2]]
    ids, mask = encoding.pad(sequences, 7, "left", CPU, width=4)
    assert ids.tolist() == [[7, 7, 1, 7], [7, 7, 7, 7], [7, 7, 1, 2]]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    ids, mask = encoding.pad(sequences, 7, "right", CPU)
    assert ids.tolist() == [[7, 1, 7], [7, 7, 7], [1, 2, 7]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    for side in ("left", "right"):  # a width that is too small cuts nothing
        assert encoding.pad([[1, 2, 3] * 8], 7, side, CPU, width=2)[0].tolist() == [[1, 2, 3] * 8]


def test_cycle_is_an_endless_sequence_of_permutations():
    """D7: every pass holds each row once, in another order; windows of it fit together."""
    rows = list(range(10))
    whole = dataset.cycle(rows, 0, 30, seed=3)
    passes = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(p) == rows for p in passes)
    assert passes[0] != passes[1] != passes[2] != rows
    windows = [dataset.cycle(rows, first, 6, seed=3) for first in range(0, 30, 6)]
    assert sum(windows, []) == whole
    assert dataset.cycle(rows, 0, 30, seed=4) != whole
    assert sorted(dataset.cycle([0, 1], 0, 10, seed=3)) == [0] * 5 + [1] * 5  # of two rows


def test_batches_cover_each_epoch_once_and_resume_where_they_stopped():
    """D7: an epoch is a permutation, 10 rows in fours are 4, 4 and 2; nothing depends on before."""
    steps = list(dataset.batches(10, 4, 2, seed=3, start=0))
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [len(rows) for _, rows in steps] == [4, 4, 2, 4, 4, 2]
    first, second = (sum((rows for _, rows in part), []) for part in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    for start in range(7):
        assert list(dataset.batches(10, 4, 2, seed=3, start=start)) == steps[start:]
