"""The method: curvature, sensitivity, allocation and fine-tuning of mixed-precision networks.

Knows torch, numpy and scipy; no cluster, no files, no configuration.
"""

from hawq.tracing import Traces, traces

__all__ = ["Traces", "traces"]
