"""Every family of language models that people use, as a tiny random one built from its configuration."""

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tokenizer, metrics_of, plain_lm, save_pair, summary_of, target_logits
from transformers import AutoConfig, AutoModelForCausalLM

import dataset
import generate
import utils

CPU = torch.device("cpu")
PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41], [50]]

WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
ROPE = WIDTH | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1},
    "gpt_neox": WIDTH | {"intermediate_size": 64, "max_position_embeddings": 128},
    "llama": ROPE,
    "mistral": ROPE | {"sliding_window": 4},  # shorter than the sequences
    "qwen2": ROPE,
    "qwen3": ROPE | {"head_dim": 8},
    "gemma2": ROPE | GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": ROPE | GEMMA,
    "phi3": ROPE,
    "opt": WIDTH
    | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.1},
    "falcon": WIDTH | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon-alibi": WIDTH
    | {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "olmo2": ROPE,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> str:
    """The folder of a random model of the family, with a tokenizer."""
    tokenizer = make_tokenizer()
    # untied: a random model would else repeat its last token
    special = {
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    kind = request.param.removesuffix("-alibi")
    # rows to spare, as most models have: the tokenizer class of some families adds a token of its own
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer) + 4, **special, **FAMILIES[request.param]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # some are born with the same logits everywhere
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=0.2)
    return save_pair(tmp_path_factory.mktemp(request.param) / "model", model, tokenizer)


@torch.no_grad()
def test_padding_changes_nothing(family):
    """B10: log-probabilities and scores of a sequence alone, and beside others with padding that no mask tells of."""
    model, classifier = utils.load_causal_lm(family, CPU), utils.load_classifier(family, CPU)
    classifier.score.weight.normal_()
    plain = AutoModelForCausalLM.from_pretrained(family, attn_implementation="eager")
    for row, prompt in enumerate(PROMPTS):
        alone = plain(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        scores = classifier.score(
            classifier.base_model(input_ids=torch.tensor([prompt])).last_hidden_state
        )[0, :, 0]
        for width in (0, 30):
            ids, mask = dataset.pad(PROMPTS, 0, "right", CPU, width)
            is_target = mask.bool() & (torch.arange(len(PROMPTS)) == row)[:, None]
            logits, tokens = target_logits(model, ids, is_target)
            assert tokens.tolist() == prompt[1:]
            torch.testing.assert_close(logits.log_softmax(-1), alone[:-1], rtol=0, atol=1e-5)
            values = utils.head_outputs(classifier, ids)[row][mask[row].bool()]
            torch.testing.assert_close(values, scores, rtol=0, atol=1e-5)


@torch.no_grad()
def test_frozen_in_bfloat16_they_compute_the_same(family):
    """Half the memory and not a bit's difference: the KL of the first update stays 0."""
    ids, mask = dataset.pad(PROMPTS, 0, "right", CPU)
    is_target = mask.bool()
    for load in (utils.load_causal_lm, utils.load_classifier):
        model, frozen = load(family, CPU), utils.freeze(load(family, CPU), "bfloat16")
        for each in (model, frozen):
            if load is utils.load_classifier:
                each.score.weight.fill_(0.1)
        assert sum(p.nbytes for p in frozen.parameters()) < sum(
            p.nbytes for p in model.parameters()
        )
        with utils.autocast(CPU, "bfloat16"):
            if load is utils.load_causal_lm:
                a, b = (target_logits(each, ids, is_target)[0] for each in (model, frozen))
            else:
                a, b = (utils.last_token_scores(each, ids, mask) for each in (model, frozen))
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_without_a_look_at_the_device_is_the_same(family, dtype):
    """In strides of 8 tokens, over columns of the cache that are not written yet: as on CUDA, without the graph."""
    model = utils.load_causal_lm(family, CPU)
    ids, mask = dataset.pad(PROMPTS * 3, 0, "left", CPU)
    results = []
    for stride in (1, 8):
        with utils.autocast(CPU, dtype):
            rng = utils.generator(CPU, 1)
            results.append(
                generate.generate(model, ids, mask, 20, [1, 2, 3, 4, 5], 0, rng=rng, stride=stride)
            )
    (a, a_mask), (b, b_mask) = results
    assert a_mask.sum(1).unique().numel() > 2  # rows end at different times, and some are dropped
    if dtype == "float32":
        assert torch.equal(a, b) and torch.equal(a_mask, b_mask)
    else:  # where two tokens are nearly as probable, rounding may choose the other
        assert (a == b).all(1).float().mean() > 0.5


@torch.no_grad()
def test_greedy_decoding_is_that_of_transformers(family):
    """D2: token for token, over prompts of different lengths padded on the left."""
    model = utils.load_causal_lm(family, CPU)
    ids, mask = dataset.pad(PROMPTS, 0, "left", CPU)
    got, _ = generate.generate(model, ids, mask, 20, [1], 0, temperature=0)
    flags = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 1, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **flags)[:, ids.shape[1] :]
    width = expected.shape[1]
    assert torch.equal(got[:, :width], expected)
    assert len(set(got[2].tolist())) > 2
    for row, prompt in zip(got, PROMPTS, strict=True):
        alone = model.generate(input_ids=torch.tensor([prompt]), **flags)[0, len(prompt) :]
        assert row[: len(alone)].tolist() == alone.tolist()


@torch.no_grad()
def test_sampled_tokens_have_the_probabilities_of_teacher_forcing(family):
    """B11: drawn step by step over the cache, and asked about afterwards in one forward pass."""
    model = utils.load_causal_lm(family, CPU)
    ids, mask = dataset.pad(PROMPTS, 0, "left", CPU)
    sample, keep, live, drawn = (
        generate.sample,
        generate.KeyValueCache.keep,
        torch.arange(len(ids)),
        torch.zeros(len(ids), 0),
    )

    def recorded(logits, *args):
        nonlocal drawn
        token = sample(logits, *args)
        drawn = F.pad(drawn, (0, 1))
        drawn[live, -1] = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
        return token

    def recorded_keep(cache, rows):
        nonlocal live
        live = live[rows]
        keep(cache, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "sample", recorded)
        patch.setattr(generate.KeyValueCache, "keep", recorded_keep)
        got, got_mask = generate.generate(model, ids, mask, 15, [1], 0, rng=utils.generator(CPU, 1))
    responses = [row[real.bool()].tolist() for row, real in zip(got, got_mask, strict=True)]
    whole, _ = dataset.pad(
        [p + r for p, r in zip(PROMPTS, responses, strict=True)], 0, "right", CPU
    )
    is_target = torch.zeros_like(whole).bool()
    for row, prompt in enumerate(PROMPTS):
        is_target[row, len(prompt) : len(prompt) + len(responses[row])] = True
    logits, tokens = target_logits(model, whole, is_target)
    expected = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(
        drawn[got_mask[:, : drawn.shape[1]].bool()], expected, rtol=0, atol=1e-5
    )


def test_the_three_stages_run(family, sft, reward_model, ppo, tmp_path):
    """From this model: the loss falls, the KL starts at 0, the ratio at 1."""
    first = sft(tmp_path / "sft", model=family)
    losses = [row["loss"] for row in metrics_of(first)]
    assert losses[-1] < losses[0]
    judge = reward_model(tmp_path / "reward_model", model=str(first))
    assert summary_of(judge)["accuracy"] > 0.5
    out = ppo(
        tmp_path / "ppo", model=str(first), reward_model=str(judge), gradient_checkpointing=True
    )
    rows = metrics_of(out)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-5
    plain_lm(out)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, flags", [("granite", {"logits_scaling": 3.0}), ("cohere", {"logit_scale": 0.25})]
)
def test_what_some_do_after_the_output_head(kind, flags, tmp_path, capsys, monkeypatch):
    """D8: logits at the targets are the model's own; one that does something unknown is refused."""
    config = AutoConfig.for_model(
        kind, vocab_size=400, pad_token_id=0, eos_token_id=1, bos_token_id=None, **ROPE | flags
    )
    folder = save_pair(
        tmp_path / "model", AutoModelForCausalLM.from_config(config), make_tokenizer()
    )
    model = utils.load_causal_lm(folder, CPU)
    ids, mask = dataset.pad(PROMPTS, 0, "right", CPU)
    logits, _ = target_logits(model, ids, mask.bool())
    own = model(input_ids=ids, attention_mask=mask).logits[:, :-1][mask[:, 1:].bool()]
    torch.testing.assert_close(logits, own, rtol=0, atol=1e-5)
    monkeypatch.setattr(
        utils, "logits_of", lambda model, hidden: model.get_output_embeddings()(hidden).float()
    )
    with pytest.raises(SystemExit) as exit_:
        utils.load_causal_lm(folder, CPU)
    assert exit_.value.code == 2
    assert "does something unknown to its logits" in capsys.readouterr().err


def test_on_a_gpu_attention_is_fused_where_the_architecture_has_it(tmp_path, monkeypatch):
    """Gemma 2 has not, for its logits are capped; it is loaded all the same."""
    asked, original = [], utils.from_pretrained

    def recorded(auto_class, model, **kwargs):
        asked.append(kwargs["attn_implementation"])
        return original(auto_class, model, **kwargs)

    monkeypatch.setattr(utils, "from_pretrained", recorded)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda model, *device: model
    )  # there is no GPU to move to
    for kind, expected in (("gemma2", "eager"), ("llama", "sdpa")):
        config = AutoConfig.for_model(kind, vocab_size=400, pad_token_id=0, **ROPE | GEMMA)
        folder = save_pair(
            tmp_path / kind, AutoModelForCausalLM.from_config(config), make_tokenizer()
        )
        given = (AutoModelForCausalLM, folder, torch.device("cuda"))
        assert utils.load_model(*given).config._attn_implementation == expected
    assert asked == [None, None]


def test_a_model_without_keys_and_values_is_refused(tmp_path, capsys):
    """Mamba takes no cache of them: decoding would sample nonsense."""
    from transformers import MambaConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.5}
    config = MambaConfig(vocab_size=400, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    folder = save_pair(
        tmp_path / "mamba", AutoModelForCausalLM.from_config(config), make_tokenizer()
    )
    with pytest.raises(SystemExit) as exit_:
        utils.load_causal_lm(folder, CPU)
    assert exit_.value.code == 2
    assert "cannot be decoded from keys and values" in capsys.readouterr().err


def test_a_reward_model_that_sees_later_tokens_is_refused(tmp_path, capsys):
    """Padding on the right would change its scores."""
    from transformers import Gemma3TextConfig, Gemma3TextForSequenceClassification

    sizes = ROPE | {"head_dim": 8, "use_bidirectional_attention": True, "sliding_window": 16}
    config = Gemma3TextConfig(vocab_size=400, pad_token_id=0, eos_token_id=1, num_labels=1, **sizes)
    torch.manual_seed(0)
    folder = save_pair(
        tmp_path / "model", Gemma3TextForSequenceClassification(config), make_tokenizer()
    )
    with pytest.raises(SystemExit) as exit_:
        utils.load_classifier(folder, CPU)
    assert exit_.value.code == 2
    assert "its tokens see later ones" in capsys.readouterr().err


def test_positions_count_from_0_where_a_model_would_count_otherwise():
    """A RoBERTa that decodes starts at its pad token's id plus 1; sampling does not, so learning must not."""
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = RobertaConfig(
        vocab_size=400, pad_token_id=1, is_decoder=True, max_position_embeddings=64, **sizes
    )
    torch.manual_seed(0)
    model = RobertaForCausalLM(config).eval()
    ids, mask = dataset.pad(PROMPTS, 1, "right", CPU)
    with torch.no_grad():
        own = model(**utils.model_inputs(model, ids, mask)).logits
        torch.testing.assert_close(
            model(**utils.model_inputs(model, ids)).logits[mask.bool()], own[mask.bool()]
        )
