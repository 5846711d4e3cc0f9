"""Rows of any layout -> checked rows -> token ids -> batches.

In: a data set's name and split, a tokenizer. Out: token ids of prompts and completions, their order
in training, and rectangles of them with masks. Wrong rows stop a stage with file and line number.

B sequences, T tokens. `B19` in comments points to docs/details.md.
"""

import ast
import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import utils
from utils import stop

Formats = list[tuple[str, ...]]
SFT_FORMATS = [("prompt", "completion"), ("messages",), ("text",)]
PROMPT_FORMATS = [("prompt",)]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
EVALUATION_SPLITS = ("validation", "test", "val", "dev", "valid")
MATTERS = {"prompt", "instruction", "input", "question", "query", "system", "context", "history"}
MATTERS |= {"messages", "conversations", "label"}


class Data(NamedTuple):
    """Rows of a split, and for each the place to name in an error: `data/x/train.jsonl:17`."""

    rows: list[dict[str, Any]]
    places: list[str]


# ---- reading the rows


def load_splits(args: Any, formats: Formats) -> tuple[Data, Data]:
    """Training and evaluation rows of a stage's flags, as in `load_data`."""
    splits = (args.train_split, args.eval_split)
    train, held_out = (load_data(args.dataset, x, formats, args.columns) for x in splits)
    known = {repr(row) for row in train.rows}
    if same := sum(repr(row) in known for row in held_out.rows):
        what = f"{same} of {len(held_out.rows)} evaluation rows"
        utils.say(f"{args.dataset}: {what} are training rows too")
    return train, held_out


def load_data(dataset: str, split: str, formats: Formats, names: list[str] | None = None) -> Data:
    """Read a split; stop unless each row has the columns of the first of `formats` that fits.

    `names` are those of --columns: `prompt=question` reads `question` as `prompt`, `system=` leaves
    `system` out. Stops where a column that matters would be ignored (B26), but for PPO, which
    passes it to reward functions.
    """
    data = read_rows(dataset, split)
    found = [*dict.fromkeys(name for row in data.rows for name in row)]
    pairs = [name.partition("=") for name in names or []]
    for column, is_pair, source in pairs:
        if not (column and is_pair) or (source and source not in found):
            what = f"{column}{is_pair}{source}: {dataset} has {','.join(found)}"
            stop(f"--columns: {what}; pass prompt=question")
    for row in data.rows:
        old = dict(row)
        for column, _, _ in pairs:
            row.pop(column, None)
        row |= {column: old.get(source) for column, _, source in pairs if source}
        known_layout(row, formats)
    found = [*dict.fromkeys(name for row in data.rows for name in row)]
    settled = {name for pair in pairs for name in pair}
    is_kto = formats is SFT_FORMATS and {"prompt", "completion", "label"} <= {*found}
    if is_kto and any(isinstance(row.get("label"), bool) for row in data.rows):
        good = [i for i, row in enumerate(data.rows) if row.get("label")]
        utils.say(f"{dataset} ({split}): {len(good)} of {len(data.rows)} are labelled true")
        data = Data([data.rows[i] for i in good], [data.places[i] for i in good])
        settled.add("label")
    if not data.rows:
        stop(f"{dataset} ({split}): holds no rows; pass another")
    columns = next((columns for columns in formats if {*columns} <= {*data.rows[0]}), None)
    if columns is None:
        wanted = " or ".join(",".join(columns) for columns in formats)
        stop(f"{data.places[0]}: has {','.join(found)}; rename by --columns to {wanted}")
    matters = MATTERS - {"messages"} if "prompt" in columns else MATTERS
    ignored = [name for name in found if name not in {*columns, *settled}]
    if formats is not PROMPT_FORMATS and (lost := [name for name in ignored if name in matters]):
        what = f"{','.join(columns)} would be read, {','.join(lost)} ignored"
        stop(f"{data.places[0]}: {what}; name it by --columns, as {lost[0]}= to leave it out")
    read, left = ",".join(columns), ",".join(ignored) or "none"
    utils.say(f"{dataset} ({split}): reads {read}; leaves {left}")
    for row, place in zip(data.rows, data.places, strict=True):
        for column in columns:
            check_field(row.get(column), column, f"{place}: {column}")
        if "chosen" in columns and row["chosen"] == row["rejected"]:
            stop(f"{place}: chosen and rejected are equal; drop the row")
        if "chosen" in columns and type(row["chosen"]) is not type(row["rejected"]):
            stop(f"{place}: of chosen and rejected one is a text, the other a chat; fix the row")
    return data


def known_layout(row: dict[str, Any], formats: Formats) -> None:
    """Give a row of a known layout our columns, in place.

    Chats written as text (B33), ShareGPT's `conversations`, `instruction` and `input` (Alpaca,
    LLaMA-Factory), `system` and `question` (Orca), a prompt that is the answers' head too (B34).
    """
    learns_answers = formats is SFT_FORMATS
    for column in ("prompt", "completion", "messages", "chosen", "rejected", "conversations"):
        if isinstance(text := row.get(column), str) and re.match(r"\s*\[\s*\{", text):
            row[column] = parsed_chat(text)
    turns = row.get("conversations")
    if isinstance(turns, list) and all(
        isinstance(t, dict) and {"from", "value"} <= {*t} for t in turns
    ):
        del row["conversations"]
        row["messages"] = [
            {"role": SHAREGPT_ROLES.get(str(t["from"]), t["from"]), "content": t["value"]}
            for t in turns
        ]
    if "prompt" not in row:
        names = ()
        if "instruction" in row and ("chosen" in row or "output" in row):
            names = ("instruction", "input")
        elif "question" in row and "chosen" in row:
            names = ("system", "question")
        if names and all(isinstance(row.get(name), str | None) for name in names):
            parts = [row.pop(name, None) for name in names]
            row["prompt"] = "\n\n".join([*filter(None, parts), ""])
            if learns_answers and "output" in row:
                row["completion"] = row.pop("output")
    chosen, rejected, prompt = (row.get(name) for name in ("chosen", "rejected", "prompt"))
    if learns_answers and prompt and "completion" not in row:
        if isinstance(row.get("messages"), list) and same_chat_head(prompt, row["messages"]):
            del row["prompt"]
    if formats is not PROMPT_FORMATS and prompt and type(chosen) is type(rejected) is list:
        n = same_chat_head(prompt, chosen)
        if n and chosen[:n] == rejected[:n]:
            row |= {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def same_chat_head(prompt: Any, chat: list[Any]) -> int:
    """How many messages at a chat's head are the prompt, text or chat; 0 if it is elsewhere."""
    if isinstance(prompt, list):
        return len(prompt) if len(prompt) < len(chat) and chat[: len(prompt)] == prompt else 0
    for n, message in enumerate(chat[:-1], 1):
        if isinstance(message, dict) and message.get("role") == "user":
            text = message.get("content")
            return n if isinstance(text, str) and text.strip() == str(prompt).strip() else 0
    return 0


def parsed_chat(text: str) -> Any:
    """The chat that a text holds, in JSON or as Python writes it; else the text (B33)."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except Exception:
            continue
        is_chat = isinstance(value, list) and all(isinstance(m, dict) for m in value)
        if is_chat and all("role" in m or "from" in m for m in value):
            return value
    return text


def read_rows(dataset: str, split: str) -> Data:
    """The rows of a split with their places, unchecked.

    Local .jsonl files are read here, so that an error can name the line; others by `datasets`.
    """
    path = Path(dataset).expanduser()
    if path.suffix == ".jsonl":
        return choose(["train"], lambda name: read_jsonl(path), split, dataset)
    if path.is_dir() and (files := sorted(path.glob("*.jsonl"))):
        of_split: dict[str, list[Path]] = {}
        for file in files:  # shards: train-00000-of-00002.jsonl
            of_split.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem), []).append(file)

        def read(name: str) -> Data:
            parts = [read_jsonl(file) for file in of_split[name]]
            return Data([r for p in parts for r in p.rows], [x for p in parts for x in p.places])

        return choose(list(of_split), read, split, dataset)
    kinds = (".json", ".csv", ".parquet")
    is_path = path.suffix in kinds or dataset.startswith((".", "/", "~")) or len(path.parts) > 2
    if is_path and not path.exists():
        stop(f"{dataset}: no such file or folder; check --dataset")
    if path.is_file() and path.suffix not in kinds:
        stop(f"{dataset}: is no file of a known kind; pass .jsonl, {', '.join(kinds)}")
    import datasets  # takes seconds; .jsonl does without

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, it raises too
    name = str(path.resolve()) if path.exists() else dataset  # it cannot read `link/..`

    def with_places(table: Any, place: str) -> Data:
        rows = table.to_list()
        return Data(rows, [f"{place} (row {i + 1})" for i in range(len(rows))])

    tables: Any = None
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            tables = datasets.load_from_disk(name)  # its cache files are not rows (B25)
        elif path.is_file():
            tables = datasets.load_dataset(path.suffix[1:], data_files=name, split="train")
        elif split.partition("[")[0] == "validation":
            there = datasets.get_dataset_split_names(name)
            other = next((other for other in EVALUATION_SPLITS if other in there), "validation")
            split = split.replace("validation", other)
        if isinstance(tables, datasets.DatasetDict):
            read = lambda name: with_places(tables[name], f"{dataset}/{name}")  # noqa: E731
            return choose(list(tables), read, split, dataset)
        if tables is not None:
            return choose(["train"], lambda name: with_places(tables, dataset), split, dataset)
        return with_places(datasets.load_dataset(name, split=split), f"{dataset}/{split}")
    except Exception as error:
        why = utils.first_line(error.__cause__ or error)  # "an error occurred" says less
        stop(f"{dataset} ({split}): cannot be read ({why}); check id or path, and split")


def choose(names: list[str], read: Callable[[str], Data], split: str, dataset: str) -> Data:
    """The rows that `split` names, as `train`, `test[:100]` or `train[10%:]`, of splits `names`.

    `validation` also takes its other usual names; without one it is the last twentieth of `train`
    (500 rows at most), and `train` what comes before. A slice counts all rows (B24).
    """
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        stop(f"{dataset}: {split!r} names no split; pass one as train[:100]")
    name, *ends = match.groups()
    held_out = next((other for other in EVALUATION_SPLITS if other in names), None)
    if name == "validation":
        name = held_out or name
    if name in names:
        data = read(name)
    elif name == "validation" and "train" in names:
        data = read("train")
    else:
        stop(f"{dataset}: has no split {name}; pass {', '.join(names)}")
    if held_out is None and (name == "validation" or (name == "train" and split == "train")):
        data = hold_out(data, name)
    total = len(data.rows)
    counts = [end and int(end.rstrip("%")) * (total / 100 if "%" in end else 1) for end in ends]
    first, last = (n if n is None else max(0, round(n) + total * (n < 0)) for n in counts)
    return Data(data.rows[first:last], data.places[first:last])


def read_jsonl(path: Path) -> Data:
    """One JSON object a line, empty lines skipped."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        why = utils.first_line(error)
        stop(f"{path}: cannot be read ({why}); check --dataset and splits")
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            stop(f"{place}: is not UTF-8; save it as UTF-8")
        except (ValueError, RecursionError) as error:  # or a number of 5,000 digits
            stop(f"{place}: is not JSON ({utils.first_line(error)}); write one JSON object a line")
        if not isinstance(row, dict):
            stop(f'{place}: is not a JSON object; write one a line, as {{"prompt": …}}')
        rows.append(row)
        places.append(place)
    return Data(rows, places)


def hold_out(data: Data, split: str) -> Data:
    """`train` is all but the last twentieth, any other name that twentieth."""
    count = len(data.rows)
    n = count - min(500, max(1, count // 20)) if count > 1 else 0
    part = slice(None, n or None) if split == "train" else slice(n, None)
    return Data(data.rows[part], data.places[part])


# ---- checking them


def check_field(value: Any, column: str, where: str) -> None:
    """Stop unless a field is a text or a list of chat messages, and not empty."""
    if isinstance(value, list):
        check_chat(value, column, where)
    elif not isinstance(value, str) or column == "messages":
        kind = "missing" if value is None else f"of type {type(value).__name__}"
        stop(f"{where}: is {kind}; make it a string or a list of chat messages")
    elif not value.strip():
        stop(f"{where}: is empty; fill it in or drop the row")
    for text in [value] if isinstance(value, str) else [message["content"] for message in value]:
        if re.search("[\ud800-\udfff]", text):
            stop(f"{where}: holds half a surrogate pair; fix its encoding")


def check_chat(messages: list[Any], column: str, where: str) -> None:
    """Stop unless messages have known roles and texts; a prompt's last one is to be answered, any
    other chat's is the assistant's."""
    if not messages:
        stop(f"{where}: is an empty chat; drop the row")
    for message in messages:
        fields = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else []
        if [type(field) for field in fields] != [str, str]:
            what = f"{message!r:.60} is not a chat message"
            stop(f'{where}: {what}; write {{"role": …, "content": …}} with strings')
        if message["role"] not in ROLES:
            stop(f"{where}: has the role {message['role']!r:.30}; pass one of {', '.join(ROLES)}")
    last = messages[-1]
    if not last["content"].strip():
        stop(f"{where}: its last message is empty; fill it in or drop the row")
    if column != "prompt":
        if last["role"] != "assistant":
            stop(f"{where}: its last message is not the assistant's; end it with a reply")
    elif last["role"] == "assistant":
        stop(f"{where}: its last message is the assistant's; end it with the user's")


# ---- token ids


def render(tokenizer: Any, prompt: Any, completion: Any, place: str) -> tuple[str, str]:
    """A prompt and its completion (None: there is none) as text, chats by the chat template."""
    if isinstance(prompt, str) and not isinstance(completion, list):
        return prompt, completion or ""
    if tokenizer.chat_template is None:
        stop(f"{place}: is a chat, but the tokenizer has no chat template; use text")
    if isinstance(prompt, str) and prompt:
        stop(f"{place}: the prompt is a text, but its answer is a chat; write both alike")
    messages, answer = prompt or [], completion or []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    template, start = tokenizer.apply_chat_template, ""
    try:
        if messages:
            start = template(messages, tokenize=False, add_generation_prompt=True)
        whole = template([*messages, *answer], tokenize=False) if answer else start
    except Exception as error:
        why = utils.first_line(error)
        stop(f"{place}: does not fit the chat template ({why}); check roles and their order")
    if not whole.startswith(start):
        stop(f"{place}: the chat template rewrites an answered prompt; use text")
    return start, whole[len(start) :]


def demonstrations(data: Data) -> list[tuple[Any, Any]]:
    """Rows of SFT_FORMATS as (prompt, completion); a chat's completion is its last message."""

    def demonstration(row: dict[str, Any]) -> tuple[Any, Any]:
        if "prompt" in row and "completion" in row:
            return row["prompt"], row["completion"]
        if "messages" in row:
            return row["messages"][:-1], row["messages"][-1:]
        return "", row["text"]

    return [demonstration(row) for row in data.rows]


def encode_pairs(
    tokenizer: Any, pairs: list[tuple[Any, Any]], places: list[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of their completions, rendered as in `render`.

    A prompt gets the tokenizer's special tokens (a BOS), unless a chat template has put them in.
    A completion ends with one EOS, added if missing (B19); a completion of None has no ids.
    """
    texts = [render(tokenizer, *pair, place) for pair, place in zip(pairs, places, strict=True)]
    is_chat = [isinstance(p, list) or isinstance(c, list) for p, c in pairs]
    prompts: list[list[int]] = [[] for _ in pairs]
    adds_eos = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # a text's own EOS stays
    bos = [tokenizer.bos_token_id] * (tokenizer.bos_token_id is not None)
    for chat in {*is_chat}:
        rows = [i for i, c in enumerate(is_chat) if c == chat]
        encoded = tokenizer([texts[i][0] for i in rows], add_special_tokens=not chat)["input_ids"]
        for i, ids in zip(rows, encoded, strict=True):
            ids = ids[:-1] if adds_eos and not chat else ids
            prompts[i] = ids[1:] if bos and ids[:2] == bos * 2 else ids  # B30
    eos = tokenizer.eos_token
    answers = [
        c.rstrip() if chat else c for (_, c), chat in zip(texts, is_chat, strict=True)
    ]  # B29
    answers = [c.rstrip().removesuffix(eos) if c.rstrip().endswith(eos) else c for c in answers]
    completions = tokenizer(answers, add_special_tokens=False)["input_ids"]
    for i, (_, completion) in enumerate(pairs):
        if bos and prompts[i][-1:] == bos == completions[i][:1]:
            completions[i] = completions[i][1:]
        completions[i] = [] if completion is None else [*completions[i], tokenizer.eos_token_id]
    return prompts, completions


def encode_demonstrations(
    tokenizer: Any, data: Data, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and completions; what exceeds `max_length` tokens together is cut."""
    prompts, completions = encode_pairs(tokenizer, demonstrations(data), data.places)
    for prompt, place in zip(prompts, data.places, strict=True):
        if len(prompt) >= max_length:
            what = f"its {len(prompt)} tokens leave no room for a completion within {max_length}"
            stop(f"{place}: prompt: {what}; shorten it or allow more tokens")
    return [(p, c[: max_length - len(p)]) for p, c in zip(prompts, completions, strict=True)]


class Prompt(NamedTuple):
    """A prompt to sample responses to: token ids, text, its row and the place to name in errors."""

    ids: list[int]
    text: str
    row: dict[str, Any]
    place: str


def encode_prompts(tokenizer: Any, data: Data, max_tokens: int) -> list[Prompt]:
    """Prompts in token ids; stop if one has no token, or more than `max_tokens`."""
    encoded, _ = encode_pairs(tokenizer, [(row["prompt"], None) for row in data.rows], data.places)
    prompts = []
    for row, place, ids in zip(data.rows, data.places, encoded, strict=True):
        if not ids:
            stop(f"{place}: the prompt has no token that the tokenizer knows; drop the row")
        if len(ids) > max_tokens:
            what = f"{len(ids)} tokens exceed the {max_tokens} that the response leaves"
            stop(f"{place}: the prompt's {what}; shorten it or lower --response-length")
        prompts.append(Prompt(ids, render(tokenizer, row["prompt"], None, place)[0], row, place))
    return prompts


# ---- batches


def data_order(rows: int, epoch: int, seed: int) -> list[int]:
    """The order of the rows in an epoch, the same in every process (D7)."""
    return torch.randperm(rows, generator=utils.generator("cpu", seed, epoch)).tolist()


def batches(
    rows: int, batch_size: int, epochs: int, seed: int, start: int
) -> Iterator[tuple[int, list[int]]]:
    """(step, row indices) of each optimizer batch after step `start`; an epoch's last is short."""
    step = 0
    for epoch in range(epochs):
        order = data_order(rows, epoch, seed)
        for i in range(0, rows, batch_size):
            step += 1
            if step > start:
                yield step, order[i : i + batch_size]


def pad(
    sequences: list[list[int]], pad_id: int, side: str, device: torch.device, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Pad token ids to a rectangle at least `width` wide: (ids [B, T], mask [B, T]).

    The mask is 1 on real tokens. It comes from the lengths, never from comparing ids with
    `pad_id`: pad may equal EOS (D3, B4, B20, B21).
    """
    lengths = torch.tensor([len(s) for s in sequences])
    width = max(width, int(lengths.max()))
    padding = [[pad_id] * (width - len(s)) for s in sequences]
    both = zip(padding, sequences, strict=True)
    rows = [p + s if side == "left" else s + p for p, s in both]
    column = torch.arange(width)
    start = (width - lengths if side == "left" else torch.zeros_like(lengths))[:, None]
    real = (start <= column) & (column < start + lengths[:, None])
    return torch.tensor(rows, device=device), real.long().to(device)
