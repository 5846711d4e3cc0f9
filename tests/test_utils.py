"""utils.py: each helper against an independent computation, with the edge cases that went wrong elsewhere."""

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_tokenizer, target_logits, write_jsonl

import dataset
import generate
import utils

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def error_of(capsys, function, *args, **kwargs) -> str:
    """The one line that the call prints before it exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        function(*args, **kwargs)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------------ tensor helpers


def test_masked_statistics_ignore_what_is_masked():
    """B6, B8, B9: sums, means and variances are over the real elements, even where the others hold NaN or inf."""
    x = torch.tensor([[1.0, 2.0, NAN, INF], [4.0, -INF, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    real = np.array([1.0, 2.0, 4.0])
    assert utils.masked_sum(x, mask).item() == pytest.approx(7.0)
    assert utils.masked_mean(x, mask).item() == pytest.approx(real.mean())
    assert utils.masked_variance(x, mask).item() == pytest.approx(real.var())


def test_masked_sum_has_a_finite_gradient_beside_nan():
    """B9: 0 x NaN is NaN; the gradient of masked-out elements is 0."""
    x = torch.tensor([1.0, NAN], requires_grad=True)
    utils.masked_sum(x, torch.tensor([1, 0])).backward()
    assert x.grad.tolist() == [1.0, 0.0]


def test_whiten_matches_numpy():
    """D22: mean 0 and variance 1 over the real elements; 0 elsewhere."""
    x, mask = torch.randn(5, 7) * 3 + 2, (torch.rand(5, 7) < 0.6).long()
    x[mask == 0] = NAN
    real = x[mask == 1].numpy().astype(np.float64)
    white = utils.whiten(x, mask)
    expected = (real - real.mean()) / np.sqrt(real.var() + 1e-8)
    np.testing.assert_allclose(white[mask == 1], expected, atol=1e-5)
    assert (white[mask == 0] == 0).all()


def test_whiten_can_keep_the_mean():
    """D20: scaled about its mean, which stays."""
    x, mask = torch.randn(5, 7) * 3 + 2, (torch.rand(5, 7) < 0.6).long()
    real = x[mask == 1].numpy().astype(np.float64)
    white = utils.whiten(x, mask, shift_mean=False)
    expected = (real - real.mean()) / np.sqrt(real.var() + 1e-8) + real.mean()
    np.testing.assert_allclose(white[mask == 1], expected, atol=1e-5)
    assert (white[mask == 0] == 0).all()


@pytest.mark.parametrize("mask", [[[1, 0]], [[0, 0]]])
def test_whiten_of_one_element_or_none_is_zero(mask):
    """B17: nothing divides by zero at one element, or by a Bessel correction of n - 1."""
    x, mask = torch.tensor([[3.0, NAN]]), torch.tensor(mask)
    assert utils.whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert utils.masked_variance(x, mask).item() == 0.0
    assert utils.masked_mean(x, mask).item() == (3.0 if mask.any() else 0.0)


# ----------------------------------------------------------------------------------------------------- padding, batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_masks_by_length(side):
    """D3, B4: the pad id inside a sequence is a real token; the mask counts lengths, also at a given width."""
    ids, mask = dataset.pad([[7, 1, 7], [7], [1, 2]], 7, side, CPU, width=4)
    if side == "left":
        assert ids.tolist() == [[7, 7, 1, 7], [7, 7, 7, 7], [7, 7, 1, 2]]
        assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    else:
        assert ids.shape == (3, 8)  # rounded up
        assert ids[:, :4].tolist() == [[7, 1, 7, 7], [7, 7, 7, 7], [1, 2, 7, 7]]
        assert mask[:, :4].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
        assert not mask[:, 4:].any()
    assert dataset.pad([[1, 2, 3] * 8], 7, side, CPU, width=2)[0].tolist() == [[1, 2, 3] * 8]
    assert dataset.pad([[1, 2, 3]], 7, "right", CPU, limit=5)[0].shape == (
        1,
        5,
    )  # a context that is no multiple of 8


def test_cycle_is_an_endless_sequence_of_permutations():
    """D7: every pass over the rows holds each once, in another order; windows of it fit together."""
    rows = list(range(10))
    whole = dataset.cycle(rows, 0, 30, seed=3)
    passes = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(p) == rows for p in passes)
    assert passes[0] != passes[1] != passes[2] != rows
    assert [
        row for first in range(0, 30, 6) for row in dataset.cycle(rows, first, 6, seed=3)
    ] == whole
    assert dataset.cycle(rows, 0, 30, seed=4) != whole
    assert (
        sorted(dataset.cycle([0, 1], 0, 10, seed=3)) == [0] * 5 + [1] * 5
    )  # a batch larger than the data


def test_batches_cover_each_epoch_once_with_a_smaller_last_one():
    """Each epoch is a permutation of the rows; 10 rows in fours make 4, 4 and 2."""
    steps = list(dataset.batches(10, 4, 2, seed=3, start=0))
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [len(rows) for _, rows in steps] == [4, 4, 2, 4, 4, 2]
    first, second = (sum((rows for _, rows in part), []) for part in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


@pytest.mark.parametrize("start", range(7))
def test_batches_resume_where_they_stopped(start):
    """Going on after step `start` gives the same batches as never having stopped."""
    steps = list(dataset.batches(10, 4, 2, seed=3, start=0))
    assert list(dataset.batches(10, 4, 2, seed=3, start=start)) == steps[start:]


def test_generator_depends_on_its_numbers_alone():
    """D7: the same numbers give the same stream, whatever was drawn before; other numbers another one."""
    streams = [(1,), (2,), (1, 0), (1, 0, 0), (0, 1), (1, 2), (2, 1), (1, 2, 0), (1, 2, 0, 0)]
    first = [
        torch.rand(4, generator=utils.generator("cpu", *numbers)).tolist() for numbers in streams
    ]
    torch.rand(100)
    again = [
        torch.rand(4, generator=utils.generator("cpu", *numbers)).tolist() for numbers in streams
    ]
    assert first == again
    for i, a in enumerate(streams):
        for j, b in enumerate(streams[:i]):
            assert first[i] != first[j], f"{a} and {b} give the same numbers"


def test_hold_out_splits_a_single_file():
    """The last twentieth, 500 rows at most, is held out; no row is in both parts, and places stay with their rows."""

    def parts(n):
        data = dataset.Data([{"prompt": str(i)} for i in range(n)], [f"f:{i}" for i in range(n)])
        train, rest = dataset.hold_out(data, "train"), dataset.hold_out(data, "validation")
        for part in (train, rest):
            assert [f"f:{row['prompt']}" for row in part.rows] == part.places
        assert train.rows + rest.rows == data.rows or n == 1
        return len(train.rows), len(rest.rows)

    assert parts(100) == (95, 5)
    assert parts(20_000) == (19_500, 500)
    assert parts(2) == (1, 1)
    assert parts(1) == (1, 1)  # the only row serves as both


# --------------------------------------------------------------------------------------------------------------- data

ROWS = [{"prompt": f"Say {i}:", "completion": f" No {i}.", "extra": i} for i in range(40)]
PAIR = [("prompt", "completion")]


def test_load_data_from_a_folder_of_jsonl(tmp_path):
    """Splits are files; errors can name the line, counted with the empty ones."""
    write_jsonl(tmp_path / "train.jsonl", ["", *ROWS[:3], "", ROWS[3]])
    write_jsonl(tmp_path / "validation.jsonl", ROWS[4:6])
    data = dataset.load_data(str(tmp_path), "train", PAIR)
    assert data.rows == ROWS[:4]
    assert data.places == [f"{tmp_path}/train.jsonl:{line}" for line in (2, 3, 4, 6)]
    assert dataset.load_data(str(tmp_path), "validation", PAIR).rows == ROWS[4:6]


def test_load_data_reads_utf8_with_and_without_a_byte_order_mark(tmp_path):
    """Windows editors put U+FEFF before the first line."""
    row = {"prompt": "Größe?\u2028日本", "completion": " é"}
    line = json.dumps(row, ensure_ascii=False).encode() + b"\r\n"
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + line + line)
    assert dataset.load_data(str(tmp_path), "train", PAIR).rows == [row, row]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json"])
def test_load_data_from_a_single_file(tmp_path, kind):
    """A single file has its last twentieth held out, whatever its format."""
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    else:
        import pandas

        frame = pandas.DataFrame(ROWS)
        if kind == "csv":
            frame.to_csv(path, index=False)
        elif kind == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path, orient="records")
    assert dataset.load_data(str(path), "train", PAIR).rows == ROWS[:38]
    held_out = dataset.load_data(str(path), "validation", PAIR)
    assert held_out.rows == ROWS[38:]
    assert all(str(path) in place for place in held_out.places)


def test_load_data_from_a_folder_of_parquet(tmp_path):
    """What is not .jsonl goes through `datasets`, splits included."""
    import pandas

    pandas.DataFrame(ROWS[:5]).to_parquet(tmp_path / "train.parquet")
    pandas.DataFrame(ROWS[5:7]).to_parquet(tmp_path / "validation.parquet")
    assert dataset.load_data(str(tmp_path), "train", PAIR).rows == ROWS[:5]
    assert dataset.load_data(str(tmp_path), "validation", PAIR).rows == ROWS[5:7]


def test_a_hub_id_with_a_dot_is_no_missing_file(capsys):
    """Many hub ids hold a version, such as owner/data-v2.5; offline, they fail as what cannot be fetched."""
    assert "no such file" not in error_of(
        capsys, dataset.load_data, "nobody/data-v2.5-mixture", "train", PAIR
    )


def test_load_data_takes_the_first_format_that_fits(tmp_path):
    """A row with prompt and completion is read as such even if it has a text too."""
    row = {"text": "a b", "prompt": "a", "completion": " b"}
    data = dataset.load_data(
        str(write_jsonl(tmp_path / "x.jsonl", [row, row])), "train", dataset.SFT_FORMATS
    )
    assert dataset.demonstrations(data) == [("a", " b")]


def test_load_data_suggests_the_column_that_was_meant(tmp_path, capsys):
    """A column name with a slip of the pen is named with what it should be."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completions": " b"}] * 2)
    line = error_of(capsys, dataset.load_data, str(path), "train", PAIR)
    assert f"{path}:1" in line
    assert "completions" in line
    assert "rename it to 'completion'" in line


def test_demonstrations_of_the_three_formats():
    """A chat's completion is its last message; a text is all completion."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    places = ["f:1"]
    assert dataset.demonstrations(dataset.Data([{"prompt": "a", "completion": "b"}], places)) == [
        ("a", "b")
    ]
    assert dataset.demonstrations(dataset.Data([{"messages": chat}], places)) == [
        (chat[:1], chat[1:])
    ]
    assert dataset.demonstrations(dataset.Data([{"text": "a"}], places)) == [("", "a")]


@pytest.mark.parametrize("column", ["messages", "completion", "chosen", "rejected"])
def test_a_chat_that_the_user_ends_is_refused(capsys, column):
    """Nothing is learned from a user's last word; a prompt, though, ends with it."""
    chat = [{"role": "user", "content": "hi"}]
    assert f"f:1: {column}: its last message" in error_of(
        capsys, dataset.check_field, chat, column, "f:1"
    )
    dataset.check_field(chat, "prompt", "f:1")


# -------------------------------------------------------------------------------------------------------------- encode


def encode(tokenizer, prompt, completion):
    prompts, completions = dataset.encode_pairs(tokenizer, [(prompt, completion)], ["f:1"])
    return prompts[0], completions[0]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("ending", ["", "<eos>", "<eos>\n", "<eos> "])
def test_a_completion_ends_with_one_eos(tokenizer, ending):
    """B19: EOS is added where it is missing and never twice."""
    prompt, completion = encode(tokenizer, "Q: two figs?", " Yes." + ending)
    assert prompt == ids_of(tokenizer, "Q: two figs?")
    assert completion == [*ids_of(tokenizer, " Yes."), tokenizer.eos_token_id]


def test_a_prompt_alone_has_no_completion(tokenizer):
    """None stands for no completion, "" for an empty one, which is EOS alone."""
    assert encode(tokenizer, "Q:", None) == (ids_of(tokenizer, "Q:"), [])
    assert encode(tokenizer, "Q:", "")[1] == [tokenizer.eos_token_id]


def test_a_prompt_keeps_its_own_eos(tokenizer):
    """B3, B20: a turn's end inside the prompt, at its end too, is part of it."""
    for text in ("Q:<eos>A:", "Q: A.<eos>"):
        assert encode(tokenizer, text, " Yes.")[0] == ids_of(tokenizer, text)


def test_a_prompt_gets_the_tokenizers_bos_once():
    """A plain prompt gets BOS, a completion none, and an EOS that the tokenizer adds to prompts goes."""
    from tokenizers import processors

    tokenizer = make_tokenizer(bos="<bos>")
    text = ids_of(tokenizer, "Q: two figs?")
    prompt, completion = encode(tokenizer, "Q: two figs?", " Yes.")
    assert prompt == [tokenizer.bos_token_id, *text]
    assert tokenizer.bos_token_id not in completion
    assert encode(tokenizer, "", "Q: two figs?") == (
        [tokenizer.bos_token_id],
        [*text, tokenizer.eos_token_id],
    )
    specials = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=specials
    )
    assert encode(tokenizer, "Q: two figs?", " Yes.") == (prompt, completion)


@pytest.mark.parametrize("as_text", [False, True])
def test_chat_goes_through_the_template(as_text):
    """Prompt and completion together are what the template renders; EOS in the prompt stays (B3), at the end is one."""
    tokenizer = make_tokenizer(eos="<|end|>", bos="<bos>", chat=True)
    user, reply = (
        [{"role": "user", "content": "two figs?"}],
        [{"role": "assistant", "content": "Yes."}],
    )
    prompt, completion = encode(tokenizer, user, "Yes." if as_text else reply)
    assert (
        tokenizer.decode(prompt) == "<|user|>two figs?<|end|><|assistant|>"
    )  # no BOS but what the template puts in
    assert tokenizer.decode(completion) == "Yes.<|end|>"
    assert tokenizer.eos_token_id in prompt
    assert completion.count(tokenizer.eos_token_id) == 1


def test_a_chat_template_without_eos_gets_one():
    """Where turns end in another token, EOS follows it."""
    tokenizer = make_tokenizer(eos="<eos>", chat=True)
    _, completion = encode(
        tokenizer, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    )
    assert tokenizer.decode(completion) == "b<|end|><eos>"


def test_chats_and_texts_mix(tokenizer):
    """Rows of both kinds in one list keep their order."""
    tokenizer = make_tokenizer(eos="<|end|>", chat=True)
    chat = [{"role": "user", "content": "figs"}]
    prompts, completions = dataset.encode_pairs(
        tokenizer, [("one", " a"), (chat, "b"), ("two", " c")], ["f:1", "f:2", "f:3"]
    )
    assert [tokenizer.decode(p) for p in prompts] == [
        "one",
        "<|user|>figs<|end|><|assistant|>",
        "two",
    ]
    assert [tokenizer.decode(c) for c in completions] == [" a<|end|>", "b<|end|>", " c<|end|>"]


def test_render_errors_name_the_place(tokenizer, capsys):
    """A chat without a template, one that the template refuses, and one that the answer rewrites."""
    user, reply = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    assert "f:1: is a chat" in error_of(capsys, dataset.render, tokenizer, user, reply, "f:1")
    chatty = make_tokenizer(chat=True)
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in error_of(capsys, dataset.render, chatty, user, reply, "f:1")
    chatty.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    assert "f:1: the chat template rewrites" in error_of(
        capsys, dataset.render, chatty, user, reply, "f:1"
    )


def test_a_text_prompt_of_a_chat_answer_is_not_dropped(capsys):
    """A string as prompt beside messages as completion is either used or refused, never lost."""
    tokenizer = make_tokenizer(chat=True)
    try:
        start, _ = dataset.render(
            tokenizer, "two figs?", [{"role": "assistant", "content": "b"}], "f:1"
        )
    except SystemExit:
        assert "error: f:1" in capsys.readouterr().err
    else:
        assert "two figs?" in start


def test_load_prompts_keeps_rows_and_places(tokenizer, tmp_path, capsys):
    """Prompts come with their text and all columns; one that is too long is named by its line."""
    rows = [{"prompt": "Q: two figs?", "n": 1}, {"prompt": "Q: six ripe limes? " * 10, "n": 2}]
    path = str(write_jsonl(tmp_path / "train.jsonl", rows))
    prompts = dataset.load_prompts(tokenizer, str(tmp_path), "train", 500)
    assert [p.row for p in prompts] == rows
    assert [p.text for p in prompts] == [row["prompt"] for row in rows]
    assert [p.ids for p in prompts] == [ids_of(tokenizer, row["prompt"]) for row in rows]
    room = len(prompts[1].ids)
    assert len(dataset.load_prompts(tokenizer, str(tmp_path), "train", room)) == 2
    assert f"{path}:2" in error_of(
        capsys, dataset.load_prompts, tokenizer, str(tmp_path), "train", room - 1
    )


def test_stop_token_must_be_one_token(tokenizer, capsys):
    """`eos`, or a string that the tokenizer has as one token."""
    eos = tokenizer.eos_token_id
    assert generate.stop_token_ids(tokenizer, "eos") == [eos]
    assert generate.stop_token_ids(tokenizer, "<|end|>") == [
        eos,
        tokenizer.convert_tokens_to_ids("<|end|>"),
    ]
    assert generate.stop_token_ids(tokenizer, ".") == [eos, tokenizer.convert_tokens_to_ids(".")]
    assert "--stop-token" in error_of(capsys, generate.stop_token_ids, tokenizer, "zebra crossing")


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    """D3: GPT-2 and many others have no pad token."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    make_model(tokenizer).save_pretrained(tmp_path)
    loaded = utils.load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------------------ decoding

PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]


def generate(
    model, prompts=PROMPTS, width=0, length=9, stop_id=1, more=(), pad_id=0, seed=5, **kwargs
):
    ids, mask = dataset.pad(prompts, pad_id, "left", CPU, width)
    rng = utils.generator("cpu", seed)
    return generate.generate(model, ids, mask, length, [stop_id, *more], pad_id, rng=rng, **kwargs)


def never(model):
    """The id of a token that the model, in these tests, does not sample: outside its vocabulary."""
    return model.config.vocab_size


def test_generate_ends_at_the_first_stop_token(model):
    """D16: the mask is 1 up to and including the first stop token; padding follows, however it is called."""
    whole, whole_mask = generate(model, stop_id=never(model), length=12)
    assert whole_mask.all()
    stop_id = whole[0, 3].item()
    ids, mask = generate(model, stop_id=stop_id, pad_id=7, length=12)
    for row, row_mask, full in zip(ids.tolist(), mask.tolist(), whole.tolist(), strict=True):
        length = full.index(stop_id) + 1 if stop_id in full else 12
        assert row_mask == [1] * length + [0] * (12 - length)
        assert row[:length] == full[:length]
        assert set(row[length:]) <= {7}
    assert mask[0].sum() <= 4


def test_generate_ends_at_whichever_stop_token_comes_first(model):
    """EOS ends a response where another token is to stop it too, and so does that token."""
    whole, _ = generate(model, stop_id=never(model), length=12)
    one, other = whole[0, 5].item(), whole[1, 3].item()
    _, mask = generate(model, stop_id=one, more=[other], length=12)
    for row_mask, full in zip(mask.tolist(), whole.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(full) if token in (one, other)), 12)
        assert row_mask == [1] * length + [0] * (12 - length)
    last = whole.gather(1, mask.sum(1, keepdim=True) - 1).flatten().tolist()
    assert {one, other} <= {*last}


@pytest.mark.parametrize("pad_is_stop", [False, True])
def test_generate_may_pad_with_the_stop_token(model, pad_is_stop):
    """D3, B4: with pad = EOS the mask tells the sampled EOS from the padding after it."""
    stop_id = generate(model, stop_id=never(model))[0][0, 2].item()
    a, a_mask = generate(model, stop_id=stop_id, pad_id=stop_id if pad_is_stop else 0)
    b, b_mask = generate(model, stop_id=stop_id, pad_id=9)
    assert torch.equal(a_mask, b_mask)
    assert torch.equal(a * a_mask, b * b_mask)


@pytest.mark.parametrize("extra", [{}, {"num_key_value_heads": 1}])
def test_greedy_generation_equals_transformers(tokenizer, extra):
    """D2: with left padding, temperature 0 gives what `model.generate` gives."""
    model = make_model(tokenizer, **extra)
    ids, mask = dataset.pad(PROMPTS, 0, "left", CPU)
    expected = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=9, eos_token_id=1
    )
    got, _ = generate(model, temperature=0)
    width = expected.shape[1] - ids.shape[1]
    assert torch.equal(got[:, :width], expected[:, ids.shape[1] :])


def test_greedy_generation_equals_transformers_with_learned_positions():
    """D2: a GPT-2 has absolute position embeddings, where wrong positions show at once."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60, n_positions=40, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = GPT2LMHeadModel(config).eval()
    ids, mask = dataset.pad(PROMPTS, 0, "left", CPU, width=10)
    expected = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=9,
        eos_token_id=59,
        pad_token_id=0,
    )
    got, _ = generate(model, width=10, temperature=0, stop_id=59)
    assert torch.equal(got[:, : expected.shape[1] - 10], expected[:, 10:])


def test_more_left_padding_changes_nothing(model):
    """B10: the same tokens and the same log-probabilities, however wide the padding."""
    a, a_mask = generate(model)
    b, b_mask = generate(model, width=25)
    assert torch.equal(a, b)
    assert torch.equal(a_mask, b_mask)
    rows = []
    for width in (0, 25):
        ids, mask = dataset.pad(PROMPTS, 0, "left", CPU, width)
        with torch.no_grad():
            given = utils.model_inputs(model, torch.cat([ids, a], 1), torch.cat([mask, a_mask], 1))
            logits = model(**given).logits[:, -a.shape[1] - 1 : -1].log_softmax(-1)
        rows.append(logits.gather(2, a[..., None]).squeeze(2)[a_mask.bool()])
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-5)


def test_keys_and_values_go_when_decoding_ends(model, monkeypatch):
    """A cycle of references would keep them until the next garbage collection: memory for two rollouts."""
    caches, made = [], generate.KeyValueCache.__init__

    def recorded(cache, *given):
        made(cache, *given)
        caches.append(weakref.ref(cache))

    monkeypatch.setattr(generate.KeyValueCache, "__init__", recorded)
    gc.disable()
    try:
        generate(model)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_rows_do_not_depend_on_other_rows(model):
    """A row's response is the same whatever stands in the other rows, and when those end."""
    a, _ = generate(model, stop_id=never(model))
    stop_id = a[0, 1].item()  # row 0 ends early
    alone = [row if i == 2 else [50 + i] * (i + 1) for i, row in enumerate(PROMPTS)]
    b, b_mask = generate(model, alone, stop_id=stop_id)
    length = int(b_mask[2].sum())
    assert torch.equal(a[2, :length], b[2, :length])
    assert length > 1


def test_the_same_generator_gives_the_same_tokens(model):
    """Sampling depends on the generator alone, not on the global random state."""
    a, _ = generate(model)
    torch.rand(17)
    b, _ = generate(model)
    c, _ = generate(model, seed=6)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def draws(logits, count, temperature=1.0, top_k=0, top_p=1.0, seed=11):
    """`count` sampled tokens from one row of logits, as counts by token."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = generate.sample(logits.expand(count, -1), temperature, top_k, top_p, uniform)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double()


def p_value(counts, probabilities):
    """Of Pearson's chi-squared test, over the tokens that may occur; those that are expected rarely count as one."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(len(counts) - 1).double() / 2, statistic / 2).item()


def cut_to(probabilities, top_k, top_p):
    """Probabilities of the k most probable tokens, and of those the fewest that hold probability p."""
    if top_k:
        probabilities[probabilities < probabilities.sort(descending=True).values[top_k - 1]] = 0
        probabilities /= probabilities.sum()
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        count = int((ordered.cumsum(0) < top_p).sum()) + 1
        probabilities[order[count:]] = 0
        probabilities /= probabilities.sum()
    return probabilities


# their softmax, in this order: 0.40, 0.02, 0.09, 0.25, 0.03, 0.05, 0.15, 0.01
LOGITS = torch.tensor([2.0, -0.9, 0.5, 1.5, -0.5, 0.0, 1.0, -1.2])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (0.7, 4, 0.8)],
)
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """D5, D36: 5000 draws fit the softmax at the temperature, cut to top-k and then to top-p (chi-squared)."""
    probabilities = cut_to(torch.softmax(LOGITS.double() / temperature, -1), top_k, top_p)
    counts = draws(LOGITS, 5000, temperature, top_k, top_p)
    assert p_value(counts, probabilities) > 1e-3
    if (
        temperature == 1 and not top_k
    ):  # the test has power: it rejects a distribution that is slightly off
        assert p_value(counts, torch.softmax(LOGITS.double() / 1.15, -1)) < 1e-3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.4, 0, 1.0), (1.0, 20, 1.0), (0.8, 50, 0.7)],
)
def test_the_decoding_loop_follows_the_distribution(tokenizer, temperature, top_k, top_p):
    """D5, D36: first and second tokens of 20,000 responses fit the model's own softmax (chi-squared)."""
    model = make_model(tokenizer, initializer_range=0.25)
    ids, mask = dataset.pad([PROMPTS[0]] * 20_000, 0, "left", CPU)
    tokens, _ = generate.generate(
        model, ids, mask, 2, [1], 0, temperature, top_k, top_p, utils.generator(CPU, 3)
    )
    often = tokens[tokens[:, 0] != 1, 0].mode().values.item()
    seconds = tokens[tokens[:, 0] == often, 1]
    assert len(seconds) > 500
    for prompt, seen in ((PROMPTS[0], tokens[:, 0]), ([*PROMPTS[0], often], seconds)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].double() / temperature
        counts = torch.bincount(seen, minlength=len(logits)).double()
        assert p_value(counts, cut_to(logits.softmax(-1), top_k, top_p)) > 1e-3
        if not top_k:  # the test has power
            assert p_value(counts, (logits * 0.8).softmax(-1)) < 1e-3


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 3, 6}),
        ({"top_k": 100}, set(range(8))),
        ({"top_p": 1e-6}, {0}),
        ({"top_p": 0.3}, {0}),  # the token that crosses top_p stays
        ({"top_p": 0.5}, {0, 3}),
        ({"top_p": 0.7}, {0, 3, 6}),
        ({"top_k": 2, "top_p": 0.99}, {0, 3}),
    ],
)
def test_samples_stay_within_top_k_and_top_p(flags, allowed):
    """D36: nothing outside the allowed set is drawn, and everything inside it is."""
    assert set(draws(LOGITS, 4000, **flags).nonzero().flatten().tolist()) == allowed


def test_sample_at_the_ends_of_the_unit_interval():
    """Uniform numbers of 0 and just below 1 give the first and the last token that has any probability."""
    logits = torch.tensor([-INF, 0.0, 0.0, -INF]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, math.nextafter(1, 0)], dtype=torch.float64)
    assert generate.sample(logits, 1.0, 0, 1.0, uniform).tolist() == [1, 2, 2]


def test_temperature_zero_takes_the_most_probable():
    """Greedy decoding, for evaluation."""
    assert draws(LOGITS, 10, temperature=0).tolist() == [10, 0, 0, 0, 0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------ forward passes


@pytest.mark.parametrize("at_a_time", [2**26, 30_000])  # whole, and in chunks of 64 tokens
def test_target_logits_are_those_of_the_full_forward_pass(model, at_a_time, monkeypatch):
    """D8: of the targets alone, one position before each, and with the same gradients; none in the first column."""
    monkeypatch.setattr(utils, "LOGITS_AT_A_TIME", at_a_time)
    ids, mask = dataset.pad(PROMPTS * 20, 0, "right", CPU)
    full = model(**utils.model_inputs(model, ids, mask)).logits
    for is_target in (mask.bool(), mask.bool() & (ids % 3 == 0), ids < 0):
        rows, columns = is_target.nonzero(as_tuple=True)
        rows, columns = rows[columns > 0], columns[columns > 0]
        expected = full[rows, columns - 1]
        got, tokens = target_logits(model, ids, is_target)
        assert got.dtype == torch.float32
        assert tokens.tolist() == ids[rows, columns].tolist()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        losses = [
            F.cross_entropy(logits, tokens, reduction="sum") / ids.numel()
            for logits in (got, expected)
        ]
        gradients = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for loss in losses
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.fixture
def classifier(base):
    """A model with a random scalar head."""
    loaded = utils.load_classifier(base.plain, CPU)
    torch.nn.init.normal_(loaded.score.weight, generator=torch.Generator().manual_seed(1))
    return loaded.requires_grad_(False)


def test_last_token_scores_with_pad_equal_to_eos(classifier):
    """B4, B20, B21: read at the sequence's end by its length, with pad ids in the text and EOS as padding."""
    sequences = [[10, 1, 11, 1], [10, 1], [1, 1, 1, 1, 1, 12, 13, 1]]
    together = utils.last_token_scores(classifier, *dataset.pad(sequences, 1, "right", CPU))
    for sequence, score in zip(sequences, together, strict=True):
        hidden = classifier.base_model(torch.tensor([sequence])).last_hidden_state
        assert score.item() == pytest.approx(classifier.score(hidden)[0, -1, 0].item(), abs=1e-5)
    assert len({round(s, 4) for s in together.tolist()}) == 3


def test_head_outputs_do_not_depend_on_padding(classifier):
    """D1, B10: the head at every real position, padded more or less or not at all, whatever the pad token is."""
    padded = [
        utils.head_outputs(classifier, dataset.pad(PROMPTS, i, "right", CPU, 12 * i)[0])
        for i in (1, 2)
    ]
    for row, sequence in enumerate(PROMPTS):
        alone = utils.head_outputs(classifier, torch.tensor([sequence]))[0]
        for outputs in padded:
            torch.testing.assert_close(outputs[row, : len(sequence)], alone, rtol=0, atol=1e-5)


def test_head_outputs_equal_the_classifiers_own_logits(classifier):
    """B18: what transformers computes for a text classifier, at the last token."""
    ids, mask = dataset.pad(PROMPTS, 0, "right", CPU)
    expected = classifier(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(
        utils.last_token_scores(classifier, ids, mask), expected, rtol=0, atol=1e-5
    )


def test_normalize_scores_reads_the_configuration(classifier):
    """D13: (raw - mean) / std, and raw scores from a model that keeps neither."""
    raw = torch.tensor([1.0, 5.0])
    assert utils.normalize_scores(classifier, raw).tolist() == [1.0, 5.0]
    classifier.config.reward_mean, classifier.config.reward_std = 3.0, 2.0
    assert utils.normalize_scores(classifier, raw).tolist() == [-1.0, 1.0]


def test_models_are_loaded_in_float32_and_without_dropout(base, tmp_path):
    """D4: bfloat16 weights on disk are computed with in float32, and no module is in training mode."""
    from transformers import AutoTokenizer

    make_model(
        AutoTokenizer.from_pretrained(base.plain), attention_dropout=0.5
    ).bfloat16().save_pretrained(tmp_path)
    for load in (utils.load_causal_lm, utils.load_classifier):
        loaded = load(str(tmp_path), CPU)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert not any(m.training for m in loaded.modules())


@pytest.mark.skipif(not utils.has_onednn(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("bias", [False, True])
def test_products_by_onednn_are_those_of_torch(bias):
    """Values and gradients, of three-dimensional inputs too, and none where none is asked for."""
    torch.manual_seed(1)
    plain, x = torch.nn.Linear(24, 40, bias=bias), torch.randn(3, 5, 24)
    ours = torch.nn.Linear(24, 40, bias=bias)
    ours.load_state_dict(plain.state_dict())
    ours.__class__ = utils.OneDNNLinear
    weights = torch.randn(3, 5, 40)
    results = []
    for module in (plain, ours):
        given = x.clone().requires_grad_()
        output = module(given)
        gradients = torch.autograd.grad((output * weights).sum(), [given, *module.parameters()])
        results.append([output, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    ours.requires_grad_(False)
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((ours(given) * weights).sum(), [given])
    assert torch.equal(gradient, results[1][1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x))


def test_gradient_checkpointing_leaves_dropout_off(tokenizer):
    """D4: checkpointing needs training mode in transformers, dropout must not wake up with it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=40, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    llama = make_model(tokenizer, attention_dropout=0.5)
    for model in (gpt2, llama):
        ids, mask = dataset.pad(PROMPTS, 0, "right", CPU)
        gradients = []
        for on in (False, True):
            utils.set_gradient_checkpointing(model, on)
            model(
                **utils.model_inputs(model, ids, mask), use_cache=False
            ).logits.square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            model.zero_grad()
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)
        utils.set_gradient_checkpointing(model, False)
        assert not any(m.training for m in model.modules())


def test_same_tokenizer(tokenizer):
    """B5: ids may be passed on only where they mean the same."""
    assert utils.same_tokenizer(tokenizer, make_tokenizer())
    assert not utils.same_tokenizer(tokenizer, make_tokenizer(size=300))
    assert not utils.same_tokenizer(tokenizer, make_tokenizer(eos="<|end|>"))
    assert not utils.same_tokenizer(tokenizer, make_tokenizer(chat=True))


# --------------------------------------------------------------------------------------------------------- checkpoints


def train_step(model, optimizer):
    ids, mask = dataset.pad(PROMPTS, 0, "right", CPU)
    model(**utils.model_inputs(model, ids, mask)).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_restores_everything(tokenizer, tmp_path, tied):
    """Weights (tied ones stay tied), optimizer and state; the next step is the same to the bit."""
    model = make_model(tokenizer, tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    train_step(model, optimizer)
    utils.save_checkpoint(tmp_path, 7, {"policy": model}, optimizer, {"kl_coef": 0.1234})
    train_step(model, optimizer)

    other = make_model(tokenizer, seed=9, tie_word_embeddings=tied)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
    state = utils.load_checkpoint(tmp_path, {"policy": other}, other_optimizer)
    assert state == {"step": 7, "kl_coef": 0.1234}
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    train_step(other, other_optimizer)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_only_the_newest_whole_checkpoint_counts(tokenizer, tmp_path):
    """Older ones go once a newer one is whole; a half-written one is passed over."""
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    train_step(model, optimizer)
    for step, keep, left in (
        (8, 2, [8]),
        (90, 2, [90, 8]),
        (100, 2, [100, 90]),
        (1000000, 3, [1000000, 100, 90]),
    ):
        utils.save_checkpoint(tmp_path, step, {"policy": model}, optimizer, {}, keep)
        assert [int(p.name) for p in utils.checkpoints(tmp_path)] == left
    utils.save_checkpoint(
        tmp_path, 100, {"policy": model}, optimizer, {}, 1
    )  # whole already: nothing is written or goes
    assert len(utils.checkpoints(tmp_path)) == 3
    utils.save_checkpoint(tmp_path, 110, {"policy": model}, optimizer, {}, 1)
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["000110"]
    (tmp_path / "checkpoint" / "000200.part").mkdir()
    assert utils.load_checkpoint(tmp_path, {"policy": model}, optimizer)["step"] == 110


def test_no_checkpoint_is_none(model, tmp_path):
    """A run that was stopped before its first checkpoint starts again."""
    assert (
        utils.load_checkpoint(tmp_path, {"policy": model}, torch.optim.AdamW(model.parameters()))
        is None
    )


def test_a_failed_checkpoint_leaves_the_last_one(tokenizer, tmp_path, monkeypatch, capsys):
    """No space on the disk: one line, exit code 1, and what was there stands."""
    import safetensors.torch

    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    utils.save_checkpoint(tmp_path, 3, {"policy": model}, optimizer, {})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        utils.save_checkpoint(tmp_path, 6, {"policy": model}, optimizer, {})
    assert exit_.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert utils.load_checkpoint(tmp_path, {"policy": model}, optimizer)["step"] == 3


# --------------------------------------------------------------------------------------------------- reward functions


def test_load_function(tmp_path):
    """FILE.py:FUNCTION, with a file that may use what any module may use."""
    path = tmp_path / "rewards.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Weight:\n"
        "    value: float = 2.0\n"
        "def f(prompts, completions, **columns):\n"
        "    return [Weight().value * len(c) for c in completions]\n"
    )
    assert utils.load_function(f"{path}:f", "--reward-fn")(["a"], ["bc"]) == [4.0]


def test_call_reward_function_passes_the_columns():
    """As in TRL: prompts, completions and every other column by name, None where a row lacks it."""
    seen = {}

    def f(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return np.array([1, 2])  # anything that float() takes

    rows = [{"prompt": "p", "answer": 1, "kind": "x"}, {"prompt": "q", "answer": 2}]
    scores = utils.call_reward_function(f, "--reward-fn", ["p", "q"], ["c", "d"], rows)
    assert scores == [1.0, 2.0]
    assert all(isinstance(s, float) for s in scores)
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["c", "d"],
        "answer": [1, 2],
        "kind": ["x", None],
    }


@pytest.mark.parametrize(
    ("result", "what"),
    [([1.0], "1 values for 2"), ([1.0, NAN], "nan"), ([1.0, INF], "inf"), (None, "TypeError")],
)
def test_call_reward_function_refuses_what_is_no_score(capsys, result, what):
    """The wrong count, NaN, infinity, or nothing at all."""
    args = (lambda prompts, completions: result, "--reward-fn", ["p", "q"], ["c", "d"], [{}, {}])
    assert what in error_of(capsys, utils.call_reward_function, *args)


# -------------------------------------------------------------------------------------------------------------- records


def test_markdown_table_escapes_what_would_break_it():
    """TensorBoard renders text as Markdown and HTML; a response may hold either."""
    table = utils.markdown_table(["a", "b"], [["<script>x</script>", "1 | 2\n3"]])
    assert table.splitlines() == [
        "| a | b |",
        "|---|---|",
        "| &lt;script&gt;x&lt;/script&gt; | 1 &#124; 2<br>3 |",
    ]


def test_write_json_is_whole_or_not_there(tmp_path):
    """Written beside the target and moved there, with text as it is."""
    path = tmp_path / "x.json"
    utils.write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        utils.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert "é" in path.read_text(encoding="utf-8")


def test_peak_memory_is_plausible():
    """Python with torch takes more than 100 MB and, in these tests, less than 30 GB."""
    assert 0.1 < utils.peak_memory_gb() < 30


def test_stop_prints_one_line(capsys):
    """WHERE, WHAT and HOW TO MEND on one line, whatever the message holds."""
    assert (
        error_of(capsys, utils.stop, "a:1: is\nbroken; mend it") == "error: a:1: is broken; mend it"
    )


# ------------------------------------------------------------------------------------------------------------- memory


def test_largest_micro_batch_stops_where_memory_ends(model):
    """The largest divisor before the first that fails; no gradient is left."""
    tried = []

    def loss_of(count):
        tried.append(count)
        if count > 4:
            raise torch.OutOfMemoryError
        return model(torch.zeros(count, 3, dtype=torch.long)).logits.sum()

    assert utils.largest_micro_batch(loss_of, 24, False, model) == 4
    assert tried == [1, 2, 3, 4, 6]
    assert all(p.grad is None for p in model.parameters())


def test_largest_micro_batch_reckons_with_what_the_last_one_took(model, monkeypatch):
    """Each sequence takes 1 GB, after what all together take; AdamW's moments come on top."""
    used, fixed = [0.0], 0.0

    def loss_of(count):
        used[0] = max(used[0], fixed + count)
        return model(torch.zeros(1, 3, dtype=torch.long)).logits.sum()

    monkeypatch.setattr(utils, "peak_memory_gb", lambda: used[0])
    moments = 8 * sum(p.numel() for p in model.parameters())
    for gb, fixed, fits in ((10, 0, 8), (4, 0, 2), (0.5, 0, 1), (60, 20, 32)):  # noqa: B007
        used[0] = 0.0
        monkeypatch.setattr(utils, "free_memory", lambda device, gb=gb: gb * 1e9 + moments)
        assert utils.largest_micro_batch(loss_of, 32, False, model) == fits
