"""What may be chosen, what it costs the loss, and what it costs otherwise: read from a run.

``Tables`` is what a searcher is given. It comes from the run's ``tables.json`` alone, so a finished
run is solved again for another budget without its network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import Budget
from hawq.allocation import Allocation
from hawq.cost import (
    FLOAT_BITS,
    Cost,
    Operation,
    activation_bits,
    bit_operations,
    latency,
    map_bits,
    peak_activation_bits,
    scale_bits,
    separable,
    weight_bits,
)
from hawq.space import PREFIX, Kind, Space
from search.artefacts import BlockEigenvalue, CostSources, GroupTables, TablesArtefact
from search.errors import InputError
from search.evaluate import Evaluation

__all__ = ["CHANNEL_COSTS", "Part", "Tables", "network_costs"]

# What adds up over channels, too.
CHANNEL_COSTS = ("weight_bits", "activation_bits", "peak_activation_bits", "stored_bits")


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """What the Hessian says about a space, and what everything in it costs.

    Attributes:
        space: What may be chosen.
        sensitivity: Ω, shape (L, B).
        costs: By name, with the unit in it: ``weight_bits``, ``activation_bits``,
            ``peak_activation_bits``, ``stored_bits``, ``bops``, ``latency_ns``, those that there
            are.
        traces: Hessian traces, shape (L,).
        trace_errors: Their standard errors, over probes and examples, shape (L,).
        squared_errors: ‖Q(W) − W‖², or of activations its mean over examples, shape (L, B); None
            where nothing goes by them.
        blocks: Top eigenvalues of the blocks of layers, where a method goes by them.
    """

    space: Space
    sensitivity: NDArray[np.float64]
    costs: Mapping[str, Cost]
    traces: NDArray[np.float64]
    trace_errors: NDArray[np.float64]
    squared_errors: NDArray[np.float64] | None = None
    blocks: tuple[BlockEigenvalue, ...] = ()

    @staticmethod
    def of(artefact: TablesArtefact, space: Space | None = None) -> "Tables":
        """Read the tables of layers and activation tensors.

        Args:
            artefact: What the stage left.
            space: Its space with narrower menus or more ties; None: as it is.

        Raises:
            InputError: If the latency table lacks a layer or a width.
        """
        space = space or Space.from_json(artefact.space)
        costs = network_costs(space, artefact, artefact.num_scales)
        return replace(_tables(space, artefact, costs), blocks=tuple(artefact.blocks or ()))

    @staticmethod
    def of_channels(artefact: TablesArtefact, space: Space | None = None) -> "Tables | None":
        """Read the tables of channels; None where the run has none."""
        if artefact.channels is None:
            return None
        space = space or Space.from_json(artefact.channels.space)
        return _tables(
            space, artefact.channels, _element_costs(space, artefact, artefact.channels.num_scales)
        )

    def omega(self, allocation: Allocation, kind: Kind | None = None) -> float:
        """Return Ω of an allocation: of all of it, or of its weights or activations alone."""
        every = enumerate(self.space.names)
        rows = [i for i, name in every if kind is None or name.startswith(PREFIX[kind])]
        return float(self.sensitivity[rows, allocation.choice(self.space)[rows]].sum())

    def proxy(self, allocation: Allocation, bound: float | None = None) -> Evaluation:
        """Score an allocation by −Ω, with what Ω can be at least where that is proved."""
        return Evaluation(allocation, -self.omega(allocation), "proxy", bound=bound)

    def budgets(self, limits: Mapping[str, int]) -> tuple[Budget, ...]:
        """Return limits, by the names of costs, as allocators take them.

        Raises:
            InputError: If there is no such cost in these tables.
        """
        for name in limits:
            if name not in self.costs:
                raise InputError(f"{name} cannot be limited here, {_reason(name, self.space)}")
        return tuple(Budget(self.costs[name], limit) for name, limit in limits.items())

    def part(self, kind: Kind) -> "Part | None":
        """Return the weights' part, or the activations'; None where there is none of the kind."""
        space = self.space.part(kind)
        if space is None:
            return None
        named = enumerate(self.space.names)
        rows = np.array([i for i, name in named if name.startswith(PREFIX[kind])], np.int64)
        columns = np.searchsorted(self.space.widths, space.widths)
        sensitivity = self.sensitivity[np.ix_(rows, columns)]
        squared = np.empty((0, 0)) if self.squared_errors is None else self.squared_errors
        errors = squared[np.ix_(rows, columns)] if squared.size else squared
        blocks = self.blocks if kind == "weights" else ()
        return Part(kind, space, sensitivity, self.traces[rows], rows, columns, errors, blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The weights, or the activations, of a space with its tables.

    Attributes:
        kind: Which of the two.
        space: Its groups.
        sensitivity: Ω, shape (R, C).
        traces: Hessian traces, shape (R,).
        rows: Of the whole's tables, shape (R,).
        columns: Of the whole's tables, shape (C,).
        squared_errors: ‖Q(W) − W‖², shape (R, C); empty where the tables have none.
        blocks: Top eigenvalues of the blocks of layers, where there are any.
    """

    kind: Kind
    space: Space
    sensitivity: NDArray[np.float64]
    traces: NDArray[np.float64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    squared_errors: NDArray[np.float64]
    blocks: tuple[BlockEigenvalue, ...]

    @property
    def size(self) -> NDArray[np.int64]:
        """Bits of all weights, or of one example's activations, shape (R, C)."""
        return weight_bits(self.space) if self.kind == "weights" else activation_bits(self.space)

    def cost(self, whole: Cost) -> NDArray[np.int64]:
        """Return the part's table, shape (R, C), of a cost that is a plain sum."""
        (table,) = whole.steps
        mine: NDArray[np.int64] = table[np.ix_(self.rows, self.columns)]
        return mine


def network_costs(space: Space, sources: CostSources, num_scales: Sequence[int]) -> list[Cost]:
    """Return all that is known of what layers and activation tensors cost.

    Args:
        space: The groups.
        sources: Who reads what, what is alive together, and the latency table.
        num_scales: Scales that each group stores.

    Raises:
        InputError: If the latency table lacks a layer or a width.
    """
    costs = _element_costs(space, sources, num_scales)
    operations = [Operation(o.weight, o.activation, o.macs) for o in sources.operations]
    if operations:
        costs.append(bit_operations(space, operations))
    if sources.latency_ns is not None:
        by_bits: dict[str, dict[int | tuple[int, int], int]] = {}
        for entry in sources.latency_ns:
            w, a = entry.weight_bits, entry.activation_bits
            by_bits.setdefault(entry.layer, {})[w if a is None else (w, a)] = entry.ns
        try:
            costs.append(latency(space, operations, by_bits))
        except ValueError as error:
            raise InputError(f"latency: {error}") from error
    return costs


def _tables(space: Space, artefact: GroupTables, costs: list[Cost]) -> Tables:
    table = np.array([[np.inf if v is None else v for v in row] for row in artefact.sensitivity])
    columns = np.searchsorted(artefact.widths, space.widths)
    table = table[:, columns]
    return Tables(
        space,
        np.where(space.allowed(), table, np.inf),
        {cost.name: cost for cost in costs},
        np.array(artefact.trace),
        np.array(artefact.trace_error),
        np.array(artefact.squared_error)[:, columns],
    )


def _element_costs(space: Space, sources: CostSources, num_scales: Sequence[int]) -> list[Cost]:
    """Return what adds up over elements, for layers and for channels alike."""
    weights = weight_bits(space)
    stored = weights + scale_bits(space, num_scales, sources.scale_bits) + map_bits(space)
    stored[0] += FLOAT_BITS * sum(sources.float_weights.values())  # whatever is chosen
    costs = [separable("weight_bits", weights), separable("stored_bits", stored)]
    if space.part("activations") is not None:
        members: dict[str, list[str]] = {}
        for group in space.groups:
            members.setdefault(f"{group.name[:2]}{group.owner}", []).append(group.name)
        alive = [[name for a in step for name in members.get(a, [])] for step in sources.alive]
        costs += [
            separable("activation_bits", activation_bits(space)),
            peak_activation_bits(space, alive),
        ]
    return costs


def _reason(name: str, space: Space) -> str:
    if name == "latency_ns":
        return "for there is no latency table: give one under latency (make it with hawq profile)"
    if any(group.is_channel for group in space.groups):
        return f"for it does not add up over channels; what does: {', '.join(CHANNEL_COSTS)}"
    return "for activations were not searched: give them a menu and a budget before the run"
