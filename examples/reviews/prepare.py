"""Build the film-review example data from the published sentence ratings.

In: the VADER paper's `movieReviewSnippets_GroundTruth.txt`, 10,605 lines of ID, rating and
sentence (tab-separated, UTF-8). A rating is the mean of 15 to 29 people (18.7 on average),
from -4 (very negative) to 4 (very positive). Without `--source` the table is taken from the
vaderSentiment 0.5 source distribution, fetched with pip.

Out: six files OUT/{sft,preferences,prompts}/{train,validation}.jsonl, one JSON object a line:
    sft          prompt (first 3 to 5 words), completion (the rest, with its leading space),
                 rating (-4..4)
    preferences  chosen, rejected (whole sentences), chosen_rating, rejected_rating
                 (-4..4; apart by --min-gap or more)
    prompts      prompt (those of sft, in the same order)

No validation sentence is in a training file. The same seed and source give the same files.

    python examples/reviews/prepare.py --out data/reviews

Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014.
"""

import html
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import tyro

TABLE = "movieReviewSnippets_GroundTruth.txt"
ARCHIVES = (".zip", ".tar.gz", ".tgz")
PIP = ["pip", "download", "--no-deps", "--no-binary", ":all:", "vaderSentiment==0.5"]
# a prompt takes up to 5 words, so a sentence of 6 still leaves a completion
MIN_WORDS, MAX_WORDS = 6, 40


@dataclass
class Args:
    out: Path
    """folder to write, made if absent"""
    source: Path | None = None
    """folder or archive that holds the ratings (none: fetch with pip)"""
    overwrite: bool = False
    """write into OUT though it exists"""
    seed: int = 0
    """seed of the split, the prompt lengths and the pairs"""
    validation_share: float = 0.1
    """share of the sentences kept for validation, between 0 and 1"""
    train_pairs: int = 6000
    """number of training preference pairs"""
    validation_pairs: int = 500
    """number of validation preference pairs"""
    min_gap: float = 1.0
    """smallest difference of ratings within a pair, in rating points (the scale is 8 wide)"""


def fail(where, what: str, fix: str):
    print(" ".join(f"error: {where}: {what}; {fix}".split()), file=sys.stderr)
    sys.exit(2)


def find_table(place: Path) -> bytes | None:
    """The ratings table in a folder, an archive, or an archive within either (as published)."""
    if place.is_file() and place.name != TABLE:
        with tempfile.TemporaryDirectory() as inside:
            if place.suffix == ".zip":
                shutil.unpack_archive(place, inside)  # never writes outside the folder
                return find_table(Path(inside))
            with tarfile.open(
                place
            ) as archive:  # each file in a folder of its own, by its last name
                for i, member in enumerate(archive):
                    if member.isfile():
                        file = Path(inside, str(i), Path(member.name).name)
                        file.parent.mkdir()
                        file.write_bytes(archive.extractfile(member).read())
            return find_table(Path(inside))
    tables = [place] if place.is_file() else sorted(place.rglob(TABLE))
    if tables:
        return tables[0].read_bytes()
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    archives = (path for path in files if path.name.endswith(ARCHIVES))
    return next((table for table in map(find_table, archives) if table is not None), None)


def read_source(source: Path) -> bytes:
    if not source.exists():
        fix = "give the downloaded ratings, or leave --source out to fetch them"
        fail(source, "no such file or folder", fix)
    try:
        table = find_table(source)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as e:
        fix = "give a folder, .zip or .tar.gz, or download it again"
        fail(source, f"cannot be read ({e})", fix)
    if table is None:
        fix = "give the folder or archive of the vaderSentiment 0.5 source distribution"
        fail(source, f"holds no {TABLE}", fix)
    return table


def download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *PIP, "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or "no message").splitlines()[-1]
            fix = f"run `{' '.join(PIP)}` where it works and pass the file with --source"
            fail("pip download", why, fix)
        return read_source(Path(folder))


def parse(table: bytes, where) -> list[tuple[str, float]]:
    """Cleaned (sentence, rating in -4..4) of every line whose sentence has 6 to 40 words."""
    try:
        lines = table.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        fail(where, f"{TABLE} is not UTF-8", "use the file as published")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            _, rating, text = line.split("\t")
            rating = float(rating)
        except ValueError:
            what = f"{TABLE} needs ID, rating, sentence with tabs between"
            fail(f"{where}: line {number}", what, "fix the line")
        if not -4 <= rating <= 4:
            fail(f"{where}: line {number}", f"rating {rating} is outside -4..4", "fix the line")
        # The published text writes a double quote as two single ones and keeps some HTML entities.
        rows.append((" ".join(html.unescape(text.replace("''", '"')).split()), rating))
    return [row for row in rows if MIN_WORDS <= len(row[0].split()) <= MAX_WORDS]


def make_sft(rows, rng) -> list[dict]:
    sft = []
    for text, rating in rows:
        words, n = text.split(" "), rng.randint(3, 5)
        prompt, completion = " ".join(words[:n]), " " + " ".join(words[n:])
        sft.append({"prompt": prompt, "completion": completion, "rating": round(rating, 3)})
    return sft


def make_pairs(rows, count: int, min_gap: float, rng) -> list[dict]:
    """`count` pairs of sentences drawn at random, the better rated one chosen.

    Fewer where such pairs are too rare.
    """
    pairs = []
    for _ in range(1000 * count):
        if len(pairs) == count:
            break
        (chosen, high), (rejected, low) = sorted(rng.sample(rows, 2), key=lambda row: -row[1])
        # Some sentences were rated twice: such a pair would set a sentence against itself.
        if high - low >= min_gap and chosen != rejected:
            pair = {"chosen": chosen, "rejected": rejected}
            pairs.append(pair | {"chosen_rating": round(high, 3), "rejected_rating": round(low, 3)})
    return pairs


def main(args: Args):
    # All is checked and built before the first write, so a failed run leaves no half-made folder.
    if args.out.exists() and not (args.overwrite and args.out.is_dir()):
        more = ", or add --overwrite" if args.out.is_dir() else ""
        fail(args.out, "exists already", f"give another --out{more}")
    fewest = min(args.train_pairs, args.validation_pairs)
    if not 0 < args.validation_share < 1 or args.min_gap <= 0 or fewest < 1:
        fail("flags", "a share, gap or number of pairs is out of range", "see --help")
    where = args.source or "vaderSentiment 0.5"
    rows = parse(download() if args.source is None else read_source(args.source), where)
    rng = random.Random(args.seed)
    rng.shuffle(rows)
    held = round(args.validation_share * len(rows))
    train = rows[: len(rows) - held]
    seen = {text for text, _ in train}
    validation = [row for row in rows[len(train) :] if row[0] not in seen]
    splits = {"train": train, "validation": validation}
    files = {}
    for split, count in ("train", args.train_pairs), ("validation", args.validation_pairs):
        if len(splits[split]) < 2:
            fix = "give the whole table or change --validation-share"
            fail(where, f"leaves fewer than 2 {split} sentences", fix)
        sft = make_sft(splits[split], rng)
        pairs = make_pairs(splits[split], count, args.min_gap, rng)
        if len(pairs) < count:
            fix = "lower --min-gap or the number of pairs"
            fail(where, f"gives too few {split} pairs {args.min_gap} apart", fix)
        prompts = [{"prompt": row["prompt"]} for row in sft]
        files |= {f"sft/{split}": sft, f"preferences/{split}": pairs, f"prompts/{split}": prompts}
    for name, records in files.items():
        path = args.out / f"{name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            path.write_text(text, encoding="utf-8", newline="\n")
        except OSError as e:
            fail(path, f"cannot be written ({e.strerror})", "give an --out that can be written")
        print(f"{path}: {len(records)} rows")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
