"""The table in docs/results.md of which model fits which GPU: its formula held against a run."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from emulated_gpu import emulate

import encoding

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory
import throughput


def test_the_result_file_has_the_numbers_of_the_formula():
    """Also beside the runs, which are measured rarely."""
    result = json.loads((ROOT / "benchmarks/results/memory.json").read_text())
    assert result["largest"] == memory.largest()
    for name, run in result["runs"].items():
        assert run["predicted_gb"] == memory.needed(memory.TRIED[name], on_cpu=True) / 1e9


def test_in_parts_the_batch_size_does_not_count():
    """Keys and values of one response fit into what training needs; those of many do not."""
    works = [memory.Work(memory.SMOLLM2, batch, 8, 512, 128) for batch in (1, 8, 4096)]
    one, few, many = map(memory.needed, works)
    assert one == few < many


@pytest.mark.parametrize("mean_length", [None, 6.0])
def test_the_models_of_a_gpus_workload_are_drawn_on_it(mean_length, tmp_path, monkeypatch):
    """A billion numbers take a CPU half a minute."""
    made, save = [], throughput.saving.save_model
    monkeypatch.setattr(throughput.saving, "save_model", lambda *given: made.append(given))
    config = memory.llama(memory.MINIMAL.shape)
    with emulate():
        throughput.random_model(tmp_path, config, 4, mean_length, 16)
        for model, tokenizer, folder in made:
            assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"cuda"}
            save(model.cpu(), tokenizer, folder)
    assert encoding.load_tokenizer(str(tmp_path / "model")).eos_token_id == throughput.EOS


@pytest.mark.slow
def test_the_formula_is_near_a_measured_run():
    """Within 15%, with and without a value network, without what the libraries need."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, where the memory is read")
    libraries = memory.measured(memory.MINIMAL)
    for name in ("34M, gae", "34M, batch_mean"):
        predicted, took = memory.predicted_and_measured(name, libraries)
        assert abs(predicted / took - 1) < 0.15, (name, predicted, took)
