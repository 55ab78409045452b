"""What there is to quantize in a network: ``hawq inspect``."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from hawq.attention import project_attention
from hawq.cost import FLOAT_BITS, mib
from hawq.curvature import choose_estimator
from hawq.reads import Reads, read_network
from hawq.space import sharing_layers, unquantizable_weights
from hawq.task import Task
from search.config_file import load_config
from search.errors import InputError
from search.spaces import reads_of
from search.tasks.build import build_task
from search.tasks.given import Given, GivenTask
from search.tasks.zoo import LIBRARIES, ZooNetwork

__all__ = ["InspectedLayer", "Inspection", "inspected", "inspection_view"]

_EXAMPLES = 1
# Of a published network's side, for its estimator: a ninth of the work, and the same operators.
_SMALLER = 3


@dataclass(frozen=True, slots=True)
class InspectedLayer:
    """One layer.

    Attributes:
        name: Of its module.
        kind: Of its module, and how it is grouped: ``"Conv2d, depthwise"``.
        shape: Of its weight.
        num_elements: Weights.
        macs: Multiply-accumulates for one example.
        reads: Names of the tensors that it reads; none where it did not run as a module, or reads
            indices.
        read_elements: Their sizes together, of one example.
        ties: With whom its output is added or concatenated, or its weight shared: ``"sum 1"``.
        is_called: Whether it ran as a module, as far as that is known.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    num_elements: int
    macs: int
    reads: tuple[str, ...]
    read_elements: int
    ties: tuple[str, ...]
    is_called: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """A network, looked at.

    Attributes:
        name: As it was asked for.
        input_shape: Of one example.
        layers: What can be quantized.
        kept: Other weights, which stay in floating point, by name: elements.
        num_parameters: All of them, biases and normalizations included.
        num_activations: Elements of all tensors that layers read, of one example.
        estimator: What ``auto`` takes for the weights' curvature, and why; empty: not asked for.
    """

    name: str
    input_shape: tuple[int, ...]
    layers: tuple[InspectedLayer, ...]
    kept: dict[str, int]
    num_parameters: int
    num_activations: int
    estimator: str


def inspected(
    what: str,
    overrides: Sequence[str] = (),
    *,
    resolution: int | None = None,
    estimator: bool = False,
) -> Inspection:
    """Look at a config's network, or at a published one.

    Args:
        what: A YAML file, or ``pytorchcv:resnet50`` and the like.
        overrides: Of the config.
        resolution: Of a published network's input, in pixels; None: as its library says.
        estimator: Whether to find out which estimator applies: a minute or more of a large one.

    Raises:
        InputError: If there is no such thing, or the network cannot be run.
    """
    library = what.partition(":")[0]
    if library in LIBRARIES and not Path(what).exists():
        if overrides:
            raise InputError(f"--set: is for a config, got {what}")
        return _published(what, resolution, estimator)
    if not Path(what).exists():
        raise InputError(
            f"{what}: must be a config that exists, or a network such as pytorchcv:resnet50 "
            f"(of {', '.join(LIBRARIES)})"
        )
    if resolution is not None:
        raise InputError("--resolution: is for a published network; a config has task.resolution")
    config = load_config(Path(what), overrides)
    task = build_task(config.task, config.seed)
    model = task.model()
    example = task.inputs(task.batch("train", torch.arange(1)))
    reads = reads_of(config, task, model)
    return _inspection(what, model, reads, example, task if estimator else None)


def inspection_view(found: Inspection) -> RenderableType:
    """Show it as a table, with what stays in floating point and the totals below."""
    table = Table(box=box.SIMPLE_HEAD, title=found.name, title_justify="left")
    for heading in ("layer", "type", "weight", "parameters", "MACs", "reads", "size", "ties"):
        numeric = heading in {"parameters", "MACs", "size"}
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for layer in found.layers:
        table.add_row(
            layer.name,
            layer.kind,
            "×".join(map(str, layer.shape)),
            f"{layer.num_elements:,}",
            f"{layer.macs:,}" if layer.is_called else "not called",
            # Its own first tensor is most layers' only one.
            ", ".join(name.removeprefix(layer.name) for name in layer.reads),
            f"{layer.read_elements:,}",
            ", ".join(layer.ties),
        )
    quantizable = sum(layer.num_elements for layer in found.layers)
    lines = [
        f"{len(found.layers)} layers, {quantizable:,} weights that can be quantized: "
        f"{mib(FLOAT_BITS * quantizable):.2f} MiB in fp32",
        f"{found.num_parameters:,} parameters in all: "
        f"{mib(FLOAT_BITS * found.num_parameters):.2f} MiB",
        f"{sum(layer.macs for layer in found.layers):,} MACs and {found.num_activations:,} "
        f"activations that layers read, for an input of {'×'.join(map(str, found.input_shape))}",
    ]
    if found.kept:
        names = ", ".join(f"{name} ({count:,})" for name, count in found.kept.items())
        lines.append(f"in floating point, for they cannot be quantized: {names}")
    silent = [layer.name for layer in found.layers if not layer.is_called]
    if silent:
        lines.append(f"never called as modules, so what they read has no name: {', '.join(silent)}")
    if found.estimator:
        lines.append(f"estimator: {found.estimator}")
    return Group(table, *(Text(line) for line in lines))


def _published(name: str, resolution: int | None, estimator: bool) -> Inspection:
    network = ZooNetwork(name)
    size = network.preprocessing().at(resolution).size
    model = project_attention(network.build(0))
    images = torch.randn(_EXAMPLES, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        reads = read_network(model, images)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: must take images of {size} pixels, got {error}: give --resolution"
        ) from error
    if not estimator:
        return _inspection(name, model, reads, images, None)
    looked_at, seen = (model, images) if resolution is not None else _smaller(model, images)
    return _inspection(name, model, reads, images, _of_noise(looked_at, seen))


@dataclass(frozen=True, slots=True)
class _Held:
    """Examples that are nowhere but here."""

    held: Given

    def open(self) -> Given:
        """Return them."""
        return self.held


@torch.no_grad()
def _smaller(model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the network and the images' corners, where it can take them; else as they are."""
    side = images.shape[-1] // _SMALLER
    corners, freed = images[..., :side, :side].contiguous(), _freed(model, images)
    try:
        freed(corners)
    except (RuntimeError, ValueError, AssertionError):  # its size is built in
        return model, images
    return freed, corners


def _freed(model: nn.Module, images: Tensor) -> nn.Module:
    """Copy a network; where it averages all that is left of its images it takes any size then."""
    copied = copy.deepcopy(model)
    last: list[str] = []

    def look(name: str, output: Tensor) -> None:
        if output.shape[-2:] == (1, 1):
            last.append(name)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in copied.named_modules()
        if isinstance(module, nn.AvgPool2d)
    ]
    copied(images)
    for handle in handles:
        handle.remove()
    for name in last:
        copied.set_submodule(name, nn.AdaptiveAvgPool2d(1))
    return copied


def _of_noise(model: nn.Module, images: Tensor) -> Task:
    """Make a task of a network of classes, for its estimator does not depend on the pictures."""
    with torch.no_grad():
        outputs = model(images)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise InputError(
            "--estimator: needs a network of classes, or a config, whose task has a loss"
        )
    rows = (images, outputs.argmax(1))
    return GivenTask(_Held(Given(model, {"train": rows}, None, None, None, False, "")))


def _inspection(
    name: str, model: nn.Module, reads: Reads, example: Tensor, task: Task | None
) -> Inspection:
    sharing = sharing_layers(model)
    sizes = {a.name: a.num_elements for a in reads.activations}
    ties: dict[str, list[str]] = {}
    for what, sets in (("sum", reads.sums), ("concatenation", reads.joins)):
        for i, members in enumerate(sets):
            for member in members:
                ties.setdefault(member, []).append(f"{what} {i + 1}")
    layers = []
    for layer in reads.layers:
        read = tuple(dict.fromkeys(r.activation for r in reads.reads if r.layer == layer.name))
        module, *others = sharing[layer.name]
        weight = module.weight
        assert isinstance(weight, Tensor)
        shared = [f"shared by {len(others) + 1} modules"] if others else []
        layers.append(
            InspectedLayer(
                layer.name,
                _kind(module),
                tuple(weight.shape),
                layer.num_elements,
                layer.macs,
                read,
                sum(sizes.get(tensor, 0) for tensor in read),
                (*ties.get(layer.name, ()), *shared),
                bool(read) or isinstance(module, nn.Embedding),
            )
        )
    return Inspection(
        name,
        tuple(example.shape[1:]),
        tuple(layers),
        unquantizable_weights(model),
        sum(p.numel() for p in model.parameters()),
        sum(sizes.values()),
        "" if task is None else _estimator(task, [layer.name for layer in layers]),
    )


def _kind(module: nn.Module) -> str:
    kind = type(module).__name__
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return kind
    return f"{kind}, {'depthwise' if groups == module.in_channels else f'{groups} groups'}"


def _estimator(task: Task, layers: Sequence[str]) -> str:
    """Choose as a search would, on a few examples."""
    batch = task.batch("train", torch.arange(_EXAMPLES))
    choice = choose_estimator(task, task.model(), layers, batch)
    return f"{choice.estimator.replace('_', ' ')}: {choice.reason}"
