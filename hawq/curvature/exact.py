"""Exact Gauss–Newton traces, example by example: no probe, and no probe error.

With column c of B_n as cotangent, G_{n,c} = ∂⟨B_n e_c, outputs_n⟩/∂W is one example's gradient, and

    Tr G = (1/N) Σ_n Σ_c sign·‖G_{n,c}‖²,

in all R backward passes for outputs with R columns. A convolution's gradient of one example is
G = g Uᵀ with g the gradient at its output, shape (O, P) over P positions, and U the patches of its
input, shape (K, P); a linear layer is the same with K inputs. Only g comes from the backward pass,
which therefore never forms weight gradients. The squared norm of G's rows, the trace of each output
channel, is the cheaper of Σ_k (g Uᵀ)² and diag(g (UᵀU) gᵀ): K against P numbers a position.

Per-example values also give the error over the choice of examples, without further work.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hawq.task import Factor

__all__ = ["exact_gauss_newton", "supports_exact"]

# Gradients of several columns are multiplied with the patches at once, as far as they fit.
_COLUMN_BYTES = 256 << 20

# What a layer read, and where the gradient of what it returned will appear.
Call = tuple[Tensor, GradientEdge]


def supports_exact(layer: nn.Module) -> bool:
    """Whether a layer's gradients can be taken apart example by example."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def exact_gauss_newton(
    forward: Callable[[], tuple[Tensor, Sequence[Factor]]], layers: Mapping[str, nn.Module]
) -> list[Tensor]:
    """Compute every example's Gauss–Newton trace for each output channel of each layer.

    Args:
        forward: Runs the network on one batch; returns its outputs, shape (N, …), attached to
            their graph, and the signed factors of the losses' Hessian in them.
        layers: Name to layer; their weights must require gradients. A layer that runs several
            times has the sum of its gradients; one that does not run has traces of zero.

    Returns:
        For each layer, shape (N, O), float64: example n's trace of channel o.
    """
    with _recorded(layers) as calls:
        outputs, factors = forward()
    found = [_zeros(len(outputs), layer) for layer in layers.values()]
    edges = [edge for seen in calls.values() for _, edge in seen]
    if not edges or not outputs.requires_grad:
        return found
    numbers = sum(x.numel() for seen in calls.values() for x, _ in seen)
    together = max(1, _COLUMN_BYTES // (numbers * outputs.element_size()))
    for factor in factors:
        for first in range(0, factor.rank, together):
            columns = range(first, min(first + together, factor.rank))
            gradients = [_column(outputs, factor, column, edges) for column in columns]
            at = 0
            for norms, (name, layer) in zip(found, layers.items(), strict=True):
                own = range(at, at + len(calls[name]))
                at += len(calls[name])
                used = [i for i in own if gradients[0][i] is not None]
                if used:
                    u = torch.cat([_patches(layer, calls[name][i - own[0]][0]) for i in used], -1)
                    g = torch.cat([_at_output(layer, [c[i] for c in gradients]) for i in used], -1)
                    norms.add_(_row_norms(g, u).cpu(), alpha=factor.sign)
    return found


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    calls: dict[str, list[Call]] = {name: [] for name in layers}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # The edge, not the tensor: an in-place ReLU may follow.
            calls[name].append((args[0].detach(), get_gradient_edge(output)))

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _zeros(num_examples: int, layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return torch.zeros(num_examples, len(layer.weight), dtype=torch.float64)


def _column(
    outputs: Tensor, factor: Factor, column: int, edges: Sequence[GradientEdge]
) -> tuple[Tensor | None, ...]:
    """Pull one column of every example's factor back to the layers' outputs."""
    s = torch.zeros(len(outputs), factor.rank, device=outputs.device, dtype=outputs.dtype)
    s[:, column] = 1
    return torch.autograd.grad(
        outputs, edges, factor.apply(s), retain_graph=True, allow_unused=True
    )


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight with, shape (N, groups, K, P)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), 1, -1, layer.in_features).transpose(2, 3)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    # Torch keeps what each padding comes to, last axis first, also for "same" and "valid".
    x = F.pad(x, layer._reversed_padding_repeated_twice)
    one = () if isinstance(layer, nn.Conv2d) else (1,)
    kernel, stride = (*one, *layer.kernel_size), (*one, *layer.stride)
    image = x if isinstance(layer, nn.Conv2d) else x[:, :, None]
    unfolded = F.unfold(image, kernel, (*one, *layer.dilation), 0, stride)
    return unfolded.view(len(x), layer.groups, -1, unfolded.shape[2])


def _at_output(layer: nn.Module, gradients: Sequence[Tensor | None]) -> Tensor:
    """Gradients of several columns at a layer's output, shape (N, C, groups, O/groups, P)."""
    g = torch.stack([gradient for gradient in gradients if gradient is not None], 1)
    if isinstance(layer, nn.Linear):
        return g.reshape(*g.shape[:2], 1, -1, layer.out_features).transpose(3, 4)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return g.flatten(3).view(*g.shape[:2], layer.groups, -1, g.shape[3:].numel())


def _row_norms(g: Tensor, u: Tensor) -> Tensor:
    """Σ_c ‖row o of g_c Uᵀ‖², shape (N, O)."""
    num, columns, groups, channels, positions = g.shape
    rows = g.transpose(1, 2).reshape(num, groups, columns * channels, positions)
    if positions < u.shape[2]:
        norms = (rows @ (u.transpose(2, 3) @ u)).mul_(rows).sum(-1)
    else:
        norms = (rows @ u.transpose(2, 3)).square_().sum(-1)
    return norms.double().view(num, groups, columns, channels).sum(2).flatten(1)
