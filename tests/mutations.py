"""Known bugs put into the code and details left out of it: a line, its replacement, and the test that must then fail.

`test_mutations.py` applies one mutation at a time to a copy of the project and runs its test there.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old`, which stands in `file` exactly once, becomes `new`; `test` is what to run, as pytest takes it."""

    test: str
    file: str
    old: str
    new: str


BUGS = "test_known_bugs.py::test_"
DETAILS = "test_details.py::test_"
MUTATIONS = [
    Mutation(
        f"{BUGS}b01_the_score_is_on_the_last_real_token",
        "ppo_rlhf.py",
        "scatter_add(1, last[:, None], scores[:, None])",
        "scatter_add(1, (last[:, None] + 1).clamp(max=R - 1), scores[:, None])",
    ),
    Mutation(
        f"{BUGS}b02_the_missing_eos_penalty_knows_the_stop_token",
        "ppo_rlhf.py",
        "ended = torch.isin(last_ids, torch.tensor(stop_ids, device=device))",
        "ended = torch.isin(last_ids, torch.tensor([eos_id], device=device))",
    ),
    Mutation(
        f"{BUGS}b03_an_eos_in_the_prompt_is_no_end",
        "ppo_rlhf.py",
        "ended = torch.isin(last_ids, torch.tensor(stop_ids, device=device))",
        "ended = torch.isin(ids, torch.tensor(stop_ids, device=device)).any(1)",
    ),
    Mutation(
        f"{BUGS}b04_eos_is_seen_though_it_is_the_pad_token",
        "utils.py",
        "return torch.tensor(rows, device=device), real.long().to(device)",
        "return torch.tensor(rows, device=device), (torch.tensor(rows) != pad_id).long().to(device)",
    ),
    Mutation(
        f"{BUGS}b05_a_reward_model_with_another_tokenizer_reads_text",
        "ppo_rlhf.py",
        "shared_tokenizer = reward_model is not None and utils.same_tokenizer(tokenizer, reward_tokenizer)",
        "shared_tokenizer = reward_model is not None",
    ),
    Mutation(
        f"{BUGS}b05_chats_go_through_the_reward_models_own_template",
        "ppo_rlhf.py",
        'pairs = [(p.row["prompt"], text) for p, text in zip(prompts, texts, strict=True)]',
        "pairs = [(p.text, text) for p, text in zip(prompts, texts, strict=True)]",
    ),
    Mutation(
        f"{BUGS}b06_padding_is_not_counted_in_metrics",
        "ppo_rlhf.py",
        "sums = [utils.masked_sum(statistics[name], mb_mask).double() for name in STATISTICS]",
        "sums = [statistics[name].sum().double() for name in STATISTICS]",
    ),
    Mutation(
        f"{BUGS}b07_nothing_on_padding_reaches_real_tokens",
        "ppo_rlhf.py",
        "return torch.zeros(response_mask.shape, device=device).masked_scatter(response_mask.bool(), values)",
        "return torch.ones(response_mask.shape, device=device).masked_scatter(response_mask.bool(), values)",
    ),
    Mutation(
        f"{BUGS}b08_advantages_are_whitened_over_real_tokens",
        "utils.py",
        "    mean = masked_mean(x, mask)\n",
        "    mean = x.mean()\n",
    ),
    Mutation(
        f"{BUGS}b09_what_is_masked_may_be_anything",
        "utils.py",
        "return torch.where(mask.bool(), x, 0.0).sum()",
        "return (x * mask).sum()",
    ),
    Mutation(
        f"{BUGS}b10_padding_changes_no_probability",
        "utils.py",
        'given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)',
        'given["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)',
    ),
    Mutation(
        f"{BUGS}b11_samples_come_from_the_distribution_that_is_scored",
        "utils.py",
        "sampled = sample(logits, temperature, top_k, top_p, ",
        "sampled = sample(logits.index_fill(1, stops, -torch.inf), temperature, top_k, top_p, ",
    ),
    Mutation(
        f"{BUGS}b12_accumulation_is_exact[sft]",
        "sft.py",
        "sum_of_losses(mine[i : i + micro_batch_size]) / num_tokens",
        "sum_of_losses(mine[i : i + micro_batch_size]) / count_targets(mine[i : i + micro_batch_size])"
        " * micro_batch_size / len(mine)",
    ),
    Mutation(
        f"{BUGS}b12_accumulation_is_exact[reward_model]",
        "reward_model.py",
        "(losses.sum() / len(batch)).backward()",
        "losses.mean().backward()",
    ),
    Mutation(
        f"{BUGS}b12_accumulation_is_exact[ppo]",
        "ppo_rlhf.py",
        "(loss / num_tokens).backward()",
        "(loss / mb_mask.sum() * len(part) / len(minibatch)).backward()",
    ),
    Mutation(
        f"{BUGS}b13_the_reported_kl_is_the_one_that_is_trained_on",
        "ppo_rlhf.py",
        '"objective/non_score_reward": episode_mean(non_score_rewards.sum(1)),',
        '"objective/non_score_reward": episode_mean(-kl_coef * ref_log_ratio.sum(1)),',
    ),
    Mutation(
        f"{BUGS}b14_values_are_of_the_state_before_the_token",
        "ppo_rlhf.py",
        "values = values[:, :-1][is_response[:, 1:]]",
        "values = values[is_response]",
    ),
    Mutation(
        f"{BUGS}b15_advantages_are_of_the_return",
        "ppo_rlhf.py",
        "lastgaelam = delta + args.gamma * args.lam * lastgaelam",
        "lastgaelam = rewards[:, t] - values[:, t]",
    ),
    Mutation(
        f"{BUGS}b16_distance_from_the_reference_costs",
        "ppo_rlhf.py",
        "non_score_rewards = -kl_coef * token_kl",
        "non_score_rewards = kl_coef * token_kl",
    ),
    Mutation(
        f"{BUGS}b17_one_token_can_be_whitened",
        "utils.py",
        "return masked_mean((x - masked_mean(x, mask)) ** 2, mask)",
        "return masked_sum((x - masked_mean(x, mask)) ** 2, mask) / (mask.sum() - 1)",
    ),
    Mutation(
        f"{BUGS}b18_a_saved_reward_model_keeps_head_and_normalization",
        "reward_model.py",
        "        model.config.reward_mean = float(scores.mean())\n",
        "        model.reward_mean = float(scores.mean())\n",
    ),
    Mutation(
        f"{BUGS}b18_a_reward_model_without_a_head_is_refused",
        "ppo_rlhf.py",
        "utils.load_classifier(args.reward_model, device, trained=True)",
        "utils.load_classifier(args.reward_model, device)",
    ),
    Mutation(
        f"{BUGS}b19_the_reward_model_is_asked_about_whole_texts",
        "ppo_rlhf.py",
        "whole = [r if r[-1] == eos_id else [*r, eos_id] for r in responses]",
        "whole = responses",
    ),
    Mutation(
        f"{BUGS}b20_the_score_is_read_at_the_end_not_at_a_pad_id_in_the_text",
        "utils.py",
        "return outputs.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)",
        "return outputs.gather(1, (ids == 0).long().argmax(1, keepdim=True) - 1).squeeze(1)",
    ),
    Mutation(
        f"{BUGS}b21_with_pad_as_eos_chosen_and_rejected_differ",
        "utils.py",
        "return outputs.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)",
        "return outputs[:, -1]",
    ),
    Mutation(
        f"{BUGS}b22_a_smaller_last_batch_counts_by_its_own_size[sft]",
        "sft.py",
        "num_tokens = count_targets(batch)",
        "num_tokens = count_targets(batch) * args.batch_size / len(batch)",
    ),
    Mutation(
        f"{BUGS}b22_a_smaller_last_batch_counts_by_its_own_size[reward_model]",
        "reward_model.py",
        "(losses.sum() / len(batch)).backward()",
        "(losses.sum() / args.batch_size).backward()",
    ),
    Mutation(
        f"{BUGS}b22_ppo_has_full_batches_only",
        "ppo_rlhf.py",
        "num_updates = args.total_episodes // args.batch_size",
        "num_updates = -(-args.total_episodes // args.batch_size)",
    ),
    Mutation(
        f"{DETAILS}d01_reward_and_value_read_prompt_and_response",
        "ppo_rlhf.py",
        "sequences = [p.ids + r for p, r in zip(prompts, whole, strict=True)]",
        "sequences = whole",
    ),
    Mutation(
        f"{DETAILS}d02_prompts_are_padded_on_the_left",
        "utils.py",
        'given["position_ids"] = mask.sum(1, keepdim=True) - 1',
        'given["position_ids"] = torch.full_like(mask[:, :1], mask.shape[1] - 1)',
    ),
    Mutation(
        f"{DETAILS}d03_masks_come_from_lengths",
        "utils.py",
        "response_mask.index_put_(place, alive.long())",
        "response_mask.index_put_(place, (token != pad_id).long())",
    ),
    Mutation(
        f"{DETAILS}d04_dropout_is_off",
        "utils.py",
        "loaded = loaded.to(device).eval()",
        "loaded = loaded.to(device).train()",
    ),
    Mutation(
        f"{DETAILS}d05_log_probabilities_are_divided_by_the_temperature",
        "ppo_rlhf.py",
        "distribution = (logits / args.temperature).log_softmax(-1)  # D5",
        "distribution = logits.log_softmax(-1)  # D5",
    ),
    Mutation(
        f"{DETAILS}d06_optimizer_and_schedule[sft]",
        "sft.py",
        "eps=1e-5, weight_decay=0.0",
        "eps=1e-8",
    ),
    Mutation(
        f"{DETAILS}d06_optimizer_and_schedule[reward_model]",
        "utils.py",
        "return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup_steps) / (num_steps - warmup_steps)))",
        "return peak",
    ),
    Mutation(
        f"{DETAILS}d06_optimizer_and_schedule[ppo]",
        "ppo_rlhf.py",
        "lr = args.learning_rate * (1 - (update - 1) / num_updates)",
        "lr = args.learning_rate",
    ),
    Mutation(
        f"{DETAILS}d07_random_numbers_depend_on_seed_and_update",
        "ppo_rlhf.py",
        "utils.generator(device, args.seed, SAMPLING, update, process.rank)",
        "utils.generator(device, args.seed, SAMPLING, process.rank)",
    ),
    Mutation(
        f"{DETAILS}d08_the_loss_is_on_the_completion_and_its_eos",
        "sft.py",
        "is_target = mask.bool() & (position >= prompt_lengths[:, None])",
        "is_target = mask.bool() & (position >= 1)",
    ),
    Mutation(
        f"{DETAILS}d09_a_batch_is_a_mean_over_its_tokens",
        "sft.py",
        "sum_of_losses(mine[i : i + micro_batch_size]) / num_tokens",
        "sum_of_losses(mine[i : i + micro_batch_size]) / count_targets(mine[i : i + micro_batch_size]) / 3",
    ),
    Mutation(
        f"{DETAILS}d10_the_head_starts_small_and_random",
        "reward_model.py",
        "std=1 / math.sqrt(model.score.in_features + 1)",
        "std=0.02",
    ),
    Mutation(
        f"{DETAILS}d11_the_loss_is_bradley_terry",
        "reward_model.py",
        "losses = -F.logsigmoid(chosen - rejected)",
        "losses = (1 - chosen + rejected).clamp(min=0)",
    ),
    Mutation(
        f"{DETAILS}d12_the_reward_model_sees_each_pair_once",
        "reward_model.py",
        "epochs: int = 1",
        "epochs: int = 2",
    ),
    Mutation(
        f"{DETAILS}d13_the_mean_score_of_the_demonstrations_is_zero",
        "reward_model.py",
        "        model.config.reward_mean = float(scores.mean())\n",
        "        model.config.reward_mean = float(np.median(scores))\n",
    ),
    Mutation(
        f"{DETAILS}d14_accuracy_comes_with_interval_and_length",
        "reward_model.py",
        "lengths = [p.chosen_length for p in eval_pairs] + [p.rejected_length for p in eval_pairs]",
        "lengths = [len(p.chosen) for p in eval_pairs] + [len(p.rejected) for p in eval_pairs]",
    ),
    Mutation(
        f"{DETAILS}d15_values_start_from_the_reward_model",
        "ppo_rlhf.py",
        "args.value_model or (args.reward_model if shared_tokenizer else args.model)",
        "args.value_model or args.model",
    ),
    Mutation(
        f"{DETAILS}d16_responses_end_with_the_first_stop_token",
        "utils.py",
        "token.copy_(torch.where(alive, sampled, pad_id))",
        "token.copy_(sampled)",
    ),
    Mutation(
        f"{DETAILS}d17_the_score_is_added_at_the_last_real_token",
        "ppo_rlhf.py",
        "last = response_mask.sum(1) - 1",
        "last = (response_mask.sum(1) - 2).clamp(min=0)",
    ),
    Mutation(
        f"{DETAILS}d18_a_response_without_an_end_loses_a_constant",
        "ppo_rlhf.py",
        "scores = torch.where(ended, scores, scores - args.missing_eos_penalty)",
        "scores = torch.where(ended, scores, -args.missing_eos_penalty)",
    ),
    Mutation(
        f"{DETAILS}d19_kl_estimators",
        "ppo_rlhf.py",
        "token_kl = torch.expm1(-ref_log_ratio) + ref_log_ratio",
        "token_kl = torch.expm1(ref_log_ratio) - ref_log_ratio",
    ),
    Mutation(
        f"{DETAILS}d20_whitened_rewards_keep_their_mean",
        "ppo_rlhf.py",
        "utils.whiten(rewards, response_mask, shift_mean=False)",
        "utils.whiten(rewards, response_mask)",
    ),
    Mutation(
        f"{DETAILS}d21_generalized_advantage_estimation",
        "ppo_rlhf.py",
        "delta = rewards[:, t] + args.gamma * next_values - values[:, t]",
        "delta = rewards[:, t] + next_values - values[:, t]",
    ),
    Mutation(
        f"{DETAILS}d22_advantages_are_whitened",
        "ppo_rlhf.py",
        "advantages = utils.whiten(advantages, response_mask)",
        "advantages = utils.whiten(advantages, response_mask, shift_mean=False)",
    ),
    Mutation(
        f"{DETAILS}d23_policy_loss",
        "ppo_rlhf.py",
        "policy_losses = torch.max(unclipped, clipped)",
        "policy_losses = unclipped",
    ),
    Mutation(
        f"{DETAILS}d24_value_loss",
        "ppo_rlhf.py",
        "value_losses = 0.5 * torch.max(error, clipped_error)",
        "value_losses = 0.5 * torch.min(error, clipped_error)",
    ),
    Mutation(
        f"{DETAILS}d25_mini_batches_take_more_steps",
        "ppo_rlhf.py",
        ".chunk(args.num_mini_batches)",
        ".chunk(1)",
    ),
    Mutation(
        f"{DETAILS}d26_the_ratio_starts_at_one",
        "ppo_rlhf.py",
        "logprobs[part, :length], _ = policy_outputs(policy, *inputs)  # D26",
        "logprobs[part, :length], _ = policy_outputs(reference, *inputs)  # D26",
    ),
    Mutation(
        f"{DETAILS}d27_kl_coef_is_steered_to_a_target",
        "ppo_rlhf.py",
        "args.kl_target - 1, -0.2), 0.2)",
        "args.kl_target - 1, -0.5), 0.5)",
    ),
    Mutation(
        f"{DETAILS}d28_epochs_end_at_a_target_kl",
        "ppo_rlhf.py",
        "break  # D28",
        "pass  # D28",
    ),
    Mutation(
        f"{DETAILS}d29_gradients_are_clipped_by_their_norm[sft]",
        "sft.py",
        "clip_grad_norm_(model.parameters(), args.max_grad_norm)",
        "clip_grad_norm_(model.parameters(), 1e9)",
    ),
    Mutation(
        f"{DETAILS}d29_gradients_are_clipped_by_their_norm[reward_model]",
        "reward_model.py",
        "clip_grad_norm_(model.parameters(), args.max_grad_norm)",
        "clip_grad_norm_(model.parameters(), 1e9)",
    ),
    Mutation(
        f"{DETAILS}d29_gradients_are_clipped_by_their_norm[ppo]",
        "ppo_rlhf.py",
        "clip_grad_norm_(parameters, args.max_grad_norm)",
        "clip_grad_norm_(parameters, 1e9)",
    ),
    Mutation(
        f"{DETAILS}d30_scores_are_clipped_after_the_penalty",
        "ppo_rlhf.py",
        "scores = scores.clamp(-args.reward_clip, args.reward_clip)",
        "scores = scores.clamp(max=args.reward_clip)",
    ),
    Mutation(
        f"{DETAILS}d31_ptx_adds_a_language_model_loss",
        "ppo_rlhf.py",
        "is_target = ptx_mask.bool() & (torch.arange(ptx_ids.shape[1], device=device) >= starts[:, None])",
        "is_target = ptx_mask.bool()",
    ),
    Mutation(
        f"{DETAILS}d32_the_critic_may_be_trained_alone_first",
        "ppo_rlhf.py",
        "policy.requires_grad_(update > args.critic_warmup_updates)",
        "policy.requires_grad_(True)",
    ),
    Mutation(
        f"{DETAILS}d33_entropy_bonus",
        "ppo_rlhf.py",
        "loss = loss - args.entropy_coef * utils.masked_sum(entropies, mb_mask)",
        "loss = loss + args.entropy_coef * utils.masked_sum(entropies, mb_mask)",
    ),
    Mutation(
        f"{DETAILS}d34_batch_mean_is_a_baseline",
        "ppo_rlhf.py",
        "baseline = utils.sum_over_processes(episode_rewards.sum()) / args.batch_size",
        "baseline = utils.sum_over_processes(scores.sum()) / args.batch_size",
    ),
    Mutation(
        f"{DETAILS}d35_responses_to_one_prompt_are_compared[rloo]",
        "ppo_rlhf.py",
        "others / (args.samples_per_prompt - 1)",
        "others / args.samples_per_prompt",
    ),
    Mutation(
        f"{DETAILS}d35_responses_to_one_prompt_are_compared[grpo]",
        "ppo_rlhf.py",
        "spread = grouped_rewards.std(1, keepdim=True, correction=0)",
        "spread = grouped_rewards.std(1, keepdim=True)",
    ),
    Mutation(
        f"{DETAILS}d36_top_k_and_top_p_change_sampling_only",
        "ppo_rlhf.py",
        "R, stop_ids, pad_id, args.temperature, args.top_k, args.top_p, rng",
        "R, stop_ids, pad_id, args.temperature, 0, 1.0, rng",
    ),
    Mutation(
        f"{DETAILS}d37_explained_variance",
        "ppo_rlhf.py",
        "residual = utils.masked_variance(returns - values, response_mask)",
        "residual = utils.masked_mean((returns - values) ** 2, response_mask)",
    ),
]
