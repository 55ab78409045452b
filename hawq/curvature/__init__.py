"""Curvature of the loss in weights and activations: estimators, their errors, the choice of one."""

from hawq.curvature.choice import Choice, choose_estimator
from hawq.curvature.estimate import NonFiniteTraceError, Population, TraceEstimate, UnitSums
from hawq.curvature.importance import Draw, draw_examples, output_curvature
from hawq.curvature.memory import fitting_examples
from hawq.curvature.per_example import supports_examples
from hawq.curvature.plan import EstimatorName, StopRule, TracePlan
from hawq.curvature.planning import DrawnExamples, Look, drawn_examples, plan_traces
from hawq.curvature.reducer import Reducer, estimate_traces
from hawq.curvature.sites import Granularity, Site, Subject
from hawq.curvature.units import run_unit

__all__ = [
    "Choice",
    "Draw",
    "DrawnExamples",
    "EstimatorName",
    "Granularity",
    "Look",
    "NonFiniteTraceError",
    "Population",
    "Reducer",
    "Site",
    "StopRule",
    "Subject",
    "TraceEstimate",
    "TracePlan",
    "UnitSums",
    "choose_estimator",
    "draw_examples",
    "drawn_examples",
    "estimate_traces",
    "fitting_examples",
    "output_curvature",
    "plan_traces",
    "run_unit",
    "supports_examples",
]
