"""The best epoch so far of all trials, always there to be taken: ``RUN/best/``.

    best/model.safetensors   the quantized network's weights and scales
    best/allocation.json     its bits, methods, score, epoch, recipe and seed

``best`` is a symbolic link to a folder that is written whole before the link is moved to it, so
both files are always of the same epoch, whatever is killed when. The process that trains offers
each epoch once it is on disk, one process at a time by a file lock, which dies with its holder:
nothing is missed while the driver is busy or dead. Of equal scores the earlier epoch, then the
smaller name is kept, so that the end does not depend on which trial came first.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from search.artefacts import EpochRecord
from search.folder import write_atomically
from search.tasks.checkpoint import save_state
from search.trials.specification import TrialSpec

__all__ = ["BestSoFar"]


@dataclass(frozen=True, slots=True)
class BestSoFar:
    """The best epoch of all trials that are offered.

    Attributes:
        path: Of the link.
        of: What scores must share to be compared: the weights before quantization, the task. An
            export of anything else gives way to the first offer.
        methods: By an allocation's digest who chose it, as ``METHOD at BUDGET``.
    """

    path: Path
    of: Mapping[str, str]
    methods: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def offer(self, model: nn.Module, spec: TrialSpec, record: EpochRecord) -> None:
        """Export an epoch of a trial if no better one was offered before.

        Args:
            model: As it was scored.
            spec: Its trial. Epochs at which some layers are not quantized yet are passed over.
            record: The epoch.
        """
        is_staged = spec.order or spec.recipe.activations_first
        if is_staged and record.epoch < spec.recipe.epochs:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._is_better(spec, record):
                self._replace(model, spec, record)

    def _is_better(self, spec: TrialSpec, record: EpochRecord) -> bool:
        document = self.path / "allocation.json"
        if not document.exists():
            return True
        old = json.loads(document.read_text(encoding="utf-8"))
        if old["of"] != dict(self.of):
            return True
        ours = (-record.search_score, record.epoch, spec.folder.name)
        return ours < (-old["search_score"], old["epoch"], old["trial"])

    def _replace(self, model: nn.Module, spec: TrialSpec, record: EpochRecord) -> None:
        new = self.path.with_name(f"{self.path.name}.{spec.folder.name}.{record.epoch}")
        save_state(new / "model.safetensors", model.state_dict())
        write_atomically(
            new / "allocation.json", json.dumps(self._document(spec, record), indent=1)
        )
        link = self.path.with_name(f"{self.path.name}.next")
        link.unlink(missing_ok=True)  # of one that was killed just here
        link.symlink_to(new.name, target_is_directory=True)
        os.replace(link, self.path)
        # What a kill left behind goes with the old one; the lock's file stays.
        for folder in self.path.parent.glob(f"{self.path.name}.*"):
            if folder.is_dir() and folder != new:
                shutil.rmtree(folder)

    def _document(self, spec: TrialSpec, record: EpochRecord) -> dict[str, Any]:
        return {
            "search_score": record.search_score,
            "epoch": record.epoch,
            "digest": spec.digest,
            "methods": list(self.methods.get(spec.digest, ())),
            "bits": dict(spec.bits),
            "recipe": asdict(spec.recipe),
            "seed": spec.seed,
            "trial": spec.folder.name,
            "of": dict(self.of),
        }
