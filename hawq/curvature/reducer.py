"""From units, in whatever order they come, to an estimate that knows when it is good enough.

A reducer takes finished units in any order, looks only at complete rounds without gaps, and decides
from those. So the result has the same bits for any number of workers and any accidents on the way,
on the same kind of machine, torch, number of threads a worker and micro-batch.
"""

from collections.abc import Sequence

import numpy as np
from torch import nn

from hawq.curvature.estimate import TraceEstimate, UnitSums, summarize
from hawq.curvature.plan import TracePlan
from hawq.curvature.units import run_unit
from hawq.task import Objective

__all__ = ["Reducer", "estimate_traces"]

# A standard error from fewer degrees of freedom may be small by luck, and would stop the plan.
_MIN_FREEDOM = 10


class Reducer:
    """Collect units in any order; estimate from complete rounds only, in index order.

    Attributes:
        plan: The plan whose units are collected.
        estimate: From all complete rounds so far; None before the first.
        finished: Whether the plan's error or its last probe is reached; later units are ignored.
    """

    def __init__(self, plan: TracePlan) -> None:
        self.plan = plan
        self.estimate: TraceEstimate | None = None
        self.finished = False
        self._units: dict[int, UnitSums] = {}
        self._rounds = 0

    def add(self, index: int, unit: UnitSums) -> None:
        """Take one finished unit."""
        if self.finished:
            return
        self._units[index] = unit
        width = self.plan.num_batches
        while not self.finished and all(
            i in self._units for i in range(self._rounds * width, (self._rounds + 1) * width)
        ):
            self._rounds += 1
            prefix = [self._units[i] for i in range(self._rounds * width)]
            self.estimate = summarize(prefix, self.plan.names, self.plan.population)
            # Where examples are seen one by one, each of them has its own spread.
            seen = self.plan.sees_examples
            spreads = self.estimate.num_examples if seen else width
            freedom = spreads * (self.estimate.num_probes - (self._rounds if seen else 1))
            self.finished = self._rounds * width >= self.plan.num_units or (
                freedom >= _MIN_FREEDOM and _good_enough(self.plan, self.estimate)
            )

    @property
    def missing(self) -> Sequence[int]:
        """Units that are not there yet, in index order; empty when finished."""
        if self.finished:
            return []
        return [i for i in range(self.plan.num_units) if i not in self._units]


def _good_enough(plan: TracePlan, estimate: TraceEstimate) -> bool:
    if plan.stop == "count":
        return False
    if plan.stop == "order":
        return estimate.ordered(np.array(plan.elements))
    if plan.stop == "shares":
        return bool((estimate.share_probe_error <= plan.rtol).all())
    return bool(estimate.converged(plan.rtol, plan.atol).all())


def estimate_traces(task: Objective, model: nn.Module, plan: TracePlan) -> TraceEstimate:
    """Carry out a plan in this process; workers give the same bits."""
    reducer = Reducer(plan)
    for index in range(plan.num_units):
        reducer.add(index, run_unit(task, model, plan, index))
        if reducer.finished:
            break
    assert reducer.estimate is not None
    return reducer.estimate
