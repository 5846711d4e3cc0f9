"""What strangers' models, data and texts can do here: nothing but be read."""

import json
import pickle
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import (
    STAGES,
    error_line,
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

import utils

# ---------------------------------------------------------------------------------------- code that comes with a model

CODE = """
import pathlib
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel, PreTrainedTokenizerFast
pathlib.Path(MARK).touch()
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
class OddForSequenceClassification(LlamaPreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        self.model, self.score = LlamaModel(config), torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that strange code makes when it runs."""
    return tmp_path / "mark"


@pytest.fixture
def odd(base, mark, tmp_path) -> str:
    """A model whose architecture is a Python file in its folder."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "odd"))
    (folder / "odd.py").write_text(CODE.replace("MARK", repr(str(mark))))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "OddConfig"}
    names |= {
        f"AutoModelFor{kind}": f"OddFor{kind}" for kind in ("CausalLM", "SequenceClassification")
    }
    config |= {
        "model_type": "odd",
        "auto_map": {auto: f"odd.{name}" for auto, name in names.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", STAGES)
def test_a_models_code_is_not_run(refused, name, odd, mark):
    """The line names the flag that would allow it."""
    refused(name, odd, "--trust-remote-code", model=odd)
    assert not mark.exists()


def test_a_tokenizers_code_is_not_run(refused, base, odd, mark, tmp_path):
    """The model beside it may be an ordinary one."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "model"))
    shutil.copy(Path(odd) / "odd.py", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "OddTokenizer",
        "auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused("sft", str(folder), "--trust-remote-code", model=str(folder))
    assert not mark.exists()


def test_a_models_code_is_run_when_told(
    sft, reward_model, ppo, refused, odd, mark, capsys, tmp_path
):
    """All three stages take the flag and say what it allows; what they save needs it again."""
    trust = {"trust_remote_code": True}
    trained = str(sft(tmp_path / "sft", model=odd, **trust))
    assert mark.exists()
    judge = str(reward_model(tmp_path / "judge", model=trained, **trust))
    out = ppo(tmp_path / "ppo", model=trained, reward_model=judge, **trust)
    assert (
        capsys.readouterr().out.count(
            "--trust-remote-code: Python code that comes with a model is executed"
        )
        == 3
    )
    assert metrics_of(out)
    mark.unlink()
    refused("ppo", trained, "--trust-remote-code", model=trained, reward_model=judge)
    refused("ppo", judge, "--trust-remote-code", reward_model=judge)
    assert not mark.exists()


def test_trust_is_off_by_default_and_ends_with_the_run(sft, base, tmp_path):
    """A later run in the same process starts without it; --resume may add it or leave it."""
    import ppo_rlhf
    import reward_model
    import sft as sft_stage

    assert not any(module.Args.trust_remote_code for module in (ppo_rlhf, reward_model, sft_stage))
    sft(tmp_path / "out", trust_remote_code=True, save_every=1)
    assert utils.remote_code
    sft(tmp_path / "out", resume=True)
    assert not utils.remote_code


# -------------------------------------------------------------------------------------------------------------- pickles


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_read(refused, name, file, base, mark, tmp_path):
    """A folder that has no others is refused, with how to convert it."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps(Bomb(mark)))
    refused(name, str(folder), "pickle", "save_pretrained", model=str(folder))
    assert not mark.exists()


@pytest.mark.parametrize("name", STAGES)
def test_pickled_weights_beside_others_are_not_read(request, name, base, mark, tmp_path):
    """Safetensors are there, so they are what is read."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "model"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    assert metrics_of(request.getfixturevalue(name)(tmp_path / "out", model=str(folder)))
    assert not mark.exists()


def test_a_configuration_cannot_name_a_pickle(refused, base, mark, tmp_path):
    """Transformers reads the file that `transformers_weights` names, whatever its kind."""
    folder = Path(shutil.copytree(base.plain, tmp_path / "model"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "pytorch_model.bin"})
    )
    refused("sft", str(folder), model=str(folder))
    assert not mark.exists()


def test_pickled_weights_of_a_hub_id_are_not_read(capsys):
    """As transformers says it when it may not read them."""

    class Model:
        @staticmethod
        def from_pretrained(model, use_safetensors, **kwargs):
            assert use_safetensors
            raise OSError(
                f"{model} has no model.safetensors and thus cannot be loaded with `safetensors`. Please"
            )

        from_config = None

    with pytest.raises(SystemExit):
        utils.from_pretrained(Model, "somebody/something")
    assert "somebody/something: has its weights as pytorch_model.bin alone" in error_line(
        capsys.readouterr().err
    )


def test_no_stage_unpickles(sft, reward_model, ppo, monkeypatch, tmp_path):
    """Not its checkpoints either, when it goes on from one."""

    def never(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    for name, stage in (("sft", sft), ("reward_model", reward_model), ("ppo", ppo)):
        stage(tmp_path / name, save_every=1)
        stage(tmp_path / name, save_every=1, resume=True)


# --------------------------------------------------------------------------------------------------------------- paths


def test_paths_mean_what_they_mean_to_the_shell(sft, base, tmp_path):
    """Links are followed, and `link/..` is the folder above the link's target."""
    far = tmp_path / "a" / "b"
    far.mkdir(parents=True)
    shutil.copytree(base.plain, tmp_path / "a" / "model")
    rows = sft_rows()[:40]
    write_data(tmp_path / "a" / "data", rows, 4)
    (tmp_path / "link").symlink_to(far)
    (tmp_path / "model").symlink_to(tmp_path / "a" / "model")
    around = f"{tmp_path}/link/.."  # not tmp_path
    runs = [sft(tmp_path / "1", model=f"{around}/model", dataset=f"{around}/data")]
    runs.append(
        sft(tmp_path / "2", model=str(tmp_path / "model"), dataset=f"{around}/data/../data")
    )
    sft(Path(f"{around}/3"), model=base.plain, dataset=f"{around}/data")
    runs.append(tmp_path / "a" / "3")
    assert all(
        torch.equal(a, b) for run in runs for a, b in zip(*map(values, (runs[0], run)), strict=True)
    )
    assert len(metrics_of(runs[0])) == 3


def values(out: Path) -> list[torch.Tensor]:
    return list(weights_of(out).values())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_paths_of_tables_too(tmp_path, kind):
    """`datasets` reads these, and would take `link/..` for nothing."""
    from datasets import Dataset

    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    table = Dataset.from_list([{"text": f"row {i}"} for i in range(40)])
    for path in (tmp_path / "a" / f"data.{kind}", tmp_path / "a" / "folder" / f"train.{kind}"):
        path.parent.mkdir(exist_ok=True)
        getattr(table, f"to_{kind}")(str(path))
    for dataset in (f"{tmp_path}/link/../data.{kind}", f"{tmp_path}/link/../folder"):
        assert dataset.load_data(dataset, "train", [("text",)]).rows[3] == {"text": "row 3"}


def test_nothing_is_written_elsewhere(models, sft, reward_model, ppo, data, monkeypatch, tmp_path):
    """Three stages, from folders of their own, leave these and the current folder as they were."""
    here, world = tmp_path / "here", tmp_path / "world"
    for name, source in (
        ("sft", models.sft),
        ("reward_model", models.reward_model),
        ("data", Path(data.sft).parent),
    ):
        shutil.copytree(source, world / name)
    here.mkdir()
    monkeypatch.chdir(here)
    before = snapshot(world)
    read = {"sft": str(world / "sft"), "judge": str(world / "reward_model")}
    sft(
        tmp_path / "out" / "sft",
        model=read["sft"],
        dataset=str(world / "data" / "sft"),
        save_every=1,
    )
    preferences, demonstrations = (str(world / "data" / name) for name in ("preferences", "sft"))
    flags = {"dataset": preferences, "normalize_with": demonstrations, "save_every": 1}
    reward_model(tmp_path / "out" / "judge", model=read["sft"], **flags)
    flags = {"dataset": str(world / "data" / "prompts"), "save_every": 1, "save_rollouts": 1}
    ppo(tmp_path / "out" / "ppo", model=read["sft"], reward_model=read["judge"], **flags)
    assert snapshot(world) == before
    assert list(here.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"here", "world", "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sft", "judge", "ppo"}


def test_an_output_folder_that_is_a_link(sft, tmp_path):
    """The run goes where the link leads, and the link stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for flags in ({}, {"overwrite": True}):
        sft(tmp_path / "out", save_every=2, **flags)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "summary.json").is_file()


def test_overwriting_removes_links_and_not_what_they_lead_to(ppo, chain, tmp_path):
    """Whatever in the old run's folder is a link: records, checkpoints, rollouts, the model."""
    out, precious = Path(shutil.copytree(chain.ppo, tmp_path / "out")), tmp_path / "precious"
    linked = (
        "checkpoint",
        "rollouts",
        "metrics.jsonl",
        "summary.json",
        "model.safetensors",
        "tokenizer.json",
    )
    precious.mkdir()
    for name in linked:
        (out / name).rename(precious / name)
        (out / name).symlink_to(precious / name)
    (out / "dangling").symlink_to(tmp_path / "nowhere")
    before = snapshot(precious)
    ppo(out, overwrite=True, save_every=1, save_rollouts=1)
    assert snapshot(precious) == before
    assert not any((out / name).is_symlink() for name in linked)
    assert not (tmp_path / "nowhere").exists()
    assert metrics_of(out)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_checkpoint_folder_that_leads_elsewhere(request, name, tmp_path):
    """Checkpoints may be on another disk; what else there is stays, links that look like a checkpoint included."""
    stage, out, disk = request.getfixturevalue(name), tmp_path / "out", tmp_path / "disk"
    flags = {"save_every": 1} | ({"total_episodes": 32} if name == "ppo" else {})
    stage(out, **flags)
    older, newest = sorted(path.name for path in (out / "checkpoint").iterdir())
    write_jsonl(disk / "thesis" / "chapter1.txt", ["x"])
    write_jsonl(tmp_path / "other" / "state.json", ["x"])
    (disk / "000000.part").symlink_to(tmp_path / "other")
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


# --------------------------------------------------------------------------------------------------------------- texts

TEXTS = [
    "![x](http://example.org/seen.png)",
    "[click](javascript:alert(1))",
    "[click][1]\n\n[1]: http://example.org",
    "<http://example.org> <script>alert(1)</script> <img src=x onerror=alert(1)>",
    "a | b | c\n| d |",
    "`code` **bold** __bold__ *it* _it_ ~~no~~",
    "\\[x](http://example.org) \\`a\\` \\\\",
    "&lt;b&gt; &#91;x&#93;(http://example.org)",
    "# title\n- item\n1. item\n> quote\n---\n```\ncode\n```",
    "line\r\nother\rthird\u2028fourth\x0bfifth",
    "\x1b[31mred\x1b]0;title\x07\x9b2J \u202egnirts",
    "\x02klzzwxh:0000\x03",
]


class Shown(HTMLParser):
    """The tags, their attributes, and the text of every table cell in an HTML page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.cells, self.within = set(), [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag in ("td", "th"):
            self.within = True
            self.cells.append("")
        if tag == "br":
            self.cells[-1] += "\n"

    def handle_endtag(self, tag):
        self.within &= tag not in ("td", "th")

    def handle_data(self, data):
        if self.within:
            self.cells[-1] += data


@pytest.mark.parametrize("text", TEXTS)
def test_texts_in_tensorboard_are_shown_as_they_are(text):
    """No link, no image, no code: what the page shows is the text, in its own cell."""
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = Shown(
        markdown_to_safe_html(utils.markdown_table(["a", text], [["b", text], [text, "c"]]))
    )
    assert shown.tags <= {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert shown.attributes == []
    wanted = utils.visible(text)
    assert shown.cells == ["a", wanted, "b", wanted, wanted, "c"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_cannot_steer_the_terminal(capsys, text):
    """Escape sequences are spelled out in sample tables and in errors."""
    utils.print_samples("samples", ["prompt", "score"], [[text, "1.0"]])
    with pytest.raises(SystemExit):
        utils.stop(f"{text}: is wrong; mend it")
    captured = capsys.readouterr()
    assert not utils.CONTROL_CHARACTERS.search(captured.out + captured.err)
    assert captured.err.count("\n") == 1
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


def test_visible_keeps_what_is_text():
    """Line ends, tabs, accents, emoji, right-to-left letters."""
    text = "a\n\tb é 日本 🎉 שלום"
    assert utils.visible(text) == text


def test_a_tokenizer_cannot_write_to_the_terminal(refused, tmp_path):
    """An error of a library may quote what is in a model's folder."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('\x1b[2Jno\nreally') }}"
    folder = save_pair(tmp_path / "model", make_model(tokenizer), tokenizer)
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "ho"}],
    }
    refused("sft", "\\x1b[2J", dataset=write_data(tmp_path / "data", [row] * 20, 4), model=folder)


@pytest.mark.parametrize("name", ["run.lock", "args.json.part", "metrics.jsonl.part"])
def test_a_link_under_a_name_that_is_written_first(sft, name, tmp_path):
    """The lock and what is written beside its target: the link goes, what it leads to stays."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    out.mkdir()
    precious.write_text("mine")
    if name == "metrics.jsonl.part":
        sft(out, save_every=1)
    (out / name).symlink_to(precious)
    sft(out, save_every=1, resume=name == "metrics.jsonl.part")
    assert precious.read_text() == "mine"
    assert not (out / name).is_symlink()
    assert not (out / "metrics.jsonl").is_symlink()
