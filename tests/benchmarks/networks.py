"""Networks of the papers: size, work, and what one Gauss–Newton probe costs on two cores.

Images are noise, weights random: neither changes what is counted or how long it takes. Sizes are of
the layers' weights, as the papers count them; RetinaNet's images are photographs' size, 800×1333. A
probe is one forward and one backward pass through all layers. Every network has a fresh process, so
that its peak memory is its own.

    python -m tests.benchmarks.networks                # all
    python -m tests.benchmarks.networks --only resnet20 --only squeezenext
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hawq.cost import FLOAT_BITS, mib
from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.network import differentiable, weights_of
from hawq.factors import softmax_factor
from hawq.reads import read_network
from hawq.task import Factor
from search.tasks.networks import SmallResNet
from search.tasks.zoo import ZooNetwork
from tests.benchmarks.record import ROOT, Row, record
from tests.pictures import draw_set

_ROUNDS, _THREADS = 3, 2

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
        fp32_mib: Of the weights that can be quantized.
        compressed_mib: At the paper's compression.
        macs: Of one example.
        layers: How many.
        wall_seconds: Of a probe of one example, the least of the rounds.
        cpu_seconds: Likewise.
        peak_mib: Of the process.
    """

    parameters: int
    fp32_mib: float
    compressed_mib: float
    macs: int
    layers: int
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float


def main() -> None:
    """Measure the networks that were asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.networks")
    parser.add_argument("--only", action="append", choices=SUBJECTS)
    parser.add_argument("--here", choices=SUBJECTS, help="measure in this process, print JSON")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(asdict(measured(SUBJECTS[given.here]))))
        return
    rows = []
    for name in given.only or SUBJECTS:
        command = [sys.executable, "-m", "tests.benchmarks.networks", "--here", name]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        found = Figures(**json.loads(done.stdout.splitlines()[-1]))
        probe = f"{name}, a probe of an image"
        rows += [
            Row(name, "", found.layers, "layers"),
            Row(name, "", found.parameters / 1e6, "M parameters"),
            Row(name, "", found.fp32_mib, "MiB in fp32"),
            Row(name, "", found.compressed_mib, f"MiB at {SUBJECTS[name].compression}x"),
            Row(name, "", found.macs / 1e9, "GMACs"),
            Row(probe, "", found.wall_seconds, "s wall"),
            Row(probe, "", found.cpu_seconds, "s CPU"),
            Row(name, "", found.peak_mib, "MiB at its peak"),
        ]
    record("networks", rows)


def measured(subject: Subject) -> Figures:
    """Measure a network in this process."""
    torch.set_num_threads(_THREADS)
    model, example, forward = subject.make(subject.examples)
    reads = read_network(model, example)
    names = [layer.name for layer in reads.layers]
    weights = weights_of(model, names)
    wall, cpu = [], []
    for seed in range(_ROUNDS):
        started, used = time.perf_counter(), time.process_time()
        with differentiable(model, weights):
            outputs, factors = forward()
            gauss_newton_samples(outputs, factors, weights, [seed])
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    fp32 = mib(FLOAT_BITS * sum(layer.num_elements for layer in reads.layers))
    return Figures(
        sum(p.numel() for p in model.parameters()),
        fp32,
        fp32 / subject.compression,
        sum(layer.macs for layer in reads.layers),
        len(names),
        min(wall) / subject.examples,
        min(cpu) / subject.examples,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    )


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
    return _classifier(SmallResNet(20).eval(), 32, num)


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
