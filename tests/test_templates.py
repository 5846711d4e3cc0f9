"""encoding.py with the chat templates of known models, as TRL has them (requirements-bench.txt)."""

import re
from pathlib import Path

import pytest
from conftest import make_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

import encoding
from dataset import Unusable

FOLDER = Path(pytest.importorskip("trl", reason="requirements-bench.txt").__file__).parent
TEMPLATES = sorted((FOLDER / "chat_templates").glob("*.jinja"))
OF_IMAGES = ("idefics3", "llava")  # want a list of parts
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "two figs?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes, two.", "No, four."))
CHATS = [[USER, YES], [SYSTEM, USER, YES], [USER, YES, USER, NO], [SYSTEM, USER, YES, USER, NO]]


def tokenizer_of(path: Path):
    tokenizer = make_tokenizer(bos="<bos>")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("chat", CHATS, ids=len)
def test_an_answer_follows_what_sampling_sees(path, chat):
    """The last one alone is learned, and of it all; or the template says why not."""
    tokenizer = tokenizer_of(path)
    try:
        given, learned = encoding.render(tokenizer, chat[:-1], chat[-1:]).pieces
    except Unusable as error:
        assert path.stem.startswith(OF_IMAGES) or "roles" in str(error), error
        return
    assert [given] == encoding.render(tokenizer, chat[:-1]).pieces
    assert chat[-1]["content"] in learned
    assert not any(message["content"] in learned for message in chat[:-1])
    assert learned == learned.rstrip()
    assert tokenizer.apply_chat_template(chat, tokenize=False).rstrip().endswith(learned)


MARKED = [path for path in TEMPLATES if re.search(r"{%-? *generation", path.read_text())]


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.stem)
@pytest.mark.parametrize("chat", CHATS, ids=len)
def test_marked_turns_are_those_of_transformers(path, chat):
    """What lies between the marks `{% generation %}` is learned, and nothing else."""
    tokenizer = tokenizer_of(path)
    try:
        pieces = encoding.render(tokenizer, chat[:-1], chat[-1:], all_turns=True).pieces
    except Unusable as error:
        assert path.stem.startswith(OF_IMAGES) or "roles" in str(error), error
        return
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    (whole,), (spans,) = render_jinja_template(
        [chat], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **names
    )
    assert "".join(pieces) == whole.rstrip()
    assert "".join(pieces[1::2]) == "".join(whole[a:b] for a, b in spans).rstrip()
