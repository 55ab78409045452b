"""``hawq allocate``: a run's tables solved again, for another budget, without new probes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hawq.allocation import by_owner
from hawq.cost import mib
from hawq.space import Kind, Space
from search.artefacts import Candidate, TablesArtefact
from search.config import Budget, suggestion
from search.config_file import mistakes
from search.errors import InputError
from search.folder import RunFolder
from search.searchers import Rules
from search.stages.candidates import candidate
from search.tables import Tables

__all__ = ["METHODS", "allocate", "allocation_view", "read_budget", "read_tables"]

Granularity = Literal["layer", "channel"]

# The command's names of methods, and those of a config.
METHODS = {
    "monotone": "hawq-v2",
    "exact": "exact",
    "channel": "channel",
    "uniform": "uniform",
    "hawq-v1": "hawq-v1",
    "largest-omega": "largest-omega",
    "weight-norm": "weight-norm",
}


def allocate(
    run: Path,
    budget: Sequence[str],
    *,
    method: str | None = None,
    granularity: Granularity | None = None,
    rules: Rules | None = None,
    pins: Sequence[str] = (),
    ties: Sequence[str] = (),
) -> tuple[Candidate, Tables]:
    """Choose bits under a budget, from what a run has traced.

    Args:
        run: The run's folder.
        budget: ``"weight_mib=0.08"`` and the like, all of them one budget together.
        method: A key of ``METHODS``; None: exact for layers, channel for channels.
        granularity: None: what the method gives bits to.
        rules: For channels.
        pins: ``"GLOB=BITS"``: layers with fixed bits, or activations as ``"a:GLOB=BITS"``.
        ties: ``"GLOB,GLOB"``: layers that share their bits.

    Returns:
        What was chosen, and the tables that it was chosen from.

    Raises:
        InputError: If the folder is no run's, the budget makes no sense, or nothing is within it.
    """
    name = method or ("channel" if granularity == "channel" else "exact")
    if name not in METHODS:
        raise InputError(f"--method: {name!r} is not known{suggestion(name, METHODS)}")
    by_channel = name == "channel"
    if granularity is not None and by_channel != (granularity == "channel"):
        of_layers = [known for known in METHODS if known != "channel"]
        fitting = "channel" if granularity == "channel" else f"one of {', '.join(of_layers)}"
        raise InputError(f"--method: must be {fitting} for --granularity {granularity}, got {name}")
    wanted = read_budget(budget)
    artefact = read_tables(run)
    groups = artefact.channels if by_channel else artefact
    if groups is None:
        raise InputError(
            f"{run}: holds no traces of channels: run the search with channel among its methods"
        )
    try:
        space = _restricted(Space.from_json(groups.space), pins, ties)
    except ValueError as error:
        raise InputError(f"--pin, --tie: {error}") from error
    tables = (Tables.of_channels if by_channel else Tables.of)(artefact, space)
    assert tables is not None
    found = candidate(METHODS[name], wanted, tables, rules=rules)
    return found, tables


def read_tables(run: Path) -> TablesArtefact:
    """Read the tables of a run.

    Raises:
        InputError: If the folder is no run's, or holds none yet.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: must be the folder of a run, got no config.yaml in it")
    folder = RunFolder(run)
    if not folder.artefact("tables").exists():
        raise InputError(f"{run}: has no tables yet: let hawq run come past its stage tables")
    return folder.load("tables", TablesArtefact)[0]


def allocation_view(found: Candidate, tables: Tables) -> RenderableType:
    """Lay out an allocation, a row a layer or tensor, and what it predicts."""
    table = Table(
        title=f"{found.method} within {found.budget}", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("layer or tensor", no_wrap=True)
    for heading in ("elements", "bits", "Ω"):
        table.add_column(heading, justify="right", no_wrap=True)
    omegas, elements = _by_owner(found, tables)
    bits = by_owner(found.bits)
    kinds = [name[0] for name in bits]
    for i, (owner, b) in enumerate(bits.items()):
        table.add_row(
            owner.removeprefix("w:"),
            f"{elements[owner]:,}",
            str(b) if isinstance(b, int) else _histogram(b),
            f"{omegas[owner]:.3g}",
            end_section=i + 1 < len(kinds) and kinds[i] != kinds[i + 1],
        )
    return Group(table, *(Text(line) for line in _predictions(found)))


def read_budget(pairs: Sequence[str]) -> Budget:
    """Read a budget as the command line has it, ``KEY=VALUE`` several times.

    Raises:
        InputError: If it makes no sense.
    """
    if not pairs:
        raise InputError(f"--budget: give KEY=VALUE with {', '.join(Budget.model_fields)}")
    given: dict[str, object] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InputError(f"--budget: must be KEY=VALUE, such as weight_mib=0.08, got {pair!r}")
        if key in given:
            raise InputError(f"--budget: {key} must be given once, got it twice")
        given[key] = yaml.safe_load(value)
    try:
        return Budget.model_validate(given)
    except ValidationError as error:
        told = mistakes(error, Budget)
        raise InputError("\n".join(f"--budget: {line}" for line in told)) from error


def _restricted(space: Space, pins: Sequence[str], ties: Sequence[str]) -> Space:
    for pin in pins:
        glob, _, bits = pin.rpartition("=")
        if not glob or not bits.isdigit():
            raise ValueError(f"a pin must be GLOB=BITS, got {pin!r}")
        kind, name = _kind(glob)
        if int(bits) not in space.widths:
            raise ValueError(f"{pin}: bits must be among {space.widths}, which Ω is known for")
        space = space.pinned({name: int(bits)}, kind)
    for tie in ties:
        kinds, names = zip(*(_kind(glob) for glob in tie.split(",")), strict=True)
        if len(set(kinds)) > 1:
            raise ValueError(f"a tie must be of weights or of activations, got {tie!r}")
        space = space.tied([names], kinds[0])
    return space


def _kind(glob: str) -> tuple[Kind, str]:
    if glob.startswith("a:"):
        return "activations", glob[2:]
    return "weights", glob.removeprefix("w:")


def _by_owner(found: Candidate, tables: Tables) -> tuple[Mapping[str, float], Mapping[str, int]]:
    omegas: dict[str, float] = {}
    elements: dict[str, int] = {}
    column = {width: i for i, width in enumerate(tables.space.widths)}
    for row, group in enumerate(tables.space.groups):
        owner = f"{group.name[:2]}{group.owner}"
        omega = float(tables.sensitivity[row, column[found.bits[group.name]]])
        omegas[owner] = omegas.get(owner, 0.0) + omega
        elements[owner] = elements.get(owner, 0) + group.num_elements
    return omegas, elements


def _histogram(bits: Sequence[int]) -> str:
    return "  ".join(f"{b}:{bits.count(b)}" for b in sorted(set(bits)))


def _predictions(found: Candidate) -> list[str]:
    costs = found.costs
    lines = [
        f"weights      {mib(costs['weight_bits']):.4g} MiB, {found.average_bits:.4g} bits on "
        f"average, {found.compression:.4g}× smaller; {mib(costs['stored_bits']):.4g} MiB with "
        "scales" + (" and channels' widths" if found.granularity == "channel" else "")
    ]
    if found.activation_average_bits is not None:
        lines.append(
            f"activations  {mib(costs['activation_bits']):.4g} MiB an example, "
            f"{found.activation_average_bits:.4g} bits on average, "
            f"{found.activation_compression:.4g}× smaller; at most "
            f"{mib(costs['peak_activation_bits']):.4g} MiB at once"
        )
    if "bops" in costs:
        lines.append(f"operations   {costs['bops'] / 1e9:.4g} GBOPs an example")
    if "latency_ns" in costs:
        lines.append(f"latency      {costs['latency_ns'] / 1e6:.4g} ms, by the table")
    omega = found.sensitivity
    proof = ""
    if found.bound is not None:
        gap = (omega - found.bound) / omega if omega else 0.0
        proof = ", proved optimal" if gap < 1e-9 else f", proved within {100 * gap:.2g} %"
    lines.append(
        f"predicted    loss + {omega / 2:.4g} before fine-tuning (Ω/2){proof}, "
        f"in {found.seconds:.2g} s"
    )
    return lines
