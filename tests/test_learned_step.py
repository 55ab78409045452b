"""Fake quantization's one node: against the formulas, torch's own kernels, and itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hawq.finetune.learned_step import fake_quantize
from hawq.quantizers import Codes


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def gradients(x, scale, of, upstream, learning="lsq"):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = fake_quantize(x, scale, of, learning)
    (y * upstream).sum().backward()
    return y.detach(), x.grad, scale.grad


@pytest.mark.parametrize("low", [0, -8])
def test_inside_its_range_it_is_torch_s_learnable_kernel(low):
    # Beyond the last code torch's mask ends half a step later than LSQ's: no value is there.
    high, scale = low + 15, torch.tensor(0.1)
    k = draw(40, 50, seed=1, dtype=torch.float32) * 9 + low + 7
    k = torch.where((k > high - 0.4) & (k < high + 0.6), high + 3.0, k)
    k = torch.where((k < low + 0.4) & (k > low - 0.6), low - 3.0, k)
    x, upstream = k * scale, draw(40, 50, seed=2, dtype=torch.float32)
    y, to_x, to_scale = gradients(x, scale, Codes(low, high), upstream)
    theirs, their_scale = x.clone().requires_grad_(), scale.clone().view(1).requires_grad_()
    z = torch._fake_quantize_learnable_per_tensor_affine(
        theirs, their_scale, torch.zeros(1), low, high, 1 / (2000 * high) ** 0.5
    )
    (z * upstream).sum().backward()
    torch.testing.assert_close(y, z.detach())
    torch.testing.assert_close(to_x, theirs.grad)
    torch.testing.assert_close(to_scale, their_scale.grad[0], rtol=1e-4, atol=1e-5)


def test_with_a_scale_a_channel_it_is_torch_s_kernel_too():
    scale = torch.tensor([0.05, 0.1, 0.4])
    k = draw(3, 500, seed=1, dtype=torch.float32) * 9
    k = torch.where((k.abs() > 6.6) & (k.abs() < 8.6), 12.0 * k.sign(), k)
    x, upstream = k * scale[:, None], draw(3, 500, seed=2, dtype=torch.float32)
    y, to_x, to_scale = gradients(x, scale[:, None], Codes(-8, 7), upstream)
    theirs, their_scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    z = torch._fake_quantize_learnable_per_channel_affine(
        theirs, their_scale, torch.zeros(3), 0, -8, 7, 1 / (500 * 7) ** 0.5
    )
    (z * upstream).sum().backward()
    torch.testing.assert_close(y, z.detach())
    torch.testing.assert_close(to_x, theirs.grad)
    torch.testing.assert_close(to_scale[:, 0], their_scale.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learning", ["lsq", "pact"])
def test_channels_may_lie_last_as_many_as_there_are_places(learning):
    x, upstream = draw(3, 4, 4, seed=1), draw(3, 4, 4, seed=2)
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    last = gradients(x, scale.view(1, 1, 4), Codes(-4, 3), upstream, learning)
    moved = x.mT.contiguous(), scale.view(1, 4, 1), Codes(-4, 3), upstream.mT.contiguous()
    second = gradients(*moved, learning)
    torch.testing.assert_close(last[1], second[1].mT)
    torch.testing.assert_close(last[2].flatten(), second[2].flatten())


@given(
    bits=st.lists(st.integers(0, 8), min_size=5, max_size=5),
    signed=st.booleans(),
    learning=st.sampled_from(["lsq", "pact"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_channels_of_different_bits_are_as_if_each_were_alone(bits, signed, learning, seed):
    x, upstream = draw(2, 5, 3, 4, seed=seed), draw(2, 5, 3, 4, seed=seed + 1)
    x = x if signed else x.abs()
    scale = draw(5, seed=seed + 2).abs() * 0.2 + 0.05
    together = gradients(
        x, scale.view(1, 5, 1, 1), Codes.of(tuple(bits), signed=signed), upstream, learning
    )
    for channel, width in enumerate(bits):
        part = (slice(None), slice(channel, channel + 1))
        y, to_x, to_scale = gradients(
            x[part], scale[channel], Codes.of(width, signed=signed), upstream[part], learning
        )
        torch.testing.assert_close(together[0][part], y)
        if width:
            torch.testing.assert_close(together[1][part], to_x)
            torch.testing.assert_close(together[2].flatten()[channel], to_scale)
        else:  # a pruned channel passes nothing on
            assert not y.any()
            assert not together[1][part].any()
            assert together[2].flatten()[channel] == 0


def test_a_zero_point_only_moves_the_codes():
    x, upstream = draw(60), draw(60, seed=1)
    scale, zero_point = torch.tensor(0.3, dtype=torch.float64), 5
    y, to_x, to_scale = gradients(x, scale, Codes(-5, 10), upstream)
    k = torch.round(x / scale + zero_point).clamp(0, 15)
    torch.testing.assert_close(y, (k - zero_point) * scale)
    inside = (x / scale > -5) & (x / scale < 10)
    torch.testing.assert_close(to_x, upstream * inside)
    slope = torch.where(inside, (y - x) / scale, y / scale)
    torch.testing.assert_close(to_scale, (slope * upstream).sum() / (60 * 10) ** 0.5)


def test_a_step_of_pact_is_a_step_of_its_largest_value():
    x, upstream = draw(200).abs(), draw(200, seed=1)
    scale = torch.tensor(0.1, dtype=torch.float64)  # clips at 1.5
    _, to_x, to_scale = gradients(x, scale, Codes(0, 15), upstream, "pact")
    clipped = x > 1.5
    assert 0 < clipped.sum() < 200
    assert torch.equal(to_x, upstream * ~clipped)
    # α moves 15 times as far as the scale, and by its own gradient.
    torch.testing.assert_close(15 * to_scale, upstream[clipped].sum())
    # Where every value is clipped the output is α itself: finite differences.
    step, high = 1e-4, x[clipped] + 1

    def outputs(alpha):
        return (
            fake_quantize(high, torch.tensor(alpha / 15), Codes(0, 15)) * upstream[clipped]
        ).sum()

    slope = (outputs(1.5 + step) - outputs(1.5 - step)) / (2 * step)
    torch.testing.assert_close(slope, upstream[clipped].sum(), rtol=1e-3, atol=1e-6)


def test_a_fixed_scale_has_no_gradient():
    x, upstream = draw(50), draw(50, seed=1)
    scale = torch.tensor(0.2, dtype=torch.float64)
    _, to_x, to_scale = gradients(x, scale, Codes(-8, 7), upstream, "fixed")
    assert to_scale is None
    torch.testing.assert_close(to_x, gradients(x, scale, Codes(-8, 7), upstream)[1])


def test_a_relu_s_zeros_keep_their_gradient():
    x = torch.zeros(4)
    assert torch.equal(
        gradients(x, torch.tensor(0.1), Codes(0, 15), torch.ones(4))[1], torch.ones(4)
    )


@pytest.mark.parametrize("of", [Codes(0, 15), Codes.of((2, 4, 4, 8), signed=False)])
def test_the_layout_of_memory_changes_nothing(of):
    x, upstream = draw(2, 4, 5, 5).abs(), draw(2, 4, 5, 5, seed=1)
    shape = () if isinstance(of.high, int) else (1, 4, 1, 1)
    scale = torch.full(shape, 0.1, dtype=torch.float64)
    plain = gradients(x, scale, of, upstream)
    last = torch.channels_last
    for strided in (upstream, upstream.to(memory_format=last)):
        found = gradients(x.to(memory_format=last), scale, of, strided)
        for a, b in zip(plain, found, strict=True):
            torch.testing.assert_close(a, b)


def test_bfloat16_keeps_the_gradient_of_the_scale_to_its_own_precision():
    x, upstream = draw(64, 1000).abs().float(), draw(64, 1000, seed=1).abs().float()
    scale = torch.tensor(0.05)
    exact = gradients(x.bfloat16().float(), scale, Codes(0, 15), upstream.bfloat16().float())
    y, to_x, to_scale = gradients(x.bfloat16(), scale, Codes(0, 15), upstream.bfloat16())
    assert y.dtype == to_x.dtype == torch.bfloat16
    assert to_scale.dtype == torch.float32
    assert abs(to_scale - exact[2]) < 0.02 * abs(exact[2])
