"""Allocators: sensitivity and cost tables in, bits out. No network, no data, no randomness.

Only ``stability`` draws, from a seed: it tells what errors of the traces do to an allocation.
"""

from hawq.allocate.constrained import FrontTooLargeError, constrained_front
from hawq.allocate.front import Front, InfeasibleBudgetError
from hawq.allocate.hull import Hull, lower_hull
from hawq.allocate.lagrangian import lagrangian_solution
from hawq.allocate.milp import Budget, InfeasibleBudgetsError, Verdict, milp_solution
from hawq.allocate.monotone import monotone_front
from hawq.allocate.paired import Options, best_pair
from hawq.allocate.pareto import pareto_front
from hawq.allocate.solution import Solution

__all__ = [
    "Budget",
    "Front",
    "FrontTooLargeError",
    "Hull",
    "InfeasibleBudgetError",
    "InfeasibleBudgetsError",
    "Options",
    "Solution",
    "Verdict",
    "best_pair",
    "constrained_front",
    "lagrangian_solution",
    "lower_hull",
    "milp_solution",
    "monotone_front",
    "pareto_front",
]
