"""Known bugs put into the code and details left out of it, each with the test that must then fail.

`test_mutations.py` applies one mutation at a time to a copy of the project and runs its test there.
"""

import re
from typing import NamedTuple

TABLE = """
b01_the_score_is_on_the_last_real_token in ppo_rlhf.py
    scatter_add(1, last[:, None], at_end[:, None])  ->
    scatter_add(1, (last[:, None] + 1).clamp(max=R - 1), at_end[:, None])
b02_the_missing_eos_penalty_knows_the_stop_token in ppo_rlhf.py
    torch.isin(last_ids, torch.tensor(stop_ids, device=device))  ->
    torch.isin(last_ids, torch.tensor([tokenizer.eos_token_id], device=device))
b03_an_eos_in_the_prompt_is_no_end in ppo_rlhf.py
    torch.isin(last_ids, torch.tensor(stop_ids, device=device))  ->
    torch.isin(batch.ids, torch.tensor(stop_ids, device=device)).any(1)
b04_eos_is_seen_though_it_is_the_pad_token in encoding.py
    real.long().to(device)  ->  (ids != pad_id).long().to(device)
b05_a_reward_model_with_another_tokenizer_reads_text in ppo_rlhf.py
    encoding.same_tokenizer(tokenizer, readers[-1][0])  ->  True
b05_chats_go_through_the_reward_models_own_template in encoding.py
    return render(tokenizer, row["prompt"], answer)  ->  return Rendered([text, answer], False)
b06_padding_is_not_counted_in_metrics in ppo_rlhf.py
    utils.masked_sum(x.detach().double(), mask)  ->  x.detach().double().sum()
b07_nothing_on_padding_reaches_real_tokens in ppo_rlhf.py
    torch.zeros(mask.shape, device=device)  ->  torch.ones(mask.shape, device=device)
b08_advantages_are_whitened_over_real_tokens in utils.py
    mean = masked_mean(x, mask)  ->  mean = x.mean()
b09_what_is_masked_may_be_anything in utils.py
    torch.where(mask.bool(), x, 0.0).sum()  ->  (x * mask).sum()
b10_padding_changes_no_probability in utils.py
    (real.cumsum(1) - 1).clamp(min=0)  ->  torch.arange(ids.shape[1]).expand_as(ids)
b11_samples_come_from_the_distribution_that_is_scored in generate.py
    sample(logits, *sampling  ->  sample(logits.index_fill(1, stops, -torch.inf), *sampling
b12_accumulation_is_exact[sft-1] in sft.py
    sum_of_losses(model, rows) / num_tokens  ->
    sum_of_losses(model, rows) / count_targets(rows) * len(rows) / len(batch)
b12_accumulation_is_exact[reward_model-2] in reward_model.py
    F.logsigmoid(margins).sum() / num_pairs  ->  F.logsigmoid(margins).mean()
b12_accumulation_is_exact[ppo-2] in ppo_rlhf.py
    utils.masked_sum(policy_losses - bonus, mask) / num_tokens  ->
    utils.masked_sum(policy_losses - bonus, mask) / mask.sum() * len(rows) / len(minibatch)
b13_the_reported_kl_is_the_one_that_is_trained_on in ppo_rlhf.py
    episode_mean(non_score_rewards.sum(1))  ->  episode_mean(-kl_coef * ref_log_ratio.sum(1))
b14_values_are_of_the_state_before_the_token in ppo_rlhf.py
    utils.hidden_states(value_model, ids)[:, :-1][is_response[:, 1:]]  ->
    utils.hidden_states(value_model, ids)[is_response]
b15_advantages_are_of_the_return in ppo_rlhf.py
    lastgaelam = delta + args.gamma * args.lam * lastgaelam  ->
    lastgaelam = rewards[:, t] - values[:, t]
b16_distance_from_the_reference_costs in ppo_rlhf.py
    -kl_coef * token_kl  ->  kl_coef * token_kl
b17_one_token_can_be_whitened in utils.py
    masked_mean((x - masked_mean(x, mask)) ** 2, mask)  ->
    masked_sum((x - masked_mean(x, mask)) ** 2, mask) / (mask.sum() - 1)
b18_a_saved_reward_model_keeps_head_and_normalization in reward_model.py
    model.config.reward_mean = float(scores.mean())  ->  model.reward_mean = float(scores.mean())
b18_a_reward_model_without_a_head_is_refused in ppo_rlhf.py
    utils.load_classifier(name, at, trained=True)  ->  utils.load_classifier(name, at)
b19_the_reward_model_is_asked_about_whole_texts in encoding.py
    sequences.append(p.ids + answer + end[n:])  ->  sequences.append(p.ids + answer)
b20_the_score_is_read_at_the_end_not_at_a_pad_id_in_the_text[None] in utils.py
    (mask * (ids != pad_id)).cumsum(1).argmax(1)  ->  (ids == 0).long().argmax(1) - 1
b20_the_score_is_read_at_the_end_not_at_a_pad_id_in_the_text[0] in utils.py
    (mask * (ids != pad_id)).cumsum(1).argmax(1)  ->  mask.sum(1) - 1
b21_with_pad_as_eos_chosen_and_rejected_differ in utils.py
    (mask * (ids != pad_id)).cumsum(1).argmax(1)  ->
    torch.full_like(mask[:, 0], mask.shape[1] - 1)
b22_a_smaller_last_batch_counts_by_its_own_size[sft] in sft.py
    num_tokens = count_targets(batch)  ->
    num_tokens = count_targets(batch) * args.batch_size / len(batch)
b22_a_smaller_last_batch_counts_by_its_own_size[reward_model] in reward_model.py
    F.logsigmoid(margins).sum() / num_pairs  ->  F.logsigmoid(margins).sum() / args.batch_size
b22_ppo_has_full_batches_only in ppo_rlhf.py
    num_updates = args.total_episodes // args.batch_size  ->
    num_updates = -(-args.total_episodes // args.batch_size)
d01_reward_and_value_read_prompt_and_response in encoding.py
    sequences.append(p.ids + answer + end[n:])  ->  sequences.append(answer + end[n:])
d02_prompts_are_padded_on_the_left in generate.py
    mask.sum(1, keepdim=True) - 1  ->  torch.full_like(mask[:, :1], mask.shape[1] - 1)
d03_masks_come_from_lengths in generate.py
    (ends.cumsum(1) <= ends).long()  ->  (response_ids != pad_id).long()
d04_dropout_is_off in utils.py
    loaded.to(device).eval()  ->  loaded.to(device).train()
d05_log_probabilities_are_divided_by_the_temperature in ppo_rlhf.py
    utils.logits_of(model, hidden) / args.temperature  ->  utils.logits_of(model, hidden)
d06_optimizer_and_schedule[sft] in sft.py
    eps=1e-5  ->  eps=1e-8
d06_optimizer_and_schedule[reward_model] in reward_model.py
    (1 + math.cos(math.pi * done))  ->  2
d06_optimizer_and_schedule[ppo] in ppo_rlhf.py
    group["rate"] * left  ->  group["rate"]
d07_random_numbers_depend_on_seed_and_update in ppo_rlhf.py
    utils.generator(device, args.seed, SAMPLING, update, 0)  ->
    utils.generator(device, args.seed, SAMPLING, 0)
d08_the_loss_is_on_the_completion_and_its_eos in sft.py
    [learned for _, learned in rows]  ->  [[True] * len(ids) for ids, _ in rows]
d09_a_batch_is_a_mean_over_its_tokens in sft.py
    sum_of_losses(model, rows) / num_tokens  ->
    sum_of_losses(model, rows) / count_targets(rows) / 3
d10_the_head_starts_small_and_random in reward_model.py
    std=1 / math.sqrt(model.score.in_features + 1)  ->  std=0.02
d11_the_loss_is_bradley_terry in reward_model.py
    -F.logsigmoid(margins)  ->  (1 - margins).clamp(min=0)
d12_the_reward_model_sees_each_pair_once in reward_model.py
    epochs: int = 1  ->  epochs: int = 2
d13_the_mean_score_of_the_demonstrations_is_zero in reward_model.py
    float(scores.mean())  ->  float(np.median(scores))
d13_demonstrations_that_are_too_long_are_counted in reward_model.py
    [ids for ids, _ in whole if len(ids) <= max_length]  ->
    [ids[:max_length] for ids, _ in whole]
d14_accuracy_comes_with_interval_and_length in reward_model.py
    pair.chosen_length for pair in eval_pairs  ->  len(pair.chosen) for pair in eval_pairs
d45_the_pairwise_loss_on_beginnings in reward_model.py
    (a != b).cumsum(1).bool() & in_a & in_b  ->  in_a & in_b
d46_the_language_model_loss_on_the_chosen_texts in reward_model.py
    hidden.chunk(2)[0][:, :-1][is_target]  ->  hidden.chunk(2)[0][:, 1:][is_target]
d15_values_start_from_the_reward_model in ppo_rlhf.py
    args.value_model or first  ->  args.value_model or args.model
d16_responses_end_with_the_first_stop_token in generate.py
    torch.where(alive, sampled, pad_id)  ->  sampled
d17_the_score_is_added_at_the_last_real_token in ppo_rlhf.py
    last = response_mask.sum(1) - 1  ->  last = (response_mask.sum(1) - 2).clamp(min=0)
d18_a_response_without_an_end_loses_a_constant in ppo_rlhf.py
    scored.total - args.missing_eos_penalty  ->
    torch.full_like(scored.total, -args.missing_eos_penalty)
d19_kl_estimators[k2] in ppo_rlhf.py
    ref_log_ratio.square() / 2  ->  ref_log_ratio.square()
d19_kl_estimators[k3-whitened] in ppo_rlhf.py
    torch.expm1(-ref_log_ratio) + ref_log_ratio  ->  torch.expm1(ref_log_ratio) - ref_log_ratio
d20_whitened_rewards_keep_their_mean in ppo_rlhf.py
    utils.whiten(rewards, response_mask, shift_mean=False)  ->  utils.whiten(rewards, response_mask)
d21_generalized_advantage_estimation[discounted] in ppo_rlhf.py
    args.gamma * next_values  ->  next_values
d22_advantages_are_whitened[default] in ppo_rlhf.py
    utils.whiten(advantages, response_mask)  ->
    utils.whiten(advantages, response_mask, shift_mean=False)
d23_policy_loss in ppo_rlhf.py
    torch.max(unclipped_losses, -advantages[rows] * clipped_ratio)  ->  unclipped_losses
d24_value_loss in ppo_rlhf.py
    0.5 * torch.max(errors, clipped_errors)  ->  0.5 * torch.min(errors, clipped_errors)
d25_mini_batches_take_more_steps in ppo_rlhf.py
    order.chunk(args.num_mini_batches)  ->  order.chunk(1)
d26_the_ratio_starts_at_one in ppo_rlhf.py
    logprobs[rows], _ = policy_outputs(policy, ids, is_response)  ->
    logprobs[rows], _ = policy_outputs(reference, ids, is_response)
d27_kl_coef_is_steered_to_a_target in ppo_rlhf.py
    args.kl_target - 1, -0.2), 0.2)  ->  args.kl_target - 1, -0.5), 0.5)
d28_epochs_end_at_a_target_kl in ppo_rlhf.py
    epoch_means[-1]["policy/approxkl_avg"] > args.target_kl  ->  False
d29_gradients_are_clipped_by_their_norm[sft] in sft.py
    clip_grad_norm_(parameters, args.max_grad_norm)  ->  clip_grad_norm_(parameters, 1e9)
d29_gradients_are_clipped_by_their_norm[reward_model] in reward_model.py
    clip_grad_norm_(parameters, args.max_grad_norm)  ->  clip_grad_norm_(parameters, 1e9)
d29_gradients_are_clipped_by_their_norm[ppo] in ppo_rlhf.py
    clip_grad_norm_(parameters, args.max_grad_norm)  ->  clip_grad_norm_(parameters, 1e9)
d30_scores_are_clipped_after_the_penalty in ppo_rlhf.py
    scores.clamp(-args.reward_clip, args.reward_clip)  ->  scores.clamp(max=args.reward_clip)
d31_ptx_adds_a_language_model_loss in ppo_rlhf.py
    [learned for _, learned in rows]  ->  [[True] * len(ids) for ids, _ in rows]
d32_the_critic_may_be_trained_alone_first in ppo_rlhf.py
    policy_weights.requires_grad_(update > args.critic_warmup_updates)  ->
    policy_weights.requires_grad_(True)
d32_the_critic_may_be_trained_alone_first in ppo_rlhf.py
    args.ptx_coef and update > args.critic_warmup_updates  ->  args.ptx_coef
d33_entropy_bonus in ppo_rlhf.py
    policy_losses - bonus  ->  policy_losses + bonus
d34_batch_mean_is_a_baseline in ppo_rlhf.py
    distributed.sum_all(episode_rewards.sum())  ->  distributed.sum_all(scores.sum())
d35_responses_to_one_prompt_are_compared[rloo] in ppo_rlhf.py
    others / (args.samples_per_prompt - 1)  ->  others / args.samples_per_prompt
d35_responses_to_one_prompt_are_compared[grpo] in ppo_rlhf.py
    grouped_rewards.std(1, keepdim=True, correction=0)  ->  grouped_rewards.std(1, keepdim=True)
d35_equal_responses_teach_nothing in ppo_rlhf.py
    grouped_rewards - grouped_rewards[:, :1]  ->  grouped_rewards
d36_top_k_and_top_p_change_sampling_only in ppo_rlhf.py
    stop_ids, pad_id=pad_id, **sampling  ->  stop_ids, pad_id=pad_id
d37_explained_variance in ppo_rlhf.py
    utils.masked_variance(returns - values, response_mask)  ->
    utils.masked_mean((returns - values) ** 2, response_mask)
d38_a_rate_of_the_value_function in ppo_rlhf.py
    rates = [args.learning_rate, args.value_learning_rate]  ->
    rates = [args.learning_rate, args.learning_rate]
d39_the_ratio_may_rise_further_than_it_falls in ppo_rlhf.py
    1 + args.cliprange_high  ->  1 + args.cliprange
d40_returns_have_a_lambda_of_their_own in ppo_rlhf.py
    args.gamma * args.value_lam * lastvaluelam  ->  args.gamma * args.lam * lastvaluelam
d41_reward_models_are_an_ensemble[min] in ppo_rlhf.py
    of_models.amin(0)  ->  of_models.amax(0)
d41_reward_models_are_an_ensemble[mean_minus_std] in ppo_rlhf.py
    of_models.std(0, correction=0)  ->  of_models.std(0)
d42_the_best_policy_is_kept in ppo_rlhf.py
    mean > state["best"]  ->  True
"""


class Mutation(NamedTuple):
    """`old`, which stands in `file` exactly once, becomes `new`; `test` is what must then fail."""

    test: str
    file: str
    old: str
    new: str

    def apply(self, source: str) -> tuple[str, int]:
        """The source with the mutation, and how often `old` stands there, however it is laid out.

        White space between tokens and a comma before a closing bracket make no difference.
        """
        tokens = re.findall(r"\w+|[^\w\s]", self.old)
        closing = [r"(?:,\s*)?" if token in ")]}" else "" for token in tokens]
        parts = [before + re.escape(token) for before, token in zip(closing, tokens, strict=True)]
        return re.subn(r"(?<!\w)" + r"\s*".join(parts) + r"(?!\w)", lambda _: self.new, source)


def read(table: str) -> list[Mutation]:
    """Of each mutation a line `test in file`, then indented what it replaces by what."""
    files, found = {"b": "known_bugs", "d": "details"}, []
    for entry in re.split(r"\n(?=\w)", table.strip()):
        heading, change = entry.split("\n", 1)
        (test, file), (old, new) = heading.split(" in "), re.split(r"\s+->\s+", change.strip())
        found.append(Mutation(f"test_{files[test[0]]}.py::test_{test}", file, old, new))
    return found


MUTATIONS = read(TABLE)
