"""What a run leaves on the disk: models, checkpoints for --resume, rollouts, the summary.

Each is written beside its place and gets its name once it is whole and on the disk. Tensors are in
safetensors files only.
"""

import contextlib
import copy
import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

import card
import distributed
import utils


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder: config.json last, without which it is no model.

    All processes call it; the main one writes.
    """
    part = folder / "model.part"
    weights = None
    if distributed.is_sharded(model):
        weights = distributed.whole_weights(weights_of(model, "model")[1])
    if not distributed.is_main():
        return
    utils.discard(part)
    if hasattr(model, "lora_config"):  # merged in float32
        like, adapter = model, part / "adapter"
        save_weights(like, adapter)
        config = copy.deepcopy(like.config)
        try:
            model = utils.load_model(type(like), str(adapter), torch.device("cpu"), config=config)
        except SystemExit:  # a base that is gone by now is no wrong input
            raise SystemExit(1) from None
        model.config = like.config
        if like.can_generate():
            model.generation_config = like.generation_config
    model.save_pretrained(part, state_dict=weights)
    tokenizer.save_pretrained(part)
    for name in ("summary.json", "config.json"):  # an earlier model's, as in best/
        utils.discard(folder / name)
    for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
        utils.discard(folder / path.name)
        utils.move(path, folder / path.name)
    part.rmdir()


def weights_of(model: Any, name: str) -> tuple[str, dict[str, Tensor]]:
    """A model's file and what is in it; of an adapted one what is trained, by peft's names."""
    if hasattr(model, "lora_config"):
        named = [(k.replace(".default", ""), p) for k, p in model.named_parameters()]
        weights = {f"base_model.model.{k}": p.data for k, p in named if p.requires_grad}
        return f"adapter_{name}.safetensors", weights
    # transformers looks for a shared tensor by its first name; merging may have made it two (B43)
    tied, part = model.all_tied_weights_keys, model.get_parameter
    shared = {k for k, first in tied.items() if part(k) is part(first)}
    return f"{name}.safetensors", {k: v for k, v in model.state_dict().items() if k not in shared}


def save_weights(model: Any, folder: Path, name: str = "model") -> None:
    """Write a model's file into a folder; for the name "model" its configuration too."""
    if name == "model":
        model.config.architectures = [type(model).__name__]
        getattr(model, "lora_config", model.config).save_pretrained(folder)
        if model.can_generate() and not hasattr(model, "lora_config"):
            model.generation_config.save_pretrained(folder)
    file, weights = weights_of(model, name)
    norms = {k: str(x) for k, x in vars(model.config).items() if k in ("reward_mean", "reward_std")}
    safetensors.torch.save_file(weights, folder / file, {"format": "pt"} | norms)


def load_weights(model: Any, folder: Path, name: str = "model") -> None:
    """Read a model's weights from its file in a folder; stop where their names differ."""
    file, weights = weights_of(model, name)
    saved = safetensors.torch.load_file(folder / file)
    if weights.keys() != saved.keys():
        utils.stop(f"{folder / file}: fits another model; pass another")
    for key, weight in weights.items():
        weight.copy_(saved[key])


class Checkpoints(NamedTuple):
    """Checkpoints of a run: `models` and optimizer in safetensors, a few numbers, checksums.

    Unless in shards, each folder can be loaded as a model: the one named "model", or its adapter.
    """

    out: Path
    models: dict[str, Any]
    tokenizer: Any
    optimizer: Any
    keep: int  # of the newest

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `checkpoint/STEP`, which gets its name once it is whole and on the disk.

        All processes call it; of sharded models each writes its part, else the main one all.
        """
        main = distributed.is_main()
        final = self.out / "checkpoint" / f"{step:06d}"
        part = final.with_name(final.name + ".part")
        # interrupted right after it was saved
        if distributed.from_main(main and final.exists() and not damage(final)):
            return
        if main:
            for old in [final, *final.parent.glob("*.part")]:  # interrupted ones too
                utils.discard(old)
            part.mkdir(parents=True)
        distributed.barrier()
        moments = self.optimizer.state_dict()["state"]
        flat = {f"optimizer.{i}.{k}": x for i, of_i in moments.items() for k, x in of_i.items()}
        if self.is_sharded():
            distributed.save_shards(self.tensors() | flat, part / "shards")
            distributed.barrier()
        elif main:
            for name, model in self.models.items():
                save_weights(model, part, name)
            safetensors.torch.save_file(flat, part / "optimizer.safetensors")
        if not main:
            return
        self.tokenizer.save_pretrained(part)
        state = {"step": step} | state | {"digests": utils.digests}
        (part / "state.json").write_text(json.dumps(state))
        (part / "SHA256SUMS").write_text(checksums(part))
        utils.sync(self.out / "metrics.jsonl")  # a checkpoint is never ahead of its records
        utils.move(part, final)
        for path in {*utils.checkpoints(self.out)[self.keep :]} - {final}:
            with contextlib.suppress(OSError):  # NFS keeps what somebody reads
                utils.discard(path)

    def is_sharded(self) -> bool:
        return any(map(distributed.is_sharded, self.models.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Weights of all models by the names of model and weight."""
        of_models = [(name, weights_of(model, name)[1]) for name, model in self.models.items()]
        return {f"{name}.{key}": x for name, weights in of_models for key, x in weights.items()}

    def load(self) -> dict[str, Any]:
        """Restore the newest whole checkpoint and return its numbers; step 0 without one."""
        found = utils.checkpoints(self.out) if distributed.is_main() else []
        while found and (what := damage(found[0])):
            utils.say(f"{found.pop(0)} is damaged ({what})")
            if not found:
                utils.stop(
                    f"{self.out / 'checkpoint'}: none is whole; restore one or --overwrite", 1
                )
        folder = distributed.from_main(found[0] if found else None)  # all take the same one
        if folder is None:
            return {"step": 0}
        state = json.loads((folder / "state.json").read_text())
        for source, digest in state.pop("digests", {}).items():
            if utils.digests.get(source, digest) != digest:
                fix = "bring that back, or pass --overwrite"
                utils.stop(f"{source}: is not what the run began with; {fix}")
        if self.is_sharded():
            flat = {}
            like = [p for group in self.optimizer.param_groups for p in group["params"]]
            for name in distributed.names_in_shards(folder / "shards"):
                if name.startswith("optimizer."):
                    _, index, what = name.split(".")
                    of = torch.zeros(()) if what == "step" else like[int(index)]
                    flat[name] = torch.zeros_like(of)
            distributed.load_shards(self.tensors() | flat, folder / "shards")
        else:
            for name, model in self.models.items():
                load_weights(model, folder, name)
            flat = safetensors.torch.load_file(folder / "optimizer.safetensors")
        moments = defaultdict(dict)
        for key, value in flat.items():
            *_, index, name = key.split(".")
            moments[int(index)][name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": dict(moments)})
        return state


def checksums(folder: Path) -> str:
    """What `sha256sum` prints of a checkpoint's files; state.json is last, or the list is cut."""
    lines = []
    files = {path for path in folder.rglob("*") if path.is_file()} - {folder / "SHA256SUMS"}
    for path in sorted(files, key=lambda path: (path.name == "state.json", path)):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        written = (folder / "SHA256SUMS").read_text()
        wrong = {*written.splitlines()} - {*checksums(folder).splitlines()}  # a file more may be
        if "state.json" not in written:
            raise ValueError("SHA256SUMS is cut")
        names = [line.partition("  ")[2] for line in wrong]
        return f"{max(names)}: checksum differs" if wrong else None
    except (OSError, ValueError) as error:
        return utils.first_line(error)


def save_rollout(out: Path, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write `rollouts/000010.safetensors`: the rows of all processes, numbers as metadata."""
    size = numbers["samples_per_prompt"]  # the responses to a prompt stay together
    starts = range(0, len(tensors["scores"]), size)
    groups = distributed.gather(
        [{k: v[i : i + size].cpu() for k, v in tensors.items()} for i in starts]
    )
    if distributed.is_main():
        path = out / "rollouts" / f"{numbers['update']:06d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        whole = {k: torch.cat([group[k] for group in groups]) for k in groups[0]}
        part = path.with_name(path.name + ".part")
        safetensors.torch.save_file(whole, part, {k: str(v) for k, v in numbers.items()})
        utils.move(part, path)


def write_summary(out: Path, args: Any, model: Any, summary: dict[str, Any]) -> None:
    """Write the model card, README.md, and then summary.json, in the main process."""
    if distributed.is_main():
        utils.write_text(out / "README.md", card.model_card(args, model, summary))
        utils.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
