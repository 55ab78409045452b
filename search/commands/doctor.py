"""``hawq doctor``: what this machine has, and what each optional part still needs."""

import importlib.metadata
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hawq.cost import FLOAT_BITS, mib
from search.cluster import connected
from search.config_file import load_config
from search.errors import InputError
from search.events import EventLog
from search.folder import RunFolder
from search.machine import machine, versions
from search.pipeline import prepared
from search.quantities import significant
from search.stages.search import Search

__all__ = ["Check", "examine", "examine_config"]

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


def examine_config(path: Path, overrides: Sequence[str]) -> list[Check]:
    """Build what a config describes, and look at one example of it, without running anything.

    Args:
        path: Of the config.
        overrides: KEY=VALUE.
    """
    try:
        config = load_config(path, overrides)
    except InputError as error:
        return [Check("config", False, str(error))]
    checks = [Check("config", True, str(path))]
    with TemporaryDirectory() as nowhere:
        folder = RunFolder(Path(nowhere))
        try:
            search = prepared(config, folder, EventLog(folder.path / "events.jsonl", ()))
            checks += _seen(search)
        except InputError as error:
            return [*checks, Check("search", False, str(error))]
    return checks


def _seen(search: Search) -> Iterator[Check]:
    """Say what there is to search, and whether its loss and its score are numbers."""
    task, space = search.task, search.space
    sizes = ", ".join(f"{task.size(split):,} {split}" for split in ("train", "search", "test"))
    yield Check("data", True, sizes)
    for remark in task.remarks() if hasattr(task, "remarks") else ():
        yield Check("data", None, remark)
    model = task.model()
    if search.checkpoint is not None:
        model.load_state_dict(search.checkpoint)
    size = mib(sum(p.numel() for p in model.parameters()) * FLOAT_BITS)
    yield Check("network", True, f"{type(model).__name__}, {size:.1f} MiB in floating point")
    tensors = len(space.groups) - len(search.layers) if search.config.searches_activations else 0
    chosen = f"{len(search.layers)} layers" + (f" and {tensors} activation tensors" * bool(tensors))
    yield Check("space", True, f"{chosen}: {', '.join(b.label for b in search.config.budgets)}")
    batch = task.batch("train", torch.arange(1))
    loss = float(task.losses(model, batch).detach()[0])
    yield Check("loss", math.isfinite(loss), f"{significant(loss)} on the first training example")
    with torch.no_grad():
        values = task.scores(model, task.batch("search", torch.arange(1)))
    yield Check("score", bool(torch.isfinite(values).all()), task.score_name)


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
