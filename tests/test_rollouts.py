"""Saved rollouts, recomputed from scratch: numpy and plain transformers against what PPO trained on."""

import numpy as np
import pytest
import torch
from conftest import (
    Rollout,
    metrics_of,
    plain_classifier,
    plain_lm,
    plain_logprobs,
    plain_scores,
    rollouts_of,
)
from safetensors.torch import load_model

import utils

FLAGS = {  # every way in which rewards, advantages and returns are made
    "default": {},
    "k2": {"kl_estimator": "k2"},
    "k3-whitened": {"kl_estimator": "k3", "whiten_rewards": True},
    "discounted": {"gamma": 0.9, "lam": 0.8, "whiten_advantages": False},
    "one-step": {"lam": 0.0, "whiten_rewards": True, "gamma": 0.95},
    "monte-carlo": {"lam": 1.0},
    "penalty-clipped": {
        "missing_eos_penalty": 3.0,
        "reward_clip": 2.0,
        "kl_target": 1.0,
        "kl_horizon": 20,
    },
    "cold-mini-batches": {
        "temperature": 0.6,
        "num_mini_batches": 2,
        "micro_batch_size": 2,
        "top_k": 20,
    },
    "hot-checkpointed": {"temperature": 1.5, "gradient_checkpointing": True},
    "other-stop-token": {"stop_token": ".", "missing_eos_penalty": 2.0},
    "batch-mean": {"advantage": "batch_mean"},
    "batch-mean-raw": {
        "advantage": "batch_mean",
        "whiten_advantages": False,
        "whiten_rewards": True,
    },
    "rloo": {"advantage": "rloo", "samples_per_prompt": 4, "whiten_advantages": False},
    "grpo": {
        "advantage": "grpo",
        "samples_per_prompt": 4,
        "whiten_advantages": False,
        "kl_estimator": "k3",
    },
}
TENSORS = {
    "prompt_ids",
    "prompt_mask",
    "response_ids",
    "response_mask",
    "logprobs",
    "ref_logprobs",
    "values",
}
TENSORS |= {"rewards", "advantages", "returns", "scores"}


@pytest.fixture(scope="module")
def runs(ppo, tmp_path_factory):
    """`runs(name)`: the folder of a run of three updates with those flags, made once."""
    folder, made = tmp_path_factory.mktemp("rollouts"), {}

    def run(name):
        if name not in made:
            common = {
                "total_episodes": 24,
                "save_rollouts": 1,
                "save_every": 2,
                "learning_rate": 1e-2,
                "kl_coef": 0.3,
            }
            made[name] = ppo(folder / name, **common | FLAGS[name])
        return made[name]

    return run


@pytest.fixture(params=FLAGS)
def run(request, runs):
    """A run with each of the FLAGS."""
    return runs(request.param)


def stop_ids_of(out) -> set[int]:
    """EOS and, where the flags of a run name one, the stop token."""
    tokenizer = utils.load_tokenizer(str(out))
    return {
        tokenizer.convert_tokens_to_ids(FLAGS[out.name].get("stop_token", "<eos>")),
        tokenizer.eos_token_id,
    }


# -------------------------------------------------------------------------------------------------------------- format


def test_format_is_that_of_the_contract(runs):
    """Names, shapes, types and metadata."""
    for update, rollout in enumerate(rollouts_of(runs("default")), 1):
        tensors = rollout.tensors
        assert tensors.keys() == TENSORS
        B, R, P = 8, 10, tensors["prompt_ids"].shape[1]
        for name, tensor in tensors.items():
            shape = (B,) if name == "scores" else (B, P) if name.startswith("prompt") else (B, R)
            assert tensor.shape == shape, name
            if name not in ("prompt_ids", "prompt_mask", "response_ids", "response_mask"):
                assert tensor.dtype == torch.float32, name
        names = (
            "kl_coef gamma lam temperature whiten_rewards whiten_advantages advantage kl_estimator"
        )
        assert rollout.meta.keys() >= {*names.split(), "missing_eos_penalty", "update"}
        assert rollout.number("update") == update


def test_masks_end_at_the_first_stop_token(run, runs):
    """D16, D3: response_mask is a prefix up to and including the first stop token; what follows is padding."""
    tokenizer = utils.load_tokenizer(str(run))
    stop_ids = stop_ids_of(run)
    ends = []
    for rollout in rollouts_of(run):
        for row, ids in enumerate(rollout.a["response_ids"].tolist()):
            length = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
            assert rollout.a["response_mask"][row].tolist() == [1] * length + [0] * (
                len(ids) - length
            )
            assert set(ids[length:]) <= {tokenizer.pad_token_id}
            ends.append(ids[length - 1] in stop_ids)
        prompt_mask = rollout.a["prompt_mask"]
        assert (np.diff(prompt_mask, axis=1) >= 0).all()  # padded on the left
        assert (prompt_mask[:, -1] == 1).all()
        assert (prompt_mask[:, 0] == 1).any()  # and no wider than it must be
    assert any(ends)  # the tests below are about responses that end
    assert not all(ends)  # and about some that do not


def test_padding_holds_zeros(run):
    """B6, B7: nothing that PPO computes is on padding."""
    for rollout in rollouts_of(run):
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            assert (rollout.a[name][~rollout.real] == 0).all(), name


def test_save_rollouts_every_n_updates(ppo, tmp_path):
    """--save-rollouts 2 saves the second and fourth of five."""
    out = ppo(tmp_path / "out", total_episodes=40, save_rollouts=2)
    assert [p.stem for p in sorted((out / "rollouts").iterdir())] == ["000002", "000004"]


# ------------------------------------------------------------------------------------------- from rewards to returns


def whitened(x: np.ndarray, real: np.ndarray, shift_mean: bool) -> np.ndarray:
    mean, std = x[real].mean(), np.sqrt(x[real].var() + 1e-8)
    return np.where(real, (x - mean) / std + (0 if shift_mean else mean), 0)


def expected_rewards(rollout: Rollout) -> np.ndarray:
    """D17, D19, D20: the KL penalty on every real token and the score on the last."""
    log_ratio = rollout.a["logprobs"] - rollout.a["ref_logprobs"]
    estimators = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": np.exp(-log_ratio) - 1 + log_ratio}
    rewards = np.where(
        rollout.real, -rollout.number("kl_coef") * estimators[rollout.meta["kl_estimator"]], 0
    )
    rewards[np.arange(len(rewards)), rollout.lengths - 1] += rollout.a["scores"]
    return (
        whitened(rewards, rollout.real, shift_mean=False)
        if rollout.on("whiten_rewards")
        else rewards
    )


def expected_advantages(
    rollout: Rollout, rewards: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Advantages and, with a value function, returns: by the definitions, row by row, on real tokens alone."""
    kind, gamma, lam = rollout.meta["advantage"], rollout.number("gamma"), rollout.number("lam")
    advantages, returns = np.zeros_like(rewards), None
    if (
        kind == "gae"
    ):  # D21: A_t is the sum over k of (gamma lambda)^k delta_{t+k}; after the end V is 0
        returns = np.zeros_like(rewards)
        for row, length in enumerate(rollout.lengths):
            values = np.append(rollout.a["values"][row, :length], 0.0)
            deltas = rewards[row, :length] + gamma * values[1:] - values[:-1]
            for t in range(length):
                advantages[row, t] = sum(
                    (gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])
                )
                returns[row, t] = advantages[row, t] + values[t]
    else:
        total = np.array(
            [rewards[row, :length].sum() for row, length in enumerate(rollout.lengths)]
        )
        size = int(rollout.number("samples_per_prompt"))
        for row, length in enumerate(rollout.lengths):
            group = total[row // size * size : row // size * size + size]
            if kind == "batch_mean":  # D34
                advantage = total[row] - total.mean()
            elif kind == "rloo":  # D35
                advantage = total[row] - (group.sum() - total[row]) / (size - 1)
            else:
                advantage = (total[row] - group.mean()) / (group.std() + 1e-4)
            advantages[row, :length] = advantage
    if rollout.on("whiten_advantages"):  # D22
        advantages = whitened(advantages, rollout.real, shift_mean=True)
    return advantages, returns


def test_rewards_advantages_and_returns_follow_from_the_file(run):
    """D17 to D22, D34, D35, B1, B7, B8, B15, B16: all of step 4 and 5, from the file and its metadata alone."""
    for rollout in rollouts_of(run):
        rewards = expected_rewards(rollout)
        np.testing.assert_allclose(rollout.a["rewards"], rewards, rtol=1e-5, atol=1e-5)
        advantages, returns = expected_advantages(rollout, rewards)
        np.testing.assert_allclose(rollout.a["advantages"], advantages, rtol=1e-5, atol=1e-5)
        if returns is not None:
            np.testing.assert_allclose(rollout.a["returns"], returns, rtol=1e-5, atol=1e-5)


def test_the_kl_is_there_to_be_checked(run):
    """The tests above would pass on any KL term if the policy did not move."""
    last = rollouts_of(run)[-1]
    assert np.abs(last.a["logprobs"] - last.a["ref_logprobs"]).max() > 0.1


# ----------------------------------------------------------------------------------------------- what the models say


def stacked(rollout: Rollout, rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as [B, R] with zeros after them."""
    out = np.zeros(rollout.real.shape)
    for row, values in enumerate(rows):
        out[row, : len(values)] = values
    return out


def all_logprobs(model, rollout: Rollout) -> np.ndarray:
    temperature, rows = rollout.number("temperature"), range(len(rollout.real))
    return stacked(
        rollout,
        [plain_logprobs(model, rollout.prompt(i), rollout.response(i), temperature) for i in rows],
    )


@torch.no_grad()
def all_values(model, rollout: Rollout) -> np.ndarray:
    """The head at the state before each response token: one sequence at a time, no padding; normalized as scores."""
    rows = []
    for i in range(len(rollout.real)):
        prompt, response = rollout.prompt(i), rollout.response(i)
        hidden = model.base_model(torch.tensor([prompt + response])).last_hidden_state
        raw = model.score(hidden)[0, len(prompt) - 1 : -1, 0].double().numpy()  # B14
        rows.append(
            (raw - getattr(model.config, "reward_mean", 0.0))
            / getattr(model.config, "reward_std", 1.0)
        )
    return stacked(rollout, rows)


@pytest.mark.parametrize(
    "name", ["default", "cold-mini-batches", "hot-checkpointed", "other-stop-token"]
)
def test_logprobs_are_those_of_the_models(runs, models, name):
    """D2, D5, D26, D36, B10, B11: by teacher forcing without padding, divided by the temperature, over all tokens.

    The policy of update 1 is the start, that of update 3 the checkpoint after update 2; the reference never moves.
    """
    first, second, third = rollouts_of(runs(name))
    reference = plain_lm(models.sft)
    np.testing.assert_allclose(first.a["logprobs"], all_logprobs(reference, first), atol=1e-5)
    for rollout in (first, second, third):
        np.testing.assert_allclose(
            rollout.a["ref_logprobs"], all_logprobs(reference, rollout), atol=1e-5
        )
    policy = plain_lm(models.sft)
    load_model(policy, runs(name) / "checkpoint" / "000002" / "policy.safetensors")
    np.testing.assert_allclose(third.a["logprobs"], all_logprobs(policy, third), atol=1e-5)


def test_values_are_read_one_position_before_the_token(runs, models):
    """B14: also of the value network as trained, from the checkpoint after update 2.

    The offset of the normalization is compared in the test above, here differences between tokens are.
    """
    third = rollouts_of(runs("default"))[2]
    model = plain_classifier(models.reward_model)
    load_model(model, runs("default") / "checkpoint" / "000002" / "value_model.safetensors")
    expected, got = all_values(model, third), third.a["values"]
    for row, length in enumerate(third.lengths):
        np.testing.assert_allclose(
            np.diff(got[row, :length]), np.diff(expected[row, :length]), atol=1e-5
        )


def test_without_a_reward_model_values_start_at_zero(ppo, rewards, tmp_path):
    """D15: from the policy with a zero head; the first update's values are 0, later ones are not."""
    out = ppo(tmp_path / "out", reward_fn=f"{rewards}:length", save_rollouts=1, learning_rate=1e-2)
    first, second = rollouts_of(out)
    assert (first.a["values"] == 0).all()
    assert np.abs(second.a["values"]).max() > 1e-3


@pytest.mark.parametrize("name", ["default", "penalty-clipped", "other-stop-token", "rloo"])
def test_scores_are_those_of_the_reward_model(runs, models, name):
    """D13, D18, D30, B19: of prompt, response and one EOS, normalized, less the penalty, clipped."""
    out = runs(name)
    tokenizer, flags = utils.load_tokenizer(str(out)), FLAGS[name]
    eos, stop_ids = tokenizer.eos_token_id, stop_ids_of(out)
    for rollout in rollouts_of(out):
        responses = [rollout.response(i) for i in range(8)]
        sequences = [
            rollout.prompt(i) + r + ([] if r[-1] == eos else [eos]) for i, r in enumerate(responses)
        ]
        expected = plain_scores(models.reward_model, sequences)
        expected -= rollout.number("missing_eos_penalty") * np.array(
            [r[-1] not in stop_ids for r in responses]
        )
        if "reward_clip" in flags:
            assert (np.abs(expected) > flags["reward_clip"]).any()
            expected = expected.clip(-flags["reward_clip"], flags["reward_clip"])
        np.testing.assert_allclose(rollout.a["scores"], expected, atol=1e-4)


def test_a_longer_response_length_changes_nothing(ppo, tmp_path):
    """D16: a response that has ended has the same tokens, log-probabilities, values and score, however much follows."""
    flags = {"save_rollouts": 1, "total_episodes": 32, "batch_size": 32, "num_ppo_epochs": 1}
    short, long = (
        rollouts_of(ppo(tmp_path / str(R), response_length=R, **flags))[0] for R in (10, 31)
    )
    ended = [i for i in range(32) if short.lengths[i] < 10]
    assert len(ended) > 3
    for i in ended:
        assert short.response(i) == long.response(i)
    for name in ("logprobs", "ref_logprobs", "values", "rewards"):
        np.testing.assert_allclose(short.a[name][ended], long.a[name][ended, :10], atol=1e-5)
        assert (long.a[name][ended, 10:] == 0).all()
    np.testing.assert_allclose(short.a["scores"][ended], long.a["scores"][ended], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_the_kl_starts_at_zero(run):
    """B10, B11: before the first update the policy is the reference, whatever changes sampling."""
    rows = metrics_of(run)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[-1]["objective/kl"]) > 0.01


def test_objective_metrics_follow_from_the_rollout(run):
    """B6, B13: what is reported is what was trained on, per episode and over real tokens."""
    for row, rollout in zip(metrics_of(run), rollouts_of(run), strict=True):
        a = rollout.a
        log_ratio = a["logprobs"] - a["ref_logprobs"]
        kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": np.exp(-log_ratio) - 1 + log_ratio}
        non_score = -rollout.number("kl_coef") * kl[rollout.meta["kl_estimator"]].sum(1).mean()
        ended = [rollout.response(i)[-1] for i in range(8)]
        stop_ids = stop_ids_of(run)
        expected = {
            "objective/kl": log_ratio.sum(1).mean(),
            "objective/entropy": -a["logprobs"].sum(1).mean(),
            "objective/non_score_reward": non_score,
            "objective/scores": a["scores"].mean(),
            "objective/rlhf_reward": non_score + a["scores"].mean(),
            "objective/kl_coef": rollout.number("kl_coef"),
            "response/length": rollout.lengths.mean(),
            "response/eos_rate": np.mean([t in stop_ids for t in ended]),
            "val/num_eos_tokens": sum(t in stop_ids for t in ended),
        }
        if rollout.meta["advantage"] == "gae":
            residual = (a["returns"] - a["values"])[rollout.real].var()
            expected["val/explained_variance"] = (
                1 - residual / a["returns"][rollout.real].var()
            )  # D37
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def first_pass(rollout: Rollout, models, temperature: float, vf_coef: float) -> dict[str, float]:
    """Metrics of an update of one step, computed from its rollout by autograd: one sequence at a time, no padding."""
    a, real, n = rollout.a, rollout.real, rollout.real.sum()
    policy, value_model = plain_lm(models.sft), plain_classifier(models.reward_model)
    entropy = 0.0
    for i in range(len(real)):
        prompt, response = rollout.prompt(i), rollout.response(i)
        ids, span = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        distribution = (policy(ids).logits[0, span] / temperature).log_softmax(-1)
        entropy -= (distribution.exp() * distribution).sum().item() / n
        logprobs = distribution[torch.arange(len(response)), response]
        advantages, returns, old_values = (
            torch.tensor(a[name][i][real[i]]).float()
            for name in ("advantages", "returns", "values")
        )
        ratio = (logprobs - logprobs.detach()).exp()
        values = value_model.score(value_model.base_model(ids).last_hidden_state)[0, span, 0]
        values = (
            values - values.detach() + old_values
        )  # the gradient of these, at the values of the file
        loss = (-advantages * ratio).sum() + vf_coef * 0.5 * (values - returns).square().sum()
        (loss / n).backward()
    gradients = [
        p.grad for p in [*policy.parameters(), *value_model.parameters()] if p.grad is not None
    ]
    return {
        "loss/policy_avg": -a["advantages"][real].mean(),
        "loss/value_avg": 0.5 * ((a["values"] - a["returns"])[real] ** 2).mean(),
        "policy/entropy_avg": entropy,
        "policy/approxkl_avg": 0.0,
        "policy/clipfrac_avg": 0.0,
        "val/clipfrac_avg": 0.0,
        "val/ratio": 1.0,
        "val/ratio_var": 0.0,
        "grad_norm": torch.sqrt(sum(g.double().square().sum() for g in gradients)).item(),
    }


def test_first_pass_losses_follow_from_the_rollout(ppo, models, tmp_path):
    """D9, D23, D24, D29, B6, B12: at ratio 1, the losses, the entropy and the gradient's norm before clipping."""
    flags = {
        "num_ppo_epochs": 1,
        "total_episodes": 8,
        "save_rollouts": 1,
        "whiten_advantages": False,
    }
    out = ppo(tmp_path / "out", **flags, vf_coef=0.3, temperature=0.8, micro_batch_size=2)
    (rollout,), (row,) = rollouts_of(out), metrics_of(out)
    expected = first_pass(rollout, models, temperature=0.8, vf_coef=0.3)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected["grad_norm"] > 1  # clipped to 1 in the step, not in the report
