"""What strangers' models, data and texts can do here: nothing but be read."""

import html
import importlib
import json
import pickle
import re
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import (
    MODULES,
    STAGES,
    as_chat,
    make_model,
    make_tokenizer,
    metrics_of,
    prompt_rows,
    save_pair,
    sft_rows,
    snapshot,
    weights_of,
    write_data,
    write_jsonl,
)
from tensorboard.plugin_util import markdown_to_safe_html

import dataset
import utils

# ---- code that comes with a model

CODE = """
import pathlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers import PreTrainedTokenizerFast
pathlib.Path(MARK).touch()
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
    @classmethod
    def can_generate(cls):  # so transformers gives it no generation config
        return False
class OddForSequenceClassification(LlamaPreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that strange code makes when it runs."""
    return tmp_path / "mark"


def add_to(path: Path, more: dict) -> None:
    """Entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.fixture
def odd(base, mark, tmp_path) -> str:
    """A model whose architecture is a Python file in its folder."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "odd"))
    (folder / "odd.py").write_text(CODE.replace("MARK", repr(str(mark))))
    kinds = ("CausalLM", "SequenceClassification")
    names = {f"AutoModelFor{kind}": f"odd.OddFor{kind}" for kind in kinds}
    names["AutoConfig"] = "odd.OddConfig"
    add_to(folder / "config.json", {"model_type": "odd", "auto_map": names})
    return str(folder)


def test_a_tokenizers_code_is_not_run(refused, base, odd, mark, tmp_path):
    """The model beside it may be an ordinary one."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "model"))
    shutil.copy(Path(odd) / "odd.py", folder)
    names = {"AutoTokenizer": [None, "odd.OddTokenizer"]}
    config = {"tokenizer_class": "OddTokenizer", "auto_map": names}
    add_to(folder / "tokenizer_config.json", config)
    refused("sft", str(folder), "--trust-remote-code", model=str(folder))
    assert not mark.exists()


def test_a_models_code_is_run_when_told_only(sft, reward_model, ppo, refused, odd, mark, tmp_path):
    """All three stages name the flag that allows it; what they save needs it again."""
    for name in STAGES:
        refused(name, odd, "--trust-remote-code", model=odd)
    assert not mark.exists()
    trust = {"trust_remote_code": True}
    trained = str(sft(tmp_path / "sft", model=odd, **trust))
    assert mark.exists()
    judge = str(reward_model(tmp_path / "judge", model=trained, **trust))
    assert metrics_of(ppo(tmp_path / "ppo", model=trained, reward_model=judge, **trust))
    mark.unlink()
    refused("ppo", trained, "--trust-remote-code", model=trained, reward_model=judge)
    refused("ppo", judge, "--trust-remote-code", reward_model=judge)
    assert not mark.exists()


def test_trust_is_off_by_default_and_ends_with_the_run(sft, tmp_path):
    """A later run in the same process starts without it; --resume may add it or leave it."""
    modules = [importlib.import_module(name) for name in MODULES.values()]
    assert not any(module.Args.trust_remote_code for module in modules)
    sft(tmp_path / "out", trust_remote_code=True, save_every=1)
    assert utils.remote_code
    sft(tmp_path / "out", resume=True)
    assert not utils.remote_code


# ---- pickles


class Bomb(NamedTuple):
    """Runs code when it is unpickled."""

    mark: Path

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_read(
    request, refused, name, file, base, mark, monkeypatch, tmp_path
):
    """Safetensors are, where there are some; a folder without them is refused, whatever it says."""
    load, loaded = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    folder = Path(shutil.copytree(base.plain, tmp_path / "model"))
    (folder / file).write_bytes(pickle.dumps(Bomb(mark)))
    assert metrics_of(request.getfixturevalue(name)(tmp_path / "beside", model=str(folder)))
    (folder / "model.safetensors").unlink()
    refused(name, str(folder), "safetensors", model=str(folder))
    add_to(folder / "config.json", {"transformers_weights": file})
    refused(name, str(folder), model=str(folder))
    assert not loaded
    assert not mark.exists()


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_unpickles(request, name, monkeypatch, tmp_path):
    """Not its checkpoints either, when it is resumed."""
    stage = request.getfixturevalue(name)
    for what in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(what, lambda *args, **kwargs: pytest.fail("unpickled"))
    for resume in (False, True):
        stage(tmp_path / "out", save_every=1, resume=resume)


# ---- paths


@pytest.fixture
def around(tmp_path) -> str:
    """The folder `a` as `link/..`: above the link's target, and not the one that the link is in."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    return f"{tmp_path}/link/.."


def test_paths_mean_what_they_mean_to_the_shell(sft, base, around, tmp_path):
    """Links are followed, whatever the path is of."""
    shutil.copytree(base.plain, tmp_path / "a" / "model")
    write_data(tmp_path / "a" / "data", sft_rows()[:40], 4)
    (tmp_path / "model").symlink_to(tmp_path / "a" / "model")
    runs = [sft(tmp_path / "1", model=f"{around}/model", dataset=f"{around}/data")]
    sft(Path(f"{around}/2"), model=str(tmp_path / "model"), dataset=f"{around}/data/../data")
    runs.append(tmp_path / "a" / "2")
    a, b = (weights_of(run).values() for run in runs)
    assert all(map(torch.equal, a, b))
    assert len(metrics_of(runs[0])) == 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_paths_of_tables_too(around, tmp_path, kind):
    """`datasets` reads these, and would take `link/..` for nothing."""
    from datasets import Dataset

    table = Dataset.from_list([{"text": f"row {i}"} for i in range(40)])
    for name in (f"data.{kind}", f"folder/train.{kind}"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        getattr(table, f"to_{kind}")(str(tmp_path / "a" / name))
    for name in (f"{around}/data.{kind}", f"{around}/folder"):
        assert dataset.load_data(name, "train", [("text",)])[3] == {"text": "row 3"}


def test_nothing_is_written_elsewhere(models, sft, reward_model, ppo, data, monkeypatch, tmp_path):
    """Three stages, from folders of their own, leave these and the current folder as they were."""
    here, world, out = (tmp_path / name for name in ("here", "world", "out"))
    first = str(shutil.copytree(models.sft, world / "sft"))
    judge = str(shutil.copytree(models.reward_model, world / "judge"))
    texts = shutil.copytree(Path(data.sft).parent, world / "data")
    here.mkdir()
    monkeypatch.chdir(here)
    before = snapshot(world)
    flags = {"model": first, "save_every": 1}
    sft(out / "sft", dataset=f"{texts}/sft", **flags)
    both = {"dataset": f"{texts}/preferences", "normalize_with": f"{texts}/sft"}
    reward_model(out / "judge", **both, **flags)
    flags |= {"reward_model": judge, "save_rollouts": 1}
    ppo(out / "ppo", dataset=f"{texts}/prompts", **flags)
    assert snapshot(world) == before
    assert list(here.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"here", "world", "out"}
    assert {path.name for path in out.iterdir()} == {"sft", "judge", "ppo"}


def test_an_output_folder_that_is_a_link(sft, tmp_path):
    """The run goes where the link leads, and the link stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for flags in ({}, {"overwrite": True}):
        sft(tmp_path / "out", save_every=2, **flags)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "summary.json").is_file()


LINKED = "checkpoint rollouts metrics.jsonl summary.json model.safetensors tokenizer.json".split()


def test_overwriting_removes_links_and_not_what_they_lead_to(ppo, chain, tmp_path):
    """Whatever in the old run's folder is a link: records, checkpoints, rollouts, the model."""
    out, precious = Path(shutil.copytree(chain.ppo, tmp_path / "out")), tmp_path / "precious"
    precious.mkdir()
    for name in LINKED:
        (out / name).rename(precious / name)
        (out / name).symlink_to(precious / name)
    (out / "dangling").symlink_to(tmp_path / "nowhere")
    before = snapshot(precious)
    ppo(out, overwrite=True, save_every=1, save_rollouts=1)
    assert snapshot(precious) == before
    assert not any((out / name).is_symlink() for name in LINKED)
    assert not (tmp_path / "nowhere").exists()
    assert metrics_of(out)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_checkpoint_folder_that_leads_elsewhere(request, name, tmp_path):
    """Checkpoints may be on another disk, where nothing but checkpoints goes."""
    stage, out, disk = request.getfixturevalue(name), tmp_path / "out", tmp_path / "disk"
    flags = {"save_every": 1} | ({"total_episodes": 32} if name == "ppo" else {})
    stage(out, **flags)
    older, newest = sorted(path.name for path in (out / "checkpoint").iterdir())
    write_jsonl(disk / "thesis" / "chapter1.txt", ["x"])
    write_jsonl(tmp_path / "other" / "state.json", ["x"])
    (disk / f"{newest}.part").symlink_to(tmp_path / "other")
    before = snapshot(disk / "thesis")
    shutil.move(out / "checkpoint" / older, disk / older)
    shutil.rmtree(out / "checkpoint")
    (out / "checkpoint").symlink_to(disk)
    stage(out, **flags, resume=True, keep_checkpoints=1)  # from the older one
    assert {path.name for path in disk.iterdir()} == {"thesis", newest}
    assert snapshot(disk / "thesis") == before
    assert (tmp_path / "other" / "state.json").is_file()
    stage(out, **flags, overwrite=True)
    assert not (out / "checkpoint").is_symlink()
    assert {path.name for path in disk.iterdir()} == {"thesis", newest}


@pytest.mark.parametrize("name", ["run.lock", "args.json.part", "metrics.jsonl.part"])
def test_a_link_under_a_name_that_is_written_first(sft, error_of, name, tmp_path):
    """What the link leads to stays: the link is removed, or no lock is taken through it."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.write_text("mine")
    sft(out, save_every=1)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(precious)
    if name == "run.lock":
        assert "cannot be written" in error_of(sft, out, save_every=1, resume=True)
    else:
        sft(out, save_every=1, resume=True)
        assert not (out / name).is_symlink()
    assert precious.read_text() == "mine"
    assert not (out / "metrics.jsonl").is_symlink()


# ---- texts

TEXTS = [
    "![x](http://example.org/seen.png) [click](javascript:alert(1))",
    "[click][1]\n\n[1]: http://example.org",
    "<http://example.org> <script>alert(1)</script> <img src=x onerror=alert(1)></code></pre><b>",
    "a | b | c\n| d |\n|---|",
    "`code` **bold** __bold__ *it* _it_ ~~no~~ \\[x](http://example.org) \\`a\\` \\\\",
    "&lt;b&gt; &#91;x&#93;(http://example.org)",
    "# title\n- item\n1. item\n> quote\n---\n```\ncode\n```\n[x](http://example.org)",
    "\n````````\n<b>\n~~~\n<b>\n",
    "line\r\nother\rthird\u2028```\u2028fourth\x0b```\x0bfifth\r```\r<b>",
    "\x1b[31mred\x1b]0;title\x07\x9b2J \u202egnirts",
    "\x02klzzwxh:0000\x03 \x02wzxhzdk:0\x03",
]


@pytest.fixture
def logger(tmp_path):
    """A logger whose `page` is the last text that went to TensorBoard."""
    made = utils.Logger(tmp_path, SimpleNamespace(track=False), "step", 0, 1, "")
    made.board.add_text = lambda name, text, step: setattr(made, "page", text)
    yield made
    made.close()
    utils.progress = None


def letters(text: str) -> str:
    """What is left of a text without spaces and what TensorBoard puts instead of controls."""
    return re.sub(r"[\s?\x00-\x1f\x7f]", "", text)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_in_tensorboard_are_shown_as_they_are(logger, text):
    """No link, no image, no code: what the page shows is the text, in its own block."""
    result = {"prompt": text, "response": text, "score": 1.0, "judge": None}
    logger.samples(1, [result] * 2, [result] * 2, shown=0)
    page = markdown_to_safe_html(logger.page)
    assert {*re.findall("<([^/][^>]*)>", page)} == {"p", "strong", "pre", "code"}  # no attributes
    blocks = re.findall("<code>(.*?)</code>", page, re.DOTALL)
    assert [letters(html.unescape(block)) for block in blocks] == [letters(text)] * 6


@pytest.mark.parametrize("text", TEXTS)
def test_texts_cannot_steer_the_terminal(logger, capsys, text):
    """Escape sequences are spelled out in samples and in errors; captions stand above texts."""
    before = {"prompt": text, "response": f"{text}!", "score": 1.0, "judge": None}
    after = before | {"judge": 2.0}
    others = [before | {"prompt": "not shown"}]
    logger.samples(7, [before, *others], [after, *others], shown=1)
    with pytest.raises(SystemExit):
        utils.stop(f"{text}: is wrong; fix it")
    captured = capsys.readouterr()
    kinds = {unicodedata.category(c) for c in captured.out + captured.err if c not in "\n\r"}
    assert not kinds & {"Cc", "Cf", "Zl", "Zp"}
    assert captured.err.strip("\r\n").split("error: ")[1].count("\n") == 0
    assert captured.out.index("update 7") < captured.out.index("prompt\n")
    assert captured.out.index("prompt\n") < captured.out.index("before: score 1.00\n")
    assert captured.out.count("after: score 1.00, judge 2.00\n") == 1
    assert "not shown" not in captured.out
    if "\x1b" in text:
        assert "\\x1b[31mred" in captured.out
        assert "\\x1b[31mred" in captured.err


def test_a_run_on_texts_that_would_steer_the_terminal(ppo, refused, capsys, tmp_path):
    """From the data set through the samples to the terminal, and from it to an error."""
    rows = [row | {"prompt": "\x1b[2J\x1b[31m" + row["prompt"]} for row in prompt_rows()[:20]]
    ppo(tmp_path / "run", dataset=write_data(tmp_path / "data", rows, 4), eval_every=1)
    captured = capsys.readouterr()
    assert "\\x1b[2J" in captured.out
    assert "\x1b[2J" not in captured.out + captured.err
    rows = [{"\x1b[2J": "x"} for _ in rows]
    refused("ppo", "\\x1b[2J", dataset=write_data(tmp_path / "columns", rows, 4))


def test_a_tokenizer_cannot_write_to_the_terminal(refused, tmp_path):
    """An error of a library may quote what is in a model's folder."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('\x1b[2Jno\nreally') }}"
    folder = save_pair(tmp_path / "model", make_model(tokenizer), tokenizer)
    rows = [as_chat({"prompt": "hi", "completion": "ho"})] * 20
    refused("sft", "\\x1b[2J", dataset=write_data(tmp_path / "data", rows, 4), model=folder)
