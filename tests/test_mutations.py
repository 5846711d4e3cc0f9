"""The tests of known bugs and details fail with the bug put in: one mutation at a time, in a copy of the project."""

import inspect
import os
import re
import shutil
import subprocess
import sys

import pytest
import test_details
import test_known_bugs
from conftest import ROOT
from mutations import MUTATIONS

STAGES = ("sft.py", "reward_model.py", "ppo_rlhf.py", "utils.py")


def names_of(module) -> set[str]:
    return {name for name, value in inspect.getmembers(module, inspect.isfunction) if name.startswith("test_")}


def test_each_known_bug_and_each_detail_has_a_test():
    """B1 to B22 and D1 to D37, by name."""
    bugs = {int(m[1]) for name in names_of(test_known_bugs) if (m := re.match(r"test_b(\d+)_", name))}
    assert bugs == set(range(1, 23))
    details = {int(m[1]) for name in names_of(test_details) if (m := re.match(r"test_d(\d+)_", name))}
    assert details == set(range(1, 38))


def test_each_of_these_tests_has_a_mutation_that_fits():
    """The mutated line stands in the code exactly once, so that none goes stale unseen."""
    named = {mutation.test.split("::")[1].split("[")[0] for mutation in MUTATIONS}
    numbered = {
        name for name in names_of(test_known_bugs) | names_of(test_details) if re.match(r"test_[bd]\d\d_", name)
    }
    assert named == numbered
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: re.search(r"test_(.+)", m.test)[1])
def test_the_test_fails_with_the_bug_put_in(mutation, tmp_path):
    """And it passes without, which `make test` shows."""
    for name in STAGES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1, run.stdout[-2000:]  # 1: tests failed; anything else: they could not run
    assert re.search(r"\b\d+ failed\b", run.stdout)
