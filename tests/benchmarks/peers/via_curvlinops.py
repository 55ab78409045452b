"""curvlinops: its trace estimators layer by layer, its diagonal estimators over all layers at once.

A layer's trace is the sum of its part of the diagonal, which one joint probe estimates for all.
XTrace, XDiag and Hutch++ (Epperly et al., 2024; Meyer et al., 2021) use their products twice: to
find the leading subspace, and to sample what it leaves. Their error falls faster than 1/√products
where few directions hold the trace, so what their averages would take is an upper bound: more
products at once would do better.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    hutchinson_diag,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from torch import Tensor, nn

from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem

Operator = type[HessianLinearOperator] | type[GGNLinearOperator]


def diagonal(
    operator: Operator, estimate: Callable[..., Tensor], matvecs: int, problem: Problem, batch: int
) -> Callable[[], Step]:
    """Partial sums of an estimated diagonal."""
    matrix = _operator(operator, problem, batch, list(problem.weights))
    sizes = [weight.numel() for weight in problem.weights]

    def step() -> Step:
        parts = estimate(matrix, num_matvecs=matvecs).double().split(sizes)
        return Step(np.array([float(part.sum()) for part in parts]))

    return step


def blocks(
    operator: Operator, estimate: Callable[..., Tensor], matvecs: int, problem: Problem, batch: int
) -> Callable[[], Step]:
    """The trace of each layer's block by itself."""
    matrices = [_operator(operator, problem, batch, [weight]) for weight in problem.weights]

    def step() -> Step:
        return Step(np.array([float(estimate(m, num_matvecs=matvecs)) for m in matrices]))

    return step


def _operator(
    operator: Operator, problem: Problem, batch: int, weights: list[nn.Parameter]
) -> HessianLinearOperator | GGNLinearOperator:
    return operator(
        problem.model,
        nn.CrossEntropyLoss(),
        weights,
        list(problem.batches(batch)),
        check_deterministic=False,
    )


if __name__ == "__main__":
    hessian, ggn = HessianLinearOperator, GGNLinearOperator
    measure(
        {
            "Hutchinson, diagonal": partial(diagonal, hessian, hutchinson_diag, 1),
            "Hutchinson, GGN diagonal": partial(diagonal, ggn, hutchinson_diag, 1),
            "XDiag, 48 products": partial(diagonal, hessian, xdiag, 48),
            "XDiag of GGN, 48 products": partial(diagonal, ggn, xdiag, 48),
            "Hutchinson, blocks": partial(blocks, hessian, hutchinson_trace, 1),
            "Hutch++, 12 products": partial(blocks, hessian, hutchpp_trace, 12),
            "XTrace, 12 products": partial(blocks, hessian, xtrace, 12),
            "XTrace of GGN, 12 products": partial(blocks, ggn, xtrace, 12),
        },
        "curvlinops-for-pytorch",
    )
