"""Estimators of per-layer Hessian traces, each measured in a process of its own."""
