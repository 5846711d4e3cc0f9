"""How an update of ppo_rlhf.py scales over processes: measured on a CPU, and on paper on GPUs.

    python benchmarks/scaling.py    # writes benchmarks/results/scaling.json
    python benchmarks/scaling.py --parts measure --no-fsdp

`measure` runs a random Llama of 34M parameters, each process with one thread, by turns as: one
process with the whole batch; one with half; two apart, started together, with half each; two of
torchrun with the whole, plain and with --fsdp. No response ends early, so two apart do the same
arithmetic with both cores busy, but send nothing and wait for nobody. What torchrun takes beyond
them is communication that nothing hides, with the waiting and copying for it.

`paper` measures nothing: it computes memory and seconds on GPUs from `Inputs`.
"""

import dataclasses
import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from measure import ROOT, machine, run_process
from memory import MODELS, SMALL, Shape, Work, llama, needed
from throughput import BESIDE, PHASES, measured_updates, random_model, update_seconds, written


@dataclass
class Args:
    parts: tuple[str, ...] = ("paper", "measure")
    """What to do; the file keeps the rest."""
    fsdp: bool = True
    """Measure --fsdp too."""
    rounds: int = 2
    """Turns of all ways."""
    updates: int = 3
    """Updates of a turn, after one to warm up."""
    out: Path = Path("benchmarks/results")
    """Folder of the result file."""


RUNS = Path("runs/scaling")


def measure(args: Args) -> dict:
    """Median seconds per update and phase of each way."""
    random_model(RUNS, llama(SMALL), 32, None, 32)
    flags = {"model": RUNS / "model", "reward-model": RUNS / "reward_model"}
    flags |= {"dataset": RUNS / "prompts", "response-length": 32, "micro-batch-size": 8}
    flags |= {"learning-rate": 1e-9, "dtype": "bfloat16", "device": "cpu", "batch-size": 32}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ways = {  # words before the script, batch size, words after, how many
        "1 process": ([], 32, [], 1),
        "1 process, half the batch": ([], 16, [], 1),
        "2 apart, half the batch each": ([], 16, [], 2),
        "2 processes": (torchrun, 32, [], 1),
    }
    if args.fsdp:
        ways["2 processes, `--fsdp`"] = (torchrun, 32, ["--fsdp"], 1)
    rows = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (before, batch, after, count) in ways.items():
            some = flags | {"batch-size": batch, "total-episodes": batch * (1 + args.updates)}
            outs = [RUNS / f"out{i}" for i in range(count)]
            command = [*before, "ppo_rlhf.py", *written(some), *BESIDE, *after, "--output-dir"]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda out, c=command: run_process([*c, str(out)], 1), outs))
            rows[name] += [row for out in outs for row in measured_updates(out)]
    named = {flag: x for flag, x in flags.items() if not isinstance(x, Path)}
    report = {"machine": machine(1), "flags": named, "ways": {}}
    for name, measured in rows.items():
        way = {"update": statistics.median(map(update_seconds, measured))}
        way |= {p: statistics.median(row[f"time/{p}"] for row in measured) for p in PHASES}
        report["ways"][name] = way
    return report


SHAPES = {
    "Llama-3.2-1B": Shape(*MODELS["Llama-3.2-1B"]),
    "Llama-2-7B": Shape(32000, 4096, 11008, 32, 4096, False),
    "Llama-3.1-8B": Shape(128256, 4096, 14336, 32, 1024, False),
    "Llama-2-13B": Shape(32000, 5120, 13824, 40, 5120, False),
    "Llama-3.1-70B": Shape(128256, 8192, 28672, 80, 1024, False),
}


@dataclass(frozen=True)
class Inputs:
    """The work, an H100's data sheet, and the shares of it taken as reached."""

    batch: int = 512
    prompt: int = 512
    response: int = 512
    epochs: int = 4
    micro_batch: int = 8
    gpu_gb: float = 80
    usable: float = 0.9
    tflops: float = 989  # bfloat16, dense
    of_tflops: float = 0.3
    hbm: float = 3350  # GB/s
    of_hbm: float = 0.6
    nvlink: float = 450  # GB/s each way
    nic: float = 50  # GB/s of each GPU to other machines: 400 Gb/s
    gpus_per_machine: int = 8
    of_links: float = 0.7


# DeepSpeed-Chat's model, A100s, hours of 264,292 responses; ours
PUBLISHED = (
    ("OPT-6.7B", 8, 4.1, "Llama-2-7B"),
    ("OPT-13B", 64, 1.25, "Llama-2-13B"),
    ("OPT-66B", 64, 7.5, "Llama-3.1-70B"),
)
A100 = {"tflops": 312, "hbm": 2039, "nvlink": 300, "nic": 25}


def on_paper(i: Inputs, model: str, gpus: int, fsdp: bool, advantage: str = "gae") -> dict:
    """GB per GPU and, if that fits, seconds per update, activations recomputed."""
    shape, length, value = SHAPES[model], i.prompt + i.response, advantage == "gae"
    policy = shape.products + (1 if shape.tied else 2) * shape.embedding
    classifier = shape.products + shape.embedding
    trained = policy + value * classifier
    # bytes when gathered: layers in bfloat16; policy, value model, and with them the frozen two
    whole = 2 * shape.products + 4 * (policy - shape.products)
    whole_trained = whole + value * (2 * shape.products + 4 * shape.embedding)
    whole_all = whole_trained + whole + 2 * shape.products + 4 * shape.embedding

    # bytes, from the parts of memory.py's formula
    work = Work(shape, 0, 0, i.prompt, i.response, advantage)
    kept, rollout = needed(work), 0
    steps = needed(work._replace(micro_batch=i.micro_batch)) - kept
    if fsdp:  # whole: in a rollout the policy; in training two layers, embedding, head
        kept = (kept - 2 * shape.products * (1 + value)) / gpus
        rollout = whole
        steps += 12 * shape.products / shape.layers + 8 * (policy - shape.products)
    cache = 4 * shape.layers * shape.key_value * length  # of a sequence
    rows, room = math.ceil(i.batch / gpus), 1e9 * i.usable * i.gpu_gb - kept
    at_once = min(rows, int((room - rollout) // cache))  # sequences decoded together
    fits = steps <= room and at_once > 0
    gb = (kept + max(steps, rollout + cache * (at_once if fits else 1))) / 1e9
    result = {"model": model, "gpus": gpus, "fsdp": fsdp, "advantage": advantage, "gb": gb}
    if not fits:
        return result

    # seconds
    flops, hbm = gpus * i.tflops * i.of_tflops * 1e12, i.hbm * i.of_hbm * 1e9
    link = min(i.nvlink, i.nic * i.gpus_per_machine) if gpus > i.gpus_per_machine else i.nvlink

    def move(size: float) -> float:
        """Seconds to gather or scatter these bytes."""
        return size * (gpus - 1) / gpus / (link * i.of_links * 1e9)

    parts, tokens = math.ceil(rows / i.micro_batch), i.batch * length
    read = 2 * shape.products + 4 * shape.embedding  # the head is in float32
    read += at_once * cache * (i.prompt + i.response / 2) / length
    step = max(read / hbm, 2 * policy * at_once * gpus / flops)
    decode = math.ceil(rows / at_once) * i.response * step + 2 * policy * i.batch * i.prompt / flops
    score = 2 * (trained + policy + classifier) * tokens / flops
    train = i.epochs * 8 * trained * tokens / flops  # 6, and 2 to recompute activations
    if fsdp:  # hidden behind arithmetic, but for the gathering before a rollout
        sent = [move(whole), parts * move(whole_all)]
        sent.append(i.epochs * parts * move(2 * whole_trained + 4 * trained))
        shown = sent[0] + max(0, sent[1] - score) + max(0, sent[2] - train)
    else:  # beside the backward pass of an epoch's last micro-batch
        sent = [i.epochs * 2 * move(4 * trained)]
        shown = max(0, sent[0] - train * 6 / 8 / parts)
    train += i.epochs * 28 * trained / (gpus if fsdp else 1) / hbm  # AdamW: 4 reads, 3 writes
    times = {"decode": decode, "score": score, "train": train, "communication": shown}
    return result | times | {"sent": sum(sent), "update": sum(times.values())}


def paper() -> dict:
    i = Inputs()
    main = ("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B")
    cases = [(model, gpus, fsdp) for model in main for gpus in (8, 32) for fsdp in (False, True)]
    cases.insert(6, ("Llama-3.1-8B", 8, True, "rloo"))
    # bytes per parameter: 36 of four models, sharded, and 2 of the policy; all else 6 GB
    largest = {n: (i.usable * i.gpu_gb - 6) / (36 / n + 2) for n in (8, 32, 128)}
    other = dataclasses.replace(i, batch=1024, prompt=256, response=256, epochs=1, **A100)
    published = [
        {"theirs": theirs, "seconds": hours * 3600 * 1024 / 264_292} | on_paper(other, m, n, True)
        for theirs, n, hours, m in PUBLISHED
    ]
    rows = [on_paper(i, *case) for case in cases]
    numbers = {"rows": rows, "largest_billions": largest, "published": published}
    return numbers | {"inputs": dataclasses.asdict(i)}


def main(args: Args) -> None:
    path = ROOT / args.out / "scaling.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        report[part] = paper() if part == "paper" else measure(args)
        path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
