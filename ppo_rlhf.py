"""Stage 3 of RLHF: PPO against a reward model.

The policy answers prompts; reward models, or functions, score the answers; a per-token KL penalty
holds the policy to the model that it started from; PPO raises the probability of tokens that did
better than expected, by a value function or a baseline.

In: the policy's start, reward models or functions, prompts. Out: `runs/ppo_rlhf`, an ordinary
Hugging Face folder, with metrics.jsonl, summary.json, samples.jsonl and TensorBoard events.

    python ppo_rlhf.py
    python ppo_rlhf.py --model runs/my-sft --reward-model runs/my-reward-model \\
        --dataset my/prompts --learning-rate 3e-6 --output-dir runs/my-ppo
    torchrun --nproc-per-node 8 ppo_rlhf.py

On several GPUs each process takes its share of episodes; the batch is the same on any number of
them. Gradients, token counts, means and the whitening's mean and variance are over all of them.
Each holds whole models or, with --fsdp, a part of each (docs/scaling.md).

Left out: asynchronous rollouts. Variants, such as a KL loss, are diffs in experiments/. The
decoding loop is generate.py. `D17` (a detail) and `B14` (others' bug) are in docs/details.md.

Shapes: B sequences of this process, b of a micro-batch, P prompt and R response tokens, T = P + R
(T' cut to a micro-batch's longest), N real response tokens of a micro-batch, H hidden size, V
vocabulary. `response_mask` is 1 on every sampled token up to and including EOS or the stop token.
The rest is padding: log-probabilities, values and rewards are 0 there; losses, whitening and token
metrics are over tokens where the mask is 1. A response cut off at R bootstraps no value.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor

import dataset
import distributed
import encoding
import generate
import lora
import saving
import utils

EVALUATION, SAMPLING, SHUFFLING, PTX = 1, 2, 3, 4  # streams of random numbers, apart (D7)


@dataclass
class Args:
    # ---- model
    model: str = "runs/sft"
    """Start of the policy, and the frozen reference: a hub id or a folder."""
    reward_model: tuple[str, ...] | None = None
    """Hub ids or folders; none: runs/reward_model, unless --reward-fn is given."""
    reward_fn: tuple[str, ...] = ()
    """FILE.py:FUNCTION, f(prompts, completions, **columns) -> list (docs/data.md)."""
    reward_weights: tuple[float, ...] = ()
    """Weights of the rewards, reward models first; none: 1 each."""
    ensemble: Literal["sum", "min", "mean_minus_std"] = "sum"
    """Reward models' weighted scores become one (D41); functions' are added."""
    value_model: str | None = None
    """Start of the value function; none: the first reward model, else --model."""
    trust_remote_code: bool = False
    """Run code that comes with a model, with your own access rights."""
    lora_rank: int = 0
    """Rank of a LoRA adapter, trained in place of the weights; 0: none (D43)."""
    lora_alpha: float = 32.0
    """The adapter's product is scaled by this / rank."""
    lora_target: str = "all-linear"
    """What it adapts: all-linear, or names of layers with commas between."""

    # ---- data
    dataset: tuple[str, ...] = ("data/support/prompts",)
    """Prompts: hub ids (NAME, NAME:CONFIG), folders, files; joined."""
    dataset_weights: tuple[float, ...] = ()
    """Shares of the data sets in the training rows; none: all rows."""
    revision: str | None = None
    """Branch, tag or commit of hub data."""
    train_split: str = "train"
    """Split to sample prompts from."""
    eval_split: str = "validation"
    """Split to compare the policy with the reference on."""
    columns: tuple[str, ...] = ()
    """`prompt=a` reads a as prompt, `prompt=a+b` joins a and b, `a=` drops a."""

    # ---- optimization
    total_episodes: int = 6400
    """Responses in all, in whole batches."""
    batch_size: int = 128
    """Responses per update, counted over all processes."""
    micro_batch_size: int = 32
    """Max sequences in a forward-backward pass; changes only rounding."""
    learning_rate: float = 5e-4
    """First rate of AdamW, linear to 0; for 100M parameters and more 1e-6 to 1e-5."""
    value_learning_rate: float | None = None
    """First rate of the value function; none: --learning-rate (D38)."""
    max_grad_norm: float = 1.0
    """Gradients of both models together are scaled down to this norm (D29)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the models: a minute at the start, then faster on GPUs."""
    fsdp: bool = False
    """Under torchrun: shard weights, gradients and moments over the processes."""
    cpu_offload: bool = False
    """With --fsdp: keep the shards of reference and reward models in the CPU's memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matmuls; auto: bfloat16 where the device has it, else float32."""
    device: str = "auto"
    """cpu, cuda, or auto, which is cuda where there is one."""
    seed: int = 1
    """Seed of data order and sampling (D7)."""

    # ---- PPO
    num_ppo_epochs: int = 4
    """Passes over each batch (D25)."""
    num_mini_batches: int = 1
    """Optimizer steps that a pass over the batch is divided into."""
    samples_per_prompt: int = 1
    """Responses to each prompt in a batch; rloo and grpo need 2 or more."""
    response_length: int = 64
    """Tokens sampled at most."""
    temperature: float = 0.5
    """Logits are divided by it, in sampling and in every log-probability (D5)."""
    top_k: int = 0
    """Sample among the k most probable tokens, 0: all; log-probabilities stay over all (D36)."""
    top_p: float = 1.0
    """Sample among the fewest tokens that hold this probability (D36)."""
    stop_token: str = "eos"
    """A token, as a string, that ends a response besides EOS; `eos`: none."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the score of a response without EOS or stop token (D18)."""
    kl_coef: float = 0.1
    """Beta: weight of the KL penalty in the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Penalty of a token: log-ratio x, x^2 / 2, or exp(-x) - 1 + x (D19)."""
    kl_target: float | None = None
    """KL in nats per response that kl_coef is adapted to (D27); none: constant."""
    kl_horizon: int = 10_000
    """In episodes; larger steers kl_coef more slowly (D27)."""
    reward_clip: float | None = None
    """Clip scores to +- this (D30)."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance, their mean kept (D20)."""
    advantage: Literal["gae", "batch_mean", "rloo", "grpo"] = "gae"
    """Advantages from a value function, or a baseline instead (D34, D35)."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation (D21)."""
    value_lam: float | None = None
    """Lambda of the value function's targets; none: --lam (D40)."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1 over the batch's tokens (D22)."""
    cliprange: float = 0.2
    """How far the ratio of new to old probability may fall below 1 (D23)."""
    cliprange_high: float | None = None
    """How far above 1 the ratio may rise; none: --cliprange (D39)."""
    cliprange_value: float = 0.2
    """A new value is clipped to the old one +- this (D24)."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus (D33)."""
    target_kl: float | None = None
    """End the epochs above this KL to the sampling policy, in nats a token (D28)."""
    critic_warmup_updates: int = 0
    """Updates at the start that train only the value function (D32)."""
    ptx_coef: float = 0.0
    """Weight of a language-model loss on --ptx-dataset, mixed in (D31)."""
    ptx_dataset: str | None = None
    """Demonstrations or plain text for the ptx loss, in a format of sft.py."""

    # ---- evaluation
    eval_reward_fn: str | None = None
    """FILE.py:FUNCTION, a judge; none: the labeler, on the embedded task only."""
    eval_prompts: int = 200
    """Held-out prompts to compare policy and reference on."""
    eval_every: int = 25
    """Updates between evaluations; 0: only at the start and the end."""
    keep_best: bool = False
    """Keep the best policy in best/, by the judge, else by score (D42)."""

    # ---- output
    output_dir: str = "runs/ppo_rlhf"
    """For model and records."""
    overwrite: bool = False
    """Replace the run that is in the output folder, if any."""
    resume: bool = False
    """Continue from its last checkpoint."""
    save_every: int = 20
    """Updates between checkpoints for --resume; 0: only when interrupted."""
    keep_checkpoints: int = 2
    """How many to keep; --resume takes the one before a damaged one."""
    save_rollouts: int = 0
    """Updates between batches saved in rollouts/; 0: none."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


class Batch(NamedTuple):
    """B prompts and the responses sampled to them."""

    prompt_ids: Tensor  # [B, P] padded on the left, as sampling reads them
    prompt_mask: Tensor  # [B, P]
    response_ids: Tensor  # [B, R] with pad after the end
    response_mask: Tensor  # [B, R]
    ids: Tensor  # [B, T] prompt and response, padded on the right, as all other passes read them
    is_response: Tensor  # [B, T] response_mask, where its tokens are in ids


class Scores(NamedTuple):
    """What the rewards say of B responses, before penalty and clip."""

    total: Tensor  # [B] weighted and combined
    token_rewards: Tensor  # [B, R] the part of the total given to single tokens
    by_name: dict[str, Tensor]  # of each reward, [B]
    responses: list[list[int]]  # without padding
    texts: list[str]
    shortened: Tensor  # [B] true where cut to a reward model's context


@utils.stage()
def main(args: Args) -> None:
    started = time.time()
    args, process = utils.start_process(args)
    device = process.device
    check_flags(args, process.world)
    micro_batch_size = utils.micro_batch_size(args, process.world, args.num_mini_batches)
    utils.check_output(args, "ppo_rlhf")

    # ---- models and prompts
    tokenizer = encoding.load_tokenizer(args.model)
    pad_id = tokenizer.pad_token_id
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    at = distributed.load_device(args, device)
    reference = utils.load_causal_lm(args.model, at, tokenizer)
    generate.check(reference, args.model)
    utils.freeze(reference, args.dtype)
    utils.spread(reference, args, device, trained=False)
    if args.lora_rank:  # one base for policy, reference and value function (D43)
        policy = lora.adapt(reference, args)
    else:
        policy = utils.load_causal_lm(args.model, at, tokenizer)
    utils.spread(policy, args, device)
    stop_ids = generate.stop_token_ids(tokenizer, args.stop_token, policy.generation_config)
    reward_models, readers, shares_tokens = [], [], []  # readers: their tokenizers and contexts
    for name in args.reward_model:
        model = utils.freeze(utils.load_classifier(name, at, trained=True), args.dtype)
        utils.spread(model, args, device, trained=False)
        reward_models.append(model)
        readers.append((encoding.load_tokenizer(name), utils.context_length(model)))
        shares_tokens.append(encoding.same_tokenizer(tokenizer, readers[-1][0]))
    reward_fns = [(file, utils.load_function(file, "--reward-fn")) for file in args.reward_fn]
    names = utils.short_names([*args.reward_model, *args.reward_fn])
    M = len(reward_models)
    weights = args.reward_weights or [1.0] * len(names)
    value_model = judge = None
    if args.advantage == "gae":  # with weights of its own; a language model's head is 0 (D15)
        first = args.reward_model[0] if M and shares_tokens[0] else args.model
        value_start = args.value_model or first
        if args.lora_rank:
            value_model = lora.value_on(reference, args, value_start)
        else:
            value_model = utils.load_classifier(value_start, at)
        utils.spread(value_model, args, device)
        if not encoding.same_tokenizer(tokenizer, encoding.load_tokenizer(value_start)):
            utils.stop(f"--value-model: {value_start} has another tokenizer; pass another")
    labeler = "data/support/gold.py:score" if dataset.is_default(args) else None
    if judge_file := args.eval_reward_fn or labeler:
        judge = utils.load_function(judge_file, "--eval-reward-fn")

    R = args.response_length
    trained = {"model": policy} | ({"value_model": value_model} if value_model else {})
    max_prompt = min(map(utils.context_length, trained.values())) - R
    train_prompts, eval_prompts = (
        encoding.encode_prompts(tokenizer, rows, max_prompt, *readers)  # B31
        for rows in dataset.load_splits(args, dataset.PROMPT_FORMATS)
    )
    del eval_prompts[args.eval_prompts :]
    if args.ptx_dataset:
        ptx_data = dataset.load_data(args.ptx_dataset, args.train_split, dataset.SFT_FORMATS)
        ptx_rows = encoding.encode_demonstrations(tokenizer, ptx_data, utils.context_length(policy))
    num_updates = args.total_episodes // args.batch_size

    # ---- what the loop calls
    def sample_responses(
        model: Any, prompts: list[encoding.Prompt], width: int, uniform: Tensor
    ) -> Batch:
        """A response to each prompt; prompts are padded to `width` at least."""
        prompt_ids = [p.ids for p in prompts]
        prompt_ids, prompt_mask = encoding.pad(prompt_ids, pad_id, "left", device, width)  # D2
        with utils.autocast(device, args.dtype):
            response_ids, response_mask = generate.generate(  # [B, R], [B, R] D16
                model, prompt_ids, prompt_mask, uniform, stop_ids, pad_id=pad_id, **sampling
            )
        # padding moves to the right, where causal attention needs no mask for it
        mask = torch.cat([prompt_mask, response_mask], 1)  # [B, T]
        order = mask.argsort(dim=1, descending=True, stable=True)  # of columns, real tokens first
        ids = torch.cat([prompt_ids, response_ids], 1).gather(1, order)
        is_response = F.pad(response_mask, (prompt_ids.shape[1], 0)).gather(1, order).bool()
        return Batch(prompt_ids, prompt_mask, response_ids, response_mask, ids, is_response)

    def micro_batches(batch: Batch, rows: Tensor, most: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batch's `rows` in micro-batches of like length, cut to the longest prompt + response.

        Each is rows [b], ids [b, T'] and is_response [b, T']. All processes yield the same number,
        enough for `most` rows; empty ones have dummy ids, no response.
        """
        lengths = (batch.prompt_mask.sum(1) + batch.response_mask.sum(1)).cpu()
        count = math.ceil(max(most, len(rows)) / micro_batch_size)
        for part in rows[lengths[rows].argsort(stable=True)].tensor_split(count):
            some = part if len(part) else torch.tensor([0])
            longest = int(lengths[some].max())
            part, some = part.to(device), some.to(device)
            is_response = batch.is_response[some, :longest] & (len(part) > 0)
            yield part, batch.ids[some, :longest], is_response

    @distributed.forward_pass
    def policy_outputs(model: Any, ids: Tensor, is_response: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and, with gradients, entropies of responses, in nats: both [b, R].

        Rollout and training share this forward pass, so the ratio starts at 1 (D26).
        """

        def outputs_of(hidden: Tensor, tokens: Tensor) -> Tensor:  # some of the N tokens: [n, 2]
            logits = utils.logits_of(model, hidden) / args.temperature  # [n, V] D5
            logprobs = logits.log_softmax(-1)  # [n, V]
            chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)  # [n]
            entropies = torch.zeros_like(chosen)
            if torch.is_grad_enabled():
                with torch.set_grad_enabled(args.entropy_coef > 0):
                    entropies = -(logprobs.exp() * logprobs).sum(-1)
            return torch.stack([chosen, entropies], 1)

        with utils.autocast(device, args.dtype):
            # a token is predicted by the hidden state one position before it
            hidden = utils.hidden_states(model, ids)[:, :-1][is_response[:, 1:]]  # [N, H]
            outputs = utils.in_chunks(outputs_of, model, hidden, ids[is_response])  # [N, 2]
        logprobs, entropies = outputs.unbind(1)
        return on_responses(logprobs, is_response), on_responses(entropies, is_response)

    @distributed.forward_pass
    def value_outputs(value_model: Any, ids: Tensor, is_response: Tensor) -> Tensor:
        """Values [b, R] of the states before the tokens, on the scale of the scores."""
        with utils.autocast(device, args.dtype):
            hidden = utils.hidden_states(value_model, ids)[:, :-1][is_response[:, 1:]]  # [N, H] B14
        values = utils.head_outputs(value_model, hidden)  # [N]
        return on_responses(utils.normalize_scores(value_model, values), is_response)  # D13, D15

    def on_responses(x: Tensor, is_response: Tensor) -> Tensor:
        """x [N] as [b, R], with 0 on padding."""
        mask = torch.arange(R, device=device) < is_response.sum(1, keepdim=True)  # [b, R]
        return torch.zeros(mask.shape, device=device).masked_scatter(mask, x)

    def ask_reward_model(
        number: int, prompts: list[encoding.Prompt], answers: list[Any]
    ) -> tuple[Tensor, Tensor]:
        """Scores [B] of ids or texts, and [B] which were cut to the model's context (B31)."""
        model, reader = reward_models[number], readers[number]
        sequences, shortened = encoding.as_judged(reader, prompts, answers, stop_ids)  # D1
        scores = torch.zeros(len(sequences), device=device)
        order = torch.tensor([len(s) for s in sequences]).argsort(stable=True)  # little padding
        for part in order.tensor_split(math.ceil(len(order) / micro_batch_size)):
            some = [sequences[i] for i in part]
            ids, mask = encoding.pad(some, reader[0].pad_token_id, "right", device)
            with utils.autocast(device, args.dtype):
                raw = utils.last_token_scores(model, ids, mask)  # [b] D10
            scores[part.to(device)] = utils.normalize_scores(model, raw)  # D13
        if args.samples_per_prompt > 1:  # equal ones score the same
            scores = scores[[sequences.index(s) for s in sequences]]
        return scores, torch.tensor(shortened, device=device)

    @torch.no_grad()
    def score_responses(prompts: list[encoding.Prompt], batch: Batch) -> Scores:
        """Ask reward models, then functions; combine their scores."""
        both = zip(batch.response_ids.cpu(), batch.response_mask.cpu(), strict=True)
        responses = [ids[: mask.sum()].tolist() for ids, mask in both]
        texts = encoding.answer_texts(tokenizer, prompts, responses)
        by_name = {}
        token_rewards = torch.zeros(batch.response_mask.shape, device=device)  # [B, R]
        shortened = torch.zeros(len(texts), dtype=torch.bool, device=device)
        for i in range(M):
            answers = responses if shares_tokens[i] else texts  # B5
            by_name[names[i]], cut = ask_reward_model(i, prompts, answers)
            shortened |= cut
        for i, (file, function) in enumerate(reward_fns, M):
            scores, per_token = utils.call_reward_function(
                function, file, prompts, texts, responses, update=update
            )
            by_name[names[i]] = torch.tensor(scores, device=device)
            for row, x in zip(token_rewards, per_token, strict=True):
                row[: len(x)] += weights[i] * torch.tensor(x, device=device)
        token_rewards *= args.advantage == "gae"  # else only sums count, and ties stay ties
        weighted = torch.stack([w * x for w, x in zip(weights, by_name.values(), strict=True)])
        of_models, of_functions = weighted[:M], weighted[M:].sum(0)  # [M, B], [B]
        if args.ensemble == "sum":
            total = of_models.sum(0)
        elif args.ensemble == "min":  # Coste et al. 2023 (D41)
            total = of_models.amin(0)
        elif args.ensemble == "mean_minus_std":
            total = of_models.mean(0) - of_models.std(0, correction=0)
        return Scores(total + of_functions, token_rewards, by_name, responses, texts, shortened)

    @torch.no_grad()
    def evaluate(model: Any) -> list[dict]:
        """A response to each held-out prompt, scored without EOS penalty and clip."""
        results = []
        for i in range(0, len(eval_prompts), args.batch_size):
            count = min(args.batch_size, len(eval_prompts) - i)
            real = len(range(process.rank, count, process.world))
            # equal shares: a process with fewer repeats the last prompt
            mine = torch.arange(process.rank, count + -count % process.world, process.world)
            mine = mine.clamp(max=count - 1)
            prompts = [eval_prompts[i + j] for j in mine.tolist()]
            rng = utils.generator(device, args.seed, EVALUATION, i, 0)
            uniform = generate.random_numbers(count, R, rng)[mine.to(device)]
            batch = sample_responses(model, prompts, 0, uniform)
            scored = score_responses(prompts, batch)
            judged = [None] * len(prompts)
            if judge is not None:
                judged, _ = utils.call_reward_function(
                    judge, judge_file, prompts, scored.texts, scored.responses, update=update
                )
            kl = torch.zeros(len(prompts), device=device)
            for rows, ids, is_response in micro_batches(batch, torch.arange(len(mine))):
                logprobs, _ = policy_outputs(model, ids, is_response)
                ref_logprobs, _ = policy_outputs(reference, ids, is_response)
                kl[rows] = (logprobs - ref_logprobs).sum(1)
            for j, ids in enumerate(scored.responses[:real]):
                result = {"prompt": prompts[j].text, "response": scored.texts[j]}
                result |= {"score": scored.total[j].item(), "judge": judged[j], "kl": kl[j].item()}
                results.append(result | {"length": len(ids), "eos_rate": ids[-1] in stop_ids})
        return distributed.gather(results)

    def compare_policy(shown: int) -> tuple[list[dict], dict]:
        """Evaluate the policy, show samples; keep the best in best/ (D42)."""
        after = evaluate(policy)
        logger.samples(update, before, after, shown)
        result = compare(before, after)
        mean = result["policy"][result["win_rate_by"]]
        if args.keep_best and mean > state["best"]:
            saving.save_model(policy, tokenizer, out / "best")
            saving.write_summary(out / "best", args, policy, {"update": update, "eval": result})
        state["best"] = max(state["best"], mean)
        return after, result

    def ptx_backward(count: int, rng: torch.Generator) -> Tensor:
        """Add the gradient of ptx_coef times the loss, in nats per token, on `count` rows (D31)."""
        rows = [ptx_rows[i] for i in torch.randint(len(ptx_rows), (count,), generator=rng).tolist()]
        num_tokens = sum(sum(learned[1:]) for _, learned in rows)  # of all processes
        total = torch.zeros((), device=device)

        def cross_entropy(hidden: Tensor, tokens: Tensor) -> Tensor:
            return F.cross_entropy(utils.logits_of(policy, hidden), tokens, reduction="none")

        @distributed.forward_pass
        def sum_of_losses(policy: Any, rows: list) -> Tensor:
            rows = rows or [([pad_id], [False])]  # no tokens
            ids, _ = encoding.pad([ids for ids, _ in rows], pad_id, "right", device)  # [b, T]
            is_target, _ = encoding.pad([learned for _, learned in rows], False, "right", device)
            is_target = is_target[:, 1:]  # [b, T - 1]
            with utils.autocast(device, args.dtype):
                hidden = utils.hidden_states(policy, ids)[:, :-1][is_target]  # [N, H]
                losses = utils.in_chunks(cross_entropy, policy, hidden, ids[:, 1:][is_target])
            return losses.sum()

        for micro in distributed.micro_batches(rows, micro_batch_size, lambda row: len(row[0])):
            loss = sum_of_losses(policy, micro) / num_tokens
            (args.ptx_coef * loss).backward()
            total += loss.detach()
        return distributed.sum_all(total)

    # ---- the PPO loop
    size = f"{policy.num_parameters() / 1e6:.1f}M parameters"
    work = f"{len(train_prompts)} prompts, {num_updates} updates"
    ends = " or ".join(tokenizer.convert_ids_to_tokens(stop_ids))
    utils.say(f"ppo_rlhf: {size}, {work}, on {device} in {args.dtype}; responses end with {ends}")
    encoding.show_example(tokenizer, train_prompts[0].row, train_prompts[0].ids)
    update = 0  # used above: at 0 a reward function's error exits with code 2
    before = evaluate(reference)
    out = utils.open_output(args, "ppo_rlhf")
    own = [[p for p in model.parameters() if p.requires_grad] for model in trained.values()]
    parameters = sum(own, [])
    policy_weights = torch.nn.ParameterList(own[0])
    # AdamW without weight decay, linear to 0 (D6), a group and rate per model (D38)
    rates = [args.learning_rate, args.value_learning_rate]
    groups = [{"params": some, "rate": x} for some, x in zip(own, rates, strict=False)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=1e-5, weight_decay=0.0, fused=True)
    checkpoints = saving.Checkpoints(out, trained, tokenizer, optimizer, args.keep_checkpoints)
    state = {"step": 0, "kl_coef": args.kl_coef, "best": -float("inf")}
    if args.resume:
        state |= checkpoints.load()
    update = done = state.pop("step")
    # `model.generate` of the saved policy samples as is done here (B11)
    policy.generation_config = transformers.GenerationConfig(
        **sampling,
        do_sample=True,
        max_new_tokens=R,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids,
        pad_token_id=pad_id,
    )
    shown = "objective/scores objective/kl response/length"
    logger = utils.Logger(out, args, "update", update, num_updates, shown)
    if not done:
        logger.to_tensorboard(0, utils.eval_metrics(compare(before, before)))
    interruption = distributed.Interruption(device)
    for update in range(done + 1, num_updates + 1):
        clock = [utils.now(device)]
        kl_coef = state["kl_coef"]

        # 1. sample prompts; each goes to one process, with all responses
        count = args.batch_size // args.samples_per_prompt
        drawn = dataset.cycle(train_prompts, (update - 1) * count, count, args.seed)
        width = max(len(p.ids) for p in drawn)  # P
        prompt_of = torch.arange(args.batch_size) // args.samples_per_prompt  # of each episode
        process_of = prompt_of % process.world
        mine = (process_of == process.rank).nonzero().squeeze(1)  # [B] numbers of its episodes
        prompts = [drawn[i] for i in prompt_of[mine]]

        # 2. generate responses, then read log-probabilities and values as training will (D26)
        rng = utils.generator(device, args.seed, SAMPLING, update, 0)
        uniform = generate.random_numbers(args.batch_size, R, rng)[mine.to(device)]  # [B, R] D7
        batch = sample_responses(policy, prompts, width, uniform)
        response_mask = batch.response_mask  # [B, R]
        logprobs, ref_logprobs, values = torch.zeros(3, *response_mask.shape, device=device)
        with torch.no_grad():
            for rows, ids, is_response in micro_batches(batch, torch.arange(len(mine))):
                logprobs[rows], _ = policy_outputs(policy, ids, is_response)
                ref_logprobs[rows], _ = policy_outputs(reference, ids, is_response)
                if value_model is not None:
                    values[rows] = value_outputs(value_model, ids, is_response)
        clock.append(utils.now(device))

        # 3. score them
        last = response_mask.sum(1) - 1  # [B] the last real token's place (D3, B1, B3)
        last_ids = batch.response_ids.gather(1, last[:, None]).squeeze(1)  # [B]
        ended = torch.isin(last_ids, torch.tensor(stop_ids, device=device))  # [B] by EOS or stop
        scored = score_responses(prompts, batch)
        # a response that was cut off loses a constant (D18, B2)
        scores = torch.where(ended, scored.total, scored.total - args.missing_eos_penalty)  # [B]
        if args.reward_clip:
            scores = scores.clamp(-args.reward_clip, args.reward_clip)  # D30
        clock.append(utils.now(device))

        # 4. KL penalty: each token costs beta times its KL estimate (B16)
        ref_log_ratio = logprobs - ref_logprobs  # [B, R] nats, policy over reference
        # estimators: http://joschu.net/blog/kl-approx.html (D19)
        if args.kl_estimator == "k1":
            token_kl = ref_log_ratio
        elif args.kl_estimator == "k2":
            token_kl = ref_log_ratio.square() / 2
        elif args.kl_estimator == "k3":
            token_kl = torch.expm1(-ref_log_ratio) + ref_log_ratio
        non_score_rewards = -kl_coef * token_kl  # [B, R]
        # the score, less what functions gave to single tokens, goes to the last real token, EOS or
        # where the response was cut off (D17)
        rewards = non_score_rewards + scored.token_rewards  # [B, R]
        at_end = scores - scored.token_rewards.sum(1)  # [B]
        rewards = rewards.scatter_add(1, last[:, None], at_end[:, None])
        if args.whiten_rewards:
            rewards = utils.whiten(rewards, response_mask, shift_mean=False)  # D20

        # 5. advantages and returns
        if args.advantage == "gae":  # the sum over k of (gamma lambda)^k delta[t + k] (D21)
            advantages, returns = torch.zeros(2, *rewards.shape, device=device)  # [B, R] each
            lastgaelam = lastvaluelam = torch.zeros_like(scores)  # [B]
            for t in reversed(range(R)):
                next_values = values[:, t + 1] if t + 1 < R else 0.0  # [B] 0 after the end
                delta = rewards[:, t] + args.gamma * next_values - values[:, t]  # [B]
                lastgaelam = delta + args.gamma * args.lam * lastgaelam
                advantages[:, t] = lastgaelam
                lastvaluelam = delta + args.gamma * args.value_lam * lastvaluelam  # D40
                returns[:, t] = lastvaluelam + values[:, t]  # B15
        else:  # one number per response: the sum of its rewards against a baseline
            episode_rewards = rewards.sum(1)  # [B]
            grouped_rewards = episode_rewards.view(-1, args.samples_per_prompt)
            grouped_rewards = grouped_rewards - grouped_rewards[:, :1]  # of equal ones exactly 0
            if args.advantage == "batch_mean":  # D34
                baseline = distributed.sum_all(episode_rewards.sum()) / args.batch_size
                episode_advantages = episode_rewards - baseline
            elif args.advantage == "rloo":  # against the mean of the prompt's others (D35)
                others = grouped_rewards.sum(1, keepdim=True) - grouped_rewards
                baseline = others / (args.samples_per_prompt - 1)
                episode_advantages = (grouped_rewards - baseline).flatten()
            elif args.advantage == "grpo":  # standardized over the prompt's group (D35)
                center = grouped_rewards.mean(1, keepdim=True)
                spread = grouped_rewards.std(1, keepdim=True, correction=0)
                episode_advantages = ((grouped_rewards - center) / (spread + 1e-4)).flatten()
            advantages = episode_advantages[:, None] * response_mask  # [B, R]
            returns = episode_rewards[:, None] * response_mask  # [B, R]
        if args.whiten_advantages:  # over the real tokens of all processes (D22, B7, B8)
            advantages = utils.whiten(advantages, response_mask)
        rollout = {"scores": scores, "logprobs": logprobs, "ref_logprobs": ref_logprobs}
        rollout |= {"values": values, "rewards": rewards, "returns": returns}
        rollout |= {"advantages": advantages, "token_rewards": scored.token_rewards}

        # 6. PPO update
        if signal := interruption.came():  # models and state are the last update's
            utils.leave(signal, checkpoints, update - 1, state)
        left = 1 - (update - 1) / num_updates
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * left  # D6, D38
        policy_weights.requires_grad_(update > args.critic_warmup_updates)  # D32
        shuffle = utils.generator("cpu", args.seed, SHUFFLING, update, 0)
        ptx_rng = utils.generator("cpu", args.seed, PTX, update, 0)
        batch_tokens = distributed.sum_all(response_mask.sum())
        epoch_means: list[dict[str, float]] = []
        grad_norms, ptx_losses = [], []
        ratios = torch.ones_like(logprobs)  # [B, R] of the last pass over the batch
        for _ in range(args.num_ppo_epochs):  # D25
            sums: dict[str, Any] = defaultdict(float)
            order = torch.randperm(args.batch_size, generator=shuffle)  # of all processes' episodes
            for minibatch in order.chunk(args.num_mini_batches):
                share = torch.isin(mine, minibatch).nonzero().squeeze(1)  # this process's, in order
                most = int(process_of[minibatch].bincount().max())
                # losses: sums over tokens / the count of all processes (D9, B12)
                num_tokens = distributed.sum_all(response_mask[share.to(device)].sum())
                if args.ptx_coef and update > args.critic_warmup_updates:  # as many texts (D31)
                    ptx_losses.append(ptx_backward(len(minibatch), ptx_rng))
                # one mini-batch: same parts as in step 2 (D26)
                parts = [*micro_batches(batch, share, most)]
                for rows, ids, is_response in distributed.sums_in_last(parts, trained.values()):
                    mask = response_mask[rows]  # [b, R]
                    new_logprobs, entropies = policy_outputs(policy, ids, is_response)  # [b, R]
                    log_ratio = new_logprobs - logprobs[rows]  # [b, R]
                    ratio = log_ratio.exp()  # [b, R]
                    ratios[rows] = ratio.detach()
                    unclipped_losses = -advantages[rows] * ratio
                    clipped_ratio = ratio.clamp(1 - args.cliprange, 1 + args.cliprange_high)  # D39
                    # the larger of the two: clipping never makes a step more tempting (D23)
                    policy_losses = torch.max(unclipped_losses, -advantages[rows] * clipped_ratio)
                    bonus = args.entropy_coef * entropies  # D33
                    policy_loss = utils.masked_sum(policy_losses - bonus, mask) / num_tokens
                    if policy_loss.requires_grad:  # not in the critic's warm-up
                        policy_loss.backward()

                    # the value model has weights of its own; the policy's graph is gone
                    value_losses = value_clipped = torch.zeros_like(ratio)
                    if value_model is not None:
                        new_values = value_outputs(value_model, ids, is_response)  # [b, R]
                        low = values[rows] - args.cliprange_value
                        high = values[rows] + args.cliprange_value
                        errors = (new_values - returns[rows]).square()
                        clipped_errors = (new_values.clamp(low, high) - returns[rows]).square()
                        value_losses = 0.5 * torch.max(errors, clipped_errors)  # [b, R] D24
                        value_loss = utils.masked_sum(value_losses, mask) / num_tokens
                        (args.vf_coef * value_loss).backward()
                        value_clipped = clipped_errors > errors

                    token_stats = {  # [b, R] each; the mean over real tokens is logged (B6)
                        "loss/policy_avg": policy_losses,
                        "loss/value_avg": value_losses,
                        "policy/approxkl_avg": log_ratio.square() / 2,
                        "policy/clipfrac_avg": policy_losses > unclipped_losses,
                        "policy/entropy_avg": entropies,
                        "val/clipfrac_avg": value_clipped,
                        "val/ratio": ratio,
                        "val/ratio_var": (ratio - 1).square(),  # becomes the variance below
                    }
                    for name, x in token_stats.items():
                        sums[name] += utils.masked_sum(x.detach().double(), mask)
                if not grad_norms:  # no step yet: ratio 1 (D26)
                    ratio_error = (ratios - 1).abs().max()
                norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # D29
                norm = distributed.full(norm)
                utils.check_finite(f"update {update}", rollout | sums | {"gradient_norm": norm})
                optimizer.step()
                optimizer.zero_grad(set_to_none=not distributed.replicated(policy))
                grad_norms.append(norm)
            means = distributed.sum_all(torch.stack([*sums.values()])) / batch_tokens
            epoch_means.append(dict(zip(sums, means.tolist(), strict=True)))
            if args.target_kl and epoch_means[-1]["policy/approxkl_avg"] > args.target_kl:
                break  # D28
        policy_weights.requires_grad_(True)  # autocast caches casts only of such weights
        clock.append(utils.now(device))

        # ---- records
        def episode_mean(x: Tensor) -> float:
            """Mean of x [B] over the episodes of all processes."""
            return (distributed.sum_all(x.double().sum()) / args.batch_size).item()

        residual = utils.masked_variance(returns - values, response_mask)
        variance = utils.masked_variance(returns, response_mask).clamp(min=1e-8)
        explained = (1 - residual / variance).item() if value_model is not None else 0.0  # D37
        prompt_tokens = distributed.sum_all(batch.prompt_mask.sum())
        times = [b - a for a, b in zip(clock, clock[1:], strict=False)]
        metrics = {
            "episode": update * args.batch_size,
            "lr": optimizer.param_groups[0]["lr"],
            "eps": args.batch_size / sum(times),  # episodes per second
            "objective/kl": episode_mean(ref_log_ratio.sum(1)),  # k1, whatever is trained on (B13)
            "objective/entropy": episode_mean(-logprobs.sum(1)),  # of the sampled tokens
            "objective/non_score_reward": episode_mean(non_score_rewards.sum(1)),
            "objective/scores": episode_mean(scores),  # EOS penalty and clip included
            "objective/rlhf_reward": episode_mean(scores + non_score_rewards.sum(1)),
            "objective/kl_coef": kl_coef,
        }
        metrics |= {f"scores/{name}": episode_mean(x) for name, x in scored.by_name.items()}
        for name in epoch_means[0]:
            metrics[name] = sum(means[name] for means in epoch_means) / len(epoch_means)
        metrics["val/ratio_var"] -= (metrics["val/ratio"] - 1) ** 2
        metrics |= {
            "val/ratio_start_error": distributed.max_all(ratio_error).item(),
            "val/num_eos_tokens": distributed.sum_all(ended.sum()).item(),
            "val/explained_variance": explained,
            "response/length": batch_tokens.item() / args.batch_size,
            "response/eos_rate": episode_mean(ended),
            "response/cut_rate": episode_mean(scored.shortened),
            "grad_norm": torch.stack(grad_norms).mean().item(),
            "time/rollout": times[0],
            "time/score": times[1],
            "time/train": times[2],
            "tokens_per_second": (prompt_tokens + batch_tokens).item() / sum(times),
        }
        if ptx_losses:
            metrics["loss/ptx_avg"] = torch.stack(ptx_losses).mean().item()
        if args.eval_every and update % args.eval_every == 0:
            real = response_mask.bool()
            tensors = {"scores": scores, "advantages": advantages[real], "ratios": ratios[real]}
            logger.to_tensorboard(update, tensors)
            if update < num_updates:
                _, result = compare_policy(shown=2)
                metrics |= utils.eval_metrics(result)
        logger.log(update, metrics)
        if args.save_rollouts and update % args.save_rollouts == 0:
            fields = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
            tensors = rollout | {name: getattr(batch, name) for name in fields}
            numbers = vars(args) | {"kl_coef": kl_coef, "update": update}
            saving.save_rollout(out, tensors, numbers)
        if args.kl_target and update > args.critic_warmup_updates:  # Ziegler et al., 2.2 (D27)
            error = min(max(metrics["objective/kl"] / args.kl_target - 1, -0.2), 0.2)
            state["kl_coef"] *= 1 + error * args.batch_size / args.kl_horizon
        if args.save_every and update % args.save_every == 0 and update < num_updates:
            checkpoints.save(update, state)
        if signal := interruption.came():
            utils.leave(signal, checkpoints, update, state)

    # ---- what it leaves
    saving.save_model(policy, tokenizer, out)  # before the evaluation, in which a judge may fail
    after, result = compare_policy(shown=4)
    logger.to_tensorboard(update, utils.eval_metrics(result))
    seconds = time.time() - started
    if distributed.is_main():
        text = ""
        for b, a in zip(before, after, strict=True):
            row = {"prompt": b["prompt"], "reference": b["response"], "policy": a["response"]}
            for name in ("score", "judge", "length"):
                row |= {f"reference_{name}": b[name], f"policy_{name}": a[name]}
            text += json.dumps(row, ensure_ascii=False) + "\n"
        utils.write_text(out / "samples.jsonl", text)
        summary = {"updates": update, "episodes": update * args.batch_size}
        summary |= {"seconds": seconds, "eval": result}
        saving.write_summary(out, args, policy, summary)
    logger.close()
    by, old, new = result["win_rate_by"], result["reference"], result["policy"]
    utils.say(
        f"ppo_rlhf: wins {result['win_rate']:.3f} of {len(before)} held-out prompts by the {by}; "
        f"mean {by} {old[by]:.2f} -> {new[by]:.2f}, KL {new['kl']:.1f} nats; "
        f"{seconds:.0f} s; model in {out}"
    )


def compare(before: list[dict], after: list[dict]) -> dict:
    """Means of reference and policy over held-out prompts, and how often the policy wins."""

    def means(results: list[dict]) -> dict:
        names = ("score", "judge", "kl", "length", "eos_rate")
        columns = {name: [result[name] for result in results] for name in names}
        return {k: sum(x) / len(x) if None not in x else None for k, x in columns.items()}

    by = "score" if before[0]["judge"] is None else "judge"
    wins = 0.0
    for old, new in zip(before, after, strict=True):
        # scores of equal ones may differ by rounding
        tie = new["response"] == old["response"] or new[by] == old[by]
        wins += 0.5 if tie else new[by] > old[by]
    result = {"prompts": len(before), "reference": means(before), "policy": means(after)}
    return result | {"win_rate": wins / len(before), "win_rate_by": by}


def check_flags(args: Args, world: int) -> None:
    """Fill in defaults; stop with exit code 2 on flags that do not fit."""
    if args.reward_model is None:
        args.reward_model = () if args.reward_fn else ("runs/reward_model",)
    rewards = len(args.reward_model) + len(args.reward_fn)
    if not rewards:
        utils.stop("--reward-model: is empty; pass one or --reward-fn")
    if len(args.reward_weights) not in (0, rewards):
        utils.stop(f"--reward-weights: rewards: {rewards}; pass one each, models first")
    if args.ensemble != "sum" and len(args.reward_model) < 2:
        utils.stop(f"--ensemble: {args.ensemble} needs two reward models; leave it out")
    may_be_0 = "top_k missing_eos_penalty kl_coef vf_coef entropy_coef ptx_coef gamma lam "
    may_be_0 += "value_lam critic_warmup_updates save_rollouts"
    utils.check_numbers(args, may_be_0, at_most_1="gamma lam value_lam top_p")
    if args.batch_size % (args.samples_per_prompt * world):
        utils.stop("--batch-size: --samples-per-prompt x processes must divide it; change one")
    if args.total_episodes // args.batch_size <= args.critic_warmup_updates:
        utils.stop("--total-episodes: trains no policy; pass more")
    if args.advantage in ("rloo", "grpo") and args.samples_per_prompt < 2:
        utils.stop(f"--samples-per-prompt: is 1; {args.advantage} needs 2 or more")
    of_critic = "value_model value_lam value_learning_rate critic_warmup_updates gamma lam vf_coef "
    for name in (of_critic + "cliprange_value").split():
        if args.advantage != "gae" and getattr(args, name) != getattr(Args, name):
            utils.stop(f"{utils.flag(name)}: {args.advantage} has no critic; leave it out")
    if args.advantage == "gae":
        args.value_learning_rate = args.value_learning_rate or args.learning_rate
        args.value_lam = args.lam if args.value_lam is None else args.value_lam
    args.cliprange_high = args.cliprange_high or args.cliprange
    if args.kl_target and not args.kl_coef:
        utils.stop("--kl-target: a --kl-coef of 0 cannot be steered; raise it")
    if args.kl_target and args.batch_size >= 5 * args.kl_horizon:
        utils.stop("--kl-horizon: kl_coef could turn negative; pass at least --batch-size")


if __name__ == "__main__":
    main(tyro.cli(Args))
