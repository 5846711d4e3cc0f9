"""benchmarks/lab.py: the estimators behind docs/lab.md."""

import itertools
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import lab


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_best_of_n_is_that_of_all_draws(n):
    score, judge = torch.randn(2, 3, 6)
    chosen = []
    for draw in itertools.combinations(range(6), n):
        draw = list(draw)
        best = score[:, draw].argmax(1, keepdim=True)
        chosen.append([x[:, draw].gather(1, best).mean().item() for x in (score, judge)])
    assert lab.best_of(n, score, judge) == pytest.approx(np.mean(chosen, 0))


def test_a_fit_finds_its_coefficients():
    d = np.linspace(0.3, 4, 20)
    found = lab.fit(np.stack([d, -d * np.log(d)], 1), list(d * (2.5 - 0.7 * np.log(d))))
    assert found == pytest.approx({"alpha": 2.5, "beta": 0.7, "explained": 1.0})
    noisy = d * (2.5 - 0.7 * np.log(d)) + 1.0  # the form has no constant
    assert lab.fit(np.stack([d, -d * np.log(d)], 1), list(noisy))["explained"] < 0.99


@pytest.mark.parametrize("seeds", [3, 5])
def test_an_interval_holds_the_mean_in_95_of_100_cases(seeds):
    draws = np.random.default_rng(1).normal(1, 0.5, (4000, seeds)).tolist()
    held = [low <= 1 <= high for low, high in map(lab.interval, draws)]
    assert 0.94 < np.mean(held) < 0.96
    assert lab.interval([0.1, 0.2, 0.3]) == pytest.approx([0.2 - 0.2484, 0.2 + 0.2484], abs=1e-4)


def test_every_experiment_has_results_of_what_it_is():
    experiments = map(lab.lab.read, lab.lab.names())
    lacking = [one.name for one in experiments if len(lab.results_of(one, lab.Args())) < 3]
    assert not lacking


def test_the_page_says_of_an_experiment_what_its_file_says():
    report = lab.json.loads((ROOT / "benchmarks/results/lab.json").read_text())
    for row in report["effects"]:
        one = lab.lab.read(row["name"])
        said = {"title": one.title} | {key.lower(): text for key, text in one.facts.items()}
        assert row | said == row


def test_a_diverged_run_is_the_worst_and_other_recipes_do_not_count(tmp_path):
    one = lab.lab.read("kl_k2")
    args = lab.Args(seeds=2, results=tmp_path)
    (tmp_path / "short").mkdir()
    for seed, recipe in ((1, one.recipe), (2, "of before"), (3, one.recipe)):
        result = {"seed": seed, "recipe": recipe, "diverged": True}
        file = tmp_path / f"short/kl_k2-seed{seed}.json"
        file.write_text(lab.json.dumps(result))
    results = lab.results_of(one, args)
    assert [*results] == [1] and lab.judged(results[1]) == -np.inf


def test_ranks_correlate_as_spearman_has_it():
    assert lab.rank_correlation([1.0, 2.0, 9.0], [0.1, 0.5, 0.6]) == pytest.approx(1)
    assert lab.rank_correlation([3.0, 1.0, 2.0, 4.0], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(0.2)
