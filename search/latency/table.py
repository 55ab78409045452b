"""The table itself: a JSON file, written by ``hawq profile`` or by hand.

    {"schema_version": 1,
     "layers": {"conv1": [{"weight_bits": 8, "activation_bits": 8, "ns": 26700}]}}

That much is enough for a table of one's own; ``activation_bits: null``, or leaving it out, means
that the layer takes so long at any activation width.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from search.config import suggestion
from search.errors import InputError

__all__ = ["LatencyEntry", "LatencyTable", "read_latency"]

# Sums over thousands of layers stay within 64 bits; it is eleven days.
_MOST_NS = 10**15
_MOST_LINES = 5

Bits = Annotated[StrictInt, Field(ge=1, le=8)]
Nanoseconds = Annotated[StrictInt, Field(ge=0, le=_MOST_NS)]

_WANTED = {
    "schema_version": "must be 1",
    "kind": "must be measured, roofline or given",
    "weight_bits": "must be whole bits within 1..8",
    "activation_bits": "must be whole bits within 1..8, or null for any width",
    "ns": "must be whole nanoseconds from 0 to 10^15",
    "layers": "must be an object of layer names, each with a list of entries",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LatencyEntry(_Frozen):
    """What one layer takes at one precision: all of its calls for one batch together."""

    weight_bits: Bits
    activation_bits: Bits | None = Field(None, description="null: at any width.")
    ns: Nanoseconds
    standard_error_ns: Nanoseconds | None = Field(
        None, description="Over the repeats of one run; another run may differ by more."
    )


class LatencyTable(_Frozen):
    """Nanoseconds of every layer by the bits of its weight and of the tensor that it reads.

    Raises:
        ValueError: If there is no layer, a layer without entries or with two for one precision,
            or one with entries for some activation widths and for any.
    """

    schema_version: Literal[1]
    kind: Literal["measured", "roofline", "given"] = "given"
    machine: dict[str, str] = Field({}, description="What it was measured on.")
    versions: dict[str, str] = {}
    batch_size: int | None = Field(None, ge=1, description="Examples that go through at once.")
    threads: int | None = Field(None, ge=1)
    finished: str | None = Field(None, description="UTC, ISO 8601.")
    notes: list[str] = Field([], description="At which precision each width runs, and the like.")
    macs: dict[str, int] = Field({}, description="Multiply-accumulates for one example.")
    fp32_ns: dict[str, Nanoseconds] = Field({}, description="The layer unquantized.")
    fp32_standard_error_ns: dict[str, Nanoseconds] = {}
    layers: dict[str, list[LatencyEntry]]

    @model_validator(mode="after")
    def _consistent(self) -> "LatencyTable":
        if not self.layers:
            raise ValueError("layers: must hold at least one layer, got none")
        for layer, entries in self.layers.items():
            if not entries:
                raise ValueError(f"layers.{layer}: must hold at least one entry, got none")
            widths = [(entry.weight_bits, entry.activation_bits) for entry in entries]
            twice = next((pair for pair in widths if widths.count(pair) > 1), None)
            if twice is not None:
                raise ValueError(
                    f"layers.{layer}: must hold one entry for each precision, got several for "
                    f"{_words(*twice)}"
                )
            if len({activation is None for _, activation in widths}) > 1:
                raise ValueError(
                    f"layers.{layer}: activation_bits must be given in all entries or in none, "
                    "got both"
                )
        return self

    def by_bits(
        self, read_several: Collection[str] = ()
    ) -> dict[str, dict[int | tuple[int, int], int]]:
        """Return nanoseconds of each layer by widths, as ``hawq.cost.latency`` takes them.

        Args:
            read_several: Layers that read several tensors, whose widths may differ: theirs are
                returned by weight bits alone, at the slowest of the activation widths.

        Returns:
            Keys are (weight bits, activation bits), or weight bits alone.
        """
        tables: dict[str, dict[int | tuple[int, int], int]] = {}
        for layer, entries in self.layers.items():
            table = tables.setdefault(layer, {})
            for entry in entries:
                weight, activation = entry.weight_bits, entry.activation_bits
                if activation is None or layer in read_several:
                    table[weight] = max(entry.ns, table.get(weight, 0))
                else:
                    table[weight, activation] = entry.ns
        return tables


def read_latency(path: Path) -> LatencyTable:
    """Read a table, one's own or one that ``hawq profile`` wrote.

    Raises:
        InputError: If there is no such file, or it is not a table: the file, the key, what was
            found there and what would be right, a line for each of the first mistakes.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise InputError(
            f"{path}: the latency table must be readable ({error.strerror}): make one with "
            "hawq profile"
        ) from error
    except _RepeatedKeyError as error:
        raise InputError(f"{path}: {error}") from error
    except ValueError as error:
        raise InputError(f"{path}: the latency table must be JSON, got {error}") from error
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: must be an object with schema_version and layers, "
            f"got {type(document).__name__}"
        )
    try:
        return LatencyTable.model_validate(document)
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in _lines(error))) from error


class _RepeatedKeyError(Exception):
    """An object of a JSON file has a key twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, whose reader would keep only the last of equal keys."""
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise _RepeatedKeyError(f"{twice}: must be given once, got it {keys.count(twice)} times")
    return dict(pairs)


def _lines(error: ValidationError) -> list[str]:
    """Turn pydantic's errors into one line each: key, what would be right, what was found."""
    lines = []
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        path, key = ".".join(place), place[-1] if place else ""
        if problem["type"] == "extra_forbidden":
            known: Mapping[str, object] = (
                LatencyTable.model_fields if len(place) == 1 else LatencyEntry.model_fields
            )
            lines.append(f"{path}: unknown key{suggestion(key, known)}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: {_WANTED.get(key, 'must be given')}, got nothing")
        elif problem["type"] == "value_error":
            lines.append(problem["msg"].removeprefix("Value error, "))
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            found = json.dumps(problem["input"])
            given = found if len(found) < 40 else type(problem["input"]).__name__
            lines.append(f"{path}: {_WANTED.get(key, message)}, got {given}")
    more = len(lines) - _MOST_LINES
    return lines[:_MOST_LINES] + ([f"and {more} more such mistakes"] if more > 0 else [])


def _words(weight_bits: int, activation_bits: int | None) -> str:
    if activation_bits is None:
        return f"weight_bits {weight_bits}"
    return f"weight_bits {weight_bits} with activation_bits {activation_bits}"
