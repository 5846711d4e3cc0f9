"""Stage 2 of RLHF: a reward model from human preferences.

A language model with a scalar head learns to score the response that people preferred above the one
they rejected: the Bradley-Terry loss, -log sigmoid(score(chosen) - score(rejected)). It is right
about a held-out pair if the chosen one scores higher. Two more losses help a small model to read,
where their coefficients are above 0: on the beginnings of a pair and on the chosen text's next
tokens. At the end scores are shifted to mean 0 on demonstrations, where there are any.

In: a model, by default the one from sft.py, and rows with `prompt`, `chosen`, `rejected`, or
without `prompt`. Out: `runs/reward_model`, an ordinary sequence-classification folder
(`num_labels=1`), whose config.json holds `reward_mean` and `reward_std`, with metrics.jsonl,
summary.json and TensorBoard events.

    python reward_model.py
    python reward_model.py --model runs/my-sft --dataset my/preferences \\
        --normalize-with my/demonstrations --learning-rate 2e-5 --output-dir runs/my-reward-model

On several GPUs (torchrun) each process takes its share of every batch; gradients and means are over
all of them. Each holds the whole model or, with --fsdp, a part of it.

B pairs, T tokens, H hidden size. `D11` in a comment points to docs/details.md.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import dataset
import distributed
import encoding
import lora
import saving
import utils


@dataclass
class Args:
    # ---- model
    model: str = "runs/sft"
    """What to start from: a hub id or a local folder."""
    trust_remote_code: bool = False
    """Run code that comes with a model, with your own access rights."""
    lora_rank: int = 0
    """Rank of a LoRA adapter, trained in place of the weights; 0: none (D43)."""
    lora_alpha: float = 32.0
    """The adapter's product is scaled by this / rank."""
    lora_target: str = "all-linear"
    """What it adapts: all-linear, or names of layers with commas between."""

    # ---- data
    dataset: tuple[str, ...] = ("data/support/preferences",)
    """Preferences: hub ids (NAME, NAME:CONFIG), folders, files; joined."""
    dataset_weights: tuple[float, ...] = ()
    """Shares of the data sets in the training rows; none: all rows."""
    revision: str | None = None
    """Branch, tag or commit of hub data."""
    train_split: str = "train"
    """Split to learn from."""
    eval_split: str = "validation"
    """Split to measure accuracy on."""
    columns: tuple[str, ...] = ()
    """`prompt=a` reads a as prompt, `prompt=a+b` joins a and b, `a=` drops a."""
    max_length: int = 512
    """Tokens of prompt and response; longer pairs are left out (B19)."""
    normalize_with: str = "data/support/sft"
    """Demonstrations whose mean score is set to 0 (D13), or `none`."""
    normalize_std: bool = False
    """Set the scores' standard deviation on them to 1 too."""

    # ---- optimization
    epochs: int = 1
    """Passes over the pairs; more than one overfits (D12)."""
    batch_size: int = 32
    """Pairs per optimizer step, counted over all processes."""
    micro_batch_size: int = 32
    """Max pairs in a device's forward-backward; changes only rounding."""
    learning_rate: float = 3e-3
    """Peak rate of AdamW; for 100M parameters and more 1e-5 to 5e-5."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the rate rises from 0, before its cosine to 0."""
    prefix_coef: float | None = None
    """Weight of the loss on prefixes (D45); none: 3 on the embedded task, else 0."""
    lm_coef: float | None = None
    """Weight of a next-token loss (D46); none: 1 on the embedded task, else 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to at most this norm (D29)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the model: a minute at the start, then faster on GPUs."""
    fsdp: bool = False
    """Under torchrun: shard weights, gradients and moments over the processes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matmuls; auto: bfloat16 where the device has it, else float32."""
    device: str = "auto"
    """cpu, cuda, or auto, which is cuda where there is one."""
    seed: int = 1
    """Seed of the head's initialization and of the data order (D7)."""

    # ---- evaluation
    eval_every: int = 150
    """Steps between evaluations; 0 evaluates only at the end."""

    # ---- output
    output_dir: str = "runs/reward_model"
    """For model and records."""
    overwrite: bool = False
    """Replace the run that is in the output folder, if any."""
    resume: bool = False
    """Continue from its last checkpoint."""
    save_every: int = 200
    """Steps between checkpoints for --resume; 0: only when interrupted."""
    keep_checkpoints: int = 2
    """How many to keep; --resume takes the one before a damaged one."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


@utils.stage()
def main(args: Args) -> None:
    started = time.time()
    args, process = utils.start_process(args)
    device = process.device
    embedded = dataset.is_default(args)
    args.prefix_coef = 3.0 * embedded if args.prefix_coef is None else args.prefix_coef
    args.lm_coef = 1.0 * embedded if args.lm_coef is None else args.lm_coef
    may_be_0 = "warmup_ratio prefix_coef lm_coef"
    utils.check_numbers(args, may_be_0, at_most_1="warmup_ratio")
    micro_batch_size = utils.micro_batch_size(args, process.world)
    utils.check_output(args, "reward_model")
    if not embedded and args.normalize_with == Args.normalize_with:
        utils.stop("--normalize-with: names the embedded task's data; pass your own, or none")
    if args.normalize_std and args.normalize_with == "none":
        utils.stop("--normalize-std: needs --normalize-with; name demonstrations, or leave it out")

    # ---- data and model
    formats = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
    train_data, eval_data = dataset.load_splits(args, formats)
    tokenizer = encoding.load_tokenizer(args.model)
    model = utils.load_classifier(args.model, distributed.load_device(args, device))
    model.known_tokens = 1 + max(tokenizer.get_vocab().values())  # for the lm_loss (B23)
    if model.score.weight.any():
        utils.say(f"reward_model: {args.model} has a trained head, which is kept")  # B27
    else:
        std = 1 / math.sqrt(model.score.in_features + 1)  # D10
        torch.nn.init.normal_(model.score.weight, std=std)
    if args.lm_coef:
        if not model.config.get_text_config().tie_word_embeddings:
            utils.stop(f"--lm-coef: {args.model} has an output layer of its own; pass --lm-coef 0")
        lm_head = TiedHead(model.get_input_embeddings())  # a classifier has none
        model.get_output_embeddings = lambda: lm_head
    if args.lora_rank:
        model = lora.adapt(model, args)
    # transformers finds the last token by comparing ids with the pad id; where pad is EOS it would
    # miss the EOS (B20, B21)
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = None if pad_id == eos_id else pad_id
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0
    model.config.problem_type = "regression"  # else transformers' pipeline gives sigmoids

    max_length = min(args.max_length, utils.context_length(model))
    train_pairs = encode(tokenizer, train_data, max_length)
    eval_pairs = encode(tokenizer, eval_data, max_length)
    sft_texts: list[list[int]] = []  # demonstrations whose mean score becomes 0
    if args.normalize_with != "none":
        sft_data = dataset.load_data(args.normalize_with, args.train_split, dataset.SFT_FORMATS)
        whole = encoding.encode_demonstrations(tokenizer, sft_data, 2**30, False)  # none is cut
        sft_texts = [ids for ids, _ in whole if len(ids) <= max_length]
        if not sft_texts:
            what = f"all demonstrations exceed {max_length} tokens (this or the model's context)"
            utils.stop(f"--max-length: {what}; raise it or shorten them")
        if left := len(whole) - len(sft_texts):
            what = f"{left} of {len(whole)} demonstrations exceed {max_length} tokens"
            utils.say(f"{args.normalize_with}: {what}, and are not in the mean score")
    utils.spread(model, args, device)
    out = utils.open_output(args, "reward_model")

    # AdamW without weight decay; its rate rises in a line, then falls to 0 as a cosine (D6)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True
    )
    num_steps = args.epochs * math.ceil(len(train_pairs) / args.batch_size)
    warmup_steps = round(args.warmup_ratio * num_steps)

    checkpoints = saving.Checkpoints(
        out, {"model": model}, tokenizer, optimizer, args.keep_checkpoints
    )
    start = checkpoints.load()["step"] if args.resume else 0
    size = f"{model.num_parameters() / 1e6:.1f}M parameters"
    work = f"{len(train_pairs)} pairs, {num_steps} steps"
    utils.say(f"reward_model: {size}, {work}, on {device} in {args.dtype}")
    encoding.show_example(tokenizer, train_data[0], *train_pairs[0][:2])
    logger = utils.Logger(out, args, "step", start, num_steps, shown="loss accuracy")

    def cross_entropy(hidden: Tensor, tokens: Tensor) -> Tensor:
        """Nats [n] of tokens [n] after hidden states [n, H]."""
        return F.cross_entropy(utils.logits_of(model, hidden), tokens, reduction="none")

    @distributed.forward_pass
    def losses_of(model: Any, pairs: list[Pair], num_pairs: int, num_tokens: int) -> Tensor:
        """A micro-batch's parts of three losses, accuracy and margin: [5]."""
        # both sides in one forward pass, the chosen first (D11)
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        ids, mask = encoding.pad(texts or [[eos_id]] * 2, pad_id, "right", device)  # [2B, T]
        with utils.autocast(device, args.dtype):
            hidden = utils.hidden_states(model, ids)  # [2B, T, H]
        scores = utils.head_outputs(model, hidden)  # [2B, T] of each text up to each token
        last = mask.sum(1, keepdim=True) - 1  # [2B, 1] where the whole text is scored (D10)
        margins = scores.gather(1, last).squeeze(1).chunk(2)  # [B] of chosen and rejected
        margins = (margins[0] - margins[1])[: len(pairs)]  # none of a process without pairs
        pair_loss = -F.logsigmoid(margins).sum() / num_pairs  # D9, B12, B22
        prefix_loss = lm_loss = torch.zeros((), device=device)
        if args.prefix_coef:  # the same for the beginnings that differ (D45)
            (a, b), (in_a, in_b) = ids.chunk(2), mask.bool().chunk(2)
            differ = (a != b).cumsum(1).bool() & in_a & in_b  # [B, T]
            chosen, rejected = scores.chunk(2)
            losses = -F.logsigmoid(chosen - rejected)  # [B, T]
            means = torch.where(differ, losses, 0.0).sum(1) / differ.sum(1).clamp(min=1)
            prefix_loss = means.sum() / num_pairs
        if args.lm_coef:  # the chosen text's tokens, each after those before it (D46)
            is_target = mask.chunk(2)[0][:, 1:].bool()  # [B, T - 1]
            states = hidden.chunk(2)[0][:, :-1][is_target]  # [N, H]
            tokens = ids.chunk(2)[0][:, 1:][is_target]  # [N]
            lm_loss = utils.in_chunks(cross_entropy, model, states, tokens).sum() / num_tokens
        accuracy, margin = (margins > 0).sum() / num_pairs, margins.sum() / num_pairs
        return torch.stack([pair_loss, prefix_loss, lm_loss, accuracy, margin])

    @torch.no_grad()
    def score_all(texts: list[list[int]]) -> np.ndarray:
        """Raw scores of many texts that end with EOS, each process scoring its share (D10)."""
        scores = torch.zeros(len(texts), device=device)
        size, numbers = 2 * micro_batch_size, range(len(texts))
        for part in distributed.micro_batches(numbers, size, lambda i: len(texts[i])):
            some = [texts[i] for i in part] or [[eos_id]]
            ids, mask = encoding.pad(some, pad_id, "right", device)  # [B, T]
            with utils.autocast(device, args.dtype):
                raw = utils.last_token_scores(model, ids, mask)  # [B]
            scores[part] = raw[: len(part)]
        return distributed.sum_all(scores).cpu().numpy()

    def evaluate() -> dict[str, float]:
        """Accuracy, margin and dependence on length over the held-out pairs (D14)."""
        chosen = score_all([pair.chosen for pair in eval_pairs])
        rejected = score_all([pair.rejected for pair in eval_pairs])
        lengths = [pair.chosen_length for pair in eval_pairs]
        lengths += [pair.rejected_length for pair in eval_pairs]
        both = np.concatenate([chosen, rejected])
        varied = both.std() > 0 and np.std(lengths) > 0
        return {
            "accuracy": float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected))),
            "mean_margin": float(np.mean(chosen - rejected)),
            "score_length_correlation": float(np.corrcoef(both, lengths)[0, 1]) if varied else 0.0,
        }

    # ---- train
    interruption = distributed.Interruption(device)
    steps = dataset.batches(len(train_pairs), args.batch_size, args.epochs, args.seed, start)
    for step, indices in steps:
        step_started = time.time()
        if step <= warmup_steps:
            lr = args.learning_rate * step / warmup_steps
        else:
            done = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
            lr = args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch = [train_pairs[i] for i in indices]
        num_tokens = sum(len(pair.chosen) - 1 for pair in batch)  # that follow another
        totals = torch.zeros(5, device=device)
        micro_batches = distributed.micro_batches(batch, micro_batch_size, length)
        for micro in distributed.sums_in_last(micro_batches, [model]):
            sums = losses_of(model, micro, len(batch), num_tokens)
            pair_loss, prefix_loss, lm_loss = sums[:3]
            (pair_loss + args.prefix_coef * prefix_loss + args.lm_coef * lm_loss).backward()
            totals += sums.detach()
        loss, prefix_loss, lm_loss, accuracy, margin = distributed.sum_all(totals).tolist()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # D29
        grad_norm = distributed.full(grad_norm).item()
        utils.check_finite(f"step {step}", {"loss": loss, "gradient_norm": grad_norm})
        optimizer.step()
        optimizer.zero_grad(set_to_none=not distributed.replicated(model))

        tokens_per_second = sum(map(length, batch)) / (time.time() - step_started)
        metrics = {"loss": loss, "accuracy": accuracy, "margin": margin, "lr": lr}
        metrics |= {"prefix_loss": prefix_loss} if args.prefix_coef else {}
        metrics |= {"lm_loss": lm_loss} if args.lm_coef else {}
        metrics |= {"grad_norm": grad_norm, "tokens_per_second": tokens_per_second}
        if args.eval_every and step % args.eval_every == 0 and step < num_steps:
            metrics |= {f"eval/{name}": value for name, value in evaluate().items()}
        logger.log(step, metrics)
        if args.save_every and step % args.save_every == 0 and step < num_steps:
            checkpoints.save(step, {})
        if signal := interruption.came():
            utils.leave(signal, checkpoints, step, {})

    # ---- normalize
    if sft_texts:
        scores = score_all(sft_texts)
        # PPO subtracts the mean; the loss, which never sees it, depends only on differences (D13)
        model.config.reward_mean = float(scores.mean())
        if args.normalize_std and scores.std() > 0:
            model.config.reward_std = float(scores.std())

    # ---- what it leaves
    result, pairs = evaluate(), len(eval_pairs)
    logger.to_tensorboard(num_steps, {f"eval/{name}": value for name, value in result.items()})
    low, high = wilson_interval(result["accuracy"], pairs)
    result["mean_margin"] /= model.config.reward_std
    seconds = time.time() - started
    saving.save_model(model, tokenizer, out)
    summary = result | {"accuracy_interval": [low, high], "pairs": pairs, "seconds": seconds}
    saving.write_summary(out, args, model, summary)
    logger.close()
    utils.say(
        f"reward_model: accuracy {result['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}) "
        f"on {pairs} held-out pairs, margin {result['mean_margin']:.2f}, correlation with length "
        f"{result['score_length_correlation']:+.2f}; {seconds:.0f} s; model in {out}"
    )


class TiedHead(NamedTuple):
    """An output layer that reads the embeddings' weight at each call: --fsdp replaces it."""

    embeddings: torch.nn.Embedding

    @property
    def weight(self) -> Tensor:
        return self.embeddings.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class Pair(NamedTuple):
    """A preference in token ids, each side with its prompt; lengths of what is not prompt."""

    chosen: list[int]
    rejected: list[int]
    chosen_length: int
    rejected_length: int


def length(pair: Pair) -> int:
    """Tokens of both sides, prompts included."""
    return len(pair.chosen) + len(pair.rejected)


def encode(tokenizer: Any, rows: list[dataset.Row], max_length: int) -> list[Pair]:
    """Pairs in token ids.

    Left out are those that cannot be compared, or with a side longer than `max_length`: a cut text
    has no EOS (B19).
    """

    def rendered(row: dataset.Row) -> tuple:
        prompt, chosen, rejected = row.get("prompt") or "", row["chosen"], row["rejected"]
        if chosen == rejected:
            raise dataset.Unusable("chosen and rejected are equal; drop the row")
        if type(chosen) is not type(rejected):
            raise dataset.Unusable("one answer is a text, the other a chat; fix the row")
        if isinstance(chosen, list) and (n := dataset.same_chat_head(prompt, chosen)):
            if n != dataset.same_chat_head(prompt, rejected):
                raise dataset.Unusable("only chosen begins with the prompt; fix the row")
            prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]  # B34
        sides = [encoding.render(tokenizer, prompt, side) for side in (chosen, rejected)]
        return row, *sides

    def pair(row: dataset.Row, chosen: tuple, rejected: tuple) -> Pair:
        if chosen[0] == rejected[0]:
            raise dataset.Unusable(
                "chosen and rejected are equal as they are rendered; fix the row"
            )
        if max(len(chosen[0]), len(rejected[0])) > max_length:
            what = f"is longer than {max_length} tokens, --max-length or the model's context"
            raise dataset.Unusable(f"{what}; raise --max-length or shorten the row")
        return Pair(chosen[0], rejected[0], sum(chosen[1]), sum(rejected[1]))

    rows, *sides = zip(*dataset.usable(rendered, rows), strict=True)
    return dataset.usable(pair, rows, *(encoding.encode(tokenizer, side) for side in sides))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95% confidence interval of a share of n trials (Wilson 1927), which stays within 0 and 1."""
    z = 1.96  # of 95%
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


if __name__ == "__main__":
    main(tyro.cli(Args))
