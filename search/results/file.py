"""A file of finished rows of a comparison, which runs in pieces add to.

``NAME.results.json`` holds, for every network that was trained and tested, its score on every test
example: a bit each where they are right or wrong. All that is shown, means, errors and paired
differences, is computed from these by ``hawq results``. What a row has under ``found`` is for those
who read the file without this program; nothing reads it back.

Rows are of one ``setting``: everything that all candidates of a comparison share, from the weights
before quantization to the recipe. Runs with other methods, budgets or seeds have the same setting,
and their rows merge: a row is a method under a budget, and has a training for every seed. A file
that an earlier version wrote is read with the keys that the config has gained since.
"""

import base64
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from search.errors import InputError, other_form
from search.folder import content_hash, write_atomically
from search.replicates import Replicates
from search.results.setting import shared

__all__ = [
    "Choice",
    "Results",
    "Row",
    "Setting",
    "Training",
    "add",
    "packed",
    "read_results",
    "unpacked",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(_Part):
    """What all rows of a comparison share."""

    tier: str = Field(description="Name of the config.")
    score_name: str
    num_examples: int = Field(description="Of the test split.", ge=2)
    unquantized: str = Field(description="Scores of the unquantized network, as a training has.")
    activation_bits: int | None = Field(
        description="Of all activations, where they are not searched; null: they are, or are none."
    )
    config: dict[str, Any] = Field(description="What of the config decides what is compared.")


class Choice(_Part):
    """An allocation."""

    bits: dict[str, int | list[int]] = Field(description="By layer and tensor; lists by channel.")
    order: list[list[str]] = Field(description="Blocks of layers as fine-tuning quantizes them.")
    compression: float
    average_bits: float
    activation_average_bits: float | None
    sensitivity: float = Field(description="Ω.")


class Training(_Part):
    """One network, fine-tuned and tested."""

    seed: int
    digest: str = Field(description="Of the choice that was trained, and of its order.")
    scores: str = Field(description="Each test example's score, base64: packed bits, or float32.")
    seconds: float = Field(description="Of fine-tuning.")
    command: str
    commit: str | None = Field(description="Of the program's checkout; null: it was none.")
    machine: str
    torch: str
    date: str = Field(description="UTC, ISO 8601.")


class Row(_Part):
    """A method under a budget."""

    setting: str
    budget: str
    method: str
    variant: str = Field(
        description="Digest of what was trained, where chance has no part in it: a method that "
        "chose otherwise has another row."
    )
    choices: dict[str, Choice] = Field(description="By digest.")
    trainings: list[Training]
    found: dict[str, Any] = Field({}, description="Means and errors, written anew every time.")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from other rows."""
        return self.setting, self.budget, self.method, self.variant

    def merged(self, later: "Row") -> "Row":
        """Join with the same row of another run, whose trainings replace equal ones."""
        trainings = {(t.seed, t.digest): t for t in [*self.trainings, *later.trainings]}
        return self.model_copy(
            update={
                "choices": self.choices | later.choices,
                "trainings": [trainings[key] for key in sorted(trainings)],
            }
        )

    def replicates(self, setting: Setting) -> Replicates:
        """Return the scores of all trainings."""
        return Replicates(
            tuple(t.seed for t in self.trainings),
            tuple(t.digest for t in self.trainings),
            np.stack([unpacked(t.scores, setting.num_examples) for t in self.trainings]),
        )


class Results(_Part):
    """The file."""

    schema_version: Literal[1] = 1
    settings: dict[str, Setting] = Field({}, description="By their hash.")
    rows: list[Row] = []

    def of(self, setting: str) -> list[Row]:
        """Return the rows of a setting."""
        return [row for row in self.rows if row.setting == setting]

    def joined(self, setting: str, shared: Setting, rows: Iterable[Row]) -> "Results":
        """Add rows; equal trainings are replaced, and new ones join the row that they belong to."""
        every = {row.key: row for row in self.rows}
        for row in rows:
            every[row.key] = every[row.key].merged(row) if row.key in every else row
        settings = {setting: shared} | self.settings
        found = [
            row.model_copy(update={"found": _found(row, list(every.values()), settings)})
            for row in every.values()
        ]
        return Results(settings=settings, rows=found)


def add(path: Path, setting: str, shared: Setting, rows: Iterable[Row]) -> Results:
    """Add rows to a file, made where there is none; atomically, and one writer after the other.

    Args:
        path: The file.
        setting: Hash of what all rows share.
        shared: That itself.
        rows: The rows.

    Raises:
        InputError: If the file is no file of results.
    """
    with _alone(path.parent):
        found = (read_results(path) if path.exists() else Results()).joined(setting, shared, rows)
        # A list of channels' bits in one line, so that a difference can be read.
        text = re.sub(
            r"\[\s*\n[\d,\s]+\]",
            lambda numbers: " ".join(numbers[0].split()).replace("[ ", "[").replace(" ]", "]"),
            found.model_dump_json(indent=1),
        )
        write_atomically(path, text + "\n")
    return found


def read_results(path: Path) -> Results:
    """Read a file of results.

    Raises:
        InputError: If it cannot be read, is none, or bits in it are not of all test examples.
    """
    try:
        found = Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: must be a readable file of results, got {error.strerror!r}: make one with "
            "hawq run CONFIG --results FILE"
        ) from error
    except ValidationError as error:
        raise InputError(
            f"{path}: must be what hawq run --results of this version writes, got "
            f"{other_form(error)}"
        ) from error
    for i, row in enumerate(found.rows):
        _refuse_odd(f"{path}: rows.{i}", row, found)
    return _completed(found)


def packed(scores: NDArray[np.floating[Any]]) -> str:
    """Write scores, shape (N,), as base64: packed bits where all are 0 or 1, else float32."""
    are_bits = bool(((scores == 0) | (scores == 1)).all())
    raw = np.packbits(scores.astype(np.bool_)) if are_bits else scores.astype("<f4")
    return base64.b64encode(raw.tobytes()).decode()


def unpacked(text: str, num: int) -> NDArray[np.float64]:
    """Read what ``packed`` wrote, of N = ``num`` scores.

    Raises:
        ValueError: If it does not hold so many.
    """
    raw = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(raw) == 4 * num:
        return raw.view("<f4").astype(np.float64)
    if len(raw) != -(-num // 8):
        raise ValueError(f"must hold {num} bits in {-(-num // 8)} bytes, got {len(raw)} bytes")
    return np.unpackbits(raw, count=num).astype(np.float64)


def _completed(found: Results) -> Results:
    current = Results()
    for name, setting in found.settings.items():
        config = shared(setting.config)
        hash_ = content_hash(config)
        rows = [row.model_copy(update={"setting": hash_}) for row in found.of(name)]
        current = current.joined(hash_, setting.model_copy(update={"config": config}), rows)
    return current


def _refuse_odd(where: str, row: Row, found: Results) -> None:
    if row.setting not in found.settings:
        raise InputError(f"{where}.setting: must be among the settings, got {row.setting!r}")
    setting = found.settings[row.setting]
    if not row.trainings:
        raise InputError(f"{where}.trainings: must be at least one, got none")
    texts = [(f"{where}.trainings.{t}.scores", tr.scores) for t, tr in enumerate(row.trainings)]
    for place, text in [*texts, (f"settings.{row.setting}.unquantized", setting.unquantized)]:
        try:
            unpacked(text, setting.num_examples)
        except ValueError as error:
            raise InputError(f"{place}: {error}") from error
    for training in row.trainings:
        if training.digest not in row.choices:
            raise InputError(f"{where}.choices: must hold {training.digest}, which was trained")


def _found(row: Row, every: list[Row], settings: dict[str, Setting]) -> dict[str, Any]:
    setting = settings[row.setting]
    replicates = row.replicates(setting)
    score = replicates.measured()
    drop = replicates.drop_from(unpacked(setting.unquantized, setting.num_examples))
    differences = {}
    for other in every:
        if other.key[:2] == row.key[:2] and other.key != row.key:
            gained = replicates.minus(other.replicates(setting))
            if gained is not None:
                differences[f"{other.method} {other.variant}".strip()] = {
                    "difference": gained.mean,
                    "error": gained.error,
                    "seeds": gained.num_seeds,
                }
    return {
        "score": score.mean,
        "images_error": score.images_error,
        "seeds_error": score.seeds_error,
        "drop": drop.mean,
        "drop_error": drop.error,
        "by_training": replicates.scores.mean(1).tolist(),
        "minus": differences,
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other writers, with nothing left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
