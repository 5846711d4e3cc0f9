"""utils.py: each helper against an independent computation, with what went wrong elsewhere."""

import copy
import functools
import logging
import os
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    ROOT,
    STAGES,
    args_of,
    make_gpt2,
    make_model,
    make_tokenizer,
    save_pair,
    target_logits,
)
from transformers.integrations import sdpa_attention

import card
import distributed
import encoding
import saving
import utils

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAN, INF = float("nan"), float("inf")
PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]


# ---- tensors


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_matches_numpy(shift_mean):
    """B6, B8, D20, D22: variance 1 over what is real, mean 0 or as it was; 0 elsewhere."""
    x, mask = torch.randn(5, 7) * 3 + 2, (torch.rand(5, 7) < 0.6).long()
    x[mask == 0] = torch.tensor([NAN, INF, -INF]).repeat(12)[: int((mask == 0).sum())]
    real = x[mask == 1].numpy().astype(np.float64)
    assert utils.masked_variance(x, mask).item() == pytest.approx(real.var())
    white = utils.whiten(x, mask, shift_mean)
    expected = (real - real.mean()) / np.sqrt(real.var() + 1e-8)
    expected += 0 if shift_mean else real.mean()
    np.testing.assert_allclose(white[mask == 1], expected, atol=1e-5)
    assert (white[mask == 0] == 0).all()


def test_what_has_no_real_element_is_zero():
    """B17: nothing divides by zero."""
    x, mask = torch.tensor([[3.0, NAN]]), torch.tensor([[0, 0]])
    assert utils.whiten(x, mask).tolist() == [[0.0, 0.0]]
    assert utils.masked_mean(x, mask).item() == utils.masked_variance(x, mask).item() == 0.0


def test_a_generator_depends_on_its_numbers_only():
    """D7: the same numbers give the same stream, whatever was drawn before; others another one."""
    streams = [(1,), (2,), (1, 0), (1, 0, 0), (0, 1), (1, 2), (2, 1), (1, 2, 0), (1, 2, 0, 0)]

    def drawn():
        made = [torch.rand(4, generator=utils.generator("cpu", *n)) for n in streams]
        return [tuple(numbers.tolist()) for numbers in made]

    first = drawn()
    torch.rand(100)
    assert drawn() == first
    assert len({*first}) == len(streams)


# ---- forward passes


def test_attention_on_a_cpu_is_not_rounded_to_bfloat16():
    """Autocast would round queries, keys and values; torch's backward pass is slow at that."""
    q, k, v = (torch.randn(2, 4, 9, 8, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    attend = transformers.AttentionInterface()["sdpa"]
    with utils.autocast(CPU, "bfloat16"):
        got, _ = attend(SimpleNamespace(is_causal=True), q, k, v, None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_compiled_model_attends_without_a_mask(kind, tokenizer, monkeypatch):
    """As one that is not: padding is on the right, and a row is one sequence."""
    if kind == "llama":
        model = make_model(tokenizer, attn_implementation="sdpa")
    else:
        model = make_gpt2(attn_implementation="sdpa").eval()
    ids, attends = torch.randint(4, 60, (3, 9)), []
    expected = utils.hidden_states(model, ids)

    def backend(graph, inputs):
        calls = [node.kwargs for node in graph.graph.nodes if "scaled_dot" in str(node.target)]
        attends.extend((call["attn_mask"], call["is_causal"]) for call in calls)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flags = {"gradient_checkpointing": False, "compile": True, "fsdp": False}
    utils.spread(model, SimpleNamespace(**flags), CPU)
    torch.testing.assert_close(utils.hidden_states(model, ids), expected)
    assert attends == [(None, True)]  # once: the layers share code


@pytest.mark.parametrize("at_a_time", [2**26, 30_000])  # whole, and in chunks of 64 tokens
def test_target_logits_are_those_of_the_full_forward_pass(model, at_a_time, monkeypatch):
    """D8: of the targets only, one position before each, with the same gradients."""
    monkeypatch.setattr(utils, "LOGITS_AT_A_TIME", at_a_time)
    ids, mask = encoding.pad(PROMPTS * 20, 0, "right", CPU)
    full = model(**utils.model_inputs(model, ids, mask)).logits
    for is_target in (mask.bool(), mask.bool() & (ids % 3 == 0), ids < 0):
        rows, columns = is_target.nonzero(as_tuple=True)
        rows, columns = rows[columns > 0], columns[columns > 0]  # nothing is before a first token
        expected = full[rows, columns - 1]
        got, tokens = target_logits(model, ids, is_target)
        assert got.dtype == torch.float32
        assert tokens.tolist() == ids[rows, columns].tolist()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        gradients = []
        for logits in (got, expected):
            loss = F.cross_entropy(logits, tokens, reduction="sum") / ids.numel()
            gradients.append(torch.autograd.grad(loss, [*model.parameters()], retain_graph=True))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_log_probabilities_in_chunks_against_float64(model, monkeypatch):
    """Values to 1e-5 and gradients to 1e-4 of their size, of the plain formula over all logits."""
    ids, _ = encoding.pad(PROMPTS * 20, 0, "right", CPU)
    results = []
    for float64 in (False, True):
        own = copy.deepcopy(model).double() if float64 else model
        monkeypatch.setattr(utils, "LOGITS_AT_A_TIME", 2**60 if float64 else 30_000)
        hidden = own.base_model(**utils.model_inputs(own, ids)).last_hidden_state[:, :-1]

        def logprobs(h, t, own=own):
            logits = own.lm_head(h) if h.dtype == torch.float64 else utils.logits_of(own, h)
            return logits.log_softmax(-1).gather(-1, t[:, None]).squeeze(-1)

        values = utils.in_chunks(logprobs, own, hidden.flatten(0, 1), ids[:, 1:].flatten())
        gradients = torch.autograd.grad(values.mean(), [*own.parameters()])
        results.append((values, gradients))
    (values, gradients), (expected, exact) = results
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, exact, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm()


FREE = [(None, 2**26), (0, 2**26), (2e9, 2**26), (20e9, 2**28), (40e9, 2**29), (141e9, 2**31 - 1)]


@pytest.mark.parametrize(("free", "expected"), FREE)
def test_chunks_of_logits_are_larger_where_a_gpu_has_room(free, expected, monkeypatch):
    """2^26 at least, below 2^31; five float32 tensors of them take half of what is free at most."""
    free = free and int(free)
    monkeypatch.setattr(distributed, "free_memory", lambda device: free)
    assert utils.logits_at_a_time(CUDA) == expected
    assert expected == 2**26 or expected * 5 * 4 <= free / 2


def test_normalize_scores_reads_the_configuration(base):
    """D13: (raw - mean) / std, and raw scores from a model that keeps neither."""
    classifier = utils.load_classifier(base.plain, CPU)
    raw = torch.tensor([1.0, 5.0])
    assert utils.normalize_scores(classifier, raw).tolist() == [1.0, 5.0]
    classifier.config.reward_mean, classifier.config.reward_std = 3.0, 2.0
    assert utils.normalize_scores(classifier, raw).tolist() == [-1.0, 1.0]


def test_models_are_loaded_in_float32_and_without_dropout(base, tmp_path):
    """D4: bfloat16 weights on disk are computed with in float32; none is left in training mode."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.plain)
    make_model(tokenizer, attention_dropout=0.5).bfloat16().save_pretrained(tmp_path)
    for load in (utils.load_causal_lm, utils.load_classifier):
        loaded = load(str(tmp_path), CPU)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        flags = {"gradient_checkpointing": True, "compile": False, "fsdp": False}
        utils.spread(loaded, SimpleNamespace(**flags), CPU)
        assert not any(m.training for m in loaded.modules())


def test_a_frozen_head_is_not_rounded(models):
    """To bfloat16, as the products before it are: close scores would be equal."""
    model = utils.load_classifier(str(models.reward_model), CPU)
    head = model.score.weight.clone()
    utils.freeze(model, "bfloat16")
    assert torch.equal(model.score.weight, head)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_tokenizers_are_the_same_or_not(tokenizer):
    """B5: ids may be passed on only where they mean the same."""
    assert encoding.same_tokenizer(tokenizer, make_tokenizer())
    for other in ({"size": 300}, {"eos": "<|end|>"}, {"chat": True}, {"bos": "<bos>"}):
        assert not encoding.same_tokenizer(tokenizer, make_tokenizer(**other))


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    """D3: GPT-2 and many others have no pad token."""
    tokenizer = make_tokenizer(pad=None)
    loaded = encoding.load_tokenizer(save_pair(tmp_path, make_model(tokenizer), tokenizer))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


# ---- precision


def test_gpus_that_multiply_in_bfloat16(monkeypatch):
    """From Ampere on; a Turing card would emulate it."""
    for capability, native in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert distributed.multiplies_bfloat16(CUDA) is native


CPUS = {"sse2 avx512_f avx512_bf16": True, "amx_bf16 amx_tile": True}
CPUS |= {"avx2 avx512_f avx512_vnni": False, "neon bf16": False}


@pytest.mark.parametrize("flags", CPUS)
def test_cpus_that_multiply_in_bfloat16(flags, monkeypatch):
    """By the instructions that torch lists; no other device is asked about its CPU."""
    listed = {"avx512_bf16": False} | dict.fromkeys(flags.split(), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed)
    assert distributed.multiplies_bfloat16(CPU) is CPUS[flags]
    assert not distributed.multiplies_bfloat16(torch.device("meta"))


def test_a_device_without_float64_is_refused(monkeypatch):
    """As mps is, at once: losses are summed in it."""
    whole = torch.zeros

    def zeros(*size, dtype=None, **kwargs):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        return whole(*size, dtype=dtype, **kwargs)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=r"cannot be used \(Cannot convert"):
        distributed.choose_device("cpu")


def test_auto_never_is_an_emulated_bfloat16(tmp_path):
    """On the machine of this test: bfloat16 only where Linux lists the CPU's instructions."""
    args = SimpleNamespace(device="cpu", seed=1, dtype="auto", trust_remote_code=False)
    args.resume, args.output_dir = False, str(tmp_path)
    chosen, _ = utils.start_process(args)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    assert args.dtype == "auto"
    assert chosen.dtype == ("bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32")


def test_float32_is_float32_after_a_run_in_bfloat16(tmp_path):
    """In a notebook: TF32, which bfloat16's heads take on CUDA, goes with that run."""
    args = SimpleNamespace(device="cpu", seed=1, dtype="bfloat16", trust_remote_code=False)
    args.resume, args.output_dir = False, str(tmp_path)
    for args.dtype, precision in (("bfloat16", "tf32"), ("float32", "ieee")):
        utils.start_process(args)
        assert torch.backends.cuda.matmul.fp32_precision == precision
        torch.get_float32_matmul_precision()  # as reward functions' libraries may: no error


@pytest.mark.parametrize(
    ("cuda", "dtype", "autocast", "grouped"),
    [
        (True, torch.float32, False, False),
        (True, torch.float32, True, True),
        (True, torch.bfloat16, False, True),
        (False, torch.float32, False, True),
    ],
)
def test_keys_that_queries_share(monkeypatch, cuda, dtype, autocast, grouped):
    """In float32 on CUDA they are repeated: torch would take attention that holds [T, T] scores."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast)
    key = SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(1, 2, 3, 4))
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) == grouped


@pytest.mark.parametrize("name", STAGES)
def test_auto_is_chosen_by_the_device_and_kept_by_a_resumed_run(
    request, name, monkeypatch, refused, tmp_path
):
    """args.json holds what was chosen; another machine resumes with it; a flag wins over both."""
    stage, out, native = request.getfixturevalue(name), tmp_path / "out", True
    monkeypatch.setattr(distributed, "multiplies_bfloat16", lambda device: native)
    flags = {"save_every": 1, "dtype": "auto"}
    stage(out, **flags)
    assert args_of(out)["dtype"] == "bfloat16"
    native = False
    before = (out / "model.safetensors").read_bytes()
    stage(out, **flags, resume=True)
    assert args_of(out)["dtype"] == "bfloat16"
    assert (out / "model.safetensors").read_bytes() == before
    refused(name, "--dtype: was 'bfloat16'", save_every=1, dtype="float32", resume=True)
    stage(out, **flags, overwrite=True)  # a new run, which does not look at the old one
    assert args_of(out)["dtype"] == "float32"
    assert (out / "model.safetensors").read_bytes() != before
    stage(out, dtype="bfloat16", overwrite=True)
    assert args_of(out)["dtype"] == "bfloat16"


# ---- what libraries announce

ANNOUNCED = ("deprecated", "will be removed", "future")


def test_no_library_announces_that_a_call_of_ours_will_fail(sft, reward_model, ppo, tmp_path):
    """Not as a warning and not in its log: a coming version would break the stages."""
    texts, log = [], logging.Handler(logging.WARNING)
    log.emit = lambda record: texts.append(record.getMessage())
    loggers = [logging.getLogger(x) for x in ("transformers", "huggingface_hub", "datasets")]
    verbosity = transformers.utils.logging
    verbosity.warning_once.cache_clear()
    verbosity.set_verbosity_warning()
    torch.set_warn_always(True)
    for logger in loggers:
        logger.addHandler(log)
    flags = {"gradient_checkpointing": True, "save_every": 1, "dtype": "bfloat16"}
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn("this one is caught in the future", FutureWarning, stacklevel=1)
            logging.getLogger("transformers.models").warning("this one is deprecated")
            tiny = sft(tmp_path / "tiny", model="tiny", epochs=1)
            first = str(sft(tmp_path / "sft", model=str(tiny), **flags))
            judge = str(reward_model(tmp_path / "judge", model=first, **flags))
            more = {"save_rollouts": 1, "eval_every": 1, "model": first, "reward_model": judge}
            ppo(tmp_path / "ppo", **more, **flags)
            sft(tmp_path / "sft", model=str(tiny), **flags, resume=True)
    finally:
        verbosity.set_verbosity_error()
        torch.set_warn_always(False)
        for logger in loggers:
            logger.removeHandler(log)
    texts += [f"{w.category.__name__}: {w.message}" for w in caught]
    announced = [text for text in texts if any(word in text.lower() for word in ANNOUNCED)]
    assert len(announced) == 2, announced  # the test's own


# ---- flags and folders


FITS = {(16, 16, 1, 1): 16, (16, 4, 1, 1): 4, (16, 64, 1, 1): 16}  # the last: the share itself
FITS |= {(16, 64, 4, 1): 4, (16, 3, 4, 2): 2, (2, 1, 2, 1): 1}
FITS |= dict.fromkeys([(6, 4, 1, 1), (16, 3, 1, 1), (16, 3, 4, 1)])
FITS[2, 1, 4, 1] = None  # a process without a sequence


@pytest.mark.parametrize(("batch", "given", "world", "parts"), FITS)
def test_the_micro_batch_size_is_at_most_a_process_share(batch, given, world, parts, error_of):
    """What does not divide is refused, naming --batch-size and a multiple that would do."""
    args = SimpleNamespace(batch_size=batch, micro_batch_size=given)
    if size := FITS[batch, given, world, parts]:
        assert utils.micro_batch_size(args, world, parts) == size
    else:
        line = error_of(utils.micro_batch_size, args, world, parts)
        assert line.startswith("error: --batch-size: ")
        args.batch_size = int(line.split()[-1])
        assert utils.micro_batch_size(args, world, parts)


def test_numbers_are_checked_for_their_range(error_of):
    """Above 0 but for those that may be 0, up to 1 where that is the most; finite; no text."""

    def check(**changed):
        given = {"rate": 0.5, "seed": 1, "share": 1, "text": "x"} | changed
        utils.check_numbers(SimpleNamespace(**given), may_be_0="share", at_most_1="share")

    for right in ({}, {"rate": 1e9}, {"seed": 0}, {"share": 0}, {"share": 0.5}, {"flag": False}):
        check(**right)
    wrong = {"rate": (0, -0.1, NAN, INF, -INF, 2**64), "seed": (-1,), "share": (1.01, -1, NAN)}
    for name, values in wrong.items():
        for value in values:
            line = error_of(check, **{name: value})
            assert line.startswith(f"error: --{name}: {value} is out of range; pass ")


@pytest.fixture
def folder(tmp_path):
    """`folder(stage, **flags)` checks and opens the output folder `out` as a stage does."""

    def call(stage: str = "sft", **flags) -> Path:
        defaults = {"model": "x", "seed": 1, "resume": False, "overwrite": False, "track": False}
        flags = defaults | flags
        args = SimpleNamespace(output_dir=str(tmp_path / "out"), **flags)
        utils.check_output(args, stage)
        return utils.open_output(args, stage)

    yield call
    while utils.locks:
        utils.locks.pop().release()


def test_overwrite_removes_a_run_of_the_same_stage_only(folder, error_of):
    """What is no run, as args.json is broken or another's, is refused; all of a run goes."""
    out = folder()
    utils.locks.pop().release()
    (out / "more").mkdir()
    (out / "more" / "summary.json").write_text("{}")
    for text in ("{}", '{"stage": "train"}', "{", '["stage"]'):
        (out / "args.json").write_text(text)
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            assert "holds no run of sft.py" in error_of(folder, "sft", **flags)
    (out / "args.json").write_text('{"stage": "sft", "seed": 7}')
    assert folder("sft", overwrite=True) == out
    assert {path.name for path in out.iterdir()} == {"args.json", "run.lock"}
    assert (args_of(out)["stage"], args_of(out)["seed"]) == ("sft", 1)


def test_a_folder_that_is_half_removed_still_names_its_run(folder, monkeypatch):
    """args.json is the last to go: what is left can be overwritten again."""
    out = folder()
    utils.locks.pop().release()
    for name in ("a", "summary.json", "zebra"):
        (out / name).write_text("x")

    def stopped(path):
        if path.name == "zebra":
            raise KeyboardInterrupt
        path.unlink()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "discard", stopped)
        folder(overwrite=True)
    utils.locks.pop().release()
    assert args_of(out)["stage"] == "sft"
    folder(overwrite=True)
    assert {path.name for path in out.iterdir()} == {"args.json", "run.lock"}


def test_a_folder_is_locked_while_its_run_lasts(folder, error_of):
    """A second run is refused; at the end the lock is free, however that comes about."""
    out = folder()
    assert "is in use" in error_of(folder, overwrite=True)
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), utils.stage():
            raise error
        with filelock.FileLock(out / "run.lock", timeout=0):
            pass
        folder(overwrite=True)


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Beside its target first and on the disk before it gets the name."""
    path, done, replace = tmp_path / "x.json", [], os.replace
    utils.write_text(path, "é")
    monkeypatch.setattr(utils, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    utils.write_text(path, "日本")
    assert done == ["x.json.part", "replace", tmp_path.name]
    monkeypatch.setattr(Path, "write_text", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        utils.write_text(path, "lost")
    assert path.read_text(encoding="utf-8") == "日本"


# ---- errors


def test_an_error_is_one_line(error_of):
    """WHERE, WHAT and HOW TO FIX, whatever the message holds."""
    line = error_of(utils.stop, "a:1: is\nbroken\x1b[2J; fix it", 3, code=3)
    assert line == "error: a:1: is broken\\x1b[2J; fix it"
    assert utils.first_line(ValueError("\n one\ntwo")) == "ValueError: one"
    assert utils.first_line(ValueError()) == "ValueError: no message"


def test_a_terminal_without_unicode_is_no_error():
    """Nor a locale of a cluster in latin-1: what it cannot show is spelled out."""
    code = "import utils; utils.say('naïve 日本')"
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    stdout = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env)
    assert stdout.decode("latin-1") == "naïve \\u65e5\\u672c\n"


def test_visible_keeps_what_is_text():
    """Line ends, tabs, accents, emoji, Hebrew; no control character, no change of direction."""
    text = "a\n\tb é 日本 🎉👩\u200d🚀 שלום x\xa0y\u3000z \u0645\u06cc\u200c\u062e 10\u202f%"
    assert utils.visible(text) == text
    every = "".join(map(chr, [*range(0x10000), *range(0xE0000, 0xE0200)]))
    shown = utils.visible(every).replace("\n", "").replace("\t", "")
    left = {c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert left == {"\u200c", "\u200d"}  # within words of Persian, within emoji
    assert utils.visible("\x1b\x9b\u202e\ud800") == r"\x1b\x9b\u202e\ud800"


def test_what_may_end_a_run_is_one_line(error_of):
    """A full disk, also as safetensors says it; a bug keeps its traceback."""

    @utils.stage()
    def main(error):
        raise error

    full = safetensors.SafetensorError("I/O error: No space (os error 28)")
    assert "I/O error" in error_of(main, full, code=1)
    for bug in (RuntimeError("shapes do not match"), ValueError("x"), KeyError("y")):
        with pytest.raises(type(bug)):
            main(bug)


# ---- checkpoints


def train_step(model, optimizer):
    ids, mask = encoding.pad(PROMPTS, 0, "right", CPU)
    model(**utils.model_inputs(model, ids, mask)).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpoints(out: Path, model, keep: int = 2) -> saving.Checkpoints:
    (out / "metrics.jsonl").touch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    return saving.Checkpoints(out, {"model": model}, make_tokenizer(), optimizer, keep)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_restores_everything(tokenizer, tmp_path, tied):
    """Weights (tied ones stay tied), optimizer and state; the next step is the same to the bit."""
    model, other = (make_model(tokenizer, seed, tie_word_embeddings=tied) for seed in (0, 9))
    saved, loaded = checkpoints(tmp_path, model), checkpoints(tmp_path, other)
    assert loaded.load() == {"step": 0}  # a run that was stopped before its first one starts again
    train_step(model, saved.optimizer)
    saved.save(7, {"kl_coef": 0.1234})
    train_step(model, saved.optimizer)
    assert loaded.load() == {"step": 7, "kl_coef": 0.1234}
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    train_step(other, loaded.optimizer)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_is_never_ahead_of_its_records(model, tmp_path, monkeypatch):
    """Its metrics are on the disk before it gets its name."""
    saver, done = checkpoints(tmp_path, model), []
    monkeypatch.setattr(utils, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(utils, "move", lambda part, path: done.append(part.name))
    saver.save(7, {})
    assert done == ["metrics.jsonl", "000007.part"]


def test_only_the_newest_whole_checkpoint_counts(model, tmp_path):
    """Older ones go once a newer one is whole; a half-written one is passed over."""
    left = {8: [8], 90: [90, 8], 100: [100, 90], 1000000: [1000000, 100]}
    for step, steps in left.items():
        checkpoints(tmp_path, model).save(step, {})
        assert [int(p.name) for p in utils.checkpoints(tmp_path)] == steps
    checkpoints(tmp_path, model, keep=1).save(100, {})  # whole already: nothing is written or goes
    assert len(utils.checkpoints(tmp_path)) == 2
    shutil.rmtree(tmp_path / "checkpoint" / "1000000")
    checkpoints(tmp_path, model, keep=1).save(110, {})
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["000110"]
    (tmp_path / "checkpoint" / "000200.part").mkdir()
    assert checkpoints(tmp_path, model).load()["step"] == 110


def test_a_model_that_is_half_replaced_is_none(model, tokenizer, tmp_path, monkeypatch):
    """As in best/: a new model's files beside an old config.json would be loaded."""
    saving.save_model(model, tokenizer, tmp_path)
    assert (tmp_path / "config.json").is_file()
    monkeypatch.setattr(utils, "move", lambda part, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saving.save_model(model, tokenizer, tmp_path)
    assert not (tmp_path / "config.json").exists()


# ---- reward functions, samples


def test_load_function(tmp_path, monkeypatch):
    """FILE.py:FUNCTION, with a file that may use what any module may use."""
    path = tmp_path / "rewards.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Weight:\n"
        "    value: float = 2.0\n"
        "def f(prompts, completions, **columns):\n"
        "    return [Weight().value * len(c) for c in completions]\n"
    )
    assert utils.load_function(f"{path}:f", "--reward-fn")(["a"], ["bc"]) == [4.0]
    (other := tmp_path / "other" / path.name).parent.mkdir()  # another file of the same name
    other.write_text(path.read_text().replace("2.0", "3.0"))
    assert utils.load_function(f"{other}:f", "--reward-fn")(["a"], ["bc"]) == [6.0]
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves the ~ of --reward-fn=~/f.py:f
    assert utils.load_function("~/rewards.py:f", "--reward-fn")(["a"], ["bc"]) == [4.0]


ASKED = [{"prompt": "p", "answer": 1, "kind": "x"}, {"prompt": "q", "answer": 2, "kind": None}]
ASKED = [encoding.Prompt([1], row["prompt"], row) for row in ASKED]
IDS = [[5, 6], [7, 8, 9]]  # of the completions


def test_a_reward_function_gets_the_columns():
    """As in TRL: prompts, completions, every other column by name."""
    seen = {}

    def f(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return np.array([1, 2])  # anything that float() takes

    scores, of_tokens = utils.call_reward_function(f, "--reward-fn", ASKED, ["c", "d"], IDS)
    assert (scores, of_tokens) == ([1.0, 2.0], [[], []])
    assert all(isinstance(s, float) for s in scores)
    columns = {"answer": [1, 2], "kind": ["x", None]}
    assert seen == {"prompts": ["p", "q"], "completions": ["c", "d"]} | columns


def test_a_reward_function_that_gives_no_scores(error_of):
    """At an update: the wrong count, NaN, nothing at all, an error of its own and the prompt."""

    def fails(prompts, completions, **columns):
        raise ZeroDivisionError("no\nluck")

    wrong = {"1 values for 2": [1.0], "nan": [1.0, NAN], "inf": [1.0, INF], "TypeError": None}
    wrong["1e+39"] = [1.0, 1e39]  # of float32 infinity
    functions = {what: lambda *a, result=result, **k: result for what, result in wrong.items()}
    functions["SystemExit: no sampler"] = lambda *a, **k: sys.exit("no sampler")
    for what, function in (functions | {"ZeroDivisionError: no": fails}).items():
        given = (function, "f.py:f", ASKED, ["c", "d"], IDS, 7)
        line = error_of(utils.call_reward_function, *given, code=1)
        assert line.startswith("error: update 7: f.py:f: ")
        assert what in line
    assert "'p'" in line


def test_a_code_block_cannot_be_left():
    """A text that holds fences is shown in a longer one, which nothing within can close."""
    for text in ("x", "```\nx\n```", "`" * 30, "```` a `` b", ""):
        first, *within, last = card.fenced(text).split("\n")
        assert "\n".join(within) == text
        assert first == last == "`" * len(first)
        assert "`" * len(first) not in text
        assert len(first) >= 3
