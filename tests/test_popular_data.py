"""The table of popular data sets in docs/data.md: every cell on a file of that layout.

The texts are made up. A cell is the flags that a stage needs beside --dataset; what the model then
sees of the first row is compared with what that data set's first row means.
"""

import re
import shlex

import pytest
import tyro
from conftest import ROOT, make_tokenizer, write_jsonl

import dataset
import encoding
import ppo_rlhf
import reward_model
import sft

Q, A, B = "Which fruit?", "Figs.", "None."
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", Q), ("assistant", A), ("assistant", B))
)
CHATS = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
TURNS = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
HH = "\n\nHuman: Which fruit?\n\nAssistant:"
HH_YES, HH_NO, GUANACO = f"{HH} {A}", f"{HH} {B}", f"### Human: {Q}### Assistant: {A}"
POST, JOINED = f"POST: {Q}\n\nTL;DR:", "Which fruit?\n\nOf these.\n\n"

# what each stage sees of a first row: given and learned
CHAT = "<|user|>Which fruit?<|end|><|assistant|>"
YES, NO = "Figs.<|end|><eos>", "None.<|end|><eos>"
SEEN_CHATS = {"sft": (CHAT, YES), "reward_model": (CHAT + YES, CHAT + NO)}
SEEN_POST = {"sft": (POST, f" {A}<eos>"), "ppo": (POST,)}
SEEN_JOINED = {"sft": (JOINED, f"{A}<eos>"), "ppo": (JOINED,)}

# a data set's split names, its first row, and what is seen of it
LAYOUTS = {
    "Anthropic HH": (
        "train test",
        {"chosen": HH_YES, "rejected": HH_NO},
        {"sft": ("", f"{HH_YES}<eos>"), "reward_model": (f"{HH_YES}<eos>", f"{HH_NO}<eos>")},
    ),
    "UltraFeedback": (
        "train_sft train_prefs train_gen test_sft test_prefs test_gen",
        {
            **{"prompt": Q, "prompt_id": "f9", "messages": [USER, GOOD], **CHATS},
            **{"score_chosen": 8.0, "score_rejected": 2.0},
        },
        {**SEEN_CHATS, "ppo": (Q,)},
    ),
    "Skywork": ("train", {**CHATS, "source": "x"}, SEEN_CHATS),
    "Tulu": ("train", {"id": "1", "source": "x", "prompt": Q, **CHATS}, SEEN_CHATS | {"ppo": (Q,)}),
    "Orca": (
        "train",
        {"system": Q, "question": "Of these.", "chosen": A, "rejected": B},
        {**SEEN_JOINED, "reward_model": (f"{JOINED}{A}<eos>", f"{JOINED}{B}<eos>")},
    ),
    "TL;DR, `query`": (
        "train validation test",
        {"id": "t3", "query": POST, "reference_response": f" {A}", "label": [1]},
        SEEN_POST,
    ),
    "TL;DR, `trl-lib": (
        "train validation test",
        {"prompt": POST, "completion": f" {A}"},
        SEEN_POST,
    ),
    "Alpaca": (
        "train",
        {"instruction": Q, "input": "Of these.", "output": A, "text": f"### {Q}"},
        SEEN_JOINED,
    ),
    "Dolly": (
        "train",
        {"instruction": Q, "context": "Of these.", "response": A, "category": "closed_qa"},
        SEEN_JOINED,
    ),
    "ShareGPT": ("train", {"id": "1", "conversations": TURNS}, {"sft": (CHAT, YES)}),
    "OpenAssistant, `OpenAssistant/oasst1": (
        "train validation",
        {"message_id": "1", "parent_id": None, "text": Q, "role": "prompter", "lang": "en"},
        {},
    ),
    "OpenAssistant, `timdettmers": (
        "train test",
        {"text": GUANACO},
        {"sft": ("", f"{GUANACO}<eos>")},
    ),
    "GSM8K": (
        "train test",
        {"question": Q, "answer": "2 figs.\n#### 2"},
        {"sft": (f"{Q}\n\n", "2 figs.\n#### 2<eos>"), "ppo": (f"{Q}\n\n",)},
    ),
    "verl": (
        "train test",
        {
            **{"data_source": "openai/gsm8k", "prompt": [USER], "ability": "math"},
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"split": "train", "index": 0},
        },
        {"ppo": (CHAT,)},
    ),
    "KTO": (
        "train test",
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"sft": (CHAT, YES), "ppo": (CHAT,)},
    ),
}
PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
STAGES = {
    "sft": (sft, dataset.SFT_FORMATS),
    "reward_model": (reward_model, PAIRS),
    "ppo": (ppo_rlhf, dataset.PROMPT_FORMATS),
}


def table() -> list[list[str]]:
    """Rows of the table: a name, and a cell for each stage."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    part = text.split("## Popular data sets")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_every_row_of_the_table_is_tested():
    names = [row[0] for row in table()]
    assert len(names) == len(LAYOUTS)
    for layout, name in zip(LAYOUTS, names, strict=True):
        assert name.startswith(layout)


def seen(stage, tokenizer, rows) -> tuple[str, ...]:
    """The first example as the model sees it."""
    if stage == "ppo":
        return (tokenizer.decode(encoding.encode_prompts(tokenizer, rows, 999)[0].ids),)
    if stage == "reward_model":
        pair = reward_model.encode(tokenizer, rows, 999)[0]
        return (tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected))
    ids, learned = encoding.encode_demonstrations(tokenizer, rows, 999)[0]
    n = learned.index(True)
    assert all(learned[n:])
    return (tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:]))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_popular_data_set(name, stage, tmp_path):
    cell = next(row for row in table() if row[0].startswith(name))[1 + [*STAGES].index(stage)]
    splits, first, wanted = LAYOUTS[name]
    rows = [first, *({**first, "id": str(i)} for i in range(9))]
    if name == "KTO":
        rows += [first | {"label": False, "completion": [BAD]}] * 3
    for split in splits.split():
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    module, formats = STAGES[stage]
    flags = shlex.split("".join(re.findall("`(.*)`", cell)))
    args = tyro.cli(module.Args, args=["--dataset", str(tmp_path), *flags])
    if cell.startswith("refused: "):
        with pytest.raises(SystemExit):
            dataset.load_splits(args, formats)
        assert stage not in wanted
        return
    assert cell == "none" or cell.startswith("`--")
    train, held_out = dataset.load_splits(args, formats)
    assert train and held_out
    assert seen(stage, make_tokenizer(chat=True), train) == wanted[stage]
