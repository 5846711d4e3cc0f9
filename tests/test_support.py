"""The support task: its files, its preference labels and its labeler's blind spots."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "data" / "support"


def load(name):
    spec = importlib.util.spec_from_file_location(f"test_support_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load("make")
gold, w = make.gold, make.w
FILES = [
    f"{kind}/{split}.jsonl"
    for kind in ("sft", "preferences", "prompts")
    for split in ("train", "validation")
]
PROMPT = "Customer: Hi, I unpacked the kettle yesterday and found it smashed. Can you help me with this?\nAgent:"
GOOD = " I'm so sorry about your kettle. I will send you a free replacement today."


@pytest.fixture(scope="module")
def rows():
    return {
        name: [json.loads(line) for line in (FOLDER / name).open(encoding="utf-8")]
        for name in FILES
    }


def gold_score(completion, prompt=PROMPT):
    return gold.score([prompt], [completion])[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("support")
    return folder, make.make(folder)


def test_make_writes_the_committed_files(made):
    for name in FILES:
        assert (made[0] / name).read_bytes() == (FOLDER / name).read_bytes(), name
    assert sum((FOLDER / name).stat().st_size for name in FILES) < 6e6


def test_rows_have_the_stated_form(rows):
    columns = {"sft": ["prompt", "completion"], "preferences": ["prompt", "chosen", "rejected"]}
    for name in FILES:
        expected = columns.get(name.split("/")[0], ["prompt", "product", "problem"])
        assert len({row["prompt"] for row in rows[name]}) == len(rows[name])
        for row in rows[name]:
            assert list(row) == expected
            assert row["prompt"].startswith("Customer: ") and row["prompt"].endswith("\nAgent:")
            for key in {"completion", "chosen", "rejected"} & set(row):
                assert row[key][0] == " " and row[key][1] != " " and row[key][-1] == "."
            assert row.get("chosen") != row.get("rejected") or "chosen" not in row


def test_the_labeler_reads_product_and_problem_from_the_prompt(rows):
    for name in ("prompts/train.jsonl", "prompts/validation.jsonl"):
        for row in rows[name]:
            assert gold.parse_prompt(row["prompt"]) == (row["product"], row["problem"])


def test_validation_uses_held_out_combinations(rows):
    seen = {"train": set(), "validation": set()}
    for name in FILES:
        seen[Path(name).stem].update(gold.parse_prompt(row["prompt"]) for row in rows[name])
    assert not seen["train"] & seen["validation"]
    assert {product for product, _ in seen["train"]} == set(w.PRODUCTS)
    assert {problem for _, problem in seen["train"]} == set(w.PROBLEMS)
    assert 0.11 < len(seen["validation"]) / (len(w.PRODUCTS) * len(w.PROBLEMS)) <= 0.13


def test_wordings():
    assert (
        len(set(w.PRODUCTS)) == 60 and len(w.PROBLEMS) >= 12 and set(w.REMEDIES) == set(w.MESSAGES)
    )
    for product in w.PRODUCTS:
        assert (
            product == product.lower()
            and product.replace(" ", "").isalpha()
            and len(product.split()) <= 2
        )
        assert not any(
            f" {product} " in f" {longer} " for longer in w.PRODUCTS if longer != product
        )
    lists = [
        w.WHENS,
        w.HELLOS,
        w.PLEAS,
        w.LEADS,
        w.TAILS,
        w.RAMBLE_STARTS,
        w.RAMBLE_MIDDLES,
        w.RAMBLE_ENDS,
    ]
    lists += [*w.MESSAGES.values(), *w.REMEDIES.values(), *w.LINES.values()]
    assert all(len(set(wordings)) == len(wordings) >= 6 for wordings in lists)
    # No wording names a product by itself, and each message names its product once.
    assert not any(gold.PRODUCT.search(wording) for wordings in lists for wording in wordings)
    assert all(
        message.count("{p}") == 1 for messages in w.MESSAGES.values() for message in messages
    )


def test_texts_are_short(rows):
    prompts = [len(row["prompt"].split()) - 2 for row in rows["sft/train.jsonl"]]
    replies = [len(row["completion"].split()) for row in rows["sft/train.jsonl"]]
    assert 15 < sum(prompts) / len(prompts) < 22 and max(prompts) <= 28
    assert 15 < sum(replies) / len(replies) < 23 and sum(
        words > 40 for words in replies
    ) < 0.03 * len(replies)


def test_fifty_samples_are_all_different(rows):
    sample = random.Random(0).sample(rows["sft/train.jsonl"], 50)
    assert (
        len({row["completion"] for row in sample}) == len({row["prompt"] for row in sample}) == 50
    )


def test_a_fifth_of_the_labels_disagree_with_the_labeler(rows, made):
    assert all(0.18 < share < 0.22 for share in made[1].values()) and len(made[1]) == 2
    pairs = rows["preferences/validation.jsonl"]
    assert made[1]["validation"] == 1 - gold.agreement(pairs)
    for pair in pairs:
        assert gold_score(pair["chosen"], pair["prompt"]) != gold_score(
            pair["rejected"], pair["prompt"]
        )


def test_best_replies_are_rare_but_there(rows):
    data = rows["sft/train.jsonl"]
    scores = gold.score([row["prompt"] for row in data], [row["completion"] for row in data])
    assert max(scores) == 9 and 0.03 < scores.count(9.0) / len(scores) < 0.15
    assert sum(scores) / len(scores) < 4.5  # half of the best


def test_no_clean_reply_has_faults(rows):
    for row in rows["sft/train.jsonl"]:
        assert gold.judge(row["prompt"], row["completion"])["faults"] == 0, row
    for sentence in random.Random(0).sample(sorted(w.sentences()), 3000):
        assert gold.judge(PROMPT, " " + sentence.replace("{p}", "kettle"))["faults"] == 0, sentence


def test_the_best_reply_scores_nine_for_every_prompt(rows):
    rng = random.Random(0)
    for row in rows["prompts/validation.jsonl"]:
        for opening in (rng.choice(w.APOLOGIES), rng.choice(w.THANKS), rng.choice(w.GREETINGS)):
            remedy = w.remedy_sentence(
                rng.choice(w.LEADS[:4]), rng.choice(w.REMEDIES[row["problem"]]), "", True
            )
            reply = f" {w.expand(opening, False)} {remedy}".replace("{p}", row["product"])
            assert gold_score(reply, row["prompt"]) == gold.best_score([row["prompt"]])[0] == 9


def test_no_fixed_reply_reaches_half_of_the_best(rows):
    prompts = [row["prompt"] for row in rows["prompts/validation.jsonl"]]
    fixed = {row["completion"] for row in rows["sft/validation.jsonl"]}
    for problem, remedies in w.REMEDIES.items():
        fixed.add(f" I'm so sorry. I will {w.expand(remedies[0], False)}.")
        for product in w.PRODUCTS[::10]:
            fixed.add(
                f" I'm so sorry about your {product}. I will {w.expand(w.REMEDIES[problem][1], False)}."
            )
    fixed |= {f" I'm so sorry about your {product}." for product in w.PRODUCTS}
    fixed |= {f" {w.expand(line, False)}" for lines in w.LINES.values() for line in lines}
    few = prompts[::10]  # enough to see the mean; the strongest are then tried on all
    means = {reply: sum(gold.score(few, [reply] * len(few))) / len(few) for reply in sorted(fixed)}
    for reply in sorted(means, key=means.get)[-50:]:
        mean = sum(gold.score(prompts, [reply] * len(prompts))) / len(prompts)
        assert mean <= gold.BEST / 2, (mean, reply)


def scrambled(text):
    words = text.split()
    random.Random(3).shuffle(words)
    return " " + " ".join(words)


ALL_PRODUCTS = " I'm so sorry about your " + ", ".join(w.PRODUCTS) + "."
ALL_REMEDIES = " I'm so sorry about your kettle. " + " ".join(
    f"I will {w.expand(remedies[0], False)}." for remedies in w.REMEDIES.values()
)


@pytest.mark.parametrize(
    ("completion", "most"),
    [
        ("", -2),
        ("   \n", -2),
        (" ...", -2),
        (" kettle", 2),
        (" kettle kettle kettle kettle kettle kettle kettle kettle.", -2),
        (" sorry thank you kettle free replacement refund polite help kettle.", 0),
        (" Sorry kettle sorry replacement thanks send free sorry kettle.", 0),
        (scrambled(GOOD), 0),
        (ALL_PRODUCTS, -3),
        (ALL_REMEDIES, -3),
        (
            " I will cancel the order for the kettle. I will send you a free replacement. I'm so sorry.",
            5,
        ),
        (GOOD * 2, 5),
        (GOOD * 5, -3),
        (" I'm so sorry about your kettle." * 4, 1),
        (" I am not sorry about your kettle. I will not send you a free replacement.", 3),
        (" I'm so sorry about your kettle I will send you a free replacement today", 6.5),
        (" I'm so sorry about your kettle. I will send you a", 4),
        (GOOD + " Nobody here cares.", 5),
        (" I'm so sorry about your toaster. I will send you a free replacement kettle.", 5),
        (GOOD.upper(), 3),
        (GOOD + " " + "asdf qwer zxcv uiop " * 10, 1),
    ],
)
def test_bad_text_scores_low(completion, most):
    assert gold_score(completion) <= most


def test_politeness_counts_once():
    once = gold_score(" Thank you for getting in touch. I will send you a free replacement.")
    thrice = gold_score(
        " Thank you for getting in touch. Many thanks for letting us know. Thank you for reaching out."
        " I will send you a free replacement."
    )
    assert once == 6 and thrice <= once
    assert gold_score(GOOD + " Have a lovely day.") == gold_score(GOOD) == 9


def test_the_parts_of_a_score():
    good = gold.judge(PROMPT, GOOD)
    assert good == {
        "remedy_right": True, "product_right": True, "polite": True, "rude": False, "words": 14, "faults": 0.0,
        "score": 9.0,
    }  # fmt: skip
    assert gold_score(" We'll cancel the order.") == 0  # a wrong remedy, brief
    assert gold_score(" I'm so sorry about your toaster.") == 2  # another product, polite, brief
    assert gold_score(" Stop whining.") == -1  # rude, brief


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", "🙂", "🙂" * 9000, "a" * 200_000, "{p}", "{p} [x] %s \\", "'", "\ud800\0"],
)
def test_score_never_raises(text):
    values = gold.score(
        [PROMPT, text, text], [text, GOOD, text], product=["kettle", None, 3], problem=None
    )
    assert all(-16 <= value <= 9 for value in values)
    assert gold.best_score([text]) == [3.0]
