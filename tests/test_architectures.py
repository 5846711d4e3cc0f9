"""Every family of language models that people use, as a random one built from its configuration."""

import json
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_tokenizer, metrics_of, plain_lm, save_pair, summary_of, target_logits
from emulated_gpu import GPU, emulate

import distributed
import encoding
import generate
import utils

CPU = torch.device("cpu")
PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41], [50]]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
WIDTH = SIZES | {"num_attention_heads": 4, "initializer_range": 0.1}
ROPE = WIDTH | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT2 = {"n_layer": 2, "n_head": 4, "initializer_range": 0.1}
OPT = WIDTH | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
GEMMA = ROPE | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
BOTH_WAYS = GEMMA | {"use_bidirectional_attention": True, "sliding_window": 16}
FALCON = WIDTH | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
GEMMA4 = GEMMA | {"global_head_dim": 16, "num_hidden_layers": 6, "hidden_size_per_layer_input": 8}
GEMMA4 |= {"vocab_size_per_layer_input": 404, "num_kv_shared_layers": 0}
ALIBI = {"alibi": True, "multi_query": False, "new_decoder_architecture": False}
FAMILIES = {  # some with dropout, which OPT has in flags of its own and not in modules (D4)
    "gpt2": GPT2 | {"n_embd": 32, "n_positions": 128, "resid_pdrop": 0.5},
    "gpt_neox": WIDTH | {"intermediate_size": 64, "max_position_embeddings": 128},
    "llama": ROPE | {"attention_dropout": 0.5},
    "mistral": ROPE | {"sliding_window": 4},  # shorter than the sequences
    "qwen2": ROPE | {"num_key_value_heads": 1},
    "qwen3": ROPE | {"head_dim": 8},
    "gemma2": GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": GEMMA,
    "phi3": ROPE,
    "opt": OPT | {"init_std": 0.1, "dropout": 0.5, "layerdrop": 0.5, "attention_dropout": 0.5},
    "falcon": FALCON | {"hidden_dropout": 0.5},
    "falcon-alibi": WIDTH | ALIBI,
    "bloom": GPT2 | {"hidden_size": 32},
    "olmo2": ROPE,
}
STEP_BY_STEP = ("falcon",)  # not captured: its `qkv[:, :, :, [-2]]` copies a number to the device


def make_random(kind: str, folder, **config) -> str:
    """The folder of a random language model with a tokenizer."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    # rows to spare, as most models have: some families' tokenizers add a token of their own
    config = transformers.AutoConfig.for_model(kind, vocab_size=404, **special, **config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # some are born with the same logits everywhere
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=0.2)
    return save_pair(folder / "model", model, make_tokenizer())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> str:
    """The folder of a random model of the family."""
    kind, folder = request.param.removesuffix("-alibi"), tmp_path_factory.mktemp(request.param)
    # untied: a random model would else repeat its last token
    return make_random(kind, folder, tie_word_embeddings=False, **FAMILIES[request.param])


@torch.no_grad()
def test_padding_changes_nothing(family):
    """B10: log-probabilities and scores are those of a sequence without others or padding."""
    model, classifier = utils.load_causal_lm(family, CPU), utils.load_classifier(family, CPU)
    classifier.score.weight.normal_()
    plain = plain_lm(family)  # with the attention of ours: Falcon's kinds disagree about ALiBi
    for row, prompt in enumerate(PROMPTS):
        prompt_ids = torch.tensor([prompt])
        expected = plain(input_ids=prompt_ids).logits[0].log_softmax(-1)
        scores = classifier.score(classifier.base_model(prompt_ids).last_hidden_state)[0, :, 0]
        for width in (0, 30):
            ids, mask = encoding.pad(PROMPTS, 0, "right", CPU, width)
            is_target = mask.bool() & (torch.arange(len(PROMPTS)) == row)[:, None]
            logits, tokens = target_logits(model, ids, is_target)
            assert tokens.tolist() == prompt[1:]
            torch.testing.assert_close(logits.log_softmax(-1), expected[:-1], rtol=0, atol=1e-5)
            values = utils.head_outputs(classifier, utils.hidden_states(classifier, ids)[row])
            torch.testing.assert_close(values[mask[row].bool()], scores, rtol=0, atol=1e-5)


@torch.no_grad()
def test_frozen_in_bfloat16_they_compute_the_same(family):
    """Less memory and not a bit's difference: the KL of the first update stays 0."""
    ids, mask = encoding.pad(PROMPTS, 0, "right", CPU)
    for load in (utils.load_causal_lm, utils.load_classifier):
        both = [load(family, CPU), utils.freeze(load(family, CPU), "bfloat16")]
        sizes = [sum(p.nbytes for p in each.parameters()) for each in both]
        assert sizes[1] < sizes[0] or both[0].config.model_type == "gpt2"  # its products are Conv1D
        with utils.autocast(CPU, "bfloat16"):
            if load is utils.load_causal_lm:
                a, b = (target_logits(each, ids, mask.bool())[0] for each in both)
            else:
                for each in both:
                    each.score.weight.fill_(0.1)
                a, b = (utils.last_token_scores(each, ids, mask) for each in both)
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_without_a_look_at_the_device_is_the_same(family, dtype):
    """In strides of 8 tokens, over cache columns that are not written yet: as on CUDA."""
    model, results = utils.load_causal_lm(family, CPU), []
    ids, mask = encoding.pad(PROMPTS * 3, 0, "left", CPU)
    for stride in (1, 8):
        uniform = generate.random_numbers(len(ids), 20, utils.generator(CPU, 1))
        flags = {"pad_id": 0, "stride": stride}
        with utils.autocast(CPU, dtype):
            results.append(generate.generate(model, ids, mask, uniform, [1, 2, 3, 4, 5], **flags))
    (a, a_mask), (b, b_mask) = results
    assert a_mask.sum(1).unique().numel() > 2  # rows end at different times, some are dropped
    if dtype == "float32":
        assert torch.equal(a, b)
        assert torch.equal(a_mask, b_mask)
    else:  # where two tokens are nearly as probable, rounding may choose the other
        assert (a == b).all(1).float().mean() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_decode_the_same(family, dtype, monkeypatch, request):
    """A graph for each number of rows and of columns, on an emulated GPU."""
    monkeypatch.setattr(generate, "COLUMNS", 4)
    model, results, flags = utils.load_causal_lm(family, CPU), [], {"pad_id": 0, "stride": 8}
    with emulate() as gpu:
        model.to(GPU)
        ids, mask = encoding.pad(PROMPTS * 3, 0, "left", GPU)
        for captured in (False, True):
            if not captured:
                model.not_captured = None
            uniform = generate.random_numbers(len(ids), 36, utils.generator(GPU, 1))
            given = (model, ids, mask, uniform, [1, 2, 3, 4, 5])
            graphs = len(gpu.graphs)
            with utils.autocast(GPU, dtype):
                results += generate.generate(*given, **flags)
            can = request.node.callspec.params["family"] not in STEP_BY_STEP
            assert (len(gpu.graphs) - graphs > 2) == (captured and can)
            if not captured:
                del model.not_captured
            assert hasattr(model, "not_captured") == (captured and not can)
    a, a_mask, b, b_mask = (x.cpu() for x in results)
    assert a_mask.sum(1).unique().numel() > 2  # rows end at different times, some are dropped
    assert torch.equal(a, b)
    assert torch.equal(a_mask, b_mask)


def test_memory_for_heads_of_several_sizes(tmp_path, monkeypatch):
    """A cache holds what each layer needs: Gemma 4 has wide heads in some."""
    model = utils.load_causal_lm(make_random("gemma4_text", tmp_path, **GEMMA4), CPU)
    monkeypatch.setattr(distributed, "free_memory", lambda device: 2**30)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPTS[2]]), cache=cache)
    width = sum(layer.keys.shape[1] * layer.keys.shape[3] for layer in cache.layers)
    assert width > 6 * 2 * 8
    row = 2 * 4 * width * 300 + 128 * 32 * 100 + 32 * 404
    assert generate.rows_at_once(model, 100, 200) == int(0.75 * 2**30 / row)
    generate.check(model, "m")


@torch.no_grad()
def test_greedy_decoding_is_that_of_transformers(family):
    """D2: token for token, over prompts of different lengths padded on the left."""
    model = utils.load_causal_lm(family, CPU)
    ids, mask = encoding.pad(PROMPTS, 0, "left", CPU)
    uniform = generate.random_numbers(len(ids), 20)
    got, _ = generate.generate(model, ids, mask, uniform, [1], pad_id=0, temperature=0)
    flags = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 1, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **flags)[:, ids.shape[1] :]
    assert torch.equal(got[:, : expected.shape[1]], expected)
    assert len({*got[2].tolist()}) > 2
    for row, prompt in zip(got, PROMPTS, strict=True):
        one = model.generate(input_ids=torch.tensor([prompt]), **flags)[0, len(prompt) :]
        assert row[: len(one)].tolist() == one.tolist()


@torch.no_grad()
def test_sampled_tokens_have_the_probabilities_of_teacher_forcing(family, monkeypatch):
    """B11: drawn step by step over the cache, and asked about afterwards in one forward pass."""
    model = utils.load_causal_lm(family, CPU)
    ids, mask = encoding.pad(PROMPTS, 0, "left", CPU)
    sample, keep = generate.sample, transformers.Cache.batch_select_indices
    live, drawn = torch.arange(len(ids)), torch.zeros(len(ids), 0)

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

    monkeypatch.setattr(generate, "sample", recorded)
    monkeypatch.setattr(transformers.Cache, "batch_select_indices", recorded_keep)
    uniform = generate.random_numbers(len(ids), 15, utils.generator(CPU, 1))
    got, got_mask = generate.generate(model, ids, mask, uniform, [1], pad_id=0)
    responses = [row[real.bool()].tolist() for row, real in zip(got, got_mask, strict=True)]
    whole = [p + r for p, r in zip(PROMPTS, responses, strict=True)]
    whole, real = encoding.pad(whole, 0, "right", CPU)
    starts = torch.tensor([len(p) for p in PROMPTS])[:, None]
    is_target = real.bool() & (torch.arange(whole.shape[1]) >= starts)
    logits, tokens = target_logits(model, whole, is_target)
    expected = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    drawn = drawn[got_mask[:, : drawn.shape[1]].bool()]
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


def test_the_three_stages_run(family, sft, reward_model, ppo, tmp_path):
    """D4: the loss falls, the KL starts at 0, the ratio at 1, though layers are recomputed."""
    first = sft(tmp_path / "sft", model=family)
    losses = [row["loss"] for row in metrics_of(first)]
    assert losses[-1] < losses[0]
    judge = reward_model(tmp_path / "reward_model", model=str(first))
    assert summary_of(judge)["accuracy"] > 0.5
    flags = {"model": str(first), "reward_model": str(judge), "gradient_checkpointing": True}
    rows = metrics_of(out := ppo(tmp_path / "ppo", **flags))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-5
    plain_lm(out)


SCALES = {"granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.25}}


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALES)
def test_what_some_do_after_the_output_head(kind, tmp_path, error_of, monkeypatch):
    """D8: logits are the model's own; one that does something unknown to them is refused."""
    folder = make_random(kind, tmp_path, **ROPE | SCALES[kind])
    model = utils.load_causal_lm(folder, CPU)
    ids, mask = encoding.pad(PROMPTS, 0, "right", CPU)
    logits, _ = target_logits(model, ids, mask.bool())
    own = model(input_ids=ids, attention_mask=mask).logits[:, :-1][mask[:, 1:].bool()]
    torch.testing.assert_close(logits, own, rtol=0, atol=1e-5)
    head_only = lambda model, hidden: model.get_output_embeddings()(hidden).float()  # noqa: E731
    monkeypatch.setattr(utils, "logits_of", head_only)
    line = error_of(utils.load_causal_lm, folder, CPU)
    assert "does something unknown to its logits" in line


MIXTURES = {  # whose routers are linear layers that return several tensors
    "phimoe": ROPE | {"num_local_experts": 4},
    # its class names no base model
    "llama4_text": ROPE | {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 4},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's own
@pytest.mark.parametrize("kind", MIXTURES)
def test_adapters_of_mixtures(kind, sft, ppo, tmp_path):
    folder = make_random(kind, tmp_path, **MIXTURES[kind])
    policy = str(sft(tmp_path / "sft", model=folder, lora_rank=2))
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def f(completions, **columns):\n    return [len(c) for c in completions]\n")
    flags = {"reward_model": (), "reward_fn": f"{rewards}:f", "advantage": "rloo"}
    flags |= {"model": policy, "lora_rank": 2, "samples_per_prompt": 2}
    rows = metrics_of(ppo(tmp_path / "ppo", **flags))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert max(row["val/ratio_start_error"] for row in rows) < 1e-5
    plain_lm(tmp_path / "ppo")


def test_the_context_of_mpt(tmp_path):
    """Its configuration has another name for it."""
    folder = make_random("mpt", tmp_path, d_model=32, n_heads=4, n_layers=2, max_seq_len=24)
    assert utils.context_length(utils.load_causal_lm(folder, CPU)) == 24


REFUSED = [
    # takes no cache of keys and values: decoding would sample nonsense
    ("mamba", SIZES | {"state_size": 8}, utils.load_causal_lm, "state-space model"),
    # padding on the right would change its scores
    ("gemma3_text", BOTH_WAYS, utils.load_classifier, "its tokens see later ones"),
    ("gemma3_text", BOTH_WAYS, utils.load_causal_lm, "its tokens see later ones"),
]
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
LFM2 = ROPE | {"layer_types": ["conv", "full_attention"]}
UNDECODED = {
    "bart": (BART | {"init_std": 0.2, "scale_embedding": True}, "from another distribution"),
    "lfm2": (LFM2, "cannot be decoded here"),  # it keeps more than keys and values
}


@pytest.mark.parametrize(("kind", "sizes", "load", "what"), REFUSED)
def test_models_that_are_refused(kind, sizes, load, what, tmp_path, error_of):
    """One without keys and values; one whose tokens see later ones."""
    assert what in error_of(load, make_random(kind, tmp_path, **sizes), CPU)


@pytest.mark.parametrize("kind", UNDECODED)
def test_b40_models_that_would_be_decoded_wrongly(kind, tmp_path, error_of):
    """One that counts padding on the left as positions."""
    sizes, what = UNDECODED[kind]
    model = utils.load_causal_lm(make_random(kind, tmp_path, **sizes), CPU)
    with warnings.catch_warnings(action="ignore"):  # of the name of the cache
        assert what in error_of(generate.check, model, "m")


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear", "longrope"])
def test_a_configuration_as_the_hub_has_it(base, kind, tmp_path):
    """From before transformers 5: the rotation's parts at the top; its tokenizer is read too."""
    folder = shutil.copytree(base.plain, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    more = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {"short_factor": [1.0] * half, "long_factor": [2.0] * half},
    }
    rope = {"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 64}
    del config["rope_parameters"]
    config |= {"rope_theta": 10_000.0, "rope_scaling": rope | more.get(kind, {})}
    (folder / "config.json").write_text(json.dumps(config))
    assert encoding.load_tokenizer(str(folder)).pad_token_id < config["vocab_size"]
    model = utils.load_causal_lm(str(folder), CPU)
    assert model.config.rope_parameters["rope_type"] == kind


def test_b40_a_model_that_is_decoded_as_it_is_read(family):
    generate.check(utils.load_causal_lm(family, CPU), "m")


def test_b40_a_rotation_that_depends_on_the_longest_sequence(tmp_path):
    """By "longrope" it does beyond a length, which is the context's limit then."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = ROPE | {"rope_parameters": rope | {"factor": 8.0, "rope_theta": 10_000.0}}
    folder = make_random("phi3", tmp_path, **sizes, original_max_position_embeddings=16)
    model = utils.load_causal_lm(folder, CPU)
    assert utils.context_length(model) == 16
    ids, mask = encoding.pad([PROMPTS[0], [30] * 17], 0, "right", CPU)
    with torch.no_grad():
        alone, beside = (utils.hidden_states(model, x)[0, :4] for x in (ids[:1, :4], ids))
    assert not torch.allclose(alone, beside, atol=0.01)  # what the limit is against


def test_b40_quantized_weights(family, monkeypatch, error_of):
    """Of float8, as transformers keeps them on newer GPUs: they could not be trained."""
    load = utils.from_pretrained

    def quantized(*args, **kwargs):
        model, info = load(*args, **kwargs)
        model.get_input_embeddings().to(torch.float8_e4m3fn)
        return model, info

    monkeypatch.setattr(utils, "from_pretrained", quantized)
    assert "quantized" in error_of(utils.load_causal_lm, family, CPU)


@torch.no_grad()
def test_positions_count_from_0_where_a_model_would_count_otherwise():
    """RoBERTa counts from its pad token's id plus 1; sampling does not, so learning must not."""
    sizes = WIDTH | {"intermediate_size": 64, "max_position_embeddings": 64, "is_decoder": True}
    torch.manual_seed(0)
    config = transformers.RobertaConfig(vocab_size=400, pad_token_id=1, **sizes)
    model = transformers.RobertaForCausalLM(config).eval()
    ids, mask = encoding.pad(PROMPTS, 1, "right", CPU)
    masked, unmasked = (model(**utils.model_inputs(model, ids, m)).logits for m in (mask, None))
    torch.testing.assert_close(unmasked[mask.bool()], masked[mask.bool()])
