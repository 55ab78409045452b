"""The loss around the weights: closed forms, what is put back, and the figure of it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from oracles import LAYERS, TinyTask
from torch import Tensor, nn

from hawq.curvature.power_iteration import top_eigenvalues
from hawq.curvature.surface import loss_surface
from search.report.surface_figure import Surface, surfaces

TINY = TinyTask(dtype=torch.float64)
BLOCK = ("conv1", "conv2")


def unit_directions(model: nn.Module, layers: Sequence[str] = BLOCK) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    directions = []
    for _ in range(2):
        shapes = [model.get_submodule(name).weight.shape for name in layers]
        parts = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        length = torch.cat([part.flatten() for part in parts]).norm()
        directions.append([part / length for part in parts])
    return tuple(directions)


def surface(task=TINY, model=None, directions=None, layers=BLOCK, **changes) -> np.ndarray:
    model = model or task.model()
    settings = {"examples": range(12), "batch_size": 5, "radius": 0.5, "num": 5}
    directions = directions or unit_directions(model, layers)
    return loss_surface(task, model, layers, directions, split="train", **settings | changes)


def mean_loss(task: TinyTask, model: nn.Module) -> float:
    with torch.no_grad():
        return float(task.losses(model.eval(), task.batch("train", torch.arange(12))).mean())


# --- values -------------------------------------------------------------------------------------


def test_the_middle_is_the_loss_of_the_weights_themselves():
    for num in (3, 7):
        losses = surface(num=num, radius=0.3)
        assert losses.shape == (num, num)
        middle = losses[num // 2, num // 2]
        assert middle == pytest.approx(mean_loss(TINY, TINY.model()), rel=1e-12)


def test_every_point_is_the_loss_of_the_weights_moved_there():
    model = TINY.model()
    u, v = unit_directions(model)
    losses = surface(directions=(u, v))
    for i, j, a, b in ((0, 0, -0.5, -0.5), (0, 3, -0.5, 0.25), (4, 1, 0.5, -0.25)):
        moved = TINY.model()
        with torch.no_grad():
            for name, du, dv in zip(BLOCK, u, v, strict=True):
                moved.get_submodule(name).weight += a * du + b * dv
        assert losses[i, j] == pytest.approx(mean_loss(TINY, moved), rel=1e-12)


def test_a_quadratic_has_its_closed_form():
    class Quadratic(TinyTask):
        def losses(self, model, batch):
            w = model.linear.weight[0, :3]
            return (2 * w[0] ** 2 + w[0] * w[1] - w[1] ** 2 + 3 * w[2]).expand(len(batch[0]))

    task = Quadratic(dtype=torch.float64)
    model = task.model()
    nn.init.zeros_(model.linear.weight)
    u, v = (torch.zeros(4, 12, dtype=torch.float64) for _ in range(2))
    u[0, 0], v[0, 1] = 1, 1
    losses = surface(task, model, ([u], [v]), ("linear",), radius=2.0, num=9)
    a, b = np.meshgrid(np.linspace(-2, 2, 9), np.linspace(-2, 2, 9), indexing="ij")
    np.testing.assert_allclose(losses, 2 * a**2 + a * b - b**2, atol=1e-12)


def test_its_second_differences_are_the_eigenvalues():
    task, h = TinyTask("silu", dtype=torch.float64), 1e-3
    model = task.model()
    settings = {"split": "train", "examples": range(12), "batch_size": 5}
    found = top_eigenvalues(task, model, LAYERS, num=2, rtol=1e-5, **settings)
    losses = loss_surface(task, model, LAYERS, found.vectors, radius=h, num=3, **settings)
    curvature = [
        (losses[2, 1] - 2 * losses[1, 1] + losses[0, 1]) / h**2,
        (losses[1, 2] - 2 * losses[1, 1] + losses[1, 0]) / h**2,
        (losses[2, 2] - losses[2, 0] - losses[0, 2] + losses[0, 0]) / (4 * h**2),
    ]
    np.testing.assert_allclose(curvature, [*found.values, 0], rtol=1e-4, atol=1e-3)


def test_a_direction_may_be_the_weights_themselves():
    model, shrunk = TINY.model(), TINY.model()
    still = [torch.zeros_like(model.conv1.weight)]
    losses = surface(TINY, model, ([model.conv1.weight], still), ("conv1",))
    with torch.no_grad():
        shrunk.conv1.weight *= 0.75
    assert losses[1, 2] == pytest.approx(mean_loss(TINY, shrunk), rel=1e-12)


def test_an_example_of_weight_two_counts_twice():
    weighted = surface(examples=range(4), example_weights=(2.0, 0.0, 1.0, 1.0), batch_size=3)
    np.testing.assert_allclose(weighted, surface(examples=(0, 0, 2, 3)), rtol=1e-12)


def test_a_loss_that_overflows_leaves_the_other_points_alone():
    losses = surface(TinyTask(), radius=1e30, num=3)
    assert np.isfinite(losses[1, 1])
    assert not np.isfinite(losses[0, 0])


# --- what must be as before ---------------------------------------------------------------------


class Failing(TinyTask):
    """Gives up in the middle of the grid."""

    def losses(self, model, batch):
        if model.conv1.weight.flatten()[0] > 0.1:
            raise MemoryError("no room")
        return super().losses(model, batch)


@pytest.mark.parametrize("fails", [False, True])
def test_weights_modes_and_flags_are_left_as_they_were(fails):
    task = (Failing if fails else TinyTask)()
    model = task.model().train()
    model.conv2.weight.requires_grad_(False)
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = 0.05
    before = {name: value.clone() for name, value in model.state_dict().items()}
    directions = ([torch.full_like(model.conv1.weight, 0.7)], [model.conv1.weight])
    if fails:
        with pytest.raises(MemoryError):
            surface(task, model, directions, ("conv1",))
    else:
        surface(task, model, directions, ("conv1",))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv2.weight"]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 4}, "num must be odd and at least 3, got 4"),
        ({"num": 1}, "num must be odd"),
        ({"radius": 0.0}, "radius must be positive, got 0.0"),
        ({"examples": []}, "examples must be at least one, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"example_weights": [1.0]}, "example_weights must be one an example or none, got 1"),
        ({"layers": ("linear",)}, r"weights' shapes \[\(4, 12\)\], got \[\(3, 2, 3, 3\), "),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        surface(directions=unit_directions(TINY.model()), **change)


# --- the figure ---------------------------------------------------------------------------------

OFFSETS = [-1.0, 0.0, 1.0]
SHARP = Surface("layer1.0", (40.0, 8.0), OFFSETS, [[9, 4, 7], [3, 0.1, 2], [8, 5, 6]])
FLAT = Surface("linear", (0.2, -0.1), OFFSETS, [[0.3] * 3, [0.2, 0.1, 0.2], [0.3] * 3])


def contour(figure):
    return next(trace for trace in figure.data if trace.type == "contour")


def test_all_blocks_have_one_scale_of_colors():
    figures = surfaces([SHARP, FLAT])
    assert list(figures) == ["layer1.0", "linear"]
    for figure in figures.values():
        drawn = contour(figure)
        assert (drawn.zmin, drawn.zmax) == pytest.approx((math.log10(0.1), math.log10(9)))
        assert list(drawn.colorbar.ticktext) == ["0.1", "0.2", "0.5", "1", "2", "5"]


def test_the_first_eigenvector_runs_along_the_horizontal_axis():
    figure = surfaces([SHARP])["layer1.0"]
    assert figure.layout.xaxis.title.text == "Along eigenvector 1, λ = 40.0"
    assert figure.layout.yaxis.title.text == "Along eigenvector 2, λ = 8.00"
    # Plotly's z is by y, then x: the loss at a = 1 along the first, b = −1 along the second is 8.
    drawn = contour(figure)
    assert drawn.text[0][2] == "8.00"
    assert drawn.z[0][2] == pytest.approx(math.log10(8))


def test_colors_are_linear_where_a_loss_is_not_positive():
    drawn = contour(surfaces([Surface("b", (1.0, 1.0), OFFSETS, [[0.0, 1.0, 2.0]] * 3)])["b"])
    assert (drawn.zmin, drawn.zmax) == (0, 2)
    assert drawn.colorbar.tickvals is None


def test_a_loss_that_overflowed_is_a_hole():
    losses = [[math.inf, 1.0, math.nan], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    figure = surfaces([Surface("b", (1.0, 1.0), OFFSETS, losses)])["b"]
    assert contour(figure).z[0][0] is None
    assert contour(figure).z[2][0] is None
    assert "Infinity" not in figure.to_json()


@pytest.mark.parametrize("value", [0.0, 0.5, math.nan])
def test_a_surface_without_contours_is_drawn(value):
    figure = surfaces([Surface("b", (0.0, 0.0), OFFSETS, [[value] * 3] * 3)])["b"]
    assert contour(figure).contours.size > 0


def test_plotly_reads_no_markup_in_a_block_s_name():
    figure = surfaces([Surface("<b>x", (1.0, 1.0), OFFSETS, [[1.0] * 3] * 3)])["<b>x"]
    assert contour(figure).name == "&lt;b&gt;x"
