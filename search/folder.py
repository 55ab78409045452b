"""A run's folder: one artefact a stage, each with the inputs that it was made from.

    config.yaml            the resolved config
    model.json             model.safetensors: the weights that are searched
    curvature.json         curvature.units.jsonl: partial sums, one line a finished unit
    tables.json candidates.json calibration.json trials.json test.json
    scores/DIGEST-HASH.json  an allocation's score without training, example by example
    trials/DIGEST-HASH/    a fine-tuned allocation: checkpoint.pt, result.json, model.safetensors
    study.json             study/optuna.db, study/NUMBER-DIGEST-HASH/: where a study was asked for
    best/                  the best epoch so far: model.safetensors, allocation.json
    tune/                  Ray's own files of every trial; tensorboard --logdir reads them
    searches.json          searches/METHOD-BUDGET-SEED/: evaluations.jsonl, record.json
    agreement.json         comparison.json, comparison.html: where searches are compared
    summary.json           everything above as data; report.html: the same to look at
    events.jsonl           what happened

An artefact is written to a temporary file and renamed, so it is whole or absent. It is good for
as long as its inputs are the same; inputs are plain data and stored in it, so that a run can say
what changed. Everything is JSON, YAML or safetensors and can be read without this program.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from search.artefacts import StageCost
from search.errors import InputError, other_form

__all__ = ["RunFolder", "content_hash", "write_atomically"]

Result = TypeVar("Result", bound=BaseModel)


def content_hash(data: object) -> str:
    """Hash plain data, such as a stage's inputs or result."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole, or the old one, whatever happens meanwhile.

    Raises:
        OSError: With the file's name, if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a write's own error does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """The folder of one run.

    Args:
        path: Made when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def artefact(self, stage: str) -> Path:
        """Return the path of a stage's artefact."""
        return self.path / f"{stage}.json"

    def save(
        self, stage: str, inputs: Mapping[str, Any], result: BaseModel, cost: StageCost
    ) -> None:
        """Write a stage's artefact."""
        document = {
            "stage": stage,
            "inputs": inputs,
            "cost": cost.model_dump(),
            "result": result.model_dump(mode="json"),
        }
        write_atomically(self.artefact(stage), json.dumps(document, indent=1, ensure_ascii=False))

    def inputs(self, stage: str) -> dict[str, Any] | None:
        """Return what a stage's artefact was made from; None where there is no artefact."""
        document = self._read(stage)
        return None if document is None else document["inputs"]

    def load(self, stage: str, kind: type[Result]) -> tuple[Result, StageCost]:
        """Read a stage's artefact.

        Raises:
            InputError: If there is none, or another version of the program wrote it.
        """
        document = self._read(stage)
        if document is None:
            raise InputError(f"{self.artefact(stage)} must exist, got nothing: run the stage first")
        try:
            result = kind.model_validate(document["result"])
            return result, StageCost.model_validate(document["cost"])
        except ValidationError as error:
            raise InputError(
                f"{self.artefact(stage)} must be an artefact of this version, got "
                f"{other_form(error, repr(stage))}: delete it to run the stage again, or give "
                "another --out"
            ) from error

    def changes(self, stage: str, config: Mapping[str, Any]) -> list[str]:
        """Say how a stage's part of the config differs from the one its artefact was made with.

        Returns:
            ``"curvature.rtol was 0.05, is 0.02"`` and the like; empty where nothing differs.
        """
        old = self.inputs(stage)
        return [] if old is None else list(_differences(old["config"], config, ""))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one driver.

        Raises:
            InputError: If another driver holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "run.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise InputError(
                    f"{self.path} must not be in use, but process {file.read() or '?'} runs a "
                    "search in it: wait for it, or give another --out"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _read(self, stage: str) -> dict[str, Any] | None:
        path = self.artefact(stage)
        if not path.exists():
            return None
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{path} must be the artefact that a run wrote, got damaged JSON ({error}): "
                "delete it to run the stage again"
            ) from error
        return document


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else key
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{path} was {json.dumps(old)}, is {json.dumps(new)}"
