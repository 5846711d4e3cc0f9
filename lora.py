"""Low-rank adapters (LoRA, by `peft`): few weights are trained, on a model that stays as it is.

In `ppo_rlhf.py` policy, reference and value function are one base in memory, in the precision of
sampling: the reference is the base itself, the other two have an adapter each and the value
function a head. `D43` in a comment points to docs/details.md.
"""

import copy
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

import saving
import utils


def adapt(model: Any, args: Any, start: Path | None = None) -> Any:
    """A copy on the same weights, with a LoRA adapter; only adapter and head are trained (D43).

    The adapter adds 0 at first; with `start`, it and the head are those of that folder.
    """
    try:
        import peft.functional
    except ImportError:
        utils.stop("--lora-rank: needs peft; pip install -r requirements-lora.txt")
    model = utils.freeze(copy.deepcopy(model, {id(p): p for p in model.parameters()}), args.dtype)
    for module in model.modules():
        vars(module).pop("forward", None)  # of --compile, which would be that of the other model
    layers = [name for name, _ in model.base_model.named_modules()]
    # a mixture's router is a linear layer, but in some models it returns a tuple
    routers = {layer for layer in layers if layer.endswith(".router")}
    names = args.lora_target
    if names != "all-linear":
        names = [name.strip() for name in names.split(",")]
        for name in names:
            if not any(f".{layer}".endswith(f".{name}") for layer in {*layers} - routers):
                utils.stop(f"--lora-target: the model has no layer {name}; name linear layers")
    config = peft.LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=names)
    config.exclude_modules = routers or None
    if start:
        config = peft.PeftConfig.from_pretrained(str(start))
        config.lora_dropout, config.inference_mode, config.bias = 0.0, False, "none"
    head = getattr(model, "score", None)
    config.base_model_name_or_path, config.modules_to_save = args.model, head and ["score"]
    if utils.base_of(args.model) != args.model and not start:
        utils.say(f"{args.model}: is an adapter; peft would leave it out below the new one")
    config.task_type = "SEQ_CLS" if head else "CAUSAL_LM"
    try:
        peft.inject_adapter_in_model(config, model.base_model)
        if any("embedding_A" in name for name, _ in model.named_parameters()):
            raise ValueError("it names embeddings")
    except ValueError as error:
        utils.stop(f"--lora-target: {utils.first_line(error)}; name linear layers")
    peft.functional.cast_adapter_dtype(model, "default")
    model.lora_config = config
    if head:
        head.requires_grad_(True)
    if start:
        saving.load_weights(model, start)
    return model


def value_on(base: Any, args: Any, start: str) -> Any:
    """Under LoRA, a value function on the weights of `base`, which is --model.

    Adapter and head are those of `start` where that has the same base, else 0.
    """
    folder = Path(start).expanduser()
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    name = utils.base_of(str(folder))
    same = start != args.model and name != str(folder) and has_head(folder)
    if same and name != args.model:
        other = utils.load_model(transformers.AutoModel, name, torch.device("cpu"))
        own = [p.cpu() for p in base.base_model.parameters()]
        others = [*utils.freeze(other, args.dtype).parameters()]
        same = len(own) == len(others) and all(map(torch.equal, own, others))
    if not same and args.value_model not in (None, args.model):
        utils.stop(f"--value-model: {start} has no adapter of {args.model}; leave it out")
    model = utils.load_classifier(start if same else args.model, torch.device("cpu"))
    setattr(model, model.base_model_prefix, base.base_model)
    return adapt(model.to(base.device), args, folder if same else None)


def has_head(folder: Path) -> bool:
    """Whether an adapter's folder holds a scalar head."""
    if not (file := folder / "adapter_model.safetensors").is_file():
        utils.stop(f"{folder}: lacks {file.name}; pass a whole adapter")
    with safetensors.safe_open(file, "pt") as weights:
        return any("score" in name for name in weights.keys())
