"""docs/migration.md: every field of TRL's PPOConfig has a row, every promised name exists."""

import importlib
import inspect
import re
import shlex

import pytest
import tyro
from conftest import ROOT

PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
TRL_VERSION = "1.11.0"
PPO_CONFIG = """
learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty
sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
local_mini_batch_size mini_batch_size push_to_hub reward_model_path model_adapter_name
ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef
cliprange_value gamma lam ds3_gather_for_generation
""".split()
STAGES = ("sft", "reward_model", "ppo_rlhf", "chat", "report")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def promised_flags() -> set[tuple[str, str]]:
    """(stage, flag): of the stages that a line names, else of ppo_rlhf.py."""
    found = set()
    for line in re.sub(r"```.*?```", "", PAGE, flags=re.S).splitlines():
        named = [stage for stage in STAGES if f"{stage}.py" in line] or ["ppo_rlhf"]
        if "in all stages" in line or "`--lora-" in line:
            named = ["sft", "reward_model", "ppo_rlhf"]
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])", line):
            found |= {(stage, flag) for stage in named}
    return found


def commands() -> list[str]:
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", "")
    return [line.removeprefix("python ") for line in blocks.splitlines()]


def test_every_field_has_a_row_of_its_own():
    rows = re.findall(r"^\| `(\w+)`", section("TRL: fields").split("\nInherited")[0], re.M)
    assert [row for row in rows if row != "PPOConfig"] == PPO_CONFIG


def test_the_list_is_that_of_trl():
    trl = pytest.importorskip("trl", reason="requirements-bench.txt")
    assert trl.__version__ == TRL_VERSION and TRL_VERSION in PAGE
    config = importlib.import_module("trl.experimental.ppo").PPOConfig
    assert list(inspect.get_annotations(config)) == PPO_CONFIG


@pytest.mark.parametrize("stage, flag", sorted(promised_flags()))
def test_promised_flags_exist(stage, flag):
    fields = importlib.import_module(stage).Args.__dataclass_fields__
    assert flag.removeprefix("no-").replace("-", "_") in fields


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    script, *flags = shlex.split(command, comments=True)
    name = script.removesuffix(".py").replace("generate", "chat")  # whose command it is
    tyro.cli(importlib.import_module(name).Args, args=flags)


def test_metrics_are_those_of_the_metrics_page():
    explained = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    tables = re.split(r"\n(?=\| (?:TRL|OpenRLHF|verl) \|)", section("Metrics"))[1:]
    assert len(tables) == 3
    ours = [row.split("|")[2:] for table in tables for row in re.findall(r"^\|.*", table, re.M)]
    names = {name for cells in ours for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    names = {name for name in names if not name.startswith("--")}
    assert len(names) > 25
    assert {name for name in names if f"`{name}`" not in explained} == set()


def test_the_page_is_short():
    assert len(PAGE.encode()) < 20 * 1024
