"""Runs stages in processes of their own and kills them: `python kill_runs.py PLAN.json`.

The plan, which test_resume.py writes, is a list of chains: a stage's module, its flags, and the
moments to kill it at, one after the other, each time to be continued by --resume; at the end it is
let through. A moment is a pattern for files in the output folder, at whose appearance it is killed,
or null: any time. The processes are forks of this one, which has imported all that takes long.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)
for name in ("sft", "reward_model", "ppo_rlhf"):
    importlib.import_module(name)
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from torch.utils.tensorboard import SummaryWriter  # noqa: E402, F401


def run(module: str, flags: dict, log: Path) -> None:
    """The stage, in this process, with a slow disk: kills then meet it while it saves."""
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.002), fsync(descriptor))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        stage = importlib.import_module(module)
        stage.main(stage.Args(**flags))
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def start(module: str, flags: dict, log: Path) -> int:
    """The process id of a new process that runs the stage."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        run(module, flags, log)
    return child


def ended(child: int) -> bool:
    """Whether it has come to its end by itself, which must be a good one."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done and status:
        raise SystemExit(f"ended with {os.waitstatus_to_exitcode(status)}")
    return bool(done)


def kill(child: int, out: Path, pattern: str | None, seconds: float) -> bool:
    """Kill a process when it begins a file of the pattern, or after so many seconds.

    False if it ended before.
    """
    begun, until = time.time(), time.monotonic() + (60 if pattern else seconds)
    while not ended(child):
        found = pattern and any(is_newer(path, begun) for path in out.glob(pattern))
        if found or time.monotonic() > until:
            time.sleep(seconds / 100 if pattern else 0)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            return os.WIFSIGNALED(status)
        time.sleep(0.0002)
    return False


def is_newer(path: Path, moment: float) -> bool:
    """Whether a file was written after a moment; the one before may have been killed at it too."""
    try:
        return path.stat().st_mtime > moment
    except FileNotFoundError:
        return False


def main(plan: list[dict]) -> None:
    chance = random.Random(1)
    for chain in plan:
        out, resume, kills = Path(chain["flags"]["output_dir"]), False, 0
        log = out.with_name(out.name + ".log")
        for pattern in chain["moments"]:
            for _ in range(5):
                child = start(chain["module"], chain["flags"] | {"resume": resume}, log)
                resume = kill(child, out, pattern, chance.random() * chain["seconds"])
                if resume:
                    kills += 1
                    break
                shutil.rmtree(out)  # it ended first, so nothing is to be continued: once more
        child = start(chain["module"], chain["flags"] | {"resume": True}, log)
        while not ended(child):
            time.sleep(0.01)
        print(out.name, kills, "kills")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
