"""What is not the point of reading: errors, processes, data, models, the decoding loop, checkpoints, logging.

The three stages import this file and never each other. Shapes in comments: B sequences, P prompt tokens, R response
tokens, T = P + R, V vocabulary, H hidden size. `D17` and `B14` in comments point to DETAILS.md.
"""

import atexit
import codecs
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import html
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import huggingface_hub.utils
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# oneDNN keeps every kernel that it has compiled, one for each shape: 1,024 of them are hundreds of MB
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

# the terminal is for what the stages say; what would go wrong silently with this, `load_model` checks
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
huggingface_hub.utils.enable_progress_bars()  # which that has switched off too: a download may take long

# ------------------------------------------------------------------------------------------------------------- errors

open_bars: list[tqdm] = []
# what a terminal obeys, or shows in another order than it is read; and line ends other than \n
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with control characters, such as those of ANSI colors, spelled out: `\\x1b`."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def stop(message: str, code: int = 2) -> NoReturn:
    """Print `error: WHERE: WHAT; HOW TO MEND` on one line of stderr and exit: 2 for wrong input, 1 for a failed run."""
    print_line(f"error: {message}")
    raise SystemExit(code)


def print_line(message: str) -> None:
    """Print a message on a line of its own on stderr."""
    while open_bars:
        open_bars.pop().close()  # ends its line
    print(visible(message.replace("\n", " ")), file=sys.stderr, flush=True)


def require(condition: bool, message: str) -> None:
    """Stop with exit code 2 unless `condition` holds."""
    if not condition:
        stop(message)


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of its message, for errors that fit on one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


# ---------------------------------------------------------------------------------------------------------- processes


class Process(NamedTuple):
    """This process among those of `torchrun`; rank 0 of 1 without it."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


remote_code = False  # whether a model may bring Python code of its own; `start_process` sets it


def start_process(device: str, seed: int, trust_remote_code: bool = False) -> Process:
    """Join the other processes if torchrun started several, choose the device, seed what must agree (D7)."""
    global remote_code
    require(0 <= seed < 2**63, f"--seed: {seed} is out of range; pass 0 or more, below 2**63")
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(f"cuda:{local}" if device == "cuda" else device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        stop(f"--device: {device!r} cannot be used ({first_line(error)}); pass --device cpu, or leave it out")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # M_MMAP_THRESHOLD (older ones take 32 MB at most), M_TRIM_THRESHOLD: freed memory is kept for the next tensor
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**30)
    catch_signals(quit_at_once)  # before training there is nothing to save
    torch.manual_seed(seed)  # model heads and tiny models start alike in every process
    remote_code = trust_remote_code
    if remote_code:
        say("--trust-remote-code: Python code that comes with a model is executed, with all that your account may do")
    return Process(rank, world, chosen)


def say(line: str) -> None:
    """Print a line once, however many processes come by."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(visible(line), flush=True)


def generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A random generator that depends on `numbers` alone, such as (seed, update, rank) (D7).

    Randomness is a function of where the run is, not of what it did before, so a resumed run draws the same numbers.
    """
    # numpy takes [1] and [1, 0] for the same entropy, so the count comes first
    seed = int(np.random.SeedSequence([len(numbers), *(n % 2**32 for n in numbers)]).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; `x` itself where there is one."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up gradients over processes: each loss is already divided by the token count of the whole batch (D9)."""
    parameters = [p for p in parameters if p.requires_grad]  # none for a policy that stands still (D32)
    if dist.is_initialized():
        for p in parameters:
            if p.grad is None:  # a process whose share of the last batch is empty takes part all the same
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters]
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat, gradients)


def gather(rows: list[Any]) -> list[Any]:
    """The lists of all processes, interleaved as they were dealt out by `rows[rank::world]`."""
    if not dist.is_initialized():
        return rows
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def end_process() -> None:
    """Leave output folder and process group, after everything is written."""
    unlock_output()
    while handlers_before:
        signal.signal(*handlers_before.popitem())
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


handlers_before: dict[int, Any] = {}


def catch_signals(handler: Callable[[int, Any], None]) -> None:
    """Have SIGTERM and Ctrl-C call `handler` until `end_process`."""
    owner = os.getpid()

    def caught(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a fork, of a reward function's pool of workers for one: it ends as it would without
            os._exit(128 + number)
        handler(number, frame)

    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, caught)
            handlers_before.setdefault(number, before)


def quit_at_once(number: int, frame: Any = None) -> NoReturn:
    """End the process as it is; what a kill leaves is whole, for everything is written beside first."""
    # no print: the signal may have come in the middle of one
    os.write(2, b"\ninterrupted: quit at once; the same flags with --resume go on from the last checkpoint, if any\n")
    unlock_output()
    os._exit(128 + number)


class Interruption:
    """SIGTERM or Ctrl-C: noted when it comes, acted on where the loop asks; a second one quits at once."""

    def __init__(self, process: Process):
        self.process, self.signal, self.time, self.agreed = process, 0, 0.0, 0
        catch_signals(self.note)

    def note(self, number: int, frame: Any) -> None:
        # torchrun passes on a signal that its processes may have got by themselves: that is not a second one
        again = self.signal and not (dist.is_initialized() and time.monotonic() - self.time < 1)
        if again:
            quit_at_once(number)
        if not self.signal:
            self.signal, self.time = number, time.monotonic()

    def here(self) -> bool:
        """Whether a signal has come to this process: what it is computing will not be used."""
        return self.signal != 0

    def anywhere(self) -> bool:
        """Whether a signal has come to any process. All have to ask at the same place, and get the same answer."""
        self.agreed = self.signal
        if dist.is_initialized():
            number = torch.tensor(self.agreed, device=self.process.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.agreed = int(number)
        return self.agreed != 0

    def leave(self, out: Path, step: int, logger: Any, *checkpoint: Any, **options: Any) -> NoReturn:
        """Save the models, which are in the state after `step`, say how to go on, exit with 128 + the signal's number.

        What follows `logger` is passed on to `save_checkpoint`.
        """
        if self.process.is_main:
            if step:  # the state before the first step is where a run without checkpoints starts
                save_checkpoint(out, step, *checkpoint, **options)
            print_line(f"interrupted after {logger.step_name} {step}: the same flags with --resume go on from there")
        logger.close()
        end_process()  # which waits for the main process
        raise SystemExit(128 + self.agreed)


# --------------------------------------------------------------------------------------------------- flags and folders

OWN_FILES = (
    *("args.json", "metrics.jsonl", "summary.json", "samples.jsonl"),
    *("checkpoint", "rollouts", "debug", "run.lock"),
)
MODEL_FILES = (  # what `save_pretrained` of models and tokenizers may leave
    *("*.part", "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("chat_template*", "additional_chat_templates"),
)
FREE_ON_RESUME = {"resume", "overwrite", "device", "micro_batch_size", "save_every", "eval_every", "track"}
FREE_ON_RESUME |= {"trust_remote_code", "output_dir", "keep_checkpoints", "reward_timeout"}


def flag(name: str) -> str:
    """The command-line spelling of an argument."""
    return "--" + name.replace("_", "-")


def parse_flags(args_class: Any, given: list[str] | None = None) -> Any:
    """The command line as an `args_class`, by tyro, but with errors of one line."""
    given = sys.argv[1:] if given is None else given
    flags = {flag(field.name): field.type for field in dataclasses.fields(args_class)}
    known = [*flags, *(f"--no-{name[2:]}" for name, kind in flags.items() if kind is bool)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args, unknown = tyro.cli(args_class, args=given, return_unknown_args=True)
    except SystemExit as exit_:
        if not exit_.code:  # after --help
            raise
        args, unknown = None, []
    for word in unknown:
        name = word.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(name, known, 1)
        mend = f"did you mean {near[0]}?" if near else "--help lists the flags"
        stop(f"{word}: {'is no flag' if word.startswith('-') else 'belongs to no flag'}; {mend}")
    if args is not None:
        return args
    starts = [i for i, word in enumerate(given) if word.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(given)], strict=True):  # which of them is it?
        name, *values = [*given[start].split("=", 1), *given[start + 1 : end]]
        name = name.replace("_", "-")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                tyro.cli(args_class, args=given[start:end], return_unknown_args=True)
        except SystemExit:
            kinds = {int: "a whole number", float: "a number", str: "a text", type(None): "None"}
            wanted = " or ".join(kinds.get(kind, str(kind)) for kind in typing.get_args(flags[name]) or [flags[name]])
            stop(f"{name}: {f'{values[0]!r} does not fit' if values else 'has no value'}; pass {wanted}")
    stop(f"{' '.join(given)}: cannot be understood; --help lists the flags")


def check_range(args: Any, names: str, allowed: Callable[[float], bool], wanted: str) -> None:
    """Stop unless each flag in `names`, words with spaces between, is None or a finite number that is allowed."""
    for name in names.split():
        value = getattr(args, name)
        ok = value is None or (math.isfinite(value) and allowed(value))
        require(ok, f"{flag(name)}: {value} is out of range; pass {wanted}")


def check_common_flags(args: Any, world: int) -> None:
    """Check the flags that stages share; `args` is a stage's dataclass."""
    for name, value in vars(args).items():
        require(value != "" or name == "stop_token", f"{flag(name)}: is empty; pass a value or leave it out")
    for name in ("model", "reward_model", "value_model", "dataset", "normalize_with", "ptx_dataset", "output_dir"):
        value = getattr(args, name, None) or ""
        try:
            Path(value).expanduser().exists()
        except (OSError, RuntimeError) as error:  # a name of thousands of characters, a user who has no home
            stop(f"{flag(name)}: {value:.60} cannot be a path ({first_line(error):.80}); check it")
    automatic = args.micro_batch_size == "auto"
    check_range(args, "batch_size" if automatic else "batch_size micro_batch_size", lambda n: n > 0, "1 or more")
    check_range(args, "save_every eval_every seed", lambda n: n >= 0, "0 or more")
    check_range(args, "keep_checkpoints", lambda n: n > 0, "1 or more")
    check_range(args, "learning_rate max_grad_norm", lambda x: x > 0, "a number above 0")
    if hasattr(args, "epochs"):  # sft.py and reward_model.py, which pass over a fixed set of rows
        check_range(args, "epochs", lambda n: n > 0, "1 or more")
        check_range(args, "max_length", lambda n: n > 1, "2 or more")
        check_range(args, "warmup_ratio", lambda x: 0 <= x < 1, "0 to below 1")
    share = (1 if automatic else args.micro_batch_size) * world
    what = f"{args.batch_size} is not divisible by the micro-batch size times the processes ({share})"
    mend = f"pass a multiple of {share}, or another --micro-batch-size"
    require(args.batch_size % share == 0, f"--batch-size: {what}; {mend}")
    has_wandb = importlib.util.find_spec("wandb") is not None
    require(not args.track or has_wandb, "--track: wandb is missing; pip install wandb")


def check_output(args: Any) -> None:
    """Stop if `--output-dir` holds another run or anything else; call it in every process before any opens the folder.

    A run may be there with --overwrite, or with --resume if the flags are its own.
    """
    out = Path(args.output_dir).expanduser()
    require(not (args.resume and args.overwrite), "--resume: contradicts --overwrite; pass one of the two")
    require(not out.exists() or out.is_dir(), f"{out}: is a file; pass another --output-dir")
    for name in ("model", "reward_model", "value_model"):
        start = getattr(args, name, None)
        same = start and out.is_dir() and Path(start).expanduser().resolve() == out.resolve()
        require(not same, f"--output-dir: {out} is also {flag(name)}, which must stay; pass another --output-dir")
    if (out / "run.lock").exists() and out / "run.lock" not in locks:
        with contextlib.suppress(OSError):  # a folder that cannot be written is for `open_output` to name
            open_lock(out / "run.lock", fcntl.LOCK_SH).close()
    if (out / "args.json").exists():
        again = args.resume or args.overwrite
        require(again, f"{out}: already holds a run; pass --resume to go on or --overwrite to start again")
        before = flags_of(out) if args.resume else {}
        for name, value in json.loads(json.dumps(dataclasses.asdict(args))).items():
            same = name not in before or name in FREE_ON_RESUME or before[name] == value
            require(same, f"{flag(name)}: was {before.get(name)!r} in {out}; resume with the flags of that run")
        lost = args.resume and (out / "summary.json").exists() and not checkpoints(out)
        require(not lost, f"{out}: is finished and has no checkpoint; pass --overwrite to start again")
    elif out.exists():
        # a run that was killed in its first moment may have left these
        rest = {path.name for path in out.iterdir()} - {"run.lock", "args.json.part"}
        require(not rest, f"{out}: is not empty and holds no run; pass another --output-dir")


def flags_of(out: Path) -> dict[str, Any]:
    """The flags of the run in a folder; none where args.json is illegible and nothing has been saved with them yet."""
    try:
        return dict(json.loads((out / "args.json").read_text(encoding="utf-8")))
    except ValueError:
        mend = "write {} into it to go on with the flags given now, or pass --overwrite"
        require(not checkpoints(out), f"{out / 'args.json'}: is illegible; {mend}")
        return {}


def open_output(args: Any, process: Process) -> Path:
    """Make `--output-dir` ready and write `args.json`, once all processes have come through `check_output`."""
    out = Path(args.output_dir).expanduser()
    if dist.is_initialized():
        dist.barrier()  # nobody may find the folder that the main process makes here
    if process.is_main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock_output(out)
            check_output(args)  # another run may have come and gone since
            if args.overwrite:  # first what would make the old run look like this one, if this is killed in between
                discard(out / "summary.json")
                discard(out / "checkpoint")
            write_json(out / "args.json", dataclasses.asdict(args))
            if not checkpoints(out):
                own = [out / name for name in OWN_FILES if name not in ("args.json", "run.lock", "checkpoint")]
                own += [path for glob in ("events.out.tfevents.*", *MODEL_FILES) for path in out.glob(glob)]
                if args.overwrite:  # what is written must not go through a link
                    own += [path for path in out.iterdir() if path.is_symlink()]
                for path in own:
                    discard(path)
        except OSError as error:
            stop(f"{out}: cannot be written ({first_line(error)}); pass another --output-dir")
    if dist.is_initialized():
        dist.barrier()
    return out


locks: dict[Path, tuple[int, Any]] = {}  # `run.lock`: the process that took it, not a fork of it, and the open file


def lock_output(out: Path) -> None:
    """Keep other runs out of a folder until `unlock_output`, by `run.lock`, which names process and host."""
    unlock_output()  # of a run that failed before in this process
    path = out / "run.lock"
    while path not in locks:
        file = open_lock(path, fcntl.LOCK_EX)
        if is_file(path, file):
            locks[path] = os.getpid(), file
        else:  # its run removed it in the meantime
            file.close()
    file.truncate(0)
    file.write(f"{os.getpid()} {socket.gethostname()}\n")
    file.flush()
    atexit.register(unlock_output)


def open_lock(path: Path, kind: int) -> Any:
    """Open and lock `run.lock`; stop with code 2 if another run has it. However a process ends, its lock does too.

    On a network folder the other run may be on a host whose locks are not seen here: what the file says counts then.
    """
    if path.is_symlink():  # what is written must not go through a link
        path.unlink()
    file = path.open("a+")
    taken = lockless = False
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks
        lockless = True
    file.seek(0)
    pid, _, host = file.read().strip().partition(" ")
    here = host == socket.gethostname()
    if taken or (host and not here) or (lockless and here and pid.isdigit() and is_running(int(pid))):
        file.close()
        mend = "stop it" if here or taken else f"stop it or, if it has ended, remove {path}"
        stop(f"{path.parent}: is in use by process {pid or 'unknown'} on {host or 'unknown'}; {mend}")
    return file


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def is_file(path: Path, file: Any) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def unlock_output() -> None:
    """Remove this process's `run.lock`."""
    while locks:
        path, (owner, file) = locks.popitem()
        with contextlib.suppress(OSError):
            if owner == os.getpid() and is_file(path, file):
                path.unlink()
        file.close()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its target first: nobody finds half of it, whenever process or machine stop."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)  # it may be a link
    part.write_text(text, encoding="utf-8")
    move(part, path)


def move(part: Path, path: Path) -> None:
    """Give a written file or folder its name, once all that it holds is on the disk."""
    for written in [*part.rglob("*"), part]:
        sync(written)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there; a folder is renamed first, so that half of it is never taken for it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    part = path.with_name(path.name.removesuffix(".part") + ".part")
    if part != path:
        shutil.rmtree(part, ignore_errors=True)
        os.replace(path, part)
    shutil.rmtree(part)


# --------------------------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """Rows of a split, and for each the place to name in an error, such as `data/x/train.jsonl:17`."""

    rows: list[dict[str, Any]]
    places: list[str]


def load_data(dataset: str, split: str, formats: list[tuple[str, ...]]) -> Data:
    """Read a split; stop unless every row has the columns of one of `formats`, texts or chats and none of them empty.

    A chosen response that equals the rejected one is refused; rows that stand there twice are counted on the terminal.

    Local .jsonl files are read here so that an error can name the line; everything else (a hub id, .parquet, .csv,
    a folder of such files) goes through `datasets.load_dataset`. A single file has one split, `train`: its last
    twentieth (500 rows at most) serves as the other one. The first of `formats`, sets of columns, that fits wins.
    """
    data = read_rows(dataset, split)
    require(len(data.rows) > 0, f"{dataset} ({split}): holds no rows; pass a data set with rows")
    found = list(data.rows[0])
    columns = next((f for f in formats if {*f} <= {*found}), None)
    if columns is None:
        wanted, known = " or ".join(",".join(f) for f in formats), {c for f in formats for c in f}
        lost, free = [c.lower() for c in found if c not in known], known.difference(found)
        near = [match for c in lost for match in difflib.get_close_matches(c, free, 1)]
        hint = f"rename it to {near[0]!r}" if near else f"the columns must be {wanted}"
        stop(f"{data.places[0]}: columns {','.join(found)} found, {wanted} wanted; {hint}")
    for row, place in zip(data.rows, data.places, strict=True):
        for column in columns:
            check_field(row.get(column), column, place)
        if "chosen" in columns:
            chosen, rejected = row["chosen"], row["rejected"]
            require(chosen != rejected, f"{place}: chosen and rejected are equal, which teaches nothing; drop the row")
            both = isinstance(chosen, str) == isinstance(rejected, str)
            require(both, f"{place}: of chosen and rejected one is a text, the other a chat; write both alike")
    different = len({json.dumps(row, sort_keys=True, default=str) for row in data.rows})
    if different < len(data.rows):
        say(f"{dataset} ({split}): {len(data.rows) - different} of {len(data.rows)} rows repeat another one")
    return data


def read_rows(dataset: str, split: str) -> Data:
    """The rows of a split with their places, unchecked."""
    path = Path(dataset).expanduser()
    if path.suffix == ".jsonl":
        return hold_out(read_jsonl(path), split)
    if (path / f"{split}.jsonl").is_file() or (path.is_dir() and any(path.glob("*.jsonl"))):
        return read_jsonl(path / f"{split}.jsonl")
    is_file_name = path.suffix in (".json", ".csv", ".parquet", ".txt", ".arrow")  # a hub id may have a dot
    is_path = is_file_name or dataset.startswith((".", "/", "~")) or len(path.parts) > 2
    if not path.exists() and is_path:
        stop(f"{dataset}: no such file or folder; check --dataset")
    if not path.exists() and path.parent.is_dir() and len(path.parts) > 1:
        say(f"{dataset}: there is no such folder here, so it is taken for a hub id")
    kinds = ("json", "csv", "parquet", "txt", "arrow")
    known = not path.is_file() or path.suffix[1:] in kinds
    require(known, f"{dataset}: is no file of a known kind; pass one that ends in .jsonl, .{', .'.join(kinds)}")
    import datasets  # takes seconds; local .jsonl files do not need it

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it would log, it raises too
    try:
        if path.is_file():
            kind = path.suffix[1:].replace("txt", "text")
            file = str(path.resolve())  # here, for `datasets` takes `link/..` for nothing
            rows = datasets.load_dataset(kind, data_files=file, split="train").to_list()
            return hold_out(Data(rows, [f"{path} (row {i + 1})" for i in range(len(rows))]), split)
        rows = datasets.load_dataset(str(path) if path.exists() else dataset, split=split).to_list()
    except Exception as error:
        why = first_line(error.__cause__ or error)  # "an error occurred" says less than its cause
        stop(f"{dataset} ({split}): cannot be read ({why}); check the path or id and the split")
    return Data(rows, [f"{dataset}/{split} (row {i + 1})" for i in range(len(rows))])


def read_jsonl(path: Path) -> Data:
    """One JSON object a line, empty lines skipped."""
    require(path.is_file(), f"{path}: no such file; check --dataset and the names of the splits")
    try:
        with path.open("rb") as file:
            lines = file.readlines()
    except OSError as error:
        stop(f"{path}: cannot be read ({first_line(error)}); check the file and its permissions")
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            text = line.decode()
            require("\0" not in text, f"{place}: holds NUL bytes; save the file as text in UTF-8")
            row = json.loads(text)
        except UnicodeDecodeError:
            stop(f"{place}: is not UTF-8; save the file as UTF-8")
        except json.JSONDecodeError as error:
            stop(f"{place}: is not JSON ({error.msg} at column {error.colno}); write one JSON object a line")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
            stop(f"{place}: is JSON that cannot be read ({first_line(error)}); mend or drop the line")
        require(isinstance(row, dict), f'{place}: is not a JSON object; write one a line, as {{"prompt": …}}')
        rows.append(row)
        places.append(place)
    return Data(rows, places)


def hold_out(data: Data, split: str) -> Data:
    """Split the rows of a single file: `train` is all but the last twentieth, any other name the rest."""
    n = len(data.rows) - min(500, max(1, len(data.rows) // 20)) if len(data.rows) > 1 else 0
    part = slice(None, n or None) if split == "train" else slice(n, None)
    return Data(data.rows[part], data.places[part])


ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_CHARACTERS = 2**22  # of a field; more than any context holds, and minutes of a tokenizer's time


def check_field(value: Any, column: str, place: str) -> None:
    """A field is a non-empty string or a non-empty list of chat messages."""
    where = f"{place}: {column}"
    if isinstance(value, str) and column != "messages":
        require(bool(value.strip()), f"{where}: is empty; fill it in or drop the row")
    elif isinstance(value, list):
        check_chat(value, column, where)
    else:
        kind = "missing" if value is None else f"of type {type(value).__name__}"
        stop(f"{where}: is {kind}; make it a string or a list of chat messages")
    for text in [value] if isinstance(value, str) else [message["content"] for message in value]:
        short = len(text) <= MOST_CHARACTERS
        require(short, f"{where}: has {len(text):,} characters, too many for any model; split it or drop the row")
        require("\0" not in text, f"{where}: holds a NUL character; take it out or drop the row")
        whole = not re.search("[\ud800-\udfff]", text)
        require(whole, f"{where}: holds half a surrogate pair; mend the text's encoding")


def check_chat(messages: list[Any], column: str, where: str) -> None:
    """Messages have a known role and a text; a prompt asks for a reply, and any other chat ends with one."""
    require(bool(messages), f"{where}: is an empty chat; fill it in or drop the row")
    for message in messages:
        ok = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        mend = 'write {"role": …, "content": …} with strings'
        require(ok, f"{where}: {message!r:.60} is not a chat message; {mend}")
        known = message["role"] in ROLES  # a chat template may take any role and write nonsense
        require(known, f"{where}: has the role {message['role']!r:.30}; make it one of {', '.join(ROLES)}")
    last = messages[-1]
    require(bool(last["content"].strip()), f"{where}: its last message is empty; fill it in or drop the row")
    if column == "prompt":
        asks = not {message["role"] for message in messages} <= {"system", "developer"}
        require(asks, f"{where}: holds system messages alone; add the user's")
        require(last["role"] != "assistant", f"{where}: its last message is the assistant's; end it with the user's")
    else:
        replies = last["role"] == "assistant"
        require(replies, f"{where}: its last message is not the assistant's; end it with a reply")


def render(tokenizer: Any, prompt: Any, completion: Any, place: str) -> tuple[str, str]:
    """A prompt and its completion, None for a prompt alone, as text; chat messages go through the chat template."""
    if isinstance(prompt, str) and not isinstance(completion, list):
        return prompt, completion or ""
    has_template = tokenizer.chat_template is not None
    require(has_template, f"{place}: is a chat, but the tokenizer has no chat template; use plain text")
    same_kind = isinstance(prompt, list) or not prompt
    require(same_kind, f"{place}: the prompt is a text, but its answer is a chat; write both as messages or as texts")
    messages = prompt if isinstance(prompt, list) else []
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion or []
    try:
        start = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if messages else ""
        whole = tokenizer.apply_chat_template([*messages, *answer], tokenize=False) if answer else start
    except Exception as error:
        stop(f"{place}: does not fit the chat template ({first_line(error)}); check roles and their order")
    kept = whole.startswith(start)
    require(kept, f"{place}: the chat template rewrites the prompt when it is answered; use plain text")
    return start, whole[len(start) :]


SFT_FORMATS = [("prompt", "completion"), ("messages",), ("text",)]


def demonstrations(data: Data) -> list[tuple[Any, Any]]:
    """Rows of one of SFT_FORMATS as (prompt, completion). A chat's completion is its last message, the assistant's."""
    pairs: list[tuple[Any, Any]] = []
    for row in data.rows:
        if "prompt" in row and "completion" in row:
            pairs.append((row["prompt"], row["completion"]))
        elif "messages" in row:
            *before, last = row["messages"]
            pairs.append((before, [last]))
        else:
            pairs.append(("", row["text"]))
    return pairs


def encode_pairs(
    tokenizer: Any, pairs: list[tuple[Any, Any]], places: list[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and of their completions, rendered as in `render`.

    A prompt gets the tokenizer's special tokens (a BOS), unless a chat template has put them in. A completion ends
    with one EOS, added if missing (B19); a completion of None, for a prompt alone, has no ids.
    """
    texts = [render(tokenizer, *pair, place) for pair, place in zip(pairs, places, strict=True)]
    chats = [isinstance(p, list) or isinstance(c, list) for p, c in pairs]
    prompts: list[list[int]] = [[] for _ in pairs]
    appends_eos = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # a text's own EOS stays
    for chat in {*chats}:
        rows = [i for i, c in enumerate(chats) if c == chat]
        encoded = tokenizer([texts[i][0] for i in rows], add_special_tokens=not chat)["input_ids"]
        for i, ids in zip(rows, encoded, strict=True):
            prompts[i] = ids[:-1] if not chat and appends_eos else ids
    eos = tokenizer.eos_token
    answers = [c.rstrip().removesuffix(eos) if c.rstrip().endswith(eos) else c for _, c in texts]
    encoded = tokenizer(answers, add_special_tokens=False)["input_ids"]
    completions = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    return prompts, [[] if pair[1] is None else ids for pair, ids in zip(pairs, completions, strict=True)]


def encode_demonstrations(tokenizer: Any, data: Data, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and completions, these cut where both together exceed `max_length` tokens."""
    prompts, completions = encode_pairs(tokenizer, demonstrations(data), data.places)
    for prompt, place in zip(prompts, data.places, strict=True):
        what = f"the prompt's {len(prompt)} tokens leave no room for a completion within {max_length}"
        require(len(prompt) < max_length, f"{place}: {what}; shorten it or allow more tokens")
    return [(p, c[: max_length - len(p)]) for p, c in zip(prompts, completions, strict=True)]


class Prompt(NamedTuple):
    """A prompt to sample responses to: token ids, text, its row in the data set and the place to name in an error."""

    ids: list[int]
    text: str
    row: dict[str, Any]
    place: str


def load_prompts(tokenizer: Any, dataset: str, split: str, room: int) -> list[Prompt]:
    """The prompts of a split; none may be longer than `room` tokens."""
    data = load_data(dataset, split, [("prompt",)])
    encoded, _ = encode_pairs(tokenizer, [(row["prompt"], None) for row in data.rows], data.places)
    prompts = []
    for row, place, ids in zip(data.rows, data.places, encoded, strict=True):
        what = f"the prompt's {len(ids)} tokens exceed the {room} that the context leaves beside the response"
        require(len(ids) <= room, f"{place}: {what}; shorten it or lower --response-length")
        require(bool(ids), f"{place}: the prompt has no token that the model's tokenizer knows; drop the row")
        prompts.append(Prompt(ids, render(tokenizer, row["prompt"], None, place)[0], row, place))
    return prompts


def data_order(rows: int, epoch: int, seed: int) -> list[int]:
    """The order of the rows in an epoch, the same in every process (D7)."""
    return torch.randperm(rows, generator=generator("cpu", seed, epoch)).tolist()


def batches(rows: int, batch_size: int, epochs: int, seed: int, start: int) -> Iterator[tuple[int, list[int]]]:
    """(step, row indices) of each optimizer batch from step `start` + 1 on; the last of an epoch may be smaller."""
    step = 0
    for epoch in range(epochs):
        order = data_order(rows, epoch, seed)
        for i in range(0, rows, batch_size):
            step += 1
            if step > start:
                yield step, order[i : i + batch_size]


def cycle(rows: list[Any], first: int, count: int, seed: int) -> list[Any]:
    """Rows number `first` to `first + count` of an endless sequence of shuffled passes over `rows` (D7)."""
    numbers = range(first, first + count)
    orders = {epoch: data_order(len(rows), epoch, seed) for epoch in {n // len(rows) for n in numbers}}
    return [rows[orders[n // len(rows)][n % len(rows)]] for n in numbers]


def round_up(n: int, multiple: int = 8) -> int:
    """n raised to a multiple. It spares time where tensors would come in any size: kernels are compiled for each shape,
    and tensor cores like multiples of 8."""
    return -(-n // multiple) * multiple


def pad(
    sequences: list[list[int]], pad_id: int, side: str, device: torch.device, width: int = 0, limit: int = 2**30
) -> tuple[Tensor, Tensor]:
    """Pad token ids to a rectangle at least `width` wide: (ids [B, T], mask [B, T] with 1 on real tokens).

    Padded on the right, for training and scoring, T is rounded up to a multiple of 8, but not past `limit`, the model's
    context. The mask comes from the lengths, never from comparing ids with `pad_id`: pad may equal EOS (D3, B4, B20,
    B21).
    """
    lengths = torch.tensor([len(s) for s in sequences])
    width = max(width, int(lengths.max()))
    width = max(width, min(round_up(width), limit)) if side == "right" else width
    rows = [[pad_id] * (width - len(s)) + s if side == "left" else s + [pad_id] * (width - len(s)) for s in sequences]
    column = torch.arange(width)
    real = column >= width - lengths[:, None] if side == "left" else column < lengths[:, None]
    return torch.tensor(rows, device=device), real.long().to(device)


# ------------------------------------------------------------------------------------------------------------- models


def load_tokenizer(model: str) -> Any:
    """The tokenizer in a folder or of a hub id; its pad token is EOS where it has none (D3 makes that safe)."""
    tokenizer = from_pretrained(transformers.AutoTokenizer, model)
    has_eos = tokenizer.eos_token_id is not None
    require(has_eos, f"{model}: its tokenizer has no EOS token; set one in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = from_pretrained(transformers.AutoConfig, model).get_text_config()
    rows = getattr(config, "vocab_size", None)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # special tokens that no text holds may be beyond it, such as those for images in Gemma 3's text models
    last = max({*tokenizer.get_vocab().values()} - special | {tokenizer.eos_token_id, tokenizer.pad_token_id})
    what = f"its tokenizer has ids up to {last}, but its embedding {rows} rows"
    fits = rows is None or last < rows
    require(fits, f"{model}: {what}; call model.resize_token_embeddings(len(tokenizer)) and save both again")
    return tokenizer


def load_model(
    auto_class: Any, model: str, device: torch.device, new: tuple[str, ...] = (), mend: str = "", **kwargs: Any
) -> Any:
    """A model in float32 on `device`, dropout off (D4): it stays in eval mode, in training too.

    Where its files lack weights, transformers makes random ones. Those whose names start with `new` are set to zero;
    for any others, stop: `mend` says how to mend it.
    """
    attention = "eager" if device.type == "cpu" else None  # `fast_on_cpu` follows; None: fused, where that exists
    kwargs |= {"dtype": torch.float32, "attn_implementation": attention, "output_loading_info": True}
    loaded, info = from_pretrained(auto_class, model, **kwargs)
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith(new))
    require(not lacking, f"{model}: its files lack {', '.join(lacking[:3])}; {mend or 'pass a whole model'}")
    for name in info["missing_keys"]:
        loaded.get_parameter(name).data.zero_()
    for module in loaded.modules():  # some layers drop out by their own flag, which checkpointing sets
        for name in ("dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    loaded = loaded.to(device).eval()
    return fast_on_cpu(loaded, device)


def fast_on_cpu(model: Any, device: torch.device) -> Any:
    """The model, on a CPU with the attention and the float32 products that are the fastest there."""
    if device.type != "cpu":
        return model
    config = model.config.get_text_config()
    # a few ask for the name of their attention: GPT-2 with one of its flags, and those that choose what to attend to
    by_name = any(
        getattr(config, flag, None) for flag in ("reorder_and_upcast_attn", "index_topk", "index_topk_blocks")
    )
    if hasattr(sys.modules[type(model).__module__], "eager_attention_forward") and not by_name:
        name = "cpu_fused" if model._supports_sdpa else "cpu_eager"
        attention = functools.partial(cpu_attention, model._supports_sdpa)
        transformers.AttentionInterface.register(name, attention)  # here, for it takes a second of imports
        transformers.AttentionMaskInterface.register(name, transformers.masking_utils.eager_mask)
        model.set_attn_implementation(name)
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    if is_amd and has_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        for module in model.modules():
            if type(module) is nn.Linear and module.out_features > 1:
                module.__class__ = OneDNNLinear
    return model


def cpu_attention(
    fuses: bool, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Fused attention in float32 if the model `fuses`; else its own, eager one, in float32 for single queries.

    In bfloat16, fused attention is slower than the eager one here, and for single queries both are slow.
    """
    eager, rounds = sys.modules[type(module).__module__].eager_attention_forward, torch.is_autocast_enabled("cpu")
    if query.shape[2] == 1:
        with torch.autocast("cpu", enabled=False):
            return eager(module, query.float(), key.float(), value.float(), *args, **kwargs)
    attention = transformers.AttentionInterface()["sdpa"] if fuses and not rounds else eager
    return attention(module, query, key, value, *args, **kwargs)


class OneDNNProduct(torch.autograd.Function):
    """x [..., in] @ weight.T [in, out] + bias in float32 by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # [n, out]
        return (
            onednn_linear(gradient, weight.T) if for_x else None,
            onednn_linear(rows.T, x.flatten(0, -2).T) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


class OneDNNLinear(nn.Linear):
    """nn.Linear whose float32 products use AVX-512 on AMD's processors, where MKL, torch's choice, does without."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        product = OneDNNProduct.apply if torch.is_grad_enabled() else onednn_linear
        return product(x, self.weight, self.bias)


def has_onednn() -> bool:
    """Whether torch has the product that `onednn_linear` calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] @ weight.T [in, out] + bias, without gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


PICKLED = (
    "has its weights as pytorch_model.bin alone, a pickle, which may run code when it is read; "
    "convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


def from_pretrained(auto_class: Any, model: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained` with errors of one line; reads safetensors alone, for a pickle may run code."""
    path = Path(model).expanduser()
    if path.is_dir():
        has_config = (path / "config.json").is_file()
        require(has_config, f"{model}: holds no model (config.json is missing); pass a model's folder")
        pickled = any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors"))
        require(not pickled, f"{model}: {PICKLED}")
    else:
        local = model.startswith((".", "/", "~", "runs/")) or model.count("/") > 1 or path.exists()
        require(not local, f"{model}: no such model folder; run the stage that makes it first, or pass another path")
    if hasattr(auto_class, "from_config"):  # a model's class, and no tokenizer's or configuration's
        kwargs["use_safetensors"] = True
    try:
        folder = str(path) if path.is_dir() else model
        return auto_class.from_pretrained(folder, trust_remote_code=remote_code, **kwargs)
    except Exception as error:  # libraries raise anything here, from ImportError to SafetensorError
        needs_code = "trust_remote_code" in str(error) and not remote_code
        what = "runs Python code that comes with it; read that code, and pass --trust-remote-code if you trust it"
        require(not needs_code, f"{model}: {what}")
        require("cannot be loaded with `safetensors`" not in str(error), f"{model}: {PICKLED}")
        stop(f"{model}: no model could be loaded from it ({first_line(error)}); check the name and its files")


def four_tokens(model: Any) -> Tensor:
    """Ids [1, 4] that the model knows, to see what it does with them."""
    embedding = model.get_input_embeddings().weight
    return torch.arange(4, device=embedding.device)[None] % embedding.shape[0]


def load_causal_lm(model: str, device: torch.device) -> Any:
    """A language model, as `load_model` gives it; stop if it cannot be decoded as `generate` does it, or its
    logits are not what `logits_of` takes them for."""
    loaded = load_model(transformers.AutoModelForCausalLM, model, device)
    ids = four_tokens(loaded)
    given, position = inputs(loaded, ids, torch.ones_like(ids)), CachePosition(4)
    cache = KeyValueCache(position)
    with torch.no_grad():
        own = loaded(**given, use_cache=False).logits[0].float()
        ours = logits_of(loaded, last_hidden(loaded, **given, use_cache=False))
        try:
            for columns in (slice(0, 3), slice(3, 4)):
                position.slot = columns.start and torch.tensor([columns.start], device=device)
                position.end = columns.stop
                step = {name: value[:, columns] for name, value in given.items()}
                step["attention_mask"] = given["attention_mask"][:, : columns.stop]
                last = loaded(**step, past_key_values=cache, use_cache=True).logits[0, -1].float()
            steps = torch.allclose(last, own[-1], rtol=1e-3, atol=1e-3)
        except Exception:  # whatever a model does that keeps something else than keys and values
            steps = False
    require(steps, f"{model}: cannot be decoded from keys and values, as state-space models cannot; pass another model")
    same = torch.allclose(own, ours, rtol=1e-3, atol=1e-3)
    require(same, f"{model}: does something unknown to its logits, as few architectures do; pass another model")
    return loaded


def freeze(model: Any, dtype: str) -> Any:
    """The model without gradients; with "bfloat16", weights that only autocast's products read take half the memory.

    Autocast would round them in each forward pass: the outputs are the same, bit for bit. Embeddings, also where the
    output head shares their weights, norms and the scalar head of a classifier stay in float32.
    """
    model.requires_grad_(False)
    if dtype == "bfloat16":
        kept = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for name, module in model.named_modules():
            is_product = isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D) and name != "score"
            if is_product and id(module.weight) not in kept:
                module.to(torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dtype == torch.float32:  # out of the mapped file, which then takes no memory any more
                parameter.data = parameter.data.clone()
    return model


def load_classifier(model: str, device: torch.device, trained: bool = False) -> Any:
    """A model with a scalar head, `score`, in float32 and eval mode: a reward model, or the start of one.

    A head that its files lack is set to zero, where transformers makes a random one; with `trained` it must be there.
    """
    auto_class = transformers.AutoModelForSequenceClassification
    config = from_pretrained(transformers.AutoConfig, model)
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    labels = config.num_labels if is_classifier else 1  # a language model's configuration says 2, which means nothing
    what = f"is a classifier with {labels} labels, and a reward is one number"
    require(labels == 1, f"{model}: {what}; pass a model with num_labels=1, as reward_model.py makes")
    new = () if trained else ("score.", "classifier.")
    mend = "pass a reward model, which reward_model.py makes" if trained else ""
    loaded = load_model(auto_class, model, device, new=new, mend=mend, num_labels=1)
    untrained = trained and not is_classifier
    require(not untrained, f"{model}: is no reward model, its head is untrained; run reward_model.py first")
    has_score = hasattr(loaded, "score")
    require(has_score, f"{model}: {type(loaded).__name__} has no head named score; pass another model")
    decodes = not getattr(config, "is_encoder_decoder", False)
    require(decodes, f"{model}: is an encoder with a decoder; pass a model with a decoder alone")
    ids = four_tokens(loaded)
    with torch.no_grad():
        some, more = (head_inputs(loaded, ids[:, :n])[:, :3] for n in (3, 4))
    causal = torch.allclose(some, more, rtol=1e-3, atol=1e-3, equal_nan=True)
    require(causal, f"{model}: its tokens see later ones, padding too; pass a model with causal attention")
    return loaded


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether two tokenizers give the same ids, so that a reward model can read the policy's tokens (B5)."""
    return a.get_vocab() == b.get_vocab() and a.eos_token_id == b.eos_token_id and a.chat_template == b.chat_template


def stop_token_ids(tokenizer: Any, stop_token: str) -> list[int]:
    """The ids that end a response, whichever comes first: EOS and, unless `stop_token` is "eos", that token."""
    if stop_token == "eos":
        return [tokenizer.eos_token_id]
    own = tokenizer.get_vocab().get(stop_token)  # SentencePiece would put a space before it
    ids = tokenizer(stop_token, add_special_tokens=False)["input_ids"] if own is None else [own]
    require(len(ids) == 1, f"--stop-token: {stop_token!r} is {len(ids)} tokens; pass a string that is one token")
    return [tokenizer.eos_token_id, *ids]


def context_length(model: Any) -> int:
    """The longest sequence that the model's positions allow, in tokens; a large number where there is no limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 2**30)


def set_gradient_checkpointing(model: Any, on: bool) -> None:
    """Recompute activations in the backward pass (less memory, more time) while `on`; sampling needs it off."""
    modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if on and not any(module.gradient_checkpointing for module in modules):
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:  # its name before transformers 5.23
            model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in modules:
        # transformers checkpoints only what is in training mode; children stay in eval mode, so dropout is off
        module.training = on


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in `dtype`; weights, softmax, losses and optimizer stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def compile_model(model: Any) -> None:
    """Compile what comes before a model's head, on its first use; None is left alone. Decoding does without."""
    if model is not None:
        torch._dynamo.config.recompile_limit = 64  # models of one class share their code, and each needs variants
        model.base_model.compile(dynamic=True)


def largest_micro_batch(loss_of: Callable[[int], Tensor], most: int, checkpointing: bool, *models: Any) -> int:
    """The largest divisor of `most` sequences that fit in memory, in all processes, found by trying.

    `loss_of(count)` is a loss of so many of the longest sequences. Its backward pass is tried with more and more, until
    memory runs out or, by what the last trial took, would run out of 90% of what is free.
    """
    for model in models:
        set_gradient_checkpointing(model, checkpointing)
    device = models[0].device
    moments = sum(8 * p.numel() for model in models for p in model.parameters())  # of AdamW, which come later
    free, before = free_memory(device) - moments, peak_memory_gb() * 1e9
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    fits, took, each = 0, 0.0, 0.0  # sequences tried, bytes at their peak, and bytes of one more
    for count in [n for n in range(1, most + 1) if most % n == 0]:
        if fits and took + each * (count - fits) > 0.9 * free:
            break
        try:
            loss_of(count).backward()
        except torch.OutOfMemoryError:
            break
        finally:
            for model in models:
                model.zero_grad()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        total = peak_memory_gb() * 1e9 - before
        first = 0.0 if device.type == "cuda" else total  # a GPU's process survives a try too many, a CPU's does not
        fits, took, each = count, total, (total - took) / (count - fits) if fits else first
    for model in models:
        set_gradient_checkpointing(model, False)
    return max(1, min(gather([fits])))


def free_memory(device: torch.device) -> float:
    """Bytes that are still to be had on a device, roughly."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.exists():
        return next(1024.0 * int(line.split()[1]) for line in info.open() if line.startswith("MemAvailable"))
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def inputs(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Arguments of a forward pass over ids [B, T]; positions count real tokens, not padding (D2, B10).

    Without a mask [B, T], padding is on the right: no real token sees it, for attention is causal.
    """
    given = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        if mask is None:
            given["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        else:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given


LOGITS_AT_A_TIME = 2**26  # 256 MB in float32


def map_logits(function: Callable[[Tensor, Tensor], Tensor], model: Any, ids: Tensor, is_target: Tensor) -> Tensor:
    """What `function(logits [n, V], tokens [n])` says of the N tokens of ids [B, T] where is_target [B, T] is true.

    Padding of ids, if any, is on the right.
    Logits are float32; the function gives [n, ...], and all its results together are [N, ...]. A token is predicted at
    the one before it, so none in the first column is. Of tokens that are no targets hidden states alone are computed,
    and where N x V is large the function is called on chunks, again in the backward pass: no [N, V] ever exists.
    """
    is_target = is_target[:, 1:]
    index = F.pad(is_target, (0, 1)).flatten().nonzero().squeeze(1)  # [N] of the tokens before
    count, head = len(index), model.get_output_embeddings()
    chunks = max(1, math.ceil(count * head.weight.shape[0] / LOGITS_AT_A_TIME))
    width = round_up(math.ceil(count / chunks), 64)
    spare = (0, chunks * width - count)  # the first token fills up, what is made of it is dropped
    hidden = last_hidden(model, **inputs(model, ids), use_cache=False)[F.pad(index, spare)]
    tokens = F.pad(ids[:, 1:][is_target], spare)

    def of_chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
        return function(logits_of(model, hidden), tokens)

    results = []
    for chunk in zip(hidden.split(width), tokens.split(width), strict=True):
        if chunks > 1 and torch.is_grad_enabled():
            results.append(checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(of_chunk(*chunk))
    return torch.cat(results)[:count]


def last_hidden(model: Any, **given: Any) -> Tensor:
    """What a language model's output head reads, [B * T, H]: the head itself is given one token only."""
    read: list[Tensor] = []

    def keep(_: nn.Module, states: tuple[Tensor]) -> Tensor:
        read.append(states[0].flatten(0, 1))
        return states[0][:1, :1]

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(**given)
    finally:
        hook.remove()
    return read[0]


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Float32 logits [n, V] of hidden states [n, H]: the output head, and what some architectures do after it."""
    logits, config = model.get_output_embeddings()(hidden).float(), model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def head_outputs(model: Any, ids: Tensor) -> Tensor:
    """A sequence classifier's scalar head at every position of ids [B, T], padded on the right: float32 [B, T] (D1)."""
    hidden = head_inputs(model, ids)
    with torch.autocast(ids.device.type, enabled=False):  # bfloat16 would round close scores to the same number
        return model.score(hidden.float()).squeeze(-1)


def head_inputs(model: Any, ids: Tensor) -> Tensor:
    """What a sequence classifier's scalar head reads, [B, T, H], of ids [B, T] padded on the right."""
    return model.base_model(**inputs(model.base_model, ids), use_cache=False).last_hidden_state


def last_token_scores(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Raw reward [B] of right-padded ids [B, T], read at the last real token (D10), found from the mask (B20, B21)."""
    outputs = head_outputs(model, ids)
    return outputs.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)


def normalize_scores(model: Any, raw: Tensor) -> Tensor:
    """Rewards with the normalization that the reward model keeps in its configuration (D13, B18)."""
    mean, std = getattr(model.config, "reward_mean", 0.0), getattr(model.config, "reward_std", 1.0)
    return (raw - mean) / std


# ------------------------------------------------------------------------------------------------------ tensor helpers


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is 1; what is masked may be NaN or inf (B9)."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over all elements of all processes where mask is 1; 0 where there is none (B6, B8)."""
    total, count = sum_over_processes(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
    return total / count.clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of x over the masked-in elements of all processes: one element alone gives 0 (B17)."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x at unit variance over the masked-in elements of all processes, at mean 0 with `shift_mean`; 0 elsewhere."""
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_variance(x, mask) + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


def warmup_cosine(peak: float, step: int, num_steps: int, warmup_steps: int) -> float:
    """Learning rate of step 1 to `num_steps` (D6): from 0 up to `peak` in a line, then down to 0 as a cosine."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup_steps) / (num_steps - warmup_steps)))


# ------------------------------------------------------------------------------------------------------ decoding loop


@dataclasses.dataclass
class CachePosition:
    """Where in a KeyValueCache of `capacity` columns the decoding is.

    `slot` is where the next token's keys and values go: 0 for a prompt, then a tensor [1] on the device, so that a
    captured graph can move on. Attention reads the columns before `end`; those not yet written are 0 and masked.
    """

    capacity: int
    slot: int | Tensor = 0
    end: int = 0


class KeyValueCache(transformers.Cache):
    """Keys and values of all layers, [B, heads, capacity, head size] each, written in place as the sequence grows."""

    def __init__(self, position: CachePosition):
        super().__init__(layer_class_to_replicate=lambda: KeyValueLayer(position))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class KeyValueLayer(transformers.cache_utils.DynamicLayer):
    """One layer of a KeyValueCache."""

    def __init__(self, position: CachePosition):
        super().__init__()
        self.position = position  # and not the cache: a cycle would keep keys and values until a garbage collection

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, size = key_states.shape
        kind = key_states.device.type
        cast = torch.is_autocast_enabled(kind) and kind != "cpu"  # to what attention would cast them in each step
        dtype = torch.get_autocast_dtype(kind) if cast else torch.float32
        self.keys = key_states.new_zeros(rows, heads, self.position.capacity, size, dtype=dtype)
        self.values = self.keys.new_zeros(rows, heads, self.position.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(self.position.slot, int):
                stored[:, :, self.position.slot : self.position.slot + new.shape[2]] = new
            else:
                stored.index_copy_(2, self.position.slot, new.to(stored.dtype))
        return self.keys[:, :, : self.position.end], self.values[:, :, : self.position.end]

    def get_seq_length(self) -> int | Tensor:
        return self.position.slot

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.position.end, 0


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_length: int,
    stop_ids: list[int],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: torch.Generator | None = None,
    stride: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample responses: (response_ids [B, R], response_mask [B, R] with 1 up to and including the first of `stop_ids`).

    prompt_ids and prompt_mask [B, P] are padded on the left (D2). R = response_length tokens are sampled at most; what
    follows a stop token is `pad_id` (D16). Logits are divided by the temperature (D5); 0 takes the most probable token.
    top_k (0: all) and top_p (1.0: all) sample among the k most probable tokens and among the fewest that hold
    probability p (D36). Each row draws its own numbers from `rng`, on the model's device, whatever the other rows do.

    Every `stride` tokens (1 on a CPU, 32 elsewhere) the device is asked which rows have ended: these are dropped once
    they are a quarter. In between it never waits for the host, and on CUDA the steps are one captured graph.
    """
    (rows, prompt_length), device = prompt_ids.shape, prompt_ids.device
    stride = stride or (1 if device.type == "cpu" else 32)
    if model.config.model_type == "gpt_neo":  # its window would end at the last column, written or not
        stride = 1
    response_ids = torch.full((rows, response_length), pad_id, device=device)
    response_mask = torch.zeros_like(response_ids)
    uniform = torch.rand(response_length, rows, generator=rng, device=device, dtype=torch.float64)
    stops = torch.tensor(stop_ids, device=device)

    # of the b rows that are still decoded: their numbers, whether they go on, their last token, their mask [b, P + R]
    live = torch.arange(rows, device=device)
    alive, token = torch.ones_like(live, dtype=torch.bool), torch.zeros_like(live)
    mask = F.pad(prompt_mask, (0, response_length))
    t = torch.zeros(1, dtype=torch.long, device=device)  # tokens sampled so far
    position = CachePosition(prompt_length + response_length)
    cache = KeyValueCache(position)

    def choose(logits: Tensor) -> None:
        """Sample token t of the b rows from logits [b, V]."""
        # no minimum length, no repetition penalty: the log-probabilities that PPO computes know nothing of them (B11)
        sampled = sample(logits, temperature, top_k, top_p, uniform.index_select(0, t)[0, live])
        token.copy_(torch.where(alive, sampled, pad_id))
        place = live, t.expand_as(live)
        response_ids.index_put_(place, token)
        response_mask.index_put_(place, alive.long())
        mask.index_copy_(1, t + prompt_length, alive[:, None].long())
        alive.logical_and_(~torch.isin(token, stops))
        t.add_(1)

    def step() -> None:
        """Feed the last token of the b rows and sample the next one."""
        position.slot = t + (prompt_length - 1)
        given = {"input_ids": token[:, None], "attention_mask": mask[:, : position.end]}
        if takes_positions:
            given["position_ids"] = mask.sum(1, keepdim=True) - 1
        choose(last_logits(given))

    def last_logits(given: dict[str, Tensor]) -> Tensor:
        return model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    given, position.end = inputs(model, prompt_ids, prompt_mask), prompt_length
    takes_positions = "position_ids" in given
    with torch.compiler.set_stance("force_eager"):
        choose(last_logits(given))
        for start in range(1, response_length, stride):
            going_on = int(alive.sum())
            if going_on == 0:
                break
            if going_on <= 0.75 * len(live):
                kept = alive.nonzero().squeeze(1)
                live, alive, token, mask = live[kept], alive[kept], token[kept], mask[kept]
                cache.keep(kept)
            steps = min(stride, response_length - start)
            position.end = prompt_length + start + steps - 1
            repeat(step, steps, device)
    return response_ids, response_mask


def repeat(step: Callable[[], None], times: int, device: torch.device) -> None:
    """Call `step` so many times; on CUDA once, and then a captured graph of it, if the model can be captured."""
    step()
    run = step
    if device.type == "cuda" and times > 3:
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):  # Falcon and a few others ask the device something in every step
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
    for _ in range(times - 1):
        run()


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    """One token id a row, [B], by inverting the distribution's cumulative sum at uniform [B] in [0, 1).

    That takes one random number a row where `torch.multinomial` takes one a token of the vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature  # D5
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        drop = probabilities.cumsum(-1) - probabilities >= top_p  # the token that crosses top_p stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)


# --------------------------------------------------------------------------------------------------- reward functions


def load_function(spec: str, where: str) -> Callable[..., list[float]]:
    """The function named by FILE.py:FUNCTION."""
    file, _, name = spec.rpartition(":")
    ok = file.endswith(".py") and Path(file).is_file() and bool(name)
    require(ok, f"{where}: {spec!r} names no file that is there; pass FILE.py:FUNCTION")
    module_spec = importlib.util.spec_from_file_location(f"functions_of_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickle look their module up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        stop(f"{where}: {file} cannot be imported ({first_line(error)}); mend the file")
    function = getattr(module, name, None)
    require(callable(function), f"{where}: {file} has no function {name!r}; check the name")
    return function


def call_reward_function(
    function: Callable,
    where: str,
    prompts: list[str],
    completions: list[str],
    rows: list[dict],
    update: int = 0,
    timeout: float = 0,
) -> list[float]:
    """Scores of `function(prompts, completions, **columns)`; columns are the other columns of the data set, by name.

    Stop if it raises, takes longer than `timeout` seconds (0: as long as it likes) or does not return one finite number
    for each: with code 2, or 1 once training is at an update.
    """
    code = 1 if update else 2
    where = f"update {update}: {where}" if update else where
    names = {name for row in rows for name in row} - {"prompt", "prompts", "completions"}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    try:
        with time_limit(timeout, f"{where}: has not returned {len(prompts)} scores, {prompts[0]!r:.60} first,", code):
            scores = [float(s) for s in function(prompts, completions, **columns)]
    except Exception as error:
        place = f"{prompt_of(error, prompts, completions)}; mend it, it is called as f(prompts, completions, **columns)"
        stop(f"{where}: raised {first_line(error)}, {place}", code)
    if len(scores) != len(prompts):
        stop(f"{where}: returned {len(scores)} values for {len(prompts)} prompts; return one each", code)
    for prompt, score in zip(prompts, scores, strict=True):
        if not math.isfinite(score):
            stop(f"{where}: returned {score} for the prompt {prompt!r:.60}; return finite numbers", code)
    return scores


@contextlib.contextmanager
def time_limit(seconds: float, what: str, code: int) -> Iterator[None]:
    """End the process with `code` if what is within takes longer; 0 sets no limit.

    The function stays in the main thread, as signals and a GPU's choice may need it to; nothing can stop it there but
    the end of the process.
    """

    def end() -> None:
        print_line(f"error: {what} within {seconds:g} seconds; mend it or raise --reward-timeout")
        sys.stdout.flush()
        unlock_output()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def prompt_of(error: Exception, prompts: list[str], completions: list[str]) -> str:
    """Which prompt a reward function failed on: the one that its variables held; where none did, the batch's first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]  # without the caller's own
    held = [v for frame in reversed(frames) for v in frame.f_locals.values() if isinstance(v, str)]
    for texts in (prompts, completions):
        found = next((prompts[texts.index(v)] for v in held if v in texts), None)
        if found is not None:
            return f"at the prompt {found!r:.60}"
    return f"for {len(prompts)} prompts, {prompts[0]!r:.60} first"


# --------------------------------------------------------------------------------------- checkpoints and model folders


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer as an ordinary Hugging Face folder: config.json last, without which it is none."""
    part = folder / "model.part"
    with writing(folder, part):
        discard(part)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        files = [path for path in part.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "config.json"):
            target = folder / path.relative_to(part)
            target.parent.mkdir(exist_ok=True)
            move(path, target)
        discard(part)


@contextlib.contextmanager
def writing(where: Path, part: Path | None = None) -> Iterator[None]:
    """Turns a failure to write, a full disk for one, into one line and exit code 1, and removes `part` if given."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        mend = "make room; then --resume goes on from the last checkpoint"
        stop(f"{where}: cannot be written ({first_line(error)}); {mend}", code=1)


CHECKSUMS = "SHA256SUMS"  # as `sha256sum --check` reads it


def save_checkpoint(
    out: Path, step: int, models: dict[str, nn.Module], optimizer: Any, state: dict[str, Any], keep: int = 2
) -> None:
    """Write `checkpoint/STEP`: weights and optimizer as safetensors, `state` as JSON, checksums of all files.

    It gets its name once it is whole and on the disk; then all but the newest `keep` go.
    """
    final = out / "checkpoint" / f"{step:06d}"
    part = final.with_name(final.name + ".part")
    with writing(final, part):
        if final.exists() and not damage(final, models):  # a run that is interrupted right after it was saved
            return
        for path in (final, part):  # a damaged one, and what was left when it was being written
            discard(path)
        part.mkdir(parents=True)
        for name, model in models.items():
            safetensors.torch.save_model(model, str(part / f"{name}.safetensors"))
        moments = optimizer.state_dict()["state"]
        flat = {f"{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
        safetensors.torch.save_file(flat, part / "optimizer.safetensors")
        write_json(part / "state.json", {"step": step, **state})
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(part.iterdir())]
        write_text(part / CHECKSUMS, "".join(sums))
        if (out / "metrics.jsonl").exists():  # a checkpoint is never ahead of its records
            sync(out / "metrics.jsonl")
        move(part, final)
        kept = [path for path in checkpoints(out) if int(path.name) <= step][:keep]
        for path in final.parent.iterdir():
            # `checkpoint` may be a link to a folder that holds other things
            if path not in kept and re.fullmatch(r"\d{6,}(\.part)?", path.name):
                discard(path)


def sha256(path: Path) -> str:
    """A file's SHA-256 checksum in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, the newest first; what was still being written when it ended (.part) is none."""
    found = [path for path in (out / "checkpoint").glob("*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def damage(folder: Path, models: dict[str, nn.Module]) -> str | None:
    """What is wrong with a checkpoint of `models`; None if it is whole."""
    name = CHECKSUMS
    try:
        lines = (folder / name).read_text().splitlines()
        sums = {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
        for name in [*(f"{model}.safetensors" for model in models), "optimizer.safetensors", "state.json"]:
            if sha256(folder / name) != sums.get(name):
                return f"{name}: checksum differs"
    except FileNotFoundError:
        return f"{name}: is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{name}: {first_line(error)}"
    return None


def load_checkpoint(out: Path, models: dict[str, nn.Module], optimizer: Any) -> dict[str, Any] | None:
    """Restore the newest whole checkpoint into models and optimizer and return its state; None where there is none.

    Damaged ones are named and passed over; stop with code 1 if all of them are.
    """
    damaged, found = {}, checkpoints(out)
    for folder in found:
        what = damage(folder, models)
        if not what:
            break
        damaged[folder.name] = what
    else:
        if found:
            what = ", ".join(f"{name}: {what}" for name, what in damaged.items())
            mend = "restore one from a copy, or pass --overwrite to start again"
            stop(f"{out / 'checkpoint'}: no checkpoint is whole ({what}); {mend}", code=1)
        return None
    if not dist.is_initialized() or dist.get_rank() == 0:
        for name, what in damaged.items():
            print(f"checkpoint/{name} is damaged ({what}); going on from checkpoint/{folder.name}", flush=True)
    try:
        for name, model in models.items():
            safetensors.torch.load_model(model, str(folder / f"{name}.safetensors"))
    except RuntimeError as error:
        mend = "resume with the models and data of that run"
        stop(f"{folder}: does not fit the model that is trained ({first_line(error)}); {mend}")
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in safetensors.torch.load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "state.json").read_text())


def check_finite(
    out: Path, process: Process, where: str, quantities: dict[str, Any], batch: dict[str, Tensor | list]
) -> None:
    """Stop with code 1 if one of `quantities` holds NaN or infinity, so that no optimizer step is made of it.

    `where` is "step 3" or the like. `batch`, this process's tensors and lists (of token ids, say), goes to `debug/`.
    """
    for name, value in quantities.items():
        value = torch.as_tensor(value)
        if value.isfinite().all():
            continue
        what = f"{value[~value.isfinite()][0].item()} in the {name}"
        path = out / "debug" / f"{where.replace(' ', '-')}-process-{process.rank}.safetensors"
        tensors: dict[str, Tensor] = {}
        for key, part in batch.items():
            if not isinstance(part, Tensor) and part and isinstance(part[0], list):
                tensors[f"{key}_lengths"] = torch.tensor([len(row) for row in part])
                part = [x for row in part for x in row]  # one after the other
            tensors[key] = torch.as_tensor(part).detach().cpu().contiguous()
        with contextlib.suppress(OSError, safetensors.SafetensorError):  # what went wrong comes first
            path.parent.mkdir(exist_ok=True)
            safetensors.torch.save_file(tensors, path)
            write_json(path.with_suffix(".json"), {"where": where, "what": what, "process": process.rank})
        stop(f"{where}: {what}; lower --learning-rate and start again, or look at the batch in {path}", code=1)


# ------------------------------------------------------------------------------------------------------------- logging


class Logger:
    """`metrics.jsonl`, TensorBoard and, by choice, Weights & Biases, with the same names and values; main process only.

    `step_name`, "step" or "update", is what is counted; on resume, lines after `last_step` are cut off.
    """

    def __init__(self, out: Path, args: Any, process: Process, step_name: str, last_step: int = 0):
        self.active, self.step_name, self.path, self.wandb = process.is_main, step_name, out / "metrics.jsonl", None
        if not self.active:
            return
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        threading.excepthook = print_thread_error
        from torch.utils.tensorboard import SummaryWriter

        with writing(self.path):
            write_text(self.path, "".join(self.lines_until(last_step)))
            self.file = self.path.open("a", buffering=1)
            self.board = SummaryWriter(str(out), purge_step=last_step + 1)  # hides what an interrupted run did after
        self.board.add_text("args", markdown_table(["flag", "value"], [[k, str(v)] for k, v in vars(args).items()]), 0)
        if args.track:
            import wandb

            self.wandb = wandb.init(project="ppo-rlhf", config=vars(args), dir=str(out), name=out.name)

    def lines_until(self, last_step: int) -> Iterator[str]:
        """The lines of metrics.jsonl up to a step; the last one may be half a line, or anything after a power cut."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.splitlines(keepends=True):
            try:
                kept = line.endswith("\n") and json.loads(line)[self.step_name] <= last_step
            except (ValueError, TypeError, KeyError):
                return
            if kept:
                yield line

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics.jsonl and the same scalars."""
        if not self.active:
            return
        with writing(self.path):
            self.file.write(json.dumps({self.step_name: step, **metrics}) + "\n")
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # a process that is killed takes along what its threads have not written
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def table(self, step: int, name: str, header: list[str], rows: list[list[str]]) -> None:
        """Write sample texts to TensorBoard."""
        if self.active:
            self.board.add_text(name, markdown_table(header, rows), step)
            self.board.flush()

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()
            if self.wandb:
                self.wandb.finish()


def print_thread_error(args: Any) -> None:
    """A thread's traceback, but for TensorBoard's: `flush` raises its errors again where they become one line."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def save_rollout(out: Path, process: Process, update: int, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write `rollouts/000010.safetensors`: the rows of all processes, and as metadata the numbers to recompute them."""
    size = numbers["samples_per_prompt"]  # the responses to a prompt stay together
    groups = [{k: v[i : i + size].cpu() for k, v in tensors.items()} for i in range(0, len(tensors["scores"]), size)]
    groups = gather(groups)
    if process.is_main:
        path = out / "rollouts" / f"{update:06d}.safetensors"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            whole = {k: torch.cat([g[k] for g in groups]) for k in groups[0]}
            part = path.with_name(path.name + ".part")
            safetensors.torch.save_file(whole, part, {k: str(v) for k, v in numbers.items()})
            move(part, path)


def progress_bar(name: str, total: int, start: int, process: Process) -> tqdm:
    """A progress bar on the main process; where nobody watches (a log file), a line now and then."""
    seconds = 0.2 if sys.stderr.isatty() else 10
    open_bars.append(tqdm(total=total, initial=start, desc=name, disable=not process.is_main, mininterval=seconds))
    return open_bars[-1]


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose texts are shown as they are: TensorBoard would make HTML, links and images of them."""

    def escape(text: str) -> str:
        text = html.escape(visible(text))
        # as a character reference, for a backslash before another one would be none
        return re.sub(r"[\\`*_\[\]!|]", lambda match: f"&#{ord(match[0])};", text).replace("\n", "<br>")

    cells = [[escape(cell) for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def print_samples(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print sample texts as a table on the terminal."""
    table = Table(title=title, show_lines=True, title_justify="left")
    for name in header:
        table.add_column(name, no_wrap=name == "score")
    for row in rows:
        table.add_row(*[Text(visible(cell)) for cell in row])
    Console().print(table)


def peak_memory_gb() -> float:
    """Peak memory of this process so far in GB: of the GPU where there is one in use, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
