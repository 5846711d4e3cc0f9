"""What PPO needs of memory, by a formula, and beside it what runs took: which model fits which GPU.

Runs are of random Llamas on the CPU with --gradient-checkpointing; what a process needs without any
model, mostly the libraries, is measured with a minimal one and taken off. tests/test_memory.py
compares formula and run once more.

    python benchmarks/memory.py                  # writes benchmarks/results/memory.json
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import transformers
import tyro
from measure import ROOT, machine
from throughput import random_model

sys.path.insert(0, str(ROOT))
import utils

GPUS = (24, 40, 80, 141)  # GB
# well-known ones: vocabulary, hidden, intermediate, layers, key-value width, tied, as in Shape
MODELS = {
    "SmolLM2-135M": (49152, 576, 1536, 30, 192, True),
    "Qwen2.5-0.5B": (151936, 896, 4864, 24, 128, True),
    "Pythia-1B": (50304, 2048, 8192, 16, 2048, False),
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 512, True),
    "Qwen2.5-1.5B": (151936, 1536, 8960, 28, 256, True),
    "Llama-3.2-3B": (128256, 3072, 8192, 28, 1024, True),
    "Qwen2.5-7B": (152064, 3584, 18944, 28, 512, False),
}

COLUMNS = {"gae": ("gae",), "gae, LoRA": ("gae", 16), "rloo": ("rloo",)}  # advantage, rank


@dataclass
class Shape:
    """Sizes of a language model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    key_value: int
    tied: bool
    gated: bool = True
    """Whether the MLP has a gate, three matrices instead of two."""

    @property
    def products(self) -> int:
        """Weights of the layers' matrix products."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.key_value
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    def adapter(self, rank: int) -> int:
        """Weights of a LoRA adapter of all linear layers."""
        sides = 4 * self.hidden + 2 * (self.hidden + self.key_value)
        sides += (3 if self.gated else 2) * (self.hidden + self.intermediate)
        return self.layers * rank * sides


class Work(NamedTuple):
    """What a run works on: a model, its batches and its lengths in tokens."""

    shape: Shape
    batch: int
    micro_batch: int
    prompt: int
    response: int
    advantage: str = "gae"
    lora_rank: int = 0


def needed(
    work: Work, on_cpu: bool = False, logits_at_a_time: int = utils.LOGITS_AT_A_TIME
) -> float:
    """Bytes that the largest phase of ppo_rlhf.py needs with a reward model of the policy's size.

    With bfloat16 and --gradient-checkpointing. `on_cpu` counts what a GPU's host holds: with an
    adapter the base is read once more, in float32, to be merged and saved. Where a GPU is short of
    memory, chunks of logits are the smallest and responses are decoded in parts: a batch of 1 here
    is the least that is needed.
    """
    shape, batch, micro_batch, prompt, response, advantage, lora_rank = work
    head = 0 if shape.tied else shape.embedding
    lm, classifier = shape.products + shape.embedding + head, shape.products + shape.embedding
    value_model = advantage == "gae"
    # products in bfloat16, embeddings and head in float32: the reference, or under LoRA the base of
    # all three
    frozen = 2 * shape.products + 4 * (head + shape.embedding)
    frozen += 2 * shape.products + 4 * shape.embedding  # the reward model
    if lora_rank:
        trained = 16 * shape.adapter(lora_rank) * (2 if value_model else 1)
        copy = 0
    else:
        # float32: weights 4, gradient 4, Adam's moments 8
        trained = 16 * (lm + (classifier if value_model else 0))
        # autocast's bfloat16 copy of a trained model, kept from the forward to the backward pass
        copy = 2 * shape.products
    length = prompt + response
    tokens = micro_batch * length
    # checkpointed: a float32 hidden state for each layer, and all that one layer makes, forward and
    # backward
    layer = 4 * shape.hidden * 14 + 10 * shape.intermediate
    layer += 2 * (4 * shape.hidden + 2 * shape.key_value)
    activations = tokens * (4 * shape.hidden * shape.layers + layer)
    logits = 4 * 4 * min(logits_at_a_time, micro_batch * response * shape.vocabulary)
    merging = 2 * 4 * lm if on_cpu and lora_rank else 0  # loaded, and merged
    training = trained + copy * (2 if value_model else 1) + max(activations + logits, merging)
    cache = 2 * 2 * shape.layers * shape.key_value * batch * length
    # what a layer makes of the prompts, then one step's logits, probabilities, cumulative sum
    prefill = batch * prompt * (10 * shape.hidden + 8 * shape.intermediate)
    sampling = batch * shape.vocabulary * (4 * 3 + 8)
    rollout = 12 / 16 * trained + copy + cache + max(prefill, sampling)  # without gradients
    return frozen + max(training, rollout)


def llama(shape: Shape) -> transformers.LlamaConfig:
    """A Llama of these sizes, with heads of 64."""
    return transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.key_value // 64,
        max_position_embeddings=512,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )


def measured(work: Work) -> float:
    """Peak anonymous bytes of a run of two updates: those of mapped files vary from run to run.

    One pass over each batch: more would take no more memory, but long where bfloat16 is emulated.
    """
    shape, batch, micro_batch, prompt, response, advantage, lora_rank = work
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), llama(shape), prompt, None, response)
        flags = f"--model {folder}/model --reward-model {folder}/reward_model"
        flags += f" --dataset {folder}/prompts --output-dir {folder}/out"
        flags += f" --batch-size {batch} --micro-batch-size {micro_batch}"
        flags += f" --total-episodes {2 * batch} --response-length {response}"
        flags += f" --advantage {advantage} --lora-rank {lora_rank} --learning-rate 1e-9"
        flags += " --gradient-checkpointing --dtype bfloat16"  # as in the formula
        flags += " --num-ppo-epochs 1 --eval-prompts 8 --eval-every 0 --save-every 0"
        command, peak = [sys.executable, "ppo_rlhf.py", *flags.split()], 0
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        with subprocess.Popen(command, cwd=ROOT, env=environment) as run:
            while run.poll() is None:
                status = Path(f"/proc/{run.pid}/status").read_text()
                if found := re.search(r"RssAnon:\s+(\d+) kB", status):
                    peak = max(peak, int(found[1]) * 1024)
                time.sleep(0.01)
    if run.returncode:
        sys.exit("ppo_rlhf.py failed")
    return peak


MINIMAL = Work(Shape(2048, 64, 128, 1, 64, tied=False), 16, 8, 32, 32)
SMALL = Shape(8192, 512, 2048, 6, 512, tied=False)
SMOLLM2 = Shape(*MODELS["SmolLM2-135M"])
TRIED = {
    "34M, gae": Work(SMALL, 16, 8, 32, 32, "gae"),
    "34M, batch_mean": Work(SMALL, 16, 8, 32, 32, "batch_mean"),
    "34M, gae, LoRA": Work(SMALL, 16, 8, 32, 32, "gae", 16),
    "135M, gae": Work(SMOLLM2, 16, 8, 32, 32, "gae"),
    "135M, gae, LoRA": Work(SMOLLM2, 16, 8, 32, 32, "gae", 16),
}


def predicted_and_measured(name: str, libraries: float) -> tuple[float, float]:
    """Bytes beyond those of the libraries: by the formula, and of a run."""
    return needed(TRIED[name], on_cpu=True), measured(TRIED[name]) - libraries


def largest() -> dict[str, dict[str, dict[str, float | None]]]:
    """Of each model: what it needs, decoded as one batch and in parts, and the GPUs that fit."""
    report: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, sizes in MODELS.items():
        for column, how in COLUMNS.items():
            work = Work(Shape(*sizes, gated="Pythia" not in name), 64, 8, 512, 128, *how)
            row = report.setdefault(name, {})[column] = {}
            for key, part in (("", work), ("_in_parts", work._replace(batch=1))):
                gb = needed(part) / 1e9
                # a tenth for CUDA itself and for fragments
                fits = min((gpu for gpu in GPUS if gb < 0.9 * gpu), default=None)
                row |= {f"needs_gb{key}": gb, f"fits_gb{key}": fits}
    return report


def main(out: Path = Path("benchmarks/results")) -> None:
    libraries = measured(MINIMAL)
    report = {"machine": machine(2), "libraries_gb": libraries / 1e9, "runs": {}}
    for name in TRIED:
        predicted, took = predicted_and_measured(name, libraries)
        report["runs"][name] = {"predicted_gb": predicted / 1e9, "measured_gb": took / 1e9}
        print(name, report["runs"][name], flush=True)
    report["largest"] = largest()
    (ROOT / out / "memory.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["largest"], indent=1))


if __name__ == "__main__":
    tyro.cli(main)
