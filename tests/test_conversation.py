"""generate.py as a command: lines in, answers out."""

import io
import shutil
import sys

import pytest
import torch
from conftest import (
    change_config,
    command,
    error_line,
    make_model,
    make_tokenizer,
    plain_lm,
    plain_scores,
    save_pair,
)

import encoding
import generate
import utils
from chat import Args, main

PROMPTS = ["Q: two ripe plums?\nA:", "Q: six fresh figs?\nA:", "Q: four small pears?\nA:"]
PIPED = "".join(prompt.replace("\n", "\\n") + "\n" for prompt in PROMPTS)


class Typed(io.StringIO):
    """What is typed on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(monkeypatch, capsys):
    """`talk(lines, **flags)`: what goes to stdout and to stderr."""

    def run(lines, **flags) -> tuple[str, str]:
        lines = io.StringIO(lines) if isinstance(lines, str) else lines
        monkeypatch.setattr(generate, "check", lambda *given: None)  # which would be recorded too
        monkeypatch.setattr(sys, "stdin", lines)
        capsys.readouterr()
        main(Args(**{"device": "cpu", "dtype": "float32"} | flags))
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    """A model with a chat template and a context of 60 tokens."""
    tokenizer = make_tokenizer(eos="<|end|>", chat=True)
    model = make_model(tokenizer, max_position_embeddings=60)
    return save_pair(tmp_path_factory.mktemp("chat") / "chat", model, tokenizer)


def greedy(folder, prompt: str, length: int = 10) -> tuple[str, list[int]]:
    """The answer as transformers decodes it, on one line; the ids of both and an EOS."""
    tokenizer, model = encoding.load_tokenizer(str(folder)), plain_lm(folder)
    inputs, eos = tokenizer(prompt, return_tensors="pt"), tokenizer.eos_token_id
    flags = {"max_new_tokens": length, "do_sample": False, "eos_token_id": eos}
    ids = model.generate(**inputs, **flags)[0].tolist()
    text = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    shown = utils.visible(text.strip("\ufffd \n")).replace("\n", "\\n")
    return shown, ids if ids[-1] == eos else [*ids, eos]


def test_piped_prompts_are_answered_each_on_a_line(talk, chain):
    """By greedy decoding as transformers does it; again with other neighbours."""
    out, err = talk(PIPED, model=str(chain.ppo), temperature=0)
    assert not err
    assert out.splitlines() == [greedy(chain.ppo, prompt)[0] for prompt in PROMPTS]
    one = PIPED.splitlines(keepends=True)[1]
    assert talk(one, model=str(chain.ppo), temperature=0)[0] == out.splitlines()[1] + "\n"
    latin = io.TextIOWrapper(io.BytesIO("Très?\n".encode("latin-1") + one.encode()), "utf-8")
    answers = talk(latin, model=str(chain.ppo), temperature=0)[0].splitlines()
    assert len(answers) == 2
    assert answers[1] == out.splitlines()[1]
    from_windows = one.replace("\n", "\r\n")
    assert talk(from_windows, model=str(chain.ppo), temperature=0)[0] == out.splitlines()[1] + "\n"


def test_it_samples_as_in_training(talk, chain, monkeypatch, tmp_path):
    """By the saved generation config, unless flags say otherwise."""
    asked, decode = [], generate.generate

    def recorded(*given, **named):
        asked.append((given[3].shape[1], *(named[k] for k in ("temperature", "top_k", "top_p"))))
        return decode(*given, **named)

    monkeypatch.setattr(generate, "generate", recorded)
    folder = str(shutil.copytree(chain.ppo, tmp_path / "ppo"))
    config = plain_lm(folder).generation_config
    config.update(temperature=0.5, top_k=7)
    config.save_pretrained(folder)
    first = talk(PIPED, model=folder)
    assert first == talk(PIPED, model=folder, seed=1)
    assert first != talk(PIPED, model=folder, seed=2)
    talk(PIPED, model=folder, temperature=0.7, top_k=3, top_p=0.9, max_new_tokens=4)
    assert {*asked} == {(10, 0.5, 7, 1.0), (4, 0.7, 3, 0.9)}
    config.update(do_sample=False, temperature=None, top_k=None)
    config.save_pretrained(folder)
    talk(PIPED, model=folder)
    assert asked[-1] == (10, 0.0, 0, 1.0)
    talk(PIPED, model=folder, top_k=5)  # which asks for samples
    assert asked[-1] == (10, 1.0, 5, 1.0)


def test_it_stops_where_the_policy_was_trained_to(talk, chain, tmp_path):
    """At an ordinary token too, which PPO leaves in the generation config."""
    folder = str(shutil.copytree(chain.ppo, tmp_path / "ppo"))
    config, tokenizer = plain_lm(folder).generation_config, encoding.load_tokenizer(folder)
    answer = greedy(folder, PROMPTS[0])[1]
    config.eos_token_id = [tokenizer.eos_token_id, answer[-4]]
    config.save_pretrained(folder)
    whole, cut = (talk(PIPED, model=x, temperature=0)[0] for x in (str(chain.ppo), folder))
    config.eos_token_id = answer[-4]  # of another tokenizer, say (B28)
    config.save_pretrained(folder)
    assert talk(PIPED, model=folder, temperature=0)[0] == whole
    assert whole.startswith(cut.splitlines()[0])
    assert whole.splitlines()[0] != cut.splitlines()[0]


def test_a_message_is_kept_without_the_space_before_it(talk, chat, monkeypatch):
    """B38: which belongs to the template."""
    seen, decode = [], generate.generate
    tokenizer = encoding.load_tokenizer(chat)
    [answer] = tokenizer([" figs"])["input_ids"]

    def recorded(model, ids, *given, **named):
        seen.append(tokenizer.decode(ids[0]))
        tokens = iter([*answer, tokenizer.eos_token_id])
        monkeypatch.setattr(generate, "sample", lambda *given: torch.tensor([next(tokens)]))
        return decode(model, ids, *given, **named)

    monkeypatch.setattr(generate, "generate", recorded)
    talk(Typed("a\nb\n"), model=chat, max_new_tokens=5)
    assert seen[1] == "<|user|>a<|end|><|assistant|>figs<|end|><|user|>b<|end|><|assistant|>"


def test_a_model_with_a_template_that_learned_from_texts(talk, chat):
    """With --text it is asked by texts; what it says is by greedy decoding after them."""
    text, templated = (talk("Q: a\n", model=chat, temperature=0, text=x)[0] for x in (True, False))
    assert text.startswith(greedy(chat, "Q: a", 256)[0][:20]) and text != templated


def test_two_models_and_scores(talk, chain):
    """Name, answer and score of both, one under the other; the score is the reward model's own."""
    flags = {"model": str(chain.ppo), "compare": str(chain.sft), "score": str(chain.reward_model)}
    lines = talk(PIPED, **flags, temperature=0)[0].splitlines()
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == [str(chain.ppo), str(chain.sft)] * 3
    for folder, part in ((chain.ppo, rows[::2]), (chain.sft, rows[1::2])):
        answers, sequences = zip(*(greedy(folder, prompt) for prompt in PROMPTS), strict=True)
        scores = plain_scores(chain.reward_model, sequences)
        expected = [[x, f"score {y:.2f}"] for x, y in zip(answers, scores, strict=True)]
        assert [row[1:] for row in part] == expected


def test_a_score_is_of_the_whole_answer(talk, chain, tmp_path):
    """A reward model of a small context reads a shorter answer, and no prompt that fills it."""
    judge = shutil.copytree(chain.reward_model, tmp_path / "judge")
    tokenizer = encoding.load_tokenizer(str(chain.ppo))
    prompt = len(tokenizer(PROMPTS[0])["input_ids"])
    for room in (3, 1):  # the last of them is for EOS
        change_config(judge, max_position_embeddings=prompt + room)
        flags = {"model": str(chain.ppo), "score": str(judge), "temperature": 0}
        out, err = talk(PIPED.splitlines(keepends=True)[0], **flags)
        if room == 1:
            assert "leave the response no room" in err
        else:
            answer, score = out.rstrip("\n").split("\t")
            ids = tokenizer(PROMPTS[0])["input_ids"]
            answered = tokenizer(PROMPTS[0] + " " + answer)["input_ids"]
            assert len(ids) < len(answered) <= len(ids) + room
            wanted = plain_scores(
                chain.reward_model, [[*answered[: prompt + 2], tokenizer.eos_token_id]]
            )
            assert score == f"score {wanted[0]:.2f}"


def test_characters_are_printed_whole(talk, chat, monkeypatch):
    """Typed prompts' answers come by tokens, but characters of several when whole."""
    tokenizer, text, written = encoding.load_tokenizer(chat), "Zoë 中文\n🙂 \x1b[1m naïve.", []
    tokens = iter([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    monkeypatch.setattr(generate, "sample", lambda *given: torch.tensor([next(tokens)]))
    monkeypatch.setattr(sys.stdout, "write", lambda piece: written.append(piece) or len(piece))
    talk(Typed("hello\n"), model=chat, max_new_tokens=50)
    assert written[0] == "> "
    assert "".join(written) == "> Zoë 中文\n🙂 \\x1b[1m naïve.\n> "
    assert len([piece for piece in written if piece]) > 15


def test_a_chat_is_remembered(talk, chat, monkeypatch):
    """Until /reset; the oldest turns go where the context is full."""
    seen, decode = [], generate.generate

    def recorded(model, ids, *given, **named):
        seen.append(encoding.load_tokenizer(chat).decode(ids[0]))
        answer = iter([70, 71, model.config.eos_token_id])
        monkeypatch.setattr(generate, "sample", lambda *given: torch.tensor([next(answer)]))
        return decode(model, ids, *given, **named)

    monkeypatch.setattr(generate, "generate", recorded)
    said = encoding.load_tokenizer(chat).decode([70, 71])
    turns = [f"<|user|>{c}<|end|><|assistant|>" for c in "abcdefghij"]
    system = ""
    flags = {"model": chat, "max_new_tokens": 3}
    out, err = talk(Typed("a\nb\n/reset\nc\n\nd\n"), **flags)
    assert seen == [system + x for x in (turns[0], f"{turns[0]}{said}<|end|>{turns[1]}", turns[2])]
    assert out.count(said) == 3
    del seen[:]
    out, err = talk(Typed("".join(f"{c}\n" for c in "abcdefghij")), **flags)
    assert len(seen) == 10
    assert seen[-1].startswith(system + "<|user|>")
    assert turns[8] in seen[-1] and turns[0] not in seen[-1]
    del seen[:]
    talk("a\nb\n", **flags)
    assert seen == [system + turns[0], system + turns[1]]
    assert len(talk("/reset\na\n", **flags)[0].splitlines()) == 2  # a line for each, when piped
    assert seen[2] == turns[0].replace(">a<", ">/reset<")


def test_a_prompt_that_is_too_long_does_not_end_it(talk, chat):
    out, err = talk("a\n" + "plums " * 99 + "\na\n", model=chat, temperature=0)
    assert f"{chat}: the prompt fills" in error_line(err)
    first, none, last = out.splitlines()
    assert first == last and not none


def test_a_model_of_whole_prompts_says_so(talk, chain, chat):
    """Where lines are typed: natural ones would be answered badly."""
    hint = "each line is a whole prompt, as in the training data, with \\n for a line break\n> "
    assert talk(Typed("\n"), model=str(chain.ppo))[0] == hint
    assert talk(Typed("\n"), model=chat, text=True)[0] == hint


def test_it_ends_and_refuses_as_the_stages_do(talk, chat, error_of, tmp_path):
    for end in ("", "\n", "\nhello\n"):
        assert talk(Typed(end), model=chat)[0] == "> "
    assert talk("", model=chat)[0] == ""
    assert "holds no model" in error_of(talk, "a\n", model=str(tmp_path))
    assert "is no reward model" in error_of(talk, "a\n", model=chat, score=chat)
    assert "--top-p" in error_of(talk, "a\n", model=chat, top_p=2.0)
    for script in ("generate.py", "chat.py"):
        assert "/reset starts anew" in command(script, "--help").stdout
