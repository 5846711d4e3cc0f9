"""Checked rows -> text -> token ids -> rectangles of them.

In: rows of dataset.py, a tokenizer with its chat template. Out: token ids as a model reads them,
which of them are learned, and batches padded to a rectangle, with masks.

B sequences, T tokens. `B19` in comments points to docs/details.md.
"""

import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

import utils
from dataset import CHATS, Row, Unusable, usable

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the second is SentencePiece's


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id; without pad token, or embedding of it, EOS pads (D3).

    It splits texts as its file says: transformers may build another one (B41).
    """
    has_one = (Path(model).expanduser() / "tokenizer_config.json").is_file()
    name = model if has_one else utils.base_of(model)
    tokenizer = utils.from_pretrained(transformers.AutoTokenizer, name)
    if tokenizer.eos_token_id is None:
        utils.stop(f"{model}: its tokenizer has no EOS token; set one in tokenizer_config.json")
    settings = get_tokenizer_config(tokenizer.name_or_path)
    generic, kind = transformers.PreTrainedTokenizerFast, type(tokenizer)
    where = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    if (
        kind is not generic
        and issubclass(kind, generic)
        and kind.__module__.startswith("transformers.")  # not code that comes with a model
        and any(cached_file(tokenizer.name_or_path, file, **where) for file in TOKENIZER_FILES)
    ):  # special tokens may be the class's own, and Llama's `legacy` is True unless it is False
        own = tokenizer.special_tokens_map | {"legacy": settings.get("legacy") is not False}
        as_written = utils.from_pretrained(generic, name, **own)
        if str(as_written.backend_tokenizer) != str(tokenizer.backend_tokenizer):
            tokenizer = as_written
    if "Llama" in str(settings.get("tokenizer_class")) and "add_bos_token" in settings:
        tokenizer.add_bos_token = settings["add_bos_token"]  # transformers 5 ignores it (B46)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "fix_mistral_regex", None) is False:
        utils.say(f"{model}: may split words unlike Mistral (huggingface/transformers#42299)")
    if "strftime_now" in str(tokenizer.chat_template):
        utils.say(f"{model}: its chat template writes today's date; another day has other prompts")
    base = model  # below any adapters
    while (below := utils.base_of(base)) != base:
        base = below
    config = utils.from_pretrained(transformers.AutoConfig, base).get_text_config()
    rows = getattr(config, "vocab_size", 2**63)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Rendered(NamedTuple):
    """A row as text in pieces, alternately given and learned."""

    pieces: list[str]
    is_chat: bool


def render(tokenizer: Any, prompt: Any, answer: Any = None, all_turns: bool = False) -> Rendered:
    """A prompt, and its answer if any, as text; chats by the chat template.

    A text answers a prompt that ends with the assistant's message by going on with it. With
    `all_turns` the assistant's turns in the prompt are learned too (D44), found by the template's
    own marks `{% generation %}` or by rendering prefix after prefix.
    """
    if isinstance(prompt, str) and not isinstance(answer, list):
        return Rendered([prompt] if answer is None else [prompt, answer], False)
    if tokenizer.chat_template is None:
        raise Unusable("is a chat, but the tokenizer has no chat template; use text")
    if isinstance(prompt, str) and prompt:
        raise Unusable("the prompt is a text, but its answer is a chat; write both alike")
    template = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    messages = [*(prompt or [])]
    is_begun = not isinstance(answer, list) and messages[-1]["role"] == "assistant"
    asked = functools.partial(
        template, add_generation_prompt=not is_begun, continue_final_message=is_begun
    )
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    try:
        start = ""
        if messages:
            start = asked(messages)
        elif answer[0]["role"] == "assistant":  # what comes before it is not said by it
            other = [[{"role": "assistant", "content": x}] for x in "ab"]
            start = os.path.commonprefix([template(chat) for chat in other])
        if answer is None:
            check_all_said(asked, start, messages, [])
            return Rendered([start], True)
        if is_begun:
            begun = messages.pop()["content"]
            answer = [answer[0] | {"content": begun + answer[0]["content"]}]
        whole = template([*messages, *answer])
        check_all_said(template, whole, messages, answer)
        if common_end(start, whole).strip():  # an end of both, or another answer's head (B47)
            longer = whole
            with contextlib.suppress(Exception):  # it may want another role next
                longer = template([*messages, *answer, {"role": "user", "content": "a"}])
            head = whole[len(os.path.commonprefix([whole, longer])) :]
            if head.strip() and start.endswith(head):
                what = "the chat template ends a chat with the head of another answer"
                raise Unusable(f"{what}; put that in {{% if add_generation_prompt %}}")
        # a null, which no message holds, in place of each mark; in a block, as the mark was, so
        # that the same line breaks around it are dropped
        block = "{%\\1 if true %}\0{% endif \\2%}"
        mark = r"{%(-?)\s*(?:end)?generation\s*(-?)%}"
        marked = re.sub(mark, block, tokenizer.get_chat_template())
        if all_turns and "\0" in marked and "\0" not in whole:
            text = template([*messages, *answer], chat_template=marked)
            before, _, end = text.rpartition("\0")  # the end of the last turn is learned too
            return Rendered((before + end).rstrip().split("\0"), True)
    except Unusable:
        raise
    except Exception as error:
        why = utils.first_line(error)
        raise Unusable(f"does not fit the chat template ({why}); check roles and order") from None
    given = start if whole.startswith(start) else re.sub(r"<think>\s*$", "", start)
    if not whole.startswith(given):
        raise Unusable("the chat template rewrites an answered prompt; use text")
    learned = whole[len(given) :].rstrip()  # a line break after the turn is not sampled (B29)
    if given != start:
        learned = re.sub(r"^<think>\s*", "", learned)  # sampling finds it in the prompt
    pieces, done = [], 0
    for i, message in enumerate(messages if all_turns else []):
        if message["role"] == "assistant":
            before, turn = render(tokenizer, messages[:i], [message]).pieces
            if not start.startswith(before + turn):
                what = "the chat template rewrites earlier turns"
                raise Unusable(f"{what}; pass --last-turn-only to sft.py, or use text")
            pieces += [before[done:], turn]
            done = len(before + turn)
    return Rendered([*pieces, start[done:], learned], True)


def check_all_said(template: Callable, text: str, earlier: list, answer: list) -> None:
    """Raise Unusable where the text, a template's of a chat, lacks what is said or called (B37).

    In the assistant's `earlier` turns only its calls count: templates drop old reasoning.
    """

    def bare(x: str) -> str:  # without switches, which some templates act on
        return "".join(re.sub(r"/(no_?)?think\b", "", x).split())

    def is_said(words: str) -> bool:
        forms = (words, json.dumps(words, ensure_ascii=False)[1:-1])  # as a tool's result
        return words.strip() in text or any(bare(x) in bare(text) for x in forms)

    chat = earlier + answer
    for i, message in enumerate(chat):
        for call in message.get("tool_calls") or []:  # OpenAI's arguments are JSON in a text
            arguments = call.get("function", call).get("arguments")
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in text:
                what = "the chat template quotes a call's arguments, which are a text"
                raise Unusable(f"{what}; write them as an object")
        words, is_new = message.get("content") or "", i >= len(earlier)
        if (is_new or message["role"] != "assistant") and not is_said(words):
            raise Unusable(f"the chat template leaves out {words!r:.60}; fix it or use text")
        for name in ["tool_calls", "function_call"] + ["reasoning_content"] * is_new:
            if message.get(name):
                less = {k: x for k, x in message.items() if k != name} | {"content": words}
                without = None
                with contextlib.suppress(Exception):  # it misses the call, so it looks at it
                    without = template([*chat[:i], less, *chat[i + 1 :]])
                if without == text:
                    raise Unusable(f"the chat template leaves out {name}; fix it or use text")


def render_row(tokenizer: Any, row: Row, all_turns: bool = True) -> Rendered:
    """A row of SFT_FORMATS; of a text all is learned."""
    if row.get("prompt") and "completion" in row:
        return render(tokenizer, row["prompt"], row["completion"])
    if row.get("messages"):
        learned = row["messages"][0 if all_turns else -1 :]
        if any(turn["role"] == "assistant" and turn.get("weight") == 0 for turn in learned):
            raise Unusable("messages: a turn of weight 0 would be learned; take it out")
        return render(tokenizer, row["messages"][:-1], row["messages"][-1:], all_turns)
    return Rendered(["", row["text"]], False)


def encode(tokenizer: Any, texts: list[Rendered]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each text, and which of them are learned.

    They are those of the whole text, also where a piece begins (B36); but a prompt has the same ids
    with an answer as without, since sampling sees it without. A text begins with what the tokenizer
    puts there (a BOS), a chat with what its template does. A learned end is one EOS (B19).
    """

    def tokens(text: Any) -> Any:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokens_after(before: str, piece: str) -> list[int]:
        # where a token reaches across the border, the piece is tokenized by itself, after a line
        # break: no tokenizer adds a space there
        for head in (before, "\n", ""):
            text, n = head + piece, len(ids_of[head])
            ids = ids_of.get(text) or tokens(text)
            if ids[:n] == ids_of[head]:
                break
        return ids[n:]

    eos, letter = tokenizer.eos_token_id, tokens("a")
    start = tokenizer("a")["input_ids"]
    if letter:
        start = start[: start.index(letter[0])]
    elif eos != tokenizer.bos_token_id:
        start = [i for i in start if i != eos]
    pairs, needed = [], {"\n"}
    for pieces, _ in texts:
        if len(pieces) % 2 == 0 and pieces[-1].rstrip().endswith(tokenizer.eos_token):
            pieces = [*pieces[:-1], pieces[-1].rstrip().removesuffix(tokenizer.eos_token)]
        pairs.append([*itertools.pairwise(["", *pieces])])
        for before, piece in pairs[-1]:
            needed |= {before, before + piece}
    ids_of = dict(zip(needed, tokens([*needed]), strict=True))
    encoded = []
    for row, (_, is_chat) in zip(pairs, texts, strict=True):
        ids = [] if is_chat else [*start]
        learned = [False] * len(ids)
        for k, (before, piece) in enumerate(row):
            is_learned, is_last = k % 2 == 1, k == len(row) - 1
            new = tokens_after(before, piece)
            if ids == start and new[: len(start)] == start:  # B30
                new = new[len(start) :]
            ids += [*new, eos] if is_learned and is_last else new
            learned += [is_learned] * (len(ids) - len(learned))
        encoded.append((ids, learned))
    return encoded


def encode_ids(tokenizer: Any, texts: list[Rendered]) -> list[list[int]]:
    """Token ids of each text."""
    return [ids for ids, _ in encode(tokenizer, texts)]


def encode_demonstrations(
    tokenizer: Any, rows: list[Row], max_length: int, all_turns: bool = True
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of rows of SFT_FORMATS and which are learned, cut at `max_length`."""

    def cut(row: Row, both: tuple[list[int], list[bool]]) -> tuple[list[int], list[bool]]:
        ids, learned = both
        if not any(learned[1:max_length]):
            what = f"prompt: its tokens leave no room for a completion within {max_length}"
            raise Unusable(f"{what}; shorten it or allow more tokens")
        return ids[:max_length], learned[:max_length]

    pairs = usable(lambda row: (row, render_row(tokenizer, row, all_turns)), rows)
    rows, texts = zip(*pairs, strict=True)
    return usable(cut, rows, encode(tokenizer, texts))


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two give the same ids, so that one model can read the other's tokens (B5)."""
    same = a.eos_token_id == b.eos_token_id and a.chat_template == b.chat_template
    text = " A text\n in  Two lines."  # they may begin, or put spaces, in other ways
    return same and a.get_vocab() == b.get_vocab() and a(text)["input_ids"] == b(text)["input_ids"]


class Prompt(NamedTuple):
    """A prompt to sample responses to."""

    ids: list[int]
    text: str
    row: Row


def encode_prompts(
    tokenizer: Any, rows: list[Row], max_tokens: int, *readers: tuple[Any, int]
) -> list[Prompt]:
    """Prompts of 1 to `max_tokens` tokens.

    `readers`, each a reward model's tokenizer and its context, have room for an answer of one token
    and what ends it (B31).
    """

    def rendered(row: Row) -> tuple[Any, ...]:
        text = render(tokenizer, row["prompt"])
        return row, text, *(answered(reader, row, text.pieces[0], "a") for reader, _ in readers)

    def fit(row: Row, text: Rendered, ids: list[int], *judged: list[int]) -> Prompt:
        if not ids:
            raise Unusable("prompt: has no token that the tokenizer knows; drop the row")
        is_long = [len(x) > limit for x, (_, limit) in zip(judged, readers, strict=True)]
        if len(ids) > max_tokens or any(is_long):
            what = f"its {len(ids)} tokens leave the response no room in a model's context"
            raise Unusable(f"prompt: {what}; shorten it or lower --response-length")
        return Prompt(ids, text.pieces[0], row)

    rows, texts, *asked = zip(*usable(rendered, rows), strict=True)
    judged = [encode_ids(r, with_a) for (r, _), with_a in zip(readers, asked, strict=True)]
    return usable(fit, rows, texts, encode_ids(tokenizer, texts), *judged)


def answered(tokenizer: Any, row: Row, text: str, answer: str) -> Rendered:
    """A prompt, which is `text` to the policy, and its answer, as a reward model reads them."""
    if tokenizer.chat_template is None:
        return Rendered([text, answer], False)
    try:
        return render(tokenizer, row["prompt"], answer)
    except Unusable:  # a template that refuses an empty answer, say; others were rendered before
        (start, a), (_, b) = (render(tokenizer, row["prompt"], x).pieces for x in "ab")
        end = common_end(a, b)
        return Rendered([start, a.removesuffix(f"a{end}") + answer + end], True)


def answer_end(tokenizer: Any, prompt: Prompt) -> list[int]:
    """What ends an answer in a reward model's tokens: what "a" and "b" end with alike."""
    texts = [answered(tokenizer, prompt.row, prompt.text, answer) for answer in "ab"]
    a, b = encode_ids(tokenizer, texts)
    return common_end(a, b) if a != b else [tokenizer.eos_token_id]  # it knows neither letter


def as_judged(
    reader: tuple[Any, int], prompts: list[Prompt], answers: list[Any], stop_ids: Sequence[int] = ()
) -> tuple[list[list[int]], list[bool]]:
    """Prompts and answers as a reward model reads them, and which are cut to its context (B31).

    `reader` is its tokenizer and its context. Answers are texts or, where it shares the policy's
    tokenizer, token ids, which one of `stop_ids` may have ended.
    """
    tokenizer, limit = reader
    kinds = [type(p.row["prompt"]) for p in prompts]
    one_of = dict(zip(kinds, prompts, strict=True))  # answers to texts end otherwise than to chats
    end_of = {kind: answer_end(tokenizer, p) for kind, p in one_of.items()}
    ends = [end_of[kind] for kind in kinds]
    if isinstance(answers[0], str):  # by its own tokenizer and template (B5)
        both = zip(prompts, answers, strict=True)
        texts = [answered(tokenizer, p.row, p.text, answer) for p, answer in both]
        sequences = encode_ids(tokenizer, texts)
    else:
        sequences = []
        # stop tokens that the answer's text would be without
        stops = [i for i in stop_ids if not tokenizer.decode([i], skip_special_tokens=True)]
        for p, answer, end in zip(prompts, answers, ends, strict=True):
            if answer and answer[-1] in stops:
                answer = answer[:-1]
            # of a turn's end in ordinary tokens the first n may be there
            n = max(n for n in range(len(end) + 1) if answer[len(answer) - n :] == end[:n])
            sequences.append(p.ids + answer + end[n:])  # ends as it has learned (B19, B29)
    shortened = [len(ids) > limit for ids in sequences]
    for i, end in enumerate(ends):
        if shortened[i]:
            sequences[i] = sequences[i][: limit - len(end)] + end
    return sequences, shortened


def answer_texts(tokenizer: Any, prompts: list[Prompt], answers: list[list[int]]) -> list[str]:
    """Answers without special tokens, each as its row would hold it.

    After a text an answer keeps the space that it begins with, which some decoders drop where they
    decode it alone. As a message it loses it: that space is the template's (B38).
    """
    both = [p.ids + answer for p, answer in zip(prompts, answers, strict=True)]
    heads = tokenizer.batch_decode([p.ids for p in prompts], skip_special_tokens=True)
    wholes = tokenizer.batch_decode(both, skip_special_tokens=True)
    texts = []
    for p, head, whole in zip(prompts, heads, wholes, strict=True):
        text = whole[len(os.path.commonprefix([head, whole])) :]
        prompt = p.row["prompt"]
        goes_on = isinstance(prompt, str) or prompt[-1]["role"] == "assistant"
        texts.append(text if goes_on else text.removeprefix(" "))
    return texts


def common_end(a: Any, b: Any) -> Any:
    """The longest end that two texts or lists share."""
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]


def show_example(tokenizer: Any, row: Row, *parts: list[int]) -> None:
    """Print the first example as the model sees it; say where a chat template is not applied."""
    texts = " -> ".join(repr(tokenizer.decode(ids)) for ids in parts)
    utils.say(f"first example: {texts}")
    first = next(row[name] for name in CHATS if row.get(name))
    if tokenizer.chat_template and not isinstance(first, list):
        utils.say("the data are texts: the tokenizer's chat template is not applied")


def pad(
    sequences: list[list[int]], pad_id: int, side: str, device: torch.device, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Pad token ids to a rectangle at least `width` wide: (ids [B, T], mask [B, T]).

    The mask is 1 on real tokens. It comes from the lengths, never from comparing ids with
    `pad_id`: pad may equal EOS (D3, B4, B20, B21).
    """
    lengths = torch.tensor([len(s) for s in sequences])
    real = torch.arange(max(width, int(lengths.max()))) < lengths[:, None]
    if side == "left":
        real = real.flip(1)
    ids = torch.full(real.shape, pad_id)
    ids[real] = torch.tensor([*itertools.chain(*sequences)], dtype=ids.dtype)
    return ids.to(device), real.long().to(device)
