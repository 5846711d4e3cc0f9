"""Stage 1 of RLHF: supervised fine-tuning.

A language model learns to answer prompts by imitating demonstrations: cross-entropy on the completion's tokens, none on
the prompt's. The result is where PPO starts and, frozen, the reference that the KL penalty holds it to.

In: a model (`--model tiny` makes one) and rows with `prompt` and `completion`, or `messages`, or `text`.
Out: `runs/sft`, an ordinary Hugging Face folder, with metrics.jsonl, summary.json and TensorBoard events.

    python sft.py
    python sft.py --model HuggingFaceTB/SmolLM2-135M --dataset my/demonstrations --learning-rate 2e-5 \\
        --output-dir runs/my-sft

B sequences, T tokens, V vocabulary. `D8` in a comment points to DETAILS.md.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import transformers  # which loads a model's code when it is first named
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import utils


@dataclass
class Args:
    model: str = "tiny"
    """What to start from: hub id, local folder, or `tiny`: a 1M-parameter Llama and a tokenizer made from the data."""
    dataset: str = "data/support/sft"
    """Demonstrations: a hub id, a folder with train.jsonl and validation.jsonl, or a .jsonl, .parquet or .csv file."""
    train_split: str = "train"
    """Split to learn from."""
    eval_split: str = "validation"
    """Split to measure the loss on."""
    output_dir: str = "runs/sft"
    """Where the model and all records go."""
    overwrite: bool = False
    """Replace a run that is already in the output folder."""
    resume: bool = False
    """Go on from the output folder's last checkpoint."""
    seed: int = 1
    """Seed of initialization and data order."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    trust_remote_code: bool = False
    """Execute Python code that comes with a model, where it needs that; whoever wrote it can do what you can."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of matrix products; weights, losses and optimizer stay in float32."""
    epochs: int = 4
    """Passes over the training rows."""
    batch_size: int = 16
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int | Literal["auto"] = 16
    """Sequences that one device holds in one forward-backward, auto: as many as fit; changes rounding alone."""
    max_length: int = 512
    """Tokens of a sequence, prompt and completion; longer completions are cut."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW; for pretrained models of 100M parameters and more take 1e-5 to 5e-5."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises from 0, before its cosine decay to 0."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the models (torch.compile): a minute at the start, then faster; on CPUs in bfloat16, with a compiler."""
    save_every: int = 200
    """Steps between checkpoints for --resume; 0 saves one only when the run is interrupted."""
    keep_checkpoints: int = 2
    """The newest checkpoints to keep, 1 or more; should one be damaged, --resume goes on from the one before."""
    eval_every: int = 200
    """Steps between evaluations; 0 evaluates at the end alone."""
    track: bool = False
    """Log to Weights & Biases too (pip install wandb)."""


def main(args: Args) -> None:
    started = time.time()
    process = utils.start_process(args.device, args.seed, args.trust_remote_code)
    utils.check_common_flags(args, process.world)
    utils.check_output(args)

    # --------------------------------------------------------------------------------------------- data and model
    train_data = utils.load_data(args.dataset, args.train_split, utils.SFT_FORMATS)
    eval_data = utils.load_data(args.dataset, args.eval_split, utils.SFT_FORMATS)
    if args.model == "tiny":
        texts = [text for row in train_data.rows for text in plain_texts(row)]
        model, tokenizer = build_tiny(texts, process.device)
    else:
        tokenizer = utils.load_tokenizer(args.model)
        model = utils.load_causal_lm(args.model, process.device)
    max_length = min(args.max_length, utils.context_length(model))
    train_rows = encode(tokenizer, train_data, max_length)
    eval_rows = encode(tokenizer, eval_data, max_length)
    if args.compile:
        utils.compile_model(model)
    out = utils.open_output(args, process)

    # D6: AdamW without weight decay, warmup, cosine to 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    num_steps = args.epochs * math.ceil(len(train_rows) / args.batch_size)
    warmup_steps = round(args.warmup_ratio * num_steps)

    state = utils.load_checkpoint(out, {"model": model}, optimizer) if args.resume else None
    start = state["step"] if state else 0
    logger = utils.Logger(out, args, process, "step", start)
    if process.is_main:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"sft: {parameters / 1e6:.1f}M parameters, {len(train_rows)} rows, {num_steps} steps on {process.device}")

    def sum_of_losses(rows: list[tuple[list[int], int]]) -> torch.Tensor:
        """Cross-entropy in nats, summed over the completions' tokens."""
        texts = [ids for ids, _ in rows]
        ids, mask = utils.pad(texts, tokenizer.pad_token_id, "right", process.device, limit=max_length)  # [B, T]
        prompt_lengths = torch.tensor([r[1] for r in rows], device=process.device)
        position = torch.arange(ids.shape[1], device=process.device)
        is_target = mask.bool() & (position >= prompt_lengths[:, None])  # [B, T] D8: the completions' tokens alone
        with utils.autocast(process.device, args.dtype):
            cross_entropy = partial(F.cross_entropy, reduction="none")  # of logits [n, V] and tokens [n]
            return utils.map_logits(cross_entropy, model, ids, is_target).sum()

    micro_batch_size = args.micro_batch_size
    if micro_batch_size == "auto":
        longest = max(train_rows, key=lambda r: len(r[0]))
        most = args.batch_size // process.world
        micro_batch_size = utils.largest_micro_batch(
            lambda n: sum_of_losses([longest] * n), most, args.gradient_checkpointing, model
        )

    @torch.no_grad()
    def evaluate() -> float:
        """Cross-entropy per completion token of the held-out rows, in nats."""
        mine = sorted(eval_rows[process.rank :: process.world], key=lambda r: len(r[0]))
        total = torch.zeros(2, dtype=torch.float64, device=process.device)
        for i in range(0, len(mine), micro_batch_size):
            rows = mine[i : i + micro_batch_size]
            total += torch.stack([sum_of_losses(rows).double(), torch.tensor(count_targets(rows)).to(total)])
        total = utils.sum_over_processes(total)
        return (total[0] / total[1]).item()

    # ------------------------------------------------------------------------------------------------------- train
    utils.set_gradient_checkpointing(model, args.gradient_checkpointing)
    progress = utils.progress_bar("sft", num_steps, start, process)
    interruption = utils.Interruption(process)
    for step, indices in utils.batches(len(train_rows), args.batch_size, args.epochs, args.seed, start):
        step_started = time.time()
        batch = [train_rows[i] for i in indices]
        num_tokens = count_targets(batch)  # over all processes: every process knows the whole batch
        mine = sorted(batch[process.rank :: process.world], key=lambda r: len(r[0]))  # similar lengths, little padding
        loss = torch.zeros((), device=process.device)
        for i in range(0, len(mine), micro_batch_size):
            # D9: a sum over tokens divided by the whole batch's count, never a mean of means (B12, B22)
            micro_loss = sum_of_losses(mine[i : i + micro_batch_size]) / num_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
            if interruption.here():
                break
        if interruption.anywhere():  # the model is as the last step left it
            interruption.leave(out, step - 1, logger, {"model": model}, optimizer, {}, keep=args.keep_checkpoints)
        loss = utils.sum_over_processes(loss).item()
        utils.sum_gradients(list(model.parameters()))
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()  # D29
        numbers = {"loss": loss, "gradient norm": grad_norm}
        rows = {"ids": [ids for ids, _ in mine], "prompt_lengths": [length for _, length in mine]}
        utils.check_finite(out, process, f"step {step}", numbers, rows)
        lr = utils.warmup_cosine(args.learning_rate, step, num_steps, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        tokens_per_second = sum(len(ids) for ids, _ in batch) / (time.time() - step_started)
        metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": tokens_per_second}
        if args.eval_every and step % args.eval_every == 0 and step < num_steps:
            metrics["eval_loss"] = evaluate()
        logger.log(step, metrics)
        progress.update()
        shown = {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}", "tok_s": f"{tokens_per_second:,.0f}"}
        progress.set_postfix(shown, refresh=False)
        if args.save_every and step % args.save_every == 0 and step < num_steps and process.is_main:
            utils.save_checkpoint(out, step, {"model": model}, optimizer, {}, args.keep_checkpoints)
    progress.close()

    # ------------------------------------------------------------------------------------------------- what it leaves
    eval_loss = evaluate()
    if process.is_main:
        utils.save_model(model, tokenizer, out)
        summary = {"eval_loss": eval_loss, "perplexity": math.exp(eval_loss), "seconds": time.time() - started}
        with utils.writing(out):
            utils.write_json(out / "summary.json", summary)
        print(
            f"sft: held-out loss {eval_loss:.3f} nats per token, perplexity {math.exp(eval_loss):.2f}; "
            f"{summary['seconds']:.0f} s, peak memory {utils.peak_memory_gb():.2f} GB; model in {out}"
        )
    logger.close()
    utils.end_process()


def build_tiny(texts: list[str], device: torch.device) -> tuple:
    """A Llama of about 1M parameters and a byte-level BPE tokenizer trained on `texts`: (model, tokenizer)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    pad, eos, alphabet = "<|pad|>", "<|eos|>", pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": [pad, eos], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, **settings))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, eos_token=eos)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,  # 0.02 is meant for wide models; a narrow one starts slowly from it
        # content matters more than distance here: with a base of 10,000 a model this narrow learns to copy a product or
        # a remedy much later
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).to(device).eval()
    return utils.fast_on_cpu(model, device), tokenizer


def plain_texts(row: dict) -> list[str]:
    """The texts in a row, for training a tokenizer on them."""
    if "messages" in row and "prompt" not in row:
        return [m["content"] for m in row["messages"]]
    return [row[c] for c in ("prompt", "completion", "text") if isinstance(row.get(c), str)]


def encode(tokenizer, data: utils.Data, max_length: int) -> list[tuple[list[int], int]]:
    """Rows as (token ids of prompt and completion with its EOS, length of the prompt in tokens)."""
    rows = utils.encode_demonstrations(tokenizer, data, max_length)
    cut = sum(completion[-1] != tokenizer.eos_token_id for _, completion in rows)
    if cut:
        print(f"sft: {cut} of {len(rows)} completions are cut to fit {max_length} tokens (--max-length)")
    return [(prompt + completion, len(prompt)) for prompt, completion in rows]


def count_targets(rows: list[tuple[list[int], int]]) -> int:
    """Tokens that the loss is about; a first token that nothing precedes is not predicted."""
    return sum(len(ids) - max(prompt_length, 1) for ids, prompt_length in rows)


if __name__ == "__main__":
    main(utils.parse_flags(Args))
