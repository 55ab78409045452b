import numpy as np
import pytest
from oracles import free_space

from hawq.allocation import Allocation
from hawq.cost import average_bits, bops, compression, mib, total, weight_bits

RESNET20 = free_space([268_336], (2, 4, 8))


def test_the_table_is_elements_times_width():
    space = free_space([3, 5], (2, 4, 8))
    np.testing.assert_array_equal(weight_bits(space), [[6, 12, 24], [10, 20, 40]])
    assert weight_bits(space).dtype == np.int64


def test_the_total_follows_the_allocation():
    space = free_space([3, 5], (2, 4, 8))
    assert total(weight_bits(space), space, Allocation.of(space, [8, 2])) == 24 + 10


def test_large_networks_do_not_overflow():
    space = free_space([10**12] * 3, (8,))
    assert total(weight_bits(space), space, Allocation.of(space, [8] * 3)) == 24 * 10**12


def test_resnet20_at_13_times_compression_has_2_point_4_bits():
    bits = round(32 * 268_336 / 13.11)
    assert compression(RESNET20, bits) == pytest.approx(13.11, abs=1e-4)
    assert average_bits(RESNET20, bits) == pytest.approx(2.441, abs=5e-4)


def test_the_papers_megabytes_are_mebibytes_of_the_float_weights():
    # HAWQ-V2's ResNet50: 97.8 at 12.24× is 7.99; Inception-V3: 91.2 at 12.04× is 7.57.
    for float_mib, ratio, quantized_mib in ((97.8, 12.24, 7.99), (91.2, 12.04, 7.57)):
        bits = round(float_mib * (8 << 20))
        assert mib(round(bits / ratio)) == pytest.approx(quantized_mib, abs=5e-3)


def test_float_weights_are_not_compressed():
    assert compression(RESNET20, 32 * 268_336) == 1
    assert mib(32 * 268_336) == pytest.approx(1.0236, abs=1e-4)


def test_bit_operations_are_a_product_of_both_widths():
    assert bops([10, 3], [8, 4], [8, 2]) == 10 * 64 + 3 * 8


def test_bit_operations_need_both_widths_of_every_layer():
    with pytest.raises(ValueError, match="shorter"):
        bops([10, 3], [8, 4], [8])
