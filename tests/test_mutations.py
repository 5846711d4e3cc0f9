"""The tests of known bugs and details fail with the bug put in: one mutation at a time, in a copy of the project."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_details
import test_known_bugs
from conftest import ROOT
from mutations import MUTATIONS, Mutation

STAGES = ("sft.py", "reward_model.py", "ppo_rlhf.py", "utils.py")


def names_of(module) -> set[str]:
    return {
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("test_")
    }


def test_each_known_bug_and_each_detail_has_a_test():
    """B1 to B22 and D1 to D37, by name."""
    bugs = {
        int(m[1]) for name in names_of(test_known_bugs) if (m := re.match(r"test_b(\d+)_", name))
    }
    assert bugs == set(range(1, 23))
    details = {
        int(m[1]) for name in names_of(test_details) if (m := re.match(r"test_d(\d+)_", name))
    }
    assert details == set(range(1, 38))


def test_each_of_these_tests_has_a_mutation_that_fits():
    """The mutated line stands in the code exactly once, so that none goes stale unseen."""
    named = {mutation.test.split("::")[1].split("[")[0] for mutation in MUTATIONS}
    numbered = {
        name
        for name in names_of(test_known_bugs) | names_of(test_details)
        if re.match(r"test_[bd]\d\d_", name)
    }
    assert named == numbered
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation


def run_with(mutation: Mutation, folder: Path) -> subprocess.CompletedProcess:
    """The mutation's test, run by pytest in a copy of the project that has the mutation."""
    for name in (*STAGES, "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / mutation.file
    path.write_text(
        path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Runs of all mutations that were asked for, as many at a time as there are cores."""
    items = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = [item.params["mutation"] for item in items if item and "mutation" in item.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            mutation: pool.submit(run_with, mutation, tmp_path_factory.mktemp("copy"))
            for mutation in chosen
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda mutation: re.search("[bd][0-9]{2}_.+", mutation.test)[0]
)
def test_the_test_fails_with_the_bug_put_in(mutation, runs):
    """And it passes without, which `make test` shows."""
    run = runs[mutation].result()
    assert run.returncode == 1, run.stdout[
        -2000:
    ]  # 1: tests failed; anything else: they could not run
    assert f"FAILED tests/{mutation.test.split('[')[0]}" in run.stdout
