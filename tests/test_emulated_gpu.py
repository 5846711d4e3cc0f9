"""On a GPU that is emulated (emulated_gpu.py); captured graphs are in test_architectures.py."""

import contextlib
import gc

import emulated_gpu
import pytest
import torch
from conftest import args_of, assert_same_run, make_model, metrics_of
from emulated_gpu import CPU, GPU, emulate
from test_generate import PROMPTS

import encoding
import generate
import utils

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own


def test_it_refuses_what_a_gpu_refuses():
    """So that what passes here has a meaning."""
    with emulate() as gpu:
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        assert (here.device, there.device) == (CPU, GPU)
        assert (there[1:] * 2).device == (here.to(GPU) + there * torch.tensor(2.0)).device == GPU
        assert there.cpu().device == (there > 0).to("cpu").device == CPU
        for mixes in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: there.gather(0, here.long()),
            lambda: there.numpy(),
            lambda: torch.rand(3, generator=utils.generator("cpu", 1), device=GPU) + here,
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixes()
        assert there[here.long()].device == GPU  # which is allowed
        gpu.waits.clear()
        there.sum() * there.mean()
        assert not gpu.waits
        for waits in (
            there.sum().item,
            there.tolist,
            lambda: there[there > 0],
            there.cpu,
            lambda: here.to(GPU),
            lambda: torch.tensor([1.0], device=GPU),
            lambda: there.copy_(here),
            lambda: there[[-1]],
        ):
            waits()
            assert gpu.waits.total() == 1
            gpu.waits.clear()
            with pytest.raises(RuntimeError, match="during capture"):
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    waits()


def test_its_graphs_are_those_of_a_gpu():
    """Nothing runs at the capture; memory and Python's numbers are those of the capture."""
    with emulate():
        x, y, count = torch.zeros(4, device=GPU), torch.zeros(4, device=GPU), 1
        graph, other = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y.copy_(x[1:].sum() + count)
            x.add_(1)
        assert y.tolist() == x.tolist() == [0] * 4
        count = 100
        for _ in range(3):
            graph.replay()
        assert (x.tolist(), y.tolist()) == ([3] * 4, [7] * 4)
        x = x + 1  # elsewhere: the graph does not see it
        graph.replay()
        assert y.tolist() == [10] * 4
        with pytest.raises(RuntimeError, match="during capture"), torch.cuda.graph(other):
            x.sum().item()
        pool = graph.pool()
        with torch.cuda.graph(other, pool=pool):
            x.add_(1)
        del graph, other
        gc.collect()  # after the failed capture, on Python 3.13, they are part of a cycle
        with pytest.raises(RuntimeError, match="is gone"):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
                x.add_(1)


ALL = {  # flags of the three stages
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora_rank": 2},
}
PPO = {
    "plain": {"save_rollouts": 1, "eval_every": 1, "keep_best": True},
    "checkpointing": {"num_mini_batches": 2, "whiten_rewards": True, "kl_estimator": "k3"}
    | {"reward_clip": 2.0, "kl_target": 3.0, "top_k": 20, "top_p": 0.9, "entropy_coef": 0.01}
    | {"target_kl": 0.1, "ptx_coef": 0.1},
    "lora": {"advantage": "grpo", "samples_per_prompt": 2},
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_three_stages_are_as_on_the_cpu(
    kind, dtype, sft, reward_model, ppo, data, rewards, tmp_path
):
    """Weights and metrics, in float32; no tensor is where another is not."""
    runs = {}
    for device in ("cpu", "cuda"):
        flags, out = ALL[kind] | {"device": device, "dtype": dtype}, tmp_path / device
        with emulate() if device == "cuda" else contextlib.nullcontext():
            first = sft(out / "sft", **flags)
            judge = reward_model(out / "reward_model", model=str(first), **flags)
            flags |= {"model": str(first), "reward_model": (str(judge),)} | PPO[kind]
            if kind == "checkpointing":
                flags |= {"reward_fn": (f"{rewards}:length",), "ptx_dataset": data.sft}
            runs[device] = first, judge, ppo(out / "ppo", **flags)
    assert args_of(runs["cuda"][2])["device"] == "cuda"
    if dtype == "float32":
        for on_cpu, on_gpu in zip(*runs.values(), strict=True):
            assert_same_run(on_cpu, on_gpu, 1e-5)
    rows = metrics_of(runs["cuda"][2])
    assert abs(rows[0]["objective/kl"]) < 1e-5
    # of two mini-batches the micro-batches are other ones than the rollout's, and so is rounding
    rounding = 1e-3 if dtype == "bfloat16" and kind == "checkpointing" else 1e-5
    assert max(row["val/ratio_start_error"] for row in rows) < rounding


def test_the_cpu_does_not_wait_for_a_forward_pass(ppo, tmp_path):
    """Nor for a token: it asks once in 32 which rows have ended."""
    with emulate() as gpu:
        ppo(tmp_path / "ppo", device="cuda", response_length=64, eval_prompts=8)
    inside = ("last_hidden_state", "logits_of", "choose_token", "head_outputs", "masked_sum")
    lines = [line for line in gpu.waits if "outputs = body(" not in line]  # transformers' own
    assert not [line for line in lines if any(name in line for name in inside)]
    sampled, checked = 4, 7  # two evaluations, two updates; tokens of `check`
    assert 0 < gpu.waits["decode: going = int(alive.sum())"] - checked <= 2 * sampled


@torch.no_grad()
def test_a_model_that_cannot_be_captured_is_decoded_step_by_step(tokenizer, monkeypatch, capsys):
    """One that asks the device something: it is tried and said once, the tokens are the same."""
    model, results = make_model(tokenizer, attn_implementation="sdpa"), []
    layer, asks, tries, Graph = model.model.layers[0], [], [], emulated_gpu.Graph
    monkeypatch.setattr(generate, "COLUMNS", 4)  # several shapes
    with emulate() as gpu, monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", lambda: tries.append(Graph()) or tries[-1])
        model.to(GPU)
        for ask in (False, True):
            if ask:
                assert len(tries) > 2
                tries.clear()
                layer.register_forward_pre_hook(lambda *_: asks.append(layer.state.sum().item()))
                layer.state = torch.ones(2, device=GPU)
            ids, mask = encoding.pad(PROMPTS, 0, "left", GPU)
            uniform = generate.random_numbers(len(ids), 50, utils.generator(GPU, 5))
            results += generate.generate(model, ids, mask, uniform, [1], pad_id=0, stride=8)
        assert len(gpu.graphs) > 0
        assert len(tries) == 1
        assert not gpu.underway
    ids, mask, again, mask_again = (x.cpu() for x in results)
    assert torch.equal(ids, again) and torch.equal(mask, mask_again)
    assert hasattr(model, "not_captured")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["decoding goes without a CUDA graph, slowly"]
    assert "when stream is capturing" in said[0]  # the cause
    assert len(asks) >= 50
