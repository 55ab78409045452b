"""Directions of a loss's square root against dense linear algebra."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hawq.curvature.columns import Directions, column_energies, directions
from hawq.curvature.probes import rademacher
from hawq.factors import focal_factors, softmax_factor
from hawq.task import Factor

NUM = 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_factor(outputs: int, rank: int) -> tuple[Tensor, Factor]:
    """Any matrices, without a formula for their energies."""
    roots = random(NUM, outputs, rank) * torch.logspace(0, -3, rank, dtype=torch.float64)
    roots = roots.gather(2, random(NUM, 1, rank, seed=1).argsort(2).expand_as(roots))
    return random(NUM, outputs), Factor(rank, lambda s: (roots @ s[:, :, None])[:, :, 0])


def softmax(classes: int) -> tuple[Tensor, Factor]:
    logits = 3 * random(NUM, classes)
    return logits, softmax_factor(logits)


def pictures() -> tuple[Tensor, Factor]:
    logits = random(NUM, 2, 3, 4)
    return logits, focal_factors(logits, (random(NUM, 2, 3, 4) > 0).double(), reduction="sum")[0]


def scalars() -> tuple[Tensor, Factor]:
    """Outputs of shape (N,): one number an example."""
    return random(NUM), Factor(2, lambda s: s @ torch.tensor([1.0, -2]).double())


CASES = {
    "softmax": softmax(4),
    "one class": softmax(1),
    "as many columns as are turned": softmax(64),
    "softmax of more": softmax(100),
    "any root": dense_factor(5, 4),
    "more columns than outputs": dense_factor(5, 70),
    "diagonal": pictures(),
    "scalar outputs": scalars(),
    "nothing": (random(NUM, 3), Factor(3, lambda s: 0 * s)),
}
MORE_THAN_TURNED = ["softmax of more", "more columns than outputs"]
each_case = pytest.mark.parametrize("name", CASES)


def root_of(outputs: Tensor, factor: Factor) -> Tensor:
    """B, shape (N, outputs, R)."""
    eye = torch.eye(factor.rank, dtype=torch.float64)
    columns = [factor.apply(e.expand(len(outputs), -1)).reshape(len(outputs), -1) for e in eye]
    return torch.stack(columns, 2)


def matrix_of(found: Directions) -> Tensor:
    """V, shape (N, R, R): direction k is column k."""
    return torch.stack([found.signs(k) for k in range(found.factor.rank)], 2)


@each_case
def test_the_directions_are_orthonormal_and_another_root_of_the_same_hessian(name):
    outputs, factor = CASES[name]
    root, v = root_of(outputs, factor), matrix_of(directions(outputs, factor))
    eye = torch.eye(factor.rank, dtype=torch.float64).expand(len(outputs), -1, -1)
    torch.testing.assert_close(v.mT @ v, eye)
    torch.testing.assert_close(root @ v @ v.mT @ root.mT, root @ root.mT)


@each_case
def test_their_energies_are_what_b_makes_of_them_and_fall(name):
    outputs, factor = CASES[name]
    found = directions(outputs, factor)
    root, v = root_of(outputs, factor), matrix_of(found)
    expected = (root @ v).square().sum(1)
    scale = float(expected.max()) or 1.0
    torch.testing.assert_close(found.energy, expected, rtol=1e-9, atol=1e-13 * scale)
    assert found.energy.dtype == torch.float64
    for part in (found.energy[:, :64], found.energy[:, 64:]):
        assert (part.diff(dim=1) <= 1e-13 * scale).all()
    torch.testing.assert_close(found.energy.sum(1), root.square().sum((1, 2)))


@each_case
def test_turned_directions_do_not_overlap_after_b(name):
    outputs, factor = CASES[name]
    turned = (root_of(outputs, factor) @ matrix_of(directions(outputs, factor)))[:, :, :64]
    gram = turned.mT @ turned
    off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) <= 1e-12 * (float(gram.max()) or 1.0)


@each_case
def test_no_columns_hold_more_than_as_many_leading_directions(name):
    outputs, factor = CASES[name]
    found = directions(outputs, factor)
    columns = root_of(outputs, factor).square().sum(1).sort(1, descending=True).values
    turned = min(64, factor.rank)
    gained = (found.energy - columns)[:, :turned].cumsum(1)
    assert (gained >= -1e-12 * (float(columns.max()) or 1.0)).all()


@each_case
def test_the_remainder_has_the_covariance_that_the_leading_directions_leave(name):
    outputs, factor = CASES[name]
    found = directions(outputs, factor)
    root, v = root_of(outputs, factor), matrix_of(found)
    eye = torch.eye(factor.rank, dtype=torch.float64)
    for num in {0, 1, 3, 63, 64, 65, factor.rank, factor.rank + 5}:
        # Of independent signs with covariance 1, a linear map M has the covariance M Mᵀ.
        mapped = torch.stack(
            [found.remainder(e.expand(len(outputs), -1).contiguous(), num) for e in eye], 2
        )
        leading = v[:, :, :num]
        expected = eye - leading @ leading.mT
        torch.testing.assert_close(mapped, expected, rtol=0, atol=1e-12)
        rest = root @ mapped
        torch.testing.assert_close(
            rest @ rest.mT, root @ root.mT - root @ leading @ leading.mT @ root.mT
        )


@pytest.mark.parametrize("name", MORE_THAN_TURNED)
def test_random_signs_sample_the_remainder_without_bias(name):
    outputs, factor = CASES[name]
    found = directions(outputs, factor)
    for num in (0, 2, 66):
        generator = torch.Generator().manual_seed(num)
        energies = torch.stack(
            [
                factor.apply(
                    found.remainder(rademacher((NUM, factor.rank), generator, outputs), num)
                )
                .square()
                .sum(1)
                for _ in range(400)
            ]
        )
        error = energies.std(0) / len(energies) ** 0.5
        expected = found.energy[:, num:].sum(1)
        assert ((energies.mean(0) - expected).abs() < 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][1].energies is not None])
def test_a_formula_s_energies_are_those_of_the_columns(name):
    outputs, factor = CASES[name]
    counted = column_energies(outputs, replace(factor, energies=None))
    torch.testing.assert_close(column_energies(outputs, factor), counted)
    torch.testing.assert_close(counted, root_of(outputs, factor).square().sum(1))


def test_each_example_has_its_own_order():
    logits = torch.tensor([[5.0, 0, 0, 4.5], [0, 5, 4.5, 0]], dtype=torch.float64)
    found = directions(logits, softmax_factor(logits))
    first = found.signs(0).abs()
    # Between the two likely classes of either example.
    assert first[0].argsort(descending=True)[:2].sort().values.tolist() == [0, 3]
    assert first[1].argsort(descending=True)[:2].sort().values.tolist() == [1, 2]


def test_in_single_precision_the_directions_are_still_a_root():
    logits = 8 * random(NUM, 100).float()
    factor = softmax_factor(logits)
    found = directions(logits, factor)
    v = matrix_of(found).double()
    assert found.signs(0).dtype == torch.float32
    p = logits.double().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    eye = torch.eye(100, dtype=torch.float32)
    root = torch.stack([factor.apply(e.expand(NUM, -1)) for e in eye], 2).double()
    torch.testing.assert_close(root @ v @ v.mT @ root.mT, hessian, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.energy.sum(1), 1 - p.square().sum(1), rtol=1e-4, atol=1e-7)
