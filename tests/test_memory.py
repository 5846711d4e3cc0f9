"""The table in docs/results.md of which model fits which GPU: its formula held against a run."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory


@pytest.mark.slow
def test_the_formula_is_near_a_measured_run():
    """Within 15%, with and without a value network, without what the libraries need."""
    libraries = memory.measured(memory.MINIMAL)
    for name in ("29M, gae", "29M, batch_mean"):
        predicted, took = memory.predicted_and_measured(name, libraries)
        assert abs(predicted / took - 1) < 0.15, (name, predicted, took)
