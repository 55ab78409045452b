"""Our estimators of per-layer Hessian traces against other people's, on one network and images.

Every peer has an environment of its own under build/bench/env, made when it is missing. Every
measurement is a fresh process, and the methods take turns, round after round, so that what else
the machine does falls on all of them alike.

Of every method: seconds a probe, peak memory, the spread of one probe in every layer, and from it
the probes, and CPU-seconds, until the probe error of *every* layer is at most 5 % of its trace on
these images: extrapolated where fewer probes ran. Spreads are relative to our exact Gauss–Newton
traces in float64, which are the Hessian's here, and biases are measured from them.

Problems: ``resnet20``, trained, on 512 of CIFAR-10's training images from the folder ``HAWQ_DATA``;
``resnet50`` of torchvision at 224×224 on 64 images of noise, its weights random (seed 0), its
batch-norm statistics taken from those images and its last layer fitted to random labels of theirs,
until their mean probability is 0.9: of the right size, and as sure of its images as a trained
network is, but none. There what our own choice of estimator gives is the reference.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from search.tasks.images import load_images
from tests.benchmarks.peers.figures import RTOL, Figures, figures
from tests.benchmarks.peers.launch import Peer, launch, recorded
from tests.benchmarks.peers.problem import network, save_problem
from tests.benchmarks.record import ROOT, Row, record

FLOOR = "floor: gradient"
_SURE = 0.9
# Images a batch: of 32, 128 and 512 what took the fewest CPU-seconds.
PEERS = {
    "resnet20": (
        Peer("hawq", "ours", "exact, float64", 32, 1, rounds=1),
        Peer("hawq", "floor", "gradient", 128, 4),
        Peer("hawq", "floor", "training step", 128, 2),
        Peer("hawq", "ours", "automatic", 32, 1),
        Peer("hawq", "ours", "1 direction and signs", 32, 2),
        Peer("hawq", "ours", "Gauss-Newton", 128, 1),
        Peer("hawq", "ours", "Hutchinson", 128, 1),
        Peer("hawq", "per_layer_hvp", "one HVP a layer", 128, 1),
        Peer("pyhessian", "via_pyhessian", "whole network, no layers", 128, 6),
        Peer("curvlinops", "via_curvlinops", "Hutchinson, diagonal", 128, 6),
        Peer("curvlinops", "via_curvlinops", "Hutchinson, GGN diagonal", 128, 6),
        Peer("nncf", "via_nncf", "joint", 128, 6),
        Peer("backpack", "via_backpack", "exact GGN diagonal", 32, 1),
        Peer("backpack", "via_backpack", "sampled GGN diagonal", 32, 6),
        # The same in the peers' environments, to see that those do not slow torch down.
        Peer("pyhessian", "ours", "Gauss-Newton", 128, 1, rounds=2),
        Peer("curvlinops", "ours", "Gauss-Newton", 128, 1, rounds=2),
        Peer("nncf", "ours", "Gauss-Newton", 128, 1, rounds=2),
        Peer("backpack", "ours", "Gauss-Newton", 128, 1, rounds=2),
        Peer("curvlinops", "via_curvlinops", "XDiag of GGN, 48 products", 32, 1, rounds=2),
        Peer("curvlinops", "via_curvlinops", "XTrace of GGN, 12 products", 32, 1, slow=True),
        Peer("curvlinops", "via_curvlinops", "XTrace, 12 products", 32, 1, slow=True),
        Peer("curvlinops", "via_curvlinops", "Hutch++, 12 products", 32, 1, slow=True),
        Peer("curvlinops", "via_curvlinops", "XDiag, 48 products", 32, 1, slow=True),
        Peer("curvlinops", "via_curvlinops", "Hutchinson, blocks", 32, 1, slow=True),
        Peer("pyhessian", "via_pyhessian", "layer by layer", 128, 1, slow=True),
    ),
    "resnet50": (
        Peer("hawq", "floor", "gradient", 16, 1),
        Peer("hawq", "floor", "training step", 16, 1),
        Peer("hawq", "ours", "automatic", 8, 1, rounds=1),
        Peer("hawq", "ours", "Gauss-Newton, 2 at once", 8, 1),
        Peer("hawq", "ours", "Hutchinson, 2 at once", 8, 1),
        Peer("pyhessian", "via_pyhessian", "whole network, no layers", 8, 1),
        Peer("curvlinops", "via_curvlinops", "Hutchinson, diagonal", 8, 1),
        Peer("curvlinops", "via_curvlinops", "Hutchinson, GGN diagonal", 8, 1),
        Peer("nncf", "via_nncf", "joint", 8, 1),
        Peer("backpack", "via_backpack", "sampled GGN diagonal", 8, 4),
        Peer("backpack", "via_backpack", "exact GGN diagonal", 1, 1, rounds=1, slow=True),
        Peer("hawq", "per_layer_hvp", "one HVP a layer", 8, 1, rounds=1, slow=True),
    ),
}


def main() -> None:
    """Measure, then print the table and write its figures (``--rounds 0 --add``: only these)."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.curvature")
    parser.add_argument("--problem", choices=PEERS, default="resnet20")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="to what earlier runs measured")
    parser.add_argument("--slow", action="store_true", help="also methods of minutes a probe")
    parser.add_argument("--only", action="append", help="methods whose name holds this; repeat")
    given = parser.parse_args()

    folder = ROOT / "build" / "bench" / "curvature" / given.problem
    problem = folder / "problem.npz"
    if not problem.exists() and not _save_problem(given.problem, problem):
        print("HAWQ_DATA must hold cifar10/ and checkpoints/, which it does not: nothing measured")
        return
    peers = [peer for peer in PEERS[given.problem] if given.slow or not peer.slow]
    if given.only:
        peers = [peer for peer in peers if any(part in peer.name for part in given.only)]
    if not given.add:
        for path in folder.glob("*.json"):
            path.unlink()
    for turn in range(given.rounds):
        for peer in peers:
            seed = len(recorded(peer, folder))
            if peer.rounds is None or seed < peer.rounds:
                print(f"round {turn + 1} of {given.rounds}: {peer.name}", flush=True)
                launch(peer, problem, seed=seed, folder=folder)
    _report(given.problem, PEERS[given.problem], folder)


def _save_problem(name: str, path: Path) -> bool:
    """Write a problem's file, and say whether its data were there."""
    if name == "resnet20":
        root = Path(os.environ.get("HAWQ_DATA", ""))
        weights = root / "checkpoints" / "resnet20_cifar10.safetensors"
        if not weights.is_file():
            return False
        held = load_images("cifar10", str(root / "cifar10"))
        chosen = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:512]
        images = (held.images["train"][chosen].float() / 255 - held.mean) / held.std
        model = network(name)
        model.load_state_dict(load_file(weights))
        save_problem(path, name, model, images, held.labels["train"][chosen])
    else:
        torch.manual_seed(0)
        model, images = network(name), torch.randn(64, 3, 224, 224)
        _take_statistics(model, images)
        labels = torch.randint(1000, (64,))
        _fit_last_layer(model, images, labels)
        save_problem(path, name, model, images, labels)
    return True


@torch.no_grad()
def _take_statistics(model: nn.Module, images: Tensor) -> None:
    """Let every batch-norm hold these images' statistics: without, random weights overflow."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over batches
    model.train()
    for batch in images.split(16):
        model(batch)


def _fit_last_layer(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Fit a classifier on the network's features, and no further than to be fairly sure."""
    head = model.fc
    assert isinstance(head, nn.Linear)
    model.fc = nn.Identity()
    with torch.no_grad():
        features = torch.cat([model.eval()(batch) for batch in images.split(16)])
    model.fc = head
    mean, spread = features.mean(0), features.std(0) + 1e-6
    fitted = nn.Linear(*reversed(head.weight.shape))
    nn.init.zeros_(fitted.weight)
    optimizer = torch.optim.Adam(fitted.parameters(), 1e-3)
    while True:
        logits = fitted((features - mean) / spread)
        if logits.softmax(1)[range(len(labels)), labels].mean() >= _SURE:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    with torch.no_grad():  # the same, of the features as they are
        head.weight.copy_(fitted.weight / spread)
        head.bias.copy_(fitted.bias - head.weight @ mean)


def _reference(problem: str, folder: Path) -> NDArray[np.float64]:
    """Return the traces that all are compared with, shape (L,)."""
    method = "exact, float64" if problem == "resnet20" else "automatic"
    source = next(peer for peer in PEERS[problem] if peer.name == f"ours: {method}")
    steps = [s for one in recorded(source, folder) for s in one.get("steps", ())]
    if not steps:
        raise SystemExit(f"{source.name} must have run, got no measurement of it")
    traces: NDArray[np.float64] = np.mean([step["mean"] for step in steps], 0)
    return traces


def _report(problem: str, peers: Sequence[Peer], folder: Path) -> None:
    """Print the table, and write its figures."""
    reference = _reference(problem, folder)
    found: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    for peer in peers:
        records = recorded(peer, folder)
        reasons = [one["failed"] for one in records if "failed" in one]
        if reasons:
            failed[peer.name] = reasons[0]
        if len(reasons) < len(records):
            found[peer.name] = figures([one for one in records if "steps" in one], reference)
    record("curvature", [row for name in found for row in _rows(problem, name, found)])
    table = Table(title=f"bench-curvature, {problem}", box=box.SIMPLE_HEAD)
    table.add_column("method")
    for heading in (
        "CPU s a probe\nmin (median)", "wall s\nmin (median)", "×\nfloor", "peak MiB\n(of problem)",
        "probes\nrun", "spread of one:\nmedian (worst)", "probes\nto 5 %", "CPU s\nto 5 %",
        "off by, s.e.:\nrms (worst)",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for name, one in found.items():
        table.add_row(name, *_cells(one, found[FLOOR]))
    console = Console(width=150)
    console.print(table)
    for name, reason in failed.items():
        console.print(f"{name} failed: {reason}", highlight=False)


def _cells(one: Figures, floor: Figures) -> list[str]:
    """Format one line of the table."""
    spread = f"{np.median(one.spread):.2f} ({one.spread.max():.2f})" if len(one.spread) else ""
    worst = np.abs(one.deviation).max() if len(one.deviation) else None
    off = ""
    if worst is not None:
        rms = np.sqrt(np.square(one.deviation).mean())
        off = f"{rms:.2f} ({worst:.2f})" if one.probes else f"relative: {worst:.1e}"
    seconds = "" if one.cpu_s_needed is None else f"{one.cpu_s_needed:.0f}"
    if one.needed is not None and one.needed > one.probes:
        seconds = f"~{seconds}"  # extrapolated
    return [
        "{:.2f} ({:.2f})".format(*one.cpu_s),
        "{:.2f} ({:.2f})".format(*one.wall_s),
        f"{one.cpu_s[0] / floor.cpu_s[0]:.2f}",
        f"{one.peak_mib:.0f} ({one.loaded_mib:.0f})",
        f"{one.probes or ''}",
        spread,
        "" if one.needed is None else f"{one.needed:.0f}",
        seconds,
        off,
    ]


def _rows(problem: str, name: str, found: dict[str, Figures]) -> list[Row]:
    """Say the same as rows."""
    one, subject = found[name], f"{problem}, {name}"
    rows = [
        Row(subject, "", one.cpu_s[0], "s CPU a probe, min"),
        Row(subject, "", one.cpu_s[1], "s CPU a probe, median"),
        Row(subject, "", one.wall_s[0], "s wall a probe, min"),
        Row(subject, "", one.wall_s[1], "s wall a probe, median"),
        Row(subject, FLOOR, one.cpu_s[0] / found[FLOOR].cpu_s[0], "ratio, CPU a probe, min"),
        Row(subject, "", one.peak_mib, "MiB peak"),
        Row(subject, "", one.peak_mib - one.loaded_mib, "MiB peak, above the loaded problem"),
        Row(subject, "", one.probes, "probes"),
    ]
    if one.needed is not None:
        rows.append(Row(subject, "", float(one.spread.max()), "spread of one probe, worst layer"))
        rows.append(Row(subject, "", one.needed, f"probes until every layer is within {RTOL:.0%}"))
    if one.cpu_s_needed is not None:
        rows.append(Row(subject, "", one.cpu_s_needed, f"s CPU until within {RTOL:.0%}"))
    if len(one.deviation):
        unit = "standard errors from the reference, rms" if one.probes else "relative error, rms"
        rows.append(Row(subject, "", float(np.sqrt(np.square(one.deviation).mean())), unit))
    return rows


if __name__ == "__main__":
    main()
