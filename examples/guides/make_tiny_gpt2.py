"""Build a GPT-2 of half a million random weights, for machines that cannot fetch the real one.

In: a folder to write. Out: there, what `gpt2` is on the hub, with a vocabulary of 1,024 tokens
learned from the embedded demonstrations. It knows nothing until sft.py teaches it.

    python examples/guides/make_tiny_gpt2.py runs/guides/untrained
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

TEXTS = Path(__file__).parents[2] / "data" / "support" / "sft" / "train.jsonl"


def main(folder: str) -> None:
    rows = map(json.loads, TEXTS.read_text(encoding="utf-8").splitlines())
    bpe, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    texts = (row["prompt"] + row["completion"] for row in rows)
    bpe.train_from_iterator(texts, 1024, special_tokens=[end], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, unk_token=end
    )
    sizes = {"n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
