"""mmcv's operations from torchvision's kernels: definitions, gradients, networks with them."""

import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from search.errors import InputError
from search.tasks.mmcv_ops import serve_mmcv_ops

pytest.importorskip("mmdet", reason="needs the extra: pip install 'hawq-search[detection]'")
IS_SERVED = serve_mmcv_ops()
OPS = import_module("mmcv.ops")
CONFIGS = Path(import_module("mmdet").__file__).parent / ".mim" / "configs"
ROOT = Path(__file__).parents[1]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- boxes --------------------------------------------------------------------------------------


def naive_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int) -> list[int]:
    """Keep the best box, drop all that overlap it, go on; widths count ``offset`` in."""
    kept = []
    rest = list(np.argsort(-scores, kind="stable"))
    while rest:
        best, *rest = rest
        kept.append(int(best))
        rest = [i for i in rest if not overlap(boxes[best], boxes[i], offset) > threshold]
    return kept


def overlap(a: np.ndarray, b: np.ndarray, offset: int) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + offset
    joint = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    return joint / (areas - joint) if areas > joint else 0.0


BOXES = st.lists(st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(0, 9)] * 2), max_size=14).map(
    lambda rows: np.array([(x, y, x + w, y + h) for x, y, w, h in rows], float).reshape(-1, 4)
)
# Of no two small rectangles is the overlap such a number: rounding decides nothing.
THRESHOLDS = st.sampled_from([0.1234, 0.30303, 0.50505, 0.7071])


@given(BOXES, THRESHOLDS, st.sampled_from([0, 1]), st.randoms(use_true_random=False))
def test_suppression_keeps_what_the_definition_keeps(boxes, threshold, offset, random):
    scores = np.array([random.choice((0.2, 0.4, 0.6, 0.8)) for _ in boxes])
    for dtype in (torch.float32, torch.float64):
        dets, kept = OPS.nms(
            torch.tensor(boxes, dtype=dtype), torch.tensor(scores, dtype=dtype), threshold, offset
        )
        assert kept.tolist() == naive_nms(boxes, scores, threshold, offset)
        assert dets.shape == (len(kept), 5)


def test_a_row_of_pixels_is_a_box_only_where_pixels_are_counted():
    boxes = torch.tensor([[2.0, 3.0, 2.0, 9.0], [2.0, 3.0, 2.0, 9.0]])
    scores = torch.tensor([0.5, 0.9])
    assert OPS.nms(boxes, scores, 0.5, offset=0)[1].tolist() == [1, 0]
    assert OPS.nms(boxes, scores, 0.5, offset=1)[1].tolist() == [1]


@given(BOXES.filter(len), THRESHOLDS, st.sampled_from([0, 1]))  # mmcv's own part needs a box
def test_suppression_leaves_other_classes_alone(boxes, threshold, offset):
    scores, classes = np.linspace(0.9, 0.1, len(boxes)), np.arange(len(boxes)) % 3
    expected = sorted(
        int(own[i])
        for own in (np.flatnonzero(classes == c) for c in range(3))
        for i in naive_nms(boxes[own], scores[own], threshold, offset)
    )
    arguments = (torch.tensor(boxes), torch.tensor(scores), torch.tensor(classes))
    config = {"type": "nms", "iou_threshold": threshold, "offset": offset}
    for split in (10000, 0):  # all classes in one call, and each in its own
        kept = OPS.batched_nms(*arguments, config | {"split_thr": split})[1]
        assert kept.tolist() == expected


# --- regions ------------------------------------------------------------------------------------

ROIS = torch.tensor(
    [
        [0, 1.0, 2.0, 11.0, 9.0],
        [1, 0.3, 0.7, 5.2, 13.1],
        [1, -6.0, -3.0, 30.0, 25.0],  # beyond all borders
        [0, 4.0, 4.0, 4.0, 4.0],  # a point
        [1, 40.0, 40.0, 50.0, 50.0],  # nothing of the image
    ],
    dtype=torch.float64,
)


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    low, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    above = (1 - u) * plane[top, left] + u * plane[top, right]
    below = (1 - u) * plane[low, left] + u * plane[low, right]
    return (1 - v) * above + v * below


def naive_roi_align(features, rois, size, scale, ratio, aligned) -> np.ndarray:
    pooled = np.zeros((len(rois), features.shape[1], *size))
    for n, (image, *roi) in enumerate(rois):
        x1, y1, x2, y2 = np.array(roi) * scale - (0.5 if aligned else 0)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1), max(width, 1)
        bins = height / size[0], width / size[1]
        num = [ratio or math.ceil(length) for length in bins]
        for c, i, j in np.ndindex(pooled.shape[1:]):
            values = [
                bilinear(
                    features[int(image), c],
                    y1 + bins[0] * (i + (a + 0.5) / num[0]),
                    x1 + bins[1] * (j + (b + 0.5) / num[1]),
                )
                for a, b in np.ndindex(*num)
            ]
            pooled[n, c, i, j] = np.mean(values) if values else 0
    return pooled


def pixels(start: float, size: float, i: int) -> tuple[int, int]:
    """All that the i-th bin of a size touches, from the first to before the last."""
    return max(math.floor(i * size + start), 0), max(math.ceil((i + 1) * size + start), 0)


def naive_roi_pool(features, rois, size, scale) -> np.ndarray:
    pooled = np.zeros((len(rois), features.shape[1], *size))
    for n, (image, x1, y1, x2, y2) in enumerate(rois):
        top, left = y1 * scale, x1 * scale
        bins = ((y2 + 1) * scale - top) / size[0], ((x2 + 1) * scale - left) / size[1]
        for i, j in np.ndindex(*size):
            (a, c), (b, d) = pixels(top, bins[0], i), pixels(left, bins[1], j)
            window = features[int(image), :, a:c, b:d]
            if window.size and min(bins) > 0:
                pooled[n, :, i, j] = window.max((1, 2))
    return pooled


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_aligned_regions_are_means_of_interpolated_points(aligned, ratio, scale):
    features = randn(2, 3, 7, 9)
    found = OPS.roi_align(features, ROIS, (2, 3), scale, ratio, "avg", aligned)
    expected = naive_roi_align(features.numpy(), ROIS.numpy(), (2, 3), scale, ratio, aligned)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_aligned_regions_hand_back_their_gradients(aligned, ratio):
    features = randn(2, 2, 5, 6).requires_grad_()
    assert gradcheck(
        lambda x: OPS.roi_align(x, ROIS, (2, 3), 0.5, ratio, "avg", aligned), (features,)
    )


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.37])
def test_pooled_regions_are_the_largest_of_their_pixels(scale):
    features = randn(2, 3, 8, 9)
    found = OPS.roi_pool(features, ROIS, (2, 3), scale)
    expected = naive_roi_pool(features.numpy(), ROIS.numpy(), (2, 3), scale)
    np.testing.assert_array_equal(found, expected)


def test_pooled_regions_without_a_size_are_zero_and_hand_nothing_back():
    # Both ends are inside of one pixel, in the wrong order.
    inverted = torch.tensor([[0, 6.6, 1.0, 5.4, 4.0]], dtype=torch.float64)
    features = randn(1, 2, 8, 8).requires_grad_()
    pooled = OPS.roi_pool(features, inverted, 2)
    pooled.sum().backward()
    assert not pooled.any()
    assert not features.grad.any()


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_pooled_regions_hand_back_their_gradients(scale):
    features = randn(2, 2, 5, 6).requires_grad_()
    assert gradcheck(lambda x: OPS.roi_pool(x, ROIS, (2, 3), scale), (features,))


def test_of_equal_pixels_the_first_one_gets_the_gradient():
    features = torch.zeros(1, 1, 4, 4, requires_grad=True)
    OPS.roi_pool(features, torch.tensor([[0.0, 1, 1, 3, 3]]), 1).sum().backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 1, 1]]


def test_no_regions_are_no_outputs():
    features, none = randn(1, 2, 4, 4).requires_grad_(), ROIS[:0]
    for pooled in (OPS.roi_align(features, none, 3), OPS.roi_pool(features, none, 3)):
        assert pooled.shape == (0, 2, 3, 3)
        pooled.sum().backward()
    assert not features.grad.any()


# --- deformable convolutions --------------------------------------------------------------------

LAYOUTS = [
    {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, "deform_groups": 1},
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2, "deform_groups": 2},
]
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "odd"])


def convolved(layout, size=(7, 8)):
    """An image, a weight of 3×2 pixels, and the convolution that they make."""
    x, weight = randn(2, 4, *size), randn(6, 4 // layout["groups"], 3, 2, seed=1)
    names = ("stride", "padding", "dilation", "groups")
    return x, weight, F.conv2d(x, weight, **{name: layout[name] for name in names})


def offsets(layout, output, seed=2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ones, and masks, as a layer with these outputs has them."""
    points = layout["deform_groups"] * 6
    shape = (len(output), points, *output.shape[2:])
    offset = randn(len(output), 2 * points, *output.shape[2:], seed=seed)
    return offset, randn(*shape, seed=seed + 1).sigmoid()


@LAYOUT
def test_points_that_do_not_move_make_a_convolution(layout):
    x, weight, expected = convolved(layout)
    still, mask = (torch.zeros_like(value) for value in offsets(layout, expected))
    bias = randn(6, seed=3)
    found = OPS.deform_conv2d(x, still, weight, *layout.values())
    torch.testing.assert_close(found, expected)
    doubled = OPS.modulated_deform_conv2d(x, still, mask + 2, weight, bias, *layout.values())
    torch.testing.assert_close(doubled, 2 * expected + bias[:, None, None])


def test_points_that_all_move_alike_read_the_moved_image():
    layout = LAYOUTS[0]
    x, weight, output = convolved(layout)
    offset, mask = (torch.zeros_like(value) for value in offsets(layout, output))
    offset[:, 0::2], offset[:, 1::2] = 2, -1  # down, left
    moved = torch.zeros_like(x)
    moved[:, :, :-2, 1:] = x[:, :, 2:, :-1]
    found = OPS.deform_conv2d(x, offset, weight, *layout.values())
    modulated = OPS.modulated_deform_conv2d(x, offset, mask + 1, weight, None, *layout.values())
    # At the border the image moved away from its padding: what it reads there is no zero.
    inside = (slice(None), slice(None), slice(1, -3), slice(2, -1))
    expected = F.conv2d(moved, weight, padding=1)
    torch.testing.assert_close(found[inside], expected[inside])
    torch.testing.assert_close(modulated, found)


def test_each_group_of_channels_moves_by_its_own_offsets():
    layout = LAYOUTS[1] | {"groups": 1}
    x, weight, output = convolved(layout)
    offset, mask = offsets(layout, output)
    parts = [
        OPS.modulated_deform_conv2d(
            x[:, 2 * g : 2 * g + 2],
            offset[:, 12 * g : 12 * g + 12],
            mask[:, 6 * g : 6 * g + 6],
            weight[:, 2 * g : 2 * g + 2],
            None,
            *(layout | {"deform_groups": 1}).values(),
        )
        for g in range(2)
    ]
    found = OPS.modulated_deform_conv2d(x, offset, mask, weight, None, *layout.values())
    torch.testing.assert_close(found, parts[0] + parts[1])


@LAYOUT
@pytest.mark.parametrize("kind", ["plain", "modulated", "modulated with a bias"])
def test_deformable_convolutions_hand_back_their_gradients(layout, kind):
    x, weight, output = convolved(layout, size=(4, 5))
    offset, mask = offsets(layout, output)
    bias = randn(6, seed=5).requires_grad_() if kind.endswith("bias") else None
    x, weight, offset, mask = (value.requires_grad_() for value in (x, weight, offset, mask))
    if kind == "plain":
        assert gradcheck(
            lambda *values: OPS.deform_conv2d(*values, *layout.values()),
            (x, offset, weight),
            fast_mode=True,
        )
    else:
        assert gradcheck(
            lambda *values: OPS.modulated_deform_conv2d(*values, *layout.values()),
            (x, offset, mask, weight, bias),
            fast_mode=True,
        )


# --- the focal loss -----------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_focal_loss_and_its_gradient_are_those_that_mmdet_writes_out(gamma, alpha, reduction):
    written = import_module("mmdet.models.losses.focal_loss").py_sigmoid_focal_loss
    logits = (4 * randn(9, 3)).requires_grad_()
    target = torch.arange(9) % 4  # 3 is the background
    one_hot = F.one_hot(target, 4)[:, :3]
    expected = written(logits, one_hot, gamma=gamma, alpha=alpha, reduction="none")
    # mmcv's mean is over examples, mmdet's over logits.
    expected = {"none": expected, "mean": expected.sum() / 9, "sum": expected.sum()}[reduction]
    found = OPS.sigmoid_focal_loss(logits, target, gamma, alpha, None, reduction)
    torch.testing.assert_close(found, expected)
    direction = randn(*found.shape, seed=6)
    gradients = [torch.autograd.grad(y, logits, direction)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_focal_loss_weighs_each_example_by_its_class():
    logits = randn(4, 2).requires_grad_()
    target, weight = torch.tensor([0, 1, 1, 0]), torch.tensor([3.0, 0.5], dtype=torch.float64)
    plain = OPS.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    weighted = OPS.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, "none")
    torch.testing.assert_close(weighted, plain * weight[target, None])
    (gradient,) = torch.autograd.grad(weighted.sum(), logits)
    (expected,) = torch.autograd.grad((plain * weight[target, None]).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_the_focal_loss_of_a_hopeless_logit_is_finite():
    logits = torch.tensor([[-200.0], [200.0]], requires_grad=True)
    loss = OPS.sigmoid_focal_loss(logits, torch.tensor([0, 1]), 2.0, 0.25, None, "none")
    loss.sum().backward()
    torch.testing.assert_close(loss.detach().flatten(), torch.tensor([50.0, 150.0]))
    torch.testing.assert_close(logits.grad.flatten(), torch.tensor([-0.25, 0.75]))


# --- the door -----------------------------------------------------------------------------------


def run(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not IS_SERVED, reason="a compiled mmcv is installed")
def test_an_operation_that_is_not_served_says_its_name_when_it_is_called():
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5]])
    with pytest.raises(InputError, match=r"mmcv's softnms must be compiled.*mmcv 2\.1\.0"):
        OPS.soft_nms(boxes, torch.tensor([0.5, 0.9]))
    with pytest.raises(InputError, match="roi_align must have pool_mode 'avg', got 'max'"):
        OPS.roi_align(randn(2, 1, 4, 4), ROIS, 2, 1.0, 0, "max", True)


@pytest.mark.skipif(not IS_SERVED, reason="a compiled mmcv is installed")
def test_serving_twice_changes_nothing():
    before = sys.modules["mmcv._ext"]
    assert serve_mmcv_ops()
    assert sys.modules["mmcv._ext"] is before


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmdet", None)  # as Python marks what cannot be imported
    with pytest.raises(InputError, match=r"pip install 'hawq-search\[detection\]'"):
        serve_mmcv_ops()


@pytest.fixture(scope="module")
def first_import(tmp_path_factory) -> subprocess.CompletedProcess:
    """A process in which mmcv is compiled, and none of these packages was ever imported."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "_ext.py").write_text("def __getattr__(name):\n    return 'compiled ' + name\n")
    return run(
        "import sys, torch, torchvision\n"
        f"sys.pycache_prefix = {str(folder / 'cache')!r}\n"
        "from search.tasks.mmcv_ops import serve_mmcv_ops\n"
        f"import mmcv; mmcv.__path__.append({str(folder)!r})\n"
        "print(serve_mmcv_ops(), sys.modules['mmcv._ext'].nms)\n",
        "-Werror",
    )


def test_a_compiled_extension_is_left_alone(first_import):
    assert first_import.stdout == "False compiled nms\n", first_import.stderr


def test_the_first_import_of_all_warns_of_nothing(first_import):
    assert first_import.returncode == 0
    assert not first_import.stderr


def refusal(folder: Path) -> str:
    """What a user is told in a process that imports from a folder first."""
    done = run(
        "from search.errors import InputError\n"
        "from search.tasks.mmcv_ops import serve_mmcv_ops\n"
        "try:\n    serve_mmcv_ops()\nexcept InputError as error:\n    print(error)\n",
        PYTHONPATH=str(folder),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_missing_system_library_is_named_with_its_debian_package(tmp_path):
    missing = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({missing!r})\n")
    told = refusal(tmp_path)
    assert "libGL.so.1" in told
    assert "apt-get install libgl1 libglib2.0-0" in told


def test_a_version_that_mmdet_refuses_is_named(tmp_path):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("__version__ = '2.2.0'\n")
    assert "must be of versions that fit: MMCV==2.2.0 is used but incompatible" in refusal(tmp_path)


# --- networks -----------------------------------------------------------------------------------

BACKBONE = {
    "model.backbone.depth": 18,
    "model.backbone.base_channels": 8,
    "model.backbone.frozen_stages": -1,
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": [8, 16, 32, 64],
    "model.neck.out_channels": 8,
}
RETINANET = (
    "retinanet/retinanet_r50_fpn_1x_coco.py",
    BACKBONE
    | {
        "model.bbox_head.in_channels": 8,
        "model.bbox_head.feat_channels": 8,
        "model.bbox_head.stacked_convs": 1,
        "model.bbox_head.num_classes": 3,
        "model.test_cfg.score_thr": 0.0,
    },
)
FASTER_RCNN = (
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    BACKBONE
    | {
        "model.rpn_head.in_channels": 8,
        "model.rpn_head.feat_channels": 8,
        "model.roi_head.bbox_roi_extractor.out_channels": 8,
        "model.roi_head.bbox_head.in_channels": 8,
        "model.roi_head.bbox_head.fc_out_channels": 16,
        "model.roi_head.bbox_head.num_classes": 3,
        "model.test_cfg.rcnn.score_thr": 0.0,
    },
)


def deformable(version: str) -> dict[str, object]:
    return {
        "model.backbone.depth": 50,
        "model.neck.in_channels": [32, 64, 128, 256],
        "model.backbone.dcn": {"type": version, "deform_groups": 1, "fallback_on_stride": False},
        "model.backbone.stage_with_dcn": (False, False, True, True),
    }


NETWORKS = {
    "RetinaNet": RETINANET,
    "Faster R-CNN": FASTER_RCNN,
    "Faster R-CNN with DCN": (FASTER_RCNN[0], FASTER_RCNN[1] | deformable("DCN")),
    "RetinaNet with DCNv2": (RETINANET[0], RETINANET[1] | deformable("DCNv2")),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_mmdet_learns_and_predicts(name):
    path, changes = NETWORKS[name]
    config = import_module("mmengine").Config.fromfile(str(CONFIGS / path))
    config.merge_from_dict(changes)
    torch.manual_seed(0)
    import_module("mmengine.registry").init_default_scope("mmdet")
    model = import_module("mmdet.registry").MODELS.build(config.model)
    inputs, samples = example()

    model.train()
    losses = model.loss(model.data_preprocessor({"inputs": inputs})["inputs"], samples)
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    left_out = [
        key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()
    ]
    assert not left_out

    model.eval()
    with torch.no_grad():
        batch = model.data_preprocessor({"inputs": inputs})["inputs"]
        (found,) = model.predict(batch, samples, rescale=False)
    boxes, scores = found.pred_instances.bboxes, found.pred_instances.scores
    assert len(boxes) == 100  # the most that it may return: with random weights nothing is certain
    assert torch.isfinite(boxes).all()
    assert (scores.diff() <= 0).all()


def example() -> tuple[list[torch.Tensor], list]:
    """One image of noise with two objects."""
    structures, data = import_module("mmdet.structures"), import_module("mmengine.structures")
    sample = structures.DetDataSample(
        metainfo={
            "img_shape": (64, 64),
            "ori_shape": (64, 64),
            "pad_shape": (64, 64),
            "batch_input_shape": (64, 64),
            "scale_factor": (1.0, 1.0),
        }
    )
    sample.gt_instances = data.InstanceData(
        bboxes=torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 50.0]]),
        labels=torch.tensor([0, 2]),
    )
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    return [image.to(torch.uint8)], [sample]
