"""Seconds per update, and of its parts, by ppo_rlhf.py and by TRL 1.11.0 on identical work.

Each run is a process of its own with one update to warm up and then measured ones; the two take
turns, A B A B. Beside that: rollouts against `model.generate`, the train step against the machine's
matrix product, start-up, and how the cost of an update grows with the batch and with the response.
Needs `pip install -r requirements-bench.txt`; W3 the models that benchmarks/embedded.py makes, W4
SmolLM2-135M.

    python benchmarks/throughput.py    # writes benchmarks/results/throughput.json and scaling.png
    python benchmarks/throughput.py --parts W2 rollout --rounds 3
    python benchmarks/throughput.py --dtypes float32    # a processor without bfloat16 instructions

| | model | batch | prompt, response tokens | |
|---|---|---|---|---|
| W1 | Llama of 3.1M parameters, random | 64 | 16, 48 | no response ends early |
| W2 | the same | 64 | 16, 48 | responses end at random, at 40% of the maximum on average |
| W3 | the embedded task's | 128 | the task's, 64 at most | its defaults |
| W4 | SmolLM2-135M | 32 | film reviews, 24 | |
| W5 | Pythia-1B's shape, random, on a GPU | 512 | 512, 53 | |
| W6 | Qwen2.5-0.5B's shape, random, on a GPU | 256 | 64, 512 | |

All have 4 epochs and 1 mini-batch. The learning rate is next to 0, so that models, and with them
lengths, stay as they are. TRL gets its models as transformers loads them. W5 and W6 are measured by
benchmarks/gpu.py.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from measure import ROOT, machine, run_process
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(ROOT))
import dataset
import encoding
import generate
import saving
import utils

PARTS = ("W1", "W2", "W3", "W4", "rollout", "scaling", "startup")
PHASES = ("rollout", "score", "train")
PLACES = ("model", "reward-model", "dataset")  # flags that no result file names
PAD, EOS = 0, 1
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
# what ppo_rlhf.py does beside its updates, as little of it as there can be
BESIDE = ["--save-every", "0", "--eval-every", "0", "--eval-prompts", "8", "--overwrite"]


@dataclass
class Args:
    parts: tuple[str, ...] = PARTS
    """What to measure."""
    rounds: int = 3
    """Turns of each side."""
    updates: int = 3
    """Updates measured in each turn."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions; W4 and scaling are measured in the last one only."""
    threads: int = 2
    """Threads of each process."""
    models: Path = Path("runs/embedded/seed1")
    """Folder with the sft and reward_model of the embedded task."""
    smollm2: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """SmolLM2-135M: a hub id or a folder."""
    reviews: Path = Path("data/reviews")
    """What examples/reviews/prepare.py wrote."""
    runs: Path = Path("runs/throughput")
    """Where models and runs go."""
    out: Path = Path("benchmarks/results")
    """Folder of the result files."""


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    path = args.out / "throughput.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    here = machine(args.threads) | versions
    if report.get("machine") != here:
        if report and set(args.parts) < set(PARTS):
            sys.exit(f"{path} is of another machine or commit; pass another --out, or all parts")
        report = {"machine": here}
    for part in args.parts:
        if part.startswith("W"):
            for dtype in args.dtypes[-1:] if part == "W4" else args.dtypes:
                report[f"{part} {dtype}"] = compare(args, part, dtype)
                print(part, dtype, json.dumps(report[f"{part} {dtype}"]["medians"]), flush=True)
        else:
            report[part] = {"rollout": rollout, "scaling": scaling, "startup": startup}[part](args)
            print(part, json.dumps(report[part]), flush=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


# ---------------------------------------------------------------------------------------- workloads


def random_model(
    folder: Path, config: Any, prompt_tokens: int, mean_length: float | None, most: int
) -> None:
    """Write policy, reward model and prompts: random weights, and a word for each token.

    Responses are `mean_length` tokens long on average where the maximum is `most`; None: none ends
    early. Embeddings have a large first number, which the output head reads only for the EOS token:
    its logit is nearly constant.
    """
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, config.vocab_size)}
    bare = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(1)
    config.num_labels = 1
    # a CPU draws 40 million numbers in a second
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        classifier = transformers.AutoModelForSequenceClassification.from_config(config)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids = torch.randint(2, config.vocab_size, (8, 64))
    with torch.no_grad():
        head = model.get_output_embeddings()
        model.get_input_embeddings().weight[:, 0] = 1.0
        head.weight[:, 0] = head.weight[EOS] = 0.0
        given = utils.model_inputs(model, ids, torch.ones_like(ids))
        others = model(**given).logits.logsumexp(-1).mean()
        low, high = 1e-12, 1.0 - 1e-6  # probability of EOS at each step
        while mean_length and high - low > 1e-6:
            middle = (low + high) / 2
            longer = (1 - (1 - middle) ** most) / middle > mean_length
            low, high = (middle, high) if longer else (low, middle)
        logit = others + torch.logit(torch.tensor(low, dtype=torch.float64))
        head.weight[EOS, 0] = logit / utils.hidden_states(model, ids)[:, :, 0].mean()
    for each, name in ((model, "model"), (classifier, "reward_model")):
        saving.save_model(each, tokenizer, ROOT / folder / name)
    rng = torch.Generator().manual_seed(1)
    (ROOT / folder / "prompts").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", 1024), ("validation", 8)):
        ids = torch.randint(2, config.vocab_size, (rows, prompt_tokens), generator=rng).tolist()
        lines = (json.dumps({"prompt": " ".join(f"w{i}" for i in row)}) + "\n" for row in ids)
        (ROOT / folder / "prompts" / f"{split}.jsonl").write_text("".join(lines))


def small_llama() -> Any:
    """3.1M parameters as a language model, 2.8M with a head of one output."""
    return transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **SPECIAL,
    )


def pythia_1b() -> Any:
    """The shape of Pythia-1B."""
    return transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **SPECIAL,
    )


def qwen_half_b() -> Any:
    """The shape of Qwen2.5-0.5B as a Llama, without its biases and with a head of its own."""
    return transformers.LlamaConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **SPECIAL,
    )


def workload(args: Args, name: str, config: Any = None) -> dict[str, Any]:
    """Flags of a workload; what it needs is made. `config` takes the place of W5's or W6's."""
    folder = args.runs / name
    flags: dict[str, Any] = {"model": folder / "model", "reward-model": folder / "reward_model"}
    flags |= {"dataset": folder / "prompts", "temperature": 1.0, "kl-coef": 0.05}
    flags |= {"missing-eos-penalty": 1.0, "num-ppo-epochs": 4}
    flags |= {"learning-rate": 1e-12, "micro-batch-size": 32}
    if name in ("W1", "W2"):
        flags |= {"batch-size": 64, "response-length": 48}
        random_model(folder, small_llama(), 16, 19.2 if name == "W2" else None, 48)
    elif name == "W3":
        flags |= {"model": args.models / "sft", "reward-model": args.models / "reward_model"}
        flags |= {"dataset": "data/support/prompts", "temperature": 0.5, "kl-coef": 0.1}
        flags |= {"batch-size": 128, "response-length": 64}
    elif name == "W4":
        flags |= {"model": args.smollm2, "dataset": args.reviews / "prompts"}
        flags |= {"batch-size": 32, "response-length": 24}
        torch.manual_seed(1)
        judge = utils.load_classifier(args.smollm2, torch.device("cpu"))
        judge.score.weight.data.normal_(std=0.02)
        tokenizer = encoding.load_tokenizer(args.smollm2)
        saving.save_model(judge, tokenizer, ROOT / folder / "reward_model")
    elif name == "W5":
        if not is_made(folder):
            random_model(folder, config or pythia_1b(), 512, None, 53)
        flags |= {"batch-size": 512, "response-length": 53}
        flags |= {"micro-batch-size": 32, "device": "cuda"}
    else:
        if not is_made(folder):
            random_model(folder, config or qwen_half_b(), 64, None, 512)
        flags |= {"batch-size": 256, "response-length": 512}
        flags |= {"micro-batch-size": 16, "device": "cuda"}
    return flags


def is_made(folder: Path) -> bool:
    """Whether `random_model` has written all of it."""
    return (ROOT / folder / "prompts/validation.jsonl").exists()


def written(flags: dict[str, Any]) -> list[str]:
    """The flags as words of a command line."""
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


# ---------------------------------------------------------------------------------- against another


def compare(args: Args, name: str, dtype: str) -> dict[str, Any]:
    """Updates by ppo_rlhf.py and by TRL in turn.

    Medians of their seconds and phases, tokens per second, memory; how much faster, by turn.
    """
    flags = workload(args, name) | {"dtype": dtype}
    flags["total-episodes"] = flags["batch-size"] * (1 + args.updates)
    own = {"ppo_rlhf.py": BESIDE, "benchmarks/trl_ppo.py": []}
    turns: dict[str, list[list[dict]]] = {script: [] for script in own}
    memory: dict[str, list[float]] = {script: [] for script in own}
    ceilings = []
    for _ in range(args.rounds):
        ceilings.append(ceiling(torch.device("cpu")))
        for script, extra in own.items():
            out = args.runs / name / Path(script).stem
            command = [script, *written(flags), *extra, "--output-dir", str(out)]
            measured = run_process(command, args.threads)
            memory[script].append(measured["peak_memory_gb"])
            turns[script].append(measured_updates(out))
    rows = {script: sum(each, []) for script, each in turns.items()}
    medians: dict[str, Any] = {}
    seconds: dict[str, list[list[float]]] = {}
    for script, measured in rows.items():
        medians[script] = {"update": statistics.median(map(update_seconds, measured))}
        for phase in PHASES:
            medians[script][phase] = statistics.median(row[f"time/{phase}"] for row in measured)
        medians[script]["peak_memory_gb"] = max(memory[script])
        seconds[script] = [[row[f"time/{phase}"] for phase in PHASES] for row in measured]
    ours, theirs = medians.values()
    our_rows = rows["ppo_rlhf.py"]
    ours["tokens_per_second"] = statistics.median(row["tokens_per_second"] for row in our_rows)
    ours["response_length"] = statistics.mean(row["response/length"] for row in our_rows)
    ours["train_gflops"] = train_gflop(flags, our_rows) / ours["train"]
    by_turn = medians["speedup_by_turn"] = [
        statistics.median(map(update_seconds, b)) / statistics.median(map(update_seconds, a))
        for a, b in zip(*turns.values(), strict=True)
    ]
    medians["speedup"] = statistics.median(by_turn)
    shown = {flag: str(value) for flag, value in flags.items() if flag not in PLACES}
    rates = {dtype: statistics.median(each[dtype] for each in ceilings) for dtype in ceilings[0]}
    return {"flags": shown, "medians": medians, "ceiling": rates, "seconds": seconds}


def measured_updates(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl but for the first, in which it warmed up."""
    lines = (ROOT / out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def ceiling(device: torch.device, size: int = 2048) -> dict[str, float]:
    """10^9 operations per second of torch's product of two square matrices."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        seconds = median_seconds(lambda a=a, b=b: a @ b, device)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds / 1e9
    return rates


def median_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median of 20 calls."""
    seconds = []
    for _ in range(20):
        started = utils.now(device)
        function()
        seconds.append(utils.now(device) - started)
    return statistics.median(seconds)


def update_seconds(row: dict[str, Any]) -> float:
    """Seconds of an update, all phases together."""
    return sum(row[f"time/{phase}"] for phase in PHASES)


def train_gflop(flags: dict[str, Any], rows: list[dict]) -> float:
    """Matrix products of an update's training, in 10^9 operations, padding not counted.

    Six for each weight and token. Each epoch passes prompt and response through policy and value
    model; the output head sees only the responses.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / flags["model"])
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight.numel()
    body = sum(m.weight.numel() for m in linear if m is not model.get_output_embeddings())
    tokens = statistics.mean(row["tokens_per_second"] * update_seconds(row) for row in rows)
    responses = statistics.mean(row["response/length"] for row in rows) * flags["batch-size"]
    return 6 * flags["num-ppo-epochs"] * (2 * body * tokens + head * responses) / 1e9


def rollout(args: Args) -> dict[str, Any]:
    """Tokens per second, up to EOS, of the decoding loop and of `model.generate`."""
    report = {}
    for name in ("W1", "W3"):
        by_dtype = beside_generate(workload(args, name), args.dtypes, 24, warm_up=3)
        report |= {f"{name} {dtype}": rates for dtype, rates in by_dtype.items()}
    return report


def prompts_of(flags: dict[str, Any]) -> tuple[str, Any, list[encoding.Prompt]]:
    """A workload's model folder, its tokenizer, and the prompts of one batch."""
    folder = str(ROOT / flags["model"])
    tokenizer = encoding.load_tokenizer(folder)
    data = dataset.load_data(str(ROOT / flags["dataset"]), "train", dataset.PROMPT_FORMATS)
    return folder, tokenizer, encoding.encode_prompts(tokenizer, data, 512)[: flags["batch-size"]]


def beside_generate(
    flags: dict[str, Any], dtypes: tuple[str, ...], turns: int, warm_up: int
) -> dict[str, Any]:
    """Tokens per second of `generate.generate` and `model.generate`, by dtype.

    They take turns in one process; medians of those after the first ones, which warm up. In
    bfloat16 `model.generate` has weights in bfloat16, with which it is faster than under autocast.
    """
    report = {}
    folder, tokenizer, prompts = prompts_of(flags)
    device = torch.device(flags.get("device", "cpu"))
    model = utils.load_causal_lm(folder, device)
    pad, stop = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids, mask = encoding.pad([p.ids for p in prompts], pad, "left", device)
    R, temperature = flags["response-length"], flags["temperature"]
    ours = {"pad_id": pad, "temperature": temperature}
    theirs = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    theirs |= {"max_new_tokens": R, "eos_token_id": stop, "pad_token_id": pad}
    for dtype in dtypes:
        # of the head's products on a GPU, as in a run
        torch.backends.cuda.matmul.allow_tf32 = dtype == "bfloat16"
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        rates: dict[str, list[float]] = {"generate": [], "model.generate": []}
        for turn in range(turns):
            started = utils.now(device)
            with utils.autocast(device, dtype):
                uniform = generate.random_numbers(len(ids), R, utils.generator(device, turn))
                _, real = generate.generate(model, ids, mask, uniform, [stop], **ours)
            rates["generate"].append(real.sum().item() / (utils.now(device) - started))
            torch.manual_seed(turn)
            transformers.AttentionInterface.register("sdpa", sdpa_attention_forward)  # its own
            torch.backends.cuda.enable_cudnn_sdp(True)
            started = utils.now(device)
            with torch.no_grad():
                texts = plain.generate(input_ids=ids, attention_mask=mask, **theirs)
            seconds = utils.now(device) - started
            transformers.AttentionInterface.register("sdpa", utils.attention)
            torch.backends.cuda.enable_cudnn_sdp(False)
            ended = (texts[:, ids.shape[1] :] == stop).cumsum(1)
            tokens = (ended == 0).sum() + (ended[:, -1] > 0).sum()
            rates["model.generate"].append(tokens.item() / seconds)
        medians = {who: statistics.median(rate[warm_up:]) for who, rate in rates.items()}
        ratio = medians["generate"] / medians["model.generate"]
        report[dtype] = {"tokens_per_second": medians, "ratio": ratio}
    return report


# ------------------------------------------------------------------------------------ by themselves


def scaling(args: Args) -> dict[str, Any]:
    """Seconds per update of W1 as the batch and as the response grow 2 and 4 times; also drawn."""
    base = workload(args, "W1") | {"dtype": args.dtypes[-1]}
    out = args.runs / "W1/scaling"
    report: dict[str, Any] = {}
    for flag in ("batch-size", "response-length"):
        seconds: dict[str, list[float]] = {}
        # in turn, so that a slow minute of the machine falls on all
        for factor in (1, 2, 4) * args.rounds:
            flags = base | {flag: base[flag] * factor}
            flags["total-episodes"] = flags["batch-size"] * (1 + args.updates)
            command = ["ppo_rlhf.py", *written(flags), *BESIDE, "--output-dir", str(out)]
            run_process(command, args.threads)
            times = map(update_seconds, measured_updates(out))
            seconds.setdefault(str(flags[flag]), []).extend(times)
        report[flag] = {size: statistics.median(times) for size, times in seconds.items()}
        report[flag]["growth"] = report[flag][str(4 * base[flag])] / report[flag][str(base[flag])]
    plot_scaling(report, args.out / "scaling.png")
    return report


def plot_scaling(report: dict[str, Any], path: Path) -> None:
    """Seconds against size, and the line of proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for axis, (flag, by_size) in zip(axes, report.items(), strict=True):
        points = [(int(size), seconds) for size, seconds in by_size.items() if size != "growth"]
        sizes, seconds = zip(*points, strict=True)
        axis.plot(sizes, seconds, "o-", label="measured")
        proportional = [seconds[0] * size / sizes[0] for size in sizes]
        axis.plot(sizes, proportional, "--", color="gray", label="proportional")
        axis.set(xlabel=f"--{flag}", ylabel="seconds per update", ylim=(0, None), xlim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def startup(args: Args) -> dict[str, float]:
    """Seconds of `ppo_rlhf.py --help`, and until the embedded task's first update is logged."""
    ppo = [sys.executable, "ppo_rlhf.py"]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([*ppo, "--help"], cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    report = {"help": statistics.median(seconds)}
    out, seconds = args.runs / "startup", []
    metrics = ROOT / out / "metrics.jsonl"
    flags = {"model": args.models / "sft", "reward-model": args.models / "reward_model"}
    command = [*ppo, *written(flags | {"output-dir": out}), "--overwrite"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet["env"] = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for _ in range(5):
        metrics.unlink(missing_ok=True)
        started = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, **quiet) as run:
            while not (metrics.exists() and metrics.stat().st_size):
                if run.poll() is not None:
                    sys.exit("ppo_rlhf.py ended before its first update")
                time.sleep(0.05)
            seconds.append(time.perf_counter() - started)
            run.kill()
    return report | {"first_update": statistics.median(seconds)}


if __name__ == "__main__":
    main(tyro.cli(Args))
