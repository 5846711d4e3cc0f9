"""One test for each detail, D1 to D46 in docs/details.md; it fails without it (mutations.py)."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_rewards as rewarded
import test_rollouts as recomputed
import torch
from conftest import (
    assert_same_run,
    eval_loss_of,
    make_gpt2,
    make_model,
    metrics_of,
    plain_classifier,
    plain_lm,
    plain_logprobs,
    plain_loss,
    plain_scores,
    preference_rows,
    rollouts_of,
    rows_of,
    samples_of,
    save_pair,
    sequences_of,
    sft_rows,
    summary_of,
    weights_of,
    write_data,
    write_jsonl,
)
from safetensors.torch import load_file

import dataset
import encoding
import generate
import utils

CPU = torch.device("cpu")
PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]
runs = recomputed.runs
functions, second, together = rewarded.functions, rewarded.second, rewarded.together


def test_d01_reward_and_value_read_prompt_and_response(runs, models):
    """As one sequence: a response can only be judged as an answer to its prompt."""
    recomputed.check_scores(runs("default"), models)
    recomputed.check_values(runs("default"), models)


def test_d02_prompts_are_padded_on_the_left(runs):
    """Positions count real tokens: greedy decoding of a batch is that of each row."""
    recomputed.check_masks(runs("default"))
    model = make_gpt2()
    ids, mask = encoding.pad(PROMPTS, 0, "left", CPU, 12)
    uniform = generate.random_numbers(len(ids), 9)
    got, _ = generate.generate(model, ids, mask, uniform, [1], pad_id=0, temperature=0)
    flags = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 1, "pad_token_id": 0}
    for row, prompt in zip(got, PROMPTS, strict=True):
        alone = model.generate(input_ids=torch.tensor([prompt]), **flags)[0, len(prompt) :].tolist()
        assert row.tolist() == alone + [0] * (9 - len(alone))


def test_d03_masks_come_from_lengths(model):
    """Where pad is the stop token, the sampled one is real and what follows it is not."""

    def greedy(stop: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = encoding.pad(PROMPTS, pad_id, "left", CPU)
        uniform = generate.random_numbers(len(ids), 9)
        return generate.generate(model, ids, mask, uniform, [stop], pad_id=pad_id, temperature=0)

    free = greedy(10_000, 0)[0].tolist()
    pairs = ((row, t) for row in range(4) for t in range(2, 9))
    row, t = next((row, t) for row, t in pairs if free[row][t] not in free[row][:t])
    (a, a_mask), (b, b_mask) = (greedy(free[row][t], pad) for pad in (free[row][t], 0))
    assert a_mask[row].sum() == t + 1
    assert torch.equal(a_mask, b_mask)
    assert torch.equal(a * a_mask, b * b_mask)


def test_d04_dropout_is_off(ppo, tokenizer, rewards, tmp_path):
    """In training too: the ratio starts at 1 for a model whose configuration asks for dropout."""
    model = save_pair(tmp_path / "model", make_model(tokenizer, attention_dropout=0.5), tokenizer)
    flags = {"reward_fn": f"{rewards}:length", "gradient_checkpointing": True}
    rows = metrics_of(ppo(tmp_path / "out", model=model, **flags))
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-5


def test_d05_log_probabilities_are_divided_by_the_temperature(runs, models):
    """Those of policy and reference alike, in all updates."""
    recomputed.check_logprobs(runs("cold"), models)


@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo"])
def test_d06_optimizer_and_schedule(request, name, monkeypatch, tmp_path):
    """AdamW, eps 1e-5, no weight decay; the rate falls to 0, as a cosine or, in PPO, a line."""
    stage, made, adamw = request.getfixturevalue(name), [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(k) or adamw(*a, **k))
    flags = {"total_episodes": 32} if name == "ppo" else {"warmup_ratio": 0.25, "batch_size": 32}
    out = stage(tmp_path / "out", **flags)
    rates = [row["lr"] for row in metrics_of(out)]
    assert [(k["eps"], k["weight_decay"]) for k in made] == [(1e-5, 0.0)]
    if name == "ppo":
        assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    else:  # five steps, one of them warm-up
        cosine = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
        peak = {"sft": 1e-2, "reward_model": 3e-3}[name]
        assert rates == pytest.approx([peak, *(peak * part for part in cosine)])


def test_d07_random_numbers_depend_on_seed_and_update(ppo, tmp_path):
    """The same seed gives the same responses; only evaluations draw the numbers of another."""
    flags = {"learning_rate": 1e-12, "save_rollouts": 1}
    flags["dataset"] = write_data(tmp_path / "data", [{"prompt": "Q: two ripe plums?\nA:"}] * 24, 2)
    seeds = {"a": 1, "b": 1, "c": 2}
    outs = [ppo(tmp_path / name, seed=seed, **flags) for name, seed in seeds.items()]
    (a1, a2), (b1, _), (c1, _) = (
        [rollout.tensors["response_ids"] for rollout in rollouts_of(out)] for out in outs
    )
    assert torch.equal(a1, b1)
    assert not torch.equal(a1, a2)
    assert not torch.equal(a1, c1)
    assert all(sample["policy"] == sample["reference"] for sample in samples_of(outs[0]))
    assert summary_of(outs[0])["eval"]["win_rate"] == 0.5


def test_d09_a_batch_is_a_mean_over_its_tokens(sft, base, data, tmp_path):
    """D8, D9, B22: over the batch's completion tokens, however micro-batches are filled."""
    out = sft(tmp_path / "out", batch_size=12, micro_batch_size=4, warmup_ratio=0)
    rows = rows_of(data.sft, "train")
    _, indices = next(dataset.batches(len(rows), 12, 1, 1, 0))
    expected = eval_loss_of(Path(base.plain), [rows[i] for i in indices])
    assert metrics_of(out)[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_two_epochs_redone_by_hand(request, name, models, tmp_path):
    """D6, D9, D11, D29: rates, losses, gradient norms and weights of 20 rows in eights."""
    rows = {"sft": sft_rows, "reward_model": preference_rows}[name]()[:22]
    folder, start = write_data(tmp_path / "data", rows, 2), getattr(models, name)
    flags = {"normalize_with": "none"} if name == "reward_model" else {}
    flags |= {"model": str(start), "dataset": folder, "learning_rate": 1e-2, "epochs": 2}
    flags |= {"batch_size": 8, "micro_batch_size": 4, "warmup_ratio": 0.25}
    out = request.getfixturevalue(name)(tmp_path / "out", **flags)
    model = (plain_lm if name == "sft" else plain_classifier)(start)
    rows, parameters = rows_of(folder, "train"), [*model.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
    falling = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    steps = dataset.batches(len(rows), 8, 2, 1, 0)
    for row, (_, indices), part in zip(metrics_of(out), steps, [0.5, 1, *falling], strict=True):
        loss = plain_loss(model, out, [rows[i] for i in indices])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        expected = {"loss": loss.item(), "lr": 1e-2 * part, "grad_norm": norm.item()}
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-3)
        optimizer.param_groups[0]["lr"] = expected["lr"]
        optimizer.step()
        optimizer.zero_grad()
    weights = weights_of(out)
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weights[key], weight.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo"])
def test_d29_gradients_are_clipped_by_their_norm(request, name, tmp_path):
    """To a norm so small that Adam's eps holds every step near 0; reported is the norm before."""
    stage = request.getfixturevalue(name)
    start = stage(tmp_path / "start", learning_rate=1e-12)
    clipped = stage(tmp_path / "clipped", max_grad_norm=1e-10)
    for x, y in zip(weights_of(start).values(), weights_of(clipped).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    assert all(row["grad_norm"] > 1e-3 for row in metrics_of(clipped))


def test_d08_the_loss_is_on_the_completion_and_its_eos(chain, data):
    """Nats per token of completion and EOS, over the held-out rows."""
    expected = eval_loss_of(chain.sft, rows_of(data.sft))
    assert summary_of(chain.sft)["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_d10_the_head_starts_small_and_random(reward_model, tmp_path):
    """From a normal distribution of deviation 1/sqrt(H + 1), another one with another seed."""
    head, other = (
        weights_of(reward_model(tmp_path / str(seed), learning_rate=1e-12, seed=seed))
        for seed in (1, 2)
    )
    head, other = head["score.weight"], other["score.weight"]
    assert (head - other).abs().max() > 0.1
    assert head.shape == (1, 32)
    assert head.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.3)
    assert abs(head.mean().item()) < 3 / math.sqrt(33 * 32)


def scores_by_side(out: Path, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the chosen and of the rejected responses, by plain forward passes."""
    sides = [[(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    chosen, rejected = (plain_scores(out, sequences_of(out, side)) for side in sides)
    return chosen, rejected


def test_d11_the_loss_is_bradley_terry(reward_model, data, tmp_path):
    """The first one is the mean of -log sigmoid of the margins."""
    flags = {"learning_rate": 1e-12, "normalize_with": "none", "micro_batch_size": 4}
    out, rows = reward_model(tmp_path / "out", **flags), rows_of(data.preferences, "train")
    _, indices = next(dataset.batches(len(rows), 16, 1, 1, 0))
    chosen, rejected = scores_by_side(out, [rows[i] for i in indices])
    margins, row = chosen - rejected, metrics_of(out)[0]
    assert row["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert row["accuracy"] == pytest.approx(np.mean(margins > 0))
    assert row["margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert abs(margins).max() > 0.1
    assert not {"prefix_loss", "lm_loss"} & row.keys()  # of the embedded task only, if not asked


def run_with_more_losses(reward_model, data, out: Path, **more) -> tuple[dict, dict]:
    """The first step's metrics, and what plain forward passes say: three losses, gradient norm."""
    flags = {"learning_rate": 1e-12, "normalize_with": "none", "micro_batch_size": 4}
    reward_model(out, **more, **flags)
    known = len(encoding.load_tokenizer(str(out)))
    rows = rows_of(data.preferences, "train")
    _, indices = next(dataset.batches(len(rows), 16, 1, 1, 0))
    model, loss, prefix_loss, nats, tokens = plain_classifier(out), 0, 0, 0, 0
    model.requires_grad_(True)
    log_sigmoid, cross_entropy = torch.nn.functional.logsigmoid, torch.nn.functional.cross_entropy
    with torch.enable_grad():
        for row in (rows[i] for i in indices):
            sides = [(row["prompt"], row[side]) for side in ("chosen", "rejected")]
            chosen, rejected = sequences_of(out, sides)
            read = [model.model(torch.tensor([ids])) for ids in (chosen, rejected)]
            hidden, other = (x.last_hidden_state[0] for x in read)
            a, b = (model.score(x).squeeze(-1) for x in (hidden, other))
            loss = loss - log_sigmoid(a[-1] - b[-1]) / 16
            both = enumerate(zip(chosen, rejected, strict=False))
            start, end = next(i for i, (x, y) in both if x != y), min(len(a), len(b))
            prefix_loss = prefix_loss - log_sigmoid(a[start:end] - b[start:end]).mean() / 16
            logits = hidden[:-1] @ model.get_input_embeddings().weight[:known].T  # B23
            nats = nats + cross_entropy(logits, torch.tensor(chosen[1:]), reduction="sum")
            tokens += len(chosen) - 1
        lm_loss = nats / tokens
        whole = loss + more["prefix_coef"] * prefix_loss + more["lm_coef"] * lm_loss
        whole.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    expected = {"loss": loss, "prefix_loss": prefix_loss, "lm_loss": lm_loss, "grad_norm": norm}
    return metrics_of(out)[0], {k: v.item() for k, v in expected.items()}


def test_d45_the_pairwise_loss_on_beginnings(reward_model, data, tmp_path):
    """A mean over tokens, from the first in which the two differ; its weight is the flag's."""
    coefs = {"prefix_coef": 2.0, "lm_coef": 0.0}
    line, expected = run_with_more_losses(reward_model, data, tmp_path / "out", **coefs)
    for name in ("loss", "prefix_loss", "grad_norm"):
        assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    assert "lm_loss" not in line


@pytest.mark.parametrize("padded", [False, True])
def test_d46_the_language_model_loss_on_the_chosen_texts(
    base, reward_model, data, padded, tmp_path
):
    """Every token of them but the first, with the embeddings as output layer."""
    flags = {"prefix_coef": 0.0, "lm_coef": 0.5}
    if padded:
        model, tokenizer = plain_lm(base.plain), encoding.load_tokenizer(base.plain)
        model.resize_token_embeddings(len(tokenizer) + 64)
        flags["model"] = save_pair(tmp_path / "padded", model, tokenizer)
    line, expected = run_with_more_losses(reward_model, data, tmp_path / "out", **flags)
    for name in ("loss", "lm_loss", "grad_norm"):
        assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    assert "prefix_loss" not in line


def test_d12_the_reward_model_sees_each_pair_once(reward_model, tmp_path):
    """138 pairs in batches of 16 are nine steps."""
    import reward_model as module

    out = reward_model(tmp_path / "out", epochs=module.Args().epochs)
    assert len(metrics_of(out)) == math.ceil(138 / 16)


@pytest.mark.parametrize("std", [False, True])
def test_d13_the_mean_score_of_the_demonstrations_is_zero(reward_model, data, std, tmp_path):
    """By plain forward passes of the saved model, the margin too (B18); unit variance by choice."""
    out = reward_model(tmp_path / "out", normalize_std=std)
    pairs = [(row["prompt"], row["completion"]) for row in rows_of(data.sft, "train")]
    scores, config = plain_scores(out, sequences_of(out, pairs)), plain_classifier(out).config
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert config.reward_mean != 0
    assert (config.reward_std != 1) == std
    assert not std or scores.std() == pytest.approx(1, abs=1e-3)
    chosen, rejected = scores_by_side(out, rows_of(data.preferences))
    margin = summary_of(out)["mean_margin"]
    assert margin == pytest.approx(np.mean(chosen - rejected), abs=1e-4)


def test_d13_demonstrations_that_are_too_long_are_counted(reward_model, data, capsys, tmp_path):
    """They have no part in the mean score, and the stage says so."""
    rows = rows_of(data.sft, "train")
    long = [{"prompt": "Q:", "completion": " two figs" * 100}] * 3
    out = reward_model(tmp_path / "out", normalize_with=write_data(tmp_path / "data", rows + long))
    kept = rows_of(tmp_path / "data", "train")
    assert f"3 of {len(kept)} demonstrations exceed" in capsys.readouterr().out
    pairs = [(row["prompt"], row["completion"]) for row in kept if row not in long]
    scores = plain_scores(out, sequences_of(out, pairs))
    assert scores.mean() == pytest.approx(0, abs=1e-4)


def test_d14_accuracy_comes_with_interval_and_length(chain, data):
    """Accuracy, margin and correlation with length, from the saved model's own forward pass."""
    out, rows = chain.reward_model, rows_of(data.preferences)
    summary = summary_of(out)
    chosen, rejected = scores_by_side(out, rows)
    assert summary["accuracy"] == pytest.approx(np.mean(chosen > rejected))
    assert summary["mean_margin"] == pytest.approx(np.mean(chosen - rejected), abs=1e-4)
    texts = [("", row[side]) for side in ("chosen", "rejected") for row in rows]
    lengths = [len(ids) for ids in sequences_of(out, texts)]
    correlation = np.corrcoef(np.concatenate([chosen, rejected]), lengths)[0, 1]
    assert summary["score_length_correlation"] == pytest.approx(correlation, abs=1e-4)
    # Wilson: the shares p with |share - p| <= z sqrt(p (1 - p) / n)
    share, (low, high) = summary["accuracy"], summary["accuracy_interval"]
    for p in (low, high):
        if 0 < p < 1:
            assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 12), abs=1e-6)
    assert low < share <= high


def test_equal_scores_are_half_right(reward_model, models, tmp_path):
    """D14: those of a model that says 0 to everything, at a rate that is 0 in float32."""
    model = plain_classifier(models.reward_model)
    model.model.norm.weight.data.zero_()
    folder = save_pair(tmp_path / "model", model, encoding.load_tokenizer(str(models.reward_model)))
    summary = summary_of(reward_model(tmp_path / "out", model=folder, learning_rate=1e-50))
    assert (summary["accuracy"], summary["mean_margin"]) == (0.5, 0)
    assert summary["score_length_correlation"] == 0


def test_d15_values_start_from_the_reward_model(runs, models, ppo, rewards, tmp_path):
    """In a network of its own; without a reward model from the policy with a head of zeros."""
    recomputed.check_values(runs("default"), models)
    flags = {"reward_fn": f"{rewards}:length", "save_rollouts": 1, "save_every": 1}
    out = ppo(tmp_path / "out", **flags, learning_rate=1e-2)
    first, second = rollouts_of(out)
    assert (first.a["values"] == 0).all()
    assert np.abs(second.a["values"]).max() > 1e-3
    files = {p.name for p in (out / "checkpoint" / "000001").iterdir()}
    assert files >= {"model.safetensors", "value_model.safetensors"}


def test_d16_responses_end_with_the_first_stop_token(runs):
    """What follows is padding; there is room for a fixed number of tokens."""
    recomputed.check_masks(runs("default"))
    recomputed.check_masks(runs("stop-token"))


def test_d17_the_score_is_added_at_the_last_real_token(runs):
    """Be it EOS or the last that there was room for; all others pay the KL penalty only."""
    recomputed.check_rewards(runs("default"))


def test_d18_a_response_without_an_end_loses_a_constant(runs, models):
    """Those that end in neither EOS nor the stop token lose the penalty, the others nothing."""
    recomputed.check_scores(runs("stop-token"), models)
    recomputed.check_metrics(runs("stop-token"))  # how many ended


@pytest.mark.parametrize("name", ["default", "k2", "k3-whitened"])
def test_d19_kl_estimators(runs, name):
    """Per token: the log-ratio x, half its square, exp(-x) - 1 + x."""
    recomputed.check_rewards(runs(name))


def test_d20_whitened_rewards_keep_their_mean(runs):
    """Their variance is 1."""
    recomputed.check_rewards(runs("k3-whitened"))


@pytest.mark.parametrize("name", ["default", "discounted", "one-step", "monte-carlo"])
def test_d21_generalized_advantage_estimation(runs, name):
    """The sum of (gamma lambda)^k delta[t + k], with a value of 0 after the last real token."""
    recomputed.check_rewards(runs(name))


@pytest.mark.parametrize("name", ["default", "discounted"])
def test_d22_advantages_are_whitened(runs, name):
    """Mean 0 and variance 1 over the real tokens of the batch; by choice left as they are."""
    recomputed.check_rewards(runs(name))


@pytest.fixture(scope="module")
def redone(ppo, models, tmp_path_factory):
    """Three passes over a batch in large steps: metrics, those expected, weights of both."""
    flags = {"cliprange": 0.1, "cliprange_value": 0.15, "vf_coef": 0.5, "learning_rate": 3e-3}
    flags |= {"entropy_coef": 0.02, "num_ppo_epochs": 3, "total_episodes": 8, "save_rollouts": 1}
    out = ppo(tmp_path_factory.mktemp("redone") / "out", **flags, micro_batch_size=2, kl_coef=0.3)
    expected, policy, _ = recomputed.redone(out, models)
    weights, expected_weights = (
        dict(model.named_parameters()) for model in (plain_lm(out), policy)
    )
    return metrics_of(out)[0], expected, weights, expected_weights


def test_d23_policy_loss(redone):
    """The larger of the unclipped and the clipped loss, and how often the clip bites."""
    logged, expected, weights, expected_weights = redone
    assert expected["policy/clipfrac_avg"] > 0.05
    names = "loss/policy_avg policy/clipfrac_avg policy/approxkl_avg val/ratio val/ratio_var"
    for name in names.split():
        assert logged[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-4)


def test_d24_value_loss(redone):
    """Half the larger of the squared errors of the new value and of the one kept near the old."""
    logged, expected, _, _ = redone
    assert expected["val/clipfrac_avg"] > 0.05
    for name in ("loss/value_avg", "val/clipfrac_avg", "grad_norm"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_d33_entropy_bonus(redone):
    """Its gradient is in the step, so the next passes' entropy and gradient follow it."""
    logged, expected, _, _ = redone
    for name in ("policy/entropy_avg", "grad_norm"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-4), name


def check_checkpoint(out: Path, update: int, expected: tuple) -> None:
    """The weights of both models in it are those that `redone` ends with."""
    for name, model in zip(("model", "value_model"), expected[1:], strict=True):
        weights = load_file(out / "checkpoint" / f"{update:06d}" / f"{name}.safetensors")
        for key, weight in model.named_parameters():
            torch.testing.assert_close(weights[key], weight.detach(), rtol=0, atol=1e-4)


def test_d25_mini_batches_take_more_steps(ppo, models, tmp_path):
    """Four in two epochs are eight steps, over rows in another order each, by their own tokens."""
    flags = {"num_mini_batches": 4, "micro_batch_size": 2, "save_every": 1, "save_rollouts": 1}
    out = ppo(tmp_path / "out", **flags, total_episodes=24)
    state = load_file(out / "checkpoint" / "000001" / "optimizer.safetensors")
    assert {v.item() for k, v in state.items() if k.endswith(".step")} == {8.0}
    expected = recomputed.redone(out, models, updates=2)
    assert metrics_of(out)[1]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)
    check_checkpoint(out, 2, expected)


def test_d26_the_ratio_starts_at_one(runs, ppo, monkeypatch, tmp_path):
    """As old log-probabilities are made as in training; one that is not is seen in the metric."""
    for name in ("default", "cold", "hot"):
        rows = metrics_of(runs(name))
        assert all(row["val/ratio_start_error"] < 1e-5 for row in rows)
        assert abs(rows[-1]["objective/kl"]) > 0.01  # the policy is no longer the reference
    in_chunks = utils.in_chunks

    def bent(*given):  # in training passes the first token is more probable by a factor of e
        outputs = in_chunks(*given)  # [N, 2], log-probabilities and entropies
        is_first = torch.arange(outputs.numel()).view_as(outputs) == 0
        return outputs + is_first if torch.is_grad_enabled() else outputs

    monkeypatch.setattr(utils, "in_chunks", bent)
    (row,) = metrics_of(ppo(tmp_path / "out", total_episodes=8))
    assert row["val/ratio_start_error"] == pytest.approx(math.e - 1, rel=1e-4)


@pytest.mark.parametrize(("target", "sign"), [(1e-6, 1), (1e6, -1)])
def test_d27_kl_coef_is_steered_to_a_target(ppo, target, sign, tmp_path):
    """Up where the KL is above the target, down below: by the clipped error times B / horizon."""
    flags = {"total_episodes": 40, "kl_target": target, "kl_horizon": 80, "kl_coef": 0.1}
    out = ppo(tmp_path / "out", **flags, learning_rate=1e-2, save_rollouts=1)
    rows = metrics_of(out)
    coefficients = [row["objective/kl_coef"] for row in rows]
    assert [rollout.number("kl_coef") for rollout in rollouts_of(out)] == coefficients
    assert coefficients[0] == 0.1
    for row, now, after in zip(rows, coefficients, coefficients[1:], strict=False):
        error = min(max(row["objective/kl"] / target - 1, -0.2), 0.2)
        assert after == pytest.approx(now * (1 + error * 8 / 80))
    assert sign * (coefficients[-1] - coefficients[1]) > 0


def test_d28_epochs_end_at_a_target_kl(ppo, tmp_path):
    """The second epoch is past a tiny target; a huge one stops nothing."""
    flags = {"total_episodes": 8}
    two, six = (ppo(tmp_path / str(n), num_ppo_epochs=n, **flags) for n in (2, 6))
    assert_same_run(two, ppo(tmp_path / "tiny", num_ppo_epochs=6, target_kl=1e-8, **flags))
    assert_same_run(six, ppo(tmp_path / "huge", num_ppo_epochs=6, target_kl=1e8, **flags))


def test_d30_scores_are_clipped_after_the_penalty(runs, models):
    """On both sides; the metrics report what was clipped."""
    recomputed.check_scores(runs("clipped"), models)
    recomputed.check_metrics(runs("clipped"))


@pytest.mark.parametrize("text", [False, True])
def test_d31_ptx_adds_a_language_model_loss(ppo, models, text, tmp_path):
    """On one demonstration, the first update's is the model's own, in nats per token (D9)."""
    row = {"prompt": "Q: two ripe plums?\nA:", "completion": " Yes, two plums."}
    rows = [{"text": row["prompt"] + row["completion"]} if text else row] * 2
    path = write_jsonl(tmp_path / "ptx" / "train.jsonl", rows)
    out = ppo(tmp_path / "out", ptx_coef=0.5, ptx_dataset=str(path.parent), num_ppo_epochs=1)
    tokenizer = encoding.load_tokenizer(str(models.sft))
    prompt, completion = (tokenizer(row[k])["input_ids"] for k in ("prompt", "completion"))
    if text:
        prompt, completion = prompt[:1], prompt[1:] + completion
    completion = [*completion, tokenizer.eos_token_id]
    expected = -plain_logprobs(plain_lm(models.sft), prompt, completion).mean()
    assert metrics_of(out)[0]["loss/ptx_avg"] == pytest.approx(expected, abs=1e-5)


def test_d32_the_critic_may_be_trained_alone_first(ppo, models, data, tmp_path):
    """In the warm-up neither PPO nor ptx moves the policy, and the value function learns."""
    flags = {"total_episodes": 24, "learning_rate": 3e-3, "save_every": 2}
    flags |= {"ptx_coef": 1.0, "ptx_dataset": data.sft, "kl_target": 6.0, "kl_horizon": 20}
    out = ppo(tmp_path / "a", critic_warmup_updates=2, **flags)
    checkpoint = out / "checkpoint" / "000002"
    before, after = weights_of(models.sft), weights_of(checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = metrics_of(out)
    assert [row["policy/approxkl_avg"] > 0 for row in rows] == [False, False, True]
    assert len({row["objective/kl_coef"] for row in rows}) == 1  # its KL is 0, and no sign
    value = load_file(checkpoint / "value_model.safetensors")
    assert not torch.equal(value["score.weight"], weights_of(models.reward_model)["score.weight"])
    after = weights_of(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["batch_mean", "batch_mean-raw"])
def test_d34_batch_mean_is_a_baseline(runs, name):
    """The response's reward, KL included, less the batch's mean, on each of its tokens."""
    recomputed.check_rewards(runs(name))


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_d35_responses_to_one_prompt_are_compared(runs, advantage):
    """With the mean of the others, or with mean and deviation of all."""
    recomputed.check_rewards(runs(advantage))


A_SCORE = "-0.1 * len(p)"
FOR_TOKENS = "[0.7] * (len(ids) - 1) + [-len(p) / 8 - 0.7 * (len(ids) - 1)]"


@pytest.mark.parametrize("score", [A_SCORE, FOR_TOKENS, None])
def test_d35_equal_responses_teach_nothing(ppo, score, tmp_path):
    """Where groups of equal rewards are all there is, rounding is not made into advantages."""
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, completion_ids, **columns):\n"
        f"    return [{score} for p, ids in zip(prompts, completion_ids)]\n"
    )
    # of three equal numbers the mean may be another
    flags = {"samples_per_prompt": 3, "reward_fn": f"{tmp_path / 'f.py'}:f"}
    if score is None:  # a reward model, in micro-batches that divide a prompt's equal responses
        flags = {"samples_per_prompt": 4, "top_k": 1}
    flags |= {"batch_size": 12, "micro_batch_size": 4 if score else 6, "total_episodes": 12}
    flags |= {"advantage": "grpo", "dtype": "float32", "save_rollouts": 1}
    out = ppo(tmp_path / "out", kl_coef=0, missing_eos_penalty=0, **flags)
    assert np.ptp(rollouts_of(out)[0].a["scores"]) > 0
    assert not rollouts_of(out)[0].a["advantages"].any()


@pytest.mark.parametrize("flags", [{"top_k": 1}, {"top_p": 1e-6}])
def test_d36_top_k_and_top_p_change_sampling_only(ppo, flags, tmp_path):
    """With one candidate all answers agree, but log-probabilities are over all tokens (B11)."""
    out = ppo(tmp_path / "out", samples_per_prompt=4, save_rollouts=1, **flags)
    rollout, row = rollouts_of(out)[0], metrics_of(out)[0]
    responses = rollout.a["response_ids"].reshape(2, 4, -1)
    assert (responses == responses[:, :1]).all()
    assert rollout.a["logprobs"][rollout.real].max() < -1e-6
    assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert row["val/ratio_start_error"] < 1e-5


def test_d37_explained_variance(runs):
    """1 - Var(returns - values) / Var(returns), over real tokens."""
    recomputed.check_metrics(runs("default"))


ONE_BATCH = {"num_ppo_epochs": 3, "total_episodes": 16, "save_rollouts": 1, "save_every": 1}
ONE_BATCH |= {"micro_batch_size": 2, "kl_coef": 0.3}  # before the rate falls


def test_d38_a_rate_of_the_value_function(ppo, models, tmp_path):
    """It takes larger steps, or smaller, than the policy, and they fall as well (D6)."""
    flags = ONE_BATCH | {"learning_rate": 1e-3, "value_learning_rate": 5e-3, "total_episodes": 32}
    out = ppo(tmp_path / "out", **flags, keep_checkpoints=3)
    for update in (1, 3):
        check_checkpoint(out, update, recomputed.redone(out, models, update))
    assert [row["lr"] for row in metrics_of(out)] == [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]


def test_d39_the_ratio_may_rise_further_than_it_falls(ppo, models, tmp_path):
    """Loss, share of clipped tokens and weights of a batch with two ranges."""
    flags = ONE_BATCH | {"cliprange": 0.05, "cliprange_high": 0.4, "learning_rate": 3e-3}
    out = ppo(tmp_path / "out", **flags)
    expected, policy, _ = recomputed.redone(out, models)
    logged = metrics_of(out)[0]
    assert expected["policy/clipfrac_avg"] > 0.05
    for name in ("loss/policy_avg", "policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    weights = load_file(out / "checkpoint" / "000001" / "model.safetensors")
    for key, weight in policy.named_parameters():
        torch.testing.assert_close(weights[key], weight.detach(), rtol=0, atol=1e-4)


def test_d40_returns_have_a_lambda_of_their_own(runs):
    """Values learn the sums of (gamma value_lam)^k delta[t + k], advantages are by lam."""
    recomputed.check_rewards(runs("value-lam"))
    assert rollouts_of(runs("value-lam"))[0].meta["value_lam"] == "1.0"
    assert rollouts_of(runs("discounted"))[0].meta["value_lam"] == "0.8"  # that of lam


@pytest.mark.parametrize("ensemble", ["min", "mean_minus_std"])
def test_d41_reward_models_are_an_ensemble(together, models, second, ensemble):
    """The least of the weighted scores, or mean minus deviation; functions are added to it."""
    both = SimpleNamespace(second=second, reward_model=models.reward_model)
    rewarded.check_scores(together(ensemble), both, ensemble)


JUDGE = """
import json, pathlib
def judge(prompts, completions, **columns):
    path = pathlib.Path(__file__).with_name("means.json")
    first, *rest = json.loads(path.read_text())
    path.write_text(json.dumps(rest))
    return [first] * len(prompts)
"""


@pytest.mark.parametrize(("later", "best"), [((-6, -8), 1), ((-4, -8), 3), ((-6, -4), 4)])
def test_d42_the_best_policy_is_kept(ppo, error_of, later, best, tmp_path):
    """By the judge's mean, be it of the first, a later or the last evaluation, and on --resume."""
    (tmp_path / "judge.py").write_text(JUDGE)
    means, out = tmp_path / "means.json", tmp_path / "out"
    flags = {"eval_reward_fn": f"{tmp_path / 'judge.py'}:judge", "keep_best": True}
    flags |= {"total_episodes": 32, "eval_every": 1, "save_every": 1, "keep_checkpoints": 9}
    means.write_text("[-1, -5, -7]")  # of the reference, which is no candidate, and two updates
    assert "update 3" in error_of(ppo, out, code=1, **flags)
    means.write_text(str([-1, *later]))  # of the reference, update 3 and the end
    ppo(out, **flags, resume=True)
    last = out if best == 4 else out / "checkpoint" / f"{best:06d}"
    kept, expected = weights_of(out / "best"), weights_of(last)
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert plain_lm(out / "best").generation_config.max_new_tokens == 10
    record, judged = summary_of(out / "best"), {1: -5, 3: later[0], 4: later[1]}
    assert (record["update"], record["eval"]["policy"]["judge"]) == (best, judged[best])
    assert encoding.load_tokenizer(str(out / "best")).eos_token
