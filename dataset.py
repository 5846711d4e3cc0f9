"""Rows of any layout -> checked rows -> token ids -> batches.

In: names of data sets and of splits, a tokenizer. Out: token ids, their order in training, and
rectangles of them with masks. What cannot be read stops a stage with file and line number; a row
that cannot be used is left out and counted.

B sequences, T tokens. `B19` in comments points to docs/details.md.
"""

import ast
import contextlib
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import os
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
CHATS = ("prompt", "completion", "messages", "chosen", "rejected", "conversations", "text")
BROKEN_CHAT = (  # a list of objects: its first key is a message's, or a later one names a role
    r"\s*\[\s*\{(\s*['\"](role|content|from|value)\b"
    r"|[^}]*['\"](role|from)['\"]: ['\"](user|human|system|assistant|gpt)\b)"
)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
EVALUATION_SPLITS = ("validation", "test", "val", "dev", "valid", "eval")
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # each also with .gz
LAYOUTS = {  # what columns are known by, and what --columns would say of them
    ("instruction", "output"): {"prompt": "instruction+input", "completion": "output"},  # Alpaca
    ("instruction", "chosen"): {"prompt": "instruction+input"},  # LLaMA-Factory
    ("question", "chosen"): {"prompt": "system+question"},  # Orca
}
MATTERS = {"prompt", "instruction", "input", "question", "query", "system", "system_prompt"}
MATTERS |= {"context", "history", "messages", "conversations", "role", "label", "labels"}
MATTERS |= {"tools", "functions", "images"}


class Row(dict):
    """A row by its columns, and where it stands, for errors: `data/x/train.jsonl:17`."""

    def __init__(self, columns: dict[str, Any], place: str):
        super().__init__(columns)
        self.place = place


class Unusable(Exception):
    """What is wrong with a row; how to fix it."""


def usable(function: Callable, rows: list[Row], *more: list) -> list[Any]:
    """function(row, *more) of each row, but for those for which it raises Unusable.

    These are counted and the first is named; more than a tenth of them stop the stage.
    """
    kept, left = [], []
    for row, *others in zip(rows, *more, strict=True):
        try:
            kept.append(function(row, *others))
        except Unusable as error:
            left.append(f"{row.place}: {error}")
    if left:
        what, _, fix = left[0].rpartition("; ")
        count = f"{len(left)} of {len(rows)} rows"
        if len(left) > len(rows) / 10:
            stop(f"{what} ({count} cannot be used); {fix}")
        utils.say(f"{count} are left out, the first {what}")
    return kept


# ---- reading the rows


def load_splits(args: Any, formats: Formats) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows of a stage's flags, its data sets joined.

    With --dataset-weights as many training rows as these shares allow, none twice.
    """
    train, held_out = (
        [load_data(name, split, formats, args) for name in args.dataset]
        for split in (args.train_split, args.eval_split)
    )
    if weights := args.dataset_weights:
        if len(weights) != len(train) or not all(0 < w < float("inf") for w in weights):
            stop(f"--dataset-weights: {weights} for {len(train)} data sets; pass one above 0 each")
        size = min(len(rows) / w for rows, w in zip(train, weights, strict=True))
        for i, rows in enumerate(train):
            some = data_order(len(rows), 0, args.seed)[: round(size * weights[i])]
            train[i] = [rows[j] for j in sorted(some)]
            utils.say(f"{args.dataset[i]}: {len(some)} of {len(rows)} training rows are taken")
    train = sum(train, [])
    # of the held-out rows any first part has of each data set as large a part (B39)
    parts = [(i / len(rows), row) for rows in held_out for i, row in enumerate(rows)]
    held_out = [row for _, row in sorted(parts, key=lambda part: part[0])]
    if formats is PROMPT_FORMATS:  # reward functions get None where a row lacks a column
        columns = columns_of(train + held_out)
        for row in train + held_out:
            for name in columns:
                row.setdefault(name)
    read = sorted({name for columns in formats for name in columns})  # an id makes no other row

    def key(row: Row) -> str:
        return repr([row.get(name) for name in read])

    known = {key(row) for row in train}
    if same := sum(key(row) in known for row in held_out):
        what = f"{same} of {len(held_out)} evaluation rows"
        utils.say(f"{' '.join(args.dataset)}: {what} are training rows too")
    return train, held_out


def load_data(dataset: str, split: str, formats: Formats, args: Any = None) -> list[Row]:
    """Rows of a split, with the columns of the first of `formats` that fits the first row.

    Of a stage's flags `args`, --columns: `prompt=question` reads `question` as `prompt`,
    `prompt=a+b` both, each with an empty line after it; `system=` leaves `system` out. Stops where
    a column that matters would be ignored (B26), but for PPO, which gives it to reward functions.
    """
    where = f"{dataset} ({split})"
    try:
        rows = read_split(dataset, split, args)
    except Exception as error:
        why = utils.first_line(error.__cause__ or error)  # "an error occurred" says less
        stop(f"{where}: cannot be read ({why}); check id or path, and split")
    pairs = renamings(dataset, rows, getattr(args, "columns", ()))
    for row in rows:
        rename(row, pairs)
        known_layout(row, formats)
    found = columns_of(rows)
    settled = {name for column, sources in pairs for name in (sources or column).split("+")}
    labels = [row.get("label") for row in rows]
    if formats is SFT_FORMATS and "completion" in found and bool in map(type, labels):  # KTO
        good = [row for row in rows if row.get("label") is True]
        utils.say(f"{where}: {len(good)} of {len(rows)} are labelled true")
        rows = good
        settled.add("label")
    if not rows:
        stop(f"{where}: holds no rows; pass another")
    columns = next((columns for columns in formats if {*columns} <= {*rows[0]}), None)
    if columns is None:
        wanted = " or ".join(",".join(columns) for columns in formats)
        stop(f"{rows[0].place}: has {','.join(found)}; rename by --columns to {wanted}")
    ignored = [name for name in found if name not in {*columns, *settled}]
    if formats is not PROMPT_FORMATS:
        check_ignored(rows, columns, ignored, {column for column, sources in pairs if sources})
    read, left = ",".join(columns), ",".join(ignored) or "none"
    utils.say(f"{where}: reads {read}; leaves {left}")
    answers = [name for name in columns if name in ("completion", "chosen", "rejected")]
    count = sum(begun(row, answers) == answers for row in rows) if answers else 0
    doubled = 2 * count > len(rows)  # in a few it is by chance
    if doubled:
        what = f"{count} of {len(rows)} rows have the prompt in their answers too"
        utils.say(f"{where}: {what}, which are read without it")

    def checked(row: Row) -> Row:
        names = begun(row, answers) if doubled else []
        if names and names != answers:
            raise Unusable("one answer begins with the prompt, the other does not; fix the row")
        for name in names:
            row[name] = row[name].removeprefix(row["prompt"])
        for column in columns:
            check_field(row.get(column), column)
        return row

    return usable(checked, rows)


def renamings(dataset: str, rows: list[Row], flags: tuple[str, ...]) -> list[tuple[str, str]]:
    """What --columns says, as (column, its sources); without it that of a known layout, if any."""
    found = columns_of(rows)
    pairs = [pair.partition("=")[::2] for pair in flags]
    for pair, (column, sources) in zip(flags, pairs, strict=True):
        if pair.find("=") < 1 or not {*filter(None, sources.split("+"))} <= {*found}:
            what = f"{pair}: {dataset} has {','.join(found)}"
            stop(f"--columns: {what}; pass prompt=question")
        if [name for name, _ in pairs].count(column) > 1:
            stop(f"--columns: names {column} twice; join by {column}=a+b")
    if pairs or "prompt" in found:
        return pairs
    for known, layout in LAYOUTS.items():
        names = [*layout, *"+".join(layout.values()).split("+")]
        texts = (row.get(name) for row in rows for name in names)
        if {*known} <= {*found} and all(isinstance(text, str | None) for text in texts):
            pairs = [*layout.items()]
    return pairs


def check_ignored(
    rows: list[Row], columns: tuple[str, ...], ignored: list[str], named: set[str]
) -> None:
    """Stop where a column that matters or is `named` by --columns would be ignored (B26)."""
    matters = (MATTERS - {"messages"} if "prompt" in columns else MATTERS) | named
    fitting = [row for row in rows if all(row.get(column) for column in columns)]
    empty = (None, "", [], {})  # False and 0 are not: a label may be
    filled = {name for row in fitting for name in ignored if row.get(name) not in empty}
    lost = [name for name in ignored if name in matters & filled]
    if lost:
        what = f"{','.join(columns)} would be read, {','.join(lost)} ignored"
        stop(f"{rows[0].place}: {what}; name it by --columns, as {lost[0]}= to leave it out")


def begun(row: Row, answers: list[str]) -> list[str]:
    """Those of a row's answers that are texts, begin with its prompt and go on (B34)."""
    prompt = row.get("prompt")
    if not prompt or not isinstance(prompt, str):
        return []
    texts = [name for name in answers if isinstance(row.get(name), str)]
    return [name for name in texts if row[name].startswith(prompt) and row[name] != prompt]


def columns_of(rows: list[Row]) -> list[str]:
    """Names of the columns that any row has."""
    return [*dict.fromkeys(name for row in rows for name in row)]


def rename(row: Row, pairs: list) -> None:
    """Do what --columns says, in place."""
    new = {}
    for column, sources in pairs:
        new[column] = row.get(sources)
        if "+" in sources:  # of `question+` the second is none, not a column without a name
            values = [row.get(name) for name in sources.split("+") if name]
            is_text = all(isinstance(x, str | None) for x in values)
            new[column] = "".join(f"{x}\n\n" for x in values if x) if is_text else values
    for column, sources in pairs:
        row.pop(column, None)
        if sources:
            row[column] = new[column]


def known_layout(row: Row, formats: Formats) -> None:
    """Give a row's chats our form, in place: kept as text (B33), ShareGPT, LLaMA-Factory.

    For SFT, chats end with an answer, and a prompt that is also their head (B34) goes.
    """
    for column in {*CHATS} & {*row}:
        value = row[column]
        if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
            value = parsed_chat(value)
        if isinstance(value, dict) and {"role", "from"} & {*value}:
            value = [value]
        row[column] = [message_of(m) for m in value] if isinstance(value, list) else value
    turns = row.get("conversations")
    column = "prompt" if "chosen" in row else "messages"
    if isinstance(turns, list) and all(said(turn)[0] for turn in turns) and not row.get(column):
        row[column] = row.pop("conversations")
    messages = row.get("messages")
    if formats is SFT_FORMATS and isinstance(messages, list):
        while messages and said(messages[-1])[0] == "user":
            messages.pop()
        if "completion" not in row and same_chat_head(row.get("prompt"), messages):
            del row["prompt"]


def message_of(message: Any) -> Any:
    """A chat message as `role` and `content`, this a text if it was a list of texts."""
    if not isinstance(message, dict):
        return message
    if {"from", "value"} <= {*message}:
        message = dict(message)
        role, content = message.pop("from"), message.pop("value")
        return message | {"role": SHAREGPT_ROLES.get(str(role), role), "content": content}
    parts = message.get("content")
    if isinstance(parts, list) and all(
        isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts
    ):
        return message | {"content": "".join(part["text"] for part in parts)}
    return message


def said(message: Any) -> tuple[Any, Any]:
    """A chat message's role and content; of what is no message None."""
    if not isinstance(message, dict):
        return None, None
    return message.get("role"), message.get("content")


def same_chat_head(prompt: Any, chat: list[Any]) -> int:
    """How many messages at a chat's head are the prompt, text or chat; 0 if it is elsewhere."""
    texts = [said(message) for message in chat]
    if isinstance(prompt, list):
        n = len(prompt)
        is_head = n < len(chat) and texts[:n] == [said(message) for message in prompt]
    else:
        roles = [role for role, _ in texts[:-1]]
        n = roles.index("user") + 1 if "user" in roles else 0
        is_head = n and prompt and str(texts[n - 1][1]).strip() == str(prompt).strip()
    return n if is_head else 0


def parsed_chat(text: str) -> Any:
    """The chat that a text holds, in JSON or as Python or numpy writes it; else the text (B33)."""
    # numpy writes no comma
    spaced = re.sub(r"\}\s+(?=\{'\w+': )", "}, ", text)
    for parse, source in ((json.loads, text), (ast.literal_eval, text), (ast.literal_eval, spaced)):
        with contextlib.suppress(Exception):
            value = parse(source)
            if all({"role", "from"} & message.keys() for message in value):
                return value
    return text


def read_split(dataset: str, split: str, args: Any) -> list[Row]:
    """The rows of a split as `train`, `test[:100]` or `train[10%:]`, unchecked.

    `validation` also takes its other usual names. A data set without an evaluation split has the
    last twentieth of `train` (500 rows at most) as one, and `train` is what comes before. A slice
    counts all rows (B24).
    """
    names, read = open_dataset(dataset, getattr(args, "revision", None))
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    name, first, last = match.groups() if match else (split, None, None)
    usual = next((other for other in EVALUATION_SPLITS if other in names), None)
    source = usual or "train" if name == "validation" else name
    if source not in names:
        stop(f"{dataset}: has no split {split}; pass {', '.join(names)}, a part as train[:100]")
    table = read(source)
    some = range(len(table))
    if not usual:
        cut = len(table) - min(500, max(1, len(table) // 20))
        held_out = getattr(args, "eval_split", "validation").partition("[")[0]
        if name == "validation":
            some = some[cut:]
        elif split == "train" and held_out == "validation":
            some = some[: cut or 1]
    n = len(some)

    def position(end: str | None) -> int | None:
        """Where a slice's end, a count or a percentage, is among n rows."""
        if end is None:
            return None
        count = int(end.rstrip("%")) * (n / 100 if "%" in end else 1)
        return max(0, round(count) + n) if count < 0 else round(count)

    some = some[position(first) : position(last)]
    if isinstance(table, list):
        return [table[i] for i in some]
    rows = table.select(some).to_list()
    return [Row(x, f"{dataset}/{source} (row {i + 1})") for i, x in zip(some, rows, strict=True)]


def open_dataset(dataset: str, revision: str | None) -> tuple[list[str], Callable[[str], Any]]:
    """Names of a data set's splits, and what reads one: files here, others by `datasets`."""
    path = Path(dataset).expanduser()
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if not is_saved and (files := files_of(path)):
        return [*files], lambda split: [row for file in files[split] for row in read_file(file)]
    looks_local = dataset.startswith((".", "/", "~")) or len(path.parts) > 2 or kind_of(path)
    if path.is_file() or (looks_local and not path.exists()):
        what = "is of no known kind" if path.exists() else "no such file or folder"
        stop(f"{dataset}: {what}; pass a folder or one of {', '.join(KINDS)}")
    import datasets  # takes seconds; files do without

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log, it raises too
    name, _, config = dataset.partition(":")
    if path.exists():
        name, config = str(path.resolve()), ""  # it cannot read `link/..`
    if is_saved:  # its cache files are not rows (B25)
        saved = datasets.load_from_disk(name)
        tables = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return [*tables], tables.__getitem__
    names = datasets.get_dataset_split_names(name, config or None, revision=revision)
    load = functools.partial(datasets.load_dataset, name, config or None, revision=revision)
    return names, lambda split: load(split=split)


def kind_of(path: Path) -> str:
    """Which of KINDS a file is by its name; "" for none."""
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), "")


def files_of(path: Path) -> dict[str, list[Path]]:
    """Files by split: a folder's by their names, a single one or those of a pattern as `train`.

    `train-00000-of-00002.jsonl` is a part of `train`; stops where parts are missing or doubled.
    """
    if not path.is_dir():
        found = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path))))
        return {"train": files} if (files := [*filter(kind_of, found)]) else {}
    splits: dict[str, list[Path]] = {}
    parts: dict[str, set[tuple[str, int]]] = {}
    for file in filter(kind_of, sorted(path.iterdir())):
        stem = file.name[: file.name.lower().rindex(kind_of(file))]
        if not stem.startswith("dataset_info"):  # of `datasets`
            split, part, total = re.fullmatch(r"(.*?)(?:-(\d+)-of-(\d+))?", stem).groups("1")
            splits.setdefault(split, []).append(file)
            parts.setdefault(split, set()).add((part, int(total)))
    for split, files in splits.items():
        if len(parts[split]) < len(files) or {total for _, total in parts[split]} != {len(files)}:
            stop(f"{path}: holds {', '.join(f.name for f in files)}; leave one copy, whole")
    return splits


def read_file(path: Path) -> list[Row]:
    """The rows of a file."""
    kind, raw = kind_of(path), path.read_bytes()
    if path.name.lower().endswith(".gz"):
        raw = gzip.decompress(raw)
    if kind == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
        return [Row(row, f"{path} (row {i})") for i, row in enumerate(table, 1)]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)  # without the BOM
        stop(f"{path}:{line}: is not UTF-8; save it as UTF-8")
    numbered = []  # rows and their lines
    if kind in (".csv", ".tsv"):  # every field is a text, `NA` too
        csv.field_size_limit(2**31 - 1)
        delimiter = "," if kind == ".csv" else "\t"
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            numbered = [(table.line_num, row) for row in table]
        except csv.Error as error:
            line = table.reader.line_num
            stop(f"{path}:{line}: {utils.first_line(error)}; quote as RFC 4180 says")
        names = table.fieldnames or []
        if len({*names}) < len(names):
            stop(f"{path}:1: names a column twice; rename one")
    elif kind == ".json" and text.lstrip().startswith("["):
        numbered = [*enumerate(json.loads(text), 1)]
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except (ValueError, RecursionError) as error:  # or a number of 5,000 digits
                    what = f"is not JSON ({utils.first_line(error)})"
                    stop(f"{path}:{number}: {what}; write one JSON object a line")
    for number, row in numbered:
        if not isinstance(row, dict):
            stop(f'{path}:{number}: is not a JSON object; write one a line, as {{"prompt": …}}')
        if None in row:
            stop(f"{path}:{number}: has more fields than line 1; quote what holds a delimiter")
    return [Row(row, f"{path}:{number}") for number, row in numbered]


def check_field(value: Any, column: str) -> None:
    """Raise Unusable unless a field is a text or a list of chat messages, and not empty."""
    wanted = {"messages": list, "text": str}.get(column, str | list)
    if not isinstance(value, wanted):
        kind = "missing" if value is None else f"of type {type(value).__name__}"
        raise Unusable(f"{column}: is {kind}; make it a string, or a list of chat messages")
    if isinstance(value, str) and re.match(BROKEN_CHAT, value):
        raise Unusable(f"{column}: is a chat that cannot be parsed; write it as JSON")
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    role, text = "", ""
    for message in messages:
        role, text = said(message)
        if not text and role == "assistant" and message.get("tool_calls"):
            text = "a call"
        if not isinstance(text, str) or role not in ROLES:
            what = f"{message!r:.60} is no chat message of the roles {', '.join(ROLES)}"
            raise Unusable(f'{column}: {what}; write {{"role": …, "content": …}} with strings')
        if "\0" in text or (not text.isascii() and re.search("[\ud800-\udfff]", text)):
            raise Unusable(f"{column}: holds a null or half a surrogate pair; fix its encoding")
    if not text.strip():
        raise Unusable(f"{column}: is empty; fill it in or drop the row")
    if isinstance(value, list) and column != "prompt" and role != "assistant":
        raise Unusable(f"{column}: its last message is not the assistant's; end it with a reply")
    if column == "completion" and any(said(m)[0] != "assistant" for m in messages[:-1]):
        raise Unusable(f"{column}: has turns of others, which would be learned; write messages")


# ---- token ids


class Rendered(NamedTuple):
    """A row as text in pieces, by turns given and learned."""

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
    last_role = said(messages[-1])[0] if messages else None
    is_begun = last_role == "assistant" and not isinstance(answer, list)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    try:
        start = ""
        if messages:
            how = {"add_generation_prompt": not is_begun, "continue_final_message": is_begun}
            start = template(messages, **how)
        elif said(answer[0])[0] == "assistant":  # what comes before it is not said by it
            other = [[{"role": "assistant", "content": x}] for x in "ab"]
            start = os.path.commonprefix([template(chat) for chat in other])
        if answer is None:
            check_all_said(functools.partial(template, **how), start, messages, [])
            return Rendered([start], True)
        if is_begun:
            begun = messages.pop()["content"]
            answer = [answer[0] | {"content": begun + answer[0]["content"]}]
        whole = template([*messages, *answer])
        check_all_said(template, whole, messages, answer)
        # a null, which no message holds, for each mark; in a block, which takes as many line breaks
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
            raise Unusable(f"the chat template leaves out {words!r:.60}; mend it or use text")
        for name in ["tool_calls", "function_call"] + ["reasoning_content"] * is_new:
            if message.get(name):
                less = {k: x for k, x in message.items() if k != name} | {"content": words}
                without = None
                with contextlib.suppress(Exception):  # it misses the call, so it looks at it
                    without = template([*chat[:i], less, *chat[i + 1 :]])
                if without == text:
                    raise Unusable(f"the chat template leaves out {name}; mend it or use text")


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

    They are the whole text's, also where a piece begins (B36); but a prompt's are the same with an
    answer as without, which is how it is sampled from. A text begins with what the tokenizer puts
    there (a BOS), a chat with what its template does. A learned end is one EOS (B19).
    """

    def tokens(text: Any) -> Any:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def tokens_after(before: str, piece: str) -> list[int]:
        # where a token reaches across the border, the piece by itself, but after a line break:
        # there no tokenizer puts a space before it
        for head in (before, "\n", ""):
            text, n = head + piece, len(ids_of[head])
            ids = ids_of[text] if text in ids_of else tokens(text)
            if ids[:n] == ids_of[head]:
                break
        return ids[n:]

    eos, letter, start = tokenizer.eos_token_id, tokens("a"), tokenizer("a")["input_ids"]
    if letter:
        start = start[: start.index(letter[0])]
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
    encoded = encode(tokenizer, [text for _, text in pairs])
    return usable(cut, [row for row, _ in pairs], encoded)


class Prompt(NamedTuple):
    """A prompt to sample responses to."""

    ids: list[int]
    text: str
    row: Row
    ends: list[list[int]]  # what ends an answer to it, in each reward model's tokens


def encode_prompts(
    tokenizer: Any, rows: list[Row], max_tokens: int, *judges: tuple[Any, int]
) -> list[Prompt]:
    """Prompts of 1 to `max_tokens` tokens.

    `judges`, each a reward model's tokenizer and its context, have room for an answer of one token
    and what ends it (B31).
    """

    def rendered(row: Row) -> tuple[Any, ...]:
        text = render(tokenizer, row["prompt"])
        return row, text, *(answered(judge, row, text.pieces[0], "a") for judge, _ in judges)

    def fit(row: Row, text: Rendered, ids: list[int], *judged: list[int]) -> Prompt:
        if not ids:
            raise Unusable("prompt: has no token that the tokenizer knows; drop the row")
        limits = [limit for _, limit in judges]
        if len(ids) > max_tokens or any(len(x) > y for x, y in zip(judged, limits, strict=True)):
            what = f"its {len(ids)} tokens leave the response no room in a model's context"
            raise Unusable(f"prompt: {what}; shorten it or lower --response-length")
        return Prompt(ids, text.pieces[0], row, ends[text.is_chat])

    rows, texts, *asked = zip(*usable(rendered, rows), strict=True)
    judged: list[list[list[int]]] = []
    ends: dict[bool, list[list[int]]] = {False: [], True: []}  # of texts and of chats
    one_of = {text.is_chat: i for i, text in enumerate(texts)}
    for (judge, _), with_a in zip(judges, asked, strict=True):
        judged.append(encode_ids(judge, with_a))
        for is_chat, i in one_of.items():  # its end is what answers "a" and "b" have in common
            with_b = answered(judge, rows[i], texts[i].pieces[0], "b")
            ends[is_chat].append(common_end(judged[-1][i], encode_ids(judge, [with_b])[0]))
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


def as_judged(
    judge: tuple[Any, int], number: int, prompts: list[Prompt], answers: list[Any]
) -> tuple[list[list[int]], list[bool]]:
    """Prompts and answers as a reward model reads them, and which are cut to its context (B31).

    `judge` is its tokenizer and its context, and the `number` of `encode_prompts`' judges. Answers
    are texts or, where it shares the policy's tokenizer, token ids.
    """
    (tokenizer, limit), ends = judge, [p.ends[number] for p in prompts]
    if isinstance(answers[0], str):  # by its own tokenizer and template (B5)
        both = zip(prompts, answers, strict=True)
        texts = [answered(tokenizer, p.row, p.text, answer) for p, answer in both]
        sequences = encode_ids(tokenizer, texts)
    else:
        sequences = []
        for p, answer, end in zip(prompts, answers, ends, strict=True):
            while answer and answer[-1] in end:
                answer = answer[:-1]
            sequences.append(p.ids + answer + end)  # ends as it has learned (B19, B29)
    shortened = [len(ids) > limit for ids in sequences]
    for i, end in enumerate(ends):
        if shortened[i]:
            sequences[i] = sequences[i][: limit - len(end)] + end
    return sequences, shortened


def answer_texts(tokenizer: Any, prompts: list[Prompt], answers: list[list[int]]) -> list[str]:
    """Answers without special tokens, each as its row would hold it.

    After a text with the space that it begins with, which some decoders drop from what they get
    alone; as a message without: that one is the template's (B38).
    """
    both = [p.ids + answer for p, answer in zip(prompts, answers, strict=True)]
    heads = tokenizer.batch_decode([p.ids for p in prompts], skip_special_tokens=True)
    wholes = tokenizer.batch_decode(both, skip_special_tokens=True)
    texts = []
    for p, head, whole in zip(prompts, heads, wholes, strict=True):
        text, prompt = whole[len(os.path.commonprefix([head, whole])) :], p.row["prompt"]
        goes_on = isinstance(prompt, str) or said(prompt[-1])[0] == "assistant"
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


# ---- batches


def data_order(rows: int, epoch: int, seed: int) -> list[int]:
    """The order of the rows in an epoch, the same in every process (D7)."""
    return torch.randperm(rows, generator=utils.generator("cpu", seed, epoch)).tolist()


def cycle(rows: list[Any], first: int, count: int, seed: int) -> list[Any]:
    """Rows number `first` to `first + count` of endless shuffled passes (D7)."""
    numbers = range(first, first + count)
    epochs = {n // len(rows) for n in numbers}
    orders = {epoch: data_order(len(rows), epoch, seed) for epoch in epochs}
    return [rows[orders[n // len(rows)][n % len(rows)]] for n in numbers]


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
    real = torch.arange(max(width, int(lengths.max()))) < lengths[:, None]
    if side == "left":
        real = real.flip(1)
    ids = torch.full(real.shape, pad_id)
    ids[real] = torch.tensor([*itertools.chain(*sequences)], dtype=ids.dtype)
    return ids.to(device), real.long().to(device)
