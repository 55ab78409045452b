import numpy as np
import pytest
from oracles import free_space

from hawq.sensitivity import omega
from hawq.space import Group, Space

SPACE = free_space([4, 10], (2, 4))
ERRORS = np.array([[1.0, 0.25], [8.0, 2.0]])


def test_omega_is_the_average_trace_times_the_squared_error():
    table = omega(SPACE, np.array([12.0, 5.0]), ERRORS)
    np.testing.assert_allclose(table, [[3, 0.75], [4, 1]], rtol=1e-15)


def test_widths_off_the_menu_are_infinite():
    space = SPACE.pinned({"l1": 4})
    assert np.isinf(omega(space, np.ones(2), ERRORS)).tolist() == [[False, False], [True, False]]


def test_widths_off_a_ties_common_menu_are_infinite():
    space = Space((Group("w:a", 4, 0, (2, 4), "t"), Group("w:b", 4, 0, (4,), "t")))
    assert np.isinf(omega(space, np.ones(2), ERRORS)).tolist() == [[True, False], [True, False]]


def test_a_negative_trace_earns_nothing():
    assert not omega(SPACE, np.array([-3.0, 5.0]), ERRORS)[0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_trace_that_is_not_finite_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="must be finite, got a NaN or infinity in w:l1"):
        omega(SPACE, np.array([1.0, bad]), ERRORS)


def test_an_error_that_is_not_finite_is_refused_by_name():
    with pytest.raises(ValueError, match="in w:l0"):
        omega(SPACE, np.ones(2), np.array([[np.nan, 1], [1, 1]]))


def test_tables_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(2, 2\), got \(3,\) and \(2, 2\)"):
        omega(SPACE, np.ones(3), ERRORS)


def test_rescaling_relu_layers_changes_traces_but_not_omega():
    # W1 → αW1, W2 → W2/α is the same network: traces scale by α⁻² and α², errors inversely.
    alpha = 7.0
    factors = np.array([alpha**2, alpha**-2])
    before = omega(SPACE, np.array([12.0, 5.0]), ERRORS)
    after = omega(SPACE, np.array([12.0, 5.0]) / factors, ERRORS * factors[:, None])
    np.testing.assert_allclose(after, before, rtol=1e-14)
