"""Several budgets as an integer programme: its variables, its rows, and the solver's answer.

One binary x_rb for each row r (a group, or tied ones) and width b it may have, with Σ_b x_rb = 1.
A cost of two rows together is a product x_ib·x_jc. It is written y_bc ≥ 0 with Σ_c y_bc = x_ib and
Σ_b y_bc = x_jc, which is exact for binary x and the tightest such description: where a tensor has
one reader, the y are the options (weight bits, activation bits) of that layer, and where it has
several, the products of McCormick (1976). A maximum over steps is one inequality for each step.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from hawq.allocate.front import Rows
from hawq.cost import Cost

__all__ = ["Answer", "Limit", "Programme"]

# HiGHS compares with absolute tolerances of 1e-6: sums of these sizes leave it nine or ten digits.
_LIMIT, _OPTIMUM = 1e3, 1e4
_LEAST = 1e-6  # of an objective, as a part of its largest coefficient
_MAX_CUTS = 20
_ALONE = threading.Lock()


@contextmanager
def _silenced() -> Iterator[None]:
    """Drop what C code prints meanwhile: HiGHS 1.12 leaves a line of its debugging on stdout."""
    libc = ctypes.CDLL(None)
    with _ALONE, open(os.devnull, "w") as nowhere:
        sys.stdout.flush()
        libc.fflush(None)
        kept = os.dup(1)
        try:
            os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            libc.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """A cost, as a linear form of the variables, and the most that it may be.

    Attributes:
        form: Integers, shape (S, V): what each variable costs in each step.
        most: The limit.
    """

    form: NDArray[np.int64]
    most: int


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the solver found.

    Attributes:
        choice: Column of each row, shape (R,); None where it found none (in time).
        bound: No choice has a smaller objective.
        is_infeasible: Whether there is no choice, proved.
    """

    choice: NDArray[np.int64] | None
    bound: float
    is_infeasible: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Programme:
    """The variables of an integer programme and how they hang together.

    Attributes:
        rows: Tables whose rows choose freely.
        index: Variable of row r's option b, shape (R, B); −1 where barred.
        products: Variables of two rows' options together, shape (B, B) each; −1 where barred.
        num_variables: V.
    """

    rows: Rows
    index: NDArray[np.int64]
    products: Mapping[tuple[int, int], NDArray[np.int64]]
    num_variables: int

    @staticmethod
    def of(rows: Rows, costs: Sequence[Cost]) -> "Programme":
        """Set up the variables that some costs need."""
        allowed = np.isfinite(rows.sensitivity)
        index = np.where(allowed, np.cumsum(allowed).reshape(allowed.shape) - 1, -1)
        count = int(allowed.sum())
        row_of = _row_of(rows)
        is_open = allowed.sum(1) > 1
        products = {}
        for pair in (pair for cost in costs for pair in cost.pairs):
            i, j = sorted((row_of[pair.first], row_of[pair.second]))
            if i != j and is_open[i] and is_open[j] and (i, j) not in products:
                both = np.outer(allowed[i], allowed[j])
                products[i, j] = np.where(both, count + np.cumsum(both).reshape(both.shape) - 1, -1)
                count += int(both.sum())
        return Programme(rows, index, products, count)

    def form(self, cost: Cost) -> NDArray[np.int64]:
        """Write a cost as a linear form of the variables, shape (S, V)."""
        row_of = _row_of(self.rows)
        allowed = self.index >= 0
        steps = np.zeros((len(cost.steps), *self.index.shape), np.int64)
        for group, row in enumerate(row_of):
            steps[:, row] += cost.steps[:, group]
        form = np.zeros((len(steps), self.num_variables), np.int64)
        for pair in cost.pairs:
            i, j, table = row_of[pair.first], row_of[pair.second], pair.table
            if i > j:
                i, j, table = j, i, table.T
            if i == j:
                steps[:, i] += np.diag(table)
            elif (i, j) in self.products:
                variables = self.products[i, j]
                form[:, variables[variables >= 0]] += table[variables >= 0]
            elif allowed[i].sum() == 1:
                steps[:, j] += table[allowed[i].argmax()]
            else:
                steps[:, i] += table[:, allowed[j].argmax()]
        form[:, self.index[allowed]] += steps[:, allowed]
        return form

    def least_sensitive(self, limits: Sequence[Limit], max_gap: float, seconds: float) -> Answer:
        """Minimize Ω within limits."""
        base = self.rows.sensitivity.min(1, keepdims=True)
        allowed = self.index >= 0
        objective = np.zeros(self.num_variables)
        objective[self.index[allowed]] = (self.rows.sensitivity - base)[allowed]
        answer = self._minimize(objective, limits, max_gap, seconds)
        return Answer(answer.choice, answer.bound + float(base.sum()), answer.is_infeasible)

    def least(self, form: NDArray[np.int64], limits: Sequence[Limit], seconds: float) -> int | None:
        """Minimize a cost, the largest step of its form, within limits."""
        # One more variable is at least every step, as a part of what all could be together.
        size = max(float(form.max(0).sum()), 1.0)
        peak = LinearConstraint(np.column_stack([form / size, -np.ones(len(form))]), ub=0)
        objective = np.append(np.zeros(self.num_variables), 1)
        choice = self._minimize(objective, limits, 0, seconds, [peak]).choice
        return None if choice is None else int(form[:, self._variables(choice)].sum(1).max())

    def _minimize(
        self,
        objective: NDArray[np.float64],
        limits: Sequence[Limit],
        max_gap: float,
        seconds: float,
        constraints: Sequence[LinearConstraint] = (),
    ) -> Answer:
        """Minimize a linear objective of the variables, and of one more that peaks need."""
        deadline = perf_counter() + seconds
        lines = [self._consistency(len(objective)), *constraints]
        for limit in limits:
            scaled = self._scaled(limit, len(objective))
            if scaled is None:
                return Answer(None, inf, is_infeasible=True)
            lines.append(scaled)
        integrality = np.zeros(len(objective))
        integrality[: int((self.index >= 0).sum())] = 1
        # The relaxation says how large the answer is, and so what the tolerances must be.
        largest = float(objective.max()) or 1.0
        relaxed = milp(objective / largest, constraints=lines, bounds=Bounds(0, 1))
        size = max(relaxed.fun, _LEAST) if relaxed.success else 1.0
        scale = _OPTIMUM / (size * largest)
        for _ in range(_MAX_CUTS):
            with _silenced():
                found = milp(
                    objective * scale,
                    integrality=integrality,
                    bounds=Bounds(0, 1),
                    constraints=lines,
                    options={
                        "mip_rel_gap": max_gap,
                        "time_limit": max(deadline - perf_counter(), 1e-3),
                    },
                )
            known = found.mip_dual_bound
            bound = 0.0 if known is None or not np.isfinite(known) else max(known / scale, 0)
            if found.status == 2:
                return Answer(None, inf, is_infeasible=True)
            if found.x is None:
                return Answer(None, bound)
            values = np.where(self.index >= 0, found.x[self.index], -1)
            choice: NDArray[np.int64] = values.argmax(1)
            variables = self._variables(choice)
            if all(_fits(limit, variables) for limit in limits):
                return Answer(choice, bound)
            # Over a limit by less than the tolerance: this one choice is taken out.
            cut = np.zeros((1, len(objective)))
            cut[0, self.index[np.arange(len(choice)), choice]] = 1
            lines.append(LinearConstraint(cut, ub=len(choice) - 1))
        return Answer(None, bound)

    def _variables(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the variables that are 1 for a choice."""
        together = [v[choice[i], choice[j]] for (i, j), v in self.products.items()]
        return np.append(self.index[np.arange(len(choice)), choice], together).astype(np.int64)

    def _consistency(self, width: int) -> LinearConstraint:
        """One option for each row, and products that agree with the rows' options."""
        allowed = self.index >= 0
        row, _ = np.nonzero(allowed)
        num_x = len(row)
        shape = (len(self.index), width)
        parts = [csr_array((np.ones(num_x), (row, np.arange(num_x))), shape=shape)]
        for (i, j), variables in self.products.items():
            inside = variables[np.ix_(allowed[i], allowed[j])]
            for owner, table in ((i, inside), (j, inside.T)):
                marginal = self.index[owner][self.index[owner] >= 0]
                line = np.repeat(np.arange(len(table)), table.shape[1])
                data = np.append(np.ones(table.size), -np.ones(len(marginal)))
                at = np.append(line, np.arange(len(table))), np.append(table.ravel(), marginal)
                parts.append(csr_array((data, at), shape=(len(table), width)))
        right = np.zeros(sum(part.shape[0] for part in parts))
        right[: len(self.index)] = 1
        return LinearConstraint(vstack(parts), right, right)

    def _scaled(self, limit: Limit, width: int) -> LinearConstraint | None:
        """Write form ≤ most in numbers that suit the solver; None where nothing can meet it.

        Whatever is chosen, each row and product costs its least: that much is taken off both
        sides, which are then divided by the greatest common divisor.
        """
        form = limit.form.copy()
        most = np.full(len(form), min(limit.most, int(form.sum())))
        blocks = [*self.index, *(table.ravel() for table in self.products.values())]
        for block in blocks:
            variables = block[block >= 0]
            least = form[:, variables].min(1)
            form[:, variables] -= least[:, None]
            most -= least
        if (most < 0).any():
            return None
        unit = np.maximum(np.gcd.reduce(form, axis=1), 1)
        most //= unit
        scale = _LIMIT / np.maximum(most, _LIMIT)
        matrix = np.zeros((len(form), width))
        matrix[:, : form.shape[1]] = form // unit[:, None] * scale[:, None]
        return LinearConstraint(csr_array(matrix), ub=most * scale)


def _fits(limit: Limit, variables: NDArray[np.int64]) -> bool:
    return int(limit.form[:, variables].sum(1).max()) <= limit.most


def _row_of(rows: Rows) -> list[int]:
    """Return the row of each group, in the groups' order."""
    row_of = {group: row for row, members in enumerate(rows.members) for group in members}
    return [row_of[group] for group in range(len(row_of))]
