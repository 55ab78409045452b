"""Latency from a machine's data sheet: the roofline model (Williams et al., 2009).

A call takes as long as its arithmetic at the machine's peak rate or its memory traffic at the full
bandwidth, whichever is longer. No layer is faster than that; most are slower.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from hawq.cost import FLOAT_BITS
from search.errors import InputError
from search.latency.calls import LayerCall, uncalled
from search.latency.table import LatencyEntry, LatencyTable

__all__ = ["roofline"]


def roofline(
    calls: Mapping[str, Sequence[LayerCall]],
    *,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    peak_tops: Mapping[int, float],
    bandwidth_gbps: float,
    batch_size: int,
) -> LatencyTable:
    """Price layers at max(2·MACs / peak, bytes / bandwidth), in nanoseconds.

    The bytes are those of the weight at its bits and of the input and the output at the
    activation's, packed; each is moved once a call. A pair of widths runs at the smallest width
    with a peak that is no less than either.

    Args:
        calls: Of each layer, with a whole batch; see ``layer_shapes``.
        weight_bits: Widths that weights may receive.
        activation_bits: Widths that activations may receive; none leaves them floating, at 32.
        peak_tops: Peak rate of each width that the machine computes with, in 10¹² operations a
            second; a multiply-accumulate is two. With one for 32, floats are priced as well.
        bandwidth_gbps: Of the memory, in 10⁹ bytes a second.
        batch_size: Examples of a call.

    Raises:
        InputError: If a rate or the bandwidth is not positive, or the widths need one that is
            greater than all with a peak.
    """
    read: Sequence[int | None] = activation_bits or [None]
    rate = _rates(peak_tops, max([*weight_bits, *(bits or FLOAT_BITS for bits in read)]))
    if not (math.isfinite(bandwidth_gbps) and bandwidth_gbps > 0):
        raise InputError(f"--bandwidth: must be positive GB/s, got {bandwidth_gbps:g}")

    def price(layer: str, weight: int, activation: int) -> int:
        times = [_ns(c, weight, activation, rate, bandwidth_gbps) for c in calls[layer]]
        return max(1, round(sum(times)))

    called = [layer for layer in calls if calls[layer]]
    return LatencyTable(
        schema_version=1,
        kind="roofline",
        machine={f"peak at {bits} bits": f"{t:g} Tops" for bits, t in sorted(peak_tops.items())}
        | {"bandwidth": f"{bandwidth_gbps:g} GB/s"},
        batch_size=batch_size,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=_notes(calls, peak_tops, activation_bits),
        macs={layer: sum(c.macs for c in calls[layer]) // batch_size for layer in called},
        fp32_ns={layer: price(layer, FLOAT_BITS, FLOAT_BITS) for layer in called}
        if max(peak_tops) >= FLOAT_BITS
        else {},
        layers={
            layer: [
                LatencyEntry(weight_bits=w, activation_bits=a, ns=price(layer, w, a or FLOAT_BITS))
                for w in weight_bits
                for a in read
            ]
            for layer in called
        },
    )


def _ns(
    call: LayerCall, weight: int, activation: int, rate: Callable[[int], float], bandwidth: float
) -> float:
    """Nanoseconds of a call; 10¹² operations a second are 10³ in a nanosecond."""
    tensors = math.prod(call.input) + math.prod(call.output)
    num_bytes = (math.prod(call.weight) * weight + tensors * activation) / 8
    operations = 2 * call.macs
    return max(operations / (1e3 * rate(max(weight, activation))), num_bytes / bandwidth)


def _rates(peak_tops: Mapping[int, float], widest: int) -> Callable[[int], float]:
    """Return what looks up the rate of a width, after checking all of them."""
    for bits, tops in peak_tops.items():
        if bits not in range(1, 65) or not (math.isfinite(tops) and tops > 0):
            raise InputError(
                f"--peak: must be positive Tops of a width within 1..64 bits, got {bits}={tops:g}"
            )
    if max(peak_tops, default=0) < widest:
        given = ", ".join(map(str, sorted(peak_tops))) or "none"
        what = (
            "activations stay floating" if widest == FLOAT_BITS else f"the config has {widest} bits"
        )
        raise InputError(
            f"--peak: must hold a rate for {widest} bits or more, for {what}, got {given}"
        )
    return lambda bits: peak_tops[min(width for width in peak_tops if width >= bits)]


def _notes(
    calls: Mapping[str, Sequence[LayerCall]],
    peak_tops: Mapping[int, float],
    activation_bits: Sequence[int],
) -> list[str]:
    widths, low = [], 1
    for width in sorted(peak_tops):
        spans = f"{low}" if low == width else f"{low} to {width}"
        widths.append(f"{spans} at {width}")
        low = width + 1
    notes = [
        "A roofline: what the machine's peak rates and bandwidth would allow, not a measurement.",
        "The greater of a pair's two widths decides the rate, in bits: " + ", ".join(widths) + ".",
    ]
    if not activation_bits:
        notes.append("Activations stay in floating point, at 32 bits.")
    return notes + uncalled(calls)
