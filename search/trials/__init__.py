"""Trials: allocations fine-tuned in parallel under Ray Tune.

A trial is a pure function of its specification and lives in a folder of its own, named after
everything that its result depends on. Tune decides when it runs, restarts it when its worker
dies and, where asked, stops poor ones early; the folder makes a restart cost at most one epoch,
for a trial and for the whole search alike.
"""

from search.trials.best import BestSoFar
from search.trials.running import read_trial, run_trial, settled
from search.trials.specification import (
    TrialSpec,
    calibration_inputs,
    num_calibration_batches,
    quantized_model,
)
from search.trials.tuning import Tuning, cause, run_trials, tune_specs

__all__ = [
    "BestSoFar",
    "TrialSpec",
    "Tuning",
    "calibration_inputs",
    "cause",
    "num_calibration_batches",
    "quantized_model",
    "read_trial",
    "run_trial",
    "run_trials",
    "settled",
    "tune_specs",
]
