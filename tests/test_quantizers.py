import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hawq.quantizers import codes, quantize
from hawq.ranges import best_scales, weight_errors

WIDTHS = st.integers(1, 8)


def rows(num_rows=16, num_columns=144, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)


def errors(x, bits, signed=True):
    """Squared error of each row at its best scale."""
    return (
        (quantize(x, best_scales(x, bits, signed=signed), bits, signed=signed) - x).square().sum(1)
    )


def scan(x, bits, signed=True):
    """Least squared error of each row over 2000 ranges."""
    low, high = codes(bits, signed=signed)
    scales = x.abs().amax(1) / high * torch.linspace(0.005, 1.6, 2000, dtype=x.dtype)[:, None]
    ratios = x / scales[:, :, None]
    if signed and bits <= 2:
        levels = torch.arange(low, high + 1, 2, dtype=x.dtype)
        found = [(level - ratios).abs() for level in levels]
        lost = torch.stack(found).amin(0) * scales[:, :, None]
    else:
        lost = (torch.clamp(torch.round(ratios), low, high) - ratios) * scales[:, :, None]
    return lost.square().sum(2).amin(0)


@pytest.mark.parametrize("signed", [True, False])
@given(bits=WIDTHS, scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_quantizing_twice_changes_nothing(signed, bits, scale, seed):
    x = rows(4, 20, seed).float() * scale
    s = best_scales(x, bits, signed=signed)
    once = quantize(x, s, bits, signed=signed)
    assert torch.equal(quantize(once, s, bits, signed=signed), once)


@given(bits=WIDTHS)
def test_values_are_codes_times_the_scale(bits):
    low, high = codes(bits)
    values = quantize(rows(), torch.full((16, 1), 0.25, dtype=torch.float64), bits) / 0.25
    assert torch.equal(values, values.round())
    assert low <= values.min()
    assert values.max() <= high


def test_codes_are_those_of_lsq_from_three_bits_on_and_odd_below():
    assert [codes(bits) for bits in (0, 3, 4, 8)] == [(0, 0), (-4, 3), (-8, 7), (-128, 127)]
    assert [codes(bits) for bits in (1, 2)] == [(-1, 1), (-3, 3)]
    x, scale = torch.linspace(-5, 5, 41), torch.tensor(1.0)
    assert quantize(x, scale, 1).unique().tolist() == [-1, 1]
    assert quantize(x, scale, 2).unique().tolist() == [-3, -1, 1, 3]
    assert quantize(torch.tensor([-2.1, -1.9, -0.1, 0.1, 1.9, 2.1]), scale, 2).tolist() == [
        -3, -1, -1, 1, 1, 3,
    ]  # fmt: skip
    assert [codes(bits, signed=False) for bits in (1, 2, 8)] == [(0, 1), (0, 3), (0, 255)]


@pytest.mark.parametrize("bits", [9, -1])
def test_widths_outside_zero_to_eight_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits must be within 0..8, got {bits}"):
        codes(bits)


@pytest.mark.parametrize(
    ("bits", "slack"), [(2, 0.005), (3, 0.005), (4, 0.01), (5, 0.02), (8, 0.2)]
)
def test_ranges_are_nearly_those_of_a_dense_scan(bits, slack):
    x = rows()
    assert (errors(x, bits) <= (1 + slack) * scan(x, bits)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_of_activations_are_nearly_those_of_a_dense_scan(bits):
    x = rows(4, 512).relu()
    assert (errors(x, bits, signed=False) <= 1.02 * scan(x, bits, signed=False)).all()


def test_two_bits_keep_far_more_than_the_largest_weight_s_range_does():
    x = rows()
    largest = x.abs().amax(1, keepdim=True)
    naive = (quantize(x, largest, 2) - x).square().sum() / x.square().sum()
    assert naive > 0.6
    assert errors(x, 2).sum() / x.square().sum() < 0.2


def test_one_bit_has_the_closed_form_of_the_mean_magnitude():
    x = rows()
    scale = x.abs().mean(1, keepdim=True)
    torch.testing.assert_close(best_scales(x, 1), scale)
    # min_s ‖s·sign(x) − x‖² = ‖x‖² − n·mean|x|²
    torch.testing.assert_close(errors(x, 1), x.square().sum(1) - 144 * scale[:, 0] ** 2)


@given(bits=WIDTHS)
def test_one_value_a_row_is_exact_with_any_width(bits):
    x = torch.tensor([[0.3], [-0.7], [1e-20]])
    torch.testing.assert_close(quantize(x, best_scales(x, bits), bits), x, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_rows_stay_zero_and_do_not_disturb_others(bits):
    x = torch.cat([torch.zeros(1, 144, dtype=torch.float64), rows(3)])
    result = quantize(x, best_scales(x, bits), bits)
    assert torch.isfinite(result).all()
    assert result[0].abs().max() <= 1e-12
    torch.testing.assert_close(errors(x, bits)[1:], errors(rows(3), bits))


@pytest.mark.parametrize("bits", range(3, 9))
def test_zero_is_represented_exactly(bits):
    assert quantize(torch.zeros(3), torch.tensor(0.37), bits).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [1, 2])
def test_errors_of_few_bits_have_no_mean(bits):
    # Errors that all lie on one side add up in a convolution's sum, which Ω does not see.
    x = rows(8, 4096)
    lost = quantize(x, best_scales(x, bits), bits) - x
    assert (lost.mean(1).abs() < 4 * lost.std(1) / 4096**0.5).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_errors_follow_the_scale_of_the_weights(bits):
    torch.testing.assert_close(errors(rows() * 8, bits), errors(rows(), bits) * 64)


def test_more_bits_make_smaller_errors_on_random_weights():
    table = weight_errors(rows(), range(1, 9)).sum(0)
    assert (table.diff() < 0).all()


def test_four_more_bits_divide_the_error_by_about_300():
    # (127/7)² = 329 at one range; ranges that clip make it somewhat less.
    table = weight_errors(rows(64, 576), (4, 8)).sum(0)
    assert 150 < table[0] / table[1] < 329


def test_many_bits_leave_the_error_of_uniform_noise():
    x = rows(4, 4096)
    scale = x.abs().amax(1, keepdim=True) / 127
    expected = (4096 * scale.square() / 12)[:, 0]
    torch.testing.assert_close(
        (quantize(x, scale, 8) - x).square().sum(1), expected, rtol=0.1, atol=0
    )


@given(bits=WIDTHS, seed=st.integers(0, 20))
def test_a_scale_each_channel_is_no_worse_than_one_for_all(bits, seed):
    x = rows(8, 50, seed) * torch.linspace(0.1, 3, 8, dtype=torch.float64)[:, None]
    together = errors(x.reshape(1, -1), bits).sum()
    # The search is not exhaustive at many bits, where both errors are tiny.
    assert errors(x, bits).sum() <= together * (1.0 if bits <= 6 else 1.05)


def test_layers_are_quantized_by_output_channel():
    weight = rows(6, 18).view(6, 2, 3, 3)
    expected = [float(errors(weight.flatten(1), bits).sum()) for bits in (2, 4)]
    found = weight_errors(weight, (2, 4)).sum(0)
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_permuting_channels_changes_no_error():
    x = rows()
    flipped = weight_errors(x.flip(0), (1, 2, 8)).flip(0)
    torch.testing.assert_close(flipped, weight_errors(x, (1, 2, 8)))
