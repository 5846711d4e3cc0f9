"""A conversation with a trained model: python generate.py runs/ppo_rlhf

A line typed is a turn of the conversation; lines piped in are answered each by itself.
"""

import contextlib
import dataclasses
import sys
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import dataset
import encoding
import generate
import utils


@dataclasses.dataclass
class Args:
    """Answer lines, piped or typed; typed, /reset starts anew, an empty line ends."""

    model: tyro.conf.Positional[str] = "runs/ppo_rlhf"
    compare: str | None = None
    """Another model, which answers too."""
    score: str | None = None
    """Reward model."""
    text: bool = False
    """Lines are whole prompts, as for a model trained on texts; no chat template."""
    max_new_tokens: int | None = None
    """Max tokens per answer; None, for this and the next three: the (first) model's own setting."""
    temperature: float | None = None
    """0: greedy, as where `do_sample` is false."""
    top_k: int | None = None
    """Sample from the most probable tokens only; 0: from all."""
    top_p: float | None = None
    """Sample from the most probable tokens that together reach this; 1.0: from all."""
    seed: int = 1
    """Seed of sampling."""
    device: str = "auto"
    """cpu, cuda, or auto, which is cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matmuls; auto: bfloat16 where the device has it, else float32."""
    trust_remote_code: bool = False
    """Run code that comes with a model, with your own access rights."""
    resume = False  # start_process asks


@torch.no_grad()
def main(args: Args) -> None:
    utils.check_numbers(args, "temperature top_k", "top_p")
    args, process = utils.start_process(args)
    device = process.device
    typed = sys.stdin.isatty()
    with contextlib.suppress(AttributeError, ImportError):
        sys.stdin.reconfigure(errors="replace")  # a file of another encoding
        if typed:
            import readline  # noqa: F401  # arrow keys
    speakers = []
    for name in filter(None, (args.model, args.compare)):
        tokenizer = encoding.load_tokenizer(name)
        model = utils.load_causal_lm(name, device, tokenizer)
        generate.check(model, name)
        utils.freeze(model, args.dtype)
        speakers.append((name, model, tokenizer, []))
    judge = None
    if args.score:
        judge = utils.load_classifier(args.score, device, trained=True)
        reader = encoding.load_tokenizer(args.score), utils.context_length(judge)
    if typed and (args.text or not all(x[2].chat_template for x in speakers)):
        print("each line is a whole prompt, as in the training data, with \\n for a line break")
    settings = {"max_new_tokens": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    config = vars(speakers[0][1].generation_config)
    if config.get("do_sample") is False and not (args.top_k or args.top_p):
        config = config | {"temperature": 0.0}
    for source in (config, vars(args)):
        settings |= {k: x for k in settings if (x := source.get(k)) is not None}
    length = settings.pop("max_new_tokens")

    def answer(line: str, name: str, model: Any, tokenizer: Any, chat: list) -> None:
        if typed and line == "/reset":
            return chat.clear()
        messages = [*chat, {"role": "user", "content": line}]
        is_chat = tokenizer.chat_template and not args.text
        row = dataset.Row({"prompt": messages if is_chat else line}, name)
        [prompt] = encoding.encode_prompts(tokenizer, [row], 2**30)
        context = min(map(utils.context_length, filter(None, (model, judge))))
        room = context - len(prompt.ids)
        if chat and room < min(length, context // 2):
            del chat[:2]  # the oldest turn
            return answer(line, name, model, tokenizer, chat)
        if room < 1:
            utils.stop(f"{name}: the prompt fills its context; shorten it")

        printed = []

        def show(ids: Tensor) -> str:
            """Print what is new, but no part of a character."""
            [text] = encoding.answer_texts(tokenizer, [prompt], ids.tolist())
            new = utils.visible(text.strip("\ufffd \n"))[len(printed) :]
            printed.extend(new)
            print(new if typed else new.replace("\n", "\\n"), end="", flush=True)
            return text

        print(f"{name}\t" * bool(args.compare), end="")
        ids, mask = encoding.pad([prompt.ids], 0, "left", device)
        stops = generate.stop_token_ids(tokenizer, "eos", model.generation_config)
        ends = model.generation_config.eos_token_id
        if isinstance(ends, list) and tokenizer.eos_token_id in ends:
            stops = ends  # of a policy, trained with --stop-token
        uniform = generate.random_numbers(1, min(length, room)).to(device)
        ids, mask = generate.generate(
            model, ids, mask, uniform, stops, pad_id=0, stride=1, watch=show, **settings
        )
        text = show(ids[:, : mask.sum()])
        chat[:] = [*messages, {"role": "assistant", "content": text}] * typed
        if judge:  # as PPO asks it
            encoding.encode_prompts(tokenizer, [row], 2**30, reader)  # stops where it has no room
            ids, _ = encoding.as_judged(reader, [prompt], [text])
            raw = utils.last_token_scores(judge, *encoding.pad(ids, 0, "right", device))
            print(f"\tscore {utils.normalize_scores(judge, raw).item():.2f}", end="")

    endings = (EOFError, KeyboardInterrupt, BrokenPipeError)
    with contextlib.suppress(*endings), utils.autocast(device, args.dtype):
        while (line := input("> " * typed).removesuffix("\r").replace("\\n", "\n")) or not typed:
            for speaker in speakers:
                with contextlib.suppress(SystemExit):  # it is said what is wrong
                    answer(line, *speaker)
                print(flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
