"""Rewards of several kinds: models and functions together, per-token and async ones.

What a run saves and reports is recomputed here from the models and functions themselves.
"""

import asyncio
import json
import math
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_rollouts as recomputed
import tyro
from conftest import (
    change_config,
    metrics_of,
    plain_classifier,
    plain_scores,
    rollouts_of,
    samples_of,
    summary_of,
    write_jsonl,
)

import dataset
import encoding
import ppo_rlhf
import utils

FUNCTIONS = """
import asyncio
def chars(prompts, completions, **columns):
    assert "completion_ids" not in columns
    return [len(text) / 10 for text in completions]
async def letters(prompts, completions, fruit, **columns):
    async def one(text):
        await asyncio.sleep(0)
        return text.count("e")
    return await asyncio.gather(*map(one, completions))
def tokens(prompts, completions, completion_ids, **columns):
    return [[(token % 7) / 7 for token in ids] for ids in completion_ids]
async def texts(prompts, completions, **columns):
    assert all(isinstance(text, str) for text in prompts + completions)
    assert all("<|user|>" in text and text.endswith("<|assistant|>") for text in prompts)
    return [1.0] * len(prompts)
"""
NAMES = ("second", "reward_model", "chars", "letters", "tokens")
WEIGHTS = (0.5, -1.5, 2.0, 0.25, 3.0)


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> str:
    """The file of the functions above."""
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


@pytest.fixture(scope="module")
def second(reward_model, tmp_path_factory) -> Path:
    """Another reward model, whose scores have unit variance."""
    out = tmp_path_factory.mktemp("models") / "second"
    return reward_model(out, seed=2, epochs=2, normalize_std=True)


@pytest.fixture(scope="module")
def together(ppo, models, second, functions, tmp_path_factory):
    """`together(ensemble)`: a run with two reward models and three functions, made once."""
    folder, made = tmp_path_factory.mktemp("together"), {}
    flags = {"reward_model": (str(second), str(models.reward_model)), "reward_weights": WEIGHTS}
    flags |= {"reward_fn": tuple(f"{functions}:{name}" for name in NAMES[2:])}
    flags |= {"total_episodes": 24, "save_rollouts": 1, "save_every": 2, "learning_rate": 1e-2}

    def run(ensemble: str) -> Path:
        if ensemble not in made:
            made[ensemble] = ppo(folder / ensemble, **flags, ensemble=ensemble)
        return made[ensemble]

    return run


def scores_by_name(rollout, tokenizer, models) -> dict[str, np.ndarray]:
    """What each reward says of the responses of a rollout, [B]."""
    pairs = [(rollout.prompt(i), rollout.response(i)) for i in range(8)]
    eos = tokenizer.eos_token_id
    sequences = [p + r + ([] if r[-1] == eos else [eos]) for p, r in pairs]
    texts = [tokenizer.decode(r, skip_special_tokens=True) for _, r in pairs]
    return {
        "second": plain_scores(models.second, sequences),
        "reward_model": plain_scores(models.reward_model, sequences),
        "chars": np.array([len(text) / 10 for text in texts]),
        "letters": np.array([text.count("e") for text in texts]),
        "tokens": np.array([sum((token % 7) / 7 for token in r) for _, r in pairs]),
    }


def check_scores(out: Path, models, ensemble: str) -> None:
    """The models' weighted scores as the ensemble has them, the functions', and all means."""
    tokenizer, spread = encoding.load_tokenizer(str(out)), []
    for rollout, row in zip(rollouts_of(out), metrics_of(out), strict=True):
        by_name = scores_by_name(rollout, tokenizer, models)
        assert {k for k in row if k.startswith("scores/")} == {f"scores/{name}" for name in NAMES}
        for name, scores in by_name.items():
            assert row[f"scores/{name}"] == pytest.approx(scores.mean(), abs=1e-4)
        weighted = np.array([w * by_name[k] for w, k in zip(WEIGHTS, NAMES, strict=True)])
        of_models = weighted[:2]
        combined = {
            "sum": of_models.sum(0),
            "min": of_models.min(0),
            "mean_minus_std": of_models.mean(0) - of_models.std(0),
        }
        spread.extend(abs(of_models[0] - of_models[1]))
        ended = [rollout.response(i)[-1] == tokenizer.eos_token_id for i in range(8)]
        expected = combined[ensemble] + weighted[2:].sum(0) - np.where(ended, 0.0, 1.0)
        np.testing.assert_allclose(rollout.a["scores"], expected, atol=1e-3)
    assert max(spread) > 0.1


def test_models_and_functions_together(together, models, second):
    """Scores of all, weighted in the order of the flags; the values start from the first model."""
    both = SimpleNamespace(second=second, reward_model=models.reward_model, sft=models.sft)
    assert abs(plain_classifier(second).config.reward_std - 1) > 0.05
    check_scores(together("sum"), both, "sum")
    recomputed.check_values(together("sum"), SimpleNamespace(reward_model=second))
    recomputed.check_logprobs(together("sum"), models)
    recomputed.check_metrics(together("sum"))


def test_responses_cut_for_any_reward_model_are_counted(ppo, models, tmp_path):
    """B31: also where the other one, asked later, has room for them."""
    short = shutil.copytree(models.reward_model, tmp_path / "short")
    change_config(short, max_position_embeddings=24)
    flags = {"reward_model": (str(short), str(models.reward_model)), "save_rollouts": 1}
    out = ppo(tmp_path / "out", value_model=str(models.reward_model), **flags)
    eos = encoding.load_tokenizer(str(out)).eos_token_id
    for rollout, row in zip(rollouts_of(out), metrics_of(out), strict=True):
        texts = [rollout.prompt(i) + rollout.response(i) for i in range(8)]
        cut = [len(ids) + (ids[-1] != eos) > 24 for ids in texts]
        assert 0 < sum(cut) < 8
        assert row["response/cut_rate"] == sum(cut) / 8


def test_numbers_per_token_are_rewards_of_these_tokens(together):
    """Weighted; what the score has besides is the last token's."""
    out = together("sum")
    for rollout in rollouts_of(out):
        expected = 3.0 * (rollout.a["response_ids"] % 7) / 7 * rollout.real
        np.testing.assert_allclose(rollout.a["token_rewards"], expected, atol=1e-5)
        assert (expected[:, :-1] > 0).any()
    recomputed.check_rewards(out)
    recomputed.check_masks(out)


def test_a_function_alone_may_reward_tokens(ppo, functions, tmp_path):
    """With penalty and clip, which concern the whole score, at the end; on held-out prompts too."""
    flags = {"reward_clip": 1.5, "save_rollouts": 1, "advantage": "rloo", "samples_per_prompt": 2}
    flags |= {"total_episodes": 24, "learning_rate": 1e-2, "eval_reward_fn": f"{functions}:tokens"}
    out = ppo(tmp_path / "out", reward_fn=f"{functions}:tokens", **flags)
    recomputed.check_rewards(out)
    assert any((rollout.a["scores"] == 1.5).any() for rollout in rollouts_of(out))
    for name in ("policy", "reference"):
        evaluation, samples = summary_of(out)["eval"][name], samples_of(out)
        assert evaluation["score"] == pytest.approx(evaluation["judge"], abs=1e-5)
        assert any(sample[f"{name}_score"] > 1.5 for sample in samples)  # not clipped


def test_functions_get_chats_as_texts(ppo, base, data, functions, tmp_path):
    """Rendered by the template, beside a reward model or alone."""
    flags = {"model": base.chat, "dataset": data.chat_prompts, "total_episodes": 8}
    row = metrics_of(ppo(tmp_path / "out", reward_fn=f"{functions}:texts", **flags))[0]
    assert row["scores/texts"] == 1.0


# ---- what a function may return

ASKED = [encoding.Prompt([1], text, {"prompt": text}) for text in ("p", "q", "r")]
IDS = [[5, 6], [7], [8, 9, 10]]


def called(returned, **kwargs):
    """What comes of a function that returns this."""
    function = lambda prompts, completions, **columns: returned  # noqa: E731
    return utils.call_reward_function(function, "f.py:f", ASKED, [*"abc"], IDS, **kwargs)


@pytest.mark.parametrize("array", [list, np.array])
def test_a_number_per_response_or_per_token(array):
    """Some responses may have the one, some the other; a token of its own has one number."""
    assert called(array([1, 2, 3])) == ([1, 2, 3], [[], [], []])
    tokens = [array([1.0, 2.0]), array([0.5]), array([0.0, 0.0, 4.0])]
    assert called(tokens) == ([3.0, 0.5, 4.0], [[1.0, 2.0], [0.5], [0.0, 0.0, 4.0]])
    assert called([7, *tokens[1:]]) == ([7.0, 0.5, 4.0], [[], [0.5], [0.0, 0.0, 4.0]])
    column = np.array([[1.0], [2.0], [3.0]])  # of a classifier
    assert called(column)[0] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "returned",
    [
        *([1, 2], [1, 2, [3, 4]], [1, [], 3], [[1, math.nan], [1], 2], [1, 2, [[1], [2], 3]]),
        *({0: 0.5, 1: 0.7, 2: 0.9}, {1.0, 2.0, 3.0}, "123", [1, 2, 1e20]),
    ],
    ids=str,
)
def test_what_is_neither(returned, error_of):
    """The wrong count of responses or of tokens, a NaN or what float32 cannot square, no list."""
    line = error_of(called, returned, update=3, code=1)
    assert line.startswith("error: update 3: f.py:f: ")


def test_async_functions_share_a_loop_and_files_are_run_once(tmp_path):
    """A lock of the module, waited for in two calls; two functions of one file share its module."""
    (tmp_path / "f.py").write_text(
        "import asyncio\nlock = asyncio.Semaphore(1)\n"
        "async def f(prompts, completions):\n"
        "    async def one(text):\n"
        "        async with lock:\n"
        "            await asyncio.sleep(0)\n"
        "            return len(text)\n"
        "    return await asyncio.gather(*map(one, completions))\n"
        "def g(prompts, completions):\n"
        "    return [lock is not None for _ in prompts]\n"
    )
    f, g = (utils.load_function(f"{tmp_path}/f.py:{name}", "--reward-fn") for name in "fg")
    assert f.__globals__ is g.__globals__
    prompts = [encoding.Prompt([1], "a", dataset.Row({"prompt": "a"}, "here"))] * 3
    for _ in range(2):
        scores, _ = utils.call_reward_function(f, "f", prompts, ["a", "bb", ""], [[1]] * 3)
        assert scores == [1, 2, 0]
    assert pickle.loads(pickle.dumps(g)) is g  # as a pool of processes asks for it


def test_an_async_function_that_fails(error_of):
    """Or that waits for what is not there: the error's own words."""

    async def fails(prompts, completions, **columns):
        await asyncio.sleep(0)
        raise ConnectionError("no judge")

    given = (fails, "f.py:f", ASKED, [*"abc"], IDS)
    assert "ConnectionError: no judge" in error_of(utils.call_reward_function, *given)


def test_a_function_may_change_its_lists():
    """Those of the run stay: another function, judge and samples come after it."""

    def changes(prompts, completions, completion_ids, chat):
        prompts.clear()
        for turns in chat:
            turns.append(completions.pop())
        return [float(ids.pop() + len(chat[i])) for i, ids in enumerate(completion_ids)]

    texts, ids = [*"abc"], [[*x] for x in IDS]
    asked = [encoding.Prompt([1], "p", {"prompt": "p", "chat": ["Hi"]})] * 3  # of one row
    scores, _ = utils.call_reward_function(changes, "f", asked, texts, ids)
    assert (scores, texts, ids) == ([8.0, 9.0, 12.0], [*"abc"], IDS)
    assert asked[0].row["chat"] == ["Hi"]


def test_columns_beside_the_prompt_arrive_as_they_are(tmp_path):
    """Also where they hold what in other stages is a chat."""
    chat = [{"from": "human", "value": "x"}]
    row = {"prompt": "p", "conversations": chat, "chosen": json.dumps(chat), "messages": None}
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [row])
    assert dataset.load_data(str(file), "train", dataset.PROMPT_FORMATS) == [row]


def test_completion_ids_for_those_who_name_them():
    """A function that only takes **columns has none among them."""
    seen = {}

    def named(prompts, completions, completion_ids):
        return [sum(ids) for ids in completion_ids]

    def other(prompts, completions, **columns):
        seen.update(columns)
        return [0.0] * 3

    scores = [utils.call_reward_function(f, "f", ASKED, [*"abc"], IDS)[0] for f in (named, other)]
    assert scores == [[11.0, 7.0, 27.0], [0.0] * 3]
    assert "completion_ids" not in seen


# ---- flags


@pytest.mark.parametrize(
    ("typed", "models", "functions"),
    [
        ("", ("runs/reward_model",), ()),
        ("--reward-fn f.py:g", (), ("f.py:g",)),
        ("--reward-model a b --reward-fn f.py:g h.py:k", ("a", "b"), ("f.py:g", "h.py:k")),
    ],
)
def test_which_rewards_there_are(typed, models, functions):
    """The default reward model, unless a function is given."""
    args = tyro.cli(ppo_rlhf.Args, args=typed.split())
    ppo_rlhf.check_flags(args, 1)
    assert (args.reward_model, args.reward_fn) == (models, functions)


@pytest.mark.parametrize(
    ("flag", "flags"),
    [
        ("--reward-weights", {"reward_weights": (1.0, 2.0)}),
        ("--reward-model", {"reward_model": ()}),
        ("--ensemble", {"ensemble": "min"}),
    ],
)
def test_rewards_that_do_not_fit_together(refused, flag, flags):
    refused("ppo", flag, **flags)


def test_names_of_metrics():
    """The last part of a path, or the function; each once."""
    names = ["runs/a/", "org/b", "f.py:g", "dir/h.py:g", "runs/g_3", "a"]
    assert utils.short_names(names) == ["a", "b", "g", "g_3", "g_3_4", "a_5"]
