"""Stop, in one line, where what benchmarks/gpu.py needs is missing or too old.

    python benchmarks/gpu_check.py             # benchmarks/gpu.sh asks this first
    python benchmarks/gpu_check.py --dry-run   # without a GPU

It is a file of its own since it may import only what is there.
"""

import importlib.metadata
import sys
from importlib.util import find_spec
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit("error: missing: packaging; install requirements-dev.txt, see README")


def main() -> None:
    lines = (Path(__file__).parent.parent / "requirements.txt").read_text().splitlines()
    missing = []
    for needed in (Requirement(line) for line in [*lines, "pytest"] if not line.startswith("#")):
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not needed.specifier.contains(version, prereleases=True):
            missing.append(f"{needed} (there is {version})")
    if "--dry-run" not in sys.argv and not has_gpu():
        missing.append("a CUDA device")
    if missing:
        sys.exit(f"error: missing: {', '.join(missing)}; install requirements-dev.txt, see README")
    if optional := [name for name in ("trl", "vllm") if find_spec(name) is None]:
        print(f"missing: {', '.join(optional)}; what needs them is left out", flush=True)


def has_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
