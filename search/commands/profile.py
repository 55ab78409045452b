"""``hawq profile``: the latency table of a config's network, measured or modelled."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from search.config import SearchConfig
from search.config_file import load_config
from search.errors import InputError
from search.events import Event, Listener
from search.folder import write_atomically
from search.latency import LatencyTable, layer_shapes, measure, roofline
from search.latency.measurement import runtime_versions
from search.tasks.build import build_task

__all__ = ["latency_view", "profile"]


def profile(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    peaks: Sequence[str] = (),
    bandwidth: float | None = None,
    batch_size: int = 1,
    threads: int = 1,
    seconds: float = 0.3,
    listeners: Iterable[Listener] = (),
) -> LatencyTable:
    """Price every layer of a config's network at all widths of its menus, and write the table.

    The network's weights do not matter: nothing is trained, and no checkpoint is read.

    Args:
        config: YAML file.
        overrides: ``"weights.bits=[4, 8]"`` and the like.
        out: JSON file to write.
        peaks: ``"8=2.4"``, peak rates in Tops by bits, for a roofline; none measures here.
        bandwidth: Of the memory, in GB/s, for a roofline.
        batch_size: Examples that go through at once.
        threads: Of a measured layer.
        seconds: To measure each shape of a layer's call.
        listeners: Called with every event.

    Raises:
        InputError: If something that was given is wrong, or onnxruntime is needed and missing.
    """
    rates = {}
    for text in peaks:
        bits, tops = _peak(text)
        if bits in rates:
            raise InputError(f"--peak: must be given once for each width, got {bits} twice")
        rates[bits] = tops
    if bool(rates) != (bandwidth is not None):
        raise InputError("--peak and --bandwidth: a roofline needs both, got only one")
    for option, given in (("batch", batch_size), ("threads", threads), ("seconds", seconds)):
        if not given > 0:
            raise InputError(f"--{option}: must be positive, got {given}")
    if bandwidth is None:
        runtime_versions()
    told = tuple(listeners)
    loaded = load_config(config, overrides)
    task = build_task(loaded.task, loaded.seed)
    if batch_size > task.size("train"):
        raise InputError(
            f"--batch: must be at most the {task.size('train')} training examples, got {batch_size}"
        )
    inputs = task.inputs(task.batch("train", torch.arange(batch_size)))
    calls = layer_shapes(task.model(), inputs)
    if not any(calls.values()):
        raise InputError("task: the network must call a convolution or a linear layer, got none")
    weights, activations = _menus(loaded)
    if bandwidth is not None:
        table = roofline(
            calls,
            weight_bits=weights,
            activation_bits=activations,
            peak_tops=rates,
            bandwidth_gbps=bandwidth,
            batch_size=batch_size,
        )
    else:
        table = measure(
            calls,
            weight_bits=weights,
            activation_bits=activations,
            batch_size=batch_size,
            threads=threads,
            seconds=seconds,
            progress=lambda *how: _tell(told, *how),
        )
    write_atomically(out, table.model_dump_json(indent=1))
    return table


def latency_view(table: LatencyTable) -> Table:
    """Lay out a table, a row a layer, in microseconds.

    Of the pairs of widths, weight/activation, only such are shown as give the activation the least
    width that is no less than the weight's; of those that take equally long in every layer, the
    widest stands for all. ``speed-up`` is of the fastest against fp32, or the widest.
    """
    columns = _columns(table)
    view = Table(title=f"Latency in µs, {table.kind}", box=box.SIMPLE_HEAD)
    view.caption = "\n".join(table.notes)
    view.caption_justify = "left"
    view.add_column("layer", no_wrap=True)
    for heading in ("MACs", "fp32", *columns, "speed-up"):
        view.add_column(heading, justify="right", no_wrap=True)
    for layer in table.layers:
        times = [column[layer] for column in columns.values()]
        view.add_row(
            layer,
            f"{table.macs[layer]:,}" if layer in table.macs else "",
            *_cells(table.fp32_ns.get(layer), times),
            end_section=layer == list(table.layers)[-1],
        )
    totals = [sum(column.values()) for column in columns.values()]
    view.add_row(
        "all",
        f"{sum(table.macs.values()):,}" if table.macs else "",
        *_cells(sum(table.fp32_ns.values()) or None, totals),
    )
    return view


def _cells(fp32_ns: int | None, times_ns: Sequence[int]) -> list[str]:
    slowest, fastest = fp32_ns or times_ns[-1], min(times_ns)
    return [
        "" if fp32_ns is None else _microseconds(fp32_ns),
        *map(_microseconds, times_ns),
        f"{slowest / fastest:.2f}×" if fastest else "",
    ]


def _microseconds(ns: int) -> str:
    return f"{ns / 1e3:,.1f}" if ns >= 10_000 else f"{ns / 1e3:.3f}"


def _columns(table: LatencyTable) -> dict[str, dict[str, int]]:
    """Choose columns: heading to nanoseconds of each layer, narrowest first."""
    by_bits = table.by_bits()
    keys = {key for widths in by_bits.values() for key in widths}
    activations = sorted({key[1] for key in keys if isinstance(key, tuple)})
    shown: dict[tuple[int, ...], str] = {}
    for weight in sorted({key if isinstance(key, int) else key[0] for key in keys}):
        key = _beside(weight, activations)
        column = tuple(widths[key] for widths in by_bits.values() if key in widths)
        if len(column) == len(by_bits):
            shown.pop(column, None)  # the widest of equal ones, in its own place
            shown[column] = f"{weight}" if isinstance(key, int) else f"{weight}/{key[1]}"
    return {heading: dict(zip(by_bits, column, strict=True)) for column, heading in shown.items()}


def _beside(weight: int, activations: Sequence[int]) -> int | tuple[int, int]:
    """Return the key of a weight's width with the activation's that is shown beside it."""
    if not activations:
        return weight
    return weight, next((a for a in activations if a >= weight), activations[-1])


def _peak(text: str) -> tuple[int, float]:
    bits, _, tops = text.partition("=")
    try:
        return int(bits), float(tops)
    except ValueError as error:
        raise InputError(f"--peak: must be BITS=TOPS, such as 8=2.4, got {text!r}") from error


def _menus(config: SearchConfig) -> tuple[list[int], list[int]]:
    """Return every width that weights and that activations may receive, increasing."""
    found = []
    for section, own in (
        (config.weights, config.weights.bits),
        (config.activations, [*config.activations.menu, config.activations.input_bits]),
    ):
        menus = [own, *section.menus.values()]
        found.append({b for menu in menus for b in menu} | set(section.pin.values()))
    weights, activations = found
    if config.activations.bits is None and not config.searches_activations:
        activations = set()
    elif config.activations.bits is not None:
        activations.add(config.activations.bits)
    return sorted(weights - {0}), sorted(activations)  # no bits are for channels alone


def _tell(
    listeners: Sequence[Listener], done: float, total: float, unit: str, message: str
) -> None:
    for listener in listeners:
        listener(Event(time.time(), "profile", "progress", message, done, total, unit))
