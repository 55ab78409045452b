"""What curvature is taken of: the weights of layers, or the activation tensors that feed them.

A site is one tensor. The weights' sites are the layers themselves. An activation's site is the
tensor that a layer reads, not the layer: a tensor with several readers (a residual branch) is one
site, and a layer that runs several times (a detector's shared head) has several, ``LAYER#0``,
``LAYER#1``. It is named after its first reader.

With one example's activations a_n and its own loss ℓ_n, the Hessian in all examples' activations
is block diagonal, and an activation's trace is the mean of Tr ∂²ℓ_n/∂a_n² over the examples
(Dong et al., 2020, equation 9, with the examples' average taken once).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only

from hawq.channels import num_channels
from hawq.curvature.network import differentiable
from hawq.reads import channel_axis, tensor_name

__all__ = [
    "ActivationTape",
    "Granularity",
    "Site",
    "Subject",
    "activation_sites",
    "channel_sums",
    "group_names",
    "group_sums",
    "weight_sites",
]

Subject = Literal["weights", "activations"]
Granularity = Literal["layer", "channel"]


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor whose curvature is traced.

    Attributes:
        name: The layer's, or ``LAYER#i`` of an activation tensor.
        num_elements: Weights, or activations of one example.
        num_channels: Output channels of a weight, channels of an activation.
    """

    name: str
    num_elements: int
    num_channels: int


def weight_sites(model: nn.Module, layers: Sequence[str]) -> tuple[Site, ...]:
    """Describe the weights of layers by name."""
    sites = []
    for name in layers:
        layer = model.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        sites.append(Site(name, weight.numel(), num_channels(layer)))
    return tuple(sites)


def activation_sites(
    model: nn.Module, layers: Sequence[str], forward: Callable[[], object]
) -> tuple[Site, ...]:
    """Find the activation tensors that layers read.

    Args:
        model: The network.
        layers: Names of the layers that may read them.
        forward: Runs the network on one example, in the order of the loss.

    Raises:
        ValueError: If none of the layers reads anything that depends on the network's inputs.
    """
    tape = ActivationTape(model, layers, 1)
    with differentiable(model, []), tape.recording():
        forward()
    if not tape.edges:
        raise ValueError(
            "layers must read tensors that depend on what the network is called with, got none "
            f"read by {', '.join(layers)}: call the network itself, not one of its methods"
        )
    return tuple(seen.site for seen in tape.seen)


def group_names(sites: Sequence[Site], granularity: Granularity) -> tuple[str, ...]:
    """Name the groups: the sites, then with ``"channel"`` all channels, ``NAME[c]``."""
    names = [site.name for site in sites]
    if granularity == "channel":
        names += [f"{site.name}[{c}]" for site in sites for c in range(site.num_channels)]
    return tuple(names)


def group_sums(channels: Sequence[Tensor], granularity: Granularity) -> Tensor:
    """Gather values of channels, shape (…, O) for each site, as groups, shape (…, G)."""
    sums = torch.stack([values.sum(-1) for values in channels], -1)
    return torch.cat([sums, *channels], -1) if granularity == "channel" else sums


def channel_sums(
    parts: Sequence[Tensor | None], sites: Sequence[Site], axes: Sequence[int]
) -> list[Tensor]:
    """Add elements up by channel.

    Args:
        parts: One tensor a site, of the site's shape; None counts as zeros.
        sites: Their descriptions.
        axes: Where each tensor's channels are.

    Returns:
        For each site, shape (O,), float64.
    """
    sums = []
    for part, site, axis in zip(parts, sites, axes, strict=True):
        if part is None:
            sums.append(torch.zeros(site.num_channels, dtype=torch.float64))
        else:
            by_channel = part.movedim(axis, 0).flatten(1)
            sums.append(by_channel.sum(1, dtype=torch.float64).cpu())
    return sums


@dataclass(frozen=True, slots=True)
class _Seen:
    """An activation tensor that a forward pass came by."""

    site: Site
    tensor: Tensor
    edge: GradientEdge | None
    axis: int


class ActivationTape:
    """Where gradients of a forward pass's activation tensors will appear.

    Args:
        model: The network; its own inputs take part, and what embeddings make of indices.
        layers: Names of the layers whose inputs are recorded.
        num_examples: Examples of the pass; None for one a row.

    Attributes:
        seen: The tensors, in the order in which they were first read.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], num_examples: int | None = None
    ) -> None:
        self._model, self._layers, self._num_examples = model, layers, num_examples
        self.seen: list[_Seen] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record one forward pass."""
        self.seen.clear()
        handles = [self._model.register_forward_pre_hook(_rooted, with_kwargs=True)]
        for module in self._model.modules():
            if isinstance(module, nn.Embedding):
                # Nothing of a network that takes indices would depend on anything without this.
                handles.append(module.register_forward_hook(_rooted_output))
        for name in self._layers:
            layer = self._model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(self._reader(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def edges(self) -> list[GradientEdge]:
        """Where gradients appear, of the sites that have any."""
        return [seen.edge for seen in self.seen if seen.edge is not None]

    def spread(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return gradients of ``edges`` as one a site; None where a site has none."""
        rest = iter(gradients)
        return [None if seen.edge is None else next(rest) for seen in self.seen]

    def squared_norms(self, gradients: Sequence[Tensor | None], rows: Tensor) -> list[Tensor]:
        """Return ‖gradient‖² of each example and channel, (n, C) a site, float64.

        Args:
            gradients: Of ``edges``.
            rows: Which examples.
        """
        norms = []
        for seen, gradient in zip(self.seen, self.spread(gradients), strict=True):
            if gradient is None:
                norms.append(torch.zeros(len(rows), seen.site.num_channels, dtype=torch.float64))
                continue
            num = self._num_examples or len(gradient)
            if num == 1:  # all rows are the example's, such as regions of one image
                squares = gradient.square().movedim(seen.axis, 0)[None].flatten(2)[rows]
            elif len(gradient) == num:
                squares = gradient[rows].square().movedim(seen.axis, 1)[..., None].flatten(2)
            else:
                raise ValueError(
                    f"{seen.site.name} must hold one example a row to be taken apart by example, "
                    f"got {len(gradient)} rows of {num} examples: use hutchinson"
                )
            norms.append(squares.sum(2, dtype=torch.float64).cpu())
        return norms

    def _reader(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            tensor = args[0]
            if not tensor.is_floating_point() or any(seen.tensor is tensor for seen in self.seen):
                return  # indices are no activation
            axis = channel_axis(layer) % tensor.ndim
            elements = tensor.numel() // (self._num_examples or len(tensor))
            named = tensor_name(name, (seen.site.name for seen in self.seen))
            site = Site(named, elements, tensor.shape[axis])
            edge = get_gradient_edge(tensor) if tensor.requires_grad else None
            self.seen.append(_Seen(site, tensor, edge, axis))

        return hook


def _rooted(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a network's inputs differentiable; a copy, so that it may work on them in place."""
    return tree_map_only(Tensor, _root, args), tree_map_only(Tensor, _root, kwargs)


def _rooted_output(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if output.requires_grad else _root(output)


def _root(x: Tensor) -> Tensor:
    floating = x.is_floating_point() and torch.is_grad_enabled()
    return x.detach().requires_grad_().clone() if floating else x
