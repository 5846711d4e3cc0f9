"""Stage 1 of RLHF: supervised fine-tuning.

A language model learns to answer prompts by imitating demonstrations: cross-entropy on the
completion's tokens, none on the prompt's. The result is where PPO starts and, frozen, the reference
that the KL penalty holds it to.

In: a model (`--model tiny` makes one) and rows with `prompt` and `completion`, or `messages`, or
`text`. Out: `runs/sft`, an ordinary Hugging Face folder, with metrics.jsonl, summary.json and
TensorBoard events.

    python sft.py
    python sft.py --model HuggingFaceTB/SmolLM2-135M --dataset my/demonstrations \\
        --learning-rate 2e-5 --output-dir runs/my-sft

On several GPUs (torchrun) each process takes its share of every batch; gradients and counts are
summed over all of them. Each holds the whole model or, with --fsdp, a part of it.

B sequences, T tokens, N of them to learn from, H hidden size, V vocabulary. `D8` in a comment
points to docs/details.md.
"""

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers  # which loads a model's code when it is first named
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import dataset
import distributed
import encoding
import generate
import lora
import saving
import utils


@dataclass
class Args:
    # ---- model
    model: str = "tiny"
    """Hub id, folder, or `tiny`: a small Llama and a tokenizer made from the data."""
    trust_remote_code: bool = False
    """Run code that comes with a model, with your own access rights."""
    lora_rank: int = 0
    """Rank of a LoRA adapter, trained in place of the weights; 0: none (D43)."""
    lora_alpha: float = 32.0
    """The adapter's product is scaled by this / rank."""
    lora_target: str = "all-linear"
    """What it adapts: all-linear, or names of layers with commas between."""

    # ---- data
    dataset: tuple[str, ...] = ("data/support/sft",)
    """Demonstrations: hub ids (NAME, NAME:CONFIG), folders, files; joined."""
    dataset_weights: tuple[float, ...] = ()
    """Shares of the data sets in the training rows; none: all rows."""
    revision: str | None = None
    """Branch, tag or commit of hub data."""
    train_split: str = "train"
    """Split to learn from."""
    eval_split: str = "validation"
    """Split to measure the loss on."""
    columns: tuple[str, ...] = ()
    """`prompt=a` reads a as prompt, `prompt=a+b` joins a and b, `a=` drops a."""
    last_turn_only: bool = False
    """Of a conversation learn only the last answer (D44)."""
    max_length: int = 512
    """Tokens of prompt and completion; longer completions are cut."""

    # ---- optimization
    epochs: int = 2
    """Passes over the training rows."""
    batch_size: int = 16
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int = 16
    """Max sequences in a device's forward-backward; changes only rounding."""
    learning_rate: float = 6e-3
    """Peak rate of AdamW; for 100M parameters and more 1e-5 to 5e-5."""
    warmup_ratio: float = 0.05
    """Share of the steps in which the rate rises from 0, before its cosine to 0."""
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
    """Seed of weights and data order (D7)."""

    # ---- evaluation
    eval_every: int = 400
    """Steps between evaluations; 0 evaluates only at the end."""

    # ---- output
    output_dir: str = "runs/sft"
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
    utils.check_numbers(args, may_be_0="warmup_ratio", at_most_1="warmup_ratio")
    micro_batch_size = utils.micro_batch_size(args, process.world)
    utils.check_output(args, "sft")

    # ---- data and model
    train_data, eval_data = dataset.load_splits(args, dataset.SFT_FORMATS)
    if args.lora_rank and args.model == "tiny":
        utils.stop("--lora-rank: a tiny model is made here; pass --model")
    if args.model == "tiny":
        model, tokenizer = build_tiny(train_data, device)
    else:
        tokenizer = encoding.load_tokenizer(args.model)
        model = utils.load_causal_lm(args.model, distributed.load_device(args, device), tokenizer)
        config = model.generation_config  # `model.generate` stops at the EOS learned here too (B28)
        config.eos_token_id = generate.stop_token_ids(tokenizer, "eos", config)
    if args.lora_rank:
        model = lora.adapt(model, args)
    max_length = min(args.max_length, utils.context_length(model))
    all_turns = not args.last_turn_only
    train_rows, eval_rows = (
        encoding.encode_demonstrations(tokenizer, data, max_length, all_turns)
        for data in (train_data, eval_data)
    )
    cut = sum(ids[-1] != tokenizer.eos_token_id for ids, _ in train_rows)
    if cut:
        what = "--max-length or the model's context"
        utils.say(f"sft: {cut} of {len(train_rows)} rows are cut at {max_length} tokens ({what})")
    utils.spread(model, args, device)
    out = utils.open_output(args, "sft")

    # AdamW without weight decay; its rate rises in a line, then falls to 0 as a cosine (D6)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True
    )
    num_steps = args.epochs * math.ceil(len(train_rows) / args.batch_size)
    warmup_steps = round(args.warmup_ratio * num_steps)

    checkpoints = saving.Checkpoints(
        out, {"model": model}, tokenizer, optimizer, args.keep_checkpoints
    )
    start = checkpoints.load()["step"] if args.resume else 0
    size = f"{model.num_parameters() / 1e6:.1f}M parameters"
    work = f"{len(train_rows)} rows, {num_steps} steps"
    utils.say(f"sft: {size}, {work}, on {device} in {args.dtype}")
    runs = itertools.groupby(zip(*train_rows[0], strict=True), key=lambda pair: pair[1])
    encoding.show_example(tokenizer, train_data[0], *([i for i, _ in run] for _, run in runs))
    logger = utils.Logger(out, args, "step", start, num_steps, shown="loss grad_norm")

    def cross_entropy(hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of some of the N tokens, in nats: [n], from the hidden states [n, H] before them."""
        return F.cross_entropy(utils.logits_of(model, hidden), tokens, reduction="none")

    @distributed.forward_pass
    def sum_of_losses(model: Any, rows: list[tuple[list[int], list[bool]]]) -> Tensor:
        """Cross-entropy in nats, summed over the learned tokens."""
        rows = rows or [([tokenizer.eos_token_id], [False])]  # no tokens: the sum is 0
        ids, _ = encoding.pad([ids for ids, _ in rows], tokenizer.pad_token_id, "right", device)
        # the answers' tokens only, EOS among them (D8, D44)
        is_target, _ = encoding.pad([learned for _, learned in rows], False, "right", device)
        is_target = is_target[:, 1:]  # a token is predicted by the state one position before it
        with utils.autocast(device, args.dtype):
            hidden = utils.hidden_states(model, ids)[:, :-1][is_target]  # [N, H]
            losses = utils.in_chunks(cross_entropy, model, hidden, ids[:, 1:][is_target])  # [N]
        return losses.sum()

    @torch.no_grad()
    def evaluate() -> float:
        """Cross-entropy per completion token of the held-out rows, in nats."""
        totals = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
        for rows in distributed.micro_batches(eval_rows, micro_batch_size, length):
            totals[0] += sum_of_losses(model, rows).double()
            totals[1] += count_targets(rows)
        nats, tokens = distributed.sum_all(totals).tolist()
        return nats / tokens

    # ---- train
    interruption = distributed.Interruption(device)
    steps = dataset.batches(len(train_rows), args.batch_size, args.epochs, args.seed, start)
    for step, indices in steps:
        step_started = time.time()
        if step <= warmup_steps:
            lr = args.learning_rate * step / warmup_steps
        else:
            done = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
            lr = args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr

        batch = [train_rows[i] for i in indices]
        num_tokens = count_targets(batch)  # over all processes: each knows the whole batch
        loss = torch.zeros((), device=device)
        micro_batches = distributed.micro_batches(batch, micro_batch_size, length)
        for rows in distributed.sums_in_last(micro_batches, [model]):
            # a sum over tokens by the whole batch's count, never a mean of means (D9, B12, B22)
            micro_loss = sum_of_losses(model, rows) / num_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
        loss = distributed.sum_all(loss).item()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)  # D29
        grad_norm = distributed.full(grad_norm).item()
        utils.check_finite(f"step {step}", {"loss": loss, "gradient_norm": grad_norm})
        optimizer.step()
        optimizer.zero_grad(set_to_none=not distributed.replicated(model))

        tokens_per_second = sum(map(length, batch)) / (time.time() - step_started)
        metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        metrics["tokens_per_second"] = tokens_per_second
        if args.eval_every and step % args.eval_every == 0 and step < num_steps:
            metrics["eval_loss"] = evaluate()
        logger.log(step, metrics)
        if args.save_every and step % args.save_every == 0 and step < num_steps:
            checkpoints.save(step, {})
        if signal := interruption.came():
            utils.leave(signal, checkpoints, step, {})

    # ---- what it leaves
    saving.save_model(model, tokenizer, out)
    eval_loss, seconds = evaluate(), time.time() - started
    logger.to_tensorboard(num_steps, {"eval_loss": eval_loss})
    perplexity = math.exp(min(eval_loss, 700))  # above it overflows
    summary = {"eval_loss": eval_loss, "perplexity": perplexity, "seconds": seconds}
    saving.write_summary(out, args, model, summary)
    result = f"held-out loss {eval_loss:.3f} nats per token, perplexity {perplexity:.4g}"
    logger.close()
    utils.say(f"sft: {result}; {seconds:.0f} s; model in {out}")


def build_tiny(rows: list[dataset.Row], device: torch.device) -> tuple:
    """A Llama of 0.6M parameters and a byte-level BPE tokenizer trained on the rows' texts."""
    names = ("prompt", "completion", "text", "messages")
    fields = [row[name] for row in rows for name in names if name in row]
    texts = [x for x in fields if isinstance(x, str)]
    chats = [message for x in fields if isinstance(x, list) for message in x]
    texts += [message.get("content") or "" for message in chats]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    pad, eos = "<|pad|>", "<|eos|>"
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[pad, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"pad_token": pad, "eos_token": eos}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    if chats:
        turn = "{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n"
        start = "{% if add_generation_prompt %}assistant:{% endif %}"
        tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + start
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,  # 0.02 is for wide models; a narrow one starts slowly from it
        # content matters more than distance here: with a base of 10,000 a model this narrow learns
        # to copy a product or a remedy much later
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlamaForCausalLM(config).to(device).eval(), tokenizer


def length(row: tuple[list[int], list[bool]]) -> int:
    """Tokens of a row."""
    return len(row[0])


def count_targets(rows: list[tuple[list[int], list[bool]]]) -> int:
    """Tokens to learn from; a first token, which nothing precedes, is not predicted."""
    return sum(sum(learned[1:]) for _, learned in rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
