"""Drawing examples by their outputs' curvature: which, how often, and what they count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import TinyTask, dense_hessian
from torch import Tensor

from hawq.curvature import NonFiniteTraceError, draw_examples, output_curvature
from hawq.curvature.importance import _inclusion
from hawq.factors import focal_factors, softmax_factor

CURVATURES = st.lists(
    st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1e-30, 1.0, 1e9])), min_size=1, max_size=60
)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def heavy_tailed(num: int, seed: int = 0) -> tuple[np.ndarray, Tensor]:
    """Traces of which a few examples hold most, and a rough guess of them, as of the outputs."""
    rng = np.random.default_rng(seed)
    guess = rng.lognormal(sigma=2.5, size=num)
    return guess * rng.lognormal(sigma=0.5, size=num), torch.from_numpy(guess)


def inclusion_of(curvature: Tensor, num: int) -> Tensor:
    """π, from the mixture that the module describes."""
    share = curvature / curvature.sum()
    return _inclusion(0.9 * share + 0.1 / len(curvature), num)


# --- probabilities --------------------------------------------------------------------------------


@given(CURVATURES, st.integers(1, 60))
def test_inclusion_probabilities_are_at_most_one_and_sum_to_the_number_drawn(values, num):
    q = tensor(values) + 1e-3
    q /= q.sum()
    num = min(num, len(q))
    pi = _inclusion(q, num)
    assert float(pi.sum()) == pytest.approx(num, rel=1e-9)
    assert bool(((pi > 0) & (pi <= 1)).all())
    # In proportion to q wherever they are not certain.
    rest = pi < 1
    ratio = (pi / q)[rest]
    if len(ratio):
        np.testing.assert_allclose(ratio, float(ratio[0]), rtol=1e-9)
        assert float((pi / q)[~rest].max() if bool((~rest).any()) else 0) <= float(ratio[0]) * (
            1 + 1e-9
        )


def test_examples_are_drawn_as_often_as_their_probabilities_say():
    _, curvature = heavy_tailed(40)
    pi = inclusion_of(curvature, 15)
    assert float(pi.max()) == 1
    times = torch.zeros(40)
    runs = 3000
    for seed in range(runs):
        times[list(draw_examples(curvature, 15, seed).examples)] += 1
    error = (pi * (1 - pi) / runs).sqrt()
    assert ((times / runs - pi).abs() <= 4.5 * error).all()


# --- draws --------------------------------------------------------------------------------------


@given(CURVATURES, st.integers(1, 70), st.integers(0, 99))
def test_a_draw_takes_no_example_twice_and_no_weight_exceeds_ten(values, num, seed):
    curvature = tensor(values)
    draw = draw_examples(curvature, num, seed)
    assert len(draw.examples) == len(draw.weights) == min(num, len(values))
    assert list(draw.examples) == sorted(set(draw.examples))
    assert draw.examples[0] >= 0
    assert draw.examples[-1] < len(values)
    assert min(draw.weights) > 0
    assert max(draw.weights) <= 10 * (1 + 1e-9)
    assert draw == draw_examples(curvature, num, seed)


@given(CURVATURES, st.integers(1, 60), st.integers(0, 9))
def test_a_weight_is_the_inverse_of_its_inclusion_probability(values, num, seed):
    curvature = tensor(values) + 1e-9
    if num >= len(values):
        return
    draw = draw_examples(curvature, num, seed)
    expected = num / (len(values) * inclusion_of(curvature, num)[list(draw.examples)])
    np.testing.assert_allclose(draw.weights, expected, rtol=1e-9)


def test_the_whole_pool_is_taken_where_it_has_no_more():
    for num in (3, 4, 100):
        draw = draw_examples(tensor([1.0, 5.0, 0.0]), num, 0)
        assert draw.examples == (0, 1, 2)
        assert draw.weights == (1, 1, 1)


def test_without_any_curvature_the_draw_is_uniform():
    draw = draw_examples(torch.zeros(50), 10, 0)
    assert len(set(draw.examples)) == 10
    np.testing.assert_allclose(draw.weights, 1)


@pytest.mark.parametrize("signal", ["guess", "nothing", "the opposite"])
def test_a_draw_is_unbiased_whatever_the_guess(signal):
    traces, guess = heavy_tailed(500)
    guess = {"guess": guess, "nothing": torch.ones(500), "the opposite": 1 / guess}[signal]
    means = []
    for seed in range(1000):
        draw = draw_examples(guess, 60, seed)
        means.append(float(np.dot(draw.weights, traces[list(draw.examples)])) / 60)
    error = np.std(means) / len(means) ** 0.5
    assert abs(np.mean(means) - traces.mean()) < 4.5 * error
    if signal == "guess":  # and does better than a uniform draw, by far
        assert np.std(means) < traces.std() / 60**0.5 / 3


def test_weights_are_one_on_average():
    _, guess = heavy_tailed(500)
    means = [np.mean(draw_examples(guess, 60, seed).weights) for seed in range(500)]
    assert abs(np.mean(means) - 1) < 4.5 * np.std(means) / 500**0.5


@pytest.mark.parametrize(
    ("curvature", "num"), [([1.0, -1.0], 1), ([float("nan")], 1), ([float("inf")], 1), ([1.0], 0)]
)
def test_curvature_that_is_no_share_is_refused(curvature, num):
    with pytest.raises(ValueError, match="finite and not negative, and num positive"):
        draw_examples(tensor(curvature), num, 0)


# --- what is drawn by -----------------------------------------------------------------------------


def test_the_outputs_curvature_is_the_trace_of_each_example_s_own_hessian():
    task = TinyTask(dtype=torch.float64)
    model, batch = task.model().eval(), task.batch("train", torch.arange(6))
    outputs = task.curvature(model, batch)[0].detach()
    found = output_curvature(task, model, batch)
    p = outputs.softmax(1)
    torch.testing.assert_close(found, 1 - p.square().sum(1))
    for n in range(6):
        hessian = dense_hessian(
            lambda z, n=n: torch.nn.functional.cross_entropy(z[None], batch[1][n : n + 1]),
            [outputs[n]],
        )
        assert float(found[n]) == pytest.approx(float(hessian.trace()), rel=1e-9)


class Signed(TinyTask):
    """A detector's loss, which bends down where the network is far on the wrong side."""

    def curvature(self, model, batch):
        outputs = 10 * model(batch[0])
        targets = torch.nn.functional.one_hot(batch[1], 4).to(outputs)
        return outputs, focal_factors(outputs, targets, reduction="sum")


def test_what_bends_down_counts_with_its_magnitude():
    task = Signed(dtype=torch.float64)
    model, batch = task.model().eval(), task.batch("train", torch.arange(6))
    _, factors = task.curvature(model, batch)
    up, down = (factor.energies.sum(1).detach() for factor in factors)
    assert bool((down > 0).any())
    torch.testing.assert_close(output_curvature(task, model, batch), up + down)


class WithoutFormula(TinyTask):
    """The same factor, whose energies must be found column by column."""

    def curvature(self, model, batch):
        outputs = model(batch[0])
        return outputs, [replace(softmax_factor(outputs), energies=None)]


def test_energies_without_a_formula_are_the_same():
    model, batch = TinyTask().model().eval(), TinyTask().batch("train", torch.arange(6))
    torch.testing.assert_close(
        output_curvature(WithoutFormula(), model, batch),
        output_curvature(TinyTask(), model, batch),
        rtol=1e-5,
        atol=1e-7,
    )


def test_a_task_without_factors_is_refused():
    task = TinyTask(factored=False)
    with pytest.raises(ValueError, match=r"needs the task's curvature\(\), got None"):
        output_curvature(task, task.model(), task.batch("train", torch.arange(2)))


def test_an_output_that_is_no_number_is_refused():
    task = TinyTask()
    model = task.model().eval()
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    with pytest.raises(NonFiniteTraceError, match=r"output must be finite, .* in the pool"):
        output_curvature(task, model, task.batch("train", torch.arange(2)))
