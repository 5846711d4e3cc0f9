"""Reward function: VADER's compound sentiment of prompt + completion.

A rule-based score that needs no training. In: lists of prompts and completions. Out: one score a
text, from -1 (most negative) to 1 (most positive). Needs `pip install vaderSentiment`.

Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014.
"""

import functools


@functools.cache  # reading the lexicon takes far longer than scoring a sentence
def analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as e:
        what = f"vader.py needs vaderSentiment 3 ({e})"
        raise ImportError(f"{what}; run: pip install vaderSentiment") from e
    return SentimentIntensityAnalyzer()


def score(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """Compound score, in -1..1, of each prompt with its completion; other columns are not used."""
    texts = (prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
    return [analyzer().polarity_scores(text)["compound"] for text in texts]
