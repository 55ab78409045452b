"""Schemes: ranges by error, largest value and percentile, zero points, DoReFa, and what Ω sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hawq.finetune import ActivationQuantizer, WeightQuantizer
from hawq.quantizers import Codes, Scheme, Schemes, dorefa, nearest, quantize
from hawq.ranges import activation_errors, fitted_range, weight_errors

RANGES = ["mse", "minmax", "percentile"]


def rows(num_rows=6, num_columns=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)


def quantized(x, bits, scheme, signed=True):
    scale, zero_point = fitted_range(x, bits, scheme, signed=signed)
    if scheme.symmetric:
        return quantize(x, scale, bits, signed=signed)
    return nearest(x, scale, Codes(-zero_point, 2**bits - 1 - zero_point))


# --- ranges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_value_has_the_last_code(bits):
    x = rows().relu()
    scale, _ = fitted_range(x, bits, Scheme(range="minmax"), signed=False)
    torch.testing.assert_close(scale * (2**bits - 1), x.amax(1, keepdim=True))


def test_a_percentile_leaves_out_its_share_of_the_values():
    x = rows(3, 1000).abs()
    scale, _ = fitted_range(x, 4, Scheme(range="percentile", percentile=99), signed=False)
    clipped = (x > scale * 15 * (1 + 1e-9)).sum(1)
    assert clipped.tolist() == [10, 10, 10]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_ranges_of_least_error_err_least(bits, symmetric):
    x = rows() + (0 if symmetric else 0.8)

    def error(method):
        scheme = Scheme(range=method, symmetric=symmetric)
        return (quantized(x, bits, scheme) - x).square().sum(1)

    assert (error("mse") <= error("minmax") * (1 + 1e-9)).all()
    assert (error("mse") <= error("percentile") * (1 + 1e-9)).all()


@pytest.mark.parametrize("method", RANGES)
@given(bits=st.integers(1, 8), shift=st.floats(-5, 5), seed=st.integers(0, 20))
@settings(max_examples=40)
def test_zero_has_a_code_wherever_the_zero_point_is(method, bits, shift, seed):
    x = rows(4, 50, seed) + shift
    scheme = Scheme(range=method, symmetric=False)
    scale, zero_point = fitted_range(x, bits, scheme)
    assert torch.equal(zero_point, zero_point.round())
    assert ((zero_point >= 0) & (zero_point < 2**bits)).all()
    of = Codes(-zero_point, 2**bits - 1 - zero_point)
    assert not nearest(torch.zeros_like(x), scale, of).any()
    once = nearest(x, scale, of)
    assert torch.equal(nearest(once, scale, of), once)


def test_a_zero_point_pays_where_values_are_not_centred():
    x = rows() + 2
    lost = [(quantized(x, 3, Scheme(symmetric=s)) - x).square().sum() for s in (True, False)]
    assert lost[1] < 0.5 * lost[0]


def test_one_scale_for_all_is_the_scale_of_all_values():
    x = rows()
    scale, _ = fitted_range(x, 4, Scheme(per="tensor"))
    expected, _ = fitted_range(x.reshape(1, -1), 4, Scheme())
    assert scale.shape == (1, 1)
    assert torch.equal(scale, expected)


def test_channels_of_their_own_bits_have_ranges_of_their_own():
    x, bits = rows(4), (2, 0, 8, 2)
    scale, _ = fitted_range(x, bits, Scheme(per="tensor"))
    for row, width in enumerate(bits):
        alone, _ = fitted_range(x[row : row + 1], width, Scheme())
        torch.testing.assert_close(scale[row], alone[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(percentile=40), r"percentile must be within 50..100, got 40"),
        (lambda: Scheme(learning="dorefa", symmetric=False), "symmetric must be true"),
        (lambda: Schemes(Scheme(learning="pact")), "must be lsq, dorefa or fixed for weights"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- DoReFa -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_dorefa_has_its_own_levels(bits):
    weight = rows().float()
    values = dorefa(weight, bits)
    largest = weight.abs().mean() if bits == 1 else weight.tanh().abs().max()
    levels = torch.linspace(-1, 1, 2**bits) * largest
    torch.testing.assert_close(values.unique(), levels)


def test_dorefa_at_many_bits_is_the_weight_bent_by_tanh():
    weight = rows()
    assert (dorefa(weight, 8) - weight.tanh()).abs().max() <= weight.tanh().abs().max() / 255


def test_dorefa_s_gradient_is_that_of_its_smooth_part():
    weight = (rows(2, 9) / 3).requires_grad_()
    upstream = rows(2, 9, seed=1)
    for bits in (2, 4):
        (grad,) = torch.autograd.grad((dorefa(weight, bits) * upstream).sum(), weight)
        # Rounded to nothing and with its largest value held, it is tanh: by finite differences.
        step = 1e-6
        slope = ((weight + step).tanh() - (weight - step).tanh()) / (2 * step)
        torch.testing.assert_close(grad, (upstream * slope).detach(), rtol=1e-7, atol=1e-9)


def test_channels_may_have_dorefa_at_bits_of_their_own():
    weight = rows(4)
    values = dorefa(weight, (3, 1, 0, 3))
    torch.testing.assert_close(values[[0, 3]], dorefa(weight, 3)[[0, 3]])
    torch.testing.assert_close(values[1], dorefa(weight, 1)[1])
    assert not values[2].any()


def test_dorefa_clips_activations_at_one():
    quantizer = ActivationQuantizer(2, scheme=Scheme(learning="dorefa", per="tensor"))
    quantizer.calibrate(torch.linspace(0, 4, 50))
    torch.testing.assert_close(
        quantizer(torch.tensor([0.0, 0.3, 0.6, 0.9, 3.0])).detach(),
        torch.tensor([0.0, 1 / 3, 2 / 3, 1.0, 1.0]),
    )
    assert not quantizer.scale.requires_grad


# --- what Ω sees --------------------------------------------------------------------------------

SCHEMES = [
    Scheme(),
    Scheme(per="tensor"),
    Scheme(range="minmax"),
    Scheme(range="percentile", percentile=95),
    Scheme(symmetric=False),
    Scheme(symmetric=False, per="tensor", range="percentile"),
    Scheme(learning="dorefa"),
    Scheme(learning="fixed"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_errors_of_weights_are_those_of_the_network_that_is_trained(scheme, bits):
    weight = rows(6, 18).view(6, 2, 3, 3)
    trained = WeightQuantizer(weight, bits, scheme)(weight)
    expected = (trained - weight).square().flatten(1).sum(1)
    torch.testing.assert_close(weight_errors(weight, [bits], scheme)[:, 0], expected.detach())


@pytest.mark.parametrize("offset", [0.0, -1.0])
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("learning", ["lsq", "pact", "dorefa", "fixed"])
def test_the_errors_of_activations_are_those_of_the_network_that_is_trained(learning, per, offset):
    x = rows(4, 300).abs().float() + offset  # channels first
    quantizer = ActivationQuantizer(3, "a", 0, Scheme(learning=learning, per=per), 4)
    quantizer.calibrate(x)
    expected = (quantizer(x) - x).square().sum(1).double()
    found = activation_errors(x, [3], Scheme(learning=learning, per=per))[:, 0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.learning != "dorefa"])
def test_quantizers_survive_the_state_dict_with_their_zero_points(scheme):
    weight = rows(6, 18).float() + 0.5
    first = WeightQuantizer(weight, 3, scheme)
    second = WeightQuantizer(1 - 2 * weight, 3, scheme)
    assert not torch.equal(first(weight), second(weight))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(weight), second(weight))
    activation = ActivationQuantizer(3, "a", 0, scheme, 6)
    activation.calibrate(weight)
    twin = ActivationQuantizer(3, "a", 0, scheme, 6)
    twin.load_state_dict(activation.state_dict())
    assert torch.equal(activation(weight), twin(weight))
