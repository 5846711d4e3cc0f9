"""Reward function: the length of the response, a toy."""


def length(completions: list[str], **columns) -> list[float]:
    """Characters: GPT-2 seldom ends a text within 50 tokens, so in tokens nearly all are equal."""
    return [float(len(r)) for r in completions]
