"""The three stages through `main(args)`, on a model small enough that a run takes a fraction of a second."""

import ast
import html
import importlib
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    as_chat,
    assert_same_run,
    eval_loss_of,
    make_model,
    make_tokenizer,
    metrics_of,
    plain_classifier,
    plain_lm,
    plain_logprobs,
    preference_rows,
    prompt_rows,
    rows_of,
    save_pair,
    sft_rows,
    summary_of,
    weights_of,
    write_data,
    write_jsonl,
)
from safetensors.torch import load_file

import utils

STAGES = ["sft", "reward_model", "ppo"]
PPO_METRICS = set(
    """update episode lr eps objective/kl objective/entropy objective/non_score_reward objective/scores
    objective/rlhf_reward objective/kl_coef policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg
    loss/value_avg val/clipfrac_avg val/ratio val/ratio_var val/num_eos_tokens val/explained_variance response/length
    response/eos_rate grad_norm time/rollout time/score time/train tokens_per_second""".split()
)


@pytest.fixture
def stage(request):
    """The fixture that runs the stage named by the parameter."""
    return request.getfixturevalue(request.param)


def board_of(out: Path) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Scalars, by name and step, and the last text of each name that TensorBoard finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    tags = board.Tags()
    scalars: dict[str, dict[int, float]] = {}
    for name in tags["scalars"]:
        events = board.Scalars(name)
        assert len({e.step for e in events}) == len(events), f"{name} has two values for a step"
        scalars[name] = {e.step: e.value for e in events}
    names = [name for name in tags["tensors"] if name.endswith("/text_summary")]
    texts = {
        n.removesuffix("/text_summary"): board.Tensors(n)[-1].tensor_proto.string_val[0].decode()
        for n in names
    }
    return scalars, texts


def assert_board_has_metrics(out: Path, step_name: str) -> dict[str, str]:
    """Every number of metrics.jsonl and no other; returns the texts."""
    scalars, texts = board_of(out)
    expected: dict[str, dict[int, float]] = {}
    for row in metrics_of(out):
        step = row.pop(step_name)
        for name, value in row.items():
            expected.setdefault(name, {})[step] = value
    assert scalars.keys() == expected.keys()
    for name, values in expected.items():
        assert scalars[name] == pytest.approx(values, rel=1e-6, abs=1e-12), name
    return texts


# --------------------------------------------------------------------------------------------------------------- flags

FLAGS = {
    "all": """model dataset train_split eval_split output_dir overwrite resume seed device dtype learning_rate
        micro_batch_size max_grad_norm gradient_checkpointing save_every eval_every track trust_remote_code""",
    "sft": "epochs batch_size max_length warmup_ratio",
    "reward_model": "epochs batch_size max_length normalize_with",
    "ppo_rlhf": """reward_model reward_fn eval_reward_fn total_episodes batch_size num_mini_batches num_ppo_epochs
        response_length temperature top_k top_p stop_token missing_eos_penalty kl_coef kl_estimator kl_target kl_horizon
        gamma lam cliprange cliprange_value vf_coef entropy_coef whiten_rewards whiten_advantages advantage
        samples_per_prompt target_kl reward_clip critic_warmup_updates ptx_coef ptx_dataset eval_prompts
        save_rollouts""",
}


@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo_rlhf"])
def test_flags_have_the_names_of_the_contract(name):
    """Every flag exists, and each has the docstring that `--help` shows."""
    module = importlib.import_module(name)
    names = [field.name for field in fields(module.Args)]
    assert {*names} >= {*FLAGS["all"].split(), *FLAGS[name].split()}
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    body = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"
    ).body
    assert [node.target.id for node in body[::2]] == names
    assert all(isinstance(node, ast.Expr) and node.value.value.strip() for node in body[1::2])


# --------------------------------------------------------------------------------------------- what every run leaves


def test_every_stage_leaves_the_files_of_the_contract(chain):
    """Models, arguments, metrics, summary, events and, for PPO, samples, rollouts and a checkpoint."""
    for out in (chain.sft, chain.reward_model, chain.ppo):
        for name in (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "args.json",
            "metrics.jsonl",
            "summary.json",
        ):
            assert (out / name).is_file(), f"{out.name}: {name}"
        assert len(list(out.glob("events.out.tfevents.*"))) == 1
        assert not list(out.glob("*.part"))
        assert (out / "summary.json").is_file()
    assert sorted(p.name for p in (chain.ppo / "rollouts").iterdir()) == [
        "000001.safetensors",
        "000002.safetensors",
    ]
    assert (chain.ppo / "samples.jsonl").is_file()
    assert [p.name for p in (chain.ppo / "checkpoint").iterdir()] == ["000001"]


def test_args_json_holds_every_flag(chain):
    """The flags of the run, those left at their defaults too."""
    import ppo_rlhf
    import reward_model
    import sft

    for module, out in (
        (sft, chain.sft),
        (reward_model, chain.reward_model),
        (ppo_rlhf, chain.ppo),
    ):
        saved = json.loads((out / "args.json").read_text())
        assert saved == asdict(module.Args(**saved))
        assert saved["output_dir"] == str(out)


def test_summaries_have_the_keys_of_the_contract(chain):
    """No key more, no key less, and each a number."""
    summary = summary_of(chain.sft)
    assert summary.keys() == {"eval_loss", "perplexity", "seconds"}
    assert summary["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))
    summary = summary_of(chain.reward_model)
    names = {
        "accuracy",
        "accuracy_interval",
        "pairs",
        "mean_margin",
        "score_length_correlation",
        "seconds",
    }
    assert summary.keys() == names
    assert summary["pairs"] == 12
    summary = summary_of(chain.ppo)
    assert summary.keys() == {"updates", "episodes", "seconds", "eval"}
    assert (summary["updates"], summary["episodes"]) == (2, 16)
    assert summary["eval"].keys() == {"prompts", "reference", "policy", "win_rate", "win_rate_by"}
    assert (summary["eval"]["prompts"], summary["eval"]["win_rate_by"]) == (4, "score")
    for name in ("reference", "policy"):
        assert summary["eval"][name].keys() == {"score", "judge", "kl", "length", "eos_rate"}
        assert summary["eval"][name]["judge"] is None


def test_ppo_metrics_have_the_names_of_the_contract(chain):
    """One line an update, every name in each, every value a finite number."""
    rows = metrics_of(chain.ppo)
    assert [row["update"] for row in rows] == [1, 2]
    assert [row["episode"] for row in rows] == [8, 16]
    for row in rows:
        assert row.keys() >= PPO_METRICS
        assert all(math.isfinite(v) for v in row.values())
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4])  # D6: linear to 0


def test_sft_and_reward_model_metrics(chain):
    """One line a step: 138 rows in sixteens make 9 steps an epoch; the learning rate falls to 0 as a cosine (D6)."""
    for out, steps, peak, warmup in ((chain.sft, 18, 1e-2, 1), (chain.reward_model, 9, 3e-3, 0)):
        rows = metrics_of(out)
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(row.keys() >= {"loss", "lr", "grad_norm", "tokens_per_second"} for row in rows)
        cosine = [
            peak * 0.5 * (1 + math.cos(math.pi * i / (steps - warmup)))
            for i in range(steps - warmup)
        ]
        assert [row["lr"] for row in rows] == pytest.approx([peak] * warmup + cosine)


def test_tensorboard_holds_the_metrics(chain):
    """The same names and values as metrics.jsonl, and the flags as text."""
    for out, step_name in (
        (chain.sft, "step"),
        (chain.reward_model, "step"),
        (chain.ppo, "update"),
    ):
        texts = assert_board_has_metrics(out, step_name)
        assert "batch_size" in html.unescape(texts["args"])


def test_tensorboard_holds_sample_texts(chain):
    """Held-out prompts with both responses, as in samples.jsonl, escaped."""
    _, texts = board_of(chain.ppo)
    samples = [json.loads(line) for line in (chain.ppo / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        row = [
            utils.markdown_table([sample[k].strip()], []).splitlines()[0][2:-2]
            for k in ("reference", "policy")
        ]
        assert all(cell in texts["samples"] for cell in row)


def test_samples_agree_with_the_summary(chain, data):
    """samples.jsonl has the held-out prompts in order; means and win rate of the summary follow from it."""
    samples = [json.loads(line) for line in (chain.ppo / "samples.jsonl").read_text().splitlines()]
    assert [s["prompt"] for s in samples] == [row["prompt"] for row in rows_of(data.prompts)[:4]]
    evaluation = summary_of(chain.ppo)["eval"]
    for name in ("reference", "policy"):
        assert evaluation[name]["score"] == pytest.approx(
            np.mean([s[f"{name}_score"] for s in samples])
        )
    wins = [
        (s["policy_score"] > s["reference_score"])
        + 0.5 * (s["policy_score"] == s["reference_score"])
        for s in samples
    ]
    assert evaluation["win_rate"] == pytest.approx(np.mean(wins))
    assert evaluation["reference"]["kl"] == pytest.approx(0, abs=1e-5)


def test_models_load_with_plain_transformers(chain):
    """No class of this project is needed; the reward's normalization is in the configuration (B18)."""
    from transformers import AutoTokenizer

    for out in (chain.sft, chain.ppo):
        tokenizer = AutoTokenizer.from_pretrained(out)
        ids = tokenizer("Q: two ripe figs?\nA:", return_tensors="pt")
        text = plain_lm(out).generate(**ids, max_new_tokens=4, do_sample=False)
        assert text.shape[1] > ids["input_ids"].shape[1]
    classifier = plain_classifier(chain.reward_model)
    assert classifier.config.num_labels == 1
    assert classifier.config.reward_mean != 0
    assert classifier.config.reward_std == 1
    assert classifier.score.weight.abs().sum() > 0
    assert {w.dtype for w in weights_of(chain.ppo).values()} == {torch.float32}


# ---------------------------------------------------------------------------------- what must not change the result


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_a_run_is_reproducible(stage, tmp_path):
    """D7: the same seed gives the same run to the bit, another seed another one."""
    a, b, c = (stage(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert_same_run(a, b)
    assert any(
        not torch.equal(x, y)
        for x, y in zip(weights_of(a).values(), weights_of(c).values(), strict=True)
    )


@pytest.mark.parametrize("stage", STAGES, indirect=True)
@pytest.mark.parametrize("size", [1, 2])
def test_the_micro_batch_size_changes_nothing(stage, size, tmp_path):
    """D9, B12, B22: one row at a time gives what the whole batch at once gives, the smaller last batch included."""
    flags = {"batch_size": 8, "learning_rate": 1e-3}
    a, b = (
        stage(tmp_path / "a", micro_batch_size=8, **flags),
        stage(tmp_path / "b", micro_batch_size=size, **flags),
    )
    assert_same_run(a, b, tolerance=1e-5)


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_auto_is_the_largest_micro_batch_that_fits(stage, monkeypatch, tmp_path):
    """All 8 where there is room, and where there is next to none 1."""
    a, b = (
        stage(tmp_path / "a", batch_size=8, micro_batch_size="auto"),
        stage(tmp_path / "b", batch_size=8, micro_batch_size=8),
    )
    assert_same_run(a, b)
    found = []
    search = utils.largest_micro_batch

    def recorded(*args):
        found.append(search(*args))
        return found[-1]

    monkeypatch.setattr(utils, "largest_micro_batch", recorded)
    monkeypatch.setattr(utils, "free_memory", lambda device: 0)
    stage(tmp_path / "c", batch_size=8, micro_batch_size="auto")
    assert found == [1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_compiling_changes_rounding_alone(stage, tmp_path):
    """--compile: the same numbers in float32; the saved model is an ordinary one."""
    a, b = stage(tmp_path / "a"), stage(tmp_path / "b", compile=True)
    assert_same_run(a, b, tolerance=1e-4)


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_gradient_checkpointing_changes_nothing(stage, tmp_path):
    """Less memory, the same numbers."""
    a, b = stage(tmp_path / "a"), stage(tmp_path / "b", gradient_checkpointing=True)
    assert_same_run(a, b, tolerance=1e-6)


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_looking_changes_nothing(stage, request, tmp_path):
    """Evaluations, checkpoints and saved rollouts do not touch the random numbers or the model."""
    look = {"eval_every": 1, "save_every": 1}
    if stage is request.getfixturevalue("ppo"):
        look["save_rollouts"] = 1
    a, b = stage(tmp_path / "a", eval_every=0, save_every=0), stage(tmp_path / "b", **look)
    for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True):
        assert torch.equal(x, y)
    assert all(any("eval" in key for key in row) for row in metrics_of(b)[:-1])
    assert not any("eval" in key for row in metrics_of(a) for key in row)


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_bfloat16_runs(stage, tmp_path):
    """Matrix products in bfloat16: finite numbers, float32 weights, and nearly the same first step."""
    a, b = stage(tmp_path / "a"), stage(tmp_path / "b", dtype="bfloat16")
    assert {w.dtype for w in weights_of(b).values()} == {torch.float32}
    assert all(math.isfinite(v) for row in metrics_of(b) for v in row.values())
    assert any(
        not torch.equal(x, y)
        for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True)
    )
    first_a, first_b = metrics_of(a)[0], metrics_of(b)[0]
    if "loss" in first_a:
        assert first_b["loss"] == pytest.approx(first_a["loss"], rel=0.02)
    else:
        assert first_b["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert first_b["val/ratio_start_error"] == pytest.approx(0, abs=0.01)


# ------------------------------------------------------------------------------------------------- resume, overwrite

RESUME = {  # flags with everything that has a state, and when the run is interrupted: before and after checkpoints
    "sft": {"epochs": 1, "save_every": 3, "eval_every": 2},
    "reward_model": {"save_every": 3, "eval_every": 2},
    "ppo": {
        "total_episodes": 40,
        "save_every": 2,
        "eval_every": 1,
        "kl_target": 0.5,
        "kl_horizon": 20,
    }
    | {
        "save_rollouts": 1,
        "critic_warmup_updates": 1,
        "num_mini_batches": 2,
        "whiten_rewards": True,
    },
}


def interrupt(monkeypatch, at: int) -> None:
    """Let the run end as by Ctrl-C when it logs step `at`."""
    log = utils.Logger.log

    def interrupted(self, step, metrics):
        if step == at:
            raise KeyboardInterrupt
        log(self, step, metrics)

    monkeypatch.setattr(utils.Logger, "log", interrupted)


@pytest.mark.parametrize(
    ("name", "at"), [(n, at) for n in STAGES for at in ((2, 4, 5) if n == "ppo" else (2, 4, 9))]
)
def test_resume_goes_on_exactly(name, at, request, monkeypatch, tmp_path):
    """A run stopped in the middle and resumed equals one that was not: weights, metrics, events, summary, samples."""
    stage, flags = request.getfixturevalue(name), RESUME[name]
    whole = stage(tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        with pytest.raises(KeyboardInterrupt):
            stage(tmp_path / "cut", **flags)
    cut = tmp_path / "cut"
    assert len(metrics_of(cut)) == at - 1
    assert not (cut / "summary.json").exists()
    stage(cut, **flags, resume=True)
    assert_same_run(whole, cut)
    assert_board_has_metrics(cut, "update" if name == "ppo" else "step")
    if name == "ppo":
        assert (whole / "samples.jsonl").read_bytes() == (cut / "samples.jsonl").read_bytes()
        for path in (whole / "rollouts").iterdir():
            a, b = load_file(path), load_file(cut / "rollouts" / path.name)
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_before_the_first_checkpoint_starts_again(sft, monkeypatch, tmp_path):
    """Interrupted with nothing saved: from the start, with no trace of the first attempt in metrics and events."""
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "cut", save_every=0)
    assert_same_run(sft(tmp_path / "whole"), sft(tmp_path / "cut", save_every=0, resume=True))
    assert_board_has_metrics(tmp_path / "cut", "step")


def test_resume_survives_a_half_written_line(sft, monkeypatch, tmp_path):
    """A run that was killed while it wrote leaves half a line of metrics.jsonl behind."""
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "cut", save_every=3)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 2.')
    assert_same_run(sft(tmp_path / "whole"), sft(tmp_path / "cut", save_every=3, resume=True))


def test_resume_with_another_micro_batch_size(sft, monkeypatch, tmp_path):
    """What never changes the result may change on resume: a GPU with less memory, say."""
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            sft(tmp_path / "cut", save_every=3, learning_rate=1e-3)
    sft(tmp_path / "cut", save_every=4, micro_batch_size=2, learning_rate=1e-3, resume=True)
    assert_same_run(sft(tmp_path / "whole", learning_rate=1e-3), tmp_path / "cut", tolerance=1e-5)


def test_resume_of_a_finished_run_changes_nothing(ppo, tmp_path):
    """The last updates are done again from the last checkpoint, with the same result."""
    out = ppo(tmp_path / "a", save_every=1)
    ppo(tmp_path / "b", save_every=1)
    ppo(tmp_path / "b", save_every=1, resume=True)
    assert_same_run(out, tmp_path / "b")


def test_overwrite_leaves_nothing_of_the_old_run(ppo, tmp_path):
    """Metrics, events, rollouts, checkpoint and samples are those of the new run alone."""
    ppo(tmp_path / "a", total_episodes=24, save_rollouts=1, save_every=1, seed=2)
    ppo(tmp_path / "a", save_rollouts=1, save_every=1, overwrite=True)
    fresh = ppo(tmp_path / "b", save_rollouts=1, save_every=1)
    assert_same_run(tmp_path / "a", fresh)
    assert_board_has_metrics(tmp_path / "a", "update")

    def names(out):
        return sorted(str(p.relative_to(out)) for p in out.rglob("*") if "tfevents" not in p.name)

    assert names(tmp_path / "a") == names(fresh)


# ----------------------------------------------------------------------------------------------------------- the data


def test_chats_in_all_three_stages(sft, reward_model, ppo, base, data, tmp_path):
    """Messages go through the chat template from demonstrations to PPO; turns end in EOS, also in the prompts (B3)."""
    out = sft(tmp_path / "sft", model=base.chat, dataset=data.chat_sft, epochs=2)
    assert metrics_of(out)[-1]["loss"] < 0.5 * metrics_of(out)[0]["loss"]
    flags = {"model": str(out), "dataset": data.chat_preferences, "normalize_with": data.chat_sft}
    judge = reward_model(tmp_path / "reward_model", **flags)
    assert summary_of(judge)["accuracy"] > 0.9
    flags = {"model": str(out), "reward_model": str(judge), "dataset": data.chat_prompts}
    policy = ppo(tmp_path / "ppo", **flags, save_rollouts=1, response_length=6)
    rollout = load_file(policy / "rollouts" / "000001.safetensors")
    eos = utils.load_tokenizer(str(policy)).eos_token_id
    assert (rollout["prompt_ids"] == eos).any(1).all()  # every prompt has the user's turn end
    ended = ((rollout["response_ids"] == eos) & (rollout["response_mask"] == 1)).any(1)
    assert 0 < ended.sum() < 8
    assert metrics_of(policy)[0]["response/eos_rate"] == pytest.approx(ended.float().mean().item())


def test_messages_and_prompt_completion_are_the_same_chat(sft, base, data, tmp_path):
    """A conversation in `messages` is learned like the same one in `prompt` and `completion`."""
    rows = [as_chat(row) for row in sft_rows()]
    messages = write_data(
        tmp_path / "data", [{"messages": row["prompt"] + row["completion"]} for row in rows]
    )
    a = sft(tmp_path / "a", model=base.chat, dataset=messages)
    b = sft(tmp_path / "b", model=base.chat, dataset=data.chat_sft)
    assert_same_run(a, b)


def test_sft_on_plain_text(sft, tmp_path):
    """`text` is all completion: the loss is over every token but the first, which nothing precedes, and EOS."""
    rows = [row["prompt"] + row["completion"] for row in sft_rows()]
    out = sft(
        tmp_path / "out", dataset=write_data(tmp_path / "data", [{"text": text} for text in rows])
    )
    model, tokenizer = plain_lm(out), utils.load_tokenizer(str(out))
    losses = []
    for row in rows_of(str(tmp_path / "data")):
        first, *rest = tokenizer(row["text"])["input_ids"]
        losses.extend(-plain_logprobs(model, [first], [*rest, tokenizer.eos_token_id]))
    assert summary_of(out)["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_an_implicit_prompt_is_the_same_preference(reward_model, data, tmp_path):
    """D1: rows without `prompt`, whose sides hold the whole text, train the same model."""
    rows = [
        {k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in preference_rows()
    ]
    a = reward_model(tmp_path / "a", dataset=write_data(tmp_path / "data", rows))
    b = reward_model(tmp_path / "b", dataset=data.preferences)
    for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True):
        assert torch.equal(x, y)


def test_implicit_prompts_of_chats(reward_model, base, data, tmp_path):
    """The same with whole conversations."""
    rows = [as_chat(row) for row in preference_rows()]
    whole = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    flags = {"model": base.chat, "normalize_with": data.chat_sft}
    a = reward_model(tmp_path / "a", dataset=write_data(tmp_path / "data", whole), **flags)
    b = reward_model(tmp_path / "b", dataset=data.chat_preferences, **flags)
    for x, y in zip(weights_of(a).values(), weights_of(b).values(), strict=True):
        assert torch.equal(x, y)


def test_parquet_and_single_files(sft, reward_model, ppo, tmp_path):
    """What `datasets` reads gives the same run as the same rows in .jsonl; a single file is split."""
    import pandas

    for stage, rows in ((sft, sft_rows()), (reward_model, preference_rows()), (ppo, prompt_rows())):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_jsonl(folder / "x.jsonl", rows)
        pandas.DataFrame(rows).to_parquet(folder / "x.parquet")
        a, b = (
            stage(folder / kind, dataset=str(folder / f"x.{kind}")) for kind in ("jsonl", "parquet")
        )
        assert_same_run(a, b)


def test_pad_may_be_eos_in_all_three_stages(sft, reward_model, ppo, tmp_path):
    """D3, B4, B20, B21: a tokenizer whose pad token is EOS gives the same run as one with a pad token of its own."""
    outs = []
    for pad in ("<pad>", "<eos>"):
        folder, tokenizer = tmp_path / pad.strip("<>"), make_tokenizer(pad=pad)
        base = save_pair(folder / "base", make_model(tokenizer, pad_token_id=None), tokenizer)
        first = sft(folder / "sft", model=base)
        judge = reward_model(folder / "reward_model", model=str(first))
        config = json.loads((judge / "config.json").read_text())
        assert config["pad_token_id"] == (tokenizer.pad_token_id if pad == "<pad>" else None)
        # torch trains no embedding at a configured pad id, which the policy may well sample: leave that out of it
        (judge / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
        outs.append((first, judge, ppo(folder / "ppo", model=str(first), reward_model=str(judge))))
    for a, b in zip(*outs, strict=True):
        assert_same_run(a, b, tolerance=1e-5)


def test_another_architecture_in_all_three_stages(sft, reward_model, ppo, tmp_path):
    """GPT-2: learned positions, dropout in its configuration, no pad token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    config = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": None}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **config)
    )
    base = save_pair(tmp_path / "base", model, tokenizer)
    first = sft(tmp_path / "sft", model=base, epochs=3)
    assert metrics_of(first)[-1]["loss"] < 0.5 * metrics_of(first)[0]["loss"]
    judge = reward_model(tmp_path / "reward_model", model=str(first))
    assert summary_of(judge)["accuracy"] > 0.9
    flags = {"model": str(first), "reward_model": str(judge), "gradient_checkpointing": True}
    rows = metrics_of(ppo(tmp_path / "ppo", **flags))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-5


# ---------------------------------------------------------------------------------------------------------------- sft


def test_sft_learns(chain, data):
    """The loss falls to a fraction of the start's."""
    rows = metrics_of(chain.sft)
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]


def test_sft_cuts_long_completions(sft, base, tmp_path, capsys):
    """At --max-length a completion loses its end, EOS included, and the run says how many do."""
    rows = [{"prompt": "Q:", "completion": " two ripe figs" * n} for n in (1, 30)] * 4
    out = sft(
        tmp_path / "out", dataset=write_data(tmp_path / "data", rows, 2), max_length=20, epochs=2
    )
    assert "of 6 completions are cut" in capsys.readouterr().out
    assert all(math.isfinite(row["loss"]) for row in metrics_of(out))


def test_sft_makes_a_tiny_model(sft, data, tmp_path):
    """--model tiny: a Llama of about a million parameters with a tokenizer from the data, an ordinary folder after."""
    out = sft(
        tmp_path / "out", model="tiny", learning_rate=2e-3, batch_size=32, micro_batch_size=32
    )
    model, tokenizer = plain_lm(out), utils.load_tokenizer(str(out))
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("Q: two figs? 日本")["input_ids"]) == "Q: two figs? 日本"
    assert summary_of(out)["eval_loss"] == pytest.approx(
        eval_loss_of(out, rows_of(data.sft)), abs=1e-5
    )


# ------------------------------------------------------------------------------------------------------- reward model


def test_reward_model_learns_a_plain_preference(chain):
    """Answers that say yes are preferred: nearly every held-out pair is ranked right, with a margin."""
    summary = summary_of(chain.reward_model)
    assert summary["accuracy"] > 0.9
    assert summary["mean_margin"] > 1


def test_reward_model_without_normalization(reward_model, tmp_path):
    """--normalize-with none leaves the scores as they are."""
    config = plain_classifier(reward_model(tmp_path / "out", normalize_with="none")).config
    assert (config.reward_mean, config.reward_std) == (0.0, 1.0)


def test_reward_model_leaves_out_long_pairs(reward_model, tmp_path, capsys):
    """B19: a text cut at --max-length would have no EOS, so such pairs are left out and counted."""
    rows = preference_rows()[:24]
    rows[6]["rejected"] = " No," + " figs" * 100
    out = reward_model(tmp_path / "out", dataset=write_data(tmp_path / "data", rows, 4))
    assert "1 of 20 pairs are longer than 64 tokens" in capsys.readouterr().out
    assert len(metrics_of(out)) == 2  # 19 pairs in sixteens


def test_wilson_interval():
    """Against values from the literature (Newcombe 1998, method 3) and at the ends."""
    from reward_model import wilson_interval

    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0 / 20, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson_interval(1.0, 20) == pytest.approx((1 - 0.1611, 1), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- ppo


LEARN = {
    "total_episodes": 32 * 20,
    "batch_size": 32,
    "micro_batch_size": 32,
    "learning_rate": 5e-3,
    "kl_coef": 0.0,
}
LEARN |= {"missing_eos_penalty": 0.0, "eval_every": 0}


def test_the_entropy_bonus_bears_probabilities_of_zero(ppo, tmp_path):
    """D33: tokens whose probability underflows add nothing to the entropy, nor to its gradient."""
    rows = metrics_of(
        ppo(tmp_path / "out", temperature=1e-3, entropy_coef=0.01, learning_rate=1e-6)
    )
    assert all(math.isfinite(row["grad_norm"]) for row in rows)


@pytest.mark.parametrize("advantage", ["gae", "batch_mean", "rloo", "grpo"])
def test_ppo_learns_a_rule(ppo, rewards, advantage, tmp_path):
    """Rewarded for the letter e, the policy comes to write it: the share doubles, on held-out prompts too."""
    samples = 4 if advantage in ("rloo", "grpo") else 1
    flags = {
        "reward_fn": f"{rewards}:letter",
        "advantage": advantage,
        "samples_per_prompt": samples,
        "eval_prompts": 12,
    }
    out = ppo(tmp_path / "out", **LEARN, **flags)
    scores = [row["objective/scores"] for row in metrics_of(out)]
    assert np.mean(scores[-3:]) > 2 * np.mean(scores[:2])
    evaluation = summary_of(out)["eval"]
    assert evaluation["policy"]["score"] > 2 * evaluation["reference"]["score"]
    assert evaluation["win_rate"] > 0.9


def test_ppo_learns_from_a_reward_model(ppo, tmp_path):
    """The reward model's own score rises clearly, by more than two of its units."""
    out = ppo(tmp_path / "out", **LEARN, eval_prompts=12)
    evaluation = summary_of(out)["eval"]
    assert evaluation["policy"]["score"] > evaluation["reference"]["score"] + 2
    assert evaluation["policy"]["kl"] > 0.1


def test_ppo_kl_penalty_holds_the_policy(ppo, rewards, tmp_path):
    """B16: the penalty has the right sign: with a large coefficient the policy stays near the reference."""
    flags = LEARN | {"reward_fn": f"{rewards}:letter", "learning_rate": 2e-3}
    free, held = (ppo(tmp_path / str(beta), **flags | {"kl_coef": beta}) for beta in (0.0, 10.0))
    kl_free, kl_held = (summary_of(out)["eval"]["policy"]["kl"] for out in (free, held))
    assert kl_free > 5
    assert abs(kl_held) < 0.1 * kl_free


@pytest.mark.parametrize("advantage", ["batch_mean", "rloo", "grpo"])
def test_without_gae_there_is_no_value_network(ppo, advantage, tmp_path):
    """D34, D35: nothing of a critic is trained, saved or reported."""
    out = ppo(tmp_path / "out", advantage=advantage, samples_per_prompt=2, save_every=1)
    names = {p.name for p in next((out / "checkpoint").iterdir()).iterdir()}
    assert "policy.safetensors" in names
    assert "value_model.safetensors" not in names
    assert all(
        row["loss/value_avg"] == 0 and row["val/clipfrac_avg"] == 0 for row in metrics_of(out)
    )


def test_samples_per_prompt(ppo, tmp_path):
    """D35: each prompt of a batch is answered so many times, side by side."""
    out = ppo(tmp_path / "out", samples_per_prompt=4, save_rollouts=1)
    prompts = load_file(out / "rollouts" / "000001.safetensors")["prompt_ids"].view(2, 4, -1)
    assert (prompts == prompts[:, :1]).all()
    assert (prompts[0, 0] != prompts[1, 0]).any()


def test_ppo_prompts_are_permutations_of_the_data(ppo, data, tmp_path):
    """Over an epoch of prompts each is sampled once (D7)."""
    rows = prompt_rows()[:16]
    out = ppo(
        tmp_path / "out",
        dataset=write_data(tmp_path / "data", rows, 4),
        total_episodes=24,
        save_rollouts=1,
    )
    tokenizer, seen = utils.load_tokenizer(str(out)), []
    for path in sorted((out / "rollouts").iterdir()):
        rollout = load_file(path)
        for ids, mask in zip(rollout["prompt_ids"], rollout["prompt_mask"], strict=True):
            seen.append(tokenizer.decode(ids[mask.bool()]))
    train = [row["prompt"] for row in rows_of(str(tmp_path / "data"), "train")]
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(train)
    assert seen[:12] != seen[12:]


def test_bfloat16_ends_at_the_logits(ppo, tmp_path, monkeypatch):
    """Log-probabilities and entropies are made of them in float32."""
    map_logits, errors = utils.map_logits, []

    def checked(function, *given):
        def of_tokens(logits, tokens):
            results = function(logits, tokens)
            distribution = logits.double().log_softmax(-1)
            expected = (
                distribution.gather(1, tokens[:, None])[:, 0],
                -(distribution.exp() * distribution).sum(1),
            )
            errors.append((results - torch.stack(expected, 1)).abs().max().item())
            return results

        return map_logits(of_tokens, *given)

    monkeypatch.setattr(utils, "map_logits", checked)
    ppo(tmp_path / "out", dtype="bfloat16", temperature=1.0, entropy_coef=0.1, total_episodes=16)
    assert len(errors) > 10
    assert max(errors) < 1e-4


@pytest.mark.parametrize(("mini_batches", "micro_batch_size"), [(1, 4), (2, 4), (2, 1)])
def test_bfloat16_starts_at_ratio_one_and_kl_zero(ppo, mini_batches, micro_batch_size, tmp_path):
    """D26: to 1e-3, in nats per token, also where a row's neighbours in training are not those that it had before."""
    flags = {
        "batch_size": 16,
        "num_mini_batches": mini_batches,
        "micro_batch_size": micro_batch_size,
    }
    rows = metrics_of(ppo(tmp_path / "out", dtype="bfloat16", total_episodes=48, **flags))
    assert abs(rows[0]["objective/kl"]) < 1e-3 * rows[0]["response/length"]
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-3


def test_the_saved_policy_generates_as_it_was_trained(ppo, models, tmp_path):
    """`model.generate` of plain transformers samples at the temperature of the run, and stops at its stop tokens."""
    start = plain_lm(models.sft)
    start.generation_config.update(repetition_penalty=5.0, num_beams=4)
    start.save_pretrained(tmp_path / "start")
    utils.load_tokenizer(str(models.sft)).save_pretrained(tmp_path / "start")
    path = (
        tmp_path / "start" / "generation_config.json"
    )  # what transformers loads but refuses to save, once changed
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_scores": True}))
    flags = {"temperature": 0.6, "top_p": 0.9, "stop_token": "."}
    out = ppo(tmp_path / "out", model=str(tmp_path / "start"), **flags)
    model, tokenizer = plain_lm(out), utils.load_tokenizer(str(out))
    config = model.generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.6, 0, 0.9)
    assert not (config.repetition_penalty or config.num_beams or config.output_scores)
    ids = tokenizer(["Q: two ripe plums?\nA:"] * 20, return_tensors="pt")
    responses = model.generate(**ids, max_new_tokens=20)[:, ids["input_ids"].shape[1] :]
    assert len({tuple(r.tolist()) for r in responses}) > 5
    stop = tokenizer.convert_tokens_to_ids(".")
    assert all(
        stop not in r[:-1] or set(r[r.index(stop) + 1 :]) <= {tokenizer.pad_token_id}
        for r in responses.tolist()
    )


def test_reward_functions_get_texts_and_columns(ppo, tmp_path):
    """Prompts and completions as text without special tokens, the other columns by name; the judge gets the same."""
    path = tmp_path / "f.py"
    path.write_text(
        "import json, pathlib\n"
        "def f(prompts, completions, fruit):\n"
        "    with open(pathlib.Path(__file__).with_name('seen.jsonl'), 'a') as file:\n"
        "        for row in zip(prompts, completions, fruit, strict=True):\n"
        "            file.write(json.dumps(row) + '\\n')\n"
        "    return [float(len(c)) for c in completions]\n"
        "def judge(prompts, completions, fruit):\n"
        "    return [-float(len(c)) for c in completions]\n"
    )
    out = ppo(tmp_path / "out", reward_fn=f"{path}:f", eval_reward_fn=f"{path}:judge")
    fruits = {row["prompt"]: row["fruit"] for row in prompt_rows()}
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert len(seen) >= 16
    for prompt, completion, fruit in seen:
        assert fruits[prompt] == fruit
        assert "<eos>" not in completion
        assert "<pad>" not in completion
    evaluation = summary_of(out)["eval"]
    assert evaluation["win_rate_by"] == "judge"
    for name in ("reference", "policy"):
        assert evaluation[name]["judge"] == -evaluation[name]["score"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert all(s["policy_judge"] == -len(s["policy"]) for s in samples)


def test_ptx_pulls_the_policy_to_the_demonstrations(ppo, data, rewards, tmp_path):
    """D31: with nothing else to learn from, the language-model loss falls."""
    flags = {
        "reward_fn": f"{rewards}:nothing",
        "kl_coef": 0.0,
        "missing_eos_penalty": 0.0,
        "total_episodes": 80,
    }
    flags |= {"vf_coef": 0.0, "whiten_advantages": False, "eval_every": 0, "learning_rate": 1e-2}
    out = ppo(tmp_path / "out", ptx_coef=1.0, ptx_dataset=data.sft, **flags)
    losses = [row["loss/ptx_avg"] for row in metrics_of(out)]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_ptx_goes_with_critic_warmup(ppo, models, data, tmp_path):
    """While the critic is trained alone, the ptx loss does not move the policy either."""
    out = ppo(tmp_path / "out", ptx_coef=1.0, ptx_dataset=data.sft, critic_warmup_updates=2)
    before, after = weights_of(models.sft), weights_of(out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_entropy_bonus_raises_entropy(ppo, rewards, tmp_path):
    """D33: with a bonus the policy ends up less certain than without."""
    flags = LEARN | {"reward_fn": f"{rewards}:letter", "total_episodes": 32 * 8}
    without, with_ = (ppo(tmp_path / str(c), **flags, entropy_coef=c) for c in (0.0, 0.3))
    a, b = (metrics_of(out)[-1]["policy/entropy_avg"] for out in (without, with_))
    assert b > a + 0.2


@pytest.mark.slow
def test_the_embedded_task_end_to_end(monkeypatch, tmp_path):
    """The default flags on rows of the embedded task, judged by its labeler; a smaller data set for speed."""
    import ppo_rlhf
    import reward_model
    import sft

    monkeypatch.chdir(ROOT)
    for kind in ("sft", "preferences"):
        for split, count in (("train", 640), ("validation", 64)):
            rows = rows_of(str(ROOT / "data" / "support" / kind), split)[:count]
            write_jsonl(tmp_path / kind / f"{split}.jsonl", rows)
    common = {"device": "cpu"}
    a, b, c = (str(tmp_path / name) for name in ("a", "b", "c"))
    demonstrations, preferences = str(tmp_path / "sft"), str(tmp_path / "preferences")
    sft.main(sft.Args(dataset=demonstrations, output_dir=a, epochs=1, **common))
    flags = {"normalize_with": demonstrations, "output_dir": b}
    reward_model.main(reward_model.Args(model=a, dataset=preferences, **flags, **common))
    flags = {"total_episodes": 64, "batch_size": 32, "eval_prompts": 16, "output_dir": c}
    ppo_rlhf.main(ppo_rlhf.Args(model=a, reward_model=b, **flags, **common))
    evaluation = summary_of(tmp_path / "c")["eval"]
    assert evaluation["win_rate_by"] == "judge"
    assert -16 <= evaluation["reference"]["judge"] <= 9
    assert metrics_of(tmp_path / "c")[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert metrics_of(tmp_path / "c")[0]["val/ratio_start_error"] < 1e-4
