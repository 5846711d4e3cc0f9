"""One test for each bug that others shipped, B1 to B22 in DETAILS.md; it fails with the bug put in (mutations.py)."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    Rollout,
    make_gpt2,
    make_model,
    make_tokenizer,
    metrics_of,
    plain_classifier,
    plain_lm,
    plain_scores,
    preference_rows,
    rollouts_of,
    rows_of,
    save_pair,
    sft_rows,
    summary_of,
    target_logits,
    weights_of,
    write_data,
)

import dataset
import generate
import utils

CPU = torch.device("cpu")
SHORT, LONG = [40], [30, 31, 32, 33, 34, 35, 36]


def rollout_of(out, update: int = 1) -> Rollout:
    """A saved rollout."""
    return rollouts_of(out)[update - 1]


def prompts_and_responses(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """The real tokens of each row."""
    return [(rollout.prompt(i), rollout.response(i)) for i in range(len(rollout.real))]


def penalties_of(rollout: Rollout) -> np.ndarray:
    """What is left of the rewards without the scores: the KL penalty."""
    penalties = rollout.a["rewards"].copy()
    penalties[np.arange(len(penalties)), rollout.lengths - 1] -= rollout.a["scores"]
    return penalties


@pytest.fixture(scope="module")
def moved(ppo, tmp_path_factory):
    """Three updates with large steps, k3 as the penalty: log-ratios, values and rewards are far from 0."""
    out = tmp_path_factory.mktemp("moved") / "out"
    flags = {
        "total_episodes": 24,
        "save_rollouts": 1,
        "learning_rate": 1e-2,
        "kl_coef": 0.3,
        "kl_estimator": "k3",
    }
    return ppo(out, **flags, whiten_advantages=False)


def test_b01_the_score_is_on_the_last_real_token(ppo, tmp_path):
    """huggingface/trl#3750, #1893, #5338: it was added on the pad token after EOS."""
    rollout = rollout_of(ppo(tmp_path / "out", save_rollouts=1, kl_coef=0.0))
    assert (rollout.lengths < 10).any()  # some responses are followed by padding
    expected = np.zeros((8, 10))
    expected[np.arange(8), rollout.lengths - 1] = rollout.a["scores"]
    np.testing.assert_array_equal(rollout.a["rewards"], expected)


def test_b02_the_missing_eos_penalty_knows_the_stop_token(ppo, rewards, tmp_path):
    """huggingface/trl#3750, #5338: with another stop token than EOS it hit every response, or none."""
    flags = {"reward_fn": f"{rewards}:nothing", "stop_token": ".", "missing_eos_penalty": 3.0}
    out = ppo(tmp_path / "out", save_rollouts=1, batch_size=16, response_length=6, **flags)
    rollout, tokenizer = rollout_of(out), utils.load_tokenizer(str(out))
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(".")}
    expected = [
        0.0 if response[-1] in stops else -3.0 for _, response in prompts_and_responses(rollout)
    ]
    assert set(expected) == {0.0, -3.0}
    assert rollout.a["scores"].tolist() == expected


def test_b03_an_eos_in_the_prompt_is_no_end(ppo, base, data, rewards, tmp_path):
    """huggingface/trl#6805: a chat template puts EOS into the prompt, so no response seemed to lack it."""
    flags = {"model": base.chat, "dataset": data.chat_prompts, "reward_fn": f"{rewards}:nothing"}
    out = ppo(
        tmp_path / "out", save_rollouts=1, response_length=2, missing_eos_penalty=3.0, **flags
    )
    rollout, eos = rollout_of(out), utils.load_tokenizer(str(out)).eos_token_id
    rows = prompts_and_responses(rollout)
    assert all(eos in prompt for prompt, _ in rows)
    assert rollout.a["scores"].tolist() == [
        0.0 if response[-1] == eos else -3.0 for _, response in rows
    ]
    assert (rollout.a["scores"] == -3.0).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_b04_eos_is_seen_though_it_is_the_pad_token(model, side):
    """huggingface/trl#5303: masks made by comparing ids with the pad id hid real EOS tokens."""
    eos = 1
    sequences = [[10, eos, 11, 12, eos], [20, eos]]
    ids, mask = dataset.pad(sequences, eos, side, CPU)
    assert mask.sum(1).tolist() == [5, 2]
    with torch.no_grad():
        padded = model(**utils.model_inputs(model, ids, mask)).logits[mask.bool()]
        alone = [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]
    torch.testing.assert_close(padded, torch.cat(alone), rtol=0, atol=1e-5)


def test_b05_a_reward_model_with_another_tokenizer_reads_text(ppo, reward_model, base, tmp_path):
    """huggingface/trl#3595: the policy's ids went into a reward model to which they mean other words, or none."""
    judge = reward_model(tmp_path / "reward_model", model=base.other)
    out = ppo(tmp_path / "out", reward_model=str(judge), eval_prompts=12)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    tokenizer = utils.load_tokenizer(str(judge))
    assert len(tokenizer) != len(utils.load_tokenizer(str(out)))
    for name in ("reference", "policy"):
        sequences = [
            tokenizer(s["prompt"])["input_ids"]
            + tokenizer(s[name], add_special_tokens=False)["input_ids"]
            + [tokenizer.eos_token_id]
            for s in samples
        ]
        assert [s[f"{name}_score"] for s in samples] == pytest.approx(
            plain_scores(judge, sequences), abs=1e-4
        )


def test_b05_chats_go_through_the_reward_models_own_template(
    ppo, reward_model, base, data, tmp_path
):
    """The policy's template and special tokens mean nothing to a reward model of another family."""
    tokenizer = make_tokenizer(size=300, eos="<|end|>")
    turn = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '<|end|>' }}{% endfor %}"
    )
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    other = save_pair(tmp_path / "other", make_model(tokenizer), tokenizer)
    judge = reward_model(
        tmp_path / "rm", model=other, dataset=data.chat_preferences, normalize_with=data.chat_sft
    )
    flags = {"model": base.chat, "dataset": data.chat_prompts, "reward_model": str(judge)}
    out = ppo(tmp_path / "out", eval_prompts=12, **flags)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for name in ("reference", "policy"):
        sequences = [
            tokenizer(f"[user] {row['prompt'][0]['content']}<|end|>[assistant] ")["input_ids"]
            + tokenizer(f"{s[name]}<|end|>")["input_ids"]
            for row, s in zip(rows_of(data.chat_prompts), samples, strict=True)
        ]
        expected = plain_scores(judge, sequences)
        assert [s[f"{name}_score"] for s in samples] == pytest.approx(expected, abs=1e-4)


def test_b06_padding_is_not_counted_in_metrics(ppo, models, tmp_path):
    """huggingface/trl#6803, natolambert/rlhf-book#216: KL, entropy, clip fraction were means over padding too."""
    out = ppo(tmp_path / "out", save_rollouts=1, num_ppo_epochs=1, total_episodes=8)
    rollout, (row,), policy = rollout_of(out), metrics_of(out), plain_lm(models.sft)
    real, entropies = rollout.real, []
    assert not real.all()
    for prompt, response in prompts_and_responses(rollout):
        with torch.no_grad():
            logits = (
                policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
            )
        entropies.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))
    value_errors = (rollout.a["values"] - rollout.a["returns"])[real]
    expected = {
        "policy/entropy_avg": torch.cat(entropies).mean().item(),
        "loss/policy_avg": -rollout.a["advantages"][real].mean(),
        "loss/value_avg": (value_errors**2).mean() / 2,
        "val/ratio": 1.0,
        "response/length": real.sum() / 8,
        "objective/entropy": -rollout.a["logprobs"][real].sum() / 8,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_b07_nothing_on_padding_reaches_real_tokens(moved):
    """natolambert/rlhf-book#216, huggingface/trl#7024: rewards and values on padding leaked into advantages."""
    for update in (1, 2, 3):
        rollout = rollout_of(moved, update)
        for name in ("rewards", "values", "advantages", "returns"):
            assert (rollout.a[name][~rollout.real] == 0).all(), name
        rows, last = np.arange(8), rollout.lengths - 1  # at the end nothing is to come
        expected = (rollout.a["rewards"] - rollout.a["values"])[rows, last]
        np.testing.assert_allclose(rollout.a["advantages"][rows, last], expected, atol=1e-5)


def test_b08_advantages_are_whitened_over_real_tokens(ppo, tmp_path):
    """NovaSky-AI/SkyRL#1305: the mean was over padding too."""
    rollout = rollout_of(ppo(tmp_path / "out", save_rollouts=1))
    advantages = rollout.a["advantages"][rollout.real]
    assert not rollout.real.all()
    assert advantages.mean() == pytest.approx(0, abs=1e-6)
    assert advantages.var() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_b09_what_is_masked_may_be_anything(bad):
    """OpenRLHF/OpenRLHF#1240: a masked position held NaN or infinity, and 0 x NaN is NaN."""
    x = torch.tensor([[1.0, bad], [3.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1]])
    assert utils.masked_sum(x, mask).item() == 9.0
    assert utils.masked_mean(x, mask).item() == 3.0
    assert utils.whiten(x, mask)[0, 1].item() == 0.0
    (gradient,) = torch.autograd.grad(utils.masked_sum(3 * x, mask), x)
    assert gradient.tolist() == [[3.0, 0.0], [3.0, 3.0]]


def test_b10_padding_changes_no_probability():
    """huggingface/trl#256, #1005: other positions, other log-probabilities, and a KL below 0."""
    model = make_gpt2()  # learned positions: a wrong one shows at once
    with torch.no_grad():
        alone = model(torch.tensor([LONG])).logits[0, :-1]
        for width in (7, 8, 30):  # prompts to sample from
            ids, mask = dataset.pad([SHORT, LONG], 0, "left", CPU, width)
            logits = model(**utils.model_inputs(model, ids, mask)).logits[1, -len(LONG) : -1]
            torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
        ids, mask = dataset.pad([SHORT, LONG], 0, "right", CPU, 40)  # sequences to learn from
        logits, tokens = target_logits(model, ids, mask.bool() & (torch.arange(2) == 1)[:, None])
        assert tokens.tolist() == LONG[1:]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


def test_b11_samples_come_from_the_distribution_that_is_scored(tokenizer):
    """huggingface/trl#1017, #235: minimum length and penalties changed sampling alone, and the KL went below 0."""
    model = make_model(tokenizer)
    model.generation_config.update(
        min_new_tokens=3, repetition_penalty=5.0, top_k=1, temperature=9.0
    )
    prompts, prompt_mask = dataset.pad([LONG] * 4000, 0, "left", CPU)
    with torch.no_grad():
        p = model(torch.tensor([LONG])).logits[0, -1].double().softmax(-1)
    eos = int(p.argmax())  # a token that is often the very first
    rng = utils.generator(CPU, 1)
    ids, mask = generate.generate(model, prompts, prompt_mask, 1, [eos], 0, rng=rng)
    counts = torch.bincount(ids[:, 0], minlength=len(p)).double()
    standard_error = (p * (1 - p) / 4000).sqrt()
    assert ((counts / 4000 - p).abs() <= 5 * standard_error + 1e-3).all()
    assert p[eos] * 4000 > 30  # so that a ban on ending would show
    assert mask.sum() == 4000


@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo"])
def test_b12_accumulation_is_exact(request, name, tmp_path):
    """huggingface/trl#2596, huggingface/transformers#34191: means of micro-batches were averaged."""
    stage, flags = (
        request.getfixturevalue(name),
        {"batch_size": 8, "learning_rate": 1e-3, "max_grad_norm": 1e-3},
    )
    a, b = (stage(tmp_path / str(size), micro_batch_size=size, **flags) for size in (8, 2))
    # the first gradient: sums that differ in order alone
    assert metrics_of(a)[0]["grad_norm"] == pytest.approx(metrics_of(b)[0]["grad_norm"], rel=1e-4)
    for (key, x), y in zip(weights_of(a).items(), weights_of(b).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_b13_the_reported_kl_is_the_one_that_is_trained_on(moved):
    """huggingface/trl#1161: the KL in the log was computed apart from the penalty."""
    for update, row in enumerate(metrics_of(moved), 1):
        rollout = rollout_of(moved, update)
        penalty = penalties_of(rollout).sum(1).mean()
        assert row["objective/non_score_reward"] == pytest.approx(penalty, rel=1e-4, abs=1e-5)
        log_ratio = (rollout.a["logprobs"] - rollout.a["ref_logprobs"])[rollout.real]
        assert row["objective/kl"] == pytest.approx(log_ratio.sum() / 8, rel=1e-4, abs=1e-5)
    assert abs(penalty / 0.3 + row["objective/kl"]) > 0.01  # k3 and k1 do differ here


def test_b14_values_are_of_the_state_before_the_token(moved, models):
    """wyf3/llm_related#36: they were read one position late, when the token was already known."""
    rollout, model = rollout_of(moved), plain_classifier(models.reward_model)
    for i, (prompt, response) in enumerate(prompts_and_responses(rollout)):
        states = [prompt + response[:t] for t in range(len(response))]
        expected = plain_scores(models.reward_model, states)
        np.testing.assert_allclose(rollout.a["values"][i, : len(response)], expected, atol=1e-4)
    assert model.config.reward_mean != 0


def test_b15_advantages_are_of_the_return(ppo, tmp_path):
    """natolambert/rlhf-book#216: reward minus value, where what is still to come belongs too."""
    flags = {"lam": 1.0, "whiten_advantages": False, "kl_coef": 0.0}
    rollout = rollout_of(ppo(tmp_path / "out", save_rollouts=1, **flags))
    returns = (
        rollout.a["scores"][:, None] * rollout.real
    )  # undiscounted: the score, from every token
    np.testing.assert_allclose(rollout.a["returns"], returns, atol=1e-4)
    np.testing.assert_allclose(rollout.a["advantages"], returns - rollout.a["values"], atol=1e-4)


def test_b16_distance_from_the_reference_costs(moved):
    """volcengine/verl, commit a65c915: the sign was wrong and the KL was maximized."""
    rollout = rollout_of(moved, 3)
    penalties = penalties_of(rollout)
    assert penalties.max() <= 1e-6  # k3 is never negative
    assert penalties.min() < -1e-3


def test_b17_one_token_can_be_whitened(ppo, tmp_path):
    """Bessel's correction divides by n - 1, which is 0 for one token in all."""
    one = torch.tensor([[7.0, 0.0]])
    assert utils.masked_variance(one, torch.tensor([[1, 0]])).item() == 0.0
    assert utils.whiten(one, torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]
    flags = {
        "response_length": 1,
        "batch_size": 1,
        "micro_batch_size": 1,
        "total_episodes": 2,
        "whiten_rewards": True,
    }
    for row in metrics_of(ppo(tmp_path / "out", **flags)):
        assert all(np.isfinite(value) for value in row.values())


def test_b18_a_saved_reward_model_keeps_head_and_normalization(reward_model, data, tmp_path):
    """Value-head wrappers lost them, and the reward model scored at random."""
    out = reward_model(tmp_path / "out", normalize_std=True)
    tokenizer = utils.load_tokenizer(str(out))
    lines = [json.loads(line) for line in open(f"{data.sft}/train.jsonl", encoding="utf-8")]
    texts = [
        tokenizer(r["prompt"] + r["completion"])["input_ids"] + [tokenizer.eos_token_id]
        for r in lines
    ]
    scores = plain_scores(out, texts)
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-3)
    model = utils.load_classifier(str(out), CPU, trained=True)
    raw = utils.last_token_scores(
        model, *dataset.pad(texts[:5], tokenizer.pad_token_id, "right", CPU)
    )
    got = utils.normalize_scores(model, raw).detach()
    np.testing.assert_allclose(got.numpy(), scores[:5], atol=1e-4)


def test_b18_a_reward_model_without_a_head_is_refused(ppo, models, tmp_path, capsys):
    """transformers would make one up, at random."""
    with pytest.raises(SystemExit) as exit_:
        ppo(tmp_path / "out", reward_model=str(models.sft))
    assert exit_.value.code == 2
    assert "reward_model.py" in capsys.readouterr().err


def test_b19_the_reward_model_is_asked_about_whole_texts(ppo, models, tmp_path):
    """huggingface/trl#5813: trained on texts that end in EOS, it was asked about texts without."""
    out = ppo(tmp_path / "out", save_rollouts=1, missing_eos_penalty=0.0)
    rollout, eos = rollout_of(out), utils.load_tokenizer(str(out)).eos_token_id
    rows = prompts_and_responses(rollout)
    assert any(response[-1] != eos for _, response in rows)
    sequences = [p + r + ([] if r[-1] == eos else [eos]) for p, r in rows]
    np.testing.assert_allclose(
        rollout.a["scores"], plain_scores(models.reward_model, sequences), atol=1e-4
    )


def test_b20_the_score_is_read_at_the_end_not_at_a_pad_id_in_the_text(base):
    """huggingface/trl#6952: in a chat the first pad id may be a turn's end inside the prompt."""
    model, pad = utils.load_classifier(base.plain, CPU), 0
    torch.nn.init.normal_(model.score.weight)
    sequences = [[10, pad, 11, 12, pad], [20, 21], [pad, 30, 31]]
    got = utils.last_token_scores(model, *dataset.pad(sequences, pad, "right", CPU)).detach()
    model.config.pad_token_id = None  # transformers' own search for the end, which compares ids
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_b21_with_pad_as_eos_chosen_and_rejected_differ(reward_model, tmp_path):
    """RLHFlow/RLHF-Reward-Modeling#49, huggingface/trl#937: both were read at a padded position and scored alike."""
    outs = []
    for pad in ("<pad>", "<eos>"):
        tokenizer = make_tokenizer(pad=pad)
        base = save_pair(
            tmp_path / pad.strip("<>"), make_model(tokenizer, pad_token_id=None), tokenizer
        )
        outs.append(
            reward_model(tmp_path / f"rm-{pad.strip('<>')}", model=base, normalize_with="none")
        )
    a, b = outs
    for x, y in zip(metrics_of(a), metrics_of(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
        assert x["margin"] == pytest.approx(y["margin"], abs=1e-5)
    assert summary_of(b)["accuracy"] > 0.9
    assert summary_of(b)["mean_margin"] == pytest.approx(summary_of(a)["mean_margin"], abs=1e-4)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_b22_a_smaller_last_batch_counts_by_its_own_size(name, request, tmp_path):
    """modelscope/ms-swift#10084: it was divided by the size of a full one."""
    stage, rows = request.getfixturevalue(name), sft_rows() if name == "sft" else preference_rows()
    flags = {"dataset": write_data(tmp_path / "data", rows[::12][:12], 2), "micro_batch_size": 2}
    a, b = (metrics_of(stage(tmp_path / str(size), batch_size=size, **flags)) for size in (10, 16))
    assert len(a) == len(b) == 1
    assert a[0]["loss"] == b[0]["loss"]
    assert a[0]["grad_norm"] == b[0]["grad_norm"] > 0


def test_b22_ppo_has_full_batches_only(ppo, tmp_path, capsys):
    """By construction: episodes that do not fill a batch are not sampled, and batches divide evenly."""
    assert len(metrics_of(ppo(tmp_path / "out", total_episodes=23))) == 2
    with pytest.raises(SystemExit):
        ppo(tmp_path / "uneven", batch_size=8, num_mini_batches=4, micro_batch_size=4)
    assert "--num-mini-batches" in capsys.readouterr().err
