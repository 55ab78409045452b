"""Allocators: sensitivity and cost tables in, bits out. No network, no data, no randomness."""

from hawq.allocate.front import Front, InfeasibleBudgetError
from hawq.allocate.monotone import monotone_front
from hawq.allocate.pareto import pareto_front

__all__ = ["Front", "InfeasibleBudgetError", "monotone_front", "pareto_front"]
