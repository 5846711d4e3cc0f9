"""What only a GPU can show, in parts: each writes `gpu-PART.json` into benchmarks/results.

    make gpu                                # benchmarks/gpu.sh 1, 2 and 3: all parts
    python benchmarks/gpu.py W6             # one part
    python benchmarks/gpu.py W6 --dry-run   # small sizes on a CPU, into runs/gpu: does it all work?

| part | what |
|---|---|
| tests | `pytest -m gpu` |
| embedded | the three stages on the embedded task, by default flags |
| ceilings | the card's matrix product and memory bandwidth |
| resume | a run killed with -9 and resumed, beside a whole one; needs what `embedded` makes |
| W5, W6 | updates of ppo_rlhf.py: seconds, share of the matrix product, peak memory |
| W6-compile | W6 with --compile |
| W5-trl | the work of W5 by TRL, at the same micro-batch |
| W6-trl | the same of W6, with 32 responses an update on both sides: TRL keeps all their logits |
| rollout | tokens per second on W6, beside `model.generate` |
| vllm | the same by vLLM, where it is installed |
| memory | peak of W6 with --gradient-checkpointing beside the formula of benchmarks/memory.py |

W5 and W6 are described in benchmarks/throughput.py.
"""

import importlib.metadata
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import memory
import throughput
import torch
import transformers
import tyro
from measure import ROOT, machine, run_stage

import utils

# runs a script of the project and leaves its peak of allocated bytes in the file of argv[1]
WITH_PEAK = """
import os, resource, runpy, sys, torch
peak, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu = torch.cuda.is_available()
    open(peak, "w").write(str(torch.cuda.max_memory_allocated() if gpu else host))
"""


@dataclass
class Args:
    part: tyro.conf.Positional[str]
    dry_run: bool = False
    """Small sizes on a CPU; results go into runs/gpu."""

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def runs(self) -> Path:
        return Path("runs/gpu/dry" if self.dry_run else "runs/gpu")


def main(args: Args) -> None:
    if args.part not in PARTS:
        sys.exit(f"error: {args.part}: is no part; pass one of {', '.join(PARTS)}")
    (ROOT / args.runs).mkdir(parents=True, exist_ok=True)
    started = time.time()
    folder = ROOT / (args.runs if args.dry_run else "benchmarks/results")
    result = folder / f"gpu-{args.part}.json"
    result.unlink(missing_ok=True)  # a part that fails leaves none
    report = PARTS[args.part](args)
    report = {"machine": machine(2) | versions(), "part_seconds": time.time() - started} | report
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(args.part, json.dumps(report), flush=True)
    sys.exit(report.get("exit_code", 0))


def versions() -> dict[str, str]:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    names = [name for name in ("torch", "transformers", "trl", "vllm") if find_spec(name)]
    return {"card": card} | {name: importlib.metadata.version(name) for name in names}


def tests(args: Args) -> dict[str, Any]:
    """How many of the tests for GPUs passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-vv"]
    command += ["--tb=short", "-p", "no:cacheprovider", "--durations=5"]
    both, said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}, ""
    with subprocess.Popen(command, cwd=ROOT, text=True, **both) as run:
        for line in run.stdout:
            print(line, end="", flush=True)  # at once: the part may be out of time
            said += line
    summaries = re.findall(r"^=*.*\d (?:passed|failed|skipped|error).*$", said, re.M)
    return {"exit_code": run.returncode, "summary": (summaries or ["none"])[-1]}


def embedded(args: Args) -> dict[str, Any]:
    """The three stages as `make demo` runs them."""
    report, out = {}, args.runs / "embedded"
    less = {"sft": "--train-split train[:320]", "reward_model": "--train-split train[:320]"}
    less["ppo_rlhf"] = "--total-episodes 256 --eval-prompts 8"
    for stage in ("sft", "reward_model", "ppo_rlhf"):
        flags = ["--output-dir", str(out / stage), "--overwrite", "--device", args.device]
        if stage != "sft":
            flags += ["--model", str(out / "sft")]
        if stage == "ppo_rlhf":
            flags += ["--reward-model", str(out / "reward_model")]
        if args.dry_run:
            flags += less[stage].split()
        report[stage] = run_stage([f"{stage}.py", *flags], 2)
    report["wall_seconds"] = sum(run["wall_seconds"] for run in report.values())
    return report


def ceilings(args: Args) -> dict[str, Any]:
    """10^12 operations per second of a product of two square matrices, 10^9 bytes per second."""
    size, numbers = (512, 2**20) if args.dry_run else (8192, 2**30)
    device = torch.device(args.device)
    rates = {dtype: rate / 1e3 for dtype, rate in throughput.ceiling(device, size).items()}
    x = torch.zeros(numbers, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    seconds = throughput.median_seconds(lambda: y.copy_(x), device)
    return {"tflops": rates, "gb_per_second": 2 * numbers / seconds / 1e9}


def work(args: Args, name: str) -> dict[str, Any]:
    """Flags of W5 or W6, of a dry run with a small model and few responses."""
    paths = throughput.Args(runs=args.runs)
    if not args.dry_run:
        return throughput.workload(paths, name) | {"dtype": "bfloat16"}
    config = {"W5": throughput.pythia_1b, "W6": throughput.qwen_half_b}[name]()
    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config.update(small | {"layer_types": ["full_attention"] * 2})
    flags = throughput.workload(paths, name, config)
    flags |= {"batch-size": 16, "micro-batch-size": 8, "response-length": 16}
    return flags | {"device": "cpu", "dtype": "bfloat16"}


def updates(
    args: Args, name: str, flags: dict[str, Any], script: str, *extra: str
) -> dict[str, Any]:
    """Medians of the measured updates of a workload with its flags, and the peak of its memory."""
    count = 3 if args.part == "W6" else 2  # the first of them is not measured
    flags = flags | {"total-episodes": flags["batch-size"] * count}
    out, peak = args.runs / name / Path(script).stem, ROOT / args.runs / "peak"
    command = [sys.executable, "-c", WITH_PEAK, str(peak), script]
    command += [*throughput.written(flags), *extra, "--output-dir", str(out)]
    torch.cuda.empty_cache()  # of models that were made here
    subprocess.run(command, cwd=ROOT, check=True)
    rows = throughput.measured_updates(out)
    seconds = {p: statistics.median(row[f"time/{p}"] for row in rows) for p in throughput.PHASES}
    shown = {flag: str(x) for flag, x in flags.items() if flag not in throughput.PLACES}
    report = {"flags": shown, "seconds": seconds | {"update": sum(seconds.values())}}
    report["peak_memory_gb"] = int(peak.read_text()) / 1e9
    if script == "ppo_rlhf.py":
        tflops = throughput.train_gflop(flags, rows) / seconds["train"] / 1e3
        of = ceilings(args)["tflops"]["bfloat16"]
        report |= {"train_tflops": tflops, "ceiling_tflops": of, "share": tflops / of}
    print(script, json.dumps(report), flush=True)  # what comes after it may fail
    return report


def ours(args: Args) -> dict[str, Any]:
    name, _, compiled = args.part.partition("-")
    extra = [*throughput.BESIDE, *(["--compile"] if compiled else [])]
    return updates(args, name, work(args, name), "ppo_rlhf.py", *extra)


def trl(args: Args) -> dict[str, Any]:
    if find_spec("trl") is None:
        return {"left_out": "trl"}
    name, report = args.part.removesuffix("-trl"), {}
    flags = work(args, name)
    if name == "W6":
        flags["batch-size"] = min(32, flags["batch-size"])
        report["ours"] = updates(args, name, flags, "ppo_rlhf.py", *throughput.BESIDE)
    at_once = str(min(128, flags["batch-size"]))  # of W5's 512 keys and values would be 76 GB
    extra = ["--rollout-batch-size", at_once]
    return report | {"trl": updates(args, name, flags, "benchmarks/trl_ppo.py", *extra)}


def rollout(args: Args) -> dict[str, Any]:
    """The decoding loop beside `model.generate`, on the same prompts and lengths."""
    return throughput.beside_generate(work(args, "W6"), ("bfloat16",), turns=3, warm_up=1)


def vllm(args: Args) -> dict[str, Any]:
    if find_spec("vllm") is None:
        return {"left_out": "vllm"}
    return {"tokens_per_second": with_vllm(work(args, "W6"))}


def with_vllm(flags: dict[str, Any]) -> float:
    from vllm import LLM, SamplingParams

    _, _, prompts = throughput.prompts_of(flags)
    llm = LLM(str(ROOT / flags["model"]), dtype="bfloat16", gpu_memory_utilization=0.6)
    length, rates = flags["response-length"], []
    # ids are all that the others give
    how = SamplingParams(temperature=flags["temperature"], max_tokens=length, detokenize=False)
    for _ in range(3):
        started = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": p.ids} for p in prompts], how)
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        rates.append(tokens / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def peak_memory(args: Args) -> dict[str, Any]:
    """On a CPU the libraries count too, so a dry run says nothing of the formula."""
    flags, extra = work(args, "W6"), [*throughput.BESIDE, "--gradient-checkpointing"]
    flags["batch-size"] = min(64, flags["batch-size"])  # sooner done
    measured = updates(args, "W6", flags, "ppo_rlhf.py", *extra)
    config = transformers.AutoConfig.from_pretrained(ROOT / flags["model"])
    key_value = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size)
    shape = memory.Shape(*sizes, config.num_hidden_layers, key_value, tied=False)
    batch = (flags["batch-size"], flags["micro-batch-size"])
    given = memory.Work(shape, *batch, 64, flags["response-length"])
    at_a_time = utils.logits_at_a_time(torch.device(args.device))  # of what is free without the run
    needed = memory.needed(given, logits_at_a_time=at_a_time)
    return {"predicted_gb": needed / 1e9, "measured_gb": measured["peak_memory_gb"]}


def resume(args: Args) -> dict[str, Any]:
    """The largest difference of a metric between a whole run and one that was killed.

    Beside that between two whole runs: kernels of a GPU may add numbers in any order.
    """
    models, out = args.runs / "embedded", args.runs / "resume"
    flags = ["--model", str(models / "sft"), "--reward-model", str(models / "reward_model")]
    flags += ["--total-episodes", "1024", "--save-every", "2", "--eval-prompts", "8"]
    flags += ["--device", args.device]

    def command(folder: str, *more: str) -> list[str]:
        return [sys.executable, "ppo_rlhf.py", *flags, "--output-dir", str(out / folder), *more]

    for name in ("whole", "again"):
        subprocess.run(command(name, "--overwrite"), cwd=ROOT, check=True)
    shutil.rmtree(ROOT / out / "killed", ignore_errors=True)  # checkpoints of a run before
    with subprocess.Popen(command("killed", "--overwrite"), cwd=ROOT) as run:
        checkpoint = ROOT / out / "killed" / "checkpoint/000004/SHA256SUMS"
        while run.poll() is None and not checkpoint.exists():
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
    subprocess.run(command("killed", "--resume"), cwd=ROOT, check=True)
    whole, *others = (
        throughput.measured_updates(out / name) for name in ("whole", "killed", "again")
    )
    times = ("time/", "eps", "tokens_per_second")

    def largest(rows: list[dict[str, Any]]) -> float:
        pairs = list(zip(whole, rows, strict=True))
        names = [name for name in whole[0] if not name.startswith(times)]
        return max(abs(a[name] - b[name]) for a, b in pairs for name in names)

    killed, again = map(largest, others)
    report = {"killed_with": run.returncode, "updates": len(whole) + 1}
    return report | {"largest": killed, "largest_of_two_whole_runs": again}


PARTS: dict[str, Callable[[Args], dict[str, Any]]] = {
    "tests": tests,
    "embedded": embedded,
    "ceilings": ceilings,
    "W5": ours,
    "W6": ours,
    "W5-trl": trl,
    "W6-trl": trl,
    "W6-compile": ours,
    "rollout": rollout,
    "vllm": vllm,
    "memory": peak_memory,
    "resume": resume,
}

if __name__ == "__main__":
    main(tyro.cli(Args))
