"""Stage 2 of RLHF: a reward model from human preferences.

A language model with a scalar head learns to score the response that people preferred above the one they rejected:
the Bradley-Terry loss, -log sigmoid(score(chosen) - score(rejected)). It is right about a held-out pair if the chosen
one scores higher. At the end the scores are shifted to mean 0 on demonstrations.

In: a model, by default the one from sft.py, and rows with `prompt`, `chosen`, `rejected`, or without `prompt`.
Out: `runs/reward_model`, an ordinary sequence-classification folder (`num_labels=1`), whose config.json holds
`reward_mean` and `reward_std`, with metrics.jsonl, summary.json and TensorBoard events.

    python reward_model.py
    python reward_model.py --model runs/my-sft --dataset my/preferences --normalize-with my/demonstrations \\
        --learning-rate 2e-5 --output-dir runs/my-reward-model

B pairs, T tokens, H hidden size. `D11` in a comment points to DETAILS.md.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import utils


@dataclass
class Args:
    model: str = "runs/sft"
    """What to start from: a hub id or a local folder."""
    dataset: str = "data/support/preferences"
    """Preferences: a hub id, a folder with train.jsonl and validation.jsonl, or a .jsonl, .parquet or .csv file."""
    train_split: str = "train"
    """Split to learn from."""
    eval_split: str = "validation"
    """Split to measure the accuracy on."""
    output_dir: str = "runs/reward_model"
    """Where the model and all records go."""
    overwrite: bool = False
    """Replace a run that is already in the output folder."""
    resume: bool = False
    """Go on from the output folder's last checkpoint."""
    seed: int = 1
    """Seed of the head's initialization and of the data order."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    trust_remote_code: bool = False
    """Execute Python code that comes with a model, where it needs that; whoever wrote it can do what you can."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products; weights, losses and optimizer stay in float32."""
    epochs: int = 1
    """Passes over the pairs; more than one overfits (D12)."""
    batch_size: int = 32
    """Pairs per optimizer step, over all processes."""
    micro_batch_size: int | Literal["auto"] = 32
    """Pairs that one device holds in one forward-backward, auto: as many as fit; changes rounding alone."""
    max_length: int = 512
    """Tokens of prompt and response; longer pairs are left out."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW; for pretrained models of 100M parameters and more take 1e-5 to 5e-5."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises from 0, before its cosine decay to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    normalize_with: str = "data/support/sft"
    """Demonstrations on whose responses the mean score is set to 0 (D13), or `none`."""
    normalize_std: bool = False
    """Set the scores' standard deviation on them to 1 too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the models (torch.compile): a minute at the start, then faster; on CPUs in bfloat16, with a compiler."""
    save_every: int = 200
    """Steps between checkpoints for --resume; 0 saves one only when the run is interrupted."""
    keep_checkpoints: int = 2
    """The newest checkpoints to keep, 1 or more; should one be damaged, --resume goes on from the one before."""
    eval_every: int = 100
    """Steps between evaluations; 0 evaluates at the end alone."""
    track: bool = False
    """Log to Weights & Biases too (pip install wandb)."""


def main(args: Args) -> None:
    started = time.time()
    process = utils.start_process(args.device, args.seed, args.trust_remote_code)
    utils.check_common_flags(args, process.world)
    utils.check_output(args)
    other_data = args.dataset != Args.dataset and args.normalize_with == Args.normalize_with
    what = "still names the embedded task's demonstrations; pass your own task's, or none"
    utils.require(not other_data, f"--normalize-with: {what}")
    idle = args.normalize_std and args.normalize_with == "none"
    utils.require(not idle, "--normalize-std: goes with --normalize-with; name demonstrations, or leave it out")

    # --------------------------------------------------------------------------------------------- data and model
    formats = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
    train_data = utils.load_data(args.dataset, args.train_split, formats)
    eval_data = utils.load_data(args.dataset, args.eval_split, formats)
    sft_data = None
    if args.normalize_with != "none":
        sft_data = utils.load_data(args.normalize_with, args.train_split, utils.SFT_FORMATS)
    tokenizer = utils.load_tokenizer(args.model)
    model = utils.load_classifier(args.model, process.device)
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))  # D10
    # transformers finds the last token by comparing with the pad id; where pad is EOS it would miss the EOS (B20, B21)
    model.config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0

    max_length = min(args.max_length, utils.context_length(model))
    train_pairs = encode(tokenizer, train_data, max_length)
    eval_pairs = encode(tokenizer, eval_data, max_length)
    some = bool(train_pairs) and bool(eval_pairs)
    utils.require(some, f"{args.dataset}: no pair is short enough; raise --max-length")
    sft_texts = []  # token ids of the demonstrations that the scores are normalized on
    if sft_data is not None:
        encoded = utils.encode_pairs(tokenizer, utils.demonstrations(sft_data), sft_data.places)
        sft_texts = [p + c for p, c in zip(*encoded, strict=True) if len(p) + len(c) <= max_length]
        utils.require(bool(sft_texts), f"{args.normalize_with}: no text is short enough; raise --max-length")
    if args.compile:
        utils.compile_model(model)
    out = utils.open_output(args, process)

    # D6: AdamW without weight decay, warmup, cosine to 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    num_steps = args.epochs * math.ceil(len(train_pairs) / args.batch_size)
    warmup_steps = round(args.warmup_ratio * num_steps)

    state = utils.load_checkpoint(out, {"model": model}, optimizer) if args.resume else None
    start = state["step"] if state else 0
    logger = utils.Logger(out, args, process, "step", start)
    if process.is_main:
        size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
        print(f"reward_model: {size}, {len(train_pairs)} pairs, {num_steps} steps on {process.device}")

    def score(texts: list[list[int]]) -> torch.Tensor:
        """Raw scores [B] of token ids that end with EOS, read at their last token (D10)."""
        ids, mask = utils.pad(texts, tokenizer.pad_token_id, "right", process.device, limit=max_length)  # [B, T]
        with utils.autocast(process.device, args.dtype):
            return utils.last_token_scores(model, ids, mask)

    micro_batch_size = args.micro_batch_size
    if micro_batch_size == "auto":
        longest = max((text for p in train_pairs for text in (p.chosen, p.rejected)), key=len)
        most = args.batch_size // process.world
        micro_batch_size = utils.largest_micro_batch(
            lambda n: score([longest] * 2 * n).sum(), most, args.gradient_checkpointing, model
        )

    @torch.no_grad()
    def score_all(texts: list[list[int]]) -> np.ndarray:
        """Raw scores of many texts, in their order, each process scoring its share."""
        mine = texts[process.rank :: process.world]
        order = sorted(range(len(mine)), key=lambda i: len(mine[i]))
        scores = torch.zeros(len(mine))
        for i in range(0, len(mine), 2 * micro_batch_size):
            part = order[i : i + 2 * micro_batch_size]
            scores[part] = score([mine[j] for j in part]).cpu()
        return np.array(utils.gather(scores.tolist()))

    def evaluate() -> dict[str, float]:
        """Accuracy, margin and dependence on length over the held-out pairs (D14)."""
        chosen, rejected = score_all([p.chosen for p in eval_pairs]), score_all([p.rejected for p in eval_pairs])
        lengths = [p.chosen_length for p in eval_pairs] + [p.rejected_length for p in eval_pairs]
        both = np.concatenate([chosen, rejected])
        spread = both.std() > 0 and np.std(lengths) > 0
        return {
            "accuracy": float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected))),
            "mean_margin": float(np.mean(chosen - rejected)),
            "score_length_correlation": float(np.corrcoef(both, lengths)[0, 1]) if spread else 0.0,
        }

    # ------------------------------------------------------------------------------------------------------- train
    utils.set_gradient_checkpointing(model, args.gradient_checkpointing)
    progress = utils.progress_bar("reward_model", num_steps, start, process)
    interruption = utils.Interruption(process)
    for step, indices in utils.batches(len(train_pairs), args.batch_size, args.epochs, args.seed, start):
        step_started = time.time()
        batch = [train_pairs[i] for i in indices]
        mine = sorted(batch[process.rank :: process.world], key=lambda p: len(p.chosen) + len(p.rejected))
        totals = torch.zeros(3, device=process.device)  # loss, right pairs, margin
        for i in range(0, len(mine), micro_batch_size):
            micro = mine[i : i + micro_batch_size]
            # D11: both sides in one forward pass
            chosen, rejected = score([p.chosen for p in micro] + [p.rejected for p in micro]).chunk(2)  # [B], [B]
            losses = -F.logsigmoid(chosen - rejected)
            (losses.sum() / len(batch)).backward()  # D9: divided by the pairs of the whole batch (B12, B22)
            totals += torch.stack([losses.sum(), (chosen > rejected).sum(), (chosen - rejected).sum()]).detach()
            if interruption.here():
                break
        if interruption.anywhere():  # the model is as the last step left it
            interruption.leave(out, step - 1, logger, {"model": model}, optimizer, {}, keep=args.keep_checkpoints)
        loss, accuracy, margin = (utils.sum_over_processes(totals) / len(batch)).tolist()
        utils.sum_gradients(list(model.parameters()))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()  # D29
        numbers = {"loss": loss, "gradient norm": grad_norm}
        pairs = {"chosen": [p.chosen for p in mine], "rejected": [p.rejected for p in mine]}
        utils.check_finite(out, process, f"step {step}", numbers, pairs)
        lr = utils.warmup_cosine(args.learning_rate, step, num_steps, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        tokens_per_second = sum(len(p.chosen) + len(p.rejected) for p in batch) / (time.time() - step_started)
        metrics = {"loss": loss, "accuracy": accuracy, "margin": margin, "lr": lr, "grad_norm": grad_norm}
        metrics["tokens_per_second"] = tokens_per_second
        if args.eval_every and step % args.eval_every == 0 and step < num_steps:
            metrics |= {f"eval/{name}": value for name, value in evaluate().items()}
        logger.log(step, metrics)
        progress.update()
        shown = {"loss": f"{loss:.3f}", "accuracy": f"{accuracy:.2f}", "tok_s": f"{tokens_per_second:,.0f}"}
        progress.set_postfix(shown, refresh=False)
        if args.save_every and step % args.save_every == 0 and step < num_steps and process.is_main:
            utils.save_checkpoint(out, step, {"model": model}, optimizer, {}, args.keep_checkpoints)
    progress.close()

    # --------------------------------------------------------------------------------------------------- normalize
    if sft_texts:
        scores = score_all(sft_texts)
        # D13: PPO subtracts the mean; the loss never sees it, for it depends on differences alone
        model.config.reward_mean = float(scores.mean())
        model.config.reward_std = float(scores.std()) if args.normalize_std and scores.std() > 0 else 1.0

    # ------------------------------------------------------------------------------------------------- what it leaves
    result = evaluate()
    low, high = wilson_interval(result["accuracy"], len(eval_pairs))
    if process.is_main:
        utils.save_model(model, tokenizer, out)
        summary = {
            "accuracy": result["accuracy"],
            "accuracy_interval": [low, high],
            "pairs": len(eval_pairs),
            "mean_margin": result["mean_margin"] / model.config.reward_std,
            "score_length_correlation": result["score_length_correlation"],
            "seconds": time.time() - started,
        }
        with utils.writing(out):
            utils.write_json(out / "summary.json", summary)
        print(
            f"reward_model: accuracy {result['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f}) on "
            f"{len(eval_pairs)} held-out pairs, margin {summary['mean_margin']:.2f}, correlation with length "
            f"{result['score_length_correlation']:+.2f}; {summary['seconds']:.0f} s, "
            f"peak memory {utils.peak_memory_gb():.2f} GB; model in {out}"
        )
    logger.close()
    utils.end_process()


class Pair(NamedTuple):
    """A preference in token ids, each side with its prompt, and the lengths of the responses alone."""

    chosen: list[int]
    rejected: list[int]
    chosen_length: int
    rejected_length: int


def encode(tokenizer, data: utils.Data, max_length: int) -> list[Pair]:
    """Pairs in token ids; those with a side longer than `max_length` are left out, for a cut text has no EOS (B19)."""
    sides = []
    for column in ("chosen", "rejected"):
        pairs = [(row.get("prompt", ""), row[column]) for row in data.rows]
        sides.append(utils.encode_pairs(tokenizer, pairs, data.places))
    (prompts, chosen), (_, rejected) = sides
    pairs = [Pair(p + c, p + r, len(c), len(r)) for p, c, r in zip(prompts, chosen, rejected, strict=True)]
    kept = [p for p in pairs if max(len(p.chosen), len(p.rejected)) <= max_length]
    if len(kept) < len(pairs):
        left_out = f"{len(pairs) - len(kept)} of {len(pairs)} pairs are longer than {max_length} tokens"
        print(f"reward_model: {left_out} and are left out (--max-length)")
    return kept


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a share of n trials (Wilson 1927), which stays within 0 and 1."""
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


if __name__ == "__main__":
    main(utils.parse_flags(Args))
