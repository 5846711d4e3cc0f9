"""What is no step of the algorithm: errors, folders, models, tensors, reward functions, logging.

Shapes: B sequences, R response tokens, T tokens, H hidden size, V vocabulary, n some of N tokens.
`D17` and `B14` in comments point to docs/details.md.
"""

import asyncio
import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import filelock
import huggingface_hub.utils
import numpy as np
import safetensors
import torch
import transformers
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import masking_utils
from transformers.integrations import sdpa_attention
from transformers.modeling_layers import GradientCheckpointingLayer

import card
import distributed

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
huggingface_hub.utils.enable_progress_bars()  # off by that too
with contextlib.suppress(AttributeError):  # a notebook's cannot; some are latin-1
    sys.stdout.reconfigure(errors="backslashreplace")

# ---- errors

progress: tqdm | None = None  # the stage's bar, which knows the step or update


def visible(text: str) -> str:
    """The text with what steers a terminal or turns its order around spelled out: `\\x1b`."""
    kept = "\n\t\xa0\u2009\u200c\u200d\u202f\u3000"
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


def say(line: str) -> None:
    """Print a line, in the main process only."""
    if distributed.is_main():
        print(visible(line), flush=True)


def stop(message: str, code: int = 2) -> NoReturn:
    """Print `error: WHERE: WHAT; HOW TO FIX` and exit: 2 for wrong input, 1 for a failed run."""
    if progress is not None:
        progress.close()  # ends its line
        if not distributed.is_main():  # that of the main process
            print(file=sys.stderr)
    print(visible(f"error: {message}".replace("\n", " ")), file=sys.stderr)
    raise SystemExit(code)


def first_line(error: BaseException) -> str:
    """An exception's kind and the first line of its message."""
    message = str(error).strip() or "no message"
    return f"{type(error).__name__}: {message.splitlines()[0]}"


@contextlib.contextmanager
def stage() -> Iterator[None]:
    """Decorates `main`: out of memory or a full disk end it with 1 and a line that says when."""
    global progress
    try:
        yield
        distributed.depart()
    except Exception as error:
        if re.search("MemoryError|out of memory|allocate memory|ALLOC_FAILED", repr(error)):
            fix = "lower --micro-batch-size or add --gradient-checkpointing"
        elif isinstance(error, OSError) or "os error" in str(error):
            fix = "make room or fix folder or pipe, then --resume"
        elif distributed.lost_others(error):
            fix = "its own error, if any, says why"
            why = " ".join(str(error).split())  # NCCL's last line is the cause
            error = ConnectionError(f"another process has ended, or the connection to it ({why})")
        else:
            raise  # a bug
        bar = progress
        where = f"{bar.unit} {min(bar.n + 1, bar.total)}" if bar is not None else "start"
        stop(f"{where}: {first_line(error)}; {fix}", 1)
    finally:
        progress = None
        distributed.give_back_signals()
        while locks:
            locks.pop().release()


# ---- processes


GOES_WITH = {
    "cpu_offload": "fsdp",
    "kl_horizon": "kl_target",
    "lora_alpha": "lora_rank",
    "lora_target": "lora_rank",
    "ptx_coef": "ptx_dataset",
    "ptx_dataset": "ptx_coef",
}
remote_code = False  # whether a model's own code may run; `start_process` sets it


def start_process(args: Any) -> tuple[Any, distributed.Process]:
    """Join the processes of torchrun, if any; choose device and precision; seed (D7).

    Returns a copy of `args` to complete; its dtype is not "auto".
    """
    global remote_code
    args = copy.copy(args)
    try:
        device = distributed.choose_device(args.device)
    except ValueError as error:
        stop(f"--device: {error}; pass another")
    process = distributed.join(device)
    launch = distributed.launch()
    before = {}
    if launch or args.resume:
        before = read_object(Path(args.output_dir).expanduser() / "args.json")
    if distributed.from_main(launch and before.get("launch") == launch):
        args.resume, args.overwrite = True, False  # started again: it goes on, whatever the flags
    if getattr(args, "fsdp", False):
        if not launch:
            stop("--fsdp: shards models over processes; start it by torchrun")
        for name in ("lora_rank", "compile"):
            if getattr(args, name):
                stop(f"--fsdp: does not go with {flag(name)}; leave one out")
    for name, other in GOES_WITH.items():
        default = getattr(type(args), name, None)
        if getattr(args, name, default) != default and not getattr(args, other):
            stop(f"{flag(name)}: goes with {flag(other)}; pass both or neither")
    torch.manual_seed(args.seed % 2**63)  # heads start alike in all processes
    if args.dtype == "auto":
        dtype = "bfloat16" if distributed.multiplies_bfloat16(device) else "float32"
        dtype = before.get("dtype", dtype) if args.resume else dtype
        args.dtype = distributed.from_main(dtype)  # machines may differ
    # in bfloat16 these products are the heads' alone (B35)
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "bfloat16"
    remote_code = args.trust_remote_code
    digests.clear()
    return args, process


def generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A random generator from `numbers` alone, such as (seed, SAMPLING, update, 0) (D7).

    Another last one gives other numbers for the same purpose.
    """
    # numpy takes [1] and [1, 0] for the same entropy, so the count comes first
    seed = int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0])
    return torch.Generator(device).manual_seed(seed)


def leave(signal: int, saver: Any, step: int, state: dict[str, Any]) -> NoReturn:
    """Save the state after `step`, say how to continue, exit with 128 + the signal's number."""
    if step:  # a run without checkpoints starts from step 0
        saver.save(step, state)
    distributed.depart()
    if distributed.is_main():
        progress.close()
        line = f"interrupted after {progress.unit} {step}; add --resume to continue"
        print(line, file=sys.stderr)
    raise SystemExit(128 + signal)


# ---- flags and folders

# what may change when a run is resumed
FREE_ON_RESUME = "resume overwrite output_dir device micro_batch_size track save_every eval_every "
FREE_ON_RESUME += "keep_checkpoints cpu_offload gradient_checkpointing trust_remote_code"


def flag(name: str) -> str:
    """The command-line spelling of an argument."""
    return "--" + name.replace("_", "-")


def check_numbers(args: Any, may_be_0: str = "", at_most_1: str = "") -> None:
    """Stop unless numbers are above 0, or as `may_be_0` and `at_most_1` say.

    Also where a list's flag comes twice: one would be ignored.
    """
    given = [word.partition("=")[0].replace("_", "-") for word in sys.argv]
    may_be_0 += " seed save_every eval_every lora_rank"
    for name, value in vars(args).items():
        if isinstance(value, tuple) and given.count(flag(name)) > 1:
            stop(f"{flag(name)}: comes twice; pass all values once")
        if type(value) in (int, float):
            zero, one = name in may_be_0.split(), name in at_most_1.split()
            if not (0 < value < 2**63 or (zero and value == 0)) or (one and value > 1):
                wanted = ("0 or more" if zero else "above 0") + (", up to 1" if one else "")
                stop(f"{flag(name)}: {value} is out of range; pass {wanted}")


def micro_batch_size(args: Any, world: int, mini_batches: int = 1) -> int:
    """`--micro-batch-size`, or a process's share of a mini-batch where that is smaller."""
    size = max(1, min(args.micro_batch_size, args.batch_size // (world * mini_batches)))
    if args.batch_size % (multiple := size * world * mini_batches):
        what = "processes x mini- x micro-batch must divide it"
        stop(f"--batch-size: {what}; pass a multiple of {multiple}")
    return size


def check_output(args: Any, stage: str) -> None:
    """Stop if `--output-dir` holds what this run must not touch."""
    out = Path(args.output_dir).expanduser()
    if args.resume and args.overwrite:
        stop("--resume: contradicts --overwrite; pass one")
    if args.track and not importlib.util.find_spec("wandb"):
        stop("--track: needs wandb; pip install wandb")
    read = "model reward_model value_model dataset ptx_dataset normalize_with "
    for name in (read + "reward_fn eval_reward_fn").split():
        given = getattr(args, name, None) or ()
        for source in [given] if isinstance(given, str) else given:
            path = Path(source).expanduser().resolve()
            if out.resolve() == path or (args.overwrite and out.resolve() in path.parents):
                stop(f"--output-dir: {out} is or holds {flag(name)}, {source}; pass another")
    if not out.is_dir() or {path.name for path in out.iterdir()} <= {"run.lock", "args.json.part"}:
        return
    before = read_object(out / "args.json")
    if before.get("stage") != stage:
        stop(f"{out}: holds no run of {stage}.py; pass another --output-dir")
    if not args.resume and not args.overwrite:
        stop(f"{out}: already holds a run; pass --resume or --overwrite")
    if args.resume:
        # with lists, as args.json has them
        for name, value in json.loads(json.dumps(vars(args))).items():
            was = before.get(name, value)
            if name not in FREE_ON_RESUME.split() and value != was:
                stop(f"{flag(name)}: was {was!r} in {out}; pass that run's flags")
        if (out / "summary.json").exists() and not checkpoints(out):
            stop(f"{out}: is finished, without a checkpoint; pass --overwrite")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, the newest first; one still being written (.part) is none."""
    found = (path for path in out.glob("checkpoint/*") if path.name.isdigit())
    return sorted(found, key=lambda path: int(path.name), reverse=True)


locks: list[filelock.FileLock] = []  # of this process; the system frees them however it ends


def open_output(args: Any, stage: str) -> Path:
    """Make and lock `--output-dir`, empty it for --overwrite, write `args.json`."""
    out = Path(args.output_dir).expanduser()
    distributed.barrier()  # all have checked the folder before it is made
    if distributed.is_main():
        try:
            out.mkdir(parents=True, exist_ok=True)
            locks.append(filelock.FileLock(out / "run.lock"))
            locks[-1].acquire(timeout=0)
            check_output(args, stage)  # it may have been taken
            for path in sorted(out.iterdir(), key=lambda path: path.name == "args.json"):
                if args.overwrite and path.name != "run.lock":  # args.json, which names it, last
                    discard(path)
            facts = {"stage": stage} | vars(args)
            if launch := distributed.launch():
                facts["launch"] = launch
            write_text(out / "args.json", json.dumps(facts, indent=2) + "\n")
        except filelock.Timeout:
            stop(f"{out}: is in use by another run; pass another --output-dir")
        except OSError as error:
            stop(f"{out}: cannot be written ({first_line(error)}); pass another --output-dir")
    distributed.barrier()
    return out


def write_text(path: Path, text: str) -> None:
    """Write a file beside its target first: nobody finds half of it."""
    part = path.with_name(path.name + ".part")
    discard(part)  # it may be a link
    part.write_text(text, encoding="utf-8")
    move(part, path)


def move(part: Path, path: Path) -> None:
    """Give a file or folder its name, once all that it holds is on the disk."""
    for written in [*part.rglob("*"), part]:
        if ".safetensors" in written.name:  # made for its owner alone
            with contextlib.suppress(OSError):
                written.chmod(part.parent.stat().st_mode & 0o666)
        sync(written)
    os.replace(part, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError if path.is_dir() else ()):
        os.fsync(descriptor)
    os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file, link or folder, if any; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- models


digests: dict[str, str] = {}  # of models and data read


def keep_digest(source: str, parts: Iterable[bytes]) -> None:
    """Note what was read, for --resume to compare."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    digests[source] = whole.hexdigest()


def base_of(model: str) -> str:
    """The model that a LoRA folder adapts; any other is its own."""
    file = Path(model).expanduser() / "adapter_config.json"
    base = read_object(file).get("base_model_name_or_path") if file.is_file() else model
    return base or stop(f"{file}: names no base_model_name_or_path; add it")


def from_pretrained(auto_class: Any, model: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained` of a folder or hub id; what it raises becomes one line."""
    path = Path(model).expanduser()
    local = path.exists() or model.startswith((".", "/", "~", "runs/")) or model.count("/") > 1
    if local and not [*path.glob("config.json"), *path.glob("adapter_config.json")]:
        stop(f"{model}: holds no model; run the stage that makes it, or pass another")
    try:
        name = str(path) if local else model
        return auto_class.from_pretrained(name, trust_remote_code=remote_code, **kwargs)
    except Exception as error:  # libraries raise anything, from ImportError to SafetensorError
        why, fix = first_line(error), "check its type; its files must be safetensors"
        if "trust_remote_code" in str(error):
            why, fix = "it runs code of its own", "read that, then pass --trust-remote-code"
        if "tiktoken" in str(error):
            fix = "pip install sentencepiece"
        stop(f"{model}: cannot be loaded ({why}); {fix}")


def load_model(auto_class: Any, model: str, device: torch.device, **kwargs: Any) -> Any:
    """A model in float32 and, in training too, in eval mode: dropout is off (D4).

    Only safetensors are read: a pickle may run code. Of weights that are missing the scalar head
    becomes zero, any others stop the run, as do biases and such that its layers would ignore (B42).
    An adapter is merged.
    """
    kwargs |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    if (base := base_of(model)) == model:
        loaded, info = from_pretrained(auto_class, model, **kwargs)
        if getattr(loaded, "_hf_peft_config_loaded", False):  # its weights would stay frozen
            stop(f"{model}: is an adapter on the hub; download it and pass the folder")
        for name in info["missing_keys"]:
            if not name.startswith("score."):
                stop(f"{model}: its files lack {name}; pass a whole model")
            loaded.get_parameter(name).data.zero_()
        layers = {name for name, layer in loaded.named_modules() if hasattr(layer, "weight")}
        for name in info["unexpected_keys"]:
            if name.rpartition(".")[0] in layers:
                stop(f"{model}: by its config.json {name} is ignored; mend it")
        if type(loaded).__module__.startswith("transformers_modules."):
            # what is not in its files, such as rotary frequencies, is unset (B44)
            made, in_files = type(loaded)(loaded.config), loaded.state_dict()
            for name, buffer in made.named_buffers():
                if name not in in_files:
                    loaded.get_buffer(name).copy_(buffer)
    else:
        loaded = load_model(auto_class, base, torch.device("cpu"), **kwargs)
        try:
            import peft

            folder = Path(model).expanduser()
            (file := folder / "adapter_model.safetensors").stat()
            config = peft.PeftConfig.from_pretrained(folder)
            if config.task_type == "CAUSAL_LM":  # of that kind peft would take no classifier
                config.task_type = None
            with warnings.catch_warnings():  # of another model: no change; of tied weights: B43
                warnings.filterwarnings("error", "Found missing adapter keys|.*tied_target_modules")
                loaded = peft.PeftModel.from_pretrained(
                    loaded, folder, config=config, torch_device="cpu"
                )
                loaded = loaded.merge_and_unload().requires_grad_(True)
            with safetensors.safe_open(file, "pt") as adapter:
                for name, number in (adapter.metadata() or {}).items():
                    if name in ("reward_mean", "reward_std"):  # B18
                        setattr(loaded.config, name, float(number))
                        loaded.config.get_text_config().pad_token_id = None  # the base's
        except Exception as error:
            what = f"its adapter cannot be merged ({first_line(error)})"
            stop(f"{model}: {what}; pip install -r requirements-lora.txt, or check its files")
    if any(p.dtype != torch.float32 for p in loaded.parameters()):  # float8 weights, on a GPU
        stop(f"{model}: its weights are quantized; pass a model with whole ones")
    if loaded.base_model is loaded:
        loaded.base_model_prefix = "model"  # Llama 4 names none
    loaded.get_input_embeddings().padding_idx = None  # or that row, maybe EOS's, never learns (D3)
    some = (p.detach().flatten()[:: p.numel() // 64 + 1] for p in loaded.parameters())
    parts = [x.cpu().numpy().tobytes() for x in some]
    parts.append(str(getattr(loaded.config, "reward_mean", None)).encode())
    keep_digest(f"{model} ({auto_class.__name__})", parts)
    return loaded.to(device).eval()


@torch.no_grad()
def load_causal_lm(model: str, device: torch.device, tokenizer: Any = None) -> Any:
    """A language model; stop if `generate` or `logits_of` would treat it wrongly.

    Ids above the tokenizer's last have probability 0 (B23).
    """
    loaded = load_model(transformers.AutoModelForCausalLM, model, device)
    if getattr(loaded, "_is_stateful", False):
        stop(f"{model}: is a state-space model without keys and values; pass another")
    ids, hidden = check_causal(model, loaded)
    own = loaded(**model_inputs(loaded, ids), use_cache=False).logits.float()
    if not torch.allclose(logits_of(loaded, hidden), own, rtol=1e-3, atol=1e-3):
        stop(f"{model}: does something unknown to its logits; pass another")
    if not hasattr(loaded, "generation_config"):  # code of a model's own may go without
        loaded.generation_config = transformers.GenerationConfig.from_model_config(loaded.config)
    if tokenizer is not None:
        loaded.known_tokens = 1 + max(tokenizer.get_vocab().values())
    return loaded


@torch.no_grad()
def load_classifier(model: str, device: torch.device, trained: bool = False) -> Any:
    """A model with a scalar head, `score`: a reward model, or the start of one.

    A head that its files lack is zero; with `trained` it must be there.
    """
    kind = transformers.AutoModelForSequenceClassification
    loaded = load_model(kind, model, device, num_labels=1)
    if not hasattr(loaded, "score"):
        stop(f"{model}: {type(loaded).__name__} has no head named score; pass another")
    if trained and not loaded.score.weight.any():
        stop(f"{model}: is no reward model; run reward_model.py first")
    if trained and not hasattr(loaded.config, "reward_mean"):
        say(f"{model}: is not from reward_model.py; its texts must have ended in EOS (B19)")
    check_causal(model, loaded)
    return loaded


def check_causal(model: str, loaded: Any) -> tuple[Tensor, Tensor]:
    """Stop if the model's tokens see later ones (B40).

    Returns ids [1, 4] that any model knows, and their hidden states [1, 4, H].
    """
    ids = torch.arange(4, device=loaded.device)[None]
    some = hidden_states(loaded, ids[:, :3])
    more = hidden_states(loaded, ids)
    if (some - more[:, :3]).norm() > 0.02 * some.norm():  # by less they differ in TF32
        stop(f"{model}: its tokens see later ones; pass a causal one")
    return ids, more


def freeze(model: Any, dtype: str) -> Any:
    """The model without gradients; with "bfloat16", weights of products take half the memory.

    Autocast would round them in each forward pass: outputs are the same, bit for bit. Embeddings,
    norms, heads and a mixture's experts, which autocast does not round, stay in float32.
    """
    model.requires_grad_(False)
    if dtype == "bfloat16":
        heads = (model.get_output_embeddings(), getattr(model, "score", None))
        for m in model.modules():
            if isinstance(m, nn.Linear | transformers.pytorch_utils.Conv1D) and m not in heads:
                m.to(torch.bfloat16)
        for p in model.parameters():  # out of the mapped file, which is freed
            p.data = p.data.clone()
    return model


def context_length(model: Any) -> int:
    """The most tokens that the model's positions allow; 2^30 without a limit.

    With "longrope" one longer sequence would change the positions of all others in its batch.
    """
    config = model.config.get_text_config()
    if (rope := getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    limit = getattr(config, "max_position_embeddings", None)
    return limit or getattr(config, "max_seq_len", None) or 2**30


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in `dtype`; weights, softmax, losses and optimizer stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def attention(module: Any, *inputs: Tensor | None, **kwargs: Any) -> tuple:
    """Attention; float32 on CPUs, where torch's backward pass in bfloat16 is slow."""
    if inputs[0].device.type == "cpu":  # query, key, value and mask
        inputs = [x if x is None or x.dtype == torch.bool else x.float() for x in inputs]
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention.sdpa_attention_forward(module, *inputs, **kwargs)


transformers.AttentionInterface.register("sdpa", attention)
# in float32 on CUDA torch is slow with grouped keys
grouped = sdpa_attention.use_gqa_in_sdpa
sdpa_attention.use_gqa_in_sdpa = lambda mask, key, value: (
    grouped(mask, key, value)
    and (not key.is_cuda or key.dtype != torch.float32 or torch.is_autocast_enabled("cuda"))
)
# Hopper's default: slow with new shapes, wrong with some masks (pytorch#193893, #196678)
torch.backends.cuda.enable_cudnn_sdp(False)


def spread(model: Any, args: Any, device: torch.device, trained: bool = True) -> None:
    """Let the processes of torchrun, if any, share the work on a model; with --fsdp the model.

    --gradient-checkpointing makes a layer's activations again in the backward pass; --compile
    compiles layers on first use: they share code. Decoding does without.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers and (args.compile or (trained and args.gradient_checkpointing)):
        kind = type(model).__name__
        stop(f"--compile, --gradient-checkpointing: {kind} has no layers for them; pass neither")
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # models of one class share code
    how = {"use_reentrant": False, "preserve_rng_state": False}
    for layer in layers:
        if args.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if trained and args.gradient_checkpointing:  # transformers' own needs dropout's mode (D4)
            layer.forward = functools.partial(checkpoint, layer.forward, **how)
    if args.fsdp:
        distributed.shard(model, device, args.dtype, offload=not trained and args.cpu_offload)
    elif trained:
        distributed.replicate(model)


def model_inputs(model: Any, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Arguments of a forward pass over ids [B, T]; positions count real tokens (D2, B10).

    Without a mask [B, T], padding is on the right: causal attention keeps it out by itself.
    """
    inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    if "position_ids" in inspect.signature(model.forward).parameters:
        real = torch.ones_like(ids) if mask is None else mask
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    return inputs


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What the model's head reads, [B, T, H], of ids [B, T] padded on the right."""
    inputs = model_inputs(model.base_model, ids)
    # else transformers looks for packed sequences: the CPU waits for the GPU
    search = "find_packed_sequence_indices"
    with mock.patch.object(masking_utils, search, lambda position_ids: None, create=True):
        return model.base_model(**inputs, use_cache=False).last_hidden_state


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Float32 logits [n, V] of hidden states [n, H]: the head, and what few put after it."""
    with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 is off by 0.02 at 14 (B35)
        logits = model.get_output_embeddings()(hidden.float())
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    size = logits.shape[-1]
    known = getattr(model, "known_tokens", size)  # others have no text, and probability 0 (B23)
    if known < size:
        # not -inf, which times 0 is NaN in an entropy
        logits = logits.masked_fill(torch.arange(size, device=logits.device) >= known, -1e30)
    return logits


LOGITS_AT_A_TIME = 2**26  # 256 MB in float32; on a GPU as many more as have room


def logits_at_a_time(device: torch.device) -> int:
    """How many logits `in_chunks` makes at once: chunks are computed twice, and few rows slowly."""
    free = distributed.free_memory(device)
    if free is None:
        return LOGITS_AT_A_TIME
    fit = free // 2 // (5 * 4)  # half; the backward pass holds five float32 tensors
    power = 1 << fit.bit_length() >> 1  # rarely another, so rounding is the same
    return max(LOGITS_AT_A_TIME, min(power, 2**31 - 1))  # some kernels index with 32 bits


def in_chunks(
    function: Callable[[Tensor, Tensor], Tensor], model: Any, hidden: Tensor, tokens: Tensor
) -> Tensor:
    """function(hidden [n, H], tokens [n]) -> [n, ...], over all N tokens.

    Where their logits [N, V] are large, it is called on chunks, in the backward pass once more.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    width = max(1, logits_at_a_time(hidden.device) // vocabulary)
    if len(tokens) <= width:
        return function(hidden, tokens)
    chunks = zip(hidden.split(width), tokens.split(width), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def head_outputs(model: Any, hidden: Tensor) -> Tensor:
    """The scalar head of a classifier on hidden states [..., H]: float32 [...]."""
    # in bfloat16 close scores would be equal
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.float()).squeeze(-1)


@distributed.forward_pass
def last_token_scores(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Raw reward [B] of right-padded ids [B, T], at the last real token (D1, D10, B20, B21).

    As in transformers, which trained others' models, the config's pad token is never the last.
    Where pad is EOS, reward_model.py's config names none, so that a final EOS is read.
    """
    pad_id = model.config.get_text_config().pad_token_id
    last = (mask * (ids != pad_id)).cumsum(1).argmax(1)
    hidden = hidden_states(model, ids)
    return head_outputs(model, hidden[torch.arange(len(ids), device=ids.device), last])


def normalize_scores(model: Any, raw: Tensor) -> Tensor:
    """Rewards, normalized as a reward model's configuration says (D13, B18)."""
    mean = getattr(model.config, "reward_mean", 0.0)
    return (raw - mean) / getattr(model.config, "reward_std", 1.0)


# ---- tensors


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is 1; what is masked may be NaN or inf (B9)."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1, over all processes; 0 where there is none (B6, B8)."""
    total, count = distributed.sum_all(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
    return total / count.clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of x where mask is 1, over all processes; of one element 0 (B17)."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x at mean 0 and variance 1 where mask is 1, over all processes; 0 elsewhere.

    Without `shift_mean` the mean stays.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_variance(x, mask) + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)


# ---- reward functions

runner = asyncio.Runner()  # one loop for all: clients and locks belong to one


def load_function(spec: str, where: str) -> Callable[..., list[float]]:
    """The function named by FILE.py:FUNCTION; `where` is the flag for it."""
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    module_name = f"from_{path}".replace(".", ":")  # a dot would name a package
    try:
        if module_name not in sys.modules:  # dataclasses and pickle look their module up there
            module_spec = importlib.util.spec_from_file_location(module_name, path)
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module
            module_spec.loader.exec_module(module)
        function = getattr(sys.modules[module_name], name)
        inspect.signature(function)
        return function
    except Exception as error:
        sys.modules.pop(module_name, None)
        stop(f"{where}: {spec!r} cannot be loaded ({first_line(error)}); pass FILE.py:FUNCTION")


def call_reward_function(
    function: Callable,
    where: str,
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    update: int = 0,
) -> tuple[list[float], list[list[float]]]:
    """Scores of `function(prompts, completions, **columns)` for B encoding.Prompts.

    The columns are the data set's others, and `completion_ids` where the function names it. It may
    be async. Numbers for the tokens of a response are an entry of the second list, elsewhere empty,
    and their sum is the score. Stop if it raises or returns anything else: code 2, in training 1.
    """
    where, code = (f"update {update}: {where}", 1) if update else (where, 2)
    texts = [p.text for p in prompts]
    row = prompts[0].row
    columns = {k: [copy.deepcopy(p.row.get(k)) for p in prompts] for k in row if k != "prompt"}
    columns |= {"prompts": [*texts], "completions": [*completions]}  # it may change its lists
    if "completion_ids" in inspect.signature(function).parameters:
        columns["completion_ids"] = [[*ids] for ids in completion_ids]
    try:
        returned = function(**columns)  # B32
        if inspect.iscoroutine(returned):
            returned = runner.run(returned)
        if isinstance(returned, dict | set | str):  # whose keys or letters may be numbers
            raise TypeError(f"a {type(returned).__name__} is no list of numbers")
        numbers = [[float(x) for x in s] if np.ndim(s) else float(s) for s in returned]
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        what = f"raised {first_line(error)} for {len(texts)} prompts, {texts[0][:60]!r} first"
        frames = traceback.walk_tb(error.__traceback__)  # of its file: see `load_function`
        lines = [n for f, n in frames if f.f_globals.get("__name__", "").startswith("from_")]
        fix = f"see its line {lines[-1]}" if lines else "it must take **columns, return numbers"
        stop(f"{where}: {what}; {fix}", code)
    scores = [sum(x) if isinstance(x, list) else x for x in numbers]
    fits = len(scores) == len(texts) and all(abs(x) < 1e19 for x in scores)
    of_tokens = []
    for x, ids in zip(numbers, completion_ids, strict=False):
        fits = fits and (not isinstance(x, list) or len(x) in (1, len(ids)))
        of_tokens.append(x if isinstance(x, list) and len(x) == len(ids) else [])
    if not fits:
        what = f"returned {len(scores)} values for {len(texts)} prompts, sum {sum(scores)}"
        stop(f"{where}: {what}; return one finite number each, or one for each token", code)
    return scores, of_tokens


def short_names(names: list[str]) -> list[str]:
    """Names for metrics, each once: of a path its last part, of FILE.py:FUNCTION the function."""
    short: list[str] = []
    for name in names:
        last = name.rstrip("/").replace(":", "/").split("/")[-1]
        while last in short:
            last += f"_{len(short)}"
        short.append(last)
    return short


# ---- results and logging


def check_finite(where: str, quantities: dict[str, Any]) -> None:
    """Stop with code 1 at NaN or infinity."""
    for name, value in quantities.items():
        value = torch.as_tensor(value)
        if not value.isfinite().all():
            what = f"{value[~value.isfinite()][0].item()} in {name}"
            stop(f"{where}: {what}; lower --learning-rate and start again", code=1)


PAGES = {  # TensorBoard's custom scalars: what a chart's metrics match
    "reward and KL": [
        "objective/(scores|rlhf_reward)",
        "eval/(score|judge)",
        "(objective|eval)/kl",
        "eval/win_rate",
    ],
    "PPO health": [
        "(policy|val)/clipfrac_avg",
        "val/ratio",
        "policy/approxkl_avg",
        "val/explained_variance",
        "policy/entropy_avg",
        "response/eos_rate",
        "grad_norm",
    ],
}


def eval_metrics(result: dict[str, Any]) -> dict[str, float]:
    """What an evaluation of PPO says of the policy, by the names of metrics."""
    policy = result["policy"] | {"win_rate": result["win_rate"]}
    return {f"eval/{name}": x for name, x in policy.items() if x is not None}


class Logger:
    """metrics.jsonl, TensorBoard (from where Weights & Biases takes it) and a progress bar.

    In the main process only. `unit`, "step" or "update", is counted from `start` to `total`;
    lines after `start` are cut off; the bar shows `shown`.
    """

    def __init__(self, out: Path, args: Any, unit: str, start: int, total: int, shown: str):
        global progress
        self.active, self.unit, self.shown = distributed.is_main(), unit, shown.split()
        progress = tqdm(
            desc=out.name,
            initial=start,
            total=total,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # seldom to a log file
            delay=0 if self.active else 1e9,  # others count without a bar
            # in 80 columns, else the last number is cut
            bar_format="{desc}: {n}/{total} |{bar}| [{elapsed}<{remaining}{postfix}]",
        )
        progress.unit = unit
        self.run = None  # of Weights & Biases
        if not self.active:
            return
        if args.track:
            import wandb

            flags = {"config": vars(args), "dir": str(out), "name": str(out)[-128:]}
            self.run = wandb.init(project="ppo-rlhf", sync_tensorboard=True, **flags)
        from torch.utils.tensorboard import SummaryWriter

        path = out / "metrics.jsonl"
        # a line a step; after a power cut the last may be half a line
        text = path.read_text(encoding="utf-8", errors="replace") if start else ""
        write_text(path, "".join(text.splitlines(keepends=True)[:start]))
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(out), purge_step=start + bool(start))
        self.board.add_text("args", card.fenced(json.dumps(vars(args), indent=2)), 0)
        if unit == "update":
            layout = {k: {x: ["Multiline", [x + "$"]] for x in v} for k, v in PAGES.items()}
            self.board.add_custom_scalars(layout)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of metrics.jsonl and the same scalars; move the bar on."""
        shown = {name.split("/")[-1]: f"{metrics[name]:,.4g}" for name in self.shown}
        progress.set_postfix(shown, refresh=False)
        progress.update()  # and draw
        progress.n = step  # TQDM_DISABLE=1 too
        if self.active:
            self.file.write(json.dumps({self.unit: step, **metrics}) + "\n")
        self.to_tensorboard(step, metrics)

    def to_tensorboard(self, step: int, values: dict[str, Any]) -> None:
        """Numbers as scalars, this process's tensors as distributions."""
        if self.active:
            for name, x in values.items():
                add = self.board.add_histogram if isinstance(x, Tensor) else self.board.add_scalar
                add(name, x, step)
            self.board.flush()  # a killed process takes along what its threads have not written

    def samples(self, update: int, before: list[dict], after: list[dict], shown: int) -> None:
        """Held-out prompts with both responses: 20 to TensorBoard, `shown` to the terminal."""
        if not self.active:
            return

        def score_line(name: str, result: dict[str, Any]) -> str:
            judge = "" if result["judge"] is None else f", judge {result['judge']:.2f}"
            return f"{name}: score {result['score']:.2f}{judge}"

        samples = []
        for b, a in zip(before[:20], after[:20], strict=True):
            sample = {"prompt": b["prompt"], score_line("before", b): b["response"].strip()}
            samples.append(sample | {score_line("after", a): a["response"].strip()})
        page = [f"**{k}**\n\n{card.fenced(text)}" for s in samples for k, text in s.items()]
        self.board.add_text("samples", "\n\n".join(page), update)
        if self.run:
            import wandb

            table = wandb.Table(["prompt", "before", "after"], [[*s.values()] for s in samples])
            self.run.log({"samples": table})
        self.board.flush()
        progress.clear()
        console = Console(highlight=False)
        with console.capture() as lines:  # by itself it would exit where nobody reads them
            console.rule(f"update {update}: replies before and after PPO")
            for sample in samples[:shown]:
                for caption, text in sample.items():
                    console.print(Text(caption, style="bold"), Text(visible(text)), sep="\n")
                console.print()
        print(lines.get(), end="", flush=True)

    def close(self) -> None:
        progress.close()
        if self.active:
            self.file.close()
            self.board.close()
        if self.run:  # at exit would be too late for its last lines
            self.run.finish()


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
