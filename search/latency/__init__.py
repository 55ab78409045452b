"""Latency tables: what a layer takes at each precision, measured here, modelled, or given."""

from search.latency.calls import LayerCall, layer_shapes
from search.latency.measurement import measure
from search.latency.roofline import roofline
from search.latency.table import LatencyEntry, LatencyTable, read_latency

__all__ = [
    "LatencyEntry",
    "LatencyTable",
    "LayerCall",
    "layer_shapes",
    "measure",
    "read_latency",
    "roofline",
]
