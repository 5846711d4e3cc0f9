"""One test for each bug that others shipped, B1 to B22 in docs/details.md (mutations.py)."""

import json

import numpy as np
import pytest
import test_rollouts as recomputed
import torch
from conftest import (
    assert_same_run,
    make_gpt2,
    make_model,
    make_tokenizer,
    metrics_of,
    plain_scores,
    preference_rows,
    rollouts_of,
    rows_of,
    samples_of,
    save_pair,
    sequences_of,
    sft_rows,
    summary_of,
    target_logits,
    write_data,
)

import encoding
import generate
import utils

CPU = torch.device("cpu")
SHORT, LONG = [40], [30, 31, 32, 33, 34, 35, 36]
runs = recomputed.runs


def test_b01_the_score_is_on_the_last_real_token(runs):
    """huggingface/trl#3750, #1893, #5338: it was added on the pad token after EOS."""
    recomputed.check_rewards(runs("default"))


def test_b02_the_missing_eos_penalty_knows_the_stop_token(runs, models):
    """huggingface/trl#3750, #5338: with another stop token it hit every response, or none."""
    recomputed.check_scores(runs("stop-token"), models)


def test_b03_an_eos_in_the_prompt_is_no_end(ppo, base, data, rewards, tmp_path):
    """huggingface/trl#6805: a chat template puts EOS into the prompt, so no response lacked it."""
    flags = {"model": base.chat, "dataset": data.chat_prompts, "reward_fn": f"{rewards}:nothing"}
    flags |= {"save_rollouts": 1, "response_length": 2, "missing_eos_penalty": 3.0}
    out = ppo(tmp_path / "out", **flags)
    rollout, eos = rollouts_of(out)[0], encoding.load_tokenizer(str(out)).eos_token_id
    assert all(eos in rollout.prompt(i) for i in range(8))
    expected = [0.0 if rollout.response(i)[-1] == eos else -3.0 for i in range(8)]
    assert rollout.a["scores"].tolist() == expected
    assert -3.0 in expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_b04_eos_is_seen_though_it_is_the_pad_token(model, side):
    """huggingface/trl#5303: masks made by comparing ids with the pad id hid real EOS tokens."""
    eos = 1
    sequences = [[10, eos, 11, 12, eos], [20, eos]]
    ids, mask = encoding.pad(sequences, eos, side, CPU)
    assert mask.sum(1).tolist() == [5, 2]
    with torch.no_grad():
        padded = model(**utils.model_inputs(model, ids, mask)).logits[mask.bool()]
        alone = [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]
    torch.testing.assert_close(padded, torch.cat(alone), rtol=0, atol=1e-5)


def check_scores_of_texts(out, judge: str, texts: list[tuple[str, str]], tokenizer) -> None:
    """The held-out scores are the reward model's of (before, after) each sample's response."""
    samples = samples_of(out)
    for name in ("reference", "policy"):
        sequences = [
            tokenizer(before)["input_ids"]
            + tokenizer(sample[name] + after, add_special_tokens=False)["input_ids"]
            for sample, (before, after) in zip(samples, texts, strict=True)
        ]
        scores = [sample[f"{name}_score"] for sample in samples]
        assert scores == pytest.approx(plain_scores(judge, sequences), abs=1e-4)


def test_b05_a_reward_model_with_another_tokenizer_reads_text(
    ppo, reward_model, base, data, tmp_path
):
    """huggingface/trl#3595: the policy's ids went into it, to which they mean other words."""
    judge = reward_model(tmp_path / "reward_model", model=base.other)
    out = ppo(tmp_path / "out", reward_model=str(judge), eval_prompts=12)
    tokenizer = encoding.load_tokenizer(str(judge))
    assert len(tokenizer) != len(encoding.load_tokenizer(str(out)))
    texts = [(row["prompt"], tokenizer.eos_token) for row in rows_of(data.prompts)]
    check_scores_of_texts(out, judge, texts, tokenizer)


def test_b05_chats_go_through_the_reward_models_own_template(
    ppo, reward_model, base, data, tmp_path
):
    """The policy's template and special tokens mean nothing to a model of another family."""
    tokenizer = make_tokenizer(size=300, eos="<|end|>")
    turn = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '<|end|>' }}"
    start = "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    tokenizer.chat_template = turn + "{% endfor %}" + start
    other = save_pair(tmp_path / "other", make_model(tokenizer), tokenizer)
    flags = {"dataset": data.chat_preferences, "normalize_with": data.chat_sft}
    judge = reward_model(tmp_path / "rm", model=other, **flags)
    flags = {"model": base.chat, "dataset": data.chat_prompts, "eval_prompts": 12}
    out = ppo(tmp_path / "out", reward_model=str(judge), **flags)
    users = [row["prompt"][0]["content"] for row in rows_of(data.chat_prompts)]
    texts = [(f"[user] {user}<|end|>[assistant] ", "<|end|>") for user in users]
    check_scores_of_texts(out, judge, texts, tokenizer)


def test_b06_padding_is_not_counted_in_metrics(ppo, models, tmp_path):
    """huggingface/trl#6803, natolambert/rlhf-book#216: KL, entropy and losses were over it too."""
    recomputed.check_first_pass(ppo(tmp_path / "out", **recomputed.FIRST_PASS), models)


def test_b07_nothing_on_padding_reaches_real_tokens(runs):
    """natolambert/rlhf-book#216, huggingface/trl#7024: rewards and values there leaked in."""
    recomputed.check_masks(runs("default"))
    recomputed.check_rewards(runs("default"))


def test_b08_advantages_are_whitened_over_real_tokens(runs):
    """NovaSky-AI/SkyRL#1305: the mean was over padding too."""
    recomputed.check_rewards(runs("default"))


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
            ids, mask = encoding.pad([SHORT, LONG], 0, "left", CPU, width)
            logits = model(**utils.model_inputs(model, ids, mask)).logits[1, -len(LONG) : -1]
            torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
        ids, mask = encoding.pad([SHORT, LONG], 0, "right", CPU, 40)  # sequences to learn from
        logits, tokens = target_logits(model, ids, mask.bool() & (torch.arange(2) == 1)[:, None])
        assert tokens.tolist() == LONG[1:]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


def test_b11_samples_come_from_the_distribution_that_is_scored(model):
    """huggingface/trl#1017, #235: minimum length and penalties changed sampling only."""
    unwanted = {"min_new_tokens": 3, "repetition_penalty": 5.0, "top_k": 1, "temperature": 9.0}
    model.generation_config.update(**unwanted)
    prompts = encoding.pad([LONG] * 4000, 0, "left", CPU)
    with torch.no_grad():
        p = model(torch.tensor([LONG])).logits[0, -1].double().softmax(-1)
    eos = int(p.argmax())  # a token that is often the very first
    uniform = generate.random_numbers(len(prompts[0]), 1, utils.generator(CPU, 1))
    ids, _ = generate.generate(model, *prompts, uniform, [eos], pad_id=0)
    counts = torch.bincount(ids[:, 0], minlength=len(p)).double()
    standard_error = (p * (1 - p) / 4000).sqrt()
    assert ((counts / 4000 - p).abs() <= 5 * standard_error + 1e-3).all()
    assert p[eos] * 4000 > 30  # so that a ban on ending would show


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo"])
def test_b12_accumulation_is_exact(request, name, size, tmp_path):
    """huggingface/trl#2596, huggingface/transformers#34191: micro-batches' means were averaged."""
    stage, flags = request.getfixturevalue(name), {"batch_size": 8, "learning_rate": 1e-3}
    flags["max_grad_norm"] = 1e-3  # a wrong scale of the gradient would else be hidden by Adam
    a = stage(tmp_path / "a", micro_batch_size=8, **flags)
    b = stage(tmp_path / "b", micro_batch_size=size, **flags)
    assert_same_run(a, b, tolerance=1e-5)


def test_b13_the_reported_kl_is_the_one_that_is_trained_on(runs):
    """huggingface/trl#1161: the KL in the log was computed apart from the penalty."""
    recomputed.check_metrics(runs("k3-whitened"))


def test_b14_values_are_of_the_state_before_the_token(runs, models):
    """wyf3/llm_related#36: they were read one position late, when the token was already known."""
    recomputed.check_values(runs("default"), models)


def test_b15_advantages_are_of_the_return(runs):
    """natolambert/rlhf-book#216: reward minus value, where what is still to come belongs too."""
    recomputed.check_rewards(runs("monte-carlo"))


def test_b16_distance_from_the_reference_costs(runs):
    """volcengine/verl, commit a65c915: the sign was wrong and the KL was maximized."""
    recomputed.check_rewards(runs("grpo"))  # with k3, which is never negative


def test_b17_one_token_can_be_whitened(ppo, tmp_path):
    """Bessel's correction divides by n - 1, which is 0 for one token in all."""
    one = torch.tensor([[7.0, 0.0]])
    assert utils.masked_variance(one, torch.tensor([[1, 0]])).item() == 0.0
    assert utils.whiten(one, torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]
    flags = {"response_length": 1, "batch_size": 1, "micro_batch_size": 1, "total_episodes": 2}
    for row in metrics_of(ppo(tmp_path / "out", **flags, whiten_rewards=True)):
        assert all(np.isfinite(value) for value in row.values())


def test_b18_a_saved_reward_model_keeps_head_and_normalization(reward_model, data, tmp_path):
    """Value-head wrappers lost them, and the reward model scored at random."""
    out = reward_model(tmp_path / "out", normalize_std=True)
    rows = [(row["prompt"], row["completion"]) for row in rows_of(data.sft, "train")]
    texts = sequences_of(out, rows)
    scores = plain_scores(out, texts)
    assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=1e-4)
    model = utils.load_classifier(str(out), CPU, trained=True)
    raw = utils.last_token_scores(model, *encoding.pad(texts[:5], 0, "right", CPU))
    got = utils.normalize_scores(model, raw).detach()
    np.testing.assert_allclose(got.numpy(), scores[:5], atol=1e-4)


def test_b18_a_reward_model_without_a_head_is_refused(refused, models):
    """transformers would make one up, at random."""
    refused("ppo", "reward_model.py", reward_model=str(models.sft))


def test_b19_the_reward_model_is_asked_about_whole_texts(runs, models):
    """huggingface/trl#5813: trained on texts that end in EOS, it was asked about texts without."""
    recomputed.check_scores(runs("default"), models)


@pytest.mark.parametrize("named", [None, 0])
def test_b20_the_score_is_read_at_the_end_not_at_a_pad_id_in_the_text(base, named):
    """huggingface/trl#6952: in a chat the first pad id may be a turn's end inside the prompt.

    Where the configuration names a pad token, it is not the last of a text, as in transformers: so
    others' models were trained that have EOS for it.
    """
    model, pad = utils.load_classifier(base.plain, CPU), 0
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = named
    sequences = [[10, pad, 11, 12, pad], [20, 21], [pad, 30, 31]]
    got = utils.last_token_scores(model, *encoding.pad(sequences, pad, "right", CPU)).detach()
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_b21_with_pad_as_eos_chosen_and_rejected_differ(sft, reward_model, ppo, tmp_path):
    """RLHFlow/RLHF-Reward-Modeling#49, huggingface/trl#937: both were read at a padded position.

    D3, B4, B20: all three stages give the same run where pad is EOS as where it is not. Without
    more torch would not train the embedding of a configuration's pad token.
    """
    outs = []
    for pad in ("<pad>", "<eos>"):
        folder, tokenizer = tmp_path / pad.strip("<>"), make_tokenizer(pad=pad)
        model = make_model(tokenizer, pad_token_id=None)  # else that row would start at 0
        model.config.pad_token_id = tokenizer.pad_token_id
        base = save_pair(folder / "base", model, tokenizer)
        first = sft(folder / "sft", model=base)
        judge = reward_model(folder / "reward_model", model=str(first))
        config = json.loads((judge / "config.json").read_text())
        assert config["pad_token_id"] == (tokenizer.pad_token_id if pad == "<pad>" else None)
        outs.append((first, judge, ppo(folder / "ppo", model=str(first), reward_model=str(judge))))
    for a, b in zip(*outs, strict=True):
        assert_same_run(a, b, tolerance=1e-5)
    assert summary_of(outs[1][1])["accuracy"] > 0.9


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_b22_a_smaller_last_batch_counts_by_its_own_size(name, request, tmp_path):
    """modelscope/ms-swift#10084: it was divided by the size of a full one."""
    stage, rows = request.getfixturevalue(name), sft_rows() if name == "sft" else preference_rows()
    flags = {"dataset": write_data(tmp_path / "data", rows[::12][:12], 2), "micro_batch_size": 2}
    a, b = (metrics_of(stage(tmp_path / str(size), batch_size=size, **flags)) for size in (10, 16))
    assert len(a) == len(b) == 1
    assert a[0]["loss"] == b[0]["loss"]
    assert a[0]["grad_norm"] == b[0]["grad_norm"] > 0


def test_b22_ppo_has_full_batches_only(ppo, error_of, tmp_path):
    """Episodes that do not fill a batch are not sampled, and batches divide evenly."""
    assert len(metrics_of(ppo(tmp_path / "out", total_episodes=23))) == 2
    out = tmp_path / "uneven"
    assert "multiple of 6" in error_of(ppo, out, batch_size=8, num_mini_batches=3)
    assert "--batch-size" in error_of(ppo, out, batch_size=8, micro_batch_size=3)
