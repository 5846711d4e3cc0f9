"""What the benchmarks share: a stage run as a process of its own, and the name of the machine."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_stage(command: list[str], threads: int) -> dict:
    """Run a stage, such as ["sft.py", "--output-dir", "runs/sft"].

    Returns its summary.json with wall seconds, start-up included, and peak resident memory in GB.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.time()
    pid = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment).pid
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {"wall_seconds": time.time() - started, "peak_memory_gb": usage.ru_maxrss * unit / 1e9}
    folder = command[command.index("--output-dir") + 1]
    return json.loads((ROOT / folder / "summary.json").read_text()) | measured


def machine(threads: int) -> dict:
    """The processor's name, the threads in use and Python's version."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {"processor": next(names, platform.processor()), "threads": threads, "python": platform.python_version()}
