"""report.py: what stands on the page, that it fits, and, in a browser, that it works."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import metrics_of, samples_of, summary_of, write_jsonl
from safetensors.numpy import load_file, save_file

import encoding
import report
import utils

EVIL = "<script>alert(1)</script></script><!-- <img src=x onerror=alert(2)>\u2028&amp;"
CHROMIUM = shutil.which("chromium")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def page_of(*folders: Path, out: Path | None = None) -> str:
    report.main(report.Args(folders=folders, out=out))
    return (out or folders[0] / "report.html").read_text(encoding="utf-8")


def own(page: str) -> str:
    """The page without Plotly's script."""
    return page.replace(report.get_plotlyjs(), "")


def charts_of(page: str) -> list[dict]:
    return json.loads(re.search(r"id=data>(.*?)</script>", page, re.S)[1])


def shown(page: str, metric: str) -> dict:
    names = re.findall(r"<h3>(.*?)</h3>", own(page))
    return charts_of(page)[names.index(metric)]


def make_run(folder: Path, rows: list, samples: list | None = None, **summary) -> Path:
    """A run's records without its model."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text('{"stage": "ppo_rlhf"}')
    write_jsonl(folder / "metrics.jsonl", rows)
    if samples is not None:
        write_jsonl(folder / "samples.jsonl", samples)
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def sample(prompt: str, before: float = 0.0, after: float = 0.0, **judges) -> dict:
    texts = {"prompt": prompt, "reference": "old", "policy": "new"}
    return texts | {"reference_score": before, "policy_score": after} | judges


def rendered(page: str, folder: Path, script: str) -> str:
    """The page's elements after `script` ran in it."""
    file = folder / "shown.html"
    file.write_text(f"{page}<script>{script}</script>", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder}/chromium"]
    command += ["--virtual-time-budget=5000", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return own(result.stdout)


# ---- the file


def test_all_stages_side_by_side(chain, tmp_path):
    """A chart of every metric with its meaning, evaluations from the reference to the end."""
    page = page_of(chain.sft, chain.reward_model, chain.ppo, out=tmp_path / "page.html")
    for stage, out in vars(chain).items():
        assert own(page).count(f"<h2>{'ppo_rlhf' if stage == 'ppo' else stage}</h2>") == 1
        names = {name for row in metrics_of(out) for name in row}
        for name in names - {"update", "step", "episode"}:
            assert f"<h3>{name}</h3>" in own(page)
    kl = shown(page, "objective/kl")["traces"]
    assert kl[0]["y"] == [row["objective/kl"] for row in metrics_of(chain.ppo)]
    score, final = shown(page, "eval/score")["traces"][0], summary_of(chain.ppo)["eval"]
    assert [score["x"][i] for i in (0, -1)] == [0, 2]
    expected = [final[who]["score"] for who in ("reference", "policy")]
    assert [score["y"][i] for i in (0, -1)] == pytest.approx(expected, rel=1e-3)
    assert shown(page, "policy/clipfrac_avg")["band"] == [0, 0.3]
    assert "share of tokens whose policy loss is the clipped one" in own(page)
    for text, count in (("the policy's learning rate", 1), ("real tokens trained on", 2)):
        assert html.unescape(own(page)).count(text) == count  # as the stage has it
    assert own(page).count("<article>") == len(samples_of(chain.ppo))


def test_a_rollout_shows_each_token_and_its_numbers(chain, tmp_path):
    page = page_of(chain.ppo, out=tmp_path / "page.html")
    rollouts = [load_file(path) for path in sorted((chain.ppo / "rollouts").iterdir())]
    tokens = re.findall(r'<i title="(.*?)">(.*?)</i>', page, re.S)
    assert len(tokens) == sum(t["response_mask"].sum() for t in rollouts)
    assert page.count(f": 8 of {len(rollouts[-1]['scores'])} episodes, ") == len(rollouts)
    last, numbers = rollouts[-1], dict(line.split() for line in tokens[0][0].split("\n"))
    kl = last["logprobs"][0, 0] - last["ref_logprobs"][0, 0]
    assert float(numbers["kl"]) == pytest.approx(kl, rel=0.01, abs=1e-6)
    assert float(numbers["advantages"]) == pytest.approx(last["advantages"][0, 0], rel=0.01)
    tokenizer = encoding.load_tokenizer(str(chain.ppo))
    ids = last["response_ids"][0][last["response_mask"][0] == 1]
    text = "".join(piece for _, piece in tokens[: len(ids)])
    assert html.unescape(text) == utils.visible(tokenizer.decode(ids)).replace("\n", "⏎\n")


def test_characters_of_several_tokens_are_shown(chain, tmp_path):
    """With the last of them; what is no character, at the end, as it is decoded."""
    run = shutil.copytree(chain.ppo, tmp_path / "run")
    tokenizer = encoding.load_tokenizer(str(run))
    ids = tokenizer(" é 👍")["input_ids"]
    ids.append(ids[-2])
    path = sorted((run / "rollouts").iterdir())[-1]
    tensors = load_file(path)
    tensors["response_ids"][0, : len(ids)] = ids
    tensors["response_mask"][0] = np.arange(tensors["response_mask"].shape[1]) < len(ids)
    save_file(tensors, path)
    tokens = re.findall(r'<i title=".*?">(.*?)</i>', page_of(run), re.S)[: len(ids)]
    assert "".join(tokens) == " é 👍\ufffd" and "" in tokens


def test_several_runs_share_charts_and_big_ones_fit(tmp_path):
    """10,000 updates keep their extremes; samples are cut to what fits; the page says so."""
    rows = [{"update": n, "objective/scores": n % 7, "loss": 0.1 * n} for n in range(1, 10_001)]
    rows[5000]["objective/scores"], rows[7000]["objective/scores"] = 99, -99
    rows[0]["loss"] = float("nan")
    samples = [sample("x" * 20_000, 0, n / 10) for n in range(400)]
    make_run(tmp_path / "runs" / "a", rows, samples)
    make_run(tmp_path / "runs" / "b", rows[:3])
    page = page_of(tmp_path / "runs")
    assert len(page.encode()) < 6e6
    long, short = shown(page, "objective/scores")["traces"]
    assert (long["name"], short["name"], len(short["x"])) == ("a", "b", 3)
    assert len(long["x"]) <= 1010 and (min(long["y"]), max(long["y"])) == (-99, 99)
    assert shown(page, "loss")["traces"][1]["y"][0] is None
    assert re.search(r"a: ppo_rlhf, about \d+ of 10000 points", page)
    kept = own(page).count("<article>")
    assert f"{kept} of 400, most changed first" in page and 10 < kept < 200


def test_the_most_changed_come_first_by_judge_else_by_score(tmp_path):
    judged = [sample(f"p{n}", 0, -n, reference_judge=0, policy_judge=n % 3) for n in range(3)]
    page = page_of(make_run(tmp_path / "a", [{"update": 1}], judged))
    assert re.findall(r"<article><b>(\w+)", page) == ["p2", "p1", "p0"]
    page = page_of(
        make_run(tmp_path / "b", [{"update": 1}], [sample("p", 0, 1), sample("q", 0, -3)])
    )
    assert re.findall(r"<article><b>(\w+)", page) == ["q", "p"]


def test_texts_of_strangers_stay_text_and_nothing_is_loaded(tmp_path):
    run = make_run(tmp_path / "a<b>", [{"update": 1, EVIL: 1.0}], [sample(EVIL)], note=EVIL)
    page = own(page_of(run))
    assert "<img" not in page and "<!--" not in page and page.count("</script>") == 3
    assert "default-src 'none'" in page and not re.search(r"<[^>]*\b(src|href)=", page)


def test_what_is_damaged_is_left_out_or_named(base, tmp_path, capsys):
    """Half a last line; no runs; a damaged rollout; a place that cannot be written."""
    run = make_run(tmp_path / "a", [{"update": 1, "objective/kl": 0.5}, '{"update": 2, "obj'])
    page = page_of(run)
    assert shown(page, "objective/kl")["traces"][0]["y"] == [0.5]
    assert "damaged lines of metrics.jsonl left out" in page
    (run / "rollouts").mkdir()
    (run / "rollouts" / "000001.safetensors").write_bytes(b"damaged")
    (run / "tokenizer.json").write_text("{}")  # the model is still being written
    assert "no tokenizer yet" in page_of(run)
    whole = make_run(tmp_path / "whole", [{"update": 1}])
    shutil.copytree(base.plain, run, dirs_exist_ok=True)
    nowhere = whole / "args.json" / "x.html"
    for folder, out in [(base.plain, None), (run, None), (whole, nowhere), (whole, whole)]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            page_of(Path(folder), out=out)
        assert stopped.value.code == 2
        assert re.fullmatch(r"error: \S+: .*; .*\n", capsys.readouterr().err)
    assert not [*tmp_path.glob("*.part")]


# ---- in a browser


@browser
def test_the_page_works_in_a_browser(tmp_path):
    """Charts are drawn, hostile texts shown and not run, the search filters, nothing overflows."""
    rows = [{"update": n, "objective/kl": 0.1 * n, EVIL: n} for n in range(1, 5)]
    run = make_run(tmp_path / "a" / EVIL.replace("/", "|"), rows, [sample(EVIL), sample("a" * 900)])
    script = """
      window.alert = () => document.title = "hacked"
      find.value = "ALERT(1)"
      find.dispatchEvent(new Event("input"))
      document.documentElement.style.width = "400px"
      dispatchEvent(new Event("resize"))
      const right = e => e.getBoundingClientRect().right
      setTimeout(() => {
        const wide = [...document.querySelectorAll("body *")].map(right)
        document.body.id = "wide" + Math.round(Math.max(...wide))
      }, 2000)
    """
    dom = rendered(page_of(run), tmp_path, script)
    assert dom.count('class="main-svg"') >= 2 and "<title>Training report</title>" in dom
    assert html.unescape(re.search(r"<article.*?<b>(.*?)</b>", dom)[1]) == utils.visible(EVIL)
    assert re.findall(r'<article( hidden="")?>', dom) == ["", ' hidden=""']
    assert 350 < int(re.search(r'id="wide(\d+)"', dom)[1]) <= 400


@browser
def test_tokens_are_coloured(chain, tmp_path):
    page = page_of(chain.ppo, out=tmp_path / "page.html")
    script = "what.selectedIndex = 1; what.onchange()"
    tokens = re.findall(
        r'<i title="(.*?)" style="background: rgba?\((.*?)\)',
        rendered(page, tmp_path, script),
        re.S,
    )
    for title, color in tokens:
        kl = float(title.split()[3])
        assert color.startswith("40, 120, 230" if kl > 0 else "240, 130, 20")
    assert len(tokens) == len(re.findall("<i title", page))
