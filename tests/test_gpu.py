"""What only a CUDA device can show; skipped where there is none (`pytest -m gpu`)."""

import pytest
import torch
from conftest import args_of, make_model, make_tokenizer, metrics_of, save_pair, target_logits
from test_architectures import FAMILIES, STEP_BY_STEP, make_random

import encoding
import generate
import utils

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41], [50]] * 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_captured_graph_decodes_what_single_steps_do(base, dtype):
    """Token for token in float32; greedy, and sampled with the same numbers."""
    device = torch.device("cuda")
    model = utils.load_causal_lm(base.plain, device)
    ids, mask = encoding.pad(PROMPTS, 0, "left", device)
    for temperature in (0, 1.0):
        results = []
        for stride in (1, 32):  # 1: no graph
            uniform = generate.random_numbers(len(ids), 70, utils.generator(device, 1))
            flags = {"temperature": temperature, "pad_id": 0}
            with utils.autocast(device, dtype):
                given = (model, ids, mask, uniform, [1, 2, 3])
                results.append(generate.generate(*given, stride=stride, **flags))
        (a, a_mask), (b, b_mask) = results
        assert not hasattr(model, "not_captured")
        if dtype == "float32":
            assert torch.equal(a, b) and torch.equal(a_mask, b_mask)
        else:
            assert (a == b).all(1).float().mean() > 0.5


@torch.no_grad()
def test_masked_attention_in_bfloat16_samples_what_is_read_without_a_mask(tmp_path):
    """Left padding, keys shared by heads of 64: by each token's place in the distribution."""
    device, tokenizer = torch.device("cuda"), make_tokenizer()
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = save_pair(tmp_path, make_model(tokenizer, **sizes), tokenizer)
    model, flags = utils.load_causal_lm(folder, device), {"pad_id": 0, "stride": 32}
    ids, mask = encoding.pad(PROMPTS, 0, "left", device)
    uniform = generate.random_numbers(len(ids), 70, utils.generator(device, 1))
    with utils.autocast(device, "bfloat16"):
        response_ids, real = generate.generate(model, ids, mask, uniform, [1], **flags)
        for prompt, answer, n, u in zip(PROMPTS, response_ids, real.sum(1), uniform, strict=True):
            prompt = torch.tensor(prompt, device=device)
            assert generate.misplaced(model, prompt, answer[:n], u[:n]) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_which_families_are_captured(kind, tmp_path):
    """Those that are on the emulated GPU of test_architectures.py."""
    device = torch.device("cuda")
    folder = make_random(kind.removesuffix("-alibi"), tmp_path, **FAMILIES[kind])
    model = utils.load_causal_lm(folder, device)
    ids, mask = encoding.pad(PROMPTS, 0, "left", device)
    uniform = generate.random_numbers(len(ids), 40, utils.generator(device, 1))
    with utils.autocast(device, "bfloat16"):
        generate.generate(model, ids, mask, uniform, [1], pad_id=0)
    assert hasattr(model, "not_captured") == (kind in STEP_BY_STEP)


@torch.no_grad()
def test_log_probabilities_are_those_of_the_cpu(base):
    """Padding and fused attention: to 1e-4 in float32."""
    logits = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model = utils.load_causal_lm(base.plain, device)
        ids, mask = encoding.pad(PROMPTS, 0, "right", device)
        logits.append(target_logits(model, ids, mask.bool())[0].cpu())
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_three_stages_run(sft, reward_model, ppo, dtype, tmp_path):
    """From one to the next; the KL starts at 0 and the ratio at 1."""
    flags = {"device": "cuda", "dtype": dtype}
    first = str(sft(tmp_path / "sft", **flags))
    judge = str(reward_model(tmp_path / "reward_model", model=first, **flags))
    out = ppo(tmp_path / "ppo", model=first, reward_model=judge, **flags)
    rows = metrics_of(out)
    assert abs(rows[0]["objective/kl"]) < 1e-3
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-3
    if dtype == "auto":
        native = torch.cuda.get_device_capability() >= (8, 0)
        assert args_of(out)["dtype"] == ("bfloat16" if native else "float32")
