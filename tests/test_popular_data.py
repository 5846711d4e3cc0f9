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
import ppo_rlhf
import reward_model
import sft

Q, A, B = "Which fruit?", "Figs.", "None."
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", Q), ("assistant", A), ("assistant", B))
)
TURNS = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
HH = "\n\nHuman: Which fruit?\n\nAssistant:"
CHAT = "<|user|>Which fruit?<|end|><|assistant|>"
YES, NO = "Figs.<|end|><eos>", "None.<|end|><eos>"
JOINED = "Which fruit?\n\nOf these.\n\n"

# a data set's split names, its first row, and what each stage sees of it: given and learned
LAYOUTS = {
    "Anthropic HH": (
        ["train", "test"],
        {"chosen": f"{HH} {A}", "rejected": f"{HH} {B}"},
        {"sft": ("", f"{HH} {A}<eos>"), "reward_model": (f"{HH} {A}<eos>", f"{HH} {B}<eos>")},
    ),
    "UltraFeedback": (
        [f"{split}_{kind}" for split in ("train", "test") for kind in ("sft", "prefs", "gen")],
        {
            "prompt": Q,
            "prompt_id": "f9",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "messages": [USER, GOOD],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        {"sft": (CHAT, YES), "reward_model": (CHAT + YES, CHAT + NO), "ppo": (Q,)},
    ),
    "Skywork": (
        ["train"],
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "source": "x"},
        {"sft": (CHAT, YES), "reward_model": (CHAT + YES, CHAT + NO)},
    ),
    "Tulu": (
        ["train"],
        {"id": "1", "source": "x", "prompt": Q, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"sft": (CHAT, YES), "reward_model": (CHAT + YES, CHAT + NO), "ppo": (Q,)},
    ),
    "Orca": (
        ["train"],
        {"system": Q, "question": "Of these.", "chosen": A, "rejected": B},
        {
            "sft": (JOINED, f"{A}<eos>"),
            "reward_model": (f"{JOINED}{A}<eos>", f"{JOINED}{B}<eos>"),
            "ppo": (JOINED,),
        },
    ),
    "TL;DR, `query`": (
        ["train", "validation", "test"],
        {"id": "t3", "query": f"POST: {Q}\n\nTL;DR:", "reference_response": f" {A}", "label": [1]},
        {"sft": (f"POST: {Q}\n\nTL;DR:", f" {A}<eos>"), "ppo": (f"POST: {Q}\n\nTL;DR:",)},
    ),
    "TL;DR, `trl-lib": (
        ["train", "validation", "test"],
        {"prompt": f"POST: {Q}\n\nTL;DR:", "completion": f" {A}"},
        {"sft": (f"POST: {Q}\n\nTL;DR:", f" {A}<eos>"), "ppo": (f"POST: {Q}\n\nTL;DR:",)},
    ),
    "Alpaca": (
        ["train"],
        {"instruction": Q, "input": "Of these.", "output": A, "text": f"### {Q}"},
        {"sft": (JOINED, f"{A}<eos>"), "ppo": (JOINED,)},
    ),
    "Dolly": (
        ["train"],
        {"instruction": Q, "context": "Of these.", "response": A, "category": "closed_qa"},
        {"sft": (JOINED, f"{A}<eos>"), "ppo": (JOINED,)},
    ),
    "ShareGPT": (["train"], {"id": "1", "conversations": TURNS}, {"sft": (CHAT, YES)}),
    "OpenAssistant, `OpenAssistant/oasst1": (
        ["train", "validation"],
        {"message_id": "1", "parent_id": None, "text": Q, "role": "prompter", "lang": "en"},
        {},
    ),
    "OpenAssistant, `timdettmers": (
        ["train", "test"],
        {"text": f"### Human: {Q}### Assistant: {A}"},
        {"sft": ("", f"### Human: {Q}### Assistant: {A}<eos>")},
    ),
    "GSM8K": (
        ["train", "test"],
        {"question": Q, "answer": "2 figs.\n#### 2"},
        {"sft": (f"{Q}\n\n", "2 figs.\n#### 2<eos>"), "ppo": (f"{Q}\n\n",)},
    ),
    "verl": (
        ["train", "test"],
        {
            "data_source": "openai/gsm8k",
            "prompt": [USER],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"split": "train", "index": 0},
        },
        {"ppo": (CHAT,)},
    ),
    "KTO": (
        ["train", "test"],
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"sft": (CHAT, YES), "ppo": (CHAT,)},
    ),
}
STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo_rlhf}


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
        return (tokenizer.decode(dataset.encode_prompts(tokenizer, rows, 999)[0].ids),)
    if stage == "reward_model":
        pair = reward_model.encode(tokenizer, rows, 999)[0]
        return (tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected))
    ids, learned = dataset.encode_demonstrations(tokenizer, rows, 999)[0]
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
    for split in splits:
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    flags = shlex.split("".join(re.findall("`(.*)`", cell)))
    args = tyro.cli(STAGES[stage].Args, args=["--dataset", str(tmp_path), *flags])
    formats = {
        "sft": dataset.SFT_FORMATS,
        "reward_model": [("prompt", "chosen", "rejected"), ("chosen", "rejected")],
        "ppo": dataset.PROMPT_FORMATS,
    }[stage]
    if cell.startswith("refused: "):
        with pytest.raises(SystemExit):
            dataset.load_splits(args, formats)
        assert stage not in wanted
        return
    assert cell == "none" or cell.startswith("`--")
    train, held_out = dataset.load_splits(args, formats)
    assert train and held_out
    assert seen(stage, make_tokenizer(chat=True), train) == wanted[stage]
