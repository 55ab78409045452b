"""Curvature of the loss in each layer's weights: estimators, their errors, the choice of one."""

from hawq.curvature.choice import Choice, EstimatorName, choose_estimator
from hawq.curvature.estimate import NonFiniteTraceError, TraceEstimate, UnitSums
from hawq.curvature.exact import supports_exact
from hawq.curvature.importance import Draw, draw_examples, output_curvature
from hawq.curvature.units import Reducer, TracePlan, estimate_traces, run_unit

__all__ = [
    "Choice",
    "Draw",
    "EstimatorName",
    "NonFiniteTraceError",
    "Reducer",
    "TraceEstimate",
    "TracePlan",
    "UnitSums",
    "choose_estimator",
    "draw_examples",
    "estimate_traces",
    "output_curvature",
    "run_unit",
    "supports_exact",
]
