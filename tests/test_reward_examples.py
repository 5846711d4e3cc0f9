"""examples/rewards.py, called as PPO calls it; the judge is a server on this machine."""

import http.server
import json
import sys
import threading

import pytest
from conftest import ROOT, metrics_of

import encoding
import utils

FILE = ROOT / "examples" / "rewards.py"


def scores(name: str, completions: list[str], ids: list | None = None, **columns) -> list[float]:
    """What the function gives; `columns` are those of the data set, a value per completion."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    rows = [{"prompt": "Q:"} | row for row in rows or [{}] * len(completions)]
    prompts = [encoding.Prompt([1], row["prompt"], row) for row in rows]
    function = utils.load_function(f"{FILE}:{name}", "--reward-fn")
    ids = ids or [[1]] * len(completions)
    return utils.call_reward_function(function, name, prompts, completions, ids)[0]


def test_length():
    assert scores("length", ["", "", ""], ids=[[1] * 20, [1] * 5, [1] * 40]) == [0, -0.75, -1]


def test_pattern():
    good = "<think>one\ntwo</think>\n<answer>3</answer>"
    assert scores("pattern", [good, f"So: {good}", "<answer>3</answer>"]) == [1, 0, 0]


def test_exact_answer():
    """Of GSM8K's form and of plain ones; a number that only begins alike is another."""
    completions = [
        "6 * 7 is 42, so the answer is 42.",
        "42",
        "#### 4\n#### 42",
        "#### 421",
        "Paris",
        "The answer is: 5",
        "Answer: 1,000",
        "1,2",
    ]
    answers = ["6 * 7 = <<6*7=42>>42\n#### 42", 42, "42", "42", "paris.", "#### 5", "1000", "12"]
    assert scores("exact_answer", completions, answer=answers) == [1, 1, 1, 0, 1, 1, 1, 0]


def test_valid_json():
    texts = ['{"a": [1, null]}', " 3 ", "{'a': 1}", "", 'Here: {"a": 1}']
    assert scores("valid_json", texts) == [1, 1, 0, 0, 0]
    assert scores("valid_json", ["NaN", "[-Infinity]", "[" * 100_000]) == [0, 0, 0]


def test_sentiment():
    pytest.importorskip("vaderSentiment")
    good, bad = scores("sentiment", ["A wonderful, brilliant film.", "A dull and awful film."])
    assert -1 <= bad < -0.3 < 0.3 < good <= 1


def test_sentiment_without_its_package(monkeypatch, error_of):
    """The line says what to install."""
    utils.load_function(f"{FILE}:analyzer", "--reward-fn").cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    assert "pip install vaderSentiment" in error_of(scores, "sentiment", ["Good."])


class Judge(http.server.BaseHTTPRequestHandler):
    """The score is the number of letters of prompt and completion; an empty one is refused."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200 if asked["completion"] else 500)
        self.end_headers()
        score = len(asked["prompt"] + asked["completion"])
        self.wfile.write(json.dumps({"score": score}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def judge(monkeypatch):
    """A server for the time of a test, in JUDGE_URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/score")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield
        server.shutdown()


def test_http_judge(judge, error_of):
    """In the order of the completions; a refusal stops the run."""
    assert scores("http_judge", ["a" * n for n in (9, 1, 5)]) == [11, 3, 7]
    assert "HTTP Error 500" in error_of(scores, "http_judge", ["a", ""])


def test_http_judge_without_an_address(monkeypatch, error_of):
    monkeypatch.delenv("JUDGE_URL", raising=False)
    assert "JUDGE_URL" in error_of(scores, "http_judge", ["a"])


def test_a_run_with_several_of_them(ppo, models, judge, tmp_path):
    """Beside the reward model, as in the file's header."""
    functions = tuple(f"{FILE}:{name}" for name in ("length", "valid_json", "http_judge"))
    out = ppo(tmp_path / "out", reward_fn=functions, reward_model=str(models.reward_model))
    names = ("reward_model", "length", "valid_json", "http_judge")
    assert metrics_of(out)[0].keys() >= {f"scores/{name}" for name in names}
