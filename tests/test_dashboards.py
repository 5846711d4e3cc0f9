"""What a run shows: TensorBoard's pages, Weights & Biases, the model card, `--help`."""

import importlib
import inspect
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import tyro
from conftest import MODULES, args_of, metrics_of, rollouts_of, samples_of, summary_of
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

import card
import distributed
import sft as sft_stage
import utils

FLAGS = {"eval_every": 2, "save_rollouts": 2, "save_every": 2, "total_episodes": 32}
HEAD = {"library_name": "transformers", "tags": ["rlhf", "ppo-rlhf"]}


@pytest.fixture(scope="module")
def trained(ppo, models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dashboards") / "`ppo`"
    return ppo(out, reward_model=(str(models.reward_model),), **FLAGS)


def board_of(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out), size_guidance={"histograms": 0}).Reload()


def test_tensorboards_pages_show_ppos_metrics(trained, models):
    """By the patterns of each chart, matched as TensorBoard does."""
    config, board, layout, shown = "custom_scalars__config__", board_of(trained), Layout(), {}
    layout.ParseFromString(board.Tensors(config)[0].tensor_proto.string_val[0])
    for page in layout.category:
        patterns = [pattern for chart in page.chart for pattern in chart.multiline.tag]
        found = [{x for x in board.Tags()["scalars"] if re.match(p, x)} for p in patterns]
        assert all(found)
        shown[page.title] = set.union(*found)
    reward = {"objective/scores", "objective/rlhf_reward", "objective/kl"}
    reward |= {"eval/score", "eval/kl", "eval/win_rate"}  # there is no judge
    health = {"policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio", "policy/approxkl_avg"}
    health |= {"val/explained_variance", "policy/entropy_avg", "response/eos_rate", "grad_norm"}
    assert shown == {"reward and KL": reward, "PPO health": health}
    assert config not in board_of(models.sft).Tags()["tensors"]


def test_histograms_are_of_the_real_tokens(trained):
    """Every --eval-every updates: as many numbers, of the same range and sum."""
    board, rollouts = board_of(trained), rollouts_of(trained)
    for i, (update, rollout) in enumerate(zip((2, 4), rollouts, strict=True)):
        real = {"scores": rollout.a["scores"], "advantages": rollout.a["advantages"][rollout.real]}
        for name, x in real.items():
            made = board.Histograms(name)[i].histogram_value
            expected = pytest.approx([x.size, x.min(), x.max(), x.sum()], rel=1e-4, abs=1e-4)
            assert [made.num, made.min, made.max, made.sum] == expected
        event, ratio = board.Histograms("ratios")[i], metrics_of(trained)[update - 1]["val/ratio"]
        made, last = event.histogram_value, pytest.approx(2 * ratio - 1, rel=1e-5)  # of two passes
        assert (event.step, made.num) == (update, rollout.real.sum())
        assert made.sum / made.num == last


def test_other_processes_write_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    logger = utils.Logger(tmp_path, None, "update", 0, 1, "")
    logger.to_tensorboard(1, {"scores": torch.ones(3)})
    logger.close()
    utils.progress = None
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_and_biases_gets_the_same(ppo, models, monkeypatch, tmp_path):
    """Without a connection: the names of all metrics and histograms, samples as tables."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = ppo(tmp_path, reward_model=(str(models.reward_model),), track=True, **FLAGS)
    wandb.tensorboard.unpatch()
    log = next(out.glob("wandb/latest-run/*.wandb")).read_bytes()
    assert {name for name in metrics_of(out)[1] if name.encode() not in log} == set()
    kept = re.findall(rb'(\w+).._type..."histogram"', log, re.S)  # bytes of tags and lengths
    assert {*kept} == {b"scores", b"advantages", b"ratios"}
    table = json.loads(next(out.glob("wandb/latest-run/files/media/table/samples_1_*")).read_text())
    rows = [[s["prompt"], s["reference"].strip(), s["policy"].strip()] for s in samples_of(out)]
    assert table == {"columns": ["prompt", "before", "after"], "data": rows}


def blocks_of(page: str) -> list[str]:
    return [block for _, block in re.findall("^(`{3,})[a-z]*\n(.*?)\n\\1$", page, re.S | re.M)]


def test_cards_say_what_the_model_is(trained, models, monkeypatch):
    """Flags that differ, the summary, code that loads the model; none in checkpoints."""
    for number, out in enumerate((models.sft, models.reward_model, trained), 1):
        page, given = ModelCard.load(out / "README.md"), args_of(out)
        assert (page.data.to_dict(), page.text.count(f"# Stage {number} of RLHF: ")) == (HEAD, 1)
        code, flags, summary = blocks_of(page.text)
        usual = importlib.import_module(given.pop("stage")).Args()
        usual = json.loads(json.dumps(asdict(usual))) | {"model": None, "dataset": None}
        assert json.loads(flags) == {k: v for k, v in given.items() if v != usual[k]}
        assert json.loads(summary) == summary_of(out)
        monkeypatch.chdir(out)
        exec(code, loaded := {})
        assert hasattr(loaded["model"], "score") == (out == models.reward_model)
    assert not list(trained.glob("checkpoint/*/README.md"))


def test_a_card_names_the_hubs_model_and_no_flag_breaks_it(tmp_path):
    """Also what an earlier stage began with, as its card says; never a folder."""
    given = [("tiny", None), (tmp_path, None), ("a/b-135M", "a/b-135M"), (tmp_path, "a/b-135M")]
    texts = ["```\n---\nx: [\n```", "<b>\x1b[31m\udcff", "---\nb: 1", "`", ""]
    for (start, base), text in zip([*given, ("1e5", "1e5")], texts, strict=True):
        args = sft_stage.Args(model=str(start), dataset=(text,))
        page = ModelCard(made := card.model_card(args, object(), {}))
        assert page.data.to_dict() == HEAD | ({"base_model": base} if base else {})
        assert json.loads(blocks_of(page.text)[1])["dataset"] == [text]
        (tmp_path / "README.md").write_text(made)
    (tmp_path / "README.md").write_bytes(b"---\nbase_model: some/model\n---\n\xff")
    assert card.hub_model(str(tmp_path)) is None


def test_a_run_writes_its_card_again(sft, tmp_path):
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        out = sft(tmp_path / "out", save_every=8, **flags)
        assert "# Stage 1" in (out / "README.md").read_text()
        (out / "README.md").write_text("old")


@pytest.mark.parametrize("name", MODULES.values())
def test_help_is_in_order_and_fits_80_columns(name, monkeypatch, capsys):
    """Flags as in the file, by section; the text of each on two lines, its default on one."""
    monkeypatch.setenv("COLUMNS", "80")
    args = importlib.import_module(name).Args
    ppo = ["PPO"] if name == "ppo_rlhf" else []
    sections = ["model", "data", "optimization", *ppo, "evaluation", "output"]
    assert re.findall("# ---- (.*)", inspect.getsource(args)) == sections
    with pytest.raises(SystemExit):
        tyro.cli(args, prog=name, args=["--help"])
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    flags = re.findall(r"^. --(\S+?),? (.*?)(?=^. --|^╰|\Z)", page, re.S | re.M)
    assert [x.replace("-", "_") for x, _ in flags] == [field.name for field in fields(args)]
    texts = [text.strip().splitlines() for _, text in flags]
    assert all(len(lines) <= 3 and "(default:" in lines[-1] for lines in texts)
