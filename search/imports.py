"""Bits and traces of other programs, in the names of a run.

NNCF names a weight by its scope, ``ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/…``:
the names in brackets, up to the layer, are PyTorch's own. Its ``bitwidth_per_scope`` is a list of
[bits, scope], alone or anywhere in a JSON file. Its average traces are a tensor without names, one
for each layer in the order in which the network runs.
"""

import csv
import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hawq.allocation import Allocation
from hawq.cost import average_bits, compression
from search.artefacts import Candidate
from search.errors import InputError
from search.tables import Tables

__all__ = ["ImportedBits", "is_torch_file", "priced", "read_average_traces", "read_bits"]

_LISTED = 3
# What NNCF puts into a layer, and the node that it adds to a layer's scope.
_INSIDE = re.compile(r"/(ModuleDict\[|UpdateWeight|[a-z_0-9]+$).*")
_BRACKETS = re.compile(r"\w+\[(\w+)\]")


@dataclass(frozen=True, slots=True)
class ImportedBits:
    """Bits that a file gives.

    Attributes:
        bits: By group of the run.
        left_out: What the file gives bits to that is no weight: activations by NNCF's scopes.
    """

    bits: Mapping[str, int]
    left_out: tuple[str, ...]


def read_bits(path: Path, names: Sequence[str]) -> ImportedBits:
    """Read who receives how many bits.

    Args:
        path: NNCF's JSON, ``{"LAYER": bits}``, or CSV with the columns layer and bits.
        names: Groups of the run, of layers and activations, or of channels.

    Raises:
        InputError: If the file is none of these, or names what the run does not have.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: must be a text file of bits ({error})") from error
    entries = list(_entries(path, text))
    left_out = tuple(name for name, _ in entries if _is_activation(name))
    found: dict[str, int] = {}
    for name, bits in entries:
        if not _is_activation(name):
            group = _group(path, name, names)
            if found.setdefault(group, bits) != bits:
                raise InputError(
                    f"{path}: {group} must be given once, got {found[group]} and {bits}"
                )
    lacking = [name for name in names if name not in found]
    if lacking:
        raise InputError(
            f"{path}: must give bits to every group of the run, lacks {_several(lacking)}"
        )
    return ImportedBits({name: found[name] for name in names}, left_out)


def priced(given: ImportedBits, tables: Tables, source: str) -> Candidate:
    """Price imported bits by a run's tables, as an allocation of its own.

    Args:
        given: The bits.
        tables: Of the run.
        source: Where they came from.

    Raises:
        InputError: If bits are not on the menu, or break a tie.
    """
    space = tables.space
    try:
        allocation = Allocation.of(space, given.bits)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    costs = {name: cost.of(space, allocation) for name, cost in tables.costs.items()}
    size, activations = costs["weight_bits"], costs.get("activation_bits")
    return Candidate(
        method="imported",
        budget=source,
        granularity="channel" if any(g.is_channel for g in space.groups) else "layer",
        digest=allocation.digest,
        bits=dict(given.bits),
        costs=costs,
        average_bits=average_bits(space, size),
        compression=compression(space, size),
        activation_average_bits=activations and average_bits(space, activations, "activations"),
        activation_compression=activations and compression(space, activations, "activations"),
        sensitivity=tables.omega(allocation),
        activation_sensitivity=None
        if activations is None
        else tables.omega(allocation, "activations"),
        bound=None,
        evaluations=0,
        seconds=0.0,
    )


def is_torch_file(path: Path) -> bool:
    """Whether a file is one of torch's: traces, not bits."""
    try:
        with path.open("rb") as file:
            return file.read(2) in {b"PK", b"\x80\x02"}
    except OSError:
        return False  # the reader says what is wrong with it


def read_average_traces(path: Path, names: Sequence[str]) -> dict[str, float]:
    """Read NNCF's average traces, a torch file of one tensor.

    Args:
        path: The file.
        names: Groups of the weights, in the order in which the network runs.

    Returns:
        Trace over number of weights, by group.

    Raises:
        InputError: If the file holds anything else, or another number of traces.
    """
    import torch  # noqa: PLC0415  a file of bits needs none

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: must be a torch file of average traces ({reason})") from error
    if not isinstance(found, torch.Tensor) or found.numel() != len(names):
        got = str(found.numel()) if isinstance(found, torch.Tensor) else type(found).__name__
        raise InputError(
            f"{path}: must hold an average trace for each of {len(names)} layers, got {got}"
        )
    values = found.double().flatten()
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{path}: average traces must be finite, got {values.tolist()}")
    return dict(zip(names, values.tolist(), strict=True))


def _entries(path: Path, text: str) -> Iterator[tuple[str, int]]:
    """Yield names as the file has them, and their bits."""
    if text.lstrip()[:1] in {"{", "["}:
        try:
            yield from _json_entries(path, json.loads(text))
        except ValueError as error:
            raise InputError(f"{path}: must be JSON, got damaged text ({error})") from error
        return
    rows = csv.DictReader(io.StringIO(text))
    if not {"layer", "bits"} <= set(rows.fieldnames or ()):
        raise InputError(
            f"{path}: must be NNCF's bitwidth_per_scope or CSV with the columns layer and bits, "
            f"got {text[:40]!r}"
        )
    for row in rows:
        yield row["layer"].strip(), _bits(path, row["bits"], row["layer"])


def _json_entries(path: Path, document: Any) -> Iterator[tuple[str, int]]:
    listed = _scopes(document)
    if listed is not None:
        for entry in listed:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
                raise InputError(f"{path}: must be a list of [bits, scope], got {entry!r}")
            yield entry[1], _bits(path, entry[0], entry[1])
        return
    bits = document.get("bits", document)  # an allocation of ours, or plain
    if not isinstance(bits, dict) or not bits:
        raise InputError(f"{path}: must hold bitwidth_per_scope, or bits by layer, got neither")
    for name, given in bits.items():
        yield name, _bits(path, given, name)


def _scopes(document: Any) -> list[Any] | None:
    """Find NNCF's list, alone or anywhere in its config."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        return None
    own = document.get("bitwidth_per_scope")
    if isinstance(own, list):
        return own
    inner = (_scopes(value) for value in document.values() if isinstance(value, dict))
    return next((found for found in inner if found is not None), None)


def _bits(path: Path, given: object, name: str) -> int:
    text = str(given).strip()
    if not text.isdigit():
        raise InputError(f"{path}: bits of {name} must be a whole number, got {given!r}")
    return int(text)


def _is_activation(scope: str) -> bool:
    """Whether a scope of NNCF is what an operator writes, which has no name here."""
    return scope.endswith(("|OUTPUT", "|INPUT")) or bool(
        re.match(r"(TargetType\.)?(OPERATOR_POST_HOOK|OPERATOR_PRE_HOOK)\b", scope)
    )


def _group(path: Path, name: str, names: Sequence[str]) -> str:
    own = _own_name(name)
    for group in (own, f"w:{own}", name):
        if group in names:
            return group
    near = get_close_matches(f"w:{own}", names, _LISTED, 0.3) or list(names[:_LISTED])
    raise InputError(
        f"{path}: {name!r} must be a layer of the run, got none; the nearest are {', '.join(near)}"
    )


def _own_name(scope: str) -> str:
    """Return PyTorch's name of the layer that a scope of NNCF is of; other names stay."""
    if "/" not in scope:
        return scope
    plain = re.sub(r"^\S+ ", "", scope).partition("|")[0]
    return ".".join(_BRACKETS.findall(_INSIDE.sub("", plain)))


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (
        f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    )
