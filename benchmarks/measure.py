"""What the benchmarks share: a stage run as a process, the machine, intervals, files."""

import contextlib
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# the 97.5% point of Student's t, by the number of seeds; of more it is less
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}


def run_process(
    command: list[str], threads: int, folder: Path = ROOT, log: Path | None = None
) -> dict:
    """Run a script of the project with its flags in a folder, as a process of its own.

    Its wall and CPU seconds, start-up included, and its peak resident memory in GB. What it prints
    goes to `log`, if any.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.time()
    with contextlib.nullcontext() if log is None else log.open("w") as file:
        whole = [sys.executable, *command]
        process = subprocess.Popen(whole, cwd=folder, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it has been waited for
    if status:
        sys.exit(f"{command[0]} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "wall_seconds": time.time() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_gb": usage.ru_maxrss * unit / 1e9,
    }


def run_stage(command: list[str], threads: int) -> dict:
    """Run a stage, such as ["sft.py", "--output-dir", "runs/sft"].

    Its summary.json and what `run_process` measures.
    """
    measured = run_process(command, threads)
    folder = command[command.index("--output-dir") + 1]
    return json.loads((ROOT / folder / "summary.json").read_text()) | measured


def machine(threads: int) -> dict:
    """Commit, processor, of x86 its bfloat16 instructions, threads, Python's version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    words = {word for line in lines if line.startswith("flags") for word in line.split()}
    commit = ""
    if shutil.which("git"):
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    # the commit is empty outside a clone
    facts: dict = {"commit": commit, "processor": next(names, platform.processor())}
    if words:
        facts["bfloat16_instructions"] = sorted(words & {"avx512_bf16", "amx_bf16"})
    return facts | {"threads": threads, "python": platform.python_version()}


def interval(differences: list[float]) -> list[float]:
    """95% interval of their mean over seeds, of which there are two at least, by Student's t.

    A bootstrap of three seeds would hold the mean in three of four cases only.
    """
    mean, error = statistics.mean(differences), statistics.stdev(differences)
    half = STUDENT.get(len(differences), 2.262) * error / math.sqrt(len(differences))
    return [mean - half, mean + half]


def load_module(path: str) -> ModuleType:
    """A Python file of the project that no import reaches, by its path from the root."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep_samples(run: Path, out: Path, count: int) -> None:
    """Copy the first lines of a run's samples.jsonl to the result file `out`."""
    lines = (ROOT / run / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[:count]), encoding="utf-8")
