"""The hidden labeler of the support task: scores a reply to a customer between -20 and 9.

It likes replies that offer the remedy for THIS problem, name THIS product, are polite and are
brief, and takes points off for text that no careful writer would send:

    remedy   +3 the right one, -3 a wrong one or several different ones, 0 none
    product  +3 the right one, -3 any other one (even beside the right one), 0 none
    tone     +2 polite (twice earns nothing more), -2 rude (even when also polite), 0 neither
    length   +1 up to 18 words, then falling by 3/16 a word to -2 at 34 words and beyond
    faults   up to -10: garbled or unfinished sentences, repetition, an empty reply

It reads problem and product from the prompt itself, so it needs no columns beside prompt and
completion.
"""

import functools
import importlib.util
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _load(name):
    """A module of this folder by file path: gold.py works from any folder and by any import."""
    spec = importlib.util.spec_from_file_location(f"support_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


wordings = _load("wordings")
PRODUCTS, PROBLEMS = wordings.PRODUCTS, wordings.PROBLEMS

BEST = 9.0  # the best attainable score, for every prompt of the task
BRIEF_WORDS = 18  # full marks for brevity up to here
LONG_WORDS = 34  # and the lowest from here on
MAX_FAULTS = 10.0
MAX_UNKNOWN = 6.0  # the most that unknown trigrams can cost
MAX_CHARS = 4000  # nothing is read beyond: such a reply has long since lost every point for length

SLOT = "{p}"
LONGEST_FIRST = sorted(PRODUCTS, key=len, reverse=True)
PRODUCT = re.compile(r"\b(?:" + "|".join(LONGEST_FIRST) + r")\b", re.IGNORECASE)
WHEN = re.compile(r"\b(?:" + "|".join(wordings.WHENS) + r")\b", re.IGNORECASE)
TOKEN = re.compile(r"\{p\}|[A-Za-z0-9']+|[^\sA-Za-z0-9']")
ENDS = (".", "!", "?")


def _slotted(text):
    """The text with the slot for every product, and the products in their order (lower case)."""
    text = text.replace(SLOT, "{ p }")  # the slot itself is no product
    return PRODUCT.sub(SLOT, text), [found.lower() for found in PRODUCT.findall(text)]


def _split(text):
    """The text's sentences as lists of tokens, each with its final mark if it has one."""
    parts = [[]]
    for token in TOKEN.findall(text):
        parts[-1].append(token)
        if token in ENDS:
            parts.append([])
    return [part for part in parts if part]


def _trigrams(sentence):
    tokens = ["<s>", "<s>", *sentence, "</s>"]
    return zip(tokens, tokens[1:], tokens[2:], strict=False)


def _phrase(text):
    """The form in which phrases are looked for: lower-case tokens between single spaces."""
    return " ".join(token.lower() for token in TOKEN.findall(text))


def _any_of(phrases):
    """A pattern that finds any of the phrases as whole words, the longest first."""
    ordered = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    return "(?:" + "|".join(re.escape(phrase) for phrase in ordered) + ")"


@functools.cache
def _grammar():
    """The word trigrams of the desk's own sentences."""
    known = set()
    for text in wordings.sentences():
        for sentence in _split(text):
            known.update(_trigrams(sentence))
    return frozenset(known)


# An act is recognized by a whole phrase, never by a single keyword. A remedy must be promised
# ("I will ..."), so that neither "I will not ..." nor a list of remedies counts.
ACTS = {
    _phrase(wordings.stem(line)): kind for kind, lines in wordings.LINES.items() for line in lines
}
ACTS |= {_phrase(middle): "ramble" for middle in wordings.RAMBLE_MIDDLES}
REMEDIES = {
    _phrase(wordings.stem(line)): problem
    for problem, lines in wordings.REMEDIES.items()
    for line in lines
}
ACT = re.compile(rf"(?<!\S)({_any_of(ACTS)})(?!\S)")
OFFER = re.compile(rf"(?<!\S){_any_of(map(_phrase, wordings.LEADS))} ({_any_of(REMEDIES)})(?!\S)")
MESSAGES = [
    (problem, message.removesuffix(".").lower())
    for problem, lines in wordings.MESSAGES.items()
    for message in lines
]


@functools.lru_cache(maxsize=100_000)
def parse_prompt(prompt):
    """(product, problem) of a prompt, as in PRODUCTS and PROBLEMS; None for what cannot be told."""
    text, products = _slotted(prompt[:MAX_CHARS])
    text = WHEN.sub("{when}", text).lower()
    problem = next((problem for problem, message in MESSAGES if message in text), None)
    return (products[0] if products else None), problem


def judge(prompt, completion):
    """The parts of one reply's score, as a dict.

    remedy_right, product_right, polite and rude are booleans (polite and rude may both be true),
    words counts the reply's words, faults is what it loses for bad writing (0 to 10) and score the
    total (-20 to 9).
    """
    product, problem = parse_prompt(prompt)
    text, named = _slotted(completion[:MAX_CHARS])
    split = _split(text)
    flat = _phrase(text)
    words = len(re.findall(r"[\w']+", completion[:MAX_CHARS]))

    offers = [REMEDIES[phrase] for phrase in OFFER.findall(flat)]
    remedy_right = problem is not None and set(offers) == {problem}
    remedy_wrong = len(set(offers)) > 1 or (offers and problem is not None)
    remedy = 3 if remedy_right else -3 if remedy_wrong else 0

    product_right = product is not None and set(named) == {product}
    product_part = 3 if product_right else -3 if set(named) - {product} else 0

    acts = [ACTS[phrase] for phrase in ACT.findall(flat)]
    polite = any(kind in wordings.POLITE_KINDS for kind in acts)
    rude = "rude" in acts
    tone = -2 if rude else 2 if polite else 0

    over = min(max(words - BRIEF_WORDS, 0), LONG_WORDS - BRIEF_WORDS)
    brief = 1 - 3 * over / (LONG_WORDS - BRIEF_WORDS) if words else 0

    trigrams = [trigram for sentence in split for trigram in _trigrams(sentence)]
    unknown = sum(trigram not in _grammar() for trigram in trigrams)
    faults = min(0.5 * unknown, MAX_UNKNOWN)
    # the same act again, whatever its wording, and the same sentence again
    faults += len(acts) - len(set(acts)) + max(len(offers) - 1, 0)
    faults += len(split) - len({tuple(sentence) for sentence in split})
    faults += max(len(named) - 2, 0)
    faults += 2 if split and split[-1][-1] not in ENDS else 0
    faults += 0 if words else 2
    faults = min(faults, MAX_FAULTS)

    return {
        "remedy_right": remedy_right,
        "product_right": product_right,
        "polite": polite,
        "rude": rude,
        "words": words,
        "faults": float(faults),
        "score": float(remedy + product_part + tone + brief - faults),
    }


def score(prompts, completions, **columns):
    """The score of each completion for its prompt, each -20 to 9. Further columns are ignored."""
    pairs = zip(prompts, completions, strict=True)
    return [judge(prompt, completion)["score"] for prompt, completion in pairs]


def best_score(prompts):
    """The best attainable score for each prompt.

    9 where problem and product can be told from it, 3 less for each that cannot.
    """
    return [BEST - 3 * parse_prompt(prompt).count(None) for prompt in prompts]


def agreement(rows):
    """The share (0 to 1) of preference rows whose chosen reply has the higher score."""
    wins = 0
    for row in rows:
        chosen, rejected = score([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        wins += chosen > rejected
    return wins / len(rows)
