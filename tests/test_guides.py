"""examples/guides: a loop in pseudocode and a listing for TRL, each by its one command, offline."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT, args_of, metrics_of, rollouts_of, summary_of

GUIDES = ROOT / "examples" / "guides"


def load(name):
    spec = importlib.util.spec_from_file_location(f"guides_{name}", GUIDES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: str, runs: Path, *flags: str) -> Path:
    """A script as one runs it, from another folder; returns where its results are."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(GUIDES / script), "tiny", "--eval-prompts", "64", *flags]
    env = os.environ | {"PATH": path, "RUNS": str(runs)}
    done = subprocess.run(command, cwd=runs, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return runs / "tiny"


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """Results of trl.sh, beside the models that pseudocode.sh then finds."""
    return run("trl.sh", tmp_path_factory.mktemp("guides"))


@pytest.mark.slow
def test_trl_with_the_length_as_reward(trl):
    """The flags are the listing's, and responses become longer."""
    flags = args_of(trl / "length")
    wanted = {"batch_size": 16, "num_ppo_epochs": 4, "response_length": 50, "reward_model": []}
    assert {name: flags[name] for name in wanted} == wanted
    assert all(row["response/length"] <= 50 for row in metrics_of(trl / "length"))
    result = summary_of(trl / "length")["eval"]
    assert result["policy"]["score"] > 1.15 * result["reference"]["score"]
    assert result["policy"]["length"] > result["reference"]["length"]


@pytest.mark.slow
def test_trl_with_a_trained_reward_model(trl):
    """It takes the place of the length, and the score rises."""
    assert args_of(trl / "score")["reward_model"] == [str(trl / "reward-model")]
    assert args_of(trl / "score")["reward_fn"] == []
    result = summary_of(trl / "score")["eval"]
    assert result["policy"]["score"] > result["reference"]["score"] + 0.3


@pytest.mark.slow
def test_pseudocode(trl):
    """Advantages are scores minus their mean; one step a batch, from where the ratio is 1."""
    out = run("pseudocode.sh", trl.parent, "--total-episodes", "64", "--save-rollouts", "1")
    rollouts = rollouts_of(out / "pseudocode")
    assert len(rollouts) == 4
    for rollout in rollouts:
        scores = rollout.a["scores"]
        wanted = np.broadcast_to((scores - scores.mean())[:, None], rollout.real.shape)
        np.testing.assert_allclose(
            rollout.a["advantages"][rollout.real], wanted[rollout.real], atol=1e-5
        )
    for row in metrics_of(out / "pseudocode"):
        assert row["val/ratio"] == pytest.approx(1)
        assert row["policy/clipfrac_avg"] == 0
        assert row["objective/kl_coef"] == 0


def test_the_tiny_model_is_a_gpt2(tmp_path):
    """Of plain transformers, with a tokenizer that gives every text back."""
    load("make_tiny_gpt2").main(str(tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(model, transformers.GPT2LMHeadModel)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id
    text = "Customer: My caf\u00e9 fan broke.\nAgent:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_length_is_in_characters():
    assert load("length").length(prompts=["a", "b"], completions=["", "four"], product=[1, 2]) == [
        0.0,
        4.0,
    ]
