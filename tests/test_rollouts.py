"""Saved rollouts, recomputed in numpy and plain transformers, against what PPO trained on.

The `check_...` functions take the folder of a run; tests of details and known bugs use them too.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    Rollout,
    args_of,
    metrics_of,
    plain_classifier,
    plain_lm,
    plain_logprobs,
    plain_scores,
    rollouts_of,
)
from safetensors.torch import load_model

import encoding
import ppo_rlhf
import utils

RAW = {"whiten_advantages": False}
FLAGS = {  # every way in which rewards, advantages and returns are made
    "default": {},
    "k2": {"kl_estimator": "k2"},
    "k3-whitened": {"kl_estimator": "k3", "whiten_rewards": True},
    "discounted": RAW | {"gamma": 0.9, "lam": 0.8},
    "value-lam": RAW | {"gamma": 0.9, "lam": 0.7, "value_lam": 1.0},
    "one-step": {"lam": 0.0, "whiten_rewards": True, "gamma": 0.95},
    "monte-carlo": {"lam": 1.0},
    "clipped": {"missing_eos_penalty": 0.5, "reward_clip": 0.5, "kl_target": 1.0, "kl_horizon": 20},
    "cold": {"temperature": 0.6, "num_mini_batches": 2, "micro_batch_size": 2, "top_k": 20},
    "hot": {"temperature": 1.5, "gradient_checkpointing": True},
    "stop-token": {"stop_token": ".", "missing_eos_penalty": 2.0},
    "batch_mean": {"advantage": "batch_mean"},
    "batch_mean-raw": RAW | {"advantage": "batch_mean", "whiten_rewards": True},
    "rloo": RAW | {"advantage": "rloo", "samples_per_prompt": 4},
    "grpo": RAW | {"advantage": "grpo", "samples_per_prompt": 4, "kl_estimator": "k3"},
    "grpo-whitened": {"advantage": "grpo", "samples_per_prompt": 2},
}


@pytest.fixture(scope="module")
def runs(ppo, tmp_path_factory):
    """`runs(name)`: a run of three steps so large that nothing stays near 0; made once."""
    folder, made = tmp_path_factory.mktemp("rollouts"), {}
    common = {"total_episodes": 24, "save_rollouts": 1, "save_every": 2, "kl_coef": 0.3}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = ppo(folder / name, **common | {"learning_rate": 1e-2} | FLAGS[name])
        return made[name]

    return run


def stop_ids_of(out: Path) -> set[int]:
    """EOS and, where the flags of a run name one, the stop token."""
    tokenizer = encoding.load_tokenizer(str(out))
    stop_token = FLAGS.get(out.name, {}).get("stop_token", tokenizer.eos_token)
    return {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(stop_token)}


def check_masks(out: Path) -> None:
    """Prompts are padded on the left, responses after their first stop token; there all is 0."""
    pad_id, stop_ids, ends = encoding.load_tokenizer(str(out)).pad_token_id, stop_ids_of(out), []
    for rollout in rollouts_of(out):
        for row, ids in enumerate(rollout.a["response_ids"].tolist()):
            length = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
            assert rollout.real[row].tolist() == [True] * length + [False] * (len(ids) - length)
            assert set(ids[length:]) <= {pad_id}
            ends.append(ids[length - 1] in stop_ids)
        prompt_mask = rollout.a["prompt_mask"]
        assert (np.diff(prompt_mask, axis=1) >= 0).all()
        assert (prompt_mask[:, -1] == 1).all()
        assert (prompt_mask[:, 0] == 1).any()  # no wider than it must be
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            assert (rollout.a[name][~rollout.real] == 0).all(), name
    assert any(ends)  # the checks below are about responses that end
    assert not all(ends)  # and about some that do not


def test_the_format_of_a_saved_rollout(runs):
    """Names, shapes, types and metadata, as documented."""
    ids = {"prompt_ids", "prompt_mask", "response_ids", "response_mask"}
    floats = {"logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "scores"}
    floats |= {"token_rewards"}
    for update, rollout in enumerate(rollouts_of(runs("default")), 1):
        tensors = rollout.tensors
        assert tensors.keys() == ids | floats
        for name, tensor in tensors.items():
            width = tensors["prompt_ids"].shape[1] if name.startswith("prompt") else 10
            assert tensor.shape == ((8,) if name == "scores" else (8, width)), name
            assert name in ids or tensor.dtype == torch.float32, name
        names = {"kl_coef", "gamma", "lam", "temperature", "whiten_rewards", "whiten_advantages"}
        names |= {"value_lam", "advantage", "kl_estimator", "missing_eos_penalty"}
        assert rollout.meta.keys() >= names
        assert rollout.number("update") == update


def test_save_rollouts_every_n_updates(ppo, tmp_path):
    """--save-rollouts 2 saves the second and fourth of five."""
    out = ppo(tmp_path / "out", total_episodes=40, save_rollouts=2)
    assert [p.stem for p in sorted((out / "rollouts").iterdir())] == ["000002", "000004"]


# ---- from scores to returns


def whitened(x: np.ndarray, real: np.ndarray, shift_mean: bool) -> np.ndarray:
    """x at variance 1 over the real tokens."""
    mean, std = x[real].mean(), np.sqrt(x[real].var() + 1e-8)
    return np.where(real, (x - mean) / std + (0 if shift_mean else mean), 0)


def token_kl(rollout: Rollout) -> np.ndarray:
    """D19: the estimate of the KL that a token pays for."""
    x = rollout.a["logprobs"] - rollout.a["ref_logprobs"]
    estimates = {"k1": x, "k2": x**2 / 2, "k3": np.exp(-x) - 1 + x}
    return np.where(rollout.real, estimates[rollout.meta["kl_estimator"]], 0)


def expected_rewards(rollout: Rollout) -> np.ndarray:
    """D17, D19, D20: the KL penalty on every real token and the score on the last.

    What is given to single tokens is theirs, and the last one has the rest of the score.
    """
    token_rewards = rollout.a["token_rewards"]
    rewards = token_rewards - rollout.number("kl_coef") * token_kl(rollout)
    at_end = rollout.a["scores"] - token_rewards.sum(1)
    rewards[np.arange(len(rewards)), rollout.lengths - 1] += at_end
    return whitened(rewards, rollout.real, False) if rollout.on("whiten_rewards") else rewards


def expected_advantages(rollout: Rollout, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [B, R]: by the definitions, row by row, on real tokens only."""
    kind, size = rollout.meta["advantage"], int(rollout.number("samples_per_prompt"))
    advantages, total = np.zeros_like(rewards), rewards.sum(1)
    returns = total[:, None] * rollout.real
    for row, length in enumerate(rollout.lengths):
        group = total[row // size * size : row // size * size + size]
        if kind == "gae":  # D21: the sum of (gamma lambda)^k delta[t + k]; after the end V is 0
            gamma, lam, value_lam = map(rollout.number, ("gamma", "lam", "value_lam"))
            values = np.append(rollout.a["values"][row, :length], 0.0)
            deltas = rewards[row, :length] + gamma * values[1:] - values[:-1]
            for t in range(length):
                k = np.arange(length - t)
                advantages[row, t] = ((gamma * lam) ** k * deltas[t:]).sum()
                returns[row, t] = ((gamma * value_lam) ** k * deltas[t:]).sum() + values[t]  # D40
        elif kind == "batch_mean":  # D34
            advantages[row, :length] = total[row] - total.mean()
        elif kind == "rloo":  # D35
            advantages[row, :length] = total[row] - (group.sum() - total[row]) / (size - 1)
        else:
            advantages[row, :length] = (total[row] - group.mean()) / (group.std() + 1e-4)
    if rollout.on("whiten_advantages"):  # D22
        advantages = whitened(advantages, rollout.real, True)
    return advantages, returns


def check_rewards(out: Path) -> None:
    """Rewards, advantages and returns follow from the rest of the file and its metadata."""
    rollouts = rollouts_of(out)
    for rollout in rollouts:
        rewards = expected_rewards(rollout)
        np.testing.assert_allclose(rollout.a["rewards"], rewards, rtol=1e-5, atol=1e-5)
        advantages, returns = expected_advantages(rollout, rewards)
        np.testing.assert_allclose(rollout.a["advantages"], advantages, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rollout.a["returns"], returns, rtol=1e-5, atol=1e-5)
        size = int(rollout.number("samples_per_prompt"))
        prompts = rollout.a["prompt_ids"].reshape(len(rewards) // size, size, -1)
        assert (prompts == prompts[:, :1]).all()  # responses to one prompt stand side by side
        if rollout.on("whiten_advantages"):
            real = rollout.a["advantages"][rollout.real]
            assert real.mean() == pytest.approx(0, abs=1e-5)
            assert real.std() == pytest.approx(1, abs=1e-4)
    if len(rollouts) > 2:  # else the checks would pass without a KL
        assert np.abs(token_kl(rollouts[-1])).max() > 0.01


# ---- what the models say


def all_logprobs(model, rollout: Rollout) -> np.ndarray:
    """By teacher forcing, one sequence at a time, without padding; as [B, R] with zeros after."""
    logprobs, temperature = np.zeros(rollout.real.shape), rollout.number("temperature")
    for i, length in enumerate(rollout.lengths):
        prompt, response = rollout.prompt(i), rollout.response(i)
        logprobs[i, :length] = plain_logprobs(model, prompt, response, temperature)
    return logprobs


def check_logprobs(out: Path, models) -> None:
    """Those of the start and, in update 3, of checkpoint 2; the reference never moves."""
    first, _, third = rollouts = rollouts_of(out)
    policy, reference = plain_lm(models.sft), plain_lm(models.sft)
    np.testing.assert_allclose(first.a["logprobs"], all_logprobs(reference, first), atol=1e-5)
    for rollout in rollouts:
        expected = all_logprobs(reference, rollout)
        np.testing.assert_allclose(rollout.a["ref_logprobs"], expected, atol=1e-5)
    load_model(policy, out / "checkpoint" / "000002" / "model.safetensors")
    np.testing.assert_allclose(third.a["logprobs"], all_logprobs(policy, third), atol=1e-5)


def check_values(out: Path, models) -> None:
    """The reward model's scores of prompt and tokens so far; in update 3 those of checkpoint 2."""
    first, _, third = rollouts_of(out)
    model, start = plain_classifier(models.reward_model), plain_classifier(models.reward_model)
    assert model.config.reward_mean != 0
    load_model(model, out / "checkpoint" / "000002" / "value_model.safetensors")
    for value_model, rollout in ((start, first), (model, third)):
        for i, length in enumerate(rollout.lengths):
            states = [rollout.prompt(i) + rollout.response(i)[:t] for t in range(length)]
            with torch.no_grad():
                raw = [value_model(torch.tensor([ids])).logits.item() for ids in states]
            expected = (np.array(raw) - model.config.reward_mean) / model.config.reward_std
            np.testing.assert_allclose(rollout.a["values"][i, :length], expected, atol=1e-4)


def check_scores(out: Path, models) -> None:
    """Those of prompt, response and one EOS, normalized, less the penalty, clipped."""
    eos, stop_ids = encoding.load_tokenizer(str(out)).eos_token_id, stop_ids_of(out)
    clip, seen = FLAGS[out.name].get("reward_clip"), []
    for rollout in rollouts_of(out):
        pairs = [(rollout.prompt(i), rollout.response(i)) for i in range(8)]
        sequences = [p + r + ([] if r[-1] == eos else [eos]) for p, r in pairs]
        expected = plain_scores(models.reward_model, sequences)
        penalty = rollout.number("missing_eos_penalty")
        expected -= [0.0 if r[-1] in stop_ids else penalty for _, r in pairs]
        seen.extend(expected)
        if clip is not None:
            expected = expected.clip(-clip, clip)
        np.testing.assert_allclose(rollout.a["scores"], expected, atol=1e-4)
    if clip is not None:
        assert max(seen) > clip and min(seen) < -clip, seen


def test_a_longer_response_length_changes_nothing(ppo, tmp_path):
    """D16: a response that has ended has the same tokens, log-probabilities, values and score."""
    flags = {"save_rollouts": 1, "total_episodes": 32, "batch_size": 32, "num_ppo_epochs": 1}
    outs = [ppo(tmp_path / str(R), response_length=R, **flags) for R in (10, 31)]
    short, long = (rollouts_of(out)[0] for out in outs)
    ended = [i for i in range(32) if short.lengths[i] < 10]
    assert len(ended) > 3
    assert all(short.response(i) == long.response(i) for i in ended)
    for name in ("logprobs", "ref_logprobs", "values", "rewards"):
        np.testing.assert_allclose(short.a[name][ended], long.a[name][ended, :10], atol=1e-5)
    np.testing.assert_allclose(short.a["scores"][ended], long.a["scores"][ended], atol=1e-5)


def check_metrics(out: Path) -> None:
    """What is reported is what was trained on, per episode and over real tokens."""
    rows, stop_ids = metrics_of(out), stop_ids_of(out)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[-1]["objective/kl"]) > 0.01
    for row, rollout in zip(rows, rollouts_of(out), strict=True):
        a, seconds = rollout.a, sum(row[f"time/{part}"] for part in ("rollout", "score", "train"))
        non_score = -rollout.number("kl_coef") * token_kl(rollout).sum(1).mean()
        ended = [rollout.response(i)[-1] in stop_ids for i in range(8)]
        expected = {
            "objective/kl": (a["logprobs"] - a["ref_logprobs"]).sum(1).mean(),
            "objective/entropy": -a["logprobs"].sum(1).mean(),
            "objective/non_score_reward": non_score,
            "objective/scores": a["scores"].mean(),
            "objective/rlhf_reward": non_score + a["scores"].mean(),
            "objective/kl_coef": rollout.number("kl_coef"),
            "response/length": rollout.lengths.mean(),
            "response/eos_rate": np.mean(ended),
            "val/num_eos_tokens": sum(ended),
            "eps": 8 / seconds,
            "tokens_per_second": (a["prompt_mask"].sum() + a["response_mask"].sum()) / seconds,
        }
        if rollout.meta["advantage"] == "gae":  # D37
            returns, errors = a["returns"][rollout.real], (a["returns"] - a["values"])[rollout.real]
            expected["val/explained_variance"] = 1 - errors.var() / returns.var()
            assert abs(errors.mean()) > 1e-3  # the variance is not the mean square
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", FLAGS)
def test_rollouts_follow_from_the_models_and_the_flags(runs, models, name):
    """All that is saved and reported, but for the values, which B14 is about."""
    check_masks(runs(name))
    check_rewards(runs(name))
    check_logprobs(runs(name), models)
    check_scores(runs(name), models)
    check_metrics(runs(name))


def redone(out: Path, models, updates: int = 1) -> tuple[dict[str, float], torch.nn.Module, ...]:
    """Update `updates` by autograd on plain models, unpadded: metrics, policy and values then."""
    args, size = args_of(out), 8
    eps, eps_high, eps_v = (args[f"cliprange{name}"] for name in ("", "_high", "_value"))
    policy, value_model = plain_lm(models.sft), plain_classifier(models.reward_model)
    trained, mean = (policy, value_model), value_model.config.reward_mean
    parameters = [p for model in trained for p in model.parameters()]
    groups = [{"params": [*model.parameters()]} for model in trained]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
    for update, rollout in enumerate(rollouts_of(out)[:updates], 1):
        tokens, grad_norms = {}, []
        left = 1 - (update - 1) / (args["total_episodes"] // size)
        for group, name in zip(optimizer.param_groups, ("", "value_"), strict=True):
            group["lr"] = args[f"{name}learning_rate"] * left
        shuffle = utils.generator("cpu", args["seed"], ppo_rlhf.SHUFFLING, update, 0)
        passes = range(args["num_ppo_epochs"])
        orders = [torch.randperm(size, generator=shuffle) for _ in passes]  # the batch's
        for rows in (part for order in orders for part in order.chunk(args["num_mini_batches"])):
            n = int(rollout.real[rows].sum())
            for i in rows.tolist():
                prompt, response, real = rollout.prompt(i), rollout.response(i), rollout.real[i]
                names = ("logprobs", "values", "advantages", "returns")
                old_logprobs, old_values, advantages, returns = (
                    torch.tensor(rollout.a[name][i][real]).float() for name in names
                )
                ids, span = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
                distribution = (policy(ids).logits[0, span] / args["temperature"]).log_softmax(-1)
                entropy = -(distribution.exp() * distribution).sum(-1)
                log_ratio = distribution[torch.arange(len(response)), response] - old_logprobs
                ratio = log_ratio.exp()
                clipped = ratio.clamp(1 - eps, 1 + eps_high) * advantages
                policy_loss = -torch.min(ratio * advantages, clipped)
                head = value_model.score(value_model.base_model(ids).last_hidden_state)[0, span, 0]
                values = head - mean
                near = old_values + (values - old_values).clamp(-eps_v, eps_v)
                squares, near_squares = (values - returns) ** 2, (near - returns) ** 2
                value_loss = 0.5 * torch.max(squares, near_squares)
                losses = policy_loss + args["vf_coef"] * value_loss - args["entropy_coef"] * entropy
                (losses.sum() / n).backward()
                for name, x in {
                    "policy/approxkl_avg": 0.5 * log_ratio**2,
                    "policy/clipfrac_avg": (clipped < ratio * advantages).float(),
                    "policy/entropy_avg": entropy,
                    "loss/policy_avg": policy_loss,
                    "loss/value_avg": value_loss,
                    "val/clipfrac_avg": (near_squares > squares).float(),
                    "val/ratio": ratio,
                }.items():
                    tokens.setdefault(name, []).append(x.detach().double())
            grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            optimizer.step()
            optimizer.zero_grad()
    metrics = {name: torch.cat(x).mean().item() for name, x in tokens.items()}
    metrics["val/ratio_var"] = torch.cat(tokens["val/ratio"]).var(correction=0).item()
    metrics["grad_norm"] = torch.stack(grad_norms).mean().item()
    return metrics, policy, value_model


FIRST_PASS = {"num_ppo_epochs": 1, "total_episodes": 8, "save_rollouts": 1, "temperature": 0.8}
FIRST_PASS |= {"vf_coef": 0.3, "micro_batch_size": 2, "whiten_advantages": False}


def check_first_pass(out: Path, models) -> None:
    """Losses, entropy and gradient of an update of one step (`FIRST_PASS`), from its rollout."""
    (rollout,), (row,), (again, *_) = rollouts_of(out), metrics_of(out), redone(out, models)
    a, real = rollout.a, rollout.real
    zeros = "policy/approxkl_avg policy/clipfrac_avg val/clipfrac_avg val/ratio_var".split()
    expected = dict.fromkeys(zeros, 0.0) | {
        "loss/policy_avg": -a["advantages"][real].mean(),
        "loss/value_avg": 0.5 * ((a["values"] - a["returns"])[real] ** 2).mean(),
        "policy/entropy_avg": again["policy/entropy_avg"],
        "val/ratio": 1.0,
        "grad_norm": again["grad_norm"],
        "objective/scores": a["scores"].mean(),
        "objective/entropy": -a["logprobs"].sum(1).mean(),
        "response/length": rollout.lengths.mean(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected["grad_norm"] > 1  # clipped to 1 in the step, not in the report
    assert not real.all()
