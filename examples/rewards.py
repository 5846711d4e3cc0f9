"""Reward functions to start from: `--reward-fn examples/rewards.py:length`.

In: prompts and completions as texts, and the data set's other columns, each by its name. Out: one
number per completion. Several are added, as they are beside a reward model, each with its weight:

    python ppo_rlhf.py --reward-model runs/reward_model \\
        --reward-fn examples/rewards.py:length examples/rewards.py:pattern \\
        --reward-weights 1 0.5 2
"""

import asyncio
import functools
import json
import os
import re
import urllib.request

TOKENS = 20  # of the best length
PATTERN = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"####|answer(?: is)?:|answer is", re.IGNORECASE)


def length(prompts, completions, completion_ids, **columns):
    """0 for a completion of TOKENS tokens, -1 for none or twice as many."""
    return [-abs(len(ids) - TOKENS) / TOKENS for ids in completion_ids]


def pattern(prompts, completions, **columns):
    """1 for a completion that is all as PATTERN says, else 0."""
    return [float(PATTERN.fullmatch(text) is not None) for text in completions]


def exact_answer(prompts, completions, answer, **columns):
    """1 for the answer in the column `answer`, else 0.

    It stands after the last `####`, as in GSM8K, `answer:` or `answer is`, or is all of a text.
    """

    def final(text):
        answer = ANSWER.split(str(text))[-1].strip().rstrip(".").casefold()
        return re.sub(r"(?<=\d),(?=\d{3})", "", answer)  # 1,000 is 1000

    pairs = zip(completions, answer, strict=True)
    return [float(final(text) == final(wanted)) for text, wanted in pairs]


def valid_json(prompts, completions, **columns):
    """1 for a completion that is JSON and nothing else, else 0."""

    def refuse(name):
        raise ValueError(f"JSON has no {name}")

    def valid(text):
        try:
            json.loads(text, parse_constant=refuse)  # NaN, Infinity
            return True
        except (ValueError, RecursionError):
            return False

    return [float(valid(text)) for text in completions]


@functools.cache  # reading the lexicon takes far longer than scoring a sentence
def analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        what = f"sentiment needs vaderSentiment 3 ({error}); run: pip install vaderSentiment"
        raise ImportError(what) from error
    return SentimentIntensityAnalyzer()


def sentiment(prompts, completions, **columns):
    """From -1 for the most negative to 1 for the most positive, by VADER's rules."""
    return [analyzer().polarity_scores(text)["compound"] for text in completions]


async def http_judge(prompts, completions, **columns):
    """What a service says of each completion, min(32, cores + 4) requests at a time.

    `{"prompt": ..., "completion": ...}` is posted to the address in the environment variable
    JUDGE_URL, which answers `{"score": 0.5}`. An error or a minute of silence stops the run.
    """
    if not (url := os.environ.get("JUDGE_URL")):
        raise ValueError("JUDGE_URL is not set; export JUDGE_URL=http://...")

    def ask(prompt, completion):
        body = json.dumps({"prompt": prompt, "completion": completion}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["score"]

    pairs = zip(prompts, completions, strict=True)
    return await asyncio.gather(*(asyncio.to_thread(ask, *pair) for pair in pairs))
