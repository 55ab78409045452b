import numpy as np
import pytest
from oracles import free_space

from hawq.allocation import Allocation
from hawq.cost import (
    Cost,
    Operation,
    Pair,
    activation_bits,
    average_bits,
    bit_operations,
    bops,
    compression,
    latency,
    map_bits,
    mib,
    peak_activation_bits,
    scale_bits,
    separable,
    total,
    weight_bits,
)
from hawq.space import Group, Space

RESNET20 = free_space([268_336], (2, 4, 8))

# Two layers that read one tensor, and a third that reads what the first wrote.
JOINT = Space(
    (
        Group("w:conv1", 10, 100, (2, 4)),
        Group("w:down", 3, 30, (2, 4)),
        Group("w:conv2", 20, 50, (2, 4)),
        Group("a:conv1#0", 7, 0, (4, 8)),
        Group("a:conv2#0", 5, 0, (4, 8)),
    )
)
READS = [
    Operation("w:conv1", "a:conv1#0", 100),
    Operation("w:down", "a:conv1#0", 30),
    Operation("w:conv2", "a:conv2#0", 50),
]
CHOSEN = Allocation.of(JOINT, [2, 4, 4, 8, 4])
CHANNELS = Space(
    (
        Group("w:conv[0]", 9, 0, (2, 4, 8)),
        Group("w:conv[1]", 9, 0, (8,)),
        Group("w:fc", 30, 0, (2, 4, 8)),
    )
)


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
    # HAWQ-V2's ResNet50, Inception-V3 and RetinaNet, whose 144.8 the paper took as 145.
    for float_mib, ratio, quantized_mib, rounding in (
        (97.8, 12.24, 7.99, 5e-3),
        (91.2, 12.04, 7.57, 5e-3),
        (145, 8.10, 17.90, 5e-3),
        (144.8, 8.10, 17.90, 0.2 / 8.10),
    ):
        bits = round(float_mib * (8 << 20))
        assert mib(round(bits / ratio)) == pytest.approx(quantized_mib, abs=rounding)


def test_float_weights_are_not_compressed():
    assert compression(RESNET20, 32 * 268_336) == 1
    assert mib(32 * 268_336) == pytest.approx(1.0236, abs=1e-4)


def test_bit_operations_are_a_product_of_both_widths():
    assert bops([10, 3], [8, 4], [8, 2]) == 10 * 64 + 3 * 8


def test_bit_operations_need_both_widths_of_every_layer():
    with pytest.raises(ValueError, match="shorter"):
        bops([10, 3], [8, 4], [8])


def test_weights_and_activations_of_one_space_are_counted_apart():
    assert weight_bits(JOINT).tolist()[2:4] == [[40, 80, 160], [0, 0, 0]]
    assert activation_bits(JOINT).tolist()[2:4] == [[0, 0, 0], [14, 28, 56]]
    assert compression(JOINT, 66) == 32 * 33 / 66
    assert compression(JOINT, 12 * 4, of="activations") == 8
    assert average_bits(JOINT, 12 * 5, of="activations") == 5


def test_activation_memory_is_the_sum_of_bits_times_elements():
    assert total(activation_bits(JOINT), JOINT, CHOSEN) == 8 * 7 + 4 * 5


def test_a_scale_is_stored_for_each_channel_or_tensor_unless_it_is_pruned():
    assert scale_bits(CHANNELS, [1, 1, 30]).tolist() == [[16] * 3, [16] * 3, [480] * 3]
    assert scale_bits(CHANNELS, [1, 1, 1], bits=32).tolist() == [[32] * 3] * 3


def test_scales_need_a_count_for_each_group():
    with pytest.raises(ValueError, match=r"num_scales must be 3 counts .* got shape \(2,\)"):
        scale_bits(CHANNELS, [1, 1])


@pytest.mark.parametrize(("num_widths", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_a_channel_s_width_takes_the_binary_logarithm_of_its_menu(num_widths, bits):
    space = Space((Group("w:conv[0]", 9, 0, tuple(range(1, num_widths + 1))),))
    assert map_bits(space).tolist() == [[bits] * num_widths]


def test_only_free_channels_have_a_map_and_few_widths_shrink_it():
    assert map_bits(CHANNELS)[:, 0].tolist() == [2, 0, 0]
    assert map_bits(CHANNELS, max_widths=2)[:, 0].tolist() == [1, 0, 0]


def test_the_honest_size_is_the_papers_with_scales_and_maps():
    size = separable(
        "file_bits", weight_bits(CHANNELS) + scale_bits(CHANNELS, [1, 1, 1]) + map_bits(CHANNELS)
    )
    allocation = Allocation.of(CHANNELS, [4, 8, 2])
    assert size.of(CHANNELS, allocation) == (36 + 72 + 60) + 3 * 16 + 2


def test_bit_operations_of_an_allocation_multiply_each_layer_by_what_it_reads():
    cost = bit_operations(JOINT, READS)
    assert cost.of(JOINT, CHOSEN) == bops([100, 30, 50], [2, 4, 4], [8, 8, 4])


def test_an_activation_that_is_not_searched_has_its_bits_in_the_place_of_a_name():
    cost = bit_operations(JOINT, [Operation("w:conv1", 8, 100), READS[2]])
    assert cost.of(JOINT, CHOSEN) == 100 * 2 * 8 + 50 * 4 * 4
    assert len(cost.pairs) == 1


def test_the_peak_is_the_largest_step_of_the_schedule():
    cost = peak_activation_bits(JOINT, [["a:conv1#0"], ["a:conv1#0", "a:conv2#0"], ["a:conv2#0"]])
    assert cost.of(JOINT, CHOSEN) == 8 * 7 + 4 * 5
    apart = peak_activation_bits(JOINT, [["a:conv1#0"], ["a:conv2#0"]])
    assert apart.of(JOINT, CHOSEN) == 8 * 7


def test_a_schedule_names_activations():
    with pytest.raises(ValueError, match="must name a group a:… of the space, got 'w:conv1'"):
        peak_activation_bits(JOINT, [["w:conv1"]])


TIMES = {
    "conv1": {(2, 4): 10, (2, 8): 11, (4, 4): 12, (4, 8): 15},
    "down": {2: 3, 4: 4},
    "conv2": {(2, 4): 20, (2, 8): 21, (4, 4): 22, (4, 8): 25},
}


def test_latency_is_looked_up_by_both_widths_or_by_the_weight_s():
    assert latency(JOINT, READS, TIMES).of(JOINT, CHOSEN) == 11 + 4 + 22


def test_latency_of_a_fixed_activation_needs_no_pair():
    cost = latency(JOINT, [Operation("w:conv1", 8, 0)], TIMES)
    assert cost.of(JOINT, CHOSEN) == 11
    assert not cost.pairs


def test_latency_of_tied_bits_needs_equal_bits_only():
    space = Space((Group("w:a", 1, 0, (4, 8), "t"), Group("a:a#0", 1, 0, (4, 8), "t")))
    cost = latency(space, [Operation("w:a", "a:a#0", 1)], {"a": {(4, 4): 5, (8, 8): 9}})
    assert [cost.of(space, Allocation.of(space, [b, b])) for b in (4, 8)] == [5, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": {}}, "must hold layer down at 2 bits, got none"),
        ({"conv2": {(2, 4): 1, (2, 8): 1, (4, 4): 1}}, r"layer conv2 at \(4, 8\) bits, got none"),
        ({"down": {2: 0.5, 4: 1}}, "latency of down at 2 bits must be whole ns, got 0.5"),
        ({"down": {2: -1, 4: 1}}, "must be whole ns, got -1"),
    ],
)
def test_a_latency_table_that_lacks_something_is_told_which_layer(change, message):
    with pytest.raises(ValueError, match=message):
        latency(JOINT, READS, TIMES | change)


def test_a_layer_that_reads_several_tensors_is_timed_by_its_weight_alone():
    reads = [READS[0], Operation("w:conv1", "a:conv2#0", 1)]
    with pytest.raises(ValueError, match="latency of conv1 must be by weight bits"):
        latency(JOINT, reads, TIMES)
    assert latency(JOINT, reads, {"conv1": {2: 5, 4: 6}}).of(JOINT, CHOSEN) == 5


@pytest.mark.parametrize(
    ("steps", "pairs", "message"),
    [
        (np.zeros((2, 2), int), (), r"steps must be S × L × B, got \(2, 2\)"),
        (np.zeros((0, 2, 2), int), (), "steps must be S × L × B"),
        (np.zeros((1, 2, 2)), (), "costs must be integers, got float64"),
        (np.full((1, 2, 2), -1), (), "must not be negative"),
        (np.zeros((1, 2, 2), int), (Pair(0, 2, np.zeros((2, 2), int)),), r"got \(0, 2\)"),
        (np.zeros((1, 2, 2), int), (Pair(0, 1, np.zeros((2, 3), int)),), r"with \(2, 3\)"),
        (np.zeros((1, 2, 2), int), (Pair(0, 1, np.full((2, 2), -1)),), "must not be negative"),
    ],
)
def test_costs_that_make_no_sense_are_refused(steps, pairs, message):
    with pytest.raises(ValueError, match=message):
        Cost("x_bits", steps, pairs)
