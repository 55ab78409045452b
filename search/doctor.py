"""``hawq doctor``: what this machine has, and what each optional part still needs."""

import importlib.metadata
import re
from dataclasses import dataclass

import torch

from search.cluster import connected
from search.errors import InputError
from search.machine import machine, versions

__all__ = ["Check", "examine"]

_DISTRIBUTION = "hawq-search"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        subject: What was looked at.
        ok: Whether it works; None where it is optional and absent.
        finding: In words, with the remedy where something lacks.
    """

    subject: str
    ok: bool | None
    finding: str


def examine(address: str | None) -> list[Check]:
    """Look at versions, devices, optional extras, and start (or reach) Ray.

    Args:
        address: Of a cluster; None starts Ray on this machine.
    """
    checks = [Check(name, True, fact) for name, fact in machine().items()]
    checks += [Check(name, found != "not installed", found) for name, found in versions().items()]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    finding = f"{gpus} GPUs" if gpus else "no GPU: everything runs on processors"
    checks.append(Check("devices", True if gpus else None, finding))
    checks += _extras()
    try:
        with connected(address, dashboard=False):
            import ray  # noqa: PLC0415  after `connected` has set its environment

            resources = ray.cluster_resources()
        finding = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
        checks.append(Check("Ray", True, f"{address or 'started on this machine'}: {finding}"))
    except InputError as error:
        checks.append(Check("Ray", False, str(error)))
    return checks


def _extras() -> list[Check]:
    """Say of each optional extra which of its packages are missing."""
    metadata = importlib.metadata.metadata(_DISTRIBUTION)
    needs = importlib.metadata.requires(_DISTRIBUTION) or []
    checks = []
    for extra in metadata.get_all("Provides-Extra") or []:
        wanted = [
            re.split(r"[^\w.-]", need, maxsplit=1)[0]
            for need in needs
            if re.search(rf"extra == ['\"]{extra}['\"]", need)
        ]
        missing = [name for name in wanted if not _installed(name)]
        if missing:
            remedy = f"lacks {', '.join(missing)}: pip install 'hawq-search[{extra}]'"
            checks.append(Check(f"extra {extra}", None, remedy))
        else:
            checks.append(Check(f"extra {extra}", True, "complete"))
    return checks


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
