"""Batch-norm folded into the layer before it, as integer hardware has it (Jacob et al., 2018).

The weights that are quantized are then the folded ones. Which batch-norm reads one layer's output,
and nothing else does, is found by following tensors through one forward pass.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights, fuse_linear_bn_weights, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hawq.channels import (
    TransposedConvolution,
    channels_first,
    num_channels,
    transposed_groups,
)
from hawq.finetune.batch_norm import BatchNorm
from hawq.space import evaluating

__all__ = ["Foldable", "FoldedBatchNorm", "fold_batch_norm", "fold_state", "foldable"]

_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | TransposedConvolution
_NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# They read what a tensor is, not what is in it.
_HARMLESS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "__hash__"}
_HARMLESS |= {"is_floating_point", "is_complex", "is_contiguous", "get_device"}


@dataclass(frozen=True, slots=True)
class Foldable:
    """Which batch-norms a network's layers can take in.

    Attributes:
        layers: Name of the batch-norm to that of the layer before it.
        kept: Name of the others to what is in the way.
    """

    layers: Mapping[str, str]
    kept: Mapping[str, str]


class FoldedBatchNorm(nn.Identity):
    """Where a batch-norm was that its layer has taken in.

    Args:
        layer: Name of the layer.
        eps: The batch-norm's.
    """

    def __init__(self, layer: str, eps: float) -> None:
        super().__init__()
        self.layer, self.eps = layer, eps


def foldable(model: nn.Module, example: Tensor) -> Foldable:
    """Find the batch-norms that read one layer's output, which nothing else reads.

    One forward pass in eval mode tells it.

    Args:
        model: Not quantized.
        example: A batch of its inputs, shape (N, …); only the first is used.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    watch = _Watch()
    handles = [
        hook
        for name, module in {**norms, **layers}.items()
        for hook in (
            module.register_forward_pre_hook(watch.enter(name), with_kwargs=True),
            module.register_forward_hook(watch.leave(name)),
        )
    ]
    try:
        with torch.no_grad(), evaluating(model), watch:
            result = model(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    watch.read(result, "the network's outputs")
    found: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, norm in norms.items():
        obstacle = _obstacle(name, norm, layers, watch)
        if obstacle is None:
            found[name] = watch.makers[id(watch.inputs[name][0])]
        else:
            kept[name] = obstacle
    return Foldable(found, kept)


def fold_batch_norm(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a copy of a network whose layers have taken their batch-norms in.

    In eval mode its outputs are the same to rounding. Those that cannot be folded are left; see
    ``foldable``.

    Args:
        model: Not quantized; left as it is.
        example: A batch of its inputs, shape (N, …); only the first is used.
    """
    layers = foldable(model, example).layers
    folded = copy.deepcopy(model)
    state = dict(model.state_dict())
    for name, layer_name in layers.items():
        norm, layer = model.get_submodule(name), folded.get_submodule(layer_name)
        assert isinstance(norm, BatchNorm)
        if layer.bias is None:
            weight = layer.get_parameter("weight")
            bias = weight.new_zeros(num_channels(layer))
            layer.bias = nn.Parameter(bias, weight.requires_grad)
        folded.set_submodule(name, FoldedBatchNorm(layer_name, norm.eps).train(norm.training))
    folded.load_state_dict(fold_state(folded, state))
    return folded


def fold_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the weights of an unfolded network into those of the folded one.

    Args:
        model: From ``fold_batch_norm``.
        state: Of the network that it was made of, or one like it; what is folded already, or lacks
            a batch-norm's statistics, is left as it is.
    """
    folded = dict(state)
    for name, norm in model.named_modules():
        if not isinstance(norm, FoldedBatchNorm) or f"{name}.running_mean" not in folded:
            continue
        of_norm = {key: folded.pop(f"{name}.{key}", None) for key in _NORM_KEYS}
        layer = norm.layer
        is_linear = isinstance(model.get_submodule(layer), nn.Linear)
        groups = transposed_groups(model.get_submodule(layer))
        fuse = fuse_linear_bn_weights if is_linear else fuse_conv_bn_weights
        mean, variance = of_norm["running_mean"], of_norm["running_var"]
        assert mean is not None
        assert variance is not None
        weight, bias = fuse(
            nn.Parameter(channels_first(folded[f"{layer}.weight"], groups)),
            folded.get(f"{layer}.bias"),
            mean,
            variance,
            norm.eps,
            of_norm["weight"] if of_norm["weight"] is not None else torch.ones_like(mean),
            of_norm["bias"] if of_norm["bias"] is not None else torch.zeros_like(mean),
        )
        folded[f"{layer}.weight"] = channels_first(weight.detach(), groups)
        folded[f"{layer}.bias"] = bias.detach()
    return folded


class _Watch(TorchFunctionMode):
    """Follow what layers give and take through one forward pass.

    Attributes:
        inputs: What each watched module was called with, call by call.
        outputs: What it returned.
        makers: Identity of an output to the module that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: dict[str, list[Any]] = {}
        self.makers: dict[int, str] = {}
        self._readers: dict[int, list[str]] = {}
        self._under_way: list[str] = []
        self._alive: list[Any] = []  # lest an identity pass to another tensor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        # An attribute such as ``shape`` is harmless; ``T`` is a tensor with the same content.
        is_plain = name == "__get__" and not isinstance(result, Tensor)
        if name not in _HARMLESS and not is_plain:
            self.read((args, kwargs), self._under_way[-1] if self._under_way else name)
        return result

    def read(self, taken: Any, reader: str) -> None:
        """Note who read some tensors."""
        for tensor in tree_leaves(taken):
            if isinstance(tensor, Tensor):
                self._alive.append(tensor)
                self._readers.setdefault(id(tensor), []).append(reader)

    def readers(self, tensor: Tensor) -> list[str]:
        """Return who read a tensor, a module by its name, a function outside of any by its own."""
        return self._readers.get(id(tensor), [])

    def enter(self, name: str) -> Callable[..., None]:
        """Make a hook for before a module's call."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._under_way.append(name)
            self.inputs.setdefault(name, []).append(tree_leaves((args, kwargs))[0])

        return hook

    def leave(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Make a hook for after a module's call."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._under_way.pop()
            self._alive.append(output)
            self.outputs.setdefault(name, []).append(output)
            self.makers[id(output)] = name

        return hook


def _obstacle(
    name: str, norm: BatchNorm, layers: Mapping[str, nn.Module], watch: _Watch
) -> str | None:
    """Say why a batch-norm cannot be folded; None if it can."""
    calls = watch.inputs.get(name, [])
    if norm.running_mean is None:
        return "it has no running statistics"
    if len(calls) != 1:
        return f"it runs {len(calls)} times"
    tensor = calls[0]
    maker = watch.makers.get(id(tensor))
    if maker is None or maker not in layers:
        return "what it reads is not the output of a convolution or linear layer"
    others = sorted({reader or "a function" for reader in watch.readers(tensor)} - {name})
    if others:
        return f"the output of {maker} is read by {', '.join(others)}, too"
    return _layer_obstacle(maker, layers[maker], tensor, watch)


def _layer_obstacle(name: str, layer: nn.Module, output: Tensor, watch: _Watch) -> str | None:
    if len(watch.outputs[name]) != 1:
        return f"{name} runs {len(watch.outputs[name])} times"
    if parametrize.is_parametrized(layer):
        return f"the weight of {name} is made of others"
    if isinstance(layer, nn.Linear) and output.ndim != 2:
        return f"the channels of {name} are not where the batch-norm looks for them"
    for own in (p for p in (layer.weight, layer.bias) if isinstance(p, Tensor)):
        others = sorted({reader or "a function" for reader in watch.readers(own)} - {name})
        if others:
            return f"a parameter of {name} is read by {', '.join(others)}, too"
    return None
