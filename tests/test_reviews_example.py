"""examples/reviews on a miniature table in the published format; nothing is fetched."""

import importlib.util
import io
import json
import random
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, command

REVIEWS = ROOT / "examples" / "reviews"
TABLE = "movieReviewSnippets_GroundTruth.txt"
SPLITS = ("train", "validation")
NAMES = [f"{kind}/{split}" for kind in ("sft", "preferences", "prompts") for split in SPLITS]


def load(name):
    spec = importlib.util.spec_from_file_location(f"reviews_{name}", REVIEWS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load("prepare")


def table() -> str:
    """Sixty sentences, ten rated twice, and three that need cleaning or are left out."""
    rng = random.Random(7)
    texts = [f"Film number {i} is a work of some kind." for i in range(60)]
    texts += [f"Rated twice by two panels, number {i % 10}." for i in range(20)]
    rows = [(rng.uniform(-4, 4), text) for text in texts]
    rows += [(2.0, "A  ''quoted''   caf\u00e9 scene &amp; little else.")]
    rows += [(1.0, "Too short."), (1.0, "word " * 41)]
    return "".join(f"{i}\t{rating:.12g}\t{text}\r\n" for i, (rating, text) in enumerate(rows, 1))


@pytest.fixture
def source(tmp_path):
    """A folder with the table."""
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


def sentences(files, split):
    return {row["prompt"] + row["completion"] for row in rows(files[f"sft/{split}"])}


def test_outputs(source, tmp_path):
    """Columns, ratings and gaps; every sentence is the published one and in one split only."""
    built = build(source, tmp_path / "out", min_gap=1.5)
    files = {name: rows(blob) for name, blob in built.items()}
    published = {line.split("\t")[2] for line in table().splitlines()}
    for split in SPLITS:
        for row in files[f"sft/{split}"]:
            assert list(row) == ["prompt", "completion", "rating"]
            assert 3 <= len(row["prompt"].split()) <= 5
            assert row["completion"].startswith(" ")
            assert -4 <= row["rating"] <= 4
            assert row["rating"] == round(row["rating"], 3)
        prompts = [{"prompt": row["prompt"]} for row in files[f"sft/{split}"]]
        assert files[f"prompts/{split}"] == prompts
        for pair in files[f"preferences/{split}"]:
            assert list(pair) == ["chosen", "rejected", "chosen_rating", "rejected_rating"]
            gap = pair["chosen_rating"] - pair["rejected_rating"]
            assert gap >= 1.5 - 0.001  # both ratings are rounded
            assert {pair["chosen"], pair["rejected"]} <= sentences(built, split)
            assert pair["chosen"] != pair["rejected"]
    cleaned = 'A "quoted" caf\u00e9 scene & little else.'
    every = sentences(built, "train") | sentences(built, "validation")
    assert cleaned in every
    assert every - {cleaned} <= published
    assert len(every) == 71  # 60 + 10 rated twice + 1; the short and the long one are left out
    assert [len(files[f"preferences/{split}"]) for split in SPLITS] == [50, 20]


def test_the_seed_decides(source, tmp_path):
    """The same files for the same seed; for no seed is a sentence in both splits."""
    first = build(source, tmp_path / "a")
    assert build(source, tmp_path / "b") == first
    for seed in range(1, 8):
        files = build(source, tmp_path / str(seed), seed=seed)
        assert files != first
        assert not sentences(files, "train") & sentences(files, "validation")


def test_an_archive_in_an_archive_as_published(source, tmp_path):
    """What the table comes in gives the same files as the table."""
    inner, outer = io.BytesIO(), tmp_path / "vaderSentiment-0.5.zip"
    with tarfile.open(fileobj=inner, mode="w:gz") as t:
        t.add(source / TABLE, f"hutto_ICWSM_2014/{TABLE}")
    name = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    with zipfile.ZipFile(outer, "w") as z:
        z.writestr(name, inner.getvalue())
    assert build(outer, tmp_path / "a") == build(source, tmp_path / "b")


def test_refusals(source, tmp_path, error_of):
    """A missing or broken source and a flag that leaves no pair: one line, nothing written."""
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    assert "no such file" in error_of(build, tmp_path / "absent", out)
    assert TABLE in error_of(build, tmp_path / "empty", out)
    assert "bad.zip" in error_of(build, tmp_path / "bad.zip", out)
    assert "--min-gap" in error_of(build, source, out, min_gap=9.0)
    for line in ("1\t2.0\n", "1\thigh\tA film.\n", "1\t7.5\tA film.\n"):
        (source / TABLE).write_text(line)
        assert "line 1" in error_of(build, source, out)
    assert not out.exists()


def test_what_is_there_stays(source, tmp_path):
    """Unless --overwrite is given."""
    out = tmp_path / "out"
    first = build(source, out)
    flags = ["--source", str(source), "--out", str(out), "--seed", "1"]
    done = command(str(REVIEWS / "prepare.py"), *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {out}: ")
    assert "--overwrite" in done.stderr
    assert {name: (out / f"{name}.jsonl").read_bytes() for name in NAMES} == first
    assert build(source, out, seed=1, overwrite=True) != first


def test_vader_scores_what_is_liked_above_what_is_not():
    """The judge is made once, and takes the columns of the data."""
    pytest.importorskip("vaderSentiment")
    vader = load("vader")
    completions = [" film, I loved it.", " film, I hated it."]
    good, bad = vader.score(["A wonderful", "A dreadful"], completions, rating=[3, -3])
    assert -1 <= bad < 0 < good <= 1
    assert vader.analyzer() is vader.analyzer()
    assert vader.score([], []) == []


def test_without_vader_the_error_says_how_to_install_it(monkeypatch):
    """It is no requirement of the stages."""
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    with pytest.raises(ImportError, match="pip install vaderSentiment"):
        load("vader").score(["A"], [" film"])
