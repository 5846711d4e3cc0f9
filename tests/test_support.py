"""The support task: its files, its preference labels and its labeler's blind spots."""

import importlib.util
import json
import random

import pytest
from conftest import ROOT

FOLDER = ROOT / "data" / "support"


def load(name):
    """A module of the task's folder."""
    spec = importlib.util.spec_from_file_location(f"test_support_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load("make")
gold, w = make.gold, make.w
KINDS = ("sft", "preferences", "prompts")
FILES = [f"{kind}/{split}.jsonl" for kind in KINDS for split in ("train", "validation")]
PROMPT = "Customer: Hi, my kettle arrived broken yesterday. Can you help?\nAgent:"
GOOD = " I'm so sorry about your kettle. I will send a free replacement today."


@pytest.fixture(scope="module")
def rows():
    """The committed rows by file."""
    texts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the data made anew, and the share of labels that disagree by split."""
    folder = tmp_path_factory.mktemp("support")
    return folder, make.make(folder)


def gold_score(completion, prompt=PROMPT):
    return gold.score([prompt], [completion])[0]


# ---- the rows


def test_make_writes_the_committed_files(made):
    """To the byte, on any machine."""
    for name in FILES:
        assert (made[0] / name).read_bytes() == (FOLDER / name).read_bytes(), name
    assert sum((FOLDER / name).stat().st_size for name in FILES) < 8e6


def test_rows_have_the_stated_form(rows):
    """Columns, hardly a row twice, completions that begin with a space and end a sentence."""
    columns = {"sft": ["prompt", "completion"], "preferences": ["prompt", "chosen", "rejected"]}
    for name in FILES:
        expected = columns.get(name.split("/")[0], ["prompt", "product", "problem"])
        assert len({json.dumps(row) for row in rows[name]}) > 0.99 * len(rows[name])
        assert "prompts" not in name or len({r["prompt"] for r in rows[name]}) == len(rows[name])
        for row in rows[name]:
            assert list(row) == expected
            assert row["prompt"].startswith("Customer: ") and row["prompt"].endswith("\nAgent:")
            for key in {"completion", "chosen", "rejected"} & set(row):
                assert row[key][0] == " " and row[key][1] != " " and row[key][-1] == "."
            assert "chosen" not in row or row["chosen"] != row["rejected"]
            if "product" in row:  # which the labeler reads from the prompt
                assert gold.parse_prompt(row["prompt"]) == (row["product"], row["problem"])


def test_validation_uses_held_out_combinations(rows):
    """Of product and problem, each of which the training rows know by itself."""
    seen = {"train": set(), "validation": set()}
    for name in FILES:
        split = name.split("/")[1].removesuffix(".jsonl")
        seen[split].update(gold.parse_prompt(row["prompt"]) for row in rows[name])
    assert not seen["train"] & seen["validation"]
    assert {product for product, _ in seen["train"]} == set(w.PRODUCTS)
    assert {problem for _, problem in seen["train"]} == set(w.PROBLEMS)
    assert 0.19 < len(seen["validation"]) / (len(w.PRODUCTS) * len(w.PROBLEMS)) < 0.21


def test_wordings():
    """Enough of each, no product within another one, and none that names a product by itself."""
    assert len(set(w.PRODUCTS)) == 12 and len(w.PROBLEMS) == 8
    assert set(w.REMEDIES) == set(w.MESSAGES)
    for product in w.PRODUCTS:
        assert product == product.lower() and product.isalpha()
        assert len([other for other in w.PRODUCTS if f" {product} " in f" {other} "]) == 1
    lists = [w.WHENS, w.HELLOS, w.PLEAS, w.LEADS, w.TAILS]
    lists += [w.RAMBLE_STARTS, w.RAMBLE_MIDDLES, w.RAMBLE_ENDS]
    lists += [*w.MESSAGES.values(), *w.REMEDIES.values(), *w.LINES.values()]
    assert all(len(set(wordings)) >= 4 for wordings in lists)
    assert not any(gold.PRODUCT.search(wording) for wordings in lists for wording in wordings)
    assert all(message.count("{p}") == 1 for lists in w.MESSAGES.values() for message in lists)


def test_texts_are_short_and_differ(rows):
    """About a dozen words on both sides; of fifty samples most are different."""
    data = rows["sft/train.jsonl"]
    prompts = [len(row["prompt"].split()) - 2 for row in data]
    replies = [len(row["completion"].split()) for row in data]
    assert 8 < sum(prompts) / len(prompts) < 11 and max(prompts) <= 17
    assert 10 < sum(replies) / len(replies) < 14
    assert sum(words > 26 for words in replies) < 0.03 * len(replies)
    sample = random.Random(0).sample(data, 50)
    assert min(len({row[side] for row in sample}) for side in ("prompt", "completion")) >= 45


# ---- the labels


def test_one_label_in_sixteen_disagrees_with_the_labeler(rows, made):
    """None is a tie."""
    assert all(0.05 < share < 0.07 for share in made[1].values()) and len(made[1]) == 2
    pairs = rows["preferences/validation.jsonl"]
    assert made[1]["validation"] == 1 - gold.agreement(pairs)
    for pair in pairs:
        chosen, rejected = (
            gold_score(pair[side], pair["prompt"]) for side in ("chosen", "rejected")
        )
        assert chosen != rejected


def test_best_replies_are_rare_but_there(rows):
    """Among the demonstrations: PPO has something to find."""
    data = rows["sft/train.jsonl"]
    scores = gold.score([row["prompt"] for row in data], [row["completion"] for row in data])
    assert max(scores) == 9 and 0.03 < scores.count(9.0) / len(scores) < 0.15
    assert sum(scores) / len(scores) < 4.5  # half of the best


def test_no_clean_reply_has_faults(rows):
    """Neither the demonstrations nor any sentence that they are made of."""
    for row in rows["sft/train.jsonl"]:
        assert gold.judge(row["prompt"], row["completion"])["faults"] == 0, row
    for sentence in sorted(set(w.sentences())):
        assert gold.judge(PROMPT, " " + sentence.replace("{p}", "kettle"))["faults"] == 0, sentence


def test_the_best_reply_scores_nine_for_every_prompt(rows):
    """Polite in any way, with the right remedy in any wording."""
    rng = random.Random(0)
    for row in rows["prompts/validation.jsonl"]:
        for opening in (rng.choice(w.APOLOGIES), rng.choice(w.THANKS), rng.choice(w.GREETINGS)):
            lead, remedy = rng.choice(w.LEADS[:4]), rng.choice(w.REMEDIES[row["problem"]])
            reply = f" {w.expand(opening, False)} {w.remedy_sentence(lead, remedy, '', True)}"
            reply = reply.replace("{p}", row["product"])
            assert gold_score(reply, row["prompt"]) == gold.best_score([row["prompt"]])[0] == 9


def test_no_fixed_reply_reaches_half_of_the_best(rows):
    """The policy has to read the prompt."""
    prompts = [row["prompt"] for row in rows["prompts/validation.jsonl"]]
    fixed = {row["completion"] for row in rows["sft/validation.jsonl"]}
    for remedies in w.REMEDIES.values():
        fixed.add(f" I'm so sorry. I will {w.expand(remedies[0], False)}.")
        for product in w.PRODUCTS[::10]:
            remedy = w.expand(remedies[1], False)
            fixed.add(f" I'm so sorry about your {product}. I will {remedy}.")
    fixed |= {f" I'm so sorry about your {product}." for product in w.PRODUCTS}
    fixed |= {f" {w.expand(line, False)}" for lines in w.LINES.values() for line in lines}
    few = prompts[::10]  # enough to see the mean; the strongest are then tried on all
    means = {reply: sum(gold.score(few, [reply] * len(few))) / len(few) for reply in sorted(fixed)}
    for reply in sorted(means, key=means.get)[-50:]:
        mean = sum(gold.score(prompts, [reply] * len(prompts))) / len(prompts)
        assert mean <= gold.BEST / 2, (mean, reply)


SCRAMBLED = " " + " ".join(random.Random(3).sample(GOOD.split(), len(GOOD.split())))
ALL_PRODUCTS = " I'm so sorry about your " + ", ".join(w.PRODUCTS) + "."
ALL_REMEDIES = " I'm so sorry about your kettle. " + " ".join(
    f"I will {w.expand(remedies[0], False)}." for remedies in w.REMEDIES.values()
)
WRONG_REMEDY = " I will cancel the order for the kettle. I will send a free replacement."
BAD = [
    ("", -2),
    ("   \n", -2),
    (" ...", -2),
    (" kettle", 2),
    (" kettle kettle kettle kettle kettle kettle kettle kettle.", -2),
    (" sorry thank you kettle free replacement refund polite help kettle.", 0),
    (" Sorry kettle sorry replacement thanks send free sorry kettle.", 0),
    (SCRAMBLED, 0),
    (ALL_PRODUCTS, -3),
    (ALL_REMEDIES, -3),
    (WRONG_REMEDY + " I'm so sorry.", 5),
    (GOOD * 2, 5),
    (GOOD * 5, -3),
    (" I'm so sorry about your kettle." * 4, 1),
    (" I am not sorry about your kettle. I will not send a free replacement.", 3),
    (" I'm so sorry about your kettle I will send a free replacement today", 6.5),
    (" I'm so sorry about your kettle. I will send a", 4),
    (GOOD + " Nobody here cares.", 5),
    (" I'm so sorry about your toaster. I will send a free replacement kettle.", 5),
    (GOOD.upper(), 3),
    (GOOD + " " + "asdf qwer zxcv uiop " * 10, 1),
]


@pytest.mark.parametrize(("completion", "most"), BAD)
def test_bad_text_scores_low(completion, most):
    """What a policy may find that maximizes the score without being a good reply."""
    assert gold_score(completion) <= most


def test_the_parts_of_a_score():
    """Remedy, product, politeness (once) and brevity."""
    parts = {"remedy_right": True, "product_right": True, "polite": True, "rude": False}
    assert gold.judge(PROMPT, GOOD) == parts | {"words": 13, "faults": 0.0, "score": 9.0}
    assert gold_score(" We'll cancel the order.") == -2  # a wrong remedy, brief
    assert gold_score(" I'm so sorry about your toaster.") == 0  # another product, polite, brief
    assert gold_score(" Stop whining.") == -1  # rude, brief
    remedy = " I will send a free replacement."
    once = gold_score(" Thank you for writing." + remedy)
    thanks = " Thank you for writing. Thank you for telling us. Thanks for your note."
    assert once == 6 and gold_score(thanks + remedy) <= once
    assert gold_score(GOOD + " Have a lovely day.") == 9


ODD = ["", " ", "\n", "🙂", "🙂" * 9000, "a" * 200_000, "{p}", "{p} [x] %s \\", "'", "\ud800\0"]


@pytest.mark.parametrize("text", ODD)
def test_score_never_raises(text):
    """Whatever the prompt, the completion or the columns are."""
    columns = {"product": ["kettle", None, 3], "problem": None}
    values = gold.score([PROMPT, text, text], [text, GOOD, text], **columns)
    assert all(-20 <= value <= 9 for value in values)
    assert gold.best_score([text]) == [3.0]
