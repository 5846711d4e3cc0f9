"""generate.py; other architectures are in test_architectures.py, graphs in test_gpu.py."""

import gc
import inspect
import math
import types
import weakref
from collections import Counter

import pytest
import torch
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode

import distributed
import encoding
import generate
import utils

CPU = torch.device("cpu")
INF = float("inf")
PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33, 34, 35, 36], [40]]


def decode(model, prompts=PROMPTS, width=0, length=9, stops=(1,), pad_id=0, seed=5, **kwargs):
    """Response ids and mask."""
    ids, mask = encoding.pad(prompts, pad_id, "left", CPU, width)
    uniform = generate.random_numbers(len(ids), length, utils.generator("cpu", seed))
    return generate.generate(model, ids, mask, uniform, [*stops], pad_id=pad_id, **kwargs)


def never(model):
    """The id of a token that the model does not sample: outside its vocabulary."""
    return model.config.vocab_size


def test_a_response_ends_at_the_first_stop_token(model):
    """D16: the mask is 1 up to and including it, whichever of several it is; padding follows."""
    whole, whole_mask = decode(model, stops=[never(model)], length=12)
    assert whole_mask.all()
    one, other = whole[0, 5].item(), whole[1, 3].item()
    for stops in ([whole[0, 3].item()], [one, other]):
        ids, mask = decode(model, stops=stops, pad_id=7, length=12)
        for row, row_mask, full in zip(ids.tolist(), mask.tolist(), whole.tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(full) if token in stops), 12)
            assert row_mask == [1] * length + [0] * (12 - length)
            assert row[:length] == full[:length]
            assert set(row[length:]) <= {7}
    last = whole.gather(1, mask.sum(1, keepdim=True) - 1).flatten().tolist()
    assert {one, other} <= {*last}


def test_the_stop_token_must_be_one_token(tokenizer, error_of):
    """`eos`, or a string that the tokenizer has as one token."""
    eos = tokenizer.eos_token_id
    assert generate.stop_token_ids(tokenizer, "eos") == [eos]
    for token in ("<|end|>", "."):
        wanted = [eos, tokenizer.convert_tokens_to_ids(token)]
        assert generate.stop_token_ids(tokenizer, token) == wanted
    # to byte-level BPE these letters are names of bytes too, of which the texts are others
    assert tokenizer.get_vocab()["»"] != tokenizer("»")["input_ids"][0]
    for text in ("zebra crossing", "»"):
        assert "--stop-token" in error_of(generate.stop_token_ids, tokenizer, text)


def test_more_left_padding_changes_nothing(model):
    """B10: the same tokens, however wide the padding."""
    assert all(map(torch.equal, decode(model), decode(model, width=25)))


def test_rows_do_not_depend_on_other_rows(model):
    """A row's response is the same whatever stands in the other rows, and when those end."""
    a, _ = decode(model, stops=[never(model)])
    stop_id = a[0, 1].item()  # row 0 ends early
    alone = [row if i == 2 else [50 + i] * (i + 1) for i, row in enumerate(PROMPTS)]
    b, b_mask = decode(model, alone, stops=[stop_id])
    length = int(b_mask[2].sum())
    assert torch.equal(a[2, :length], b[2, :length])
    assert length > 1


@pytest.mark.parametrize("stride", [1, 3, 32])
def test_how_often_rows_are_dropped_changes_nothing(model, stride):
    """D16: whether ended rows stay for a while or go at once, from the device's memory too."""
    long = {"prompts": PROMPTS * 4, "length": 20, "stops": range(1, 40)}
    ids, mask = decode(model, **long, stride=1)
    assert mask.sum(1).unique().numel() > 3  # rows end at different places
    a, a_mask = decode(model, **long, stride=stride)
    assert torch.equal(a, ids)
    assert torch.equal(a_mask, mask)


@pytest.mark.parametrize("free", [1, 200_000, 1e12])
def test_rows_in_parts_are_as_the_whole(model, monkeypatch, free):
    """Where memory is short; rows have random numbers of their own. The last part is as large."""
    long = {"prompts": PROMPTS * 4, "length": 20, "stops": range(1, 40)}
    whole, sizes, one = decode(model, **long), [], generate.decode

    def recorded(model, prompt_ids, *given):
        sizes.append(len(prompt_ids))
        return one(model, prompt_ids, *given)

    monkeypatch.setattr(generate, "decode", recorded)
    monkeypatch.setattr(distributed, "free_memory", lambda device: free)
    assert all(map(torch.equal, decode(model, **long), whole))
    assert sum(sizes) == len(PROMPTS) * 4
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == {1: len(PROMPTS) * 4, 1e12: 1}.get(free, len(sizes))
    assert (len(sizes) > 1) == (free < 1e12)


@pytest.mark.parametrize("works", [True, False])
def test_steps_are_captured_once_for_each_shape(model, monkeypatch, works):
    """A graph per number of rows and bucket of columns; where it fails, steps go on as they are."""
    long = {"prompts": PROMPTS * 4, "length": 300, "stride": 8}
    stops = {"stops": [*range(1, 4)]}
    (ids, mask), shapes = decode(model, **long | stops | {"stride": 1}), []

    def capture(step, model, before):
        known = inspect.getclosurevars(step).nonlocals
        shapes.append((len(known["token"]), known["position"].end))
        return types.SimpleNamespace(replay=step) if works else None

    monkeypatch.setattr(generate, "capture", capture)
    a, a_mask = decode(model, **long | stops)
    assert torch.equal(a, ids)
    assert torch.equal(a_mask, mask)
    assert len(set(shapes)) == len(shapes)
    assert {end for _, end in shapes} == {128, 256, 307}


def test_the_same_generator_gives_the_same_tokens(model):
    """D7: sampling depends on the generator only, not on the global random state."""
    a, _ = decode(model)
    torch.rand(17)
    assert torch.equal(a, decode(model)[0])
    assert not torch.equal(a, decode(model, seed=6)[0])
    short, long = (decode(model, length=n, stops=[never(model)])[0] for n in (4, 9))
    assert torch.equal(short, long[:, :4])  # and not on how long a response may be


def test_keys_and_values_are_written_in_place(model, monkeypatch):
    """One tensor a layer with room for the whole sequence; a growing one would be copied."""
    made, places = [], set()
    update = generate.KeyValueLayer.update

    def recorded(layer, *given, **more):
        result = update(layer, *given, **more)
        places.add((id(layer), layer.keys.data_ptr(), layer.values.data_ptr()))
        made.append(tuple(layer.keys.shape))
        return result

    monkeypatch.setattr(generate.KeyValueLayer, "update", recorded)
    decode(model, length=12, stops=[never(model)])
    assert len(made) == 2 * 12  # layers, tokens
    assert len(places) == 2
    assert {shape[2] for shape in made} == {7 + 12}


def test_keys_and_values_go_when_decoding_ends(model, monkeypatch):
    """A cycle of references would keep them until a garbage collection: memory for two rollouts."""
    layers, made = [], generate.KeyValueLayer.__init__

    def recorded(layer, *given):
        made(layer, *given)
        layers.append(weakref.ref(layer))

    monkeypatch.setattr(generate.KeyValueLayer, "__init__", recorded)
    gc.disable()
    try:
        decode(model)
        assert [layer() for layer in layers] == [None] * 2
    finally:
        gc.enable()


class Casts(TorchDispatchMode):
    """Counts how often each weight of a model's matrix products is cast."""

    def __init__(self, model):
        super().__init__()
        linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        self.weights, self.counts = {m.weight.data_ptr() for m in linear}, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("trained", [True, False])
def test_weights_are_cast_once_a_rollout(tokenizer, trained):
    """To bfloat16; autocast keeps casts of trained weights only, others are cast for each token."""
    model = make_model(tokenizer).requires_grad_(trained)
    with utils.autocast(CPU, "bfloat16"), Casts(model) as casts:
        decode(model, length=10, stops=[never(model)])
    assert casts.counts.keys() == casts.weights
    assert len(casts.weights) == 2 * 7  # layers, products
    assert {*casts.counts.values()} == {1 if trained else 10}


def p_value(counts, probabilities):
    """Of Pearson's chi-squared test; tokens that are expected rarely count as one."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(len(counts) - 1).double() / 2, statistic / 2).item()


def cut_to(probabilities, top_k, top_p):
    """Probabilities of the k most probable tokens, of those the fewest that hold probability p."""
    ordered, order = probabilities.sort(descending=True)
    if top_k:
        ordered[top_k:] = 0
        ordered /= ordered.sum()
    if top_p < 1:
        ordered[int((ordered.cumsum(0) < top_p).sum()) + 1 :] = 0
        ordered /= ordered.sum()
    return torch.zeros_like(ordered).scatter(0, order, ordered)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.4, 0, 1.0), (1.0, 20, 1.0), (0.8, 50, 0.7)],
)
def test_the_decoding_loop_follows_the_distribution(tokenizer, temperature, top_k, top_p):
    """D5, D36: first and second tokens of 20,000 responses fit the softmax, cut to k, then p."""
    model = make_model(tokenizer, initializer_range=0.25)
    flags = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, _ = decode(model, [PROMPTS[0]] * 20_000, length=2, seed=3, **flags)
    often = tokens[tokens[:, 0] != 1, 0].mode().values.item()
    seconds = tokens[tokens[:, 0] == often, 1]
    assert len(seconds) > 500
    for prompt, seen in ((PROMPTS[0], tokens[:, 0]), ([*PROMPTS[0], often], seconds)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].double() / temperature
        counts = torch.bincount(seen, minlength=len(logits)).double()
        assert p_value(counts, cut_to(logits.softmax(-1), top_k, top_p)) > 1e-3
        if not top_k:  # the test has power
            assert p_value(counts, (logits * 0.8).softmax(-1)) < 1e-3


# their softmax, in this order: 0.40, 0.02, 0.09, 0.25, 0.03, 0.05, 0.15, 0.01
LOGITS = torch.tensor([2.0, -0.9, 0.5, 1.5, -0.5, 0.0, 1.0, -1.2])


def draws(count, temperature, top_k, top_p):
    """How often `sample` draws each token of LOGITS, of `count` times."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    tokens = generate.sample(LOGITS.expand(count, -1), temperature, top_k, top_p, uniform)
    return torch.bincount(tokens, minlength=len(LOGITS)).double()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (0.7, 4, 0.8)],
)
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    """D5, D36: 5000 draws fit the softmax at the temperature, cut to top-k and then to top-p."""
    probabilities = cut_to(torch.softmax(LOGITS.double() / temperature, -1), top_k, top_p)
    counts = draws(5000, temperature, top_k, top_p)
    assert p_value(counts, probabilities) > 1e-3
    if temperature == 1 and not top_k:  # the test has power: what is slightly off is rejected
        assert p_value(counts, torch.softmax(LOGITS.double() / 1.15, -1)) < 1e-3


ALLOWED = [  # temperature, top_k, top_p and which tokens may then be drawn
    (1.0, 1, 1.0, {0}),
    (1.0, 3, 1.0, {0, 3, 6}),
    (1.0, 100, 1.0, set(range(8))),
    (1.0, 0, 1e-6, {0}),
    (1.0, 0, 0.3, {0}),  # the token that crosses top_p stays
    (1.0, 0, 0.5, {0, 3}),
    (1.0, 0, 0.7, {0, 3, 6}),
    (1.0, 2, 0.99, {0, 3}),
    (0, 0, 1.0, {0}),  # the most probable one
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "allowed"), ALLOWED)
def test_samples_stay_within_top_k_and_top_p(temperature, top_k, top_p, allowed):
    """D36: nothing outside the allowed set is drawn, and everything inside it is."""
    assert {*draws(4000, temperature, top_k, top_p).nonzero().flatten().tolist()} == allowed


@pytest.mark.parametrize("size", [8, 128, 129, 257, 1000])
def test_samples_are_those_of_one_cumulative_sum(size):
    """Whatever the vocabulary's size beside the blocks', and where most tokens are ruled out.

    In float64: in float32 a draw next to a border may fall on either side, by the processor.
    """
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(4000, size, generator=generator, dtype=torch.float64)
    logits[2000:, torch.randperm(size, generator=generator)[: size - 5]] = -INF
    uniform = torch.rand(4000, generator=generator, dtype=torch.float64)
    cumulative = logits.softmax(-1).cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    expected = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    assert torch.equal(generate.sample(logits, 1.0, 0, 1.0, uniform), expected)
    uniform[:] = math.nextafter(1, 0)
    last = (logits > -INF).long() * torch.arange(size)
    assert torch.equal(generate.sample(logits, 1.0, 0, 1.0, uniform), last.amax(1))
    assert generate.sample(logits * torch.nan, 1.0, 0, 1.0, uniform).max() < size


def test_samples_at_the_ends_of_the_unit_interval():
    """Uniform numbers of 0 and just below 1 give the first and last token of any probability."""
    logits = torch.tensor([-INF, 0.0, 0.0, -INF]).expand(3, -1)
    uniform = torch.tensor([0.0, 0.5, math.nextafter(1, 0)], dtype=torch.float64)
    assert generate.sample(logits, 1.0, 0, 1.0, uniform).tolist() == [1, 2, 2]
