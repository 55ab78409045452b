"""How far Ω can be trusted: measured losses against a quadratic, a tiny run, and the report."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from oracles import TinyTask, free_space
from torch import nn

from hawq.finetune import Recipe, calibrate
from hawq.finetune.untrained import untrained_losses
from hawq.quantizers import quantize
from hawq.ranges import best_scales
from hawq.sensitivity import omega
from hawq.space import Group, Space
from search.artefacts import CalibrationArtefact
from search.calibration.agreement import agreement, mean_and_error
from search.calibration.interactions import interactions
from search.calibration.single_choices import spread
from search.config_file import load_config
from search.pipeline import run, trained
from search.quantities import with_error
from search.report.calibration_figure import increases, matrix
from search.report.calibration_findings import trust
from search.stages import calibration
from search.trials import TrialSpec, quantized_model

N, IN, OUT = 96, 5, 3


@dataclass(frozen=True)
class LeastSquares:
    """A linear layer at the minimum of ½‖Wx − y‖²: the second-order model is exact there."""

    is_white: bool = False

    @property
    def data(self):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(N, IN, generator=generator, dtype=torch.float64)
        if self.is_white:
            x = torch.linalg.qr(x)[0] * N**0.5  # E[xxᵀ] = I
        y = x @ torch.randn(IN, OUT, generator=generator, dtype=torch.float64)
        y += torch.randn(N, OUT, generator=generator, dtype=torch.float64)
        return x, y

    def model(self):
        x, y = self.data
        layer = nn.Sequential(nn.Linear(IN, OUT, bias=False).double())
        with torch.no_grad():
            layer[0].weight.copy_(torch.linalg.lstsq(x, y).solution.T)
        return layer

    def size(self, split):
        return N

    def batch(self, split, indices):
        x, y = self.data
        return x[indices], y[indices]

    def inputs(self, batch):
        return batch[0]

    def losses(self, model, batch):
        return (model(batch[0]) - batch[1]).square().sum(1) / 2


def measure(task, allocations, indices=None):
    """The losses of every example under some allocations, and the network that was used."""
    indices = torch.arange(task.size("train")) if indices is None else indices
    model = task.model()
    return untrained_losses(model, task, allocations, indices, lambda: inputs_of(task)), model


def inputs_of(task):
    yield task.inputs(task.batch("train", torch.arange(task.size("train"))))


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_at_a_minimum_the_increase_is_the_quadratic_form(bits):
    task = LeastSquares()
    (plain, losses), model = measure(task, [{}, {"w:0": bits}])
    weight, (x, _) = model[0].weight.detach(), task.data
    change = quantize(weight, best_scales(weight, bits), bits) - weight
    expected = (change @ (x.T @ x / N) * change).sum() / 2
    assert float((losses - plain).mean()) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_where_the_hessian_is_a_multiple_of_the_identity_the_increase_is_half_of_omega(bits):
    task = LeastSquares(is_white=True)
    (plain, losses), model = measure(task, [{}, {"w:0": bits}])
    weight = model[0].weight.detach()
    squared = (quantize(weight, best_scales(weight, bits), bits) - weight).square().sum()
    space = Space((Group("w:0", IN * OUT, IN * OUT, (bits,)),))
    table = omega(space, np.array([float(IN * OUT)]), np.array([[float(squared)]]))
    assert float((losses - plain).mean()) == pytest.approx(table[0, 0] / 2, rel=1e-9)


@pytest.mark.parametrize("bits", [2, 4])
def test_activations_get_the_ranges_of_the_inputs_that_were_given(bits):
    task = LeastSquares()
    (losses,), model = measure(task, [{"a:0#0": bits}])
    x, y = task.data
    scale = best_scales(x.float().reshape(1, -1), bits)  # so few values are all sampled
    expected = (quantize(x, scale.double(), bits) @ model[0].weight.T - y).square().sum(1) / 2
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)


MIXED = [
    {},
    {"w:conv1": 2},
    {"a:conv2#0": 3},
    {"w:conv2": 3, "a:linear#0": 2},
    {"a:conv1#0": 4, "a:linear#0": 2},
    {"w:conv1[0]": 0, "w:conv1[1]": 3, "w:conv1[2]": 8, "a:linear#0": 4},
    {"w:conv1": 4, "w:conv2": 3, "w:linear": 2, "a:conv1#0": 8, "a:conv2#0": 4, "a:linear#0": 3},
]


def test_a_row_depends_on_its_own_allocation_alone_and_the_network_stays():
    task = TinyTask()
    together, model = measure(task, MIXED)
    for allocation, row in zip(MIXED, together, strict=True):
        assert torch.equal(measure(task, [allocation])[0][0], row)
    assert len({tuple(row.tolist()) for row in together}) == len(MIXED)
    for name, value in task.model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("bits", MIXED[1:])
def test_a_network_is_quantized_as_a_trial_begins(bits, tmp_path):
    task = TinyTask()
    recipe = Recipe(epochs=1, batch_size=4, lr=0.1)
    spec = TrialSpec(digest="", bits=bits, recipe=recipe, seed=0, folder=tmp_path)
    model = quantized_model(task, task.model().state_dict(), spec)
    calibrate(model, inputs_of(task))
    with torch.no_grad():
        expected = task.losses(model.eval(), task.batch("train", torch.arange(12)))
    assert torch.equal(measure(task, [bits])[0][0], expected.double())


@given(st.lists(st.sets(st.integers(1, 8), min_size=1), min_size=1, max_size=9), st.integers(1, 80))
def test_a_spread_is_even_over_the_groups(menus, most):
    groups = [Group(f"w:l{i}", 1, 1, tuple(sorted(menu))) for i, menu in enumerate(menus)]
    space = Space(tuple(groups))
    found = spread(space, most)
    every = [(group.name, bits) for group in groups for bits in group.menu]
    assert len(found) == len(set(found)) == min(most, len(every))
    assert found == sorted(found, key=every.index)
    if most >= len(every):
        assert found == every
    times = Counter(name for name, _ in found)
    # Whoever has fewer than another one has no more to give, or one round less.
    for group in groups:
        fullest = max(times.values())
        assert times[group.name] >= min(len(group.menu), fullest - 1)


def test_a_spread_is_even_over_the_widths_and_always_the_same():
    space = free_space([1] * 20, range(1, 9))
    found = spread(space, 120)
    assert set(Counter(name for name, _ in found).values()) == {6}
    assert max(Counter(bits for _, bits in found).values()) <= 16
    assert min(Counter(bits for _, bits in found).values()) >= 14
    assert spread(free_space([1] * 20, range(1, 9)), 120) == found
    few = [int(name.removeprefix("w:l")) for name, _ in spread(space, 5)]
    assert few == [0, 4, 8, 12, 16]


def test_a_spread_leaves_out_what_a_tie_forbids():
    space = Space((Group("w:a", 1, 1, (2, 4), "t"), Group("w:b", 1, 1, (4, 8), "t")))
    assert spread(space, 9) == [("w:a", 4), ("w:b", 4)]
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        spread(space, 0)


def test_agreement_is_one_for_equal_orders_and_minus_one_for_opposite_ones():
    predicted = np.array([1.0, 2.0, 3.0, 4.0])
    gained = np.outer(predicted**3, np.ones(10))
    same, opposite = agreement(predicted, gained, 0), agreement(-predicted, gained, 0)
    assert (same.correlation, same.correlation_error) == (pytest.approx(1), pytest.approx(0))
    assert opposite.correlation == pytest.approx(-1)
    assert same.ratio == pytest.approx((4 + 9) / 2)
    assert opposite.ratio is None


def test_errors_of_agreement_are_those_over_the_images():
    generator = np.random.default_rng(2)
    gained = 3 + generator.standard_normal((1, 400))
    found = agreement(np.array([2.0]), gained, 0)
    mean, error = mean_and_error(gained[0])
    assert found.ratio == pytest.approx(mean / 2)
    assert found.ratio_error == pytest.approx(error / 2, rel=0.2)
    assert (found.correlation, found.correlation_error) == (None, None)
    assert agreement(np.zeros(0), np.zeros((0, 5)), 0).num_choices == 0


def test_interactions_are_what_pairs_add_to_their_sums():
    generator = np.random.default_rng(3)
    chosen = {"w:a": 2, "w:b": 3, "w:c": 4}
    own = {c: 1 + i + 0.1 * generator.standard_normal(50) for i, c in enumerate(chosen.items())}
    own["w:c", 4] = generator.standard_normal(50) - 9  # so far below zero that no sum is above
    extra = {("w:a", "w:b"): 0.75, ("w:a", "w:c"): -0.5, ("w:b", "w:c"): 0.0}
    gained = {frozenset([c]): values for c, values in own.items()}
    for (a, x), (b, y) in combinations(own.items(), 2):
        gained[frozenset([a, b])] = x + y + extra[a[0], b[0]]
    found = interactions(chosen, gained)
    expected = [[0, 0.75, -0.5], [0.75, 0, 0], [-0.5, 0, 0]]
    np.testing.assert_allclose(found.interaction, expected, atol=1e-12)
    np.testing.assert_allclose(found.interaction_error, np.zeros((3, 3)), atol=1e-12)
    both = float((own["w:a", 2] + own["w:b", 3]).mean())
    assert found.relative[0][1] == found.relative[1][0] == pytest.approx(0.75 / both)
    assert [row.count(None) for row in found.relative] == [2, 2, 3]
    assert (found.groups, found.bits) == (list(chosen), [2, 3, 4])
    assert interactions({}, gained) is None
    assert interactions({"w:a": 2}, gained) is None
    del gained[frozenset([("w:a", 2), ("w:b", 3)])]
    assert interactions(chosen, gained) is None


def test_a_number_is_written_as_far_as_its_error_goes():
    assert with_error(6.1425, 0.8443).replace("\u00a0", " ") == "6.14 ± 0.84"
    assert with_error(-1234.5, 151.0).replace("\u00a0", " ") == "−1,230 ± 150"
    assert with_error(0.5, 0.0).replace("\u00a0", " ") == "0.500 ± 0"


TINY = {
    "task": {
        "data": "digits",
        "network": "resnet8",
        "search_size": 100,
        "pretrain": {"epochs": 2, "batch_size": 64, "lr": 0.05},
    },
    "curvature": {"examples": 64, "batch_size": 8},
    "weights": {"bits": [2, 4, 8], "pin": {"conv1": 8}},
    "activations": {"menu": [3, 8]},
    "calibration": {"examples": 96, "choices": 20, "draws": 8, "interactions": 16},
    "budgets": [{"average_bits": 3, "activation_average_bits": 5}],
    "methods": ["uniform", "exact", "channel"],
    "finetune": {"epochs": 1, "batch_size": 64, "lr": 0.02},
    "ray": {"dashboard": False},
}


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    """One search, run to its end."""
    folder = tmp_path_factory.mktemp("calibration")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return folder, run(load_config(path), folder / "run", name="tiny")


@pytest.mark.ray
def test_a_run_says_how_far_omega_can_be_trusted(finished):
    folder, summary = finished
    found = summary.calibration
    sensitivity = {
        (group["name"], bits): omega_
        for group, row in zip(summary.tables.space, summary.tables.sensitivity, strict=True)
        for bits, omega_ in zip(summary.tables.widths, row, strict=True)
    }
    assert found.num_examples == 96
    assert sum(choice.is_spread for choice in found.choices) == 20
    assert found.all_choices.num_choices == 20
    clear = [c for c in found.choices if c.is_spread and c.increase > 2 * c.standard_error]
    assert found.clear_choices.num_choices == len(clear)
    for choice in found.choices:
        assert choice.predicted == sensitivity[choice.group, choice.bits] / 2
    chosen = {c.digest: c for c in summary.candidates.candidates}
    assert [c.digest for c in found.candidates] == list(chosen)
    single = {(c.group, c.bits): c.increase for c in found.choices}
    for candidate in found.candidates:
        of = chosen[candidate.digest]
        assert candidate.predicted == of.sensitivity / 2
        if of.granularity == "channel":
            assert candidate.sum_of_singles is None
        else:
            together = sum(single[choice] for choice in of.bits.items())
            assert candidate.sum_of_singles == pytest.approx(together)
    exact = next(c for c in summary.candidates.candidates if c.method == "exact")
    assert dict(zip(found.interactions.groups, found.interactions.bits, strict=True)) == exact.bits
    (stable,) = found.stability
    assert (stable.method, stable.digest) == ("exact", exact.digest)
    assert stable.regret >= 0
    page = (folder / "run" / "report.html").read_text()
    assert "How far Ω can be trusted" in page
    assert trust(summary).agreement in page


@pytest.mark.ray
@pytest.mark.parametrize("chunk", [3, 1000])
def test_any_chunks_give_the_same_bits(finished, monkeypatch, chunk):
    folder, summary = finished
    monkeypatch.setattr(calibration, "_CHUNK", chunk)
    with trained(load_config(folder / "tiny.yaml"), folder / "run") as search:
        assert calibration.make(search) == summary.calibration


@pytest.mark.ray
def test_pairs_of_many_groups_are_not_measured(finished):
    folder, summary = finished
    config = load_config(folder / "tiny.yaml", ["calibration.interactions=15"])
    with trained(config, folder / "run") as search:
        found = calibration.make(search)
    assert found.interactions is None
    assert found.choices == summary.calibration.choices


@pytest.mark.ray
def test_the_section_counts_in_words_what_a_logarithm_cannot_show(finished):
    _, summary = finished
    choices = summary.calibration.choices
    lowered = [c.model_copy(update={"increase": -0.1}) for c in choices[:3]]
    lowered += [choices[3].model_copy(update={"increase": 0.1, "predicted": 0.0})]
    kept = [c.model_copy(update={"increase": 0.1, "predicted": 0.2}) for c in choices[4:]]
    found = CalibrationArtefact.model_validate(
        summary.calibration.model_dump()
        | {"choices": [c.model_dump() for c in [*lowered, *kept]], "num_overflows": 2}
    )
    told = trust(summary.model_copy(update={"calibration": found}))
    assert told.undrawn == (
        "3 single choices with a measured increase of zero or less, 1 single choice with Ω = 0, "
        "2 of a loss that is not finite"
    )
    drawn = [t for t in increases(found, summary).data if t.name in {"weights", "activations"}]
    assert sum(len(t.x) for t in drawn) == len(kept)
    assert trust(summary.model_copy(update={"calibration": None})) is None


@pytest.mark.ray
def test_the_matrix_is_blank_where_there_is_nothing_to_compare(finished):
    _, summary = finished
    pairs = summary.calibration.interactions
    (heat,) = matrix(pairs).data
    assert [[v is None for v in row] for row in heat.z] == [
        [v is None for v in row] for row in pairs.relative
    ]
