"""Who reads what: the layers of a network, the activation tensors that feed them, when each lives.

One forward pass of one example tells it. An activation is a tensor, not a layer's input: a tensor
with several readers is one, and a layer that runs several times reads several. A tensor is named
after the layer that reads it first, ``LAYER#0``, ``LAYER#1`` for the layer's own first, second.
An embedding reads indices, which are no activation: it multiplies nothing, and is in no call.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hawq.channels import TransposedConvolution, num_channels
from hawq.space import Group, Kind, Space, evaluating, sharing_layers

__all__ = [
    "Activation",
    "Layer",
    "Read",
    "Reads",
    "channel_axis",
    "network_space",
    "read_network",
    "tensor_name",
    "weight_space",
]

# What passes a layer's output on to a sum, channel by channel.
_PASSING = {"batch_norm", "dropout", "interpolate", "contiguous", "clone"}
_ADDING = {"add", "add_", "__add__", "__radd__", "__iadd__"}
# What passes it on to a concatenation: the same and the usual activations, element by element.
_ELEMENTWISE = _PASSING | {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "elu",
    "silu", "gelu", "hardswish", "sigmoid", "tanh",
}  # fmt: skip
_JOINING = {"cat", "concat", "concatenate"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight that can be quantized, with the modules that share it.

    Attributes:
        name: Of the first of them.
        num_elements: Weights.
        num_channels: Output channels.
        macs: Multiply-accumulates for one example, over all its calls; none of an embedding.
    """

    name: str
    num_elements: int
    num_channels: int
    macs: int


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor that one or more layers read.

    Attributes:
        name: ``LAYER#i``.
        num_elements: Of one example.
        num_channels: Channels.
        is_input: Whether it is the network's own input.
    """

    name: str
    num_elements: int
    num_channels: int
    is_input: bool


@dataclass(frozen=True, slots=True)
class Read:
    """One call of a layer.

    Attributes:
        layer: Name of the layer, as in ``Reads.layers``.
        module: Name of the module that was called; not the layer's own where several share it.
        activation: Name of the tensor that it read.
        macs: Multiply-accumulates for one example.
    """

    layer: str
    module: str
    activation: str
    macs: int


@dataclass(frozen=True, slots=True)
class Reads:
    """What one forward pass did.

    Attributes:
        layers: In the order of registration; one that never ran has no MACs.
        activations: In the order in which they were first read.
        reads: The calls, in order.
        alive: For each call, the activations that are in memory while it runs: what it reads, what
            comes of its output before the next call, and what something later still needs. Tensors
            that no layer reads are not among them, and a tensor of which only a view is kept is
            taken for dead.
        sums: Layers whose outputs are added to each other, directly or after batch-norm.
        joins: Layers whose outputs are concatenated, directly or after an activation.
    """

    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    reads: tuple[Read, ...]
    alive: tuple[tuple[str, ...], ...]
    sums: tuple[tuple[str, ...], ...]
    joins: tuple[tuple[str, ...], ...] = ()

    def without(self, patterns: Sequence[str], kind: Kind) -> "Reads":
        """Leave out what stays in floating point.

        Args:
            patterns: Names or globs of layers, with whose calls what they alone read goes, too; or
                of tensors, or of their first readers. ``"first"`` and ``"last"`` mean the first
                and the last where none is called so.
            kind: Whether they name weights or activations.

        Raises:
            ValueError: If a glob matches nothing, or no layer is left.
        """
        of: Sequence[Layer | Activation] = self.layers if kind == "weights" else self.activations
        names = [found.name for found in of]
        gone = {name for pattern in patterns for name in _matching(pattern, names, kind)}
        if kind == "activations":
            return self._only(self.layers, {a.name for a in self.activations} - gone)
        layers = tuple(layer for layer in self.layers if layer.name not in gone)
        if not layers:
            raise ValueError(f"keep must leave a layer to quantize, got {list(patterns)}")
        kept = {layer.name for layer in layers}
        return self._only(layers, {r.activation for r in self.reads if r.layer in kept})

    def _only(self, layers: tuple[Layer, ...], tensors: set[str]) -> "Reads":
        kept = {layer.name for layer in layers}
        sums, joins = (
            tuple(
                left
                for members in sets
                if len(left := tuple(name for name in members if name in kept)) > 1
            )
            for sets in (self.sums, self.joins)
        )
        return Reads(
            layers,
            tuple(a for a in self.activations if a.name in tensors),
            tuple(r for r in self.reads if r.layer in kept),
            tuple(tuple(name for name in step if name in tensors) for step in self.alive),
            sums,
            joins,
        )


def _matching(pattern: str, names: Sequence[str], kind: Kind) -> list[str]:
    ends = {"first": names[:1], "last": names[-1:]}
    hits = [
        n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.partition("#")[0], pattern)
    ]
    hits = hits or list(ends.get(pattern, []))
    if not hits:
        near = get_close_matches(pattern, names, 3, 0.5) or names[:5]
        raise ValueError(
            f"{pattern!r} must match a layer of the {kind}, got none; there are {', '.join(near)}"
        )
    return hits


def read_network(model: nn.Module, inputs: Tensor) -> Reads:
    """Run a network once, in eval mode, and tell who read what.

    Args:
        model: The network.
        inputs: What it takes, shape (N, …); only the first example is used.

    Raises:
        ValueError: If the network has no layer that can be quantized.
    """
    sharing = sharing_layers(model)
    if not sharing:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise ValueError(
            "the network must hold a convolution, a linear layer or an embedding to quantize, "
            f"got only {', '.join(kinds)}"
        )
    watch = _Watch(inputs[:1])
    modules = {id(module): name for name, module in model.named_modules()}
    handles = []
    for name, sharers in sharing.items():
        for module in sharers:
            called = modules[id(module)]
            handles.append(module.register_forward_pre_hook(watch.reader(called)))
            handles.append(module.register_forward_hook(watch.writer(name, called)))
    try:
        with torch.no_grad(), evaluating(model), watch:
            model(watch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    macs = dict.fromkeys(sharing, 0)
    for read in watch.reads:
        macs[read.layer] += read.macs
    layers = []
    for name, (module, *_) in sharing.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        layers.append(Layer(name, weight.numel(), num_channels(module), macs[name]))
    alive = tuple(
        tuple(s.activation.name for s in watch.seen if s.born < following and step <= s.needed)
        for step, following in pairwise([*watch.steps, inf])
    )
    sums, joins = (
        tuple(tuple(name for name in sharing if name in members) for members in sets)
        for sets in (watch.sums, watch.joins)
    )
    activations = tuple(seen.activation for seen in watch.seen)
    return Reads(tuple(layers), activations, tuple(watch.reads), alive, sums, joins)


def tensor_name(layer: str, taken: Iterable[str]) -> str:
    """Name a tensor after the layer that reads it first, which may have named others."""
    return f"{layer}#{sum(name.rpartition('#')[0] == layer for name in taken)}"


def channel_axis(layer: nn.Module) -> int:
    """Return where the channels of what a layer reads are: a linear layer reads features last."""
    return -1 if isinstance(layer, nn.Linear) else 1


def network_space(
    reads: Reads,
    weights: Sequence[int],
    activations: Sequence[int] | None = None,
    *,
    by_channel: bool = False,
) -> Space:
    """Make the space of a network's weights and, if asked for, its activations.

    Args:
        reads: The network's layers and tensors.
        weights: Bit-widths that every layer may receive; 0 for its channels alone.
        activations: Bit-widths that every activation tensor may receive; None leaves them out.
        by_channel: Whether every output channel, and channel of an activation, is a group.
    """
    macs_of = dict.fromkeys((a.name for a in reads.activations), 0)
    for read in reads.reads:
        if read.activation in macs_of:  # else it stays in floating point
            macs_of[read.activation] += read.macs
    groups = [
        group
        for layer in reads.layers
        for group in _groups(f"w:{layer.name}", layer, layer.macs, weights, by_channel)
    ]
    if activations is not None:
        groups += [
            group
            for tensor in reads.activations
            for group in _groups(
                f"a:{tensor.name}", tensor, macs_of[tensor.name], activations, by_channel
            )
        ]
    return Space(tuple(groups))


def weight_space(model: nn.Module, inputs: Tensor, menu: Sequence[int]) -> Space:
    """Make the space of all layers' weights, one group a layer, of a network.

    Args:
        model: The network; it is run once, in eval mode.
        inputs: What the network takes, shape (N, …); only the first example is used.
        menu: Bit-widths that every layer may receive.

    Raises:
        ValueError: If the network has no quantizable layer.
    """
    return network_space(read_network(model, inputs), menu)


def _groups(
    name: str, of: Layer | Activation, macs: int, menu: Sequence[int], by_channel: bool
) -> list[Group]:
    widths = tuple(sorted(menu))
    if not by_channel:
        return [Group(name, of.num_elements, macs, tuple(b for b in widths if b))]
    channels, size = of.num_channels, of.num_elements // of.num_channels
    return [Group(f"{name}[{c}]", size, macs // channels, widths) for c in range(channels)]


@dataclass(frozen=True, slots=True)
class _Seen:
    """An activation, the step that made it, and the last one that needs it."""

    activation: Activation
    born: int
    needed: int


@dataclass(slots=True)
class _Made:
    """A tensor that is kept, lest its identity pass to another one.

    Attributes:
        tensor: Itself.
        step: That made it.
        needed: The last step that took it.
        layers: Whose outputs it is the sum of, while nothing but batch-norm came between.
        parts: Whose outputs it is made of, while nothing but sums, concatenations and functions of
            single elements came between.
    """

    tensor: Tensor
    step: int
    needed: int
    layers: frozenset[str] = field(default_factory=frozenset)
    parts: frozenset[str] = field(default_factory=frozenset)


class _Watch(TorchFunctionMode):
    """Follow every tensor of a forward pass through the functions that take and make it."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs
        self.reads: list[Read] = []
        self.steps: list[int] = []
        self.sums: list[frozenset[str]] = []
        self.joins: list[frozenset[str]] = []
        self._step = 0
        self._inside = 0  # of a layer: its own functions make nothing that others could see
        self._made: dict[int, _Made] = {id(inputs): _Made(inputs, 0, 0)}
        self._read: list[tuple[Activation, int]] = []

    @property
    def seen(self) -> list[_Seen]:
        """The activations, in the order in which they were first read."""
        return [
            _Seen(activation, made.step, made.needed)
            for activation, key in self._read
            for made in [self._made[key]]
        ]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self._inside or name in {"__get__", "size", "dim", "__len__"}:
            return result
        self._step += 1
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in taken:
            if id(tensor) in self._made:
                self._made[id(tensor)].needed = self._step
        layers, parts = self._layers(name, taken), self._parts(name, taken)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._make(tensor, layers, parts)
        return result

    def reader(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """Make a hook for before a layer's call."""

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            self._step += 1
            self._inside += 1
            tensor = args[0]
            if not tensor.is_floating_point():  # an embedding's indices
                return
            made = self._made.get(id(tensor)) or self._make(tensor)
            made.needed = self._step
            if id(tensor) not in {key for _, key in self._read}:
                activation = Activation(
                    tensor_name(name, (a.name for a, _ in self._read)),
                    tensor.numel(),
                    tensor.shape[channel_axis(layer)],
                    tensor is self.inputs,
                )
                self._read.append((activation, id(tensor)))

        return hook

    def writer(self, name: str, called: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Make a hook for after a layer's call."""

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            # Of a transposed convolution every input meets the kernel, of the others every output.
            met = args[0] if isinstance(layer, TransposedConvolution) else output
            macs = weight[0].numel() * met.numel()
            reads_values = args[0].is_floating_point()
            self._inside -= 1
            if reads_values:
                key = id(args[0])
                (tensor,) = [a.name for a, read in self._read if read == key]
                self.reads.append(Read(name, called, tensor, macs))
                self.steps.append(self._step)
            self._make(output, frozenset({name}), frozenset({name}))

        return hook

    def _make(
        self,
        tensor: Tensor,
        layers: frozenset[str] = frozenset(),
        parts: frozenset[str] = frozenset(),
    ) -> _Made:
        # What works in place gives the same tensor back, with another content.
        needed = self._made[id(tensor)].needed if id(tensor) in self._made else self._step
        made = _Made(tensor, self._step, max(needed, self._step), layers, parts)
        self._made[id(tensor)] = made
        return made

    def _layers(self, name: str, taken: Sequence[Tensor]) -> frozenset[str]:
        """Return whose outputs a function's result is the sum of."""
        sources = [self._made[id(t)].layers for t in taken[:2] if id(t) in self._made]
        if name in _ADDING and len(sources) == 2 and all(sources):
            together = sources[0] | sources[1]
            # A sum of sums is one: what is part of it is told no longer by itself.
            self.sums = [*(s for s in self.sums if not s <= together), together]
            return together
        return sources[0] if name in _PASSING and sources else frozenset()

    def _parts(self, name: str, taken: Sequence[Tensor]) -> frozenset[str]:
        """Return whose outputs a function's result is made of, element by element."""
        sources = [self._made[id(t)].parts for t in taken if id(t) in self._made]
        if name in _JOINING and len(sources) > 1:
            together = frozenset[str]().union(*sources)
            if len(together) > 1:
                self.joins = [*(s for s in self.joins if not s <= together), together]
            return together
        if name in _ADDING and len(sources) == 2:
            return sources[0] | sources[1]
        return sources[0] if name in _ELEMENTWISE and sources else frozenset()
