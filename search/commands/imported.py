"""``hawq import``: what another program chose, or traced, priced by a run's tables."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from search.artefacts import Candidate, TablesArtefact
from search.commands.allocate import read_budget, read_tables
from search.config import SearchConfig
from search.config_file import load_config
from search.errors import InputError
from search.imports import is_torch_file, priced, read_average_traces, read_bits
from search.stages.candidates import candidate
from search.tables import Tables

__all__ = ["imported", "pinned", "with_average_traces"]


def imported(
    file: Path, run: Path, budget: Sequence[str] = ()
) -> tuple[Candidate, Tables, tuple[str, ...]]:
    """Read bits and price them; or read traces and find the best bits by them.

    Args:
        file: What ``search.imports.read_bits`` reads, with channels named ``w:LAYER[c]``; or
            NNCF's average traces.
        run: Folder of a run that came past its tables.
        budget: For traces: ``"average_bits=3"`` and the like, all of them one budget together.

    Returns:
        The allocation, the tables that priced it, and what of the file has no place in them.

    Raises:
        InputError: If the file and the run do not go together.
    """
    artefact = read_tables(run)
    if is_torch_file(file):
        traces = read_average_traces(file, _order(artefact))
        tables = with_average_traces(Tables.of(artefact), traces)
        return candidate("exact", read_budget(budget), tables), tables, ()
    if budget:
        raise InputError(f"--budget: is for average traces, got a file of bits, {file}")
    names = [group["name"] for group in artefact.channels.space] if artefact.channels else []
    used = Tables.of_channels(artefact) if _names_channels(file, names) else Tables.of(artefact)
    assert used is not None
    given = read_bits(file, used.space.names)
    return priced(given, used, file.name), used, given.left_out


def pinned(run: Path, found: Candidate) -> str:
    """Write a run's config so that a search of it chooses certain bits: to fine-tune and test them.

    Args:
        run: The run's folder.
        found: Who receives how many bits.

    Returns:
        YAML with a pin for every layer and tensor, and their size as the only budget.

    Raises:
        InputError: If the bits are of channels.
    """
    if found.granularity == "channel":
        raise InputError(
            "--pins: must be bits of layers, for a config pins no channels, got bits of channels: "
            "hawq export --allocation writes such a network"
        )
    budget = {
        "average_bits": found.average_bits,
        "activation_average_bits": found.activation_average_bits,
    }
    raw = load_config(run / "config.yaml").model_dump(mode="json")
    for section in ("weights", "activations"):
        pins = {name[2:]: bits for name, bits in found.bits.items() if name[0] == section[0]}
        raw[section] |= {"pin": pins, "menus": {}, "min_bits": {}}
    raw |= {"methods": ["exact"], "budgets": [budget], "comparison": None, "study": None}
    config = SearchConfig.model_validate(raw)
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def with_average_traces(tables: Tables, traces: Mapping[str, float]) -> Tables:
    """Return tables with Ω by other traces: average trace · ‖Q(W) − W‖², none below zero.

    Args:
        tables: With the squared errors.
        traces: Trace over number of weights, by group.
    """
    assert tables.squared_errors is not None, "a run's tables have them"
    sensitivity, own = tables.sensitivity.copy(), tables.traces.copy()
    errors = tables.trace_errors.copy()
    allowed = tables.space.allowed()
    for row, group in enumerate(tables.space.groups):
        if group.name in traces:
            omega = max(0.0, traces[group.name]) * tables.squared_errors[row]
            sensitivity[row] = np.where(allowed[row], omega, np.inf)
            own[row], errors[row] = traces[group.name] * group.num_elements, 0.0  # none is told
    return replace(tables, sensitivity=sensitivity, traces=own, trace_errors=errors)


def _order(artefact: TablesArtefact) -> list[str]:
    """Name the weights in the order in which the network runs, as far as the tables tell it."""
    called = [operation.weight for operation in artefact.operations]
    listed = [str(group["name"]) for group in artefact.space]
    return list(dict.fromkeys(called or [name for name in listed if name.startswith("w:")]))


def _names_channels(file: Path, names: Sequence[str]) -> bool:
    """Whether a file is of a run's channels: it names the first one."""
    try:
        return bool(names) and names[0] in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False  # the reader says what is wrong with it
