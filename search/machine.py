"""What a run happened on: processor, memory, versions of what decides its bits."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["machine", "machine_line", "versions"]

_PACKAGES = (
    "hawq-search", "torch", "torchvision", "ray", "optuna", "gymnasium", "numpy", "scipy",
)  # fmt: skip


def machine() -> dict[str, str]:
    """Describe this machine in words."""
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
    }
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    return facts


def machine_line(facts: Mapping[str, str]) -> str:
    """Write what :func:`machine` says in a few words: what decides how long something takes."""
    parts = [facts["processor"], f"{facts['cpus']} CPUs", *filter(None, [facts.get("gpus")])]
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
