"""Stage 3 of RLHF: PPO against a reward model.

The policy answers prompts; a reward model (or a function) scores the answers; a per-token KL penalty holds the policy
to the model that it started from; PPO makes tokens that did better than the value function expected more probable.

In: the policy's start, by default the model from sft.py; a reward model from reward_model.py or a function; prompts.
Out: `runs/ppo_rlhf`, an ordinary Hugging Face folder, with metrics.jsonl, summary.json, samples.jsonl and
TensorBoard events.

    python ppo_rlhf.py
    python ppo_rlhf.py --model runs/my-sft --reward-model runs/my-reward-model --dataset my/prompts \\
        --learning-rate 3e-6 --output-dir runs/my-ppo
    torchrun --nproc-per-node 8 ppo_rlhf.py --micro-batch-size 16   # the same batch, dealt out over 8 GPUs

Shapes: B sequences, P prompt tokens, R response tokens, T = P + R, V vocabulary; b, T' and R' are a micro-batch's. A
sequence is a prompt padded on the left and a response padded on the right; `response_mask` is 1 on every response token
up to and including EOS or the stop token, and every per-token mean and loss of PPO below is over those tokens alone.
`D17` and `B14` in comments point to DETAILS.md.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import utils

EVALUATION, SAMPLING, SHUFFLING, PTX = 1, 2, 3, 4  # streams of random numbers: none moves another (D7)

# Means over the tokens of an update's mini-batches, in the order in which they are summed; `tokens` is the count.
STATISTICS = (
    *("approxkl", "policy_clipped", "entropy", "policy_loss", "value_loss", "value_clipped"),
    *("ratio", "squared_ratio_error", "tokens"),
)


@dataclass
class Args:
    model: str = "runs/sft"
    """Where the policy starts and what the frozen reference is: a hub id or a local folder."""
    reward_model: str = "runs/reward_model"
    """Reward model: a hub id or a local folder."""
    value_model: str | None = None
    """Where the value function starts; none: the reward model if it has the policy's tokenizer, else --model (D15)."""
    reward_fn: str | None = None
    """FILE.py:FUNCTION that scores instead of the reward model: f(prompts, completions, **columns) -> list[float]."""
    reward_timeout: float = 600.0
    """Seconds that a call of --reward-fn or --eval-reward-fn may take before the run stops; 0: any time."""
    dataset: str = "data/support/prompts"
    """Prompts: a hub id, a folder with train.jsonl and validation.jsonl, or a .jsonl, .parquet or .csv file."""
    train_split: str = "train"
    """Split to sample prompts from."""
    eval_split: str = "validation"
    """Split whose prompts the policy is compared with the reference on."""
    eval_reward_fn: str | None = None
    """FILE.py:FUNCTION that judges at evaluation, never in training; on the embedded task by default its labeler."""
    output_dir: str = "runs/ppo_rlhf"
    """Where the model and all records go."""
    overwrite: bool = False
    """Replace a run that is already in the output folder."""
    resume: bool = False
    """Go on from the output folder's last checkpoint."""
    seed: int = 1
    """Seed of prompt order and sampling."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    trust_remote_code: bool = False
    """Execute Python code that comes with a model, where it needs that; whoever wrote it can do what you can."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products; weights, losses and optimizer stay in float32."""

    total_episodes: int = 6400
    """Responses to learn from, in all."""
    batch_size: int = 128
    """Responses per update, over all processes."""
    num_mini_batches: int = 1
    """Optimizer steps that a pass over the batch is divided into."""
    micro_batch_size: int | Literal["auto"] = 32
    """Sequences that one device holds in one forward-backward, auto: as many as fit; changes rounding alone."""
    num_ppo_epochs: int = 4
    """Passes over each batch."""
    samples_per_prompt: int = 1
    """Responses to each prompt in a batch; rloo and grpo need 2 or more."""

    response_length: int = 64
    """Tokens sampled at most."""
    temperature: float = 0.5
    """Logits are divided by it, in sampling and in every log-probability (D5)."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0: all. Log-probabilities stay those of the full distribution (D36)."""
    top_p: float = 1.0
    """Sample among the fewest tokens that hold this probability; the same caution (D36)."""
    stop_token: str = "eos"
    """Token that ends a response as EOS does: `eos` for that alone, or a string that is one token."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a response that ends in neither EOS nor the stop token (D18)."""

    kl_coef: float = 0.1
    """Beta: weight of the KL penalty in the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token penalty: the log-ratio (unbiased), half its square, or k3 (unbiased and never negative) (D19)."""
    kl_target: float | None = None
    """KL per response in nats toward which kl_coef is steered (D27); none: kl_coef is constant."""
    kl_horizon: int = 10_000
    """Episodes over which kl_coef is steered."""
    reward_clip: float | None = None
    """Scores are clipped to +- this (D30)."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance, their mean kept (D20)."""

    advantage: Literal["gae", "batch_mean", "rloo", "grpo"] = "gae"
    """Where advantages come from: a value function, or a baseline instead of one (D34, D35)."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the batch's tokens (D22)."""

    learning_rate: float = 5e-4
    """First learning rate of AdamW, linear to 0; for pretrained models of 100M parameters and more 1e-6 to 1e-5."""
    cliprange: float = 0.2
    """The ratio of new to old probability is clipped to 1 +- this."""
    cliprange_value: float = 0.2
    """A new value is clipped to the old one +- this."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (D33)."""
    target_kl: float | None = None
    """Stop an update's epochs once the approximate KL from the sampling policy passes this (D28)."""
    critic_warmup_updates: int = 0
    """Updates at the start that train the value function alone (D32)."""
    ptx_coef: float = 0.0
    """Weight of a language-model loss on --ptx-dataset, mixed in (D31)."""
    ptx_dataset: str | None = None
    """Demonstrations or plain text for the ptx loss, in a format of sft.py."""
    max_grad_norm: float = 1.0
    """Gradients of policy and value function together are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the models (torch.compile): a minute at the start, then faster; on CPUs in bfloat16, with a compiler."""

    eval_prompts: int = 200
    """Held-out prompts to compare policy and reference on."""
    eval_every: int = 10
    """Updates between evaluations; 0 evaluates at the end alone."""
    save_every: int = 20
    """Updates between checkpoints for --resume; 0 saves one only when the run is interrupted."""
    keep_checkpoints: int = 2
    """The newest checkpoints to keep, 1 or more; should one be damaged, --resume goes on from the one before."""
    save_rollouts: int = 0
    """Updates between saved rollouts (rollouts/000010.safetensors); 0 saves none."""
    track: bool = False
    """Log to Weights & Biases too (pip install wandb)."""


def main(args: Args) -> None:
    started = time.time()
    process = utils.start_process(args.device, args.seed, args.trust_remote_code)
    device = process.device
    check_flags(args, process.world)
    utils.check_output(args)

    # ------------------------------------------------------------------------------------------- models and prompts
    tokenizer = utils.load_tokenizer(args.model)
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    stop_ids = utils.stop_token_ids(tokenizer, args.stop_token)
    policy = utils.load_causal_lm(args.model, device)
    reference = utils.freeze(utils.load_causal_lm(args.model, device), args.dtype)
    reward_fn = reward_model = reward_tokenizer = value_model = None
    if args.reward_fn:
        reward_fn = utils.load_function(args.reward_fn, "--reward-fn")
    else:
        reward_model = utils.freeze(utils.load_classifier(args.reward_model, device, trained=True), args.dtype)
        reward_tokenizer = utils.load_tokenizer(args.reward_model)
    shared_tokenizer = reward_model is not None and utils.same_tokenizer(tokenizer, reward_tokenizer)
    if args.advantage == "gae":  # D15: shares nothing with the policy; started from a language model, its head is zeros
        value_start = args.value_model or (args.reward_model if shared_tokenizer else args.model)
        value_model = utils.load_classifier(value_start, device)
        if args.value_model:  # the other two read the policy's tokens
            same = utils.same_tokenizer(tokenizer, utils.load_tokenizer(args.value_model))
            what = f"{args.value_model} has another tokenizer than the policy"
            utils.require(same, f"--value-model: {what}; pass one with the same")
    judge_file = args.eval_reward_fn or ("data/support/gold.py:score" if args.dataset == Args.dataset else None)
    judge = utils.load_function(judge_file, "--eval-reward-fn") if judge_file else None

    R = args.response_length
    room = utils.context_length(policy) - R
    if shared_tokenizer:  # which reads prompt, response and an EOS
        room = min(room, utils.context_length(reward_model) - R - 1)
    if value_model is not None:
        room = min(room, utils.context_length(value_model) - R)
    train_prompts = utils.load_prompts(tokenizer, args.dataset, args.train_split, room)
    eval_prompts = utils.load_prompts(tokenizer, args.dataset, args.eval_split, room)[: args.eval_prompts]
    ptx_rows = []
    if args.ptx_dataset:
        ptx_data = utils.load_data(args.ptx_dataset, args.train_split, utils.SFT_FORMATS)
        ptx_rows = utils.encode_demonstrations(tokenizer, ptx_data, utils.context_length(policy))

    # ------------------------------------------------------------------------------------- what the loop is made of
    def micro_batches(
        rows: Tensor, ids: Tensor, mask: Tensor, response_mask: Tensor
    ) -> Iterator[tuple[Tensor, int, tuple[Tensor, ...]]]:
        """Micro-batches of similar length of the batch's `rows`: (rows [b], R', inputs of policy and value function).

        The inputs are ids [b, T'], is_response [b, T'] and response_mask [b, R']: T' is the longest sequence's length,
        R' the longest response's. All padding is on the right, so that causal attention needs no mask, and positions
        count from 0.
        """
        response_lengths, lengths = response_mask.sum(1).cpu(), mask.sum(1).cpu()
        rows = rows.sort().values  # with one mini-batch, rollout and training divide and round a batch alike (D26)
        for part in rows[lengths[rows].argsort(stable=True)].split(micro_batch_size):
            longest, longest_response = int(lengths[part].max()), int(response_lengths[part].max())
            part = part.to(device)
            # columns of the real tokens, in order, then of padding
            columns = mask[part].argsort(dim=1, descending=True, stable=True)[:, :longest]
            end = mask[part].sum(1, keepdim=True)
            start = end - response_mask[part].sum(1, keepdim=True)
            position = torch.arange(longest, device=device)
            is_response = (start <= position) & (position < end)
            inputs = ids[part].gather(1, columns), is_response, response_mask[part, :longest_response]
            yield part, longest_response, inputs

    def policy_outputs(model: Any, ids: Tensor, is_response: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies in nats, both [b, R'], of the N response tokens of a micro-batch.

        They are 0 on padding. Rollout and training share this forward pass, so that the ratio starts at 1 (D26).
        """

        def of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:  # [n, V], [n] -> [n, 2], for n of the N
            distribution = (logits / args.temperature).log_softmax(-1)  # D5
            logprobs = distribution.gather(-1, tokens[:, None]).squeeze(-1)
            with torch.set_grad_enabled(torch.is_grad_enabled() and args.entropy_coef > 0):
                # a token that the model rules out has log-probability -inf and adds 0
                entropies = -(distribution.exp() * distribution.clamp(min=-1e4)).sum(-1)
            return torch.stack([logprobs, entropies], 1)

        with utils.autocast(device, args.dtype):
            # [N], [N] by the logits one position before each token
            logprobs, entropies = utils.map_logits(of_tokens, model, ids, is_response).unbind(1)
        # is_response and response_mask list the tokens in the same order
        zeros, real = torch.zeros(response_mask.shape, device=device), response_mask.bool()
        return zeros.masked_scatter(real, logprobs), zeros.masked_scatter(real, entropies)

    def value_outputs(ids: Tensor, is_response: Tensor, response_mask: Tensor) -> Tensor:
        """V [b, R'] of the states before the N response tokens of a micro-batch; 0 on padding (D21)."""
        with utils.autocast(device, args.dtype):
            values = utils.head_outputs(value_model, ids)  # [b, T']
        values = values[:, :-1][is_response[:, 1:]]  # [N] read one position before the token (B14)
        values = utils.normalize_scores(value_model, values)  # on the scale of the scores (D13, D15)
        return torch.zeros(response_mask.shape, device=device).masked_scatter(response_mask.bool(), values)

    def sample_responses(
        model: Any, prompts: list[utils.Prompt], width: int, rng: torch.Generator
    ) -> tuple[Tensor, ...]:
        """ids [B, T] and mask [B, T] of prompts and sampled responses, and response_mask [B, R]; P = `width`."""
        prompt_ids, prompt_mask = utils.pad([p.ids for p in prompts], pad_id, "left", device, width)  # D2
        with utils.autocast(device, args.dtype):
            response_ids, response_mask = utils.generate(
                model, prompt_ids, prompt_mask, R, stop_ids, pad_id, args.temperature, args.top_k, args.top_p, rng
            )  # D16
        return torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1), response_mask

    def score_responses(prompts: list[utils.Prompt], responses: list[list[int]]) -> tuple[Tensor, list[str]]:
        """Scores [B] by the reward model or function, and the responses as text."""
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        if reward_fn is not None:
            prompt_texts, rows = [p.text for p in prompts], [p.row for p in prompts]
            given = prompt_texts, texts, rows, update, args.reward_timeout
            scores = utils.call_reward_function(reward_fn, args.reward_fn, *given)
            return torch.tensor(scores, device=device), texts
        most = utils.context_length(reward_model)
        if shared_tokenizer:  # the reward model has learned on texts that end in EOS (B19)
            whole = [r if r[-1] == eos_id else [*r, eos_id] for r in responses]
            sequences = [p.ids + r for p, r in zip(prompts, whole, strict=True)]
        else:  # B5: as text, through the reward model's own tokenizer and chat template
            pairs = [(p.row["prompt"], text) for p, text in zip(prompts, texts, strict=True)]
            encoded = utils.encode_pairs(reward_tokenizer, pairs, [p.place for p in prompts])
            sequences = [p + c for p, c in zip(*encoded, strict=True)]
            longest = max(map(len, sequences))
            if longest > most:
                what = f"{longest} tokens exceed its context of {most}"
                utils.stop(f"{args.reward_model}: {what}; shorten the prompts", code=1 if update else 2)
        scores = torch.zeros(len(sequences), device=device)
        order = torch.tensor([len(s) for s in sequences]).argsort(stable=True)  # similar lengths, little padding
        for part in order.split(micro_batch_size):
            chunk = [sequences[i] for i in part]
            score_ids, score_mask = utils.pad(chunk, reward_tokenizer.pad_token_id, "right", device, limit=most)
            with utils.autocast(device, args.dtype):
                raw = utils.last_token_scores(reward_model, score_ids, score_mask)
            scores[part.to(device)] = utils.normalize_scores(reward_model, raw)  # D13
        return scores, texts

    @torch.no_grad()
    def evaluate(model: Any) -> list[dict[str, Any]]:
        """A response of the model to each held-out prompt, with its scores; the same random numbers every time."""
        results: list[dict[str, Any]] = []
        mine = eval_prompts[process.rank :: process.world]
        for i in range(0, len(mine), local_batch_size):
            prompts = mine[i : i + local_batch_size]
            rng = utils.generator(device, args.seed, EVALUATION, i, process.rank)
            ids, mask, response_mask = sample_responses(model, prompts, 0, rng)
            responses = unpad(ids[:, -R:], response_mask)
            scores, texts = score_responses(prompts, responses)
            judged = [None] * len(prompts)
            if judge is not None:
                prompt_texts, rows = [p.text for p in prompts], [p.row for p in prompts]
                given = prompt_texts, texts, rows, update, args.reward_timeout
                judged = utils.call_reward_function(judge, judge_file, *given)
            kl = torch.zeros(len(prompts), device=device)
            for part, _, inputs in micro_batches(torch.arange(len(prompts)), ids, mask, response_mask):
                logprobs, _ = policy_outputs(model, *inputs)
                ref_logprobs, _ = policy_outputs(reference, *inputs)
                kl[part] = (logprobs - ref_logprobs).sum(1)
            for j, prompt in enumerate(prompts):
                result = {"prompt": prompt.text, "response": texts[j], "score": scores[j].item(), "judge": judged[j]}
                result |= {"kl": kl[j].item(), "length": len(responses[j]), "eos_rate": responses[j][-1] in stop_ids}
                results.append(result)
        return utils.gather(results)

    def ptx_backward(count: int, rng: torch.Generator) -> Tensor:
        """D31: add the gradient of ptx_coef times the loss, in nats per token, on `count` demonstrations a process."""
        rows = [ptx_rows[i] for i in torch.randint(len(ptx_rows), (count,), generator=rng).tolist()]
        num_tokens = utils.sum_over_processes(torch.tensor(sum(len(c) - (not p) for p, c in rows), device=device))
        total, most = torch.zeros((), device=device), utils.context_length(policy)
        for i in range(0, count, micro_batch_size):
            micro = rows[i : i + micro_batch_size]
            ptx_ids, ptx_mask = utils.pad([p + c for p, c in micro], pad_id, "right", device, limit=most)
            starts = torch.tensor([len(p) for p, _ in micro], device=device)
            is_target = ptx_mask.bool() & (torch.arange(ptx_ids.shape[1], device=device) >= starts[:, None])
            with utils.autocast(device, args.dtype):
                cross_entropy = partial(F.cross_entropy, reduction="none")  # of logits [n, V] and tokens [n]
                loss = utils.map_logits(cross_entropy, policy, ptx_ids, is_target).sum() / num_tokens
            (args.ptx_coef * loss).backward()
            total += loss.detach()
        return utils.sum_over_processes(total)

    def longest_micro_batch(count: int) -> Tensor:
        """A loss of `count` sequences as long as they can get, to try how many fit."""
        T = max(max(len(p.ids) for p in train_prompts) + R, *(len(p) + len(c) for p, c in ptx_rows), 0)
        ids = torch.full((count, T), eos_id, device=device)
        response_mask = torch.ones(count, R, dtype=torch.long, device=device)
        inputs = ids, (torch.arange(T, device=device) >= T - R).expand(count, T), response_mask
        loss = policy_outputs(policy, *inputs)[0].sum()
        return loss if value_model is None else loss + value_outputs(*inputs).sum()

    def leave_if_interrupted(last_update: int) -> None:
        """On SIGTERM or Ctrl-C save the state after `last_update` and exit; call it only while the models are in it."""
        if interruption.anywhere():
            state = {"kl_coef": kl_coef, "processes": process.world}
            interruption.leave(out, last_update, logger, trained, optimizer, state, keep=args.keep_checkpoints)

    # -------------------------------------------------------------------------------------------------- the PPO loop
    num_updates = args.total_episodes // args.batch_size
    local_batch_size = args.batch_size // process.world
    trained = {"policy": policy} if value_model is None else {"policy": policy, "value_model": value_model}
    if args.compile:
        for model in (policy, reference, value_model, reward_model):
            utils.compile_model(model)
    micro_batch_size = args.micro_batch_size
    if micro_batch_size == "auto":
        most, checkpointing = local_batch_size // args.num_mini_batches, args.gradient_checkpointing
        micro_batch_size = utils.largest_micro_batch(longest_micro_batch, most, checkpointing, *trained.values())
    prompts_per_update = args.batch_size // args.samples_per_prompt
    if process.is_main:
        size = f"policy of {sum(p.numel() for p in policy.parameters()) / 1e6:.1f}M parameters"
        print(f"ppo_rlhf: {size}, {len(train_prompts)} prompts, {num_updates} updates on {device}")
    update = 0  # an error before the first update is wrong input, so nothing is written before this evaluation
    before = evaluate(reference)
    out = utils.open_output(args, process)

    parameters = [p for model in trained.values() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)  # D6
    kl_coef, first_update = args.kl_coef, 1
    if args.resume and (state := utils.load_checkpoint(out, trained, optimizer)):
        kl_coef, first_update = state["kl_coef"], state["step"] + 1
        same = state["processes"] == process.world  # each has random numbers of its own
        utils.require(same, f"--resume: the run had {state['processes']} processes; start as many")
    logger = utils.Logger(out, args, process, "update", first_update - 1)
    progress = utils.progress_bar("ppo_rlhf", num_updates, first_update - 1, process)
    interruption = utils.Interruption(process)
    for update in range(first_update, num_updates + 1):
        clock = [utils.now(device)]

        # 1. sample prompts: each process takes its share of the same order, all pad to the same width
        first = (update - 1) * prompts_per_update
        batch = utils.cycle(train_prompts, first, prompts_per_update, args.seed)
        width = max(len(p.ids) for p in batch)  # P
        prompts = [p for p in batch[process.rank :: process.world] for _ in range(args.samples_per_prompt)]

        # 2. generate responses, and read log-probabilities and values with the forward pass that training uses
        rng = utils.generator(device, args.seed, SAMPLING, update, process.rank)  # D7
        ids, mask, response_mask = sample_responses(policy, prompts, width, rng)  # [B, T], [B, T], [B, R]
        logprobs, ref_logprobs, values = (torch.zeros(len(prompts), R, device=device) for _ in range(3))  # 0 on padding
        with torch.no_grad():
            for part, length, inputs in micro_batches(torch.arange(len(prompts)), ids, mask, response_mask):
                logprobs[part, :length], _ = policy_outputs(policy, *inputs)  # D26
                ref_logprobs[part, :length], _ = policy_outputs(reference, *inputs)
                if value_model is not None:
                    values[part, :length] = value_outputs(*inputs)
                if interruption.here():
                    break
        leave_if_interrupted(update - 1)
        clock.append(utils.now(device))

        # 3. score them, at the sequence's end
        last = response_mask.sum(1) - 1  # [B] position of the last real token, found from lengths (D3, B1, B3)
        last_ids = ids[:, -R:].gather(1, last[:, None]).squeeze(1)  # [B]
        ended = torch.isin(last_ids, torch.tensor(stop_ids, device=device))  # [B] by EOS or the stop token
        with torch.no_grad():
            scores, _ = score_responses(prompts, unpad(ids[:, -R:], response_mask))  # [B]
        scores = torch.where(ended, scores, scores - args.missing_eos_penalty)  # D18, B2
        if args.reward_clip is not None:
            scores = scores.clamp(-args.reward_clip, args.reward_clip)  # D30
        leave_if_interrupted(update - 1)
        numbers = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "scores": scores}
        rollout = {"ids": ids, "mask": mask, "response_mask": response_mask} | numbers
        utils.check_finite(out, process, f"update {update}", numbers, rollout)
        clock.append(utils.now(device))

        # 4. KL penalty: per-token reward = -beta * KL estimate, plus the score at the last real token
        ref_log_ratio = logprobs - ref_logprobs  # [B, R]
        if args.kl_estimator == "k1":  # D19; http://joschu.net/blog/kl-approx.html
            token_kl = ref_log_ratio
        elif args.kl_estimator == "k2":
            token_kl = ref_log_ratio.square() / 2
        elif args.kl_estimator == "k3":
            token_kl = torch.expm1(-ref_log_ratio) + ref_log_ratio
        non_score_rewards = -kl_coef * token_kl  # [B, R] a cost, so minus (B16)
        rewards = non_score_rewards.scatter_add(1, last[:, None], scores[:, None])  # D17
        rlhf_rewards = rewards.sum(1)  # [B]
        if args.whiten_rewards:
            rewards = utils.whiten(rewards, response_mask, shift_mean=False)  # D20; padding stays 0

        # 5. advantages and returns
        if args.advantage == "gae":  # D21: sum over k of (gamma lambda)^k delta[t + k]
            advantages, lastgaelam = torch.zeros_like(rewards), torch.zeros_like(scores)  # [B, R], [B]
            for t in reversed(range(R)):
                next_values = values[:, t + 1] if t + 1 < R else torch.zeros_like(scores)
                delta = rewards[:, t] + args.gamma * next_values - values[:, t]
                lastgaelam = delta + args.gamma * args.lam * lastgaelam
                advantages[:, t] = lastgaelam
            returns = advantages + values  # B15
        else:  # one number a response: its reward, the KL penalty included, against that of others
            episode_rewards = rewards.sum(1)  # [B]
            grouped_rewards = episode_rewards.view(-1, args.samples_per_prompt)  # [prompts, samples_per_prompt]
            if args.advantage == "batch_mean":  # D34
                baseline = utils.sum_over_processes(episode_rewards.sum()) / args.batch_size
                episode_advantages = episode_rewards - baseline
            elif args.advantage == "rloo":  # D35: against the mean of the other responses to the prompt
                others = grouped_rewards.sum(1, keepdim=True) - grouped_rewards
                episode_advantages = (grouped_rewards - others / (args.samples_per_prompt - 1)).flatten()
            elif args.advantage == "grpo":
                center = grouped_rewards.mean(1, keepdim=True)
                spread = grouped_rewards.std(1, keepdim=True, correction=0)
                episode_advantages = ((grouped_rewards - center) / (spread + 1e-4)).flatten()
            advantages = episode_advantages[:, None] * response_mask
            returns = episode_rewards[:, None] * response_mask
        if args.whiten_advantages:
            advantages = utils.whiten(advantages, response_mask)  # D22, over the batch of all processes (B7, B8)
        rollout |= {"rewards": rewards, "advantages": advantages, "returns": returns}

        # 6. PPO update
        lr = args.learning_rate * (1 - (update - 1) / num_updates)  # D6
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = lr
        policy.requires_grad_(update > args.critic_warmup_updates)  # D32: in warm-up the value function learns alone
        for model in trained.values():
            utils.set_gradient_checkpointing(model, args.gradient_checkpointing)
        shuffle = utils.generator("cpu", args.seed, SHUFFLING, update, process.rank)
        ptx_rng = utils.generator("cpu", args.seed, PTX, update, process.rank)
        totals, grad_norms, ptx_losses = torch.zeros(len(STATISTICS), device=device, dtype=torch.float64), [], []
        ratio_error = torch.zeros((), device=device)  # largest |ratio - 1| before the first optimizer step, must be ~0
        for _ in range(args.num_ppo_epochs):  # D25
            epoch_totals = torch.zeros_like(totals)
            for minibatch in torch.randperm(len(prompts), generator=shuffle).chunk(args.num_mini_batches):
                # D9: sums over tokens, divided by the token count of the mini-batch over all processes (B6, B12)
                num_tokens = utils.sum_over_processes(response_mask[minibatch.to(device)].sum())
                for part, length, inputs in micro_batches(minibatch, ids, mask, response_mask):
                    mb_mask = inputs[-1]  # [b, R']
                    new_logprobs, entropies = policy_outputs(policy, *inputs)  # [b, R'], [b, R']
                    log_ratio = new_logprobs - logprobs[part, :length]  # 0 on padding
                    ratio = log_ratio.exp()
                    mb_advantages = advantages[part, :length]
                    clipped_ratio = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
                    unclipped, clipped = -mb_advantages * ratio, -mb_advantages * clipped_ratio
                    policy_losses = torch.max(unclipped, clipped)  # D23
                    policy_clipped = (clipped > unclipped).float()
                    loss = utils.masked_sum(policy_losses, mb_mask)
                    if args.entropy_coef:  # D33
                        loss = loss - args.entropy_coef * utils.masked_sum(entropies, mb_mask)
                    value_losses = value_clipped = torch.zeros_like(ratio)
                    if value_model is not None:
                        new_values, old_values = value_outputs(*inputs), values[part, :length]
                        within = new_values.clamp(old_values - args.cliprange_value, old_values + args.cliprange_value)
                        error = (new_values - returns[part, :length]).square()
                        clipped_error = (within - returns[part, :length]).square()
                        value_losses = 0.5 * torch.max(error, clipped_error)  # D24
                        value_clipped = (clipped_error > error).float()
                        loss = loss + args.vf_coef * utils.masked_sum(value_losses, mb_mask)
                    (loss / num_tokens).backward()

                    with torch.no_grad():
                        statistics = {
                            "approxkl": log_ratio.square() / 2,
                            "policy_clipped": policy_clipped,
                            "entropy": entropies,
                            "policy_loss": policy_losses,
                            "value_loss": value_losses,
                            "value_clipped": value_clipped,
                            "ratio": ratio,
                            "squared_ratio_error": (ratio - 1).square(),
                            "tokens": torch.ones_like(ratio),
                        }
                        sums = [utils.masked_sum(statistics[name], mb_mask).double() for name in STATISTICS]
                        epoch_totals += torch.stack(sums)
                        if not grad_norms:  # before the first optimizer step
                            ratio_error = torch.max(ratio_error, (ratio - 1).abs().max())
                    if interruption.here() and not grad_norms:  # gradients are partial: all processes leave below
                        break
                if not grad_norms:  # nothing has changed yet; once a step is taken, the update runs to its end
                    leave_if_interrupted(update - 1)
                if args.ptx_coef and update > args.critic_warmup_updates:  # D31: as many demonstrations as responses
                    ptx_losses.append(ptx_backward(len(minibatch), ptx_rng))
                utils.sum_gradients(parameters)
                grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm))  # D29
                numbers = {name: epoch_totals[STATISTICS.index(name)] for name in ("policy_loss", "value_loss")}
                numbers["gradient norm"] = grad_norms[-1]
                utils.check_finite(out, process, f"update {update}", numbers, rollout)
                optimizer.step()
                optimizer.zero_grad()
            epoch_totals = utils.sum_over_processes(epoch_totals)
            totals += epoch_totals
            approxkl, count = (epoch_totals[STATISTICS.index(name)] for name in ("approxkl", "tokens"))
            if args.target_kl is not None and approxkl / count > args.target_kl:
                break  # D28
        for model in trained.values():
            utils.set_gradient_checkpointing(model, False)
        policy.requires_grad_(True)  # autocast keeps casts only of such weights, and sampling reuses them
        clock.append(utils.now(device))

        # ------------------------------------------------------------------------------------------------- records
        mean = dict(zip(STATISTICS, (totals / totals[-1]).tolist(), strict=True))  # over real response tokens (B6)
        explained = 0.0
        if value_model is not None:  # D37
            residual = utils.masked_variance(returns - values, response_mask)
            explained = (1 - residual / utils.masked_variance(returns, response_mask).clamp(min=1e-8)).item()
        token_counts = utils.sum_over_processes(torch.stack([mask.sum(), response_mask.sum()])).tolist()

        def episode_mean(x: Tensor) -> float:
            """Mean of x [B] over the episodes of all processes."""
            return (utils.sum_over_processes(x.double().sum()) / args.batch_size).item()

        times = [end - start for start, end in zip(clock, clock[1:], strict=False)]
        metrics = {
            "episode": update * args.batch_size,
            "lr": lr,
            "eps": args.batch_size / sum(times),  # episodes per second
            "objective/kl": episode_mean(ref_log_ratio.sum(1)),  # k1, whatever estimator the penalty uses (B13)
            "objective/entropy": episode_mean(-logprobs.sum(1)),  # of a response, by the sampled tokens
            "objective/non_score_reward": episode_mean(non_score_rewards.sum(1)),
            "objective/scores": episode_mean(scores),  # penalty and clip included
            "objective/rlhf_reward": episode_mean(rlhf_rewards),
            "objective/kl_coef": kl_coef,
            "policy/approxkl_avg": mean["approxkl"],
            "policy/clipfrac_avg": mean["policy_clipped"],
            "policy/entropy_avg": mean["entropy"],
            "loss/policy_avg": mean["policy_loss"],
            "loss/value_avg": mean["value_loss"],
            "val/clipfrac_avg": mean["value_clipped"],
            "val/ratio": mean["ratio"],
            "val/ratio_var": mean["squared_ratio_error"] - (mean["ratio"] - 1) ** 2,
            "val/ratio_start_error": max(utils.gather([ratio_error.item()])),
            "val/num_eos_tokens": round(episode_mean(ended) * args.batch_size),
            "val/explained_variance": explained,
            "response/length": token_counts[1] / args.batch_size,
            "response/eos_rate": episode_mean(ended),
            "grad_norm": torch.stack(grad_norms).mean().item(),
            "time/rollout": times[0],
            "time/score": times[1],
            "time/train": times[2],
            "tokens_per_second": token_counts[0] / sum(times),
        }
        if ptx_losses:
            metrics["loss/ptx_avg"] = torch.stack(ptx_losses).mean().item()
        if args.eval_every and update % args.eval_every == 0 and update < num_updates:
            after = evaluate(policy)
            comparison = compare(before, after)
            metrics |= {f"eval/{name}": value for name, value in comparison["policy"].items() if value is not None}
            metrics["eval/win_rate"] = comparison["win_rate"]
            progress.clear()
            show_samples(logger, process, update, before, after, rows=3)
        logger.log(update, metrics)
        progress.update()
        shown = {"score": "objective/scores", "kl": "objective/kl", "length": "response/length"}
        progress.set_postfix({name: f"{metrics[key]:.2f}" for name, key in shown.items()}, refresh=False)
        if args.save_rollouts and update % args.save_rollouts == 0:
            tensors = {"prompt_ids": ids[:, :-R], "prompt_mask": mask[:, :-R], "response_ids": ids[:, -R:]}
            tensors |= {name: x for name, x in rollout.items() if name not in ("ids", "mask")}
            names = "gamma lam temperature whiten_rewards whiten_advantages advantage samples_per_prompt kl_estimator"
            numbers = {name: getattr(args, name) for name in [*names.split(), "missing_eos_penalty", "reward_clip"]}
            utils.save_rollout(out, process, update, tensors, numbers | {"kl_coef": kl_coef, "update": update})
        if args.kl_target is not None:  # D27: Ziegler et al. 2019, section 2.2
            error = min(max(metrics["objective/kl"] / args.kl_target - 1, -0.2), 0.2)
            kl_coef *= 1 + error * args.batch_size / args.kl_horizon
        if args.save_every and update % args.save_every == 0 and update < num_updates and process.is_main:
            state = {"kl_coef": kl_coef, "processes": process.world}
            utils.save_checkpoint(out, update, trained, optimizer, state, args.keep_checkpoints)
        leave_if_interrupted(update)
    progress.close()

    # ------------------------------------------------------------------------------------------------- what it leaves
    if process.is_main:  # before the evaluation, in which a judge may fail
        # `model.generate` of the saved policy samples as was done here, whatever the model came with (B11)
        sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "do_sample": True}
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stop_ids, "pad_token_id": pad_id}
        policy.generation_config = transformers.GenerationConfig(**sampling, **special)
        utils.save_model(policy, tokenizer, out)
    after = evaluate(policy)
    show_samples(logger, process, num_updates, before, after, rows=8)
    if process.is_main:
        samples = ""
        for b, a in zip(before, after, strict=True):
            row = {"prompt": b["prompt"], "reference": b["response"], "policy": a["response"]}
            row |= {"reference_score": b["score"], "policy_score": a["score"]}
            row |= {"reference_judge": b["judge"], "policy_judge": a["judge"]}
            samples += json.dumps(row, ensure_ascii=False) + "\n"
        with utils.writing(out):
            utils.write_text(out / "samples.jsonl", samples)
        seconds = time.time() - started
        evaluation = compare(before, after)
        summary = {"updates": num_updates, "episodes": num_updates * args.batch_size, "seconds": seconds}
        with utils.writing(out):
            utils.write_json(out / "summary.json", summary | {"eval": evaluation})
        by = evaluation["win_rate_by"]
        print(
            f"ppo_rlhf: the policy wins {evaluation['win_rate']:.3f} of {len(before)} held-out prompts by the {by}; "
            f"mean {by} {evaluation['reference'][by]:.2f} -> {evaluation['policy'][by]:.2f}, "
            f"KL {evaluation['policy']['kl']:.1f} nats; {seconds:.0f} s, "
            f"peak memory {utils.peak_memory_gb():.2f} GB; model in {out}"
        )
    logger.close()
    utils.end_process()


def unpad(response_ids: Tensor, response_mask: Tensor) -> list[list[int]]:
    """The real tokens of each row of response_ids [B, R]."""
    return [ids[: mask.sum()].tolist() for ids, mask in zip(response_ids.cpu(), response_mask.cpu(), strict=True)]


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of reference and policy over the held-out prompts, and how often the policy's response is better."""

    def mean(results: list[dict[str, Any]], name: str) -> float | None:
        return None if results[0][name] is None else sum(r[name] for r in results) / len(results)

    names = ("score", "judge", "kl", "length", "eos_rate")
    reference, policy = ({name: mean(results, name) for name in names} for results in (before, after))
    by = "score" if before[0]["judge"] is None else "judge"
    wins = sum((a[by] > b[by]) + 0.5 * (a[by] == b[by]) for b, a in zip(before, after, strict=True))
    counted = {"prompts": len(before), "reference": reference, "policy": policy}
    return counted | {"win_rate": wins / len(before), "win_rate_by": by}


def show_samples(
    logger: utils.Logger, process: utils.Process, update: int, before: list[dict], after: list[dict], rows: int
) -> None:
    """The first held-out prompts with both responses and their scores, on the terminal and in TensorBoard."""
    if not process.is_main:
        return

    def scores(result: dict[str, Any]) -> str:
        return f"{result['score']:.2f}" + ("" if result["judge"] is None else f" ({result['judge']:.2f})")

    title = f"update {update}: held-out prompts; score" + ("" if before[0]["judge"] is None else " (judge)")
    header = ["prompt", "before: reference", "score", "after: policy", "score"]
    pairs = list(zip(before, after, strict=True))
    cells = [[b["prompt"], b["response"].strip(), scores(b), a["response"].strip(), scores(a)] for b, a in pairs]
    utils.print_samples(title, header, cells[:rows])
    # TensorBoard would make columns of scores so narrow that numbers break
    below = [[prompt, f"{old}\n\n{x}", f"{new}\n\n{y}"] for prompt, old, x, new, y in cells[:20]]
    logger.table(update, "samples", ["prompt", "before: reference, score", "after: policy, score"], below)


def check_flags(args: Args, world: int) -> None:
    """Stop with exit code 2 on flags that cannot work or contradict each other."""
    utils.check_common_flags(args, world)
    counts = "total_episodes num_mini_batches num_ppo_epochs samples_per_prompt response_length eval_prompts kl_horizon"
    positive = "temperature cliprange cliprange_value kl_target reward_clip target_kl"
    utils.check_range(args, "reward_timeout", lambda x: x >= 0, "0 or more")
    weights = "top_k missing_eos_penalty kl_coef vf_coef entropy_coef critic_warmup_updates ptx_coef save_rollouts"
    utils.check_range(args, counts, lambda n: n > 0, "1 or more")
    utils.check_range(args, positive, lambda x: x > 0, "a number above 0")
    utils.check_range(args, weights, lambda x: x >= 0, "0 or more")
    utils.check_range(args, "gamma lam", lambda x: 0 <= x <= 1, "a number from 0 to 1")
    utils.check_range(args, "top_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1")

    share = args.num_mini_batches * world * (1 if args.micro_batch_size == "auto" else args.micro_batch_size)
    what = "does not divide --batch-size evenly over processes and micro-batches"
    utils.require(args.batch_size % share == 0, f"--num-mini-batches: {what}; make --batch-size a multiple of {share}")
    share = args.samples_per_prompt * world
    what = "does not divide --batch-size evenly over processes"
    utils.require(
        args.batch_size % share == 0, f"--samples-per-prompt: {what}; make --batch-size a multiple of {share}"
    )
    enough = args.total_episodes >= args.batch_size
    utils.require(enough, "--total-episodes: is less than one batch; pass at least --batch-size")
    compares = args.advantage in ("rloo", "grpo")  # several responses to a prompt
    one = args.samples_per_prompt == 1
    utils.require(not (compares and one), f"--samples-per-prompt: is 1; pass 2 or more for {args.advantage}")
    idle = args.value_model is not None and args.advantage != "gae"
    utils.require(not idle, f"--value-model: {args.advantage} has no value model; leave it out")
    warmup = args.critic_warmup_updates > 0 and args.advantage != "gae"
    utils.require(not warmup, f"--critic-warmup-updates: {args.advantage} has no critic; leave it at 0")
    steered = args.kl_target is not None and args.kl_coef == 0
    utils.require(not steered, "--kl-target: a --kl-coef of 0 cannot be steered; start from one above 0")
    slow = args.kl_target is None or args.batch_size < 5 * args.kl_horizon
    utils.require(slow, "--kl-horizon: is so short that kl_coef could turn negative; pass at least --batch-size")
    both = bool(args.ptx_coef) == bool(args.ptx_dataset)
    utils.require(both, "--ptx-coef: goes with --ptx-dataset; pass both or neither")


if __name__ == "__main__":
    main(utils.parse_flags(Args))
