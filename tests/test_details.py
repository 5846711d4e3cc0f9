"""One test for each detail, D1 to D37 in DETAILS.md: it fails where the detail is left out (mutations.py)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    Rollout,
    assert_same_run,
    eval_loss_of,
    make_gpt2,
    make_model,
    metrics_of,
    plain_classifier,
    plain_lm,
    plain_logprobs,
    plain_scores,
    rollouts_of,
    rows_of,
    scores_of,
    sequences_of,
    summary_of,
    weights_of,
    write_data,
    write_jsonl,
)
from safetensors.torch import load_file

import dataset
import generate
import utils

CPU = torch.device("cpu")
PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]


@pytest.fixture(scope="module")
def moved(ppo, tmp_path_factory):
    """Three updates of the default kind, with steps so large that log-ratios, values and rewards are far from 0."""
    flags = {"total_episodes": 24, "save_rollouts": 1, "learning_rate": 1e-2, "kl_coef": 0.3}
    return ppo(tmp_path_factory.mktemp("moved") / "out", **flags)


def total_rewards(rollout: Rollout) -> np.ndarray:
    """Score and KL penalty of each response."""
    log_ratio = rollout.a["logprobs"] - rollout.a["ref_logprobs"]
    return rollout.a["scores"] - rollout.number("kl_coef") * log_ratio.sum(1)


# ---------------------------------------------------------------------------------------------------------- all stages


def test_d01_reward_and_value_read_prompt_and_response(moved, models):
    """As one sequence: a response can only be judged as an answer to its prompt."""
    rollout = rollouts_of(moved)[0]
    eos = utils.load_tokenizer(str(moved)).eos_token_id
    pairs = [(rollout.prompt(i), rollout.response(i)) for i in range(8)]
    whole = [p + r + ([] if r[-1] == eos else [eos]) for p, r in pairs]
    expected = plain_scores(models.reward_model, whole) - [1.0 * (r[-1] != eos) for _, r in pairs]
    np.testing.assert_allclose(rollout.a["scores"], expected, atol=1e-4)
    first = plain_scores(
        models.reward_model, [p for p, _ in pairs]
    )  # V before any token is of the prompt
    np.testing.assert_allclose(rollout.a["values"][:, 0], first, atol=1e-4)


def test_d02_prompts_are_padded_on_the_left(moved):
    """And positions count real tokens: greedy decoding of a padded batch is that of `model.generate` of each alone."""
    for rollout in rollouts_of(moved):
        assert (np.diff(rollout.a["prompt_mask"], axis=1) >= 0).all()
        assert (rollout.a["prompt_mask"][:, -1] == 1).all()
    model = make_gpt2()
    ids, mask = dataset.pad(PROMPTS, 0, "left", CPU, 12)
    got, _ = generate.generate(model, ids, mask, 9, [1], 0, temperature=0)
    for row, prompt in zip(got, PROMPTS, strict=True):
        flags = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": 1, "pad_token_id": 0}
        alone = model.generate(input_ids=torch.tensor([prompt]), **flags)[0, len(prompt) :].tolist()
        assert row.tolist() == alone + [0] * (9 - len(alone))


def test_d03_masks_come_from_lengths(tokenizer):
    """In sampling: where pad is the stop token, the sampled one is real and what follows is not."""
    model = make_model(tokenizer)
    free = generate.generate(
        model, *dataset.pad(PROMPTS, 0, "left", CPU), 9, [10_000], 0, temperature=0
    )[0].tolist()
    row, place, stop = next(
        (i, t, ids[t]) for i, ids in enumerate(free) for t in range(2, 9) if ids[t] not in ids[:t]
    )
    ids, mask = dataset.pad(PROMPTS, stop, "left", CPU)
    a, a_mask = generate.generate(model, ids, mask, 9, [stop], stop, temperature=0)
    b, b_mask = generate.generate(model, ids, mask, 9, [stop], 0, temperature=0)
    assert a_mask[row].sum() == place + 1
    assert torch.equal(a_mask, b_mask)
    assert torch.equal(a * a_mask, b * b_mask)


def test_d04_dropout_is_off(ppo, data, tokenizer, rewards, tmp_path):
    """In training too: the ratio starts at 1 for a model whose configuration asks for dropout."""
    folder = tmp_path / "model"
    make_model(tokenizer, attention_dropout=0.5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = {"reward_fn": f"{rewards}:length", "gradient_checkpointing": True}
    rows = metrics_of(ppo(tmp_path / "out", model=str(folder), **flags))
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-5


def test_d05_log_probabilities_are_divided_by_the_temperature(ppo, models, tmp_path):
    """Those of policy and reference alike."""
    (rollout,) = rollouts_of(
        ppo(tmp_path / "out", save_rollouts=1, total_episodes=8, temperature=0.6)
    )
    model = plain_lm(models.sft)
    for i in range(8):
        expected = plain_logprobs(model, rollout.prompt(i), rollout.response(i), 0.6)
        for name in ("logprobs", "ref_logprobs"):
            np.testing.assert_allclose(rollout.a[name][i, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo"])
def test_d06_optimizer_and_schedule(request, name, monkeypatch, tmp_path):
    """AdamW, eps 1e-5, no weight decay; down to 0, by a cosine after a warm-up or, in PPO, by a line."""
    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: made.append(k) or adamw(*a, **k))
    flags = {"total_episodes": 32} if name == "ppo" else {"warmup_ratio": 0.25, "batch_size": 32}
    rates = [
        row["lr"] for row in metrics_of(request.getfixturevalue(name)(tmp_path / "out", **flags))
    ]
    assert [(k["eps"], k["weight_decay"]) for k in made] == [(1e-5, 0.0)]
    if name == "ppo":
        assert rates == pytest.approx([1e-3 * part for part in (1, 0.75, 0.5, 0.25)])
    else:
        peak, (warm, n) = {"sft": 1e-2, "reward_model": 3e-3}[name], (1, 5)
        cosine = [
            0.5 * (1 + math.cos(math.pi * (step - warm) / (n - warm))) for step in range(1, n)
        ]
        assert rates == pytest.approx([peak, *(peak * part for part in cosine)])


def test_d07_random_numbers_depend_on_seed_and_update(ppo, tmp_path):
    """The same run to the bit from the same seed; and no update draws the numbers of another one."""
    rows = [{"prompt": "Q: two ripe plums?\nA:"}] * 24
    flags = {
        "dataset": write_data(tmp_path / "data", rows, 2),
        "learning_rate": 1e-12,
        "save_rollouts": 1,
    }
    runs = [
        rollouts_of(ppo(tmp_path / name, seed=seed, **flags))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    (a1, a2), (b1, _), (c1, _) = [[r.tensors["response_ids"] for r in run] for run in runs]
    assert torch.equal(a1, b1)
    assert not torch.equal(a1, a2)
    assert not torch.equal(a1, c1)


def test_d09_a_batch_is_a_mean_over_its_tokens(sft, base, data, tmp_path):
    """D8, D9, B22: the mean over the completion tokens of the batch, also where micro-batches differ in size."""
    out = sft(tmp_path / "out", batch_size=12, micro_batch_size=4, warmup_ratio=0)
    rows = rows_of(data.sft, "train")
    _, indices = next(dataset.batches(len(rows), 12, 1, 1, 0))
    expected = eval_loss_of(Path(base.plain), [rows[i] for i in indices])
    assert metrics_of(out)[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo"])
def test_d29_gradients_are_clipped_by_their_norm(request, name, tmp_path):
    """To a norm so small that Adam's eps holds every step near 0; reported is the norm before."""
    stage = request.getfixturevalue(name)
    start = stage(tmp_path / "start", learning_rate=1e-12)
    clipped = stage(tmp_path / "clipped", max_grad_norm=1e-10)
    for (key, x), y in zip(weights_of(start).items(), weights_of(clipped).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert all(row["grad_norm"] > 1e-3 for row in metrics_of(clipped))


# ------------------------------------------------------------------------------------------------ sft and reward model


def test_d08_the_loss_is_on_the_completion_and_its_eos(chain, data):
    """D8: nats per token of completion and EOS, over the held-out rows."""
    expected = eval_loss_of(chain.sft, rows_of(data.sft))
    assert summary_of(chain.sft)["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_d10_the_head_starts_small_and_random(reward_model, tmp_path):
    """From a normal distribution of deviation 1/sqrt(H + 1)."""
    head = weights_of(reward_model(tmp_path / "out", learning_rate=1e-12))["score.weight"]
    assert head.shape == (1, 32)
    assert head.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.3)
    assert abs(head.mean().item()) < 3 / math.sqrt(33 * 32)


def test_d11_the_loss_is_bradley_terry(reward_model, data, tmp_path):
    """The first one is the mean of -log sigmoid of the margins."""
    out = reward_model(
        tmp_path / "out", learning_rate=1e-12, normalize_with="none", micro_batch_size=4
    )
    rows = rows_of(data.preferences, "train")
    _, indices = next(dataset.batches(len(rows), 16, 1, 1, 0))
    batch = [rows[i] for i in indices]
    sides = [
        sequences_of(out, [(row["prompt"], row[side]) for row in batch])
        for side in ("chosen", "rejected")
    ]
    margins = plain_scores(out, sides[0]) - plain_scores(out, sides[1])
    row = metrics_of(out)[0]
    assert row["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert row["accuracy"] == pytest.approx(np.mean(margins > 0))
    assert row["margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert abs(margins).max() > 0.1


def test_d12_the_reward_model_sees_each_pair_once(reward_model, tmp_path):
    """138 pairs in batches of 16 are nine steps."""
    import reward_model as module

    out = reward_model(tmp_path / "out", epochs=module.Args().epochs)
    assert len(metrics_of(out)) == math.ceil(138 / 16)


@pytest.mark.parametrize("normalize_std", [False, True])
def test_d13_the_mean_score_of_the_demonstrations_is_zero(
    reward_model, data, normalize_std, tmp_path
):
    """D13, B18: computed by a plain forward pass of the model as saved; unit variance by choice."""
    out = reward_model(tmp_path / "out", normalize_std=normalize_std)
    rows = rows_of(data.sft, "train")
    scores = plain_scores(
        out, sequences_of(out, [(row["prompt"], row["completion"]) for row in rows])
    )
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert plain_classifier(out).config.reward_mean != 0
    if normalize_std:
        assert scores.std() == pytest.approx(1, abs=1e-3)
    else:
        assert plain_classifier(out).config.reward_std == 1


def test_d14_accuracy_comes_with_interval_and_length(chain, data):
    """D14: accuracy, margin and correlation with length, from the saved model's own forward pass."""
    out, rows = chain.reward_model, rows_of(data.preferences)
    sides = [
        sequences_of(out, [(row["prompt"], row[side]) for row in rows])
        for side in ("chosen", "rejected")
    ]
    prompts = [len(ids) - 1 for ids in sequences_of(out, [(row["prompt"], "") for row in rows])]
    chosen, rejected = (plain_scores(out, side) for side in sides)
    summary = summary_of(out)
    assert summary["accuracy"] == pytest.approx(np.mean(chosen > rejected))
    assert summary["mean_margin"] == pytest.approx(np.mean(chosen - rejected), abs=1e-4)
    lengths = [len(ids) - n for side in sides for ids, n in zip(side, prompts, strict=True)]
    correlation = np.corrcoef(np.concatenate([chosen, rejected]), lengths)[0, 1]
    assert summary["score_length_correlation"] == pytest.approx(correlation, abs=1e-4)
    share, n, z = (
        summary["accuracy"],
        len(rows),
        1.96,
    )  # Wilson: shares p with |share - p| <= z sqrt(p (1 - p) / n)
    low, high = summary["accuracy_interval"]
    for p in (low, high):
        if 0 < p < 1:
            assert abs(share - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), abs=1e-6)
    assert low < share <= high


# ----------------------------------------------------------------------------------------------------------------- PPO


def test_d15_values_start_from_the_reward_model(moved, models, ppo, rewards, tmp_path):
    """In a network of its own; without a reward model from the policy with a head of zeros."""
    first = rollouts_of(moved)[0]
    for i in range(8):
        prompt, response = first.prompt(i), first.response(i)
        expected = plain_scores(
            models.reward_model, [prompt + response[:t] for t in range(len(response))]
        )
        np.testing.assert_allclose(first.a["values"][i, : len(response)], expected, atol=1e-4)
    out = ppo(tmp_path / "out", reward_fn=f"{rewards}:length", save_rollouts=1, save_every=1)
    assert (rollouts_of(out)[0].a["values"] == 0).all()
    files = {p.name for p in (out / "checkpoint" / "000001").iterdir()}
    assert files >= {"policy.safetensors", "value_model.safetensors"}


def test_d16_responses_end_with_the_first_stop_token(moved):
    """What follows is padding; there is room for a fixed number of tokens."""
    tokenizer, ends = utils.load_tokenizer(str(moved)), []
    for rollout in rollouts_of(moved):
        assert rollout.a["response_ids"].shape == (8, 10)
        for i, ids in enumerate(rollout.a["response_ids"].tolist()):
            length = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else 10
            assert rollout.a["response_mask"][i].tolist() == [1] * length + [0] * (10 - length)
            assert set(ids[length:]) <= {tokenizer.pad_token_id}
            ends.append(length)
    assert min(ends) < 10


def test_d17_the_score_is_added_at_the_last_real_token(moved):
    """Be it EOS or the last that there was room for; all others pay the KL penalty alone."""
    for rollout in rollouts_of(moved):
        penalties = -rollout.number("kl_coef") * (rollout.a["logprobs"] - rollout.a["ref_logprobs"])
        expected = np.zeros_like(penalties)
        expected[np.arange(8), rollout.lengths - 1] = rollout.a["scores"]
        np.testing.assert_allclose(rollout.a["rewards"] - penalties, expected, atol=1e-5)


@pytest.mark.parametrize("stop_token", ["eos", ".", " figs"])
def test_d18_a_response_without_an_end_loses_a_constant(ppo, stop_token, tmp_path):
    """D18, B2: responses that end in neither EOS nor the stop token lose exactly the penalty, the others nothing."""
    flags = {"stop_token": stop_token, "save_rollouts": 1, "batch_size": 16, "response_length": 6}
    a, b = (ppo(tmp_path / str(p), missing_eos_penalty=p, **flags) for p in (0.0, 3.0))
    rollout, tokenizer = (
        load_file(b / "rollouts" / "000001.safetensors"),
        utils.load_tokenizer(str(b)),
    )
    stop_ids = [
        tokenizer.eos_token_id,
        tokenizer.encode(stop_token if stop_token != "eos" else "<eos>")[0],
    ]
    by_each = [
        ((rollout["response_ids"] == i) & (rollout["response_mask"] == 1)).any(1) for i in stop_ids
    ]
    ended = by_each[0] | by_each[1]
    assert 0 < ended.sum() < 16
    if stop_token == " figs":  # which some responses end with, before any EOS, and others without
        assert by_each[0].any()
        assert by_each[1].any()
    torch.testing.assert_close(scores_of(a) - scores_of(b), 3.0 * (~ended), rtol=0, atol=1e-5)
    assert len(set(scores_of(b)[~ended].tolist())) > 1  # a constant off the score, not in its place
    row = metrics_of(b)[0]
    assert row["val/num_eos_tokens"] == ended.sum()
    assert row["response/eos_rate"] == pytest.approx(ended.float().mean().item())
    assert row["response/length"] == pytest.approx(rollout["response_mask"].sum().item() / 16)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_d19_kl_estimators(ppo, estimator, tmp_path):
    """Per token: the log-ratio x, half its square, exp(-x) - 1 + x."""
    flags = {"kl_estimator": estimator, "kl_coef": 0.3, "learning_rate": 1e-2, "save_rollouts": 1}
    rollout = rollouts_of(ppo(tmp_path / "out", **flags))[1]
    x = (rollout.a["logprobs"] - rollout.a["ref_logprobs"])[rollout.real]
    expected = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}[estimator]
    paid = -rollout.a["rewards"]
    paid[np.arange(8), rollout.lengths - 1] += rollout.a["scores"]
    np.testing.assert_allclose(paid[rollout.real], 0.3 * expected, atol=1e-5)
    assert np.abs(x).max() > 0.1


def test_d20_whitened_rewards_keep_their_mean(ppo, tmp_path):
    """Their variance is 1."""
    flags = {"kl_coef": 0.3, "learning_rate": 1e-2, "save_rollouts": 1}
    raw, white = (
        rollouts_of(ppo(tmp_path / str(on), whiten_rewards=on, **flags))[0] for on in (False, True)
    )
    before, after = raw.a["rewards"][raw.real], white.a["rewards"][white.real]
    assert after.mean() == pytest.approx(before.mean(), abs=1e-5)
    assert after.std() == pytest.approx(1, abs=1e-4)
    assert abs(before.mean()) > 0.01
    assert before.std() != pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_d21_generalized_advantage_estimation(ppo, gamma, lam, tmp_path):
    """The sum over k of (gamma lambda)^k delta[t + k], with a value of 0 after the last real token."""
    flags = {"gamma": gamma, "lam": lam, "whiten_advantages": False, "total_episodes": 8}
    (rollout,) = rollouts_of(ppo(tmp_path / "out", save_rollouts=1, **flags))
    for i, length in enumerate(rollout.lengths):
        rewards, values = (
            rollout.a["rewards"][i, :length],
            np.append(rollout.a["values"][i, :length], 0.0),
        )
        deltas = rewards + gamma * values[1:] - values[:-1]
        expected = [
            sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(length)
        ]
        np.testing.assert_allclose(rollout.a["advantages"][i, :length], expected, atol=1e-5)
        np.testing.assert_allclose(
            rollout.a["returns"][i, :length], expected + values[:-1], atol=1e-5
        )


def test_d22_advantages_are_whitened(moved, ppo, tmp_path):
    """Mean 0 and variance 1 over the real tokens of the batch; by choice left as they are."""
    for rollout in rollouts_of(moved):
        advantages = rollout.a["advantages"][rollout.real]
        assert advantages.mean() == pytest.approx(0, abs=1e-6)
        assert advantages.std() == pytest.approx(1, abs=1e-4)
    (raw,) = rollouts_of(
        ppo(tmp_path / "out", save_rollouts=1, total_episodes=8, whiten_advantages=False)
    )
    np.testing.assert_allclose(raw.a["advantages"], raw.a["returns"] - raw.a["values"], atol=1e-5)


@pytest.fixture(scope="module")
def redone(ppo, models, tmp_path_factory):
    """Three passes over one batch, redone with plain models: (what was logged, what is expected, the weights of both).

    The steps are so large that both kinds of clipping bite.
    """
    epochs, eps, eps_v, vf_coef, entropy_coef, lr = 3, 0.1, 0.15, 0.5, 0.02, 3e-3
    flags = {
        "cliprange": eps,
        "cliprange_value": eps_v,
        "vf_coef": vf_coef,
        "entropy_coef": entropy_coef,
    }
    flags |= {
        "num_ppo_epochs": epochs,
        "learning_rate": lr,
        "total_episodes": 8,
        "micro_batch_size": 2,
    }
    out = ppo(tmp_path_factory.mktemp("redone") / "out", save_rollouts=1, kl_coef=0.3, **flags)
    (rollout,), (row,) = rollouts_of(out), metrics_of(out)
    policy, value_model = plain_lm(models.sft), plain_classifier(models.reward_model)
    parameters = [*policy.parameters(), *value_model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=1e-5, weight_decay=0.0)
    n = int(rollout.real.sum())
    offsets: dict[
        int, torch.Tensor
    ] = {}  # old values less the head's first output: the normalization
    tokens: dict[str, list[torch.Tensor]] = {}
    grad_norms = []
    for _ in range(epochs):
        for i in range(8):
            prompt, response, real = rollout.prompt(i), rollout.response(i), rollout.real[i]
            old_logprobs, old_values, advantages, returns = (
                torch.tensor(rollout.a[name][i][real]).float()
                for name in ("logprobs", "values", "advantages", "returns")
            )
            ids, span = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
            distribution = policy(ids).logits[0, span].log_softmax(-1)
            entropy = -(distribution.exp() * distribution).sum(-1)
            log_ratio = distribution[torch.arange(len(response)), response] - old_logprobs
            ratio = log_ratio.exp()
            surrogate = torch.min(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
            head = value_model.score(value_model.base_model(ids).last_hidden_state)[0, span, 0]
            values = head + offsets.setdefault(i, old_values - head.detach())
            near = old_values + (values - old_values).clamp(-eps_v, eps_v)
            squares, near_squares = (values - returns) ** 2, (near - returns) ** 2
            value_loss = 0.5 * torch.max(squares, near_squares)
            ((-surrogate + vf_coef * value_loss - entropy_coef * entropy).sum() / n).backward()
            for name, x in {
                "policy/approxkl_avg": 0.5 * log_ratio**2,
                "policy/clipfrac_avg": (
                    ratio.clamp(1 - eps, 1 + eps) * advantages < ratio * advantages
                ).float(),
                "policy/entropy_avg": entropy,
                "loss/policy_avg": -surrogate,
                "loss/value_avg": value_loss,
                "val/clipfrac_avg": (near_squares > squares).float(),
                "val/ratio": ratio,
            }.items():
                tokens.setdefault(name, []).append(x.detach().double())
        grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    expected = {name: torch.cat(x).mean().item() for name, x in tokens.items()}
    expected["val/ratio_var"] = torch.cat(tokens["val/ratio"]).var(correction=0).item()
    expected["grad_norm"] = torch.stack(grad_norms).mean().item()
    logged = {name: row[name] for name in expected}
    return logged, expected, dict(plain_lm(out).named_parameters()), dict(policy.named_parameters())


def test_d23_policy_loss(redone):
    """The larger of the unclipped and the clipped loss, and how often the clip bites."""
    logged, expected, weights, expected_weights = redone
    assert expected["policy/clipfrac_avg"] > 0.05
    for name in (
        "loss/policy_avg",
        "policy/clipfrac_avg",
        "policy/approxkl_avg",
        "val/ratio",
        "val/ratio_var",
    ):
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


def test_d25_mini_batches_take_more_steps(ppo, tmp_path):
    """D25: four mini-batches in two epochs are eight optimizer steps, counted in the optimizer's own state."""
    out = ppo(tmp_path / "out", num_mini_batches=4, micro_batch_size=2, save_every=1)
    state = load_file(out / "checkpoint" / "000001" / "optimizer.safetensors")
    assert {v.item() for k, v in state.items() if k.endswith(".step")} == {8.0}


def test_d26_the_ratio_starts_at_one(ppo, moved, tmp_path):
    """Old log-probabilities are computed as training computes them, whatever changes sampling."""
    out = ppo(tmp_path / "out", top_k=5, num_mini_batches=2, micro_batch_size=2, learning_rate=1e-2)
    assert all(row["val/ratio_start_error"] < 1e-5 for row in metrics_of(out) + metrics_of(moved))
    assert (
        abs(metrics_of(moved)[-1]["objective/kl"]) > 0.01
    )  # the policy is no longer the reference


@pytest.mark.parametrize(("target", "sign"), [(1e-6, 1), (1e6, -1)])
def test_d27_kl_coef_is_steered_to_a_target(ppo, target, sign, tmp_path):
    """D27: up where the KL is above the target, down where it is below, by the clipped error times B / horizon."""
    flags = {
        "total_episodes": 40,
        "kl_target": target,
        "kl_horizon": 80,
        "kl_coef": 0.1,
        "learning_rate": 1e-2,
    }
    rows = metrics_of(ppo(tmp_path / "out", **flags))
    coefficients = [row["objective/kl_coef"] for row in rows]
    assert coefficients[0] == 0.1
    for row, now, after in zip(rows, coefficients, coefficients[1:], strict=False):
        error = min(max(row["objective/kl"] / target - 1, -0.2), 0.2)
        assert after == pytest.approx(now * (1 + error * 8 / 80))
    assert sign * (coefficients[-1] - coefficients[1]) > 0


def test_d28_epochs_end_at_a_target_kl(ppo, tmp_path):
    """D28: the first epoch starts at ratio 1, the second is past a tiny target; a huge one stops nothing."""
    flags = {"total_episodes": 8}
    two, six = (ppo(tmp_path / str(n), num_ppo_epochs=n, **flags) for n in (2, 6))
    assert_same_run(two, ppo(tmp_path / "tiny", num_ppo_epochs=6, target_kl=1e-8, **flags))
    assert_same_run(six, ppo(tmp_path / "huge", num_ppo_epochs=6, target_kl=1e8, **flags))


def test_d30_scores_are_clipped_after_the_penalty(ppo, tmp_path):
    """D30: scores are clipped after the penalty, and the metrics report what was clipped."""
    a, b = (
        ppo(tmp_path / "a", save_rollouts=1),
        ppo(tmp_path / "b", save_rollouts=1, reward_clip=2.5),
    )
    assert torch.equal(scores_of(b), scores_of(a).clamp(-2.5, 2.5))
    assert not torch.equal(scores_of(b), scores_of(a))
    assert metrics_of(b)[0]["objective/scores"] == pytest.approx(
        scores_of(b).mean().item(), abs=1e-5
    )


@pytest.mark.parametrize("text", [False, True])
def test_d31_ptx_adds_a_language_model_loss(ppo, models, text, tmp_path):
    """D31, D9: on a single demonstration, the loss of the first update is the model's own, in nats per token."""
    row = {"prompt": "Q: two ripe plums?\nA:", "completion": " Yes, two plums."}
    rows = [{"text": row["prompt"] + row["completion"]} if text else row] * 2
    path = write_jsonl(tmp_path / "ptx" / "train.jsonl", rows)
    out = ppo(tmp_path / "out", ptx_coef=0.5, ptx_dataset=str(path.parent), num_ppo_epochs=1)
    tokenizer = utils.load_tokenizer(str(models.sft))
    prompt, completion = (tokenizer(row[k])["input_ids"] for k in ("prompt", "completion"))
    if text:
        prompt, completion = prompt[:1], prompt[1:] + completion
    expected = -plain_logprobs(
        plain_lm(models.sft), prompt, [*completion, tokenizer.eos_token_id]
    ).mean()
    assert metrics_of(out)[0]["loss/ptx_avg"] == pytest.approx(expected, abs=1e-5)


def test_d32_the_critic_may_be_trained_alone_first(ppo, models, tmp_path):
    """D32: after warm-up updates only, the policy is where it was and the value function is not; then both learn."""
    out = ppo(
        tmp_path / "a", total_episodes=24, critic_warmup_updates=3, learning_rate=3e-3, save_every=2
    )
    before, after = weights_of(models.sft), weights_of(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = metrics_of(out)
    assert all(row["policy/approxkl_avg"] == 0 for row in rows)
    value = load_file(out / "checkpoint" / "000002" / "value_model.safetensors")
    start = weights_of(models.reward_model)
    assert not torch.equal(value["score.weight"], start["score.weight"])
    out = ppo(tmp_path / "b", total_episodes=24, critic_warmup_updates=2)
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(out).items())


def test_d34_batch_mean_is_a_baseline(ppo, tmp_path):
    """The response's reward, KL included, less the batch's mean, on each of its tokens."""
    flags = {
        "advantage": "batch_mean",
        "whiten_advantages": False,
        "kl_coef": 0.3,
        "learning_rate": 1e-2,
    }
    rollout = rollouts_of(ppo(tmp_path / "out", save_rollouts=1, **flags))[1]
    totals = total_rewards(rollout)
    expected = (totals - totals.mean())[:, None] * rollout.real
    np.testing.assert_allclose(rollout.a["advantages"], expected, atol=1e-5)


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_d35_responses_to_one_prompt_are_compared(ppo, advantage, tmp_path):
    """With the mean of the others, or with mean and deviation of all."""
    flags = {
        "advantage": advantage,
        "samples_per_prompt": 4,
        "whiten_advantages": False,
        "learning_rate": 1e-2,
    }
    rollout = rollouts_of(ppo(tmp_path / "out", save_rollouts=1, kl_coef=0.3, **flags))[1]
    for group in np.split(np.arange(8), 2):
        assert len({tuple(rollout.prompt(i)) for i in group}) == 1
        totals = total_rewards(rollout)[group]
        for i, total in zip(group, totals, strict=True):
            others = np.delete(totals, i - group[0])
            expected = (
                total - others.mean()
                if advantage == "rloo"
                else (total - totals.mean()) / (totals.std() + 1e-4)
            )
            np.testing.assert_allclose(
                rollout.a["advantages"][i, : rollout.lengths[i]], expected, atol=1e-4
            )


@pytest.mark.parametrize("flags", [{"top_k": 1}, {"top_p": 1e-6}])
def test_d36_top_k_and_top_p_change_sampling_only(ppo, flags, tmp_path):
    """D36, B11: with one candidate all answers to a prompt agree; log-probabilities stay those of the whole
    distribution, so the KL starts at 0 and the tokens' probabilities are below 1."""
    out = ppo(tmp_path / "out", samples_per_prompt=4, save_rollouts=1, **flags)
    rollout = load_file(out / "rollouts" / "000001.safetensors")
    responses = rollout["response_ids"].view(2, 4, -1)
    assert (responses == responses[:, :1]).all()
    real = rollout["response_mask"] == 1
    assert rollout["logprobs"][real].max() < -1e-6
    row = metrics_of(out)[0]
    assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert row["val/ratio_start_error"] < 1e-5


def test_d37_explained_variance(moved):
    """1 - Var(returns - values) / Var(returns), over real tokens."""
    for row, rollout in zip(metrics_of(moved), rollouts_of(moved), strict=True):
        returns, values = (rollout.a[name][rollout.real] for name in ("returns", "values"))
        expected = 1 - (returns - values).var() / returns.var()
        assert row["val/explained_variance"] == pytest.approx(expected, abs=1e-4)
        assert abs((returns - values).mean()) > 0.01  # the variance is not the mean square
