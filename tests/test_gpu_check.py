"""benchmarks/gpu_check.py, where next to nothing is installed."""

import subprocess
import sys
from pathlib import Path

import packaging
from conftest import ROOT


def test_all_that_is_missing_is_said_in_one_line(tmp_path):
    """On somebody else's machine: no traceback at the first import that fails."""
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    command = [sys.executable, "-S", "benchmarks/gpu_check.py", "--dry-run"]
    environment = {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [line.split(">")[0] for line in lines if not line.startswith("#")] + ["pytest"]
    assert len(names) > 5
    assert all(name in run.stderr for name in names)
    assert run.stderr.count("(there is none)") == len(names)
