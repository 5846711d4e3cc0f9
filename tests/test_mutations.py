"""The tests of known bugs and details fail with the bug put in.

One mutation at a time, in a copy of the project.
"""

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

NAMES = {name for name in {*dir(test_known_bugs), *dir(test_details)} if name.startswith("test_")}


def test_each_known_bug_and_each_detail_has_a_test():
    """B1 to B22 and D1 to D46, by name."""
    numbers = {m[1] for name in NAMES if (m := re.match(r"test_([bd]\d\d)_", name))}
    details = {f"d{n:02d}" for n in (*range(1, 43), 45, 46)}
    assert numbers == {f"b{n:02d}" for n in range(1, 23)} | details


def test_each_of_these_tests_has_a_mutation_that_fits():
    """What is mutated stands in the code exactly once, so that none goes stale unseen."""
    named = {mutation.test.split("::")[1].split("[")[0] for mutation in MUTATIONS}
    assert named == {name for name in NAMES if re.match(r"test_[bd]\d\d_", name)}
    for mutation in MUTATIONS:
        source = (ROOT / mutation.file).read_text(encoding="utf-8")
        assert mutation.apply(source)[1] == 1, mutation


def test_a_mutation_fits_however_the_code_is_laid_out():
    """Line breaks, white space and trailing commas make no difference; other names do."""
    mutation = Mutation("", "", "f(a, b[1:]) - 1", "g(a)")
    assert mutation.apply("x = f(\n    a,\n    b[1 :],\n) - 1  # x") == ("x = g(a)  # x", 1)
    assert mutation.apply("x = ff(a, b[1:]) - 1 + f(a, b[1:]) - 12")[1] == 0


def run_with(mutation: Mutation, folder: Path) -> subprocess.CompletedProcess:
    """The mutation's test, run by pytest in a copy of the project that has the mutation."""
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / mutation.file
    mutated, _ = mutation.apply(path.read_text(encoding="utf-8"))
    path.write_text(mutated, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
    flags = {"capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **flags)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Runs of all mutations that were asked for, as many at a time as there are cores."""
    items = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = [item.params["mutation"] for item in items if item and "mutation" in item.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = tmp_path_factory.mktemp
        yield {m: pool.submit(run_with, m, folder("copy")) for m in chosen}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda mutation: mutation.test.split("_", 2)[-1]
)
def test_the_test_fails_with_the_bug_put_in(mutation, runs):
    """And it passes without, which `make test` shows."""
    run = runs[mutation].result()
    # 1: tests failed; anything else: they could not run
    assert run.returncode == 1, run.stdout[-2000:]
    assert f"FAILED tests/{mutation.test.split('[')[0]}" in run.stdout
