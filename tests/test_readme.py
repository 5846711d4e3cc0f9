"""The README quotes the code and the results as they are."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables

FILES = ("sft.py", "reward_model.py", "ppo_rlhf.py", "utils.py")


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_quoted_lines_are_in_the_code():
    """Every line below a formula, white space and line breaks aside."""
    code = squeezed("".join((ROOT / name).read_text(encoding="utf-8") for name in FILES))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    formulas = readme.split("## The formulas and their lines")[1].split("\n## ")[0]
    lines = [
        line
        for block in re.findall(r"```python\n(.*?)```", formulas, re.S)
        for line in block.splitlines()
    ]
    assert len(lines) > 20
    assert [line for line in lines if squeezed(line) not in code] == []


def test_linked_files_exist():
    """Links within the project, in every Markdown file of it."""
    for page in (ROOT / "README.md", ROOT / "DETAILS.md", ROOT / "examples/reviews/README.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


@pytest.mark.parametrize("name", tables.PAGES)
def test_measured_numbers_are_those_of_the_result_files(name):
    """What `python benchmarks/tables.py` would write is what stands there."""
    page = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table " in page
    assert tables.fill(page) == page
