"""Gauss–Newton traces example by example: exact, or exact in the leading directions of the loss.

With a direction B_n v of the loss's square root as cotangent, G_n = ∂⟨B_n v, outputs_n⟩/∂W is one
example's gradient, and over a basis of directions

    Tr G = (1/N) Σ_n Σ_v sign·‖G_{n,v}‖².

Directions that together hold a share ε of the loss's curvature may be left out, with a bias of the
order of ε, or sampled by random signs, with none; see ``columns``. A convolution's gradient of one
example is a convolution of its input with the gradient g at its output, or, where the positions are
few, never formed: the rows of g Uᵀ have the norms diag(g (UᵀU) gᵀ), U being the input's patches.
Only g comes from the backward pass, which therefore computes no weight gradients. The squared norm
of G's rows is the trace of each output channel.

Per-example values also give the error over the choice of examples, without further work.

What was tried and did not win, on ResNet20 and one core (64 images: forward 77 ms, a training step
245 ms; one direction 103 ms backward and 121 ms for the norms): two directions in one batched
backward (260 ms instead of 206), channels-last (109 and 148 ms), forming patches instead of the
grouped convolution (three times its time where positions are many). bfloat16 halves forward and
backward, but then nothing is exact. torch.compile of the whole network costs 31 to 35 seconds of
compiling and gains none (10.3 CPU-seconds for 512 images instead of 9.4; channels-last 8.6); from a
filled cache the first estimation still takes 11.5 instead of 10.1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hawq.channels import TransposedConvolution, num_channels, transposed_groups
from hawq.curvature.columns import Directions, directions
from hawq.curvature.probes import rademacher
from hawq.space import sharing_layers
from hawq.task import Factor

__all__ = ["Tape", "WeightTape", "per_example_traces", "supports_examples"]

# Examples are taken together as long as what they need fits; the bits depend on it.
_CHUNK_BYTES = 64 << 20

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | TransposedConvolution


class Tape(Protocol):
    """What a forward pass leaves for the backward ones."""

    def recording(self) -> AbstractContextManager[None]:
        """Record one forward pass."""
        ...

    @property
    def edges(self) -> list[GradientEdge]:
        """Where gradients are wanted."""
        ...

    def squared_norms(self, gradients: Sequence[Tensor | None], rows: Tensor) -> list[Tensor]:
        """Turn gradients at ``edges`` into ‖∂/∂site‖² of the examples ``rows``, (n, O) a site."""
        ...


def supports_examples(layer: nn.Module) -> bool:
    """Whether a layer's weight gradient can be taken apart example by example."""
    return isinstance(layer, nn.Linear | nn.Embedding | _Convolution)


def per_example_traces(
    forward: Callable[[], tuple[Tensor, Sequence[Factor]]],
    tape: Tape,
    *,
    weights: Tensor,
    floor: float = 0.0,
    leading: int | None = None,
    seeds: Sequence[int] = (),
) -> list[Tensor]:
    """Compute every example's Gauss–Newton trace for each channel of each site.

    Args:
        forward: Runs the network on one batch; returns its outputs, shape (N, …), attached to
            their graph, and the signed factors of the losses' Hessian in them.
        tape: Records what the backward passes need.
        weights: What each example counts for, shape (N,), for ``floor`` only.
        floor: Directions whose energy, times the example's weight, is at most this are left out.
        leading: Directions an example that are pulled back one by one; None for all.
        seeds: One for each random combination of the other directions.

    Returns:
        For each site, shape (max(1, len(seeds)), N, O), float64: of each probe, example and
        channel; without probes what the leading directions give.
    """
    with tape.recording():
        outputs, factors = forward()
    rows = torch.arange(len(outputs), device=outputs.device)
    if not tape.edges or not outputs.requires_grad:
        none: list[Tensor | None] = [None] * len(tape.edges)
        zeros = tape.squared_norms(none, rows)
        return [values.expand(max(1, len(seeds)), *values.shape) for values in zeros]

    def pulled(factor: Factor, signs: Tensor, among: Tensor) -> list[Tensor]:
        cotangent = factor.apply(signs).detach()
        gradients = torch.autograd.grad(
            outputs, tape.edges, cotangent, retain_graph=True, allow_unused=True
        )
        return tape.squared_norms(gradients, among)

    exact = [values[None] for values in tape.squared_norms([None] * len(tape.edges), rows)]
    sampled = [torch.zeros(len(seeds), *values.shape[1:]).double() for values in exact]
    bases = [directions(outputs.detach(), factor) for factor in factors]
    for basis in bases:
        active = weights[:, None].to(basis.energy) * basis.energy > floor
        num = active.shape[1] if leading is None else min(leading, active.shape[1])
        for k in active[:, :num].any(0).nonzero()[:, 0].tolist():
            among = active[:, k].nonzero()[:, 0]
            signs = basis.signs(k) * active[:, k, None]
            for total, norms in zip(exact, pulled(basis.factor, signs, among), strict=True):
                total[0, among.cpu()] += basis.factor.sign * norms
    for probe, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for basis in bases:
            signs = _rest(basis, outputs, generator, leading or 0)
            for total, norms in zip(sampled, pulled(basis.factor, signs, rows), strict=True):
                total[probe] += basis.factor.sign * norms
    return [e + s if len(seeds) else e for e, s in zip(exact, sampled, strict=True)]


def _rest(basis: Directions, outputs: Tensor, generator: torch.Generator, leading: int) -> Tensor:
    shape = (len(outputs), basis.factor.rank)
    return basis.remainder(rademacher(shape, generator, outputs), leading)


class WeightTape:
    """What layers read, and where the gradients of what they return will appear.

    Args:
        model: The network.
        layers: Names of layers. One that runs several times, or shares its weight with others, has
            the sum of all gradients; one that does not run has traces of zero.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        everywhere = sharing_layers(model)
        self._sharers = {name: everywhere.get(name, [model.get_submodule(name)]) for name in layers}
        self._calls: dict[str, list[tuple[nn.Module, Tensor, int, GradientEdge]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record one forward pass."""
        self._calls = {name: [] for name in self._sharers}

        def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if output.requires_grad:
                    x, edge = args[0], get_gradient_edge(output)
                    # The edge, not the tensor: an in-place ReLU may follow.
                    self._calls[name].append((layer, x.detach(), x._version, edge))

            return hook

        handles = [
            layer.register_forward_hook(record(name))
            for name, sharers in self._sharers.items()
            for layer in sharers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def edges(self) -> list[GradientEdge]:
        """Where gradients appear: every call of every layer."""
        return [edge for calls in self._calls.values() for *_, edge in calls]

    def squared_norms(self, gradients: Sequence[Tensor | None], rows: Tensor) -> list[Tensor]:
        """Return ‖∂/∂W‖² of each example and output channel, (n, O) a layer, float64."""
        rest = iter(gradients)
        found = []
        for name, (layer, *_) in self._sharers.items():
            calls = []
            for caller, x, version, _ in self._calls[name]:
                if x._version != version:
                    raise ValueError(
                        f"{name}: its input must not be changed in place after it was read, which "
                        "training would refuse too: use the out-of-place form of the operator"
                    )
                gradient = next(rest)
                if gradient is not None:
                    calls.append(_Call(caller, x, gradient))
            assert isinstance(layer.weight, Tensor)
            found.append(_row_norms(layer, calls, rows))
        return found


@dataclass(frozen=True, slots=True)
class _Call:
    """A layer at work: what it read, shape (N, …), and the gradient at what it returned."""

    layer: nn.Module
    x: Tensor
    g: Tensor

    def of(self, rows: Tensor | slice) -> "_Call":
        return _Call(self.layer, self.x[rows], self.g[rows])

    def numbers(self) -> int:
        """Numbers that one example's patches and gradient take."""
        overlap = 1
        if isinstance(self.layer, nn.Embedding):
            return self.x[0].numel() ** 2 + self.g[0].numel()
        if not isinstance(self.layer, nn.Linear):
            assert isinstance(self.layer, _Convolution)
            overlap = int(torch.tensor(self.layer.kernel_size).prod())
        return self.x[0].numel() * overlap + self.g[0].numel()


def _row_norms(layer: nn.Module, calls: Sequence[_Call], rows: Tensor) -> Tensor:
    """Return the squared norms of the rows of each example's weight gradient, (n, O)."""
    weight, groups = layer.weight, transposed_groups(layer)
    assert isinstance(weight, Tensor)
    norms = torch.zeros(len(rows), num_channels(layer), dtype=torch.float64)
    if not calls or not len(rows):
        return norms
    is_table = isinstance(layer, nn.Embedding)
    formed = len(weight) if is_table else 2 * weight.numel()
    numbers = sum(call.numbers() for call in calls) + formed
    chunk = max(1, _CHUNK_BYTES // (numbers * weight.element_size()))
    everyone = len(rows) == len(calls[0].x)
    for first in range(0, len(rows), chunk):
        own = slice(first, first + chunk)
        # A slice is a view; taking rows by index would copy them.
        chosen = [call.of(own if everyone else rows[own]) for call in calls]
        if is_table:
            norms[own] = _table_norms(chosen, len(weight)).double().cpu()
        else:
            norms[own] = _cheaper_norms(weight, chosen, groups).double().cpu()
    return norms


def _table_norms(calls: Sequence[_Call], num_rows: int) -> Tensor:
    """Return ‖Σ_t g_t‖² over the positions t of each row of an embedding, shape (n, rows).

    Of products of two positions that read the same row; the gradient, as large as the table for
    every example, is never formed.
    """
    gradients = []
    for call in calls:
        assert isinstance(call.layer, nn.Embedding)
        g = call.g
        if call.layer.padding_idx is not None:  # torch gives that row no gradient
            g = g * (call.x != call.layer.padding_idx)[..., None]
        gradients.append(g.reshape(len(g), -1, g.shape[-1]))
    g = torch.cat(gradients, 1)
    x = torch.cat([call.x.reshape(len(call.x), -1) for call in calls], 1).long()
    same = x[:, :, None] == x[:, None, :]
    sums = (g @ g.mT).mul_(same).sum(2)
    return g.new_zeros(len(x), num_rows).scatter_add_(1, x, sums)


def _cheaper_norms(weight: Tensor, calls: Sequence[_Call], groups: int) -> Tensor:
    """Take the cheaper of ‖rows of g Uᵀ‖² and diag(g (UᵀU) gᵀ), shape (n, O).

    A transposed convolution, of ``groups`` groups, always has its gradients formed.
    """
    if any(isinstance(call.layer, TransposedConvolution) for call in calls):
        total = _total_gradients(weight, calls)
        if groups == 0:  # the weight is an ordinary convolution's, too, and named after that
            return total.flatten(2).square_().sum(2)
        by_group: Tensor = total.flatten(3).unflatten(1, (groups, -1))  # (n, groups, I, O, K)
        return by_group.square_().sum((2, 4)).flatten(1)
    positions = sum(call.g[0].numel() for call in calls) // len(weight)
    inner = weight[0].numel()
    gram_is_cheaper = positions * (inner + len(weight)) < len(weight) * inner
    if all(isinstance(call.layer, nn.Linear) for call in calls):
        u = torch.cat([c.x.reshape(len(c.x), -1, inner) for c in calls], 1)[:, None]
        g = torch.cat([c.g.reshape(len(c.g), -1, len(weight)) for c in calls], 1)
        rows = g.transpose(1, 2)[:, None]  # (n, groups, O, P)
        if not gram_is_cheaper:
            return (rows @ u).square_().sum(-1).flatten(1)
    elif gram_is_cheaper and len(calls) == 1:
        u = _patches(calls[0]).transpose(2, 3)  # (n, groups, P, K)
        rows = calls[0].g.flatten(2).view(len(u), u.shape[1], -1, positions)
    else:
        return _total_gradients(weight, calls).flatten(2).square_().sum(2)
    return (rows @ (u @ u.transpose(2, 3))).mul_(rows).sum(-1).flatten(1)


def _total_gradients(weight: Tensor, calls: Sequence[_Call]) -> Tensor:
    return sum((_gradients(call, weight) for call in calls[1:]), _gradients(calls[0], weight))


def _gradients(call: _Call, weight: Tensor) -> Tensor:
    """Form each example's gradient, (n, *weight.shape), all by one grouped convolution."""
    layer = call.layer
    assert isinstance(layer, _Convolution)
    is_transposed = isinstance(layer, TransposedConvolution)
    # What a transposed convolution pads is cut off its output.
    x = call.x if is_transposed else _padded(call)
    num, spatial = len(x), x.ndim - 2
    gradient: Tensor = torch.ops.aten.convolution_backward(
        call.g.reshape(1, -1, *call.g.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        weight.detach().new_empty(1).expand(num * len(weight), *weight.shape[1:]),
        None,
        layer.stride,
        layer.padding if is_transposed else (0,) * spatial,
        layer.dilation,
        is_transposed,
        layer.output_padding,
        num * layer.groups,
        (False, True, False),
    )[1]
    return gradient.view(num, *weight.shape)


def _padded(call: _Call) -> Tensor:
    assert isinstance(call.layer, _Convolution)
    # Torch keeps what each padding comes to, last axis first, also for "same" and "valid".
    pads = call.layer._reversed_padding_repeated_twice
    mode = "constant" if call.layer.padding_mode == "zeros" else call.layer.padding_mode
    return F.pad(call.x, pads, mode) if any(pads) else call.x


def _patches(call: _Call) -> Tensor:
    """What a convolution multiplies its weight with, shape (N, groups, K, P)."""
    layer, x = call.layer, _padded(call)
    assert isinstance(layer, _Convolution)
    spatial = x.ndim - 2
    for axis in range(spatial):
        span = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, span, layer.stride[axis])[..., :: layer.dilation[axis]]
    kernel_first = x.permute(0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
    positions = x.shape[2 : 2 + spatial].numel()
    return kernel_first.reshape(len(x), layer.groups, -1, positions)
