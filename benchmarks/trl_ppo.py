"""PPO by TRL 1.11.0, with the flags and the record of ppo_rlhf.py.

Not a benchmark by itself: parity_trl.py and throughput.py run it as a process of its own. Needs
`pip install -r requirements-bench.txt`.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from datasets import Dataset
from measure import ROOT, load_module
from transformers.integrations import sdpa_attention
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

sys.path.insert(0, str(ROOT))
import dataset
import encoding
import generate
import utils


@dataclass
class Args:
    """Names and meanings as in ppo_rlhf.py."""

    model: str
    reward_model: str
    dataset: str
    output_dir: Path
    total_episodes: int
    batch_size: int
    micro_batch_size: int
    num_ppo_epochs: int
    response_length: int
    learning_rate: float
    temperature: float
    kl_coef: float
    missing_eos_penalty: float
    rollout_batch_size: int | None = None
    """Responses sampled and scored at once; none: all of an update."""
    eval_every: int = 0
    seed: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"


def main(args: Args) -> None:
    # TRL's models attend as transformers has it, not as utils.py does
    transformers.AttentionInterface.register("sdpa", sdpa_attention.sdpa_attention_forward)
    sdpa_attention.use_gqa_in_sdpa = utils.grouped
    torch.backends.cuda.enable_cudnn_sdp(True)
    # accelerate reads this; transformers 5.24 no longer passes on what `bf16` asks for
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"float32": "no", "bfloat16": "bf16"}[args.dtype]
    # what stays float32, as in a run of ppo_rlhf.py
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "bfloat16"
    gold = load_module("data/support/gold.py")
    device = torch.device(args.device)
    tokenizer = encoding.load_tokenizer(args.model)
    tokenizer.padding_side = "left"
    lm = transformers.AutoModelForCausalLM
    policy, reference = (lm.from_pretrained(args.model, dtype=torch.float32) for _ in range(2))
    classifier = transformers.AutoModelForSequenceClassification
    kind = {"num_labels": 1, "dtype": torch.float32}
    value_model, judge = (classifier.from_pretrained(args.reward_model, **kind) for _ in range(2))
    longest = utils.context_length(policy) - args.response_length
    train, held_out = (
        encoding.encode_prompts(
            tokenizer, dataset.load_data(args.dataset, split, dataset.PROMPT_FORMATS), longest
        )
        for split in ("train", "validation")
    )
    held_out = held_out[:200]
    train_ids = [{"input_ids": p.ids} for p in train]
    held_out_ids = [{"input_ids": p.ids} for p in held_out]
    config = PPOConfig(
        output_dir=str(args.output_dir / "trl"),
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
        num_mini_batches=1,
        num_ppo_epochs=args.num_ppo_epochs,
        total_episodes=args.total_episodes,
        learning_rate=args.learning_rate,
        adam_epsilon=1e-5,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        response_length=args.response_length,
        temperature=args.temperature,
        stop_token="eos",
        missing_eos_penalty=args.missing_eos_penalty,
        kl_coef=args.kl_coef,
        local_rollout_forward_batch_size=args.rollout_batch_size or args.batch_size,
        num_sample_generations=0,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=False,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        seed=args.seed,
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def labeler() -> float:
        """Mean score by the embedded task's labeler of replies to the held-out prompts."""
        ids, mask = encoding.pad([p.ids for p in held_out], tokenizer.pad_token_id, "left", device)
        R, stops = args.response_length, [tokenizer.eos_token_id]
        sampling = {"pad_id": tokenizer.pad_token_id, "temperature": args.temperature}
        uniform = generate.random_numbers(len(ids), R, utils.generator(device, args.seed))
        replies, real = generate.generate(policy, ids, mask, uniform, stops, **sampling)
        kept = [reply[m.bool()] for reply, m in zip(replies, real, strict=True)]
        texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in kept]
        return statistics.mean(gold.score([p.text for p in held_out], texts))

    clock: dict[str, float] = {}
    batch_generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def timed_generation(*given):
        clock["start"] = utils.now(device)
        result = batch_generation(*given)
        clock["generated"] = utils.now(device)
        return result

    def timed_forward(*given):
        if torch.is_grad_enabled() and "scored" not in clock:
            clock["scored"] = utils.now(device)
        return forward(*given)

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward

    class Record(transformers.TrainerCallback):
        """Writes what TRL logs after each update, its times, and at some what the labeler says."""

        def __init__(self):
            self.file, self.update = (args.output_dir / "metrics.jsonl").open("w", buffering=1), 0

        def on_log(self, config, state, control, logs=None, **kwargs):
            if "objective/kl" not in logs:
                return
            self.update += 1
            end = utils.now(device)
            row = {"update": self.update, "time/rollout": clock["generated"] - clock["start"]}
            row["time/score"] = clock["scored"] - clock["generated"]
            row["time/train"] = end - clock.pop("scored")
            row |= {name: value for name, value in logs.items() if isinstance(value, float | int)}
            if args.eval_every and self.update % args.eval_every == 0:
                row["eval/judge"] = labeler()
            self.file.write(json.dumps(row) + "\n")

    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value_model,
        train_dataset=Dataset.from_list(train_ids),
        eval_dataset=Dataset.from_list(held_out_ids),
        callbacks=[Record()],
    )
    if (trainer.accelerator.mixed_precision == "bf16") != (args.dtype == "bfloat16"):
        sys.exit(f"TRL would not train in {args.dtype}")
    trainer.train()


if __name__ == "__main__":
    main(tyro.cli(Args))
