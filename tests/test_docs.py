"""The documentation says what the code does: links, flags, names, metrics and measured numbers."""

import dataclasses
import re
import sys

import pytest
from conftest import ROOT, metrics_of

import chat
import ppo_rlhf
import report
import reward_model
import sft

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables

PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += ["examples/guides/README.md", "examples/reviews/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
# torchrun, tyro, TensorBoard, sha256sum, prepare.py, hf
OTHER_TOOLS = {"nproc-per-node", "help", "logdir", "check", "out", "exclude", "dry-run"}
# of torchrun and Slurm
OTHER_TOOLS |= {"nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "max-restarts", "nodes"}
OTHER_TOOLS |= {"ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue"}
OTHER_TOOLS |= {"open-mode", "parts"}
OTHER_TOOLS |= {"setting", "seeds"}  # experiments/run.py


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 250
    assert (ROOT / "README.md").stat().st_size <= 14_336


@pytest.mark.parametrize("name", [*PAGES, "experiments/README.md"])
def test_commands_can_be_pasted(name):
    """Into zsh too, the shell of macOS, which takes `#` for a word and `>` after it for a file."""
    for block in re.findall(r"^```bash\n(.*?)^```", read(name), re.M | re.S):
        assert block.startswith("#!") or "#" not in block


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Within the project, to files and to headings."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", read(name)):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", tables.PAGES)
def test_measured_numbers_are_those_of_the_result_files(name):
    """What `python benchmarks/tables.py` would write is what stands there."""
    page = read(name)
    assert "<!-- table " in page
    assert tables.fill(page) == page


@pytest.mark.parametrize("name", PAGES)
def test_flags_exist(name):
    scripts = (sft, reward_model, ppo_rlhf, chat, report)
    fields = [field for script in scripts for field in dataclasses.fields(script.Args)]
    known = {field.name.replace("_", "-") for field in fields}
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])", read(name)))
    assert {flag.removeprefix("no-") for flag in named} <= known | OTHER_TOOLS


@pytest.mark.parametrize("name", PAGES)
def test_named_places_are_in_the_code(name):
    """`file.py: name` is a word in that file; a file in backticks is there."""
    page = read(name)
    for file, word in re.findall(r"`([\w/]+\.py): (\w+)`", page):
        assert re.search(rf"\b{word}\b", read(file)), (file, word)
    for file in re.findall(r"`((?:docs|data/support|examples|benchmarks|tests)/[\w/]+\.\w+)", page):
        assert (ROOT / file).exists(), file


def test_metrics_are_explained(chain):
    page = read("docs/metrics.md")
    groups = "objective|policy|loss|val|response|time"
    names = set(re.findall(rf'"((?:{groups})/\w+)"', read("ppo_rlhf.py"))) | {"eval/judge"}
    for out in (chain.sft, chain.reward_model, chain.ppo):
        names |= {name for row in metrics_of(out) for name in row} - {"step"}
    names = {"scores/NAME" if name.startswith("scores/") else name for name in names}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_details_and_bugs_of_the_comments_have_rows():
    """`D17` or `B14` in the code is a row of docs/details.md."""
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    rows = set(re.findall(r"^\| ([DB]\d+) \|", read("docs/details.md"), re.M))
    assert set(re.findall(r"\b[DB]\d+\b", code)) <= rows
    assert {row for row in rows if row[0] == "D"} == {f"D{n}" for n in range(1, 47)}
    assert {row for row in rows if row[0] == "B"} == {f"B{n}" for n in range(1, 48)}
