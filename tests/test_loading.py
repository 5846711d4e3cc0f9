"""B41 to B44, B46: what the libraries load otherwise than it was trained."""

import importlib.util
import json
import re

import pytest
import safetensors.torch
import tokenizers
import torch
from conftest import change_config, make_model, make_tokenizer, plain_lm, save_pair
from tokenizers import decoders, pre_tokenizers, trainers

import encoding
import saving
import utils

CPU, IDS = torch.device("cpu"), torch.arange(10, 40).view(2, 15)
TEXTS = ("Steps:\n\n1. First\n\n2. Then", "of  4", " in 1984 the\n5", "a<|end|>b")


def words_and_digits(folder, kind: str, model_type: str) -> tokenizers.Tokenizer:
    """A tokenizer whose file splits digits, as SmolLM2's and StarCoder2's, called by a class."""
    written = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    written.decoder = decoders.ByteLevel()
    written.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    special = {"special_tokens": ["<|end|>"], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=byte_level.alphabet(), **special)
    written.train_from_iterator(["Steps:\n\n1. First\n\n2. Then\n\n    3 of  4"] * 50, trainer)
    written.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": kind, "eos_token": "<|end|>", "unk_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    config = {"model_type": model_type, "vocab_size": 330}
    (folder / "config.json").write_text(json.dumps(config))
    return written


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("GPT2Tokenizer", "llama"), ("PreTrainedTokenizerFast", "qwen2"), ("LlamaTokenizer", "llama")],
)
def test_b41_a_tokenizer_is_that_of_its_file(tmp_path, kind, model_type):
    """Whatever class it is called by; also once it was saved again."""
    written = words_and_digits(tmp_path, kind, model_type)
    for folder in (tmp_path, tmp_path / "saved"):
        tokenizer = encoding.load_tokenizer(str(folder))
        for text in TEXTS:
            assert tokenizer(text).input_ids == written.encode(text).ids
            assert tokenizer.decode(tokenizer(text).input_ids) == text
        tokenizer.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_text((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("legacy", [True, None])
def test_b41_a_tokenizer_of_sentencepiece_alone(tmp_path, legacy):
    """As of OpenLLaMA and Vicuna, whose folders have no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = ["two  figs", " a   fig in  1984", "a\tfig\n  and  Two", "    4 figs"] * 50
    as_llama = {"model_type": "bpe", "byte_fallback": True, "split_digits": True}
    as_llama |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    as_llama |= {"allow_whitespace_only_pieces": True, "hard_vocab_limit": False}
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=prefix, vocab_size=330, **as_llama
    )
    written = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    names = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": legacy}
    names |= {"bos_token": "<s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    config = {"model_type": "llama", "vocab_size": 330}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for folder in (tmp_path, tmp_path / "saved"):
        tokenizer = encoding.load_tokenizer(str(folder))
        for text in (*texts[:4], *TEXTS[:3]):
            assert tokenizer(text).input_ids == [1, *written.encode(text)]
        tokenizer.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_text((tmp_path / "config.json").read_text())


def test_b41_special_tokens_that_only_the_class_names(tmp_path):
    """As of GPT-2 itself, whose tokenizer_config.json has none."""
    written = words_and_digits(tmp_path, "GPT2Tokenizer", "gpt2")
    vocabulary = written.to_str().replace("<|end|>", "<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = encoding.load_tokenizer(str(tmp_path))
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer(TEXTS[0]).input_ids == written.encode(TEXTS[0]).ids


@pytest.mark.parametrize(("in_file", "asked"), [(False, True), (True, False), (True, None)])
def test_b46_whether_texts_begin_with_bos(tmp_path, in_file, asked):
    """Llama's class asked the flag before the file; also once it was saved again."""
    words_and_digits(tmp_path, "LlamaTokenizerFast", "llama")
    flag = {} if asked is None else {"add_bos_token": asked}
    change_config(tmp_path, "tokenizer_config.json", bos_token="<|end|>", **flag)
    if in_file:
        start = [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}]
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        names = {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}}
        processor = {"type": "TemplateProcessing", "single": start + text, "pair": start + text}
        processor |= {"special_tokens": names}
        change_config(tmp_path, "tokenizer.json", post_processor=processor)
    begins = in_file if asked is None else asked
    for folder in (tmp_path, tmp_path / "saved"):
        tokenizer = encoding.load_tokenizer(str(folder))
        assert [ids[0] == 0 for ids in tokenizer([*TEXTS]).input_ids] == [begins] * len(TEXTS)
        text = encoding.Rendered(["Steps:", " 1"], False)
        assert (encoding.encode_ids(tokenizer, [text])[0][0] == 0) == begins
        tokenizer.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "config.json").write_text((tmp_path / "config.json").read_text())


def test_what_is_said_of_a_template_with_todays_date(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{{ messages }}"
    encoding.load_tokenizer(save_pair(tmp_path, make_model(tokenizer), tokenizer))
    assert "writes today's date" in capsys.readouterr().out


def test_b42_biases_that_the_configuration_does_not_name(tmp_path, error_of):
    tokenizer = make_tokenizer()
    folder = save_pair(tmp_path, make_model(tokenizer, attention_bias=True), tokenizer)
    assert utils.load_causal_lm(folder, CPU)
    change_config(tmp_path, attention_bias=False)
    line = error_of(utils.load_causal_lm, folder, CPU)
    assert re.search(r"self_attn\.[qkvo]_proj\.bias is ignored", line)


def test_b42_other_weights_may_be_there(tmp_path, models):
    """A head of another use, or what old versions wrote for each layer."""
    utils.load_classifier(models.sft, CPU)
    utils.load_causal_lm(models.reward_model, CPU)
    tokenizer = make_tokenizer()
    folder = save_pair(tmp_path, make_model(tokenizer), tokenizer)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.bias"):
        weights[name] = torch.ones(4)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert utils.load_causal_lm(folder, CPU)


def adapted(folder, tokenizer, **config) -> torch.Tensor:
    """Write an adapter of a model with tied weights; the adapted model's logits."""
    peft = pytest.importorskip("peft")
    base = plain_lm(save_pair(folder / "base", make_model(tokenizer), tokenizer))
    config |= {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p) * p.requires_grad)
        model.save_pretrained(folder / "adapter")
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore")  # peft's own, which say that it will go wrong
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_b43_an_adapter_of_one_of_two_tied_weights(tmp_path, error_of, name):
    """Merged, it would change the other too."""
    adapted(tmp_path, make_tokenizer(), target_modules=["q_proj", name])
    line = error_of(utils.load_causal_lm, str(tmp_path / "adapter"), CPU)
    assert "tied_target_modules" in line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_b43_an_adapter_that_holds_tied_weights_whole(tmp_path, names):
    """They are two from then on, in a checkpoint and in the final model too."""
    tokenizer = make_tokenizer()
    expected = adapted(tmp_path, tokenizer, target_modules=["q_proj"], modules_to_save=names)
    loaded = utils.load_causal_lm(str(tmp_path / "adapter"), CPU)
    saving.save_weights(loaded, tmp_path / "adapter")
    checkpoint, final = tmp_path / "checkpoint", tmp_path / "final"
    checkpoint.mkdir()
    saving.save_weights(loaded, checkpoint)
    final.mkdir()
    saving.save_model(loaded, tokenizer, final)
    for model in (loaded, plain_lm(checkpoint), plain_lm(final)):
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


REMOTE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class Rotary(nn.Module):
    def __init__(self, size):
        super().__init__()
        frequencies = 10000.0 ** -(torch.arange(0, size, 2) / size)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, x, position_ids):
        angles = position_ids[:, :, None] * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = Rotary(config.hidden_size // config.num_attention_heads)
"""


def test_b44_buffers_of_a_model_with_code_of_its_own(tmp_path, monkeypatch):
    """Rotary frequencies that its files do not hold are those of its code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(utils, "remote_code", True)
    monkeypatch.syspath_prepend(tmp_path / "hub")
    (tmp_path / "own_code.py").write_text(REMOTE)
    spec = importlib.util.spec_from_file_location("own_code", tmp_path / "own_code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer, folder = make_tokenizer(), tmp_path / "model"
    config = make_model(tokenizer).config.to_dict() | {"model_type": "own"}
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    made = module.OwnForCausalLM(module.OwnConfig(**config)).eval()
    save_pair(folder, made, tokenizer)
    (folder / "own_code.py").write_text(REMOTE)
    change_config(folder, auto_map=names)
    junk = [torch.full((n,), 7.7) for n in (2, 4, 8, 16)] * 50  # memory that is not 0 by chance
    del junk
    loaded = utils.load_causal_lm(str(folder), CPU)
    assert loaded.model.rotary_emb.inv_freq.tolist() == made.model.rotary_emb.inv_freq.tolist()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, made(IDS).logits)


def test_a_tokenizer_that_needs_sentencepiece(tmp_path, error_of):
    """Where it is not there, transformers takes the file for one of tiktoken and names that."""

    class Fails:
        @staticmethod
        def from_pretrained(*_, **__):
            raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    (tmp_path / "config.json").write_text("{}")
    assert "pip install sentencepiece" in error_of(utils.from_pretrained, Fails, str(tmp_path))
