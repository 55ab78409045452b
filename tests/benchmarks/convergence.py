"""The trace against the number of images and of probes, with the true error of each way.

What the papers draw (Dong et al., 2020, figure 5), with the truth in it: the exact traces of every
training image of CIFAR-10 for the trained ResNet20. Needs the data that ``HAWQ_DATA`` names.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from rich.progress import track
from torch import nn

from hawq.curvature import Population, UnitSums, draw_examples
from hawq.curvature.estimate import summarize
from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.hutchinson import hutchinson_samples
from hawq.curvature.network import differentiable, weights_of
from hawq.curvature.per_example import WeightTape, per_example_traces
from hawq.curvature.planning import look_here
from hawq.space import quantizable_layers
from search.tasks.checkpoint import load_weights
from search.tasks.classification import ClassificationTask
from tests.benchmarks.record import ROOT, Row, record

Values = NDArray[np.float64]

_BATCH, _DRAWS, _PROBES, _IMAGES = 64, 100, 50, 512
_POOL = 16384
# Directions with less than this share of an average image's output curvature are left out.
_NEGLIGIBLE = 1e-5


def main() -> None:
    """Compute the truth, sample from it, run the probes, draw."""
    root = os.environ.get("HAWQ_DATA")
    if not root or not (Path(root) / "cifar10").exists():
        sys.exit("bench-convergence: HAWQ_DATA must name the folder with cifar10 and checkpoints")
    task, model = _network(root)
    layers = list(quantizable_layers(model))
    size = task.size("train")
    curvature = look_here(task, model, "train", _BATCH)(range(size))
    order = curvature.argsort(descending=True)
    floor = _NEGLIGIBLE * float(curvature.mean())
    jobs = [(root, part.tolist(), floor) for part in order.split(8 * _BATCH)]
    traces = np.zeros((size, len(layers)))
    with ProcessPoolExecutor() as pool:
        done = track(pool.map(_traces_of, jobs), "exact traces", total=len(jobs))
        for (_, examples, _), found in zip(jobs, done, strict=True):
            traces[examples] = found
    counts = [32, 64, 128, 256, 512, 1024, 2048, 4096]
    drawn = {
        "plain images": [_sampled(traces, curvature, n, None) for n in counts],
        f"by importance, from {_POOL:,}": [_sampled(traces, curvature, n, _POOL) for n in counts],
        "by importance, from all": [_sampled(traces, curvature, n, size) for n in counts],
    }
    probes = _probes(task, model, layers, list(range(_IMAGES)))
    exact = traces[:_IMAGES].mean(0)
    rows = []
    for name, errors in drawn.items():
        for n, (true, stated) in zip(counts, errors, strict=True):
            rows.append(Row(f"{name}, {n}", "all training images", 100 * true.max(), "% error"))
            rows.append(Row(f"{name}, {n}", "stated error", 100 * stated.max(), "% error"))
    for name, samples in probes.items():
        deviation = samples.std(0, ddof=1) / exact
        rows.append(Row(f"{name}, one probe", "worst layer", 100 * deviation.max(), "% deviation"))
    record("convergence", rows)
    path = ROOT / "build" / "bench" / "convergence.html"
    _figure(counts, drawn, probes, exact, layers).write_html(path)
    print(path.relative_to(ROOT))


def _network(root: str) -> tuple[ClassificationTask, nn.Module]:
    torch.set_num_threads(1)
    task = ClassificationTask("cifar10", str(Path(root) / "cifar10"), "resnet20", 5000)
    model = task.model()
    load_weights(model, Path(root) / "checkpoints" / "resnet20_cifar10.safetensors")
    return task, model


def _traces_of(job: tuple[str, list[int], float]) -> Values:
    """Exact traces of some images, shape (N, L); they come sorted by curvature."""
    root, examples, floor = job
    task, model = _network(root)
    layers = list(quantizable_layers(model))
    found = []
    with differentiable(model, weights_of(model, layers)):
        for part in torch.tensor(examples).split(_BATCH):
            batch = task.batch("train", part)
            channels = per_example_traces(
                lambda batch=batch: task.curvature(model, batch),
                WeightTape(model, layers),
                weights=torch.ones(len(part)),
                floor=floor,
            )
            found.append(torch.stack([values[0].sum(1) for values in channels], 1).numpy())
    return np.concatenate(found)


def _sampled(
    traces: Values, curvature: torch.Tensor, num: int, pool: int | None
) -> tuple[Values, Values]:
    """True and stated relative error of every layer, root mean square over many draws."""
    size, truth = len(traces), traces.mean(0)
    names = [str(i) for i in range(traces.shape[1])]
    off, stated = [], []
    for seed in range(_DRAWS):
        among = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        among = among[: pool or num]
        draw = draw_examples(curvature[among], num, seed)
        weights = np.array(draw.weights)
        unit = UnitSums.of_examples(
            0,
            traces[among[list(draw.examples)]][None],
            len(names),
            weights=weights,
            excluded=np.maximum(1 - num / (len(among) * weights), 0),
            num_probes=0,
        )
        estimate = summarize([unit], names, Population(len(among), size))
        off.append(estimate.trace / truth - 1)
        stated.append(estimate.data_error / truth)
    return tuple(np.sqrt(np.square(values).mean(0)) for values in (off, stated))  # type: ignore[return-value]


def _probes(
    task: ClassificationTask, model: nn.Module, layers: Sequence[str], examples: list[int]
) -> dict[str, Values]:
    """Single probes of the mean loss over some images, shape (K, L)."""
    weights = weights_of(model, layers)
    found: dict[str, Values] = {
        name: np.zeros((_PROBES, len(layers))) for name in ("Hutchinson", "Gauss–Newton, signs")
    }
    with differentiable(model, weights):
        for at in track(range(0, len(examples), _BATCH), "probes"):
            batch = task.batch("train", torch.tensor(examples[at : at + _BATCH]))
            seeds = range(_PROBES * at, _PROBES * (at + 1))
            loss = task.losses(model, batch).sum()
            found["Hutchinson"] += hutchinson_samples(loss, weights, seeds)
            outputs, factors = task.curvature(model, batch)
            samples = gauss_newton_samples(outputs, factors, weights, seeds)
            found["Gauss–Newton, signs"] += samples
    return {name: samples / len(examples) for name, samples in found.items()}


def _figure(
    counts: Sequence[int],
    drawn: dict[str, Any],
    probes: dict[str, Values],
    exact: Values,
    layers: Sequence[str],
) -> go.Figure:
    middle = len(layers) // 2
    figure = make_subplots(
        1,
        2,
        subplot_titles=(
            "Error of the worst layer against all training images",
            f"Trace of {layers[middle]} on {_IMAGES} images",
        ),
    )
    for i, (name, errors) in enumerate(drawn.items()):
        color = ("#b42318", "#4d8fc4", "#0b3d6e")[i]
        for values, dash, suffix in (
            ([100 * true.max() for true, _ in errors], "solid", ""),
            ([100 * stated.max() for _, stated in errors], "dot", ", as stated"),
        ):
            line = {"color": color, "dash": dash}
            figure.add_scatter(x=counts, y=values, name=name + suffix, line=line, row=1, col=1)
    for (name, samples), color in zip(probes.items(), ("#b42318", "#4d8fc4"), strict=True):
        values = samples[:, middle]
        k = np.arange(1, len(values) + 1)
        mean = values.cumsum() / k
        error = np.array(
            [values[: n + 1].std(ddof=1) / (n + 1) ** 0.5 if n else np.nan for n in k - 1]
        )
        figure.add_scatter(
            x=k,
            y=mean,
            error_y={"array": error, "thickness": 0.8},
            name=name,
            line={"color": color},
            row=1,
            col=2,
        )
    figure.add_hline(y=exact[middle], line={"dash": "dash"}, row=1, col=2, annotation_text="exact")
    figure.update_xaxes(title_text="images", type="log", row=1, col=1)
    figure.update_yaxes(title_text="%", type="log", row=1, col=1)
    figure.update_xaxes(title_text="probes", row=1, col=2)
    figure.update_layout(template="plotly_white", width=1200, height=480)
    return figure


if __name__ == "__main__":
    main()
