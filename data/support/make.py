"""Writes the support task: python data/support/make.py [--out DIR] (default: this folder).

Always the same bytes.
"""

import argparse
import importlib.util
import json
import math
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("support_gold", HERE / "gold.py")
gold = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gold)
w = gold.wordings

SEED = 1
HELD_OUT = 0.2  # share of the product x problem combinations that only validation prompts use
SIZES = {
    "sft": {"train": 6200, "validation": 400},
    "preferences": {"train": 20000, "validation": 1500},
    "prompts": {"train": 2500, "validation": 400},
}
TEMPERATURE = 1.5  # of the Bradley-Terry labels; one in sixteen then disagrees with the labeler

# What the untrained desk writes. Some of its agents take care and some do not. In most of the pairs
# to compare the replies are alike but for one part, which one of them has right and one wrong.
CAREFUL = 0.29  # share of the replies by agents who take care
ALIKE = 0.85  # share of the pairs that differ in one part alone
DIFFERENCE = (("product", 0.5), ("remedy", 0.42), ("tone", 0.05), ("ramble", 0.03))
TONES = {
    "careful": (("polite", 0.32), ("curt", 0.56), ("rude", 0.12)),
    "careless": (("polite", 0.15), ("curt", 0.35), ("rude", 0.5)),
    "right": (("polite", 1.0),),
    "wrong": (("curt", 0.5), ("rude", 0.5)),
}
REMEDY = {
    "careful": (("right", 0.96), ("wrong", 0.01), ("none", 0.03)),
    "careless": (("right", 0.15), ("wrong", 0.03), ("none", 0.82)),
    "right": (("right", 1.0),),
    "wrong": (("wrong", 0.8), ("none", 0.2)),
}
PRODUCT = {
    "careful": (("right", 0.96), ("other", 0.01), ("none", 0.03)),
    "careless": (("right", 0.3), ("other", 0.03), ("none", 0.67)),
    "right": (("right", 1.0),),
    "wrong": (("other", 0.8), ("none", 0.2)),
}
RAMBLE = {"careful": 0.04, "careless": 0.3, "right": 0.0, "wrong": 1.0}


def weighted(rng, table):
    """A key of ((key, probability), ...)."""
    draw = rng.random()
    for key, probability in table:
        draw -= probability
        if draw < 0:
            return key
    return table[-1][0]  # the probabilities may sum to a hair less than one


def other(rng, items, item):
    """One of the items that is not this one."""
    return rng.choice([candidate for candidate in items if candidate != item])


def combinations():
    """{"train": [(product, problem), ...], "validation": [...]}: disjoint, sorted."""
    pairs = [(product, problem) for product in sorted(w.PRODUCTS) for problem in sorted(w.PROBLEMS)]
    rng = random.Random(SEED)
    order = sorted(pairs, key=lambda pair: rng.random())
    held = round(HELD_OUT * len(pairs))
    return {"validation": sorted(order[:held]), "train": sorted(order[held:])}


def make_prompt(rng, product, problem):
    """A customer's message of one or two sentences, as a prompt."""
    text = rng.choice(w.MESSAGES[problem]).replace("{p}", product)
    text = text.replace("{when}", rng.choice(w.WHENS))
    if rng.random() < 0.25:
        first = text if text.startswith("I ") else text[0].lower() + text[1:]
        text = f"{rng.choice(w.HELLOS)}, {first}"
    if rng.random() < 0.4:
        text += " " + rng.choice(w.PLEAS)
    return f"Customer: {text}\nAgent:"


def draw_part(rng, part, agent, product, problem):
    """What an agent, careful or careless, writes for one part of a reply."""
    if part == "tone":  # the kind of opening and its words, the closing
        tone = weighted(rng, TONES[agent])
        polite = rng.choice(("apology", "thanks", "greeting", "apology"))
        kind = polite if tone == "polite" else tone
        return kind, rng.choice(w.LINES[kind]), rng.choice(w.CLOSINGS)
    if part == "remedy":  # whether one is offered; its phrase, or a sentence that stalls, or None
        remedy = weighted(rng, REMEDY[agent])
        if remedy == "none":
            return False, rng.choice(w.STALLS) if rng.random() < 0.6 else None
        key = problem if remedy == "right" else other(rng, w.PROBLEMS, problem)
        return True, rng.choice(w.REMEDIES[key])
    if part == "product":
        mention = weighted(rng, PRODUCT[agent])
        return {"right": product, "other": other(rng, w.PRODUCTS, product), "none": None}[mention]
    if part == "ramble":
        if rng.random() >= RAMBLE[agent]:
            return None
        start, middle = rng.choice(w.RAMBLE_STARTS), rng.choice(w.RAMBLE_MIDDLES)
        return f"{start} {middle}{rng.choice(w.RAMBLE_ENDS)}"
    if part == "promise":  # what stands before and after a remedy
        return rng.choice(w.LEADS), rng.choice(w.TAILS)
    # layout: which parts are there, where product and ramble stand
    return [rng.random() for _ in range(4)]


PARTS = ("tone", "remedy", "product", "ramble", "promise", "layout")


def draw_reply(rng, product, problem):
    """The parts of a reply by one agent."""
    agent = "careful" if rng.random() < CAREFUL else "careless"
    return {part: draw_part(rng, part, agent, product, problem) for part in PARTS}


def write(parts):
    """A reply from its parts, with one leading space."""
    kind, line, closing_line = parts["tone"]
    offered, phrase = parts["remedy"]
    lead, tail = parts["promise"]
    named, ramble, layout = parts["product"], parts["ramble"], parts["layout"]
    polite = kind not in ("curt", "rude")
    body = phrase is not None
    # A polite reply is so by its opening, its closing or both.
    opening = kind == "rude" or not body or layout[0] < 0.75
    closing = polite and (not opening or layout[1] < 0.15)
    # The product is named in the opening or in the body, now and then in both.
    in_opening = named is not None and opening and (not body or layout[2] < 0.55)
    in_body = named is not None and body and (not in_opening or layout[2] < 0.1)

    sentences = []
    if opening:
        sentences.append(w.expand(line, in_opening))
    if body and not offered:
        sentences.append(w.expand(phrase, in_body))
    elif body:  # a rambling reply is long enough without a tail
        sentences.append(w.remedy_sentence(lead, phrase, "" if ramble else tail, in_body))
    if ramble:
        sentences.insert(1 + int(layout[3] * len(sentences)), ramble)
    if closing and (len(sentences) < 3 or not opening):
        sentences.append(closing_line)
    return " " + " ".join(sentences).replace("{p}", named or "")


def make_pair(rng, prompt, product, problem):
    """Two replies with different scores, labelled by Bradley-Terry: a preference row."""
    while True:
        a = b = draw_reply(rng, product, problem)
        if rng.random() < ALIKE:
            part = weighted(rng, DIFFERENCE)
            a = a | {part: draw_part(rng, part, "right", product, problem)}
            b = b | {part: draw_part(rng, part, "wrong", product, problem)}
        else:
            b = draw_reply(rng, product, problem)
        a, b = write(a), write(b)
        score_a, score_b = gold.score([prompt, prompt], [a, b])
        if score_a != score_b:
            break
    if rng.random() >= 1 / (1 + math.exp((score_b - score_a) / TEMPERATURE)):
        a, b = b, a
    return {"prompt": prompt, "chosen": a, "rejected": b}


def make_rows(kind, split):
    """The rows of one file: kind is sft, preferences or prompts."""
    rng = random.Random(f"{SEED} {kind} {split}")
    pairs = combinations()[split]
    rows, seen = [], set()
    while len(rows) < SIZES[kind][split]:
        product, problem = rng.choice(pairs)
        prompt = make_prompt(rng, product, problem)
        if kind == "prompts" and prompt in seen:
            continue
        seen.add(prompt)
        if kind == "sft":
            rows.append({"prompt": prompt, "completion": write(draw_reply(rng, product, problem))})
        elif kind == "preferences":
            rows.append(make_pair(rng, prompt, product, problem))
        else:
            rows.append({"prompt": prompt, "product": product, "problem": problem})
    return rows


def make(out):
    """Writes every file under the folder `out`.

    Returns the share of the preference labels that disagree with the labeler (0 to 1), by split.
    """
    disagree = {}
    for kind in sorted(SIZES):
        for split in sorted(SIZES[kind]):
            rows = make_rows(kind, split)
            if kind == "preferences":
                disagree[split] = 1 - gold.agreement(rows)
            path = Path(out) / kind / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return disagree


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=HERE, help="the folder to write to")
    disagree = make(parser.parse_args().out)
    for split in sorted(disagree):
        print(f"preferences/{split}: {disagree[split]:.1%} of the labels disagree with the labeler")
    ceiling = 1 - disagree["validation"]
    print(f"ceiling: a perfect judge agrees with {ceiling:.1%} of the validation labels")
