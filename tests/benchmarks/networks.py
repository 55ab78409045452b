"""Networks of the papers: size, work, and what one Gauss–Newton probe costs on two cores.

Images are noise, and weights random but ResNet20's: neither changes what is counted or how long it
takes. RetinaNet's images are photographs' size, 800×1333. A probe is one forward and one backward
pass through all layers. The file is a packed one at the paper's compression, of two neighbouring
widths; scales of channels, biases and batch-norm stand in it besides, in 32 bits. Every network has
a fresh process, so that its peak memory is its own; the file is made after that is read.

    python -m tests.benchmarks.networks                # all
    python -m tests.benchmarks.networks --only resnet20 --only squeezenext
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hawq.cost import FLOAT_BITS, mib
from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.network import differentiable, weights_of
from hawq.export import encode, pack
from hawq.factors import softmax_factor
from hawq.finetune import attach
from hawq.quantizers import Scheme, Schemes
from hawq.reads import Layer, read_network
from hawq.task import Factor
from search.tasks.networks import SmallResNet
from search.tasks.zoo import ZooNetwork
from tests.benchmarks.record import ROOT, Row, record
from tests.pictures import draw_set

_THREADS = 2
_HEAD = (
    "| network | parameters | MiB in fp32 | weights' MiB at the paper's compression "
    "| MiB of a packed file | MACs | probe of an image: seconds | CPU-seconds | peak memory |",
    "|---|---|---|---|---|---|---|---|---|",
)

# Runs the network on a batch; returns its outputs and the factors of its loss.
Forward = Callable[[], tuple[Tensor, list[Factor]]]


@dataclass(frozen=True, slots=True)
class Subject:
    """A network of a paper.

    Attributes:
        compression: Of the weights, as the paper has it; 8 of MobileNetV2, which is in none.
        examples: Of a probe's batch.
        make: Returns the network, the inputs of one example, and the forward pass of the batch.
    """

    compression: float
    examples: int
    make: Callable[[int], tuple[nn.Module, Tensor, Forward]]


@dataclass(frozen=True, slots=True)
class Figures:
    """What was found of one network.

    Attributes:
        parameters: All of them.
        layers: Whose weights can be quantized.
        fp32_mib: Of all parameters.
        weights_mib: Of the layers' weights alone, in fp32.
        file_mib: Of the packed file.
        macs: Of one example.
        wall_seconds: Of a probe of one example, the least of the rounds.
        cpu_seconds: Likewise.
        peak_mib: Of the process, for a batch.
    """

    parameters: int
    layers: int
    fp32_mib: float
    weights_mib: float
    file_mib: float
    macs: int
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float


def main() -> None:
    """Measure the networks that were asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.networks")
    parser.add_argument("--only", action="append", choices=SUBJECTS)
    parser.add_argument("--rounds", type=int, default=3, help="probes, of which the fastest counts")
    parser.add_argument("--here", choices=SUBJECTS, help="measure in this process, print JSON")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(asdict(measured(SUBJECTS[given.here], given.rounds))))
        return
    chosen = given.only or list(SUBJECTS)
    if "resnet20" in chosen and not _resnet20_weights().is_file():
        parser.error(f"HAWQ_DATA must be a folder with {_resnet20_weights()}, which is not there")
    rows, lines = [], list(_HEAD)
    for name in chosen:
        command = [sys.executable, "-m", "tests.benchmarks.networks", "--here", name]
        command += ["--rounds", str(given.rounds)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found = Figures(**json.loads(done.stdout.splitlines()[-1]))
        rows += [Row(name, "", value, unit) for unit, value in asdict(found).items()]
        lines.append(_line(name, found))
    record("networks", rows)
    print("\n".join(lines))


def _line(name: str, found: Figures) -> str:
    """Write a row of the table in markdown."""
    subject = SUBJECTS[name]
    cells = (
        name,
        f"{found.parameters / 1e6:.2f} M",
        f"{found.fp32_mib:.2f}",
        f"{found.weights_mib / subject.compression:.2f} ({subject.compression:g}×)",
        f"{found.file_mib:.2f} ({found.fp32_mib / found.file_mib:.2f}×)",
        f"{found.macs / 1e9:.3g} G",
        f"{found.wall_seconds:.3g}",
        f"{found.cpu_seconds:.3g}",
        f"{found.peak_mib:,.0f} MiB, {subject.examples} at once",
    )
    return f"| {' | '.join(cells)} |"


def measured(subject: Subject, rounds: int) -> Figures:
    """Measure a network in this process."""
    torch.set_num_threads(_THREADS)
    model, example, forward = subject.make(subject.examples)
    reads = read_network(model, example)
    names = [layer.name for layer in reads.layers]
    weights = weights_of(model, names)
    wall, cpu = [], []
    for seed in range(rounds):
        started, used = time.perf_counter(), time.process_time()
        with differentiable(model, weights):
            outputs, factors = forward()
            gauss_newton_samples(outputs, factors, weights, [seed])
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    parameters = sum(p.numel() for p in model.parameters())
    # Ranges do not change how large the file is, and these take no time.
    schemes = Schemes(Scheme(range="minmax"))
    attach(model, _mixed(reads.layers, subject.compression), schemes=schemes)
    return Figures(
        parameters,
        len(names),
        mib(FLOAT_BITS * parameters),
        mib(FLOAT_BITS * sum(layer.num_elements for layer in reads.layers)),
        mib(8 * len(encode(pack(model)))),
        sum(layer.macs for layer in reads.layers),
        min(wall) / subject.examples,
        min(cpu) / subject.examples,
        peak_mib,
    )


def _mixed(layers: Sequence[Layer], compression: float) -> dict[str, int]:
    """Give every layer the most bits that fit all of them, and what is left to the largest."""
    total = sum(layer.num_elements for layer in layers)
    limit = int(FLOAT_BITS * total / compression)
    bits = {f"w:{layer.name}": limit // total for layer in layers}
    left = limit - limit // total * total
    for layer in sorted(layers, key=lambda layer: -layer.num_elements):
        if layer.num_elements <= left:
            bits[f"w:{layer.name}"] += 1
            left -= layer.num_elements
    return bits


def _classifier(model: nn.Module, size: int, num: int) -> tuple[nn.Module, Tensor, Forward]:
    images = torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))

    def forward() -> tuple[Tensor, list[Factor]]:
        logits: Tensor = model(images)
        return logits, [softmax_factor(logits)]

    return model, images[:1], forward


def _published(name: str) -> Callable[[int], tuple[nn.Module, Tensor, Forward]]:
    network = ZooNetwork(name)
    return lambda num: _classifier(network.build(0), network.preprocessing().size, num)


def _resnet20(num: int) -> tuple[nn.Module, Tensor, Forward]:
    model = SmallResNet(20).eval()
    model.load_state_dict(load_file(_resnet20_weights()))
    return _classifier(model, 32, num)


def _resnet20_weights() -> Path:
    return Path(os.environ.get("HAWQ_DATA", "")) / "checkpoints" / "resnet20_cifar10.safetensors"


def _retinanet(num: int) -> tuple[nn.Module, Tensor, Forward]:
    """Make mmdetection's RetinaNet-R50 of COCO's classes, with drawn pictures."""
    from search.tasks.detection import DetectionTask  # noqa: PLC0415  of the detection extra
    from search.tasks.detectors import detector_config  # noqa: PLC0415

    path = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
    detector_config(path, {})  # which makes mmdet importable
    from mmdet.datasets import CocoDataset  # noqa: PLC0415

    # The task reads its pictures when they are asked for; the process ends with them.
    folder = Path(tempfile.mkdtemp()) / "set"
    classes = CocoDataset.METAINFO["classes"]
    draw_set(folder, {"train": 2 * num, "val": 2}, shape=(800, 1333), classes=classes)
    for split in ("train", "val"):
        (folder / f"{split}2017").symlink_to(folder / "images")
        annotations = folder / "annotations"
        (annotations / f"{split}.json").rename(annotations / f"instances_{split}2017.json")
    task = DetectionTask(
        config=path,
        root=str(folder),
        options=json.dumps({"train_dataloader.dataset.filter_cfg": None}),
        search_size=1,
        split_seed=0,
        from_checkpoint=True,
        beta=1 / 9,
    )
    smooth, _ = task.smoothed()
    model, batch = task.model(), task.batch("train", torch.arange(num))

    def forward() -> tuple[Tensor, list[Factor]]:
        curvature = smooth.curvature(model, batch)
        assert curvature is not None
        return curvature[0], list(curvature[1])

    return model, task.inputs(batch)[:1], forward


SUBJECTS = {
    "resnet20": Subject(13.11, 32, _resnet20),
    "resnet50": Subject(12.24, 8, _published("pytorchcv:resnet50")),
    "inception_v3": Subject(12.04, 8, _published("pytorchcv:inceptionv3")),
    "squeezenext": Subject(9.40, 8, _published("pytorchcv:sqnxt23_w2")),
    "mobilenet_v2": Subject(8.0, 8, _published("pytorchcv:mobilenetv2_w1")),
    "retinanet_r50": Subject(8.10, 1, _retinanet),
}


if __name__ == "__main__":
    main()
