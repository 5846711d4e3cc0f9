"""The lab: each experiment fits the code as it is, and its first update runs."""

import importlib
import re
import sys

import pytest
import tyro

from conftest import ROOT, load_script

lab = load_script("experiments/run.py")
EXPERIMENTS = [lab.read(name) for name in lab.names()]
HELPERS = {"dataset.py", "distributed.py", "generate.py", "lora.py", "utils.py"}


def hunks(diff: str) -> list[tuple[str, list[str]]]:
    """The changed file and the lines of each hunk, with their first character."""
    found, file = [], None
    for line in diff.splitlines():
        if line.startswith("--- a/"):
            file = line.removeprefix("--- a/").split("\t")[0]
        elif line.startswith("@@"):
            found.append((file, []))
        elif not line.startswith("+++"):
            found[-1][1].append(line)
    return found
