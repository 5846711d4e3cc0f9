"""What the tests share: a very small model and data set, and fixtures that run a stage on them.

The world of these tests: somebody asks for a fruit, `Q: two ripe plums?\nA:`, and the answer names
it. Models have 2 layers of width 32, the tokenizer is a byte-level BPE with about 400 tokens, and a
stage takes about a second.
"""

import copy
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CACHE = tempfile.mkdtemp(prefix="ppo-rlhf-tests-")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_CACHE": CACHE,
    "HF_MODULES_CACHE": CACHE,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402 (it logs to the stderr of its first import: not to a test's)
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

import utils  # noqa: E402

# TensorBoard reads event files by name: second, process and this number, in which 10 is before 9.
# A run that a test breaks off goes on within a second in the same process
event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)

ROOT = Path(__file__).resolve().parents[1]
# of torchrun: on macOS the machine's own name may have no address
STANDALONE = ("--standalone", "--local-addr=127.0.0.1")
COUNTS = ["two", "three", "four", "five", "six"]
KINDS = ["ripe", "green", "small", "very large", "fresh"]
FRUITS = ["plums", "pears", "figs", "apples", "limes", "dates"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def deterministic():
    """One thread and a fixed seed: sums come out the same, whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def ctrl_c_ends_the_tests():
    """An Interruption outside of a stage leaves its handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- data


def sft_rows() -> list[dict]:
    """Answers of two lengths: a mean over rows is not a mean over tokens."""
    rows = []
    for count, kind, fruit in itertools.product(COUNTS, KINDS, FRUITS):
        long = f" Yes, {count} {kind} {fruit}, in a box of {count}."
        answer = f" Yes, {count} {fruit}." if kind == "ripe" else long
        rows.append({"prompt": f"Q: {count} {kind} {fruit}?\nA:", "completion": answer})
    return rows


def preference_rows() -> list[dict]:
    """The chosen answer says yes, the rejected one no; both may be short or long."""
    rows = []
    for i, row in enumerate(sft_rows()):
        fruit = FRUITS[i % len(FRUITS)]
        rest = f" {fruit}." if i % 2 else f" {fruit} for you, with a box of {fruit}."
        rows.append({"prompt": row["prompt"], "chosen": " Yes," + rest, "rejected": " No," + rest})
    return rows


def prompt_rows() -> list[dict]:
    """Prompts of different lengths, with a column for reward functions."""
    prompts = [("Hello! " if i % 3 == 0 else "") + r["prompt"] for i, r in enumerate(sft_rows())]
    return [{"prompt": p, "fruit": FRUITS[i % len(FRUITS)]} for i, p in enumerate(prompts)]


def as_chat(row: dict) -> dict:
    """A row of text as a row of messages."""
    role = {"prompt": "user"} | dict.fromkeys(("completion", "chosen", "rejected"), "assistant")
    chat = {k: [{"role": role[k], "content": v.strip()}] for k, v in row.items() if k in role}
    return row | chat


def write_jsonl(path: Path, rows: list) -> Path:
    """One JSON object a line; a row that is a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dumped = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in dumped), encoding="utf-8")
    return path


def write_data(folder: Path, rows: list, validation: int = 12) -> str:
    """A folder with train.jsonl and validation.jsonl, this with `validation` rows from all over."""
    step = len(rows) // validation - 1  # 11 for 150 rows, so that every kind of row is among them
    held_out = range(0, step * validation, step)
    write_jsonl(folder / "train.jsonl", [row for i, row in enumerate(rows) if i not in held_out])
    write_jsonl(folder / "validation.jsonl", [rows[i] for i in held_out])
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> SimpleNamespace:
    """Folders of the three stages' data, as text and as chat messages."""
    folder = tmp_path_factory.mktemp("data")
    kinds = {"sft": sft_rows(), "preferences": preference_rows(), "prompts": prompt_rows()}
    kinds |= {f"chat_{name}": [as_chat(row) for row in rows] for name, rows in kinds.items()}
    return SimpleNamespace(**{name: write_data(folder / name, kinds[name]) for name in kinds})


@pytest.fixture(scope="session")
def rewards(tmp_path_factory) -> str:
    """A file of reward functions."""
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(
        "def letter(prompts, completions, **columns):\n"
        "    return [c.count('e') / max(len(c), 1) for c in completions]\n"
        "def nothing(prompts, completions, **columns):\n"
        "    return [0.0] * len(completions)\n"
        "def length(prompts, completions, **columns):\n"
        "    return [float(len(c)) for c in completions]\n"
        "def fruit(prompts, completions, fruit, **columns):\n"
        "    return [float(f in c) for f, c in zip(fruit, completions, strict=True)]\n"
    )
    return str(path)


# ---- models

SPECIALS = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|end|>"]


def make_tokenizer(pad="<pad>", eos="<eos>", bos=None, chat=False, size=400):
    """A byte-level BPE trained on the rows above; `bos` is put before every text."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    flags = {"special_tokens": SPECIALS, "initial_alphabet": letters, "show_progress": False}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, **flags)
    bpe.train_from_iterator([t for row in preference_rows() for t in row.values()], trainer)
    if bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, SPECIALS.index(bos))]
        )
    others = [s for s in SPECIALS if s not in (pad, eos, bos)]
    special = {"pad_token": pad, "eos_token": eos, "bos_token": bos}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=others, **special
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, seed: int = 0, **config):
    """A random Llama of 2 layers and width 32 that fits the tokenizer."""
    torch.manual_seed(seed)
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    settings |= {"tie_word_embeddings": True, "initializer_range": 0.1, "bos_token_id": None}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings |= {"attn_implementation": "eager"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | config)).eval()


def make_gpt2(vocab_size: int = 60, eos: int = 1, **config):
    """A random GPT-2, whose learned positions tell one place from another."""
    torch.manual_seed(0)
    settings = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    settings |= {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": eos}
    config = transformers.GPT2Config(vocab_size=vocab_size, **settings | config)
    return transformers.GPT2LMHeadModel(config).eval()


def save_pair(folder: Path, model, tokenizer) -> str:
    """A model's folder as transformers writes it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    """A random language model, a new copy for each test."""
    return make_model(tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> SimpleNamespace:
    """Folders of untrained models: plain, chat (turns end in EOS), other (tokenizer and width)."""
    folder, made = tmp_path_factory.mktemp("base"), SimpleNamespace()
    kinds = {"plain": {}, "chat": {"eos": "<|end|>", "chat": True}}
    kinds["other"] = {"size": 300, "bos": "<bos>", "pad": "<eos>", "eos": "<|end|>"}
    for name, kind in kinds.items():
        tok = make_tokenizer(**kind)
        width = {"hidden_size": 24, "intermediate_size": 40} if name == "other" else {}
        setattr(made, name, save_pair(folder / name, make_model(tok, **width), tok))
    return made


# ---- stages

STAGES = ["sft", "reward_model", "ppo"]
MODULES = {"sft": "sft", "reward_model": "reward_model", "ppo": "ppo_rlhf"}
Stage = Callable[..., Path]


SEVERAL = ("dataset", "reward_fn", "reward_model")


def typed(flags: dict) -> dict:
    """Flags as the command line makes them: one data set is a tuple of one, and one reward."""
    return flags | {k: (flags[k],) for k in SEVERAL if isinstance(flags.get(k), str)}


def stage(name: str, **defaults) -> Stage:
    """`run(out, **flags)` runs the stage with these flags or the defaults, and returns `out`.

    A reward function takes the place of the default reward model.
    """
    module = importlib.import_module(MODULES[name])
    defaults |= {"device": "cpu", "dtype": "float32"}

    def run(out: Path, **flags) -> Path:
        if "reward_fn" in flags:
            flags = {"reward_model": None} | flags
        args = module.Args(**typed(defaults | flags), output_dir=str(out))
        before = copy.copy(args)
        module.main(args)
        assert args == before  # they may start another run, with one of them changed
        return out

    return run


# of the first two stages
SMALL = {"batch_size": 16, "micro_batch_size": 16, "max_length": 64}


@pytest.fixture(scope="session")
def sft(base, data) -> Stage:
    """sft.py on the small data."""
    flags = {"model": base.plain, "dataset": data.sft, "epochs": 1, "learning_rate": 1e-2}
    return stage("sft", **SMALL | flags)


@pytest.fixture(scope="session")
def reward_model(base, data) -> Stage:
    """reward_model.py on the small data."""
    flags = {"model": base.plain, "dataset": data.preferences, "normalize_with": data.sft}
    return stage("reward_model", **SMALL | flags, learning_rate=3e-3)


@pytest.fixture(scope="session")
def models(sft, reward_model, tmp_path_factory) -> SimpleNamespace:
    """Folders of the first two stages' results, `sft` and `reward_model`."""
    folder = tmp_path_factory.mktemp("models")
    trained = sft(folder / "sft", epochs=2)
    judge = reward_model(folder / "reward_model", model=str(trained))
    return SimpleNamespace(sft=trained, reward_model=judge)


@pytest.fixture(scope="session")
def ppo(models, data) -> Stage:
    """ppo_rlhf.py, two updates of 8 short responses if not told otherwise."""
    flags = {"model": str(models.sft), "reward_model": str(models.reward_model)}
    flags |= {"dataset": data.prompts, "total_episodes": 16, "batch_size": 8}
    flags |= {"micro_batch_size": 4, "num_ppo_epochs": 2, "response_length": 10}
    flags |= {"learning_rate": 1e-3, "temperature": 1.0, "kl_coef": 0.05, "eval_prompts": 4}
    return stage("ppo", **flags)


@pytest.fixture(scope="session")
def chain(models, ppo, tmp_path_factory) -> SimpleNamespace:
    """All three stages: `sft`, `reward_model` and `ppo`, the last with every rollout saved."""
    flags = {"save_rollouts": 1, "eval_every": 1, "save_every": 1, "num_mini_batches": 2}
    out = ppo(tmp_path_factory.mktemp("chain") / "ppo", **flags)
    return SimpleNamespace(sft=models.sft, reward_model=models.reward_model, ppo=out)


# ---- reading results


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(out: Path) -> list[dict]:
    return read_jsonl(out / "metrics.jsonl")


def samples_of(out: Path) -> list[dict]:
    return read_jsonl(out / "samples.jsonl")


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def args_of(out: Path) -> dict:
    return json.loads((out / "args.json").read_text())


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


TIMES = {"eps", "tokens_per_second", "time/rollout", "time/score", "time/train", "seconds"}


def without_times(row: dict) -> dict:
    """A line of metrics or a summary without what depends on the clock."""
    return {k: v for k, v in row.items() if k not in TIMES}


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Final weights, metrics and summary of two runs agree, to the bit if the tolerance is 0."""
    for (name, x), y in zip(weights_of(a).items(), weights_of(b).values(), strict=True):
        named = {"msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance, **named)
    for x, y in zip(metrics_of(a), metrics_of(b), strict=True):
        assert without_times(x) == pytest.approx(without_times(y), rel=tolerance, abs=tolerance)
    x, y = (without_times(summary_of(out)) for out in (a, b))
    if tolerance == 0:
        assert x == y


def plain_lm(folder: Path | str, auto=transformers.AutoModelForCausalLM):
    """A language model as any program would load it."""
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def plain_classifier(folder: Path | str):
    """A sequence classifier as any program would load it."""
    return plain_lm(folder, transformers.AutoModelForSequenceClassification)


@torch.no_grad()
def plain_logprobs(model, prompt: list, response: list, temperature: float = 1.0) -> np.ndarray:
    """log pi of each response token in nats: one sequence without padding, float64 softmax."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1)[torch.arange(len(response)), response].numpy()


@torch.no_grad()
def plain_scores(folder: Path | str, sequences: list[list[int]]) -> np.ndarray:
    """Normalized scores by the classifier's own forward pass, one sequence at a time."""
    model = plain_classifier(folder)
    raw = np.array([model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences])
    return (raw - model.config.reward_mean) / model.config.reward_std


def target_logits(model, ids, is_target) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] one position before each target, as the stages take them, and tokens [N]."""
    is_target = is_target[:, 1:]
    hidden, tokens = utils.hidden_states(model, ids)[:, :-1][is_target], ids[:, 1:][is_target]
    return utils.in_chunks(lambda h, t: utils.logits_of(model, h), model, hidden, tokens), tokens


class Rollout:
    """A saved rollout: arrays by name, numbers of its metadata, and what follows from the mask."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
            self.meta = file.metadata()
        tensors = self.tensors.items()
        self.a = {k: (t.double() if t.is_floating_point() else t).numpy() for k, t in tensors}
        self.real = self.a["response_mask"] == 1
        self.lengths = self.real.sum(1)

    def number(self, name: str) -> float:
        return float(self.meta[name])

    def on(self, name: str) -> bool:
        return {"True": True, "False": False}[self.meta[name]]

    def prompt(self, row: int) -> list[int]:
        return self.a["prompt_ids"][row][self.a["prompt_mask"][row] == 1].tolist()

    def response(self, row: int) -> list[int]:
        return self.a["response_ids"][row][self.real[row]].tolist()


def rollouts_of(out) -> list[Rollout]:
    return [Rollout(path) for path in sorted((out / "rollouts").iterdir())]


def rows_of(folder: str, split: str = "validation") -> list[dict]:
    return read_jsonl(Path(folder) / f"{split}.jsonl")


def change_config(folder: Path, file: str = "config.json", **changes: Any) -> str:
    """Change entries of a model's configuration; the folder, as a flag takes it."""
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def plain_loss(model, out: Path, batch: list[dict]) -> torch.Tensor:
    """A mean over completion tokens, or over pairs, in plain transformers, one row at a time."""
    losses, functions = [], torch.nn.functional
    for row in batch:
        texts = [row[side] for side in ("completion", "chosen", "rejected") if side in row]
        prompt, *sequences = sequences_of(out, [(row["prompt"], text) for text in ("", *texts)])
        first, *other = (model(input_ids=torch.tensor([ids])).logits[0] for ids in sequences)
        if other:
            losses.append(-functions.logsigmoid(first - other[0]))
        else:
            start = len(prompt) - 1  # without its EOS
            tokens = torch.tensor(sequences[0][start:])
            losses.append(functions.cross_entropy(first[start - 1 : -1], tokens, reduction="none"))
    return torch.cat(losses).mean()


def eval_loss_of(folder: Path, rows: list[dict]) -> float:
    """Cross-entropy per completion token, one row at a time, in plain transformers."""
    model, tokenizer = plain_lm(folder), transformers.AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        losses.extend(-plain_logprobs(model, prompt, completion))
    return float(np.mean(losses))


def sequences_of(out: Path, pairs: list[tuple[str, str]]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    return [tokenizer(a + b)["input_ids"] + [tokenizer.eos_token_id] for a, b in pairs]


# ---- errors


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file in a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_line(text: str) -> str:
    """The only error line in what went to stderr; a progress bar may stand on other lines."""
    lines = [line for line in text.splitlines() if "error:" in line]
    assert "Traceback" not in text
    assert len(lines) == 1, text
    assert re.fullmatch("error: .+: .+; .+", lines[0]), lines[0]
    return lines[0]


@pytest.fixture
def error_of(capsys):
    """`error_of(function, *args, code=2, **kwargs)`: the one line that the call exits with."""

    def call(function, *args, code: int = 2, **kwargs) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            function(*args, **kwargs)
        line = error_line(capsys.readouterr().err)
        assert exit_.value.code == code, line
        return line

    return call


@pytest.fixture
def refused(request, error_of, tmp_path):
    """`refused(stage, *parts, **flags)`: it exits with 2, a line with `parts`, no output."""

    def check(name: str, *parts: str, **flags) -> None:
        out = tmp_path / "out"
        before = out.exists(), snapshot(out)
        line = error_of(request.getfixturevalue(name), out, **flags)
        for part in parts:
            assert part in line, line
        assert (out.exists(), snapshot(out)) == before

    return check


def command(*args: str) -> subprocess.CompletedProcess:
    """A script as one runs it, without the note that torch prints on every macOS."""
    flags = {"capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([sys.executable, *args], cwd=ROOT, **flags)
    lines = result.stderr.splitlines(keepends=True)
    result.stderr = "".join(x for x in lines if "Redirects are currently not supported" not in x)
    return result
