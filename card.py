"""The model card of a run: README.md in its folder, in the form that the Hugging Face hub reads.

What flags hold is shown in code blocks, as JSON.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

TAGS = "tags: [rlhf, ppo-rlhf]"


def model_card(args: Any, model: Any, summary: dict[str, Any]) -> str:
    """The card of a stage that ran with `args` and left `model` and `summary`.

    What it says first is the docstring of the file that defines `args`, up to "In:".
    """
    about = str(inspect.getmodule(type(args)).__doc__).split("\n\nIn:")[0]
    flags = {"model": args.model, "dataset": args.dataset}
    for name, value in vars(args).items():
        if name not in ("resume", "overwrite") and value != getattr(type(args), name, None):
            flags[name] = value
    base = hub_model(args.model)
    head = f"{TAGS}\nbase_model: {base}" if base else TAGS
    kind, use = "CausalLM", ""
    if hasattr(model, "score"):
        kind = "SequenceClassification"
        use = "# for a text that ends with one tokenizer.eos_token:\n"
        use += "# score = (logit - model.config.reward_mean) / model.config.reward_std\n"
    return f"""---
library_name: transformers
{head}
---

# {about}

```python
from transformers import AutoModelFor{kind}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(".")  # this folder, or its hub id
model = AutoModelFor{kind}.from_pretrained(".")
{use}```

Model, data, and the flags that were passed or filled in:

{fenced(json.dumps(flags, indent=2))}

Result:

{fenced(json.dumps(summary, indent=2))}
"""


def hub_model(model: str) -> str | None:
    """The hub id, in quotes, that this stage or, as its card says, an earlier one started from."""
    folder = Path(model).expanduser()
    if model == "tiny":
        return None
    if not folder.exists():  # it was loaded, so it is an id
        return json.dumps(model)
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(rf'^{re.escape(TAGS)}\nbase_model: ("[\w./-]+")$', text, re.MULTILINE)
    return found[1] if found else None


def fenced(text: str) -> str:
    """A Markdown code block, which shows a text as it is: its fence is longer than any within."""
    fence = "`" * (3 + text.count("`"))
    return f"{fence}\n{text}\n{fence}"
