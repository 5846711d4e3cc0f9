"""Rows of any layout -> checked rows -> their order in training.

In: names of data sets and of splits. Out: rows with the columns that a stage reads, which
encoding.py turns into token ids. What cannot be read stops a stage with file and line number; a row
that cannot be used is left out and counted.

`B26` in comments points to docs/details.md.
"""

import ast
import contextlib
import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

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
MATTERS |= {"tools", "functions", "image", "images", "audios", "videos"}


class Row(dict):
    """A row by its columns, and where it stands, for errors: `data/x/train.jsonl:17`."""

    def __init__(self, columns: dict[str, Any], place: str):
        super().__init__(columns)
        self.place = place


class Unusable(Exception):
    """What is wrong with a row; how to fix it."""


def is_default(args: Any) -> bool:
    """Whether `--dataset` is the embedded task, by any path to it."""
    given, own = ([Path(x).expanduser().resolve() for x in a.dataset] for a in (args, type(args)))
    return given == own


def usable(function: Callable, rows: list[Row], *more: list) -> list[Any]:
    """function(row, *more) of each row, but for those for which it raises Unusable.

    Those are counted and the first is named; more than a tenth of all rows stop the stage.
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
    # held-out rows are mixed: any first part has the same share of each data set (B39)
    parts = [(i / len(rows), row) for rows in held_out for i, row in enumerate(rows)]
    held_out = [row for _, row in sorted(parts, key=lambda part: part[0])]
    if formats is PROMPT_FORMATS:  # reward functions get None where a row lacks a column
        columns = columns_of(train + held_out)
        for row in train + held_out:
            for name in columns:
                row.setdefault(name)
    read = {name for columns in formats for name in columns}  # an id makes no other row

    def key(row: Row) -> str:
        return repr([row.get(name) for name in read])

    known = {key(row) for row in train}
    if same := sum(key(row) in known for row in held_out):
        what = f"{same} of {len(held_out)} evaluation rows"
        utils.say(f"{' '.join(args.dataset)}: {what} are training rows too")
    return train, held_out


def load_data(dataset: str, split: str, formats: Formats, args: Any = None) -> list[Row]:
    """Rows of a split, with the columns of the first of `formats` that fits most rows.

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
    most = len(rows) / 2
    columns = next((c for c in formats if sum({*c} <= {*row} for row in rows) > most), None)
    if columns is None:
        wanted = " or ".join(",".join(columns) for columns in formats)
        what = f"most rows have no {wanted}, but {','.join(found)}"
        stop(f"{rows[0].place}: {what}; rename by --columns")
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

    rows = usable(checked, rows)
    utils.keep_digest(where, (repr([row[name] for name in columns]).encode() for row in rows))
    return rows


def renamings(dataset: str, rows: list[Row], flags: tuple[str, ...]) -> list[tuple[str, str]]:
    """What --columns says, as (column, its sources); without it that of a known layout, if any."""
    found = columns_of(rows)
    pairs = [pair.partition("=")[::2] for pair in flags]
    for pair, (column, sources) in zip(flags, pairs, strict=True):
        named = {*filter(None, sources.split("+"))}
        if pair.find("=") < 1 or (rows and not named <= {*found}):
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
        if "+" in sources:  # of `question+` the second is none, not a column without a name
            values = [row.get(name) for name in sources.split("+") if name]
            is_text = all(isinstance(x, str | None) for x in values)
            new[column] = "".join(f"{x}\n\n" for x in values if x) if is_text else values
        elif sources:
            new[column] = row.get(sources)
    for column, _ in pairs:
        row.pop(column, None)
    row.update(new)


def known_layout(row: Row, formats: Formats) -> None:
    """Give a row's chats our form, in place: kept as text (B33), ShareGPT, LLaMA-Factory.

    For SFT, chats end with an answer, and a prompt that is also their head (B34) goes.
    """
    # with a prompt, other columns are for reward functions, as they are
    prompt_only = formats is PROMPT_FORMATS and bool(row.get("prompt"))
    for column in {*(["prompt"] if prompt_only else CHATS)} & {*row}:
        value = row[column]
        if isinstance(value, str) and re.match(r"\s*(\[\s*)?\{", value):
            value = parsed_chat(value)
        if isinstance(value, dict) and {"role", "from"} & {*value}:
            value = [value]
        row[column] = [message_of(m) for m in value] if isinstance(value, list) else value
    turns = None if prompt_only else row.get("conversations")
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


def parsed(text: str) -> Any:
    """What a text holds in JSON, or as Python or numpy writes it; None where it is neither."""
    spaced = re.sub(r"\}\s+(?=\{'\w+': )", "}, ", text)  # numpy writes no comma
    for parse, source in ((json.loads, text), (ast.literal_eval, text), (ast.literal_eval, spaced)):
        with contextlib.suppress(Exception):
            return parse(source)
    return None


def parsed_chat(text: str) -> Any:
    """The chat or message that a text holds (B33); else the text: answers may be JSON."""
    keys = ({"role", "content"}, {"from", "value"})

    def is_message(x: Any) -> bool:
        role = x.get("role", x.get("from")) if isinstance(x, dict) else None
        return role in (*ROLES, *SHAREGPT_ROLES) or (role and any(k <= x.keys() for k in keys))

    value = parsed(text)
    if isinstance(value, dict):
        return value if {*value} in keys else text
    return value if isinstance(value, list) and any(map(is_message, value)) else text


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

    def position(end: str) -> int:
        """Where a slice's end, a count or a percentage, is among n rows."""
        count = int(end.rstrip("%")) * (n / 100 if "%" in end else 1)
        return max(0, round(count) + n) if count < 0 else round(count)

    some = some[position(first or "0") : position(last or "100%")]
    if isinstance(table, list):
        return [table[i] for i in some]
    rows = map(without_nulls, table.select(some).to_list())
    return [Row(x, f"{dataset}/{source} (row {i + 1})") for i, x in zip(some, rows, strict=True)]


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row, its messages without nulls that stand for other rows' keys (B45)."""

    def kept(x: Any) -> Any:
        if isinstance(x, dict):  # a message that is a call may have no content
            own = {"content"} if "role" in x else set()
            return {k: kept(v) for k, v in x.items() if v is not None or k in own}
        return [*map(kept, x)] if isinstance(x, list) else x

    return row | {column: kept(row[column]) for column in {*CHATS} & {*row}}


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
    name, *config = dataset.split(":", 1)  # NAME or NAME:CONFIG
    if path.exists():
        name, config = str(path.resolve()), []  # it cannot read `link/..`
    if is_saved:  # its cache files are not rows (B25)
        saved = datasets.load_from_disk(name)
        tables = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return [*tables], tables.__getitem__
    names = datasets.get_dataset_split_names(name, *config, revision=revision)
    return names, lambda split: datasets.load_dataset(name, *config, split=split, revision=revision)


def kind_of(path: Path) -> str:
    """Which of KINDS a file is by its name; "" for none."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    return kind if kind in KINDS else ""


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
        return [Row(without_nulls(x), f"{path} (row {i})") for i, x in enumerate(table, 1)]
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
            numbered = [(f":{table.line_num}", row) for row in table]
        except csv.Error as error:
            line = table.reader.line_num
            stop(f"{path}:{line}: {utils.first_line(error)}; quote as RFC 4180 says")
        names = table.fieldnames or []
        if len({*names}) < len(names):
            stop(f"{path}:1: names a column twice; rename one")
    elif kind == ".json" and text.lstrip().startswith("["):
        numbered = [(f" (row {i})", row) for i, row in enumerate(json.loads(text), 1)]
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((f":{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:  # or a number of 5,000 digits
                    what = f"is not JSON ({utils.first_line(error)})"
                    stop(f"{path}:{number}: {what}; write one JSON object a line")
    for place, row in numbered:
        if not isinstance(row, dict):
            stop(f'{path}{place}: is not a JSON object; write each row as one: {{"prompt": …}}')
        if None in row:
            stop(f"{path}{place}: has more fields than line 1; quote what holds a delimiter")
    return [Row(row, f"{path}{place}") for place, row in numbered]


def check_field(value: Any, column: str) -> None:
    """Raise Unusable unless a field is a text or a list of chat messages, and not empty."""
    wanted = {"messages": list, "text": str}.get(column, str | list)
    if not isinstance(value, wanted):
        kind = "missing" if value is None else f"of type {type(value).__name__}"
        raise Unusable(f"{column}: is {kind}; make it a string, or a list of chat messages")
    if isinstance(value, str) and re.match(BROKEN_CHAT, value) and parsed(value) is None:
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
    if column == "completion" and any(m["role"] != "assistant" for m in messages[:-1]):
        raise Unusable(f"{column}: has turns of others, which would be learned; write messages")


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
