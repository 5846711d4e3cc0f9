"""One HTML page about one or more runs: curves, samples before and after PPO, rollouts by token.

    python report.py runs/ppo_rlhf    # writes runs/ppo_rlhf/report.html

In: folders of runs, or folders of these; docs/metrics.md, which says what the curves mean. Out: a
file below 6 MB that loads nothing, and says what it leaves out. Every text is escaped.
"""

import html
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tyro
from plotly.offline import get_plotlyjs
from safetensors import SafetensorError
from safetensors.numpy import load_file

import encoding
import utils

# the first curves; what is healthy, after docs/metrics.md
FIRST = """objective/scores eval/judge eval/win_rate:.5:1 objective/kl response/length
response/eos_rate:.9:1 policy/clipfrac_avg:0:.3 val/explained_variance:0:1
val/ratio_start_error:0:.001 val/ratio:.9:1.1 accuracy:.5:1 eval/accuracy:.5:1"""
QUANTITIES = "advantages kl values rewards returns logprobs".split()
HEAD = """<!doctype html><html lang=en><meta charset=utf-8><title>Training report</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"><style>
:root{color-scheme:light dark;--bg:#fff;--fg:#222}
@media(prefers-color-scheme:dark){:root{--bg:#16181c;--fg:#ddd}}
body{font:15px/1.5 system-ui,sans-serif;margin:0 12px;overflow-wrap:anywhere}
body,nav{background:var(--bg);color:var(--fg)}.plot text{fill:var(--fg)!important}
.hoverlayer .bg{fill:var(--bg)!important;fill-opacity:1!important}
h3,p{margin:0}p{opacity:.75;font-size:13px}
nav{position:sticky;top:0;z-index:9;max-height:30vh;overflow:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr));gap:16px}
article,details{margin:12px 0;white-space:pre-wrap}
i{font-style:normal;border-right:1px solid #8886}
</style>"""
SCRIPT = """
const all = (css, f) => document.querySelectorAll(css).forEach(f)
const charts = JSON.parse(document.getElementById("data").textContent)
const axis = {gridcolor: "#8884", zeroline: false}, healthy = {xref: "paper", x0: 0, x1: 1,
  layer: "below", line: {width: 0}, fillcolor: "#3a52"}
all(".plot", (div, i) => {
  const {traces, band: [y0, y1]} = charts[i]
  Plotly.newPlot(div, traces, {
    xaxis: axis, yaxis: axis, shapes: y0 == null ? [] : [{...healthy, y0, y1}], height: 210,
    margin: {l: 52, r: 8, t: 6, b: 28}, paper_bgcolor: "#0000", plot_bgcolor: "#0000",
    showlegend: false, hovermode: "x unified", dragmode: innerWidth > 700 && "zoom",
  }, {responsive: true, displayModeBar: false})
})
const find = document.querySelector("input"), what = document.querySelector("select")
find.oninput = () => all("article", card => {
  card.hidden = !card.textContent.toLowerCase().includes(find.value.toLowerCase())
})
const paint = () => all(".rollout", part => {
  const tokens = [...part.querySelectorAll("i")]
  const values = tokens.map(i => +i.title.split(/\\s/)[2 * what.selectedIndex + 1])
  const top = Math.max(1e-9, ...values.map(Math.abs))
  part.querySelector("b").textContent = `blue: up to ${top}, orange: down to -${top}`
  tokens.forEach((i, t) => {
    const hue = values[t] > 0 ? "40,120,230" : "240,130,20"
    i.style.background = `rgba(${hue},${0.7 * Math.abs(values[t]) / top})`
  })
})
what.onchange = paint
paint()
"""


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Runs, or folders that hold runs."""
    out: Path | None = None
    """The page to write; none: report.html in the first folder."""


def main(args: Args) -> None:
    runs: dict[Path, None] = {}
    for folder in args.folders:
        found = sorted(path.parent.resolve() for path in folder.rglob("metrics.jsonl"))
        runs |= dict.fromkeys(found or utils.stop(f"{folder}: holds no run; pass a stage's folder"))
    out = args.out or args.folders[0] / "report.html"
    if out.is_dir():
        utils.stop(f"{out}: is a folder; pass --out FILE.html")
    try:
        for share in (2**n for n in range(16)):  # half as much until it fits
            text = page([*runs], share)
            if (size := len(text.encode())) < 6e6:
                break
        utils.write_text(out, text)
    except (OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
        utils.stop(f"{out}: {utils.first_line(error)}; check the runs' files and --out")
    utils.say(f"report: {size / 1e6:.1f} MB in {out}")


def page(runs: list[Path], share: int) -> str:
    """The page; the limits of what it shows are divided by `share`."""
    above = os.path.commonpath([run.parent for run in runs])
    most = max(int(1000 / share**0.5), 8)  # points of a curve
    stages: dict = defaultdict(lambda: defaultdict(list))  # stage, metric: what Plotly draws
    nav = body = tail = ""
    for i, run in enumerate(runs):
        name, color = e(os.path.relpath(run, above)), f"hsl({(210 + 137 * i) % 360},65%,50%)"
        stage = e(utils.read_object(run / "args.json").get("stage", "?"))
        rows, note = read(run / "metrics.jsonl")
        final, summary = run / "summary.json", {}
        if final.is_file():
            summary = json.loads(
                final.read_text("utf-8"), parse_float=lambda x: float(f"{float(x):.4g}")
            )
        if len(rows) > most:
            note += f", about {most} of {len(rows)} points"
        for metric, line in curves(rows, summary).items():
            x, y = zip(*thin(line, most), strict=True)
            stages[stage][metric] += [{"x": x, "y": y, "name": name, "line": {"color": color}}]
        nav += f'<b style="color:{color}">■</b> {name} '
        body += f"<p>{name}: {stage}{note}; {e(json.dumps(summary))}</p>"
        tail += show_samples(run, name, share) + show_rollouts(run, name, share)
    first = dict(word.partition(":")[::2] for word in FIRST.split())
    meanings: dict[str, str] = {}
    of_ppo: dict[str, str] = {}  # its table, the second, has some names again
    for line in (Path(__file__).parent / "docs/metrics.md").read_text("utf-8").splitlines():
        cell, _, text = line.strip("| ").replace("`", "").partition(" | ")
        names, parts = cell.split(", "), text.split("; ")  # of several names a part each, or all
        parts = parts if len(parts) == len(names) else [text] * len(names)
        for name, part in zip(names, parts, strict=True):
            (of_ppo if name in meanings else meanings).setdefault(name, part)
    charts, options = [], "<option>".join(QUANTITIES)
    for stage, metrics in stages.items():
        meaning = meanings | of_ppo if stage == "ppo_rlhf" else meanings
        body += (
            f"<h2>{stage}</h2><p>By update or step; shaded: healthy, roughly</p><div class=grid>"
        )
        for metric in sorted(metrics, key=lambda m: [*first, m].index(m)):
            band = [float(bound) for bound in first.get(metric, "").split(":") if bound]
            charts.append({"traces": metrics[metric], "band": band})
            body += f"<div><h3>{e(metric)}</h3><div class=plot></div>"
            text = meaning.get(metric) or meaning.get(metric.split("/")[0] + "/NAME", "")
            body += f"<p>{e(text)}</p></div>"
        body += "</div>"
    numbers = json.loads(json.dumps(charts), parse_constant=lambda _: None)  # NaN, infinity
    data = json.dumps(numbers).replace("<", "\\u003c")
    return f"""{HEAD}<script>{get_plotlyjs()}</script><body><h1>Runs</h1>
<nav>{nav}<input type=search placeholder="search samples">
<label>tokens by <select><option>{options}</select></label></nav>{body}{tail}
<script type=application/json id=data>{data}</script><script>{SCRIPT}</script>"""


def e(text: object) -> str:
    """A text as HTML that shows it."""
    return html.escape(utils.visible(str(text)))


def read(path: Path) -> tuple[list[dict], str]:
    """A file's objects, one a line, and what to say of damaged ones."""
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    rows, note = [], ""
    for line in filter(None, text.split("\n")):
        try:
            rows.append(dict(json.loads(line)))
        except (TypeError, ValueError):  # half a line
            note = f", damaged lines of {path.name} left out"
    return rows, note


def curves(rows: list[dict], summary: dict) -> dict[str, list[tuple[float, float]]]:
    """Points of each metric; PPO's summary starts and ends evaluations."""
    lines = defaultdict(list)
    for n, row in enumerate(rows, 1):
        for name in [key for key in row if key not in ("update", "step", "episode")]:
            lines[name].append((n, row[name]))
    if final := summary.get("eval"):
        for name, y in utils.eval_metrics(final).items():
            start = final["reference"].get(name.removeprefix("eval/"), 0.5)
            lines[name] = [(0, start), *lines[name], (summary["updates"], y)]
    return lines


def thin(line: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """About `most` points, extremes of each stretch."""
    size = max(2 * len(line) // most, 1)
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return sorted({pick(part, key=lambda p: p[1]) for part in parts for pick in (min, max)})


def show_samples(run: Path, name: str, share: int) -> str:
    """Responses before and after, first where judge or else score moved most."""
    rows, note = read(run / "samples.jsonl")
    by = "judge" if rows and rows[0].get("policy_judge") is not None else "score"
    rows.sort(key=lambda row: -abs(row[f"policy_{by}"] - row[f"reference_{by}"]))
    kept = rows[: max(200 // share, 1)]
    page = f"<h2>{name}: samples</h2><p>{len(kept)} of {len(rows)}{note}, most changed first</p>"
    for row in kept:
        page += f"<article><b>{e(row['prompt'])}</b><div class=grid>"
        for who in ("reference", "policy"):
            said = f"{who}: score {row[who + '_score']:.4g}, judge {row.get(who + '_judge')}"
            page += f"<div><p>{e(said)}</p>{e(row[who])}</div>"
        page += "</div></article>"
    return page if rows else ""


def show_rollouts(run: Path, name: str, share: int) -> str:
    """Up to 4 saved rollouts, last first, each token with its numbers."""
    paths = sorted((run / "rollouts").glob("*.safetensors"), reverse=True)
    if not (shown := paths[:: -(-len(paths) // 4) or 1]):
        return ""
    page = f"<h2>{name}: {len(shown)} of {len(paths)} rollouts</h2>"
    if not all((run / file).is_file() for file in ("tokenizer.json", "config.json")):
        return page + "no tokenizer yet"
    decode = encoding.load_tokenizer(str(run)).decode
    for path in shown:
        t = load_file(path)
        t["kl"] = t["logprobs"] - t["ref_logprobs"]
        cards, left = [], 8000 // share  # tokens
        for row, ids in enumerate(t["response_ids"][:32]):
            prompt = t["prompt_ids"][row][t["prompt_mask"][row] == 1]
            real = t["response_mask"][row].nonzero()[0]
            if (left := left - len(prompt) - len(real)) < 0 and cards:
                break
            card = f"<summary>{row + 1}: score {t['scores'][row]:.4g}</summary>{e(decode(prompt))}"
            part: list[int] = []  # of a character, which may be up to four tokens
            for at in real:
                part.append(ids[at])
                # added to itself: some tokenizers drop the space of a first one
                piece = decode(part * 2)[len(decode(part)) :].replace("\n", "⏎\n")
                if piece.endswith("\ufffd") and len(part) < 4 and at < real[-1]:
                    piece = ""
                else:
                    part = []
                numbers = "\n".join(f"{q} {t[q][row, at]:.3g}" for q in QUANTITIES)
                card += f'<i title="{numbers}">{e(piece)}</i>'
            cards.append(f"<details{' open' * (row < 3)}>{card}</details>")
        page += f"<details class=rollout open><summary>{path.stem}: {len(cards)} of "
        page += f"{len(t['scores'])} episodes, <b></b></summary>{''.join(cards)}</details>"
    return page


if __name__ == "__main__":
    main(tyro.cli(Args))
