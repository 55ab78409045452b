"""Blocks of layers that HAWQ gives one eigenvalue and one bit-width (Dong et al., 2019).

Blocks are read off the tree of modules, without running the network. A candidate is a module of a
class of its own that holds at least two quantizable layers: not the network itself, and no mere
container (``Sequential``, ``ModuleList``, ``ModuleDict``). A candidate that holds two candidates
or more is a stage, and is taken apart; any other one is a block, with everything inside it. So a
ResNet's bottlenecks are blocks and its stages are not, a squeeze-and-excitation belongs to the
block around it, and a convolution with its batch-norm is one layer.

The tree does not tell where a forward method adds a shortcut: layers that stand in the network
itself or in a plain ``Sequential`` are blocks of one layer. Group those by name.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from hawq.space import quantizable_layers

__all__ = ["grouped_blocks", "residual_blocks"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def residual_blocks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Find the blocks of a network.

    Returns:
        Block name to the names of its layers; every quantizable layer is in exactly one block,
        and both are in the order of registration. A block of one layer has the layer's name.
    """
    layers = list(quantizable_layers(model))
    blocks: list[str] = []
    for name, module in reversed(list(model.named_modules())):  # parts before what holds them
        parts = [block for block in blocks if _holds(name, block)]
        size = sum(_holds(name, layer) for layer in layers)
        if name and not _is_container(module) and size >= 2 and len(parts) < 2:
            blocks = [block for block in blocks if block not in parts] + [name]
    owners = {layer: next((b for b in blocks if _holds(b, layer)), layer) for layer in layers}
    return _collected(owners)


def grouped_blocks(
    layers: Sequence[str], patterns: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Group layers by name; those that no group takes are blocks of one layer.

    Args:
        layers: Names, in the network's order.
        patterns: Block name to the names or globs of its layers (``layer1.0.*``).

    Returns:
        As ``residual_blocks`` does.

    Raises:
        ValueError: If a glob matches no layer, if two groups claim one layer, or if a group has
            the name of a layer outside it.
    """
    claimed: dict[str, str] = {}
    for block, globs in patterns.items():
        for glob in globs:
            hits = [layer for layer in layers if fnmatchcase(layer, glob)]
            if not hits:
                known = ", ".join(layers[:5])
                raise ValueError(
                    f"{glob!r} in block {block!r} must match a layer, got none of {known}, …"
                )
            for layer in hits:
                other = claimed.setdefault(layer, block)
                if other != block:
                    raise ValueError(
                        f"a layer must be in one block, got {layer} in {other!r} and {block!r}"
                    )
    for block in patterns:
        if block in layers and claimed.get(block) != block:
            raise ValueError(f"block {block!r} must not have the name of a layer outside it")
    return _collected({layer: claimed.get(layer, layer) for layer in layers})


def _holds(module: str, inner: str) -> bool:
    return inner.startswith(f"{module}.")


def _is_container(module: nn.Module) -> bool:
    """Whether a module only lists others; a subclass with a forward of its own does more."""
    return any(
        isinstance(module, container) and type(module).forward is container.forward
        for container in _CONTAINERS
    )


def _collected(owners: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    blocks: dict[str, list[str]] = {}
    for layer, block in owners.items():
        blocks.setdefault(block, []).append(layer)
    return {block: tuple(members) for block, members in blocks.items()}
