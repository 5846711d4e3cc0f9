"""The three stages through `main(args)`, on a model so small that a run takes half a second."""

import ast
import html
import importlib
import inspect
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    MODULES,
    ROOT,
    STAGES,
    args_of,
    as_chat,
    assert_same_run,
    change_config,
    eval_loss_of,
    metrics_of,
    plain_classifier,
    plain_lm,
    plain_logprobs,
    plain_loss,
    plain_scores,
    preference_rows,
    prompt_rows,
    read_jsonl,
    rollouts_of,
    rows_of,
    samples_of,
    save_pair,
    sft_rows,
    summary_of,
    weights_of,
    write_data,
    write_jsonl,
)
from rich.cells import cell_len
from safetensors.torch import load_model
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import pipeline

import dataset
import encoding
import ppo_rlhf
import sft as sft_stage
import utils

PPO_METRICS = set(
    """update episode lr eps objective/kl objective/entropy objective/non_score_reward
    objective/scores objective/rlhf_reward objective/kl_coef policy/approxkl_avg policy/clipfrac_avg
    policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio val/ratio_var
    val/ratio_start_error val/num_eos_tokens val/explained_variance response/length
    response/eos_rate grad_norm time/rollout time/score time/train tokens_per_second""".split()
)


@pytest.fixture
def stage(request):
    """The fixture that runs the stage named by the parameter."""
    return request.getfixturevalue(request.param)


each_stage = pytest.mark.parametrize("stage", STAGES, indirect=True)


def same_weights(a: Path, b: Path) -> bool:
    """Whether two models are the same to the bit."""
    pairs = zip(weights_of(a).values(), weights_of(b).values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def assert_board_has_metrics(out: Path, unit: str) -> dict[str, str]:
    """TensorBoard finds every number of metrics.jsonl, and of evaluations at the start and at the
    end, once and no other; returns its texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out), size_guidance={"scalars": 0, "tensors": 0})
    tags = board.Reload().Tags()
    expected: dict[str, list[tuple[int, float]]] = {}
    rows, summary = metrics_of(out), summary_of(out)
    if unit == "update":
        start, end = (
            {f"eval/{k}": x for k, x in summary["eval"][who].items() if x is not None}
            | {"eval/win_rate": share}
            for who, share in (("reference", 0.5), ("policy", summary["eval"]["win_rate"]))
        )
        rows = [start | {unit: 0}, *rows, end | {unit: len(rows)}]
    elif "eval_loss" in summary:
        rows.append({"eval_loss": summary["eval_loss"], unit: len(rows)})
    else:
        names = ("accuracy", "mean_margin", "score_length_correlation")
        rows.append({f"eval/{name}": summary[name] for name in names} | {unit: len(rows)})
    for row in rows:
        step = row.pop(unit)
        for name, value in row.items():
            expected.setdefault(name, []).append((step, value))
    assert {*tags["scalars"]} == expected.keys()
    for name, values in expected.items():
        events = np.array([(event.step, event.value) for event in board.Scalars(name)])
        np.testing.assert_allclose(events, np.array(values), rtol=1e-6, atol=1e-12, err_msg=name)
    names = [name for name in tags["tensors"] if name.endswith("/text_summary")]
    last = {name: board.Tensors(name)[-1].tensor_proto.string_val[0] for name in names}
    return {name.removesuffix("/text_summary"): text.decode() for name, text in last.items()}


@pytest.mark.parametrize("name", MODULES.values())
def test_every_flag_is_explained_and_recorded(chain, name):
    """Each has the docstring that `--help` shows, and args.json holds its value."""
    module = importlib.import_module(name)
    body = ast.parse(inspect.getsource(module.Args)).body[0].body
    assert [node.target.id for node in body[::2]] == [field.name for field in fields(module.Args)]
    assert all(isinstance(node, ast.Expr) and node.value.value.strip() for node in body[1::2])
    out = getattr(chain, name.removesuffix("_rlhf"))
    saved = args_of(out)
    assert saved.pop("stage") == name
    assert saved == asdict(module.Args(**saved))
    assert saved["output_dir"] == str(out)


def test_every_stage_leaves_the_documented_files(chain):
    """Models, flags, metrics, summary, events and, for PPO, samples, rollouts and a checkpoint."""
    names = "model.safetensors config.json tokenizer.json args.json metrics.jsonl summary.json"
    for out in (chain.sft, chain.reward_model, chain.ppo):
        assert all((out / name).is_file() for name in names.split())
        assert len(list(out.glob("events.out.tfevents.*"))) == 1
        assert not list(out.rglob("*.part"))
    assert sorted(p.stem for p in (chain.ppo / "rollouts").iterdir()) == ["000001", "000002"]
    assert [p.name for p in (chain.ppo / "checkpoint").iterdir()] == ["000001"]


def test_summaries_have_the_documented_keys_and_the_first_stages_learn(chain):
    """No key more, no key less; and sft.py and reward_model.py have learned."""
    summary = summary_of(chain.sft)
    assert summary.keys() == {"eval_loss", "perplexity", "seconds"}
    assert summary["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))
    rows = metrics_of(chain.sft)
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]
    summary = summary_of(chain.reward_model)
    names = "accuracy accuracy_interval pairs mean_margin score_length_correlation seconds"
    assert summary.keys() == {*names.split()}
    assert summary["pairs"] == 12
    assert summary["accuracy"] > 0.9
    assert summary["mean_margin"] > 1
    summary = summary_of(chain.ppo)
    assert summary.keys() == {"updates", "episodes", "seconds", "eval"}
    assert (summary["updates"], summary["episodes"]) == (2, 16)
    assert summary["eval"].keys() == {"prompts", "reference", "policy", "win_rate", "win_rate_by"}
    for name in ("reference", "policy"):
        assert summary["eval"][name].keys() == {"score", "judge", "kl", "length", "eos_rate"}
        assert summary["eval"][name]["judge"] is None


def test_the_same_response_is_a_tie():
    """Also where its two scores differ by rounding."""

    def results(scores):
        rest = {"judge": None, "kl": 0.0, "length": 1, "eos_rate": 1.0}
        return [{"response": text, "score": x} | rest for text, x in scores.items()]

    before = results({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0})
    after = results({"a": 1.1, "f": 1.0, "g": 1.1, "h": 1.1, "i": 0.9})
    assert ppo_rlhf.compare(before, after)["win_rate"] == (0.5 + 0.5 + 1 + 1 + 0) / 5


def test_metrics_have_the_documented_names(chain):
    """One line a step or update, finite, and the same in TensorBoard, which has the flags too."""
    rows = metrics_of(chain.ppo)
    assert [(row["update"], row["episode"]) for row in rows] == [(1, 8), (2, 16)]
    assert all(row.keys() >= PPO_METRICS for row in rows)
    for out, steps in ((chain.sft, 18), (chain.reward_model, 9)):  # 138 rows in sixteens
        rows += metrics_of(out)
        assert [row["step"] for row in metrics_of(out)] == list(range(1, steps + 1))
        names = {"loss", "lr", "grad_norm", "tokens_per_second"}
        assert all(row.keys() >= names for row in metrics_of(out))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for out in (chain.sft, chain.reward_model, chain.ppo):
        texts = assert_board_has_metrics(out, "update" if out == chain.ppo else "step")
        assert "batch_size" in html.unescape(texts["args"])


def test_samples_agree_with_the_summary(chain, data):
    """The held-out prompts in order, as on TensorBoard; means and win rate follow from them."""
    samples, evaluation = samples_of(chain.ppo), summary_of(chain.ppo)["eval"]
    assert [s["prompt"] for s in samples] == [row["prompt"] for row in rows_of(data.prompts)[:4]]
    old, new = ([s[f"{name}_score"] for s in samples] for name in ("reference", "policy"))
    assert evaluation["reference"]["score"] == pytest.approx(np.mean(old))
    assert evaluation["policy"]["score"] == pytest.approx(np.mean(new))
    equal = [s["reference"] == s["policy"] for s in samples]
    wins = [0.5 if x or a == b else b > a for x, a, b in zip(equal, old, new, strict=True)]
    assert evaluation["win_rate"] == pytest.approx(np.mean(wins))
    assert (evaluation["prompts"], evaluation["win_rate_by"]) == (4, "score")
    assert evaluation["reference"]["kl"] == pytest.approx(0, abs=1e-5)
    page = html.unescape(assert_board_has_metrics(chain.ppo, "update")["samples"])
    assert all(s[name].strip() in page for s in samples for name in ("prompt", "reference"))


JUDGE = """
import json, pathlib
def judge(prompts, completions, completion_ids, **columns):
    with open(pathlib.Path(__file__).with_name("seen.jsonl"), "a") as file:
        file.writelines(json.dumps(ids) + "\\n" for ids in completion_ids)
    return [len(text) for text in completions]
"""


def test_evaluations_follow_from_the_responses(ppo, models, data, tmp_path):
    """Of the start, after the first of two updates and of the end, by plain models and texts."""
    (tmp_path / "judge.py").write_text(JUDGE)
    flags = {"eval_reward_fn": f"{tmp_path / 'judge.py'}:judge", "eval_prompts": 12}
    flags |= {"stop_token": ".", "temperature": 0.7, "learning_rate": 1e-2}
    out = ppo(tmp_path / "out", **flags, eval_every=1, save_every=1)
    summary, (row, _) = summary_of(out)["eval"], metrics_of(out)
    logged = [summary["reference"] | {"win_rate": 0.5}]
    logged += [{k[5:]: x for k, x in row.items() if k.startswith("eval/")}]
    logged += [summary["policy"] | {"win_rate": summary["win_rate"]}]
    reference, middle, end = plain_lm(models.sft), plain_lm(out), plain_lm(out)
    load_model(middle, out / "checkpoint" / "000001" / "model.safetensors")
    tokenizer, seen = encoding.load_tokenizer(str(out)), read_jsonl(tmp_path / "seen.jsonl")
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows_of(data.prompts)]
    eos, lengths = tokenizer.eos_token_id, [len(tokenizer.decode(x, True)) for x in seen]
    ends = {eos, tokenizer.convert_tokens_to_ids(".")}
    assert {ids[-1] for ids in seen} > ends and len(seen) == 3 * 12
    for i, (model, got) in enumerate(zip((reference, middle, end), logged, strict=True)):
        part = slice(12 * i, 12 * i + 12)
        pairs = [*zip(prompts, seen[part], strict=True)]
        judged = [p + r + [eos] * (r[-1] != eos) for p, r in pairs]
        new, old = (
            np.array([plain_logprobs(m, *x, 0.7).sum() for x in pairs]) for m in (model, reference)
        )
        wins = [(b > a) + 0.5 * (b == a) for a, b in zip(lengths[:12], lengths[part], strict=True)]
        expected = {
            "score": plain_scores(models.reward_model, judged).mean(),
            "judge": np.mean(lengths[part]),
            "kl": (new - old).mean(),
            "length": np.mean([len(r) for _, r in pairs]),
            "eos_rate": np.mean([r[-1] in ends for _, r in pairs]),
            "win_rate": np.mean(wins),
        }
        assert got == pytest.approx(expected, abs=1e-4)
    assert logged[1]["win_rate"] != 0.5 and abs(logged[1]["kl"]) > 0.01


def test_samples_on_the_terminal(ppo, monkeypatch, capsys, tmp_path):
    """Prompt, response before and response after below each other, within 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{"prompt": f"Q: {', '.join(row['prompt'][3:-4] for row in prompt_rows()[1:6])}?\nA:"}]
    flags = {"response_length": 20, "total_episodes": 8}
    out = ppo(tmp_path / "out", dataset=write_data(tmp_path / "data", rows * 20, 2), **flags)
    pattern = "[^\n]*update 1.*?\nprompt\n(.*?)\nbefore: score .*?\n(.*?)\nafter: score .*?\n(.*?)"
    shown = re.search(pattern + "(?=\nppo_rlhf: wins)", capsys.readouterr().out, re.DOTALL)
    assert max(map(cell_len, shown[0].splitlines())) <= 80
    for part, name in zip(shown.groups(), ("prompt", "reference", "policy"), strict=True):
        wanted = utils.visible(samples_of(out)[0][name])
        assert "".join(part.split()).startswith("".join(wanted.split()))


def test_times_are_those_of_the_steps(ppo, monkeypatch, tmp_path):
    """Rollout, scores and training, by a clock that is read between them; whole batches count."""
    clock = iter([10.0, 11.0, 13.0, 17.0])
    monkeypatch.setattr(utils, "now", lambda device: next(clock))
    out = ppo(tmp_path / "out", total_episodes=15)  # of which one batch of 8 is used
    [row] = metrics_of(out)
    assert [row[f"time/{part}"] for part in ("rollout", "score", "train")] == [1, 2, 4]
    assert row["eps"] == pytest.approx(8 / 7)
    assert (summary_of(out)["updates"], summary_of(out)["episodes"]) == (1, 8)


@pytest.fixture
def logger(tmp_path):
    flags, shown = SimpleNamespace(track=False), "objective/scores objective/kl response/length"
    (out := tmp_path / "ppo_rlhf").mkdir()
    yield (made := utils.Logger(out, flags, "update", 0, 10_000, shown))
    made.close()
    utils.progress = None


def test_the_bar_shows_whole_numbers_in_80_columns(logger):
    numbers = {"objective/scores": -1.23456, "objective/kl": 12.3456, "response/length": 17.8765}
    logger.log(1, numbers)
    state = utils.progress.format_dict | {"n": 9_999, "elapsed": 4_000, "ncols": 80}
    line = utils.progress.format_meter(**state)
    assert line.startswith("ppo_rlhf: 9999/10000 |") and len(line) <= 80
    assert line.endswith("[1:06:40<00:00, scores=-1.235, kl=12.35, length=17.88]")


def test_a_line_is_in_the_file_once_it_is_logged(logger, tmp_path):
    """A process that is killed takes none along."""
    numbers = {"objective/scores": 1.0, "objective/kl": 2.0, "response/length": 3.0}
    for update in (1, 2):
        logger.log(update, numbers)
        assert metrics_of(tmp_path / "ppo_rlhf")[-1] == {"update": update} | numbers


def test_the_bar_is_drawn_with_the_numbers_of_its_update(logger, monkeypatch):
    drawn, bar = [], utils.progress
    bar.mininterval = bar.miniters = 0
    monkeypatch.setattr(bar, "display", lambda: drawn.append((bar.n, bar.postfix)))
    for update in (1, 2):
        logger.log(update, dict.fromkeys(logger.shown, float(update)))
    one, two = (", ".join(f"{x}={n}" for x in ("scores", "kl", "length")) for n in (1, 2))
    assert drawn == [(1, one), (2, two)]


def test_samples_where_nobody_reads_the_output(logger, monkeypatch):
    """As after `| head`: the stage says why it ends, where rich would exit without a word."""
    read, written = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(written, "w", buffering=1))
    sample = {"prompt": "p", "response": "r", "score": 1.0, "judge": None}
    with pytest.raises(BrokenPipeError):
        logger.samples(1, [sample], [sample], shown=1)
    with pytest.raises(BrokenPipeError):
        sys.stdout.close()


# ---- what must not change the result


@each_stage
def test_a_run_is_reproducible(stage, tmp_path):
    """D7: the same seed gives the same run to the bit, another seed another one."""
    a, b, c = (stage(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert_same_run(a, b)
    assert not same_weights(a, c)


@pytest.mark.parametrize("name", ["reward_model", "ppo_rlhf"])
def test_a_batch_smaller_than_the_default_micro_batch(request, name, tmp_path):
    """`--batch-size 16` is enough, where the default micro-batch of 32 is larger."""
    stage = request.getfixturevalue(name.removesuffix("_rlhf"))
    default = importlib.import_module(name).Args().micro_batch_size
    a, b = (stage(tmp_path / str(n), batch_size=16, micro_batch_size=n) for n in (16, default))
    assert default == 32
    assert_same_run(a, b)


COMPILE = pytest.param("compile", 1e-4, marks=pytest.mark.slow)


@each_stage
@pytest.mark.parametrize(("flag", "tolerance"), [("gradient_checkpointing", 1e-6), COMPILE])
def test_saving_memory_or_time_changes_rounding_only(stage, flag, tolerance, tmp_path):
    """The same numbers in float32; the saved model is an ordinary one."""
    a, b = stage(tmp_path / "a"), stage(tmp_path / "b", **{flag: True})
    assert_same_run(a, b, tolerance=tolerance)


@each_stage
def test_looking_changes_nothing(stage, ppo, tmp_path):
    """Evaluations, checkpoints and saved rollouts touch neither random numbers nor the model."""
    look = {"eval_every": 1, "save_every": 1} | ({"save_rollouts": 1} if stage is ppo else {})
    a, b = stage(tmp_path / "a", eval_every=0, save_every=0), stage(tmp_path / "b", **look)
    assert same_weights(a, b)
    assert all(any("eval" in key for key in row) for row in metrics_of(b)[:-1])
    assert not any("eval" in key for row in metrics_of(a) for key in row)


@each_stage
def test_bfloat16_runs(stage, tmp_path):
    """Products in bfloat16: finite numbers, float32 weights, nearly the same first step."""
    a, b = stage(tmp_path / "a"), stage(tmp_path / "b", dtype="bfloat16")
    assert {w.dtype for w in weights_of(b).values()} == {torch.float32}
    assert all(math.isfinite(v) for row in metrics_of(b) for v in row.values())
    assert not same_weights(a, b)
    first_a, first_b = metrics_of(a)[0], metrics_of(b)[0]
    if "loss" in first_a:
        assert first_b["loss"] == pytest.approx(first_a["loss"], rel=0.02)


@pytest.mark.parametrize(("mini_batches", "micro_batch_size"), [(1, 4), (2, 4), (2, 1)])
def test_bfloat16_starts_at_ratio_one_and_kl_zero(ppo, mini_batches, micro_batch_size, tmp_path):
    """D26: to 1e-3, in nats per token, also where a row's neighbours in training are others."""
    flags = {"batch_size": 16, "total_episodes": 32, "num_mini_batches": mini_batches}
    flags |= {"dtype": "bfloat16", "micro_batch_size": micro_batch_size}
    rows = metrics_of(ppo(tmp_path / "out", **flags))
    assert abs(rows[0]["objective/kl"]) < 1e-3 * rows[0]["response/length"]
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-3


def test_bfloat16_ends_at_the_logits(ppo, tmp_path, monkeypatch):
    """Log-probabilities and, in training, entropies are made of them in float32."""
    in_chunks, errors = utils.in_chunks, []

    def checked(function, model, hidden, tokens):
        results = in_chunks(function, model, hidden, tokens)
        logprobs = utils.logits_of(model, hidden).double().log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(1) * torch.is_grad_enabled()
        expected = torch.stack([logprobs.gather(1, tokens[:, None])[:, 0], entropies], 1)
        errors.append((results - expected).abs().max().item())
        return results

    monkeypatch.setattr(utils, "in_chunks", checked)
    ppo(tmp_path / "out", dtype="bfloat16", entropy_coef=0.1)
    assert len(errors) > 10
    assert max(errors) < 1e-4


class Passes(TorchDispatchMode):
    """Notes operations that write a tensor of a `shape`."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function._schema.name.removeprefix("aten::")
        writes = isinstance(result, torch.Tensor) and name not in ("t", "detach", "expand")
        if writes and result.shape == self.shape:
            self.names.append(name)
        return result


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_passes_over_the_logits(ppo, tmp_path, monkeypatch, entropy_coef):
    """Those of a large vocabulary take most of the time. The entropy costs two more in training."""
    in_chunks, passes = utils.in_chunks, {}

    def noted(function, model, hidden, tokens):
        vocabulary = model.get_output_embeddings().weight.shape[0]
        with Passes((len(tokens), vocabulary)) as made:
            results = in_chunks(function, model, hidden, tokens)
        passes[torch.is_grad_enabled()] = made.names
        if torch.is_grad_enabled():
            with Passes((len(tokens), vocabulary)) as made:
                torch.autograd.grad(results.sum(), hidden, retain_graph=True)
            passes["backward"] = made.names
        return results

    monkeypatch.setattr(utils, "in_chunks", noted)
    ppo(tmp_path / "out", entropy_coef=entropy_coef, dtype="float32")
    assert passes[False] == ["mm", "div", "_log_softmax"]
    assert passes[True] == ["mm", "div", "_log_softmax", "exp", "mul"]
    backward = ["new_zeros", "scatter_add", "_log_softmax_backward_data", "div"]
    assert entropy_coef or passes["backward"] == backward


def test_what_is_recomputed_of_the_logits(ppo, tmp_path, monkeypatch):
    """Chunks of a large vocabulary: what their gradient needs, and not the entropy."""
    in_chunks, passes = utils.in_chunks, []

    def noted(function, model, hidden, tokens):
        vocabulary = model.get_output_embeddings().weight.shape[0]
        monkeypatch.setattr(utils, "LOGITS_AT_A_TIME", 4 * vocabulary)
        results = in_chunks(function, model, hidden, tokens)
        if torch.is_grad_enabled():
            with Passes((4, vocabulary)) as made:
                torch.autograd.grad(results.sum(), hidden, retain_graph=True)
            passes.extend(made.names)
        return results

    monkeypatch.setattr(utils, "in_chunks", noted)
    ppo(tmp_path / "out", dtype="float32")
    assert "_log_softmax" in passes and "_log_softmax_backward_data" in passes
    assert "exp" not in passes


def test_training_attends_without_a_mask(ppo, tmp_path, monkeypatch):
    """Padding is on the right, so that fused kernels serve; only sampling, padded left, has one."""
    attend, masks = F.scaled_dot_product_attention, {True: [], False: []}

    def recorded(query, key, value, attn_mask=None, **kwargs):
        masks[torch.is_grad_enabled()].append(attn_mask is None and kwargs["is_causal"])
        return attend(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    ppo(tmp_path / "out")
    assert masks[True]
    assert all(masks[True])
    assert not all(masks[False])


@pytest.mark.slow
def test_compiled_models_are_compiled_once(ppo, tmp_path, monkeypatch):
    """Whole, and not again for other lengths after the second of ten updates."""
    compiled, log = [], utils.Logger.log

    def noted(logger, step, metrics):
        compiled.append(counters["frames"]["total"])
        log(logger, step, metrics)

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(utils.Logger, "log", noted)
    out = ppo(tmp_path / "out", compile=True, total_episodes=80)
    lengths = {row["response/length"] for row in metrics_of(out)}
    assert len(compiled) == 10
    assert len(lengths) > 5
    assert compiled[0] > 0
    assert compiled[1] == compiled[-1]
    assert not counters["graph_break"]


def test_chats_in_all_three_stages(sft, reward_model, ppo, base, data, tmp_path):
    """Messages go through the chat template; turns end in EOS, also in the prompts (B3)."""
    out = sft(tmp_path / "sft", model=base.chat, dataset=data.chat_sft, epochs=2)
    assert metrics_of(out)[-1]["loss"] < 0.5 * metrics_of(out)[0]["loss"]
    flags = {"model": str(out), "dataset": data.chat_preferences, "normalize_with": data.chat_sft}
    judge = reward_model(tmp_path / "reward_model", **flags)
    assert summary_of(judge)["accuracy"] > 0.9
    flags = {"model": str(out), "reward_model": str(judge), "dataset": data.chat_prompts}
    policy = ppo(tmp_path / "ppo", **flags, save_rollouts=1, response_length=6)
    rollout, eos = rollouts_of(policy)[0], encoding.load_tokenizer(str(policy)).eos_token_id
    assert all(eos in rollout.prompt(i) for i in range(8))  # the end of the user's turn
    ended = [eos in rollout.response(i) for i in range(8)]
    assert 0 < sum(ended) < 8
    assert metrics_of(policy)[0]["response/eos_rate"] == pytest.approx(np.mean(ended))


def test_sft_on_plain_text(sft, tmp_path):
    """D8: the loss is over every token but the first, which nothing precedes, and EOS."""
    rows = [{"text": row["prompt"] + row["completion"]} for row in sft_rows()]
    out = sft(tmp_path / "out", dataset=write_data(tmp_path / "data", rows))
    model, tokenizer, losses = plain_lm(out), encoding.load_tokenizer(str(out)), []
    for row in rows_of(str(tmp_path / "data")):
        first, *rest = tokenizer(row["text"])["input_ids"]
        losses.extend(-plain_logprobs(model, [first], [*rest, tokenizer.eos_token_id]))
    assert summary_of(out)["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_an_implicit_prompt_is_the_same_preference(reward_model, base, data, chat, tmp_path):
    """D1: rows without `prompt`, whose sides hold the whole text, train the same model."""
    rows = [as_chat(row) if chat else row for row in preference_rows()]
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    flags = {"model": base.chat, "normalize_with": data.chat_sft} if chat else {}
    a = reward_model(tmp_path / "a", dataset=write_data(tmp_path / "data", rows), **flags)
    explicit = data.chat_preferences if chat else data.preferences
    assert same_weights(a, reward_model(tmp_path / "b", dataset=explicit, **flags))


def test_sft_cuts_long_completions(sft, base, tmp_path, capsys):
    """At --max-length, or the model's, a completion loses its end, EOS included; it is said."""
    rows = [{"prompt": "Q:", "completion": " two ripe figs" * n} for n in (1, 30)] * 4
    folder = write_data(tmp_path / "data", rows, 2)
    out = sft(tmp_path / "out", dataset=folder, max_length=20, epochs=2)
    assert "of 6 rows are cut at" in capsys.readouterr().out
    assert all(math.isfinite(row["loss"]) for row in metrics_of(out))
    model = shutil.copytree(base.plain, tmp_path / "model")
    model = change_config(model, max_position_embeddings=20)
    sft(tmp_path / "short", model=model, dataset=folder, max_length=500)
    assert "of 6 rows are cut at" in capsys.readouterr().out


def test_sft_makes_a_tiny_model(sft, data, tmp_path):
    """--model tiny: a Llama of about a million parameters, a tokenizer from the data."""
    flags = {"learning_rate": 2e-3, "batch_size": 32, "micro_batch_size": 32}
    out = sft(tmp_path / "out", model="tiny", **flags)
    model, tokenizer = plain_lm(out), encoding.load_tokenizer(str(out))
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("Q: two figs? 日本")["input_ids"]) == "Q: two figs? 日本"
    expected = eval_loss_of(out, rows_of(data.sft))
    assert summary_of(out)["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_a_tiny_model_of_calls_without_content():
    """Their other words make its tokenizer; whether they fit its template is checked later."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [dataset.Row({"messages": [{"role": "user", "content": "two ripe figs"}, call]}, "f:1")]
    _, tokenizer = sft_stage.build_tiny(rows * 9, torch.device("cpu"))
    assert tokenizer.decode(tokenizer("two ripe figs")["input_ids"]) == "two ripe figs"


def test_reward_model_leaves_out_long_pairs(reward_model, base, tmp_path, capsys):
    """B19: cut, they would have no EOS. --normalize-with none leaves the scores as they are."""
    rows = preference_rows()[:24]
    rows[6]["rejected"] = " No," + " figs" * 100
    rows[7]["chosen"] = " Yes," + " figs" * 100
    folder = write_data(tmp_path / "data", rows, 4)
    out = reward_model(tmp_path / "out", dataset=folder, normalize_with="none")
    assert "2 of 20 rows are left out, the first" in capsys.readouterr().out
    assert len(metrics_of(out)) == 2  # 18 pairs in sixteens
    config = plain_classifier(out).config
    assert (config.reward_mean, config.reward_std) == (0.0, 1.0)
    model = shutil.copytree(base.plain, tmp_path / "model")
    model = change_config(model, max_position_embeddings=64)
    flags = {"dataset": folder, "max_length": 500, "normalize_with": "none"}
    reward_model(tmp_path / "short", model=model, **flags)
    assert "2 of 20 rows are left out, the first" in capsys.readouterr().out


def test_a_tie_is_half_right(reward_model, monkeypatch, tmp_path):
    """A reward model that gives one score to all is right about half of the pairs."""
    score = lambda model, ids, mask: torch.ones(len(ids))  # noqa: E731
    monkeypatch.setattr(utils, "last_token_scores", score)
    summary = summary_of(reward_model(tmp_path / "out"))
    assert (summary["accuracy"], summary["mean_margin"]) == (0.5, 0.0)
    assert summary["score_length_correlation"] == 0.0


def test_wilson_interval():
    """D14: against values from the literature (Newcombe 1998, method 3) and at the ends."""
    from reward_model import wilson_interval

    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0 / 20, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson_interval(1.0, 20) == pytest.approx((1 - 0.1611, 1), abs=1e-4)


LEARN = {"total_episodes": 32 * 20, "batch_size": 32, "micro_batch_size": 32, "eval_every": 0}
LEARN |= {"learning_rate": 5e-3, "kl_coef": 0.0, "missing_eos_penalty": 0.0, "eval_prompts": 12}


@pytest.mark.parametrize("advantage", ["gae", "batch_mean", "rloo", "grpo"])
def test_ppo_learns_a_rule(ppo, rewards, advantage, tmp_path):
    """Rewarded for the letter e, the policy comes to write it, on held-out prompts too."""
    flags = LEARN | {"reward_fn": f"{rewards}:letter", "advantage": advantage}
    flags["samples_per_prompt"] = 4 if advantage in ("rloo", "grpo") else 1
    out = ppo(tmp_path / "out", **flags)
    scores = [row["objective/scores"] for row in metrics_of(out)]
    assert np.mean(scores[-3:]) > 2 * np.mean(scores[:2])
    evaluation = summary_of(out)["eval"]
    assert evaluation["policy"]["score"] > 2 * evaluation["reference"]["score"]
    assert evaluation["win_rate"] > 0.9


def test_ppo_learns_from_a_reward_model(ppo, tmp_path):
    """The reward model's own score rises clearly, by more than two of its units."""
    evaluation = summary_of(ppo(tmp_path / "out", **LEARN))["eval"]
    assert evaluation["policy"]["score"] > evaluation["reference"]["score"] + 2
    assert evaluation["policy"]["kl"] > 0.1


@pytest.mark.parametrize("advantage", ["batch_mean", "rloo", "grpo"])
def test_without_gae_there_is_no_value_network(ppo, advantage, tmp_path):
    """D34, D35: nothing of a critic is trained, saved or reported."""
    out = ppo(tmp_path / "out", advantage=advantage, samples_per_prompt=2, save_every=1)
    names = {p.name for p in (out / "checkpoint" / "000001").iterdir()}
    assert names >= {"model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"}
    assert all(row["loss/value_avg"] == row["val/clipfrac_avg"] == 0 for row in metrics_of(out))


@pytest.mark.parametrize("samples", [1, 2])
def test_ppo_prompts_are_permutations_of_the_data(ppo, samples, tmp_path):
    """D7: over an epoch of prompts each is sampled once, or as often as --samples-per-prompt."""
    folder = write_data(tmp_path / "data", prompt_rows()[:16], 4)
    flags = {"total_episodes": 24 * samples, "samples_per_prompt": samples, "save_rollouts": 1}
    out = ppo(tmp_path / "out", dataset=folder, **flags)
    tokenizer = encoding.load_tokenizer(str(out))
    rows = range(0, 8, samples)
    seen = [tokenizer.decode(r.prompt(i)) for r in rollouts_of(out) for i in rows]
    train = [row["prompt"] for row in rows_of(folder, "train")]
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(train)
    assert seen[:12] != seen[12:]


def test_the_entropy_bonus_bears_probabilities_of_zero(ppo, tmp_path):
    """D33: where a probability underflows, neither the entropy nor its gradient is NaN."""
    flags = {"temperature": 1e-3, "entropy_coef": 0.01, "learning_rate": 1e-6}
    rows = metrics_of(ppo(tmp_path / "out", **flags))
    assert all(math.isfinite(row["grad_norm"]) for row in rows)


def test_the_saved_policy_generates_as_it_was_trained(ppo, models, tmp_path):
    """At the run's temperature, to its stop tokens; the start's own settings are gone."""
    start, folder = plain_lm(models.sft), tmp_path / "start"
    start.generation_config.update(repetition_penalty=5.0, num_beams=4)
    save_pair(folder, start, encoding.load_tokenizer(str(models.sft)))
    path = folder / "generation_config.json"  # which transformers loads, but would not save
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_scores": True}))
    flags = {"temperature": 0.6, "top_p": 0.9, "stop_token": "."}
    out = ppo(tmp_path / "out", model=str(folder), **flags)
    model, tokenizer = plain_lm(out), encoding.load_tokenizer(str(out))
    config = model.generation_config
    expected = {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9}
    assert config.to_dict().items() >= (expected | {"max_new_tokens": 10}).items()
    assert not (config.repetition_penalty or config.num_beams or config.output_scores)
    ids = tokenizer(["Q: two ripe plums?\nA:"] * 20, return_tensors="pt")
    responses = model.generate(**ids, max_new_tokens=20)[:, ids["input_ids"].shape[1] :].tolist()
    assert len({*map(tuple, responses)}) > 5
    stop, pad = tokenizer.convert_tokens_to_ids("."), tokenizer.pad_token_id
    assert any(stop in r[:-1] for r in responses)
    assert all({*r[r.index(stop) + 1 :]} <= {pad} for r in responses if stop in r)


def test_an_sft_model_generates_to_the_eos_that_it_learned(sft, base, tmp_path):
    """And to the ends of its start, whose own settings stay; what is no special token is none."""
    tokenizer, start = encoding.load_tokenizer(base.plain), plain_lm(base.plain)
    special, word = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(".")
    start.generation_config.update(eos_token_id=[special, word], temperature=0.3, do_sample=True)
    out = sft(tmp_path / "out", model=save_pair(tmp_path / "start", start, tokenizer))
    config = plain_lm(out).generation_config
    assert (config.eos_token_id, config.temperature) == ([tokenizer.eos_token_id, special], 0.3)


def test_transformers_pipeline_gives_the_raw_reward(chain):
    """No sigmoid of it, with which close scores would be equal."""
    folder = str(chain.reward_model)
    judge = pipeline("text-classification", folder, device="cpu")
    tokenizer = encoding.load_tokenizer(folder)
    text = "Q: two ripe plums?\nA: two ripe plums" + tokenizer.eos_token
    [expected] = plain_scores(folder, [tokenizer(text)["input_ids"]])
    score = judge(text)[0]["score"] - judge.model.config.reward_mean
    assert score == pytest.approx(expected, abs=1e-4)


def test_reward_functions_get_texts_and_columns(ppo, tmp_path):
    """Texts without special tokens, the other columns by name; the judge gets the same."""
    path = tmp_path / "f.py"
    path.write_text(
        "import pathlib\n"
        "def f(prompts, completions, fruit):\n"
        "    with open(pathlib.Path(__file__).with_name('seen'), 'a') as file:\n"
        "        print(*zip(prompts, completions, fruit, strict=True), sep='\\n', file=file)\n"
        "    return [float(len(c)) for c in completions]\n"
        "def judge(prompts, completions, fruit):\n"
        "    return [-float(len(c)) for c in completions]\n"
    )
    out = ppo(tmp_path / "out", reward_fn=f"{path}:f", eval_reward_fn=f"{path}:judge")
    fruits = {row["prompt"]: row["fruit"] for row in prompt_rows()}
    seen = [ast.literal_eval(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(seen) >= 16
    for prompt, completion, fruit in seen:
        assert fruits[prompt] == fruit
        assert not re.search("<eos>|<pad>", completion)
    evaluation = summary_of(out)["eval"]
    assert evaluation["win_rate_by"] == "judge"
    for name in ("reference", "policy"):
        assert evaluation[name]["judge"] == -evaluation[name]["score"]
    assert all(s["policy_judge"] == -len(s["policy"]) for s in samples_of(out))


def test_ptx_pulls_the_policy_to_the_demonstrations(ppo, models, data, rewards, tmp_path):
    """D31: with nothing else to learn from, it is AdamW on random ones; their loss falls."""
    flags = {"reward_fn": f"{rewards}:nothing", "kl_coef": 0.0, "missing_eos_penalty": 0.0}
    flags |= {"vf_coef": 0.0, "whiten_advantages": False, "eval_every": 0, "learning_rate": 1e-2}
    flags |= {"total_episodes": 80, "ptx_coef": 0.5, "ptx_dataset": data.sft, "temperature": 0.5}
    out = ppo(tmp_path / "out", **flags, num_mini_batches=2, micro_batch_size=2)
    model, texts, rows = plain_lm(models.sft), rows_of(data.sft, "train"), metrics_of(out)
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-5, weight_decay=0.0)
    losses = [row["loss/ptx_avg"] for row in rows]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    for row in rows[:3]:  # rounding grows with every step
        rng, steps = utils.generator("cpu", 1, ppo_rlhf.PTX, row["update"], 0), []
        for _ in range(4):  # two passes of two mini-batches, with as many texts
            drawn = torch.randint(len(texts), (4,), generator=rng)
            loss = plain_loss(model, out, [texts[i] for i in drawn])
            (0.5 * loss).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.append((loss.item(), norm.item()))
            optimizer.param_groups[0]["lr"] = row["lr"]
            optimizer.step()
            optimizer.zero_grad()
        logged = [row["loss/ptx_avg"], row["grad_norm"]]
        assert logged == pytest.approx(np.mean(steps, 0), rel=1e-3)


@pytest.mark.slow
def test_the_embedded_task_end_to_end(monkeypatch, tmp_path):
    """The default flags on rows of the embedded task, judged by its labeler; fewer for speed."""
    sft, reward_model, ppo_rlhf = map(importlib.import_module, MODULES.values())
    monkeypatch.chdir(ROOT)
    for kind in ("sft", "preferences"):
        for split, count in (("train", 640), ("validation", 64)):
            rows = rows_of(str(ROOT / "data" / "support" / kind), split)[:count]
            write_jsonl(tmp_path / kind / f"{split}.jsonl", rows)
    common, (a, b, c) = {"device": "cpu"}, (str(tmp_path / name) for name in ("a", "b", "c"))
    demonstrations, preferences = str(tmp_path / "sft"), str(tmp_path / "preferences")
    sft.main(sft.Args(dataset=(demonstrations,), output_dir=a, epochs=1, **common))
    flags = {"normalize_with": demonstrations, "output_dir": b, "dataset": (preferences,)}
    reward_model.main(reward_model.Args(model=a, **flags, **common))
    flags = {"total_episodes": 64, "batch_size": 32, "eval_prompts": 16, "output_dir": c}
    ppo_rlhf.main(ppo_rlhf.Args(model=a, reward_model=(b,), **flags, **common))
    evaluation, row = summary_of(tmp_path / "c")["eval"], metrics_of(tmp_path / "c")[0]
    assert evaluation["win_rate_by"] == "judge"
    assert -16 <= evaluation["reference"]["judge"] <= 9
    assert row["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert row["val/ratio_start_error"] < 1e-4
