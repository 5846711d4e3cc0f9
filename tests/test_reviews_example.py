"""examples/reviews on a miniature table in the published format; nothing is fetched."""

import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REVIEWS = Path(__file__).resolve().parents[1] / "examples" / "reviews"
TABLE = "movieReviewSnippets_GroundTruth.txt"
NAMES = [
    f"{kind}/{split}"
    for kind in ("sft", "preferences", "prompts")
    for split in ("train", "validation")
]


def load(name):
    spec = importlib.util.spec_from_file_location(f"reviews_{name}", REVIEWS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load("prepare")


def table() -> str:
    rng = random.Random(7)
    rows = [(rng.uniform(-4, 4), f"Film number {i} is a work of some kind.") for i in range(60)]
    rows += [
        (rng.uniform(-4, 4), f"Rated twice by two panels, number {i % 10}.") for i in range(20)
    ]
    rows += [
        (2.0, "A  ''quoted''   caf\u00e9 scene &amp; little else."),
        (1.0, "Too short."),
        (1.0, "word " * 41),
    ]
    return "".join(f"{i}\t{rating:.12g}\t{text}\r\n" for i, (rating, text) in enumerate(rows, 1))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / TABLE).write_bytes(table().encode())
    return folder


def build(source, out, **flags):
    flags = {"validation_share": 0.25, "train_pairs": 50, "validation_pairs": 20} | flags
    prepare.main(prepare.Args(out=out, source=source, **flags))
    return {name: (out / f"{name}.jsonl").read_bytes() for name in NAMES}


def rows(blob):
    return [json.loads(line) for line in blob.decode("utf-8").split("\n") if line]


def refused(capsys, *args, **flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        build(*args, **flags)
    message = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and message.startswith("error: ")
        and message.count("\n") == 1
        and "; " in message
    )
    return message


def test_outputs(source, tmp_path):
    files = {
        name: rows(blob) for name, blob in build(source, tmp_path / "out", min_gap=1.5).items()
    }
    published = {line.split("\t")[2]: None for line in table().splitlines()}
    whole = {}
    for split in ("train", "validation"):
        sft = files[f"sft/{split}"]
        assert all(list(row) == ["prompt", "completion", "rating"] for row in sft)
        assert all(
            3 <= len(row["prompt"].split()) <= 5 and row["completion"].startswith(" ")
            for row in sft
        )
        assert all(
            -4 <= row["rating"] <= 4 and row["rating"] == round(row["rating"], 3) for row in sft
        )
        assert files[f"prompts/{split}"] == [{"prompt": row["prompt"]} for row in sft]
        whole[split] = {row["prompt"] + row["completion"] for row in sft}
        for pair in files[f"preferences/{split}"]:
            assert list(pair) == ["chosen", "rejected", "chosen_rating", "rejected_rating"]
            assert (
                pair["chosen_rating"] - pair["rejected_rating"] >= 1.5 - 0.001
            )  # both ratings are rounded
            assert {pair["chosen"], pair["rejected"]} <= whole[split] and pair["chosen"] != pair[
                "rejected"
            ]
    cleaned = 'A "quoted" caf\u00e9 scene & little else.'
    every = whole["train"] | whole["validation"]
    assert cleaned in every and every - {cleaned} <= set(published)
    assert len(every) == 71  # 60 + 10 rated twice + 1; the short and the long one are left out
    assert not whole["train"] & whole["validation"]
    assert len(files["preferences/train"]) == 50 and len(files["preferences/validation"]) == 20


def test_seed_decides(source, tmp_path):
    first = build(source, tmp_path / "a")
    assert build(source, tmp_path / "b") == first
    assert build(source, tmp_path / "c", seed=1) != first


def test_no_sentence_in_both_splits_whatever_the_seed(source, tmp_path):
    for seed in range(8):
        files = build(source, tmp_path / str(seed), seed=seed)
        sets = [
            {r["prompt"] + r["completion"] for r in rows(files[f"sft/{s}"])}
            for s in ("train", "validation")
        ]
        assert not sets[0] & sets[1]


def test_archive_in_archive_as_published(source, tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as t:
        t.add(source / TABLE, f"hutto_ICWSM_2014/{TABLE}")
    outer = tmp_path / "vaderSentiment-0.5.zip"
    with zipfile.ZipFile(outer, "w") as z:
        z.writestr(
            "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue()
        )
    assert build(outer, tmp_path / "a") == build(source, tmp_path / "b")


def test_refusals(source, tmp_path, capsys):
    assert "no such file" in refused(capsys, tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert TABLE in refused(capsys, tmp_path / "empty", tmp_path / "out")
    assert "--min-gap" in refused(capsys, source, tmp_path / "out", min_gap=9.0)
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    assert "bad.zip" in refused(capsys, tmp_path / "bad.zip", tmp_path / "out")
    for line in ("1\t2.0\n", "1\thigh\tA film.\n", "1\t7.5\tA film.\n"):
        (source / TABLE).write_text(line)
        assert "line 1" in refused(capsys, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_out_is_kept(source, tmp_path):
    out = tmp_path / "out"
    first = build(source, out)
    script = [
        sys.executable,
        str(REVIEWS / "prepare.py"),
        "--source",
        str(source),
        "--out",
        str(out),
        "--seed",
        "1",
    ]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.count("\n") == 1
        and done.stderr.startswith(f"error: {out}: ")
        and "--overwrite" in done.stderr
    )
    assert {name: (out / f"{name}.jsonl").read_bytes() for name in NAMES} == first
    assert build(source, out, seed=1, overwrite=True) != first


def test_vader_score():
    pytest.importorskip("vaderSentiment")
    vader = load("vader")
    good, bad = vader.score(
        ["A wonderful", "A dreadful"], [" film, I loved it.", " film, I hated it."], rating=[3, -3]
    )
    assert -1 <= bad < 0 < good <= 1
    assert vader.analyzer() is vader.analyzer()
    assert vader.score([], []) == []


def test_vader_absent_says_how_to_install(monkeypatch):
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        load("vader").score(["A"], [" film"])
