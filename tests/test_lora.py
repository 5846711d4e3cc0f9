"""LoRA: adapters on frozen weights in all three stages; in PPO three models share one base."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from conftest import (
    MODULES,
    ROOT,
    STAGES,
    assert_same_run,
    change_config,
    metrics_of,
    plain_logprobs,
    rollouts_of,
)
from test_distributed import DRIVER, launch
from test_resume import FLAGS, assert_same_records, flags_of, in_step, killed_again_and_again

import encoding
import lora
import saving
import utils

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own

LORA = {"lora_rank": 4, "lora_alpha": 16.0, "learning_rate": 1e-2}
plain_lm = transformers.AutoModelForCausalLM.from_pretrained
CPU, IDS = torch.device("cpu"), torch.arange(10, 40).view(2, 15)


def args_for(model, **flags) -> SimpleNamespace:
    """What lora.py reads of a stage's flags."""
    flags = {"model": str(model), "dtype": "float32", "value_model": None} | flags
    return SimpleNamespace(lora_target="all-linear", **LORA | flags)


@torch.no_grad()
def logits(model, dtype: str = "float32") -> torch.Tensor:
    with utils.autocast(CPU, dtype):
        return utils.logits_of(model, utils.hidden_states(model, IDS).flatten(0, 1))


@torch.no_grad()
def values(model) -> torch.Tensor:
    return utils.head_outputs(model, utils.hidden_states(model, IDS))


@pytest.fixture(scope="module")
def chain(sft, reward_model, ppo, models, base, tmp_path_factory) -> SimpleNamespace:
    """All stages with adapters; `made` are the adapted models of the PPO run."""
    folder, made, adapt = tmp_path_factory.mktemp("lora"), [], lora.adapt

    def recorded(base, *args):
        made.append((base, adapt(base, *args)))
        return made[-1][1]

    learned = sft(folder / "sft", **LORA, save_every=4)
    flags = {"model": str(models.sft), "normalize_std": True, "save_every": 4}
    judge = reward_model(folder / "rm", **LORA, **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "adapt", recorded)
        flags = {"reward_model": str(judge), "save_rollouts": 1, "save_every": 1}
        out = ppo(folder / "ppo", **LORA, **flags)
    return SimpleNamespace(sft=learned, reward_model=judge, ppo=out, made=made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_adapter_off_it_is_the_base_bit_for_bit(models, dtype):
    """D43: the reference, and the policy without what it has learned, on the same weights."""
    plain = utils.load_causal_lm(str(models.sft), CPU)
    reference = utils.freeze(utils.load_causal_lm(str(models.sft), CPU), dtype)
    policy = lora.adapt(reference, args_for(models.sft, dtype=dtype))
    expected = logits(plain, dtype)
    assert torch.equal(logits(policy, dtype), expected)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    for p in trained:
        torch.nn.init.normal_(p, std=0.1)
    assert torch.equal(logits(reference, dtype), expected)
    assert not torch.allclose(logits(policy, dtype), expected, atol=0.1)
    for layer in policy.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.enable_adapters(False)
    assert torch.equal(logits(policy, dtype), expected)


def test_training_leaves_the_base_as_it_was(chain, models):
    """Policy and value function have its very tensors, none with a gradient."""
    (reference, policy), (_, value_model) = chain.made
    before = utils.load_causal_lm(str(models.sft), CPU)
    for (name, p), q in zip(before.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q) and q.grad is None and not q.requires_grad, name
    shared = {id(p) for p in reference.parameters()}
    for model in (policy, value_model):
        own = {name for name, p in model.named_parameters() if id(p) not in shared}
        assert own == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name or name == "score.weight" for name in own)
        assert sum(id(p) in shared for p in model.parameters()) == len(shared)


def test_the_reference_is_the_base_and_the_kl_starts_at_0(chain, models):
    rows, model = metrics_of(chain.ppo), plain_lm(models.sft)
    assert rows[0]["objective/kl"] == 0 != rows[1]["objective/kl"]
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-4
    rollout = rollouts_of(chain.ppo)[-1]
    for i in range(len(rollout.real)):
        expected = plain_logprobs(model, rollout.prompt(i), rollout.response(i))
        assert rollout.a["ref_logprobs"][i][rollout.real[i]] == pytest.approx(expected, abs=1e-4)


def test_the_value_function_starts_from_the_adapter_of_the_reward_model(chain, models, tmp_path):
    """Of the same base, by name or by weights; from a whole reward model, or on another, at 0."""
    base = utils.freeze(utils.load_causal_lm(str(models.sft), CPU), "float32")
    expected = values(utils.load_classifier(str(chain.reward_model), CPU))
    moved = shutil.copytree(models.sft, tmp_path / "moved")
    judge = shutil.copytree(chain.reward_model, tmp_path / "judge")
    change_config(judge / "adapter", "adapter_config.json", lora_dropout=0.5)  # off (D4)
    for name in (models.sft, moved):
        model = lora.value_on(base, args_for(name), str(judge))
        torch.testing.assert_close(values(model), expected, rtol=0, atol=1e-4)
        assert model.config.reward_mean != 0
    base.lm_head.weight.mul_(1.01)  # another model of the same shapes
    for name, start in ((models.sft, models.reward_model), (models.sft,) * 2, (moved, judge)):
        model = lora.value_on(base, args_for(name), str(start))
        assert not values(model).any() and not hasattr(model.config, "reward_mean")


def test_an_adapter_in_a_pickle_beside_a_model_is_not_read(models, tmp_path):
    """As a folder of somebody else's may hold one."""
    folder = shutil.copytree(models.sft, tmp_path / "sft")
    (folder / "adapter").mkdir()
    config = {"base_model_name_or_path": str(models.sft)}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    base = utils.load_causal_lm(str(folder), CPU)
    model = lora.value_on(base, args_for(folder), str(folder))
    assert not values(model).any()


def test_outputs_are_merged_and_adapters_are_folders_of_peft(chain, models, base):
    """Merged in float32; transformers and peft load them as their own."""
    loaded = utils.load_causal_lm(str(chain.ppo), CPU)
    torch.testing.assert_close(logits(loaded), logits(chain.made[0][1]), rtol=0, atol=1e-4)
    assert loaded.generation_config.max_new_tokens == 10  # as without adapters
    for out, start in ((chain.sft, base.plain), (chain.ppo, models.sft)):
        merged, adapter = plain_lm(out), str(out / "adapter")
        adapted = peft.PeftModel.from_pretrained(plain_lm(start), adapter)
        config = adapted.peft_config["default"]
        assert (config.r, config.lora_alpha) == (4, 16)
        a, b, c = (m(input_ids=IDS).logits for m in (merged, adapted, plain_lm(start)))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert (a - c).abs().max() > 0.05
    merged = utils.load_classifier(str(chain.reward_model), CPU)
    assert merged.config.reward_mean != 0
    assert merged.config.pad_token_id == encoding.load_tokenizer(base.plain).pad_token_id
    again = utils.load_classifier(str(chain.reward_model / "adapter"), CPU)
    assert torch.equal(merged.score.weight, again.score.weight)
    for name in ("reward_mean", "reward_std"):  # B18
        assert getattr(again.config, name) == getattr(merged.config, name)
    assert merged.config.reward_std != 1
    assert again.config.pad_token_id is None  # the base's, which may be EOS (B20)
    torch.testing.assert_close(values(merged), values(again), rtol=0, atol=1e-5)


def test_checkpoints_hold_adapters_alone_and_are_models(chain, ppo, tmp_path):
    for out, step, count in ((chain.sft, 8, 1), (chain.reward_model, 8, 1), (chain.ppo, 1, 2)):
        paths = [*(out / "checkpoint" / f"{step:06d}").glob("*model.safetensors")]
        assert len(paths) == count
        for path in paths:
            names = safetensors.torch.load_file(path)
            assert all("lora_" in name or name.endswith("score.weight") for name in names)
            assert path.stat().st_size < (out / "model.safetensors").stat().st_size / 3
    # an adapter on a checkpoint, which is an adapter
    flags = {"model": str(chain.sft / "checkpoint" / "000008"), "advantage": "batch_mean"}
    out = ppo(tmp_path / "ppo", **LORA, **flags)
    again = utils.load_causal_lm(str(out / "adapter"), CPU)
    torch.testing.assert_close(logits(again), logits(plain_lm(out)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_a_crash_between_checkpoints(request, name, monkeypatch, tmp_path):
    """Resumed, a run ends as if nothing had been, to the bit."""
    stage, flags = request.getfixturevalue(name), FLAGS[name] | LORA | {"save_every": 2}
    whole = stage(tmp_path / "whole", **flags)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        in_step(patch, 4, torch.optim.AdamW, "step", lambda *args: 1 / 0)
        stage(tmp_path / "out", **flags)
    stage(tmp_path / "out", **flags, resume=True)
    assert_same_records(whole, tmp_path / "out")


@pytest.mark.slow
def test_runs_killed_at_any_moment_continue_exactly(sft, ppo, tmp_path):
    """Also in the middle of saving checkpoints and the merged model."""
    moments, plan, whole = ["checkpoint/*.part", None, "model.part"], [], {}
    for name, stage in (("sft", sft), ("ppo", ppo)):
        whole[name] = stage(tmp_path / f"whole_{name}", **FLAGS[name], lora_rank=4)
        flags = flags_of(whole[name]) | {"output_dir": str(tmp_path / name)}
        one = {"module": MODULES[name], "flags": flags, "moments": moments, "seconds": 0.7}
        plan.append(one)
    assert killed_again_and_again(plan, tmp_path) == [3, 3]
    for name, out in whole.items():
        assert_same_records(out, tmp_path / name)


@pytest.mark.slow
def test_compiled(sft, ppo, tmp_path):
    """--compile changes only rounding, also beside gradient checkpointing."""
    flags = {"lora_rank": 4, "epochs": 1}
    assert_same_run(sft(tmp_path / "a", **flags), sft(tmp_path / "b", **flags, compile=True), 1e-3)
    flags = {"lora_rank": 4, "gradient_checkpointing": True, "total_episodes": 8}
    assert_same_run(ppo(tmp_path / "c", **flags), ppo(tmp_path / "d", **flags, compile=True), 1e-3)


@pytest.mark.parametrize("flags", [{"gradient_checkpointing": True}, {"micro_batch_size": 2}])
def test_what_changes_only_rounding(ppo, chain, flags, tmp_path):
    flags = {"reward_model": str(chain.reward_model), **LORA} | flags
    assert_same_run(ppo(tmp_path / "out", **flags), chain.ppo, tolerance=2e-3)


def test_in_bfloat16(ppo, chain, tmp_path):
    """The base is rounded once, the adapters stay in float32; the KL starts at 0."""
    out = ppo(tmp_path / "out", reward_model=str(chain.reward_model), **LORA, dtype="bfloat16")
    assert metrics_of(out)[0]["objective/kl"] == 0


def test_two_processes_learn_what_one_does(sft, chain, models, base, data, tmp_path):
    """In PPO they sample differently, from the same adapters."""
    common = LORA | {"device": "cpu", "dtype": "float32", "micro_batch_size": 4}
    flags = common | {"model": base.plain, "dataset": data.sft, "epochs": 1, "max_length": 64}
    ppo = {"model": str(models.sft), "reward_model": str(chain.reward_model), "batch_size": 8}
    ppo |= {"dataset": data.prompts, "total_episodes": 16, "response_length": 10}
    ppo |= {"eval_prompts": 4, "critic_warmup_updates": 1, "output_dir": str(tmp_path / "ppo")}
    runs = [("sft", flags | {"output_dir": str(tmp_path / "two")}), ("ppo", common | ppo)]
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    launch(str(tmp_path / "driver.py"), str(tmp_path / "runs.json"), PYTHONPATH=str(ROOT))
    assert_same_run(sft(tmp_path / "one", **flags), tmp_path / "two", tolerance=1e-5)
    first, second = metrics_of(tmp_path / "ppo")
    assert first["objective/kl"] == second["objective/kl"] == 0
    assert first["loss/value_avg"] > 0 and second["val/ratio_start_error"] < 1e-4


def test_a_base_that_is_gone_at_the_end_is_no_wrong_input(sft, base, monkeypatch, tmp_path):
    """The run has failed, code 1; 2 would say that nothing was trained."""
    folder, save_weights = shutil.copytree(base.plain, tmp_path / "base"), saving.save_weights

    def saved_and_lost(*args):
        save_weights(*args)
        shutil.rmtree(folder)

    monkeypatch.setattr(saving, "save_weights", saved_and_lost)
    with pytest.raises(SystemExit) as stopped:
        sft(tmp_path / "out", model=str(folder), save_every=0, **LORA)
    assert stopped.value.code == 1


def test_errors(refused, error_of, models, chain, monkeypatch, tmp_path):
    refused("sft", "--lora-rank", "tiny", model="tiny", **LORA)
    refused("sft", "--lora-rank", "out of range", lora_rank=-1)
    for names in ("w_x,w_y", "q_proj,vproj", "q_proj,lm_head"):
        refused("sft", "--lora-target", "no layer", **LORA, lora_target=names)
    refused("sft", "--lora-target", "embeddings", **LORA, lora_target="embed_tokens")
    refused("ppo", "--value-model", "no adapter", **LORA, value_model=str(models.reward_model))
    headless = {"model": str(models.sft), "value_model": str(chain.sft / "adapter")}
    refused("ppo", "--value-model", "no adapter", **LORA | headless)
    part = shutil.copytree(chain.reward_model / "adapter", tmp_path / "part")
    (part / "adapter_model.safetensors").unlink()
    flags = LORA | {"model": str(chain.sft), "value_model": str(part)}
    refused("ppo", str(part), "lacks adapter_model.safetensors", **flags)
    lost = change_config(part, "adapter_config.json", base_model_name_or_path="/lost/base")
    refused("ppo", "/lost/base", "holds no model", reward_model=str(lost))
    with monkeypatch.context() as patch:  # as of the hub, where no folder tells
        patch.setattr(utils, "base_of", lambda model: model)
        assert "on the hub" in error_of(utils.load_causal_lm, str(chain.sft / "adapter"), CPU)
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in STAGES:
        refused(name, "--lora-rank", "requirements-lora.txt", **LORA)
