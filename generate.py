"""The decoding loop: responses sampled from a language model, all rows of a batch at once.

In: a causal language model and prompts padded on the left. Out: response ids and their mask.
As a command, a conversation (chat.py): python generate.py runs/ppo_rlhf

Keys and values are written in place into a cache with room for the whole sequence; rows that have
ended are dropped; on CUDA the steps are a captured graph that is replayed, and as many rows are
decoded at once as memory has room for. Temperature, top-k and top-p change the logits; the model's
own generation settings do not (B11).

B sequences, b of them still decoded, P prompt tokens, R response tokens, V vocabulary.
`D16` in comments points to docs/details.md.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor
from transformers.configuration_utils import get_head_shapes

import distributed
import utils

COLUMNS = 128  # a captured graph reads a multiple of these from the cache
BLOCK = 128  # tokens of the vocabulary, in sampling


@torch.no_grad()
@distributed.gathers_once
def generate(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniform: Tensor,
    stop_ids: list[int],
    *,
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stride: int | None = None,
    watch: Callable[[Tensor], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a response to each prompt: (response_ids [B, R], response_mask [B, R]).

    prompt_ids and prompt_mask [B, P] are padded on the left (D2). At most R tokens are sampled,
    each by a random number of its own: uniform [B, R] (D7). The mask is 1 up to and including the
    first of `stop_ids`; what follows it is `pad_id` (D16). Logits are divided by the temperature
    (D5); 0 takes the most probable token. top_k (0: all) samples among the k most probable tokens,
    top_p (1.0: all) among the fewest that hold probability p (D36).

    Every `stride` tokens (1 on a CPU, 32 elsewhere) the device is asked which rows have ended; they
    are dropped once they are a quarter of those still decoded. The device never waits in between.
    `watch` gets the ids so far.
    """
    rows, device = len(prompt_ids), prompt_ids.device
    stride = stride or (1 if device.type == "cpu" else 32)
    stops = torch.tensor(stop_ids, device=device)
    sampling = (temperature, top_k, top_p)
    parts = -(-rows // rows_at_once(model, prompt_ids.shape[1], uniform.shape[1]))
    each = [x.tensor_split(parts) for x in (prompt_ids, prompt_mask, uniform)]
    decoded = [
        decode(model, *part, stops, pad_id, sampling, stride, watch)
        for part in zip(*each, strict=True)
    ]
    response_ids = torch.cat(decoded)
    ends = torch.isin(response_ids, stops).long()
    return response_ids, (ends.cumsum(1) <= ends).long()  # up to the first (D3)


def random_numbers(rows: int, response_length: int, rng: torch.Generator | None = None) -> Tensor:
    """What `generate` samples by, in [0, 1): float64 [rows, R] on the device of `rng`."""
    device = rng and rng.device
    return torch.rand(response_length, rows, generator=rng, device=device, dtype=torch.float64).T


@torch.compiler.set_stance("force_eager")
def decode(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniform: Tensor,
    stops: Tensor,
    pad_id: int,
    sampling: tuple[float, int, float],
    stride: int,
    watch: Callable[[Tensor], Any] | None,
) -> Tensor:
    """The response_ids of `generate`, for B of its rows."""
    (rows, prompt_length), response_length = prompt_ids.shape, uniform.shape[1]
    device = prompt_ids.device
    if model.config.model_type == "gpt_neo":
        stride = 1  # its window would end at the last column, written or not
    body = model.base_model
    parameters = inspect.signature(body.forward).parameters
    cache_name = "cache" if "cache" in parameters else "past_key_values"
    position = Position(prompt_length + response_length, slot=0, end=prompt_length)
    cache = transformers.Cache(layer_class_to_replicate=lambda: KeyValueLayer(position))

    response_ids = torch.full((rows, response_length), pad_id, device=device)  # [B, R]
    live = torch.arange(rows, device=device)  # [b] rows still decoded
    alive = torch.ones_like(live, dtype=torch.bool)  # [b] whether they go on
    token = torch.zeros_like(live)  # [b] their last token
    mask = F.pad(prompt_mask, (0, response_length))  # [b, P + R]
    t = torch.zeros(1, dtype=torch.long, device=device)  # tokens sampled so far

    def choose_token(inputs: dict[str, Tensor]) -> None:
        """Feed the inputs, by which the cache grows, and sample token t of the b rows."""
        outputs = body(**inputs, **{cache_name: cache}, use_cache=True)
        logits = utils.logits_of(model, outputs.last_hidden_state[:, -1])  # [b, V]
        place = (live, t.expand_as(live))
        sampled = sample(logits, *sampling, uniform[place])
        token.copy_(torch.where(alive, sampled, pad_id))
        response_ids[place] = token
        mask.index_fill_(1, t + prompt_length, 1)
        alive.logical_and_(~torch.isin(token, stops))
        t.add_(1)

    def decode_one() -> None:
        """Feed the last token of the b rows and sample the next one."""
        position.slot = t + (prompt_length - 1)
        inputs = {"input_ids": token[:, None], "attention_mask": mask[:, : position.end]}
        if "position_ids" in parameters:
            inputs["position_ids"] = mask.sum(1, keepdim=True) - 1  # only real tokens count
        choose_token(inputs)

    graph = captured = None  # decode_one's CUDA graph, and its shape: once left, none comes back
    choose_token(utils.model_inputs(body, prompt_ids, prompt_mask))
    for start in range(1, response_length, stride):
        if watch:
            watch(response_ids[:, :start])
        going = int(alive.sum())
        if not going:
            break
        if going <= 0.75 * len(live):
            kept = alive.nonzero().squeeze(1)
            live, alive, token, mask = (x[kept] for x in (live, alive, token, mask))
            cache.batch_select_indices(kept)
        count = min(stride, response_length - start)
        position.end = prompt_length + start + count - 1
        if stride > 1:  # few ends, so few graphs
            position.end = min(-(-position.end // COLUMNS) * COLUMNS, position.capacity)
        shape = (len(live), position.end)
        if shape != captured and count > 3:  # fewer are not worth it
            decode_one()  # what a first one allocates is no part of the graph
            graph = capture(decode_one, model, graph)
            captured, count = shape, count - 1
        step = graph.replay if graph and shape == captured else decode_one
        for _ in range(count):
            step()
    return response_ids


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    """One token id a row, [b], from logits [b, V]: where probabilities add up to uniform [b].

    One random number a row, in [0, 1); `torch.multinomial` takes one a token of the vocabulary. In
    two steps, since a cumulative sum over 150,000 tokens is slow: which block, then which of it.
    `check` counts on the order of the vocabulary and, at temperature 1, on the whole of it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature  # D5
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        drop = probs.cumsum(-1) - probs >= top_p  # the one that crosses p stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    size = logits.shape[-1]
    probs = F.pad(logits.softmax(-1), (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, inside = invert(probs.sum(-1), uniform[:, None])
    token, _ = invert(probs.take_along_dim(block[..., None], 1).squeeze(1), inside)
    return (block * BLOCK + token).clamp(max=size - 1).squeeze(1)


def invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where weights [b, n] add up to uniform [b, 1] times their sum.

    As the index of a weight, and how far into that weight: both [b, 1].
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    share = uniform.clamp(0, 1 - 1e-12)  # at 1 a weight of 0 would be found
    threshold = share * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=weights.shape[1] - 1)
    return index, 1 - (cumulative.gather(1, index) - threshold) / weights.gather(1, index)


def misplaced(model: Any, prompt: Tensor, response: Tensor, uniform: Tensor) -> Tensor:
    """How far, at most, random numbers [R] are from their tokens' parts of the distribution.

    It is that of one forward pass over prompt [P] and response [R]; at temperature 1.
    """
    hidden = utils.hidden_states(model, torch.cat([prompt, response])[None])[0, :-1]
    probs = utils.logits_of(model, hidden[len(prompt) - 1 :]).double().softmax(-1)  # [R, V]
    upper, prob = (x.gather(1, response[:, None]).squeeze(1) for x in (probs.cumsum(-1), probs))
    return torch.maximum(upper - prob - uniform, uniform - upper).max()


@torch.no_grad()
def check(model: Any, name: str) -> None:
    """Stop unless decoding with padding on the left agrees with one forward pass (B40)."""
    ids, mask = torch.tensor([[[1, 2, 3], [0, 3, 2]], [[1, 1, 1], [0, 1, 1]]], device=model.device)
    uniform = random_numbers(2, 8, utils.generator(model.device, 0))
    try:
        got, _ = generate(model, ids, mask, uniform, [-1], pad_id=0, stride=1)
        for row in range(2):
            if misplaced(model, ids[row][mask[row] == 1], got[row], uniform[row]) > 0.02:
                utils.stop(f"{name}: would be sampled from another distribution; pass another")
    except Exception as error:
        utils.stop(f"{name}: cannot be decoded here ({utils.first_line(error)}); pass another")


def stop_token_ids(tokenizer: Any, stop_token: str, config: Any = None) -> list[int]:
    """EOS, the ends in a generation `config` (B28) and, if not "eos", `stop_token`."""
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    ends = [tokenizer.eos_token_id, *(i for i in ends if i in tokenizer.added_tokens_decoder)]
    if stop_token != "eos":
        ids = [tokenizer.get_vocab().get(stop_token)]  # SentencePiece would add a space
        if ids == [None] or "\ufffd" in tokenizer.decode(ids):  # the name of a byte, as `é` is
            ids = tokenizer(stop_token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            utils.stop(f"--stop-token: {stop_token!r} is {len(ids)} tokens; pass one")
        ends += ids
    return list(dict.fromkeys(ends))


def rows_at_once(model: Any, prompt_length: int, response_length: int) -> int:
    """How many rows fit into three quarters of a GPU's free memory, roughly; on a CPU any."""
    free, config = distributed.free_memory(model.device), model.config.get_text_config()
    if free is None:
        return 2**30
    heads, sizes = map(torch.tensor, get_head_shapes(config))  # of keys and values, by layer
    width = int((heads * sizes).expand(config.num_hidden_layers).sum())
    size = 2 if torch.is_autocast_enabled(model.device.type) else 4
    cache = 2 * size * width * (prompt_length + response_length)
    # what a layer makes of a prompt, and the last logits with what `sample` makes of them
    row = cache + 32 * size * config.hidden_size * prompt_length + 32 * config.vocab_size
    return max(1, int(0.75 * free / row))


def capture(step: Callable[[], None], model: Any, before: Any) -> Any:
    """The step as a CUDA graph, in the memory of the one before; none where it cannot be one."""
    if model.device.type != "cuda" or hasattr(model, "not_captured"):
        return None
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = before.pool() if before else torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph
    except RuntimeError as error:  # it asks the device something
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # else what is cached would never be freed
            torch._C._cuda_endAllocateToPool(model.device.index, pool)
            torch._C._cuda_releasePool(model.device.index, pool)
        model.not_captured = graph  # which the allocator may still ask
        why = utils.first_line(error.__context__ or error)  # the capture's end fails after it
        utils.say(f"decoding goes without a CUDA graph, slowly: {why}")
    return None


@dataclasses.dataclass
class Position:
    """Where in a cache of `capacity` columns the decoding is.

    `slot` is where the next keys and values go: 0 for a prompt, then a tensor [1] on the device, so
    that a captured graph can move on. Attention reads the columns before `end`; those not yet
    written are 0 and masked.
    """

    capacity: int
    slot: int | Tensor
    end: int


class KeyValueLayer(transformers.cache_utils.DynamicLayer):
    """A layer's keys and values, [b, heads, capacity, head size] each, written in place."""

    def __init__(self, position: Position):
        super().__init__()
        self.position = position

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [b, heads, columns, head size]; return all before `end`."""
        position, kind = self.position, keys.device.type
        cast = torch.is_autocast_enabled(kind) and kind != "cpu"  # to what attention would cast to
        dtype = torch.get_autocast_dtype(kind) if cast else torch.float32
        keys, values = keys.to(dtype), values.to(dtype)
        if self.is_initialized:
            self.keys.index_copy_(2, position.slot, keys)
            self.values.index_copy_(2, position.slot, values)
        else:  # the prompt's, with room for what follows
            room = (0, 0, 0, position.capacity - keys.shape[2])
            self.keys, self.values = F.pad(keys, room), F.pad(values, room)
            self.is_initialized = True
        return self.keys[:, :, : position.end], self.values[:, :, : position.end]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = self.keys[indices], self.values[indices]

    def get_seq_length(self) -> int | Tensor:
        return self.position.slot

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.position.end, 0


if __name__ == "__main__":
    import chat

    chat.main(tyro.cli(chat.Args))
