"""Slow and sure answers: dense Hessians, brute force, and tiny networks and tasks to ask about."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hawq.factors import softmax_factor
from hawq.space import Group, Space
from hawq.task import Factor

LAYERS = ("conv1", "conv2", "linear")


def gated(x: Tensor) -> Tensor:
    """SiLU, without any module or operator of that name."""
    return x * torch.sigmoid(x)


def self_normalized(x: Tensor) -> Tensor:
    """Divide by something that depends on the weights."""
    return x.relu() / (1 + x.abs().mean((1, 2, 3), keepdim=True))


class ResidualNet(nn.Module):
    """Convolution, batch-norm, activation, residual, pooling, linear: 183 weights."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu, shared=False, live=False):
        super().__init__()
        self.activation, self.shared = activation, shared
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3, track_running_stats=not live)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.linear = nn.Linear(12, 4)
        if not live:
            self.bn1.running_mean.normal_(0, 0.3)
            self.bn1.running_var.uniform_(0.5, 2)
        nn.init.uniform_(self.bn1.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.bn1(self.conv1(x)))
        h = self.activation(h + self.conv2(self.conv2(h) if self.shared else h))
        return self.linear(F.max_pool2d(h, 2).flatten(1))


class LazyNet(nn.Module):
    """A linear layer, and another one that is never called."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(50, 4)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.flatten(1))


class Growing(nn.Module):
    """A transposed convolution of a bare weight, which no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 2, 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight)


class Upsampling(nn.Module):
    """A convolution, a module that cannot be quantized here, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 3, 2)
        self.up = Growing()
        self.head = nn.Linear(50, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.down(x).relu()).relu().flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu": ResidualNet,
    "silu": lambda: ResidualNet(F.silu),
    "gated": lambda: ResidualNet(gated),
    "normalized": lambda: ResidualNet(self_normalized),
    "shared": lambda: ResidualNet(shared=True),
    "live_bn": lambda: ResidualNet(live=True),
    "lazy": LazyNet,
    "upsampling": Upsampling,
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(50, 4)),
}


@dataclass(frozen=True)
class TinyTask:
    """Four classes of 2×5×5 images that differ in their mean; see ``hawq.task.Task``."""

    network: str = "relu"
    num_examples: int = 12
    factored: bool = True
    dtype: torch.dtype = torch.float32

    score_name = "accuracy"
    search_seen = False

    @property
    def fingerprint(self) -> str:
        return f"tiny-{self.network}-{self.num_examples}"

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return NETWORKS[self.network]().to(self.dtype)

    def size(self, split: str) -> int:
        return self.num_examples

    def batch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for index in indices.tolist():
            generator = torch.Generator().manual_seed(1000 * len(split) + index)
            label = index % 4
            noise = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
            centre = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]][label])
            images.append(noise + centre[:, None, None])
            labels.append(label)
        return torch.stack(images).to(self.dtype), torch.tensor(labels)

    def augment(
        self, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        images, labels = batch
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, images.flip(3), images), labels

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0]

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def curvature(
        self, model: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Sequence[Factor]] | None:
        if not self.factored:
            return None
        logits = model(batch[0])
        return logits, [softmax_factor(logits)]

    def scores(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).argmax(1) == batch[1]).float()


@dataclass(frozen=True)
class NetTask(TinyTask):
    """The same examples for a network of one's own."""

    make: Callable[[], nn.Module] = ResidualNet

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.make().to(self.dtype)


def dense_hessian(loss: Callable[..., Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The Hessian of ``loss(*weights)`` in all weights together, shape (n, n)."""
    blocks = torch.autograd.functional.hessian(loss, tuple(w.detach() for w in weights))
    return torch.cat(
        [
            torch.cat(
                [
                    block.reshape(a.numel(), b.numel())
                    for block, b in zip(row, weights, strict=True)
                ],
                1,
            )
            for row, a in zip(blocks, weights, strict=True)
        ]
    )


def block_traces(matrix: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The traces of a matrix's diagonal blocks, one a weight."""
    return torch.stack([d.sum() for d in matrix.diagonal().split([w.numel() for w in weights])])


def mean_loss_hessian(model: nn.Module, layers: Sequence[str], x: Tensor, y: Tensor) -> Tensor:
    """The Hessian of the mean cross-entropy in some layers' weights, in eval mode."""
    names, weights = _weights(model, layers)

    def loss(*values: Tensor) -> Tensor:
        outputs = functional_call(model.eval(), dict(zip(names, values, strict=True)), (x,))
        return F.cross_entropy(outputs, y)

    return dense_hessian(loss, weights)


def mean_loss_gauss_newton(model: nn.Module, layers: Sequence[str], x: Tensor) -> Tensor:
    """The Gauss–Newton matrix E[Jᵀ (diag(p) − ppᵀ) J] of the same, from dense Jacobians."""
    names, weights = _weights(model, layers)

    def outputs(*values: Tensor) -> Tensor:
        return functional_call(model.eval(), dict(zip(names, values, strict=True)), (x,))

    jacobian = torch.autograd.functional.jacobian(outputs, tuple(w.detach() for w in weights))
    j = torch.cat([part.flatten(2) for part in jacobian], 2)  # (N, C, n)
    p = outputs(*weights).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nci,ncd,ndj->ij", j, inner, j) / len(x)


def _weights(model: nn.Module, layers: Sequence[str]) -> tuple[list[str], list[Tensor]]:
    return [f"{n}.weight" for n in layers], [model.get_submodule(n).weight for n in layers]


def every_choice(space: Space) -> Iterator[tuple[int, ...]]:
    """All allowed columns of a space's groups, one tuple an allocation."""
    allowed = space.allowed()
    for choice in product(range(len(space.widths)), repeat=len(space)):
        ties_agree = all(len({choice[i] for i in members}) == 1 for members in space.rows())
        if ties_agree and all(allowed[i, c] for i, c in enumerate(choice)):
            yield choice


def evaluate(table: np.ndarray, choice: Sequence[int]) -> float:
    """Sum a table over a choice."""
    return sum(table[i, c].item() for i, c in enumerate(choice))


def brute_force(space: Space, sensitivity: np.ndarray, cost: np.ndarray, budget: int) -> float:
    """The least total sensitivity within a budget over all allocations; infinite if none fits."""
    return min(
        (
            evaluate(sensitivity, choice)
            for choice in every_choice(space)
            if evaluate(cost, choice) <= budget
        ),
        default=np.inf,
    )


def free_space(sizes: Sequence[int], menu: Sequence[int]) -> Space:
    """A space of untied layers."""
    return Space(tuple(Group(f"w:l{i}", n, n, tuple(menu)) for i, n in enumerate(sizes)))
