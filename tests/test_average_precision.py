"""Average precision against COCO's own code; pseudo-values against leaving images out with it."""

import io
import math
from contextlib import redirect_stdout
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.tasks.average_precision import average_precision, matched, pseudo_values
from search.tasks.mmcv_ops import serve_mmcv_ops

EXTRA = "needs the extra: pip install 'hawq-search[detection]'"
COCO = pytest.importorskip("pycocotools.coco", reason=EXTRA).COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval", reason=EXTRA).COCOeval
NUM_CLASSES = 3
# Coordinates on a coarse grid and few scores: overlaps at a threshold, equal overlaps, equal
# scores all come up.
CORNER, SIDE = st.integers(0, 6), st.sampled_from([2, 4, 5, 8, 10, 20])
BOX = st.tuples(CORNER, CORNER, SIDE, SIDE).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
LABEL = st.integers(0, NUM_CLASSES - 1)
SCORE = st.integers(0, 8).map(lambda score: score / 8)
IMAGE = st.tuples(
    st.lists(st.tuples(BOX, SCORE, LABEL), max_size=6),
    st.lists(st.tuples(BOX, LABEL, st.sampled_from([False, False, False, True])), max_size=5),
)
IMAGES = st.lists(IMAGE, min_size=1, max_size=6)


def row(image, num_classes=NUM_CLASSES):
    detections, truth = image
    return matched(
        torch.tensor([d[0] for d in detections], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([d[1] for d in detections], dtype=torch.float32),
        torch.tensor([d[2] for d in detections], dtype=torch.int64),
        torch.tensor([t[0] for t in truth], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([t[1] for t in truth], dtype=torch.int64),
        torch.tensor([t[2] for t in truth], dtype=torch.bool),
        num_classes,
    )


def rows(images, num_classes=NUM_CLASSES):
    return torch.stack([row(image, num_classes) for image in images])


def coco(images, num_classes, annotations):
    dataset = COCO()
    dataset.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": [
            {
                "id": number,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                **annotation,
            }
            for number, ((x1, y1, x2, y2), annotation) in enumerate(annotations, start=1)
        ],
    }
    dataset.createIndex()
    return dataset


def evaluated(images, num_classes, recalls=None):
    truth = [
        (box, {"image_id": i, "category_id": label, "iscrowd": int(crowd)})
        for i, image in enumerate(images)
        for box, label, crowd in image[1]
    ]
    found = [
        (box, {"image_id": i, "category_id": label, "score": score})
        for i, image in enumerate(images)
        for box, score, label in image[0]
    ]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            coco(images, num_classes, truth), coco(images, num_classes, found), "bbox"
        )
        if recalls is not None:
            evaluation.params.recThrs = recalls
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def stats(images, num_classes=NUM_CLASSES):
    """The mean average precision, and that at 0.5 and 0.75, by COCO's code; −1 without truth."""
    return evaluated(images, num_classes).stats[:3]


def whole_curve(images):
    """The area under the whole curve, by COCO's code at one recall within each of its steps."""
    areas = []
    for label in range(NUM_CLASSES):
        of_class = [
            ([d for d in found if d[2] == label], [t for t in truth if t[1] == label])
            for found, truth in images
        ]
        num_true = sum(not crowd for _, truth in of_class for _, _, crowd in truth)
        if num_true:
            evaluation = evaluated(of_class, NUM_CLASSES, (np.arange(num_true) + 0.5) / num_true)
            precision = evaluation.eval["precision"][:, :, :, 0, -1]
            areas.append(precision[precision > -1].mean())
    return np.mean(areas) if areas else None


def jackknife(images):
    """Pseudo-values by their definition; None where an image may not be missing."""
    without = [whole_curve([*images[:i], *images[i + 1 :]]) for i in range(len(images))]
    if None in without:
        return None
    num = len(images)
    plain = num * whole_curve(images) - (num - 1) * np.array(without)
    return stats(images)[0] + (plain - plain.mean())


def draw(seed, num_images, *, num_classes=NUM_CLASSES, rare=False):
    """Images of a detector that is often right: boxes near true ones, and some astray."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        truth, found = [], []
        for _ in range(generator.poisson(4)):
            label = int(generator.integers(num_classes))
            corner, side = generator.uniform(0, 200, 2), generator.uniform(20, 60, 2)
            box = np.append(corner, corner + side)
            truth.append((tuple(np.float32(box).tolist()), label, bool(generator.random() < 0.05)))
            if generator.random() < 0.8:
                near = np.float32(box + generator.normal(0, 3, 4)).tolist()
                found.append((tuple(near), float(np.float32(generator.beta(4, 2))), label))
        for _ in range(generator.poisson(2)):
            corner, side = generator.uniform(0, 200, 2), generator.uniform(20, 60, 2)
            astray = np.float32(np.append(corner, corner + side)).tolist()
            score = float(np.float32(generator.beta(2, 4)))
            found.append((tuple(astray), score, int(generator.integers(num_classes))))
        images.append((found, truth))
    return images


@settings(max_examples=150)
@given(IMAGES)
def test_it_is_what_cocos_code_finds(images):
    expected, at_half, at_three_quarters = stats(images)
    values = rows(images)
    if expected == -1:
        with pytest.raises(ValueError, match="at least one true box"):
            average_precision(values)
    else:
        assert average_precision(values) == pytest.approx(expected, abs=1e-9)
        assert average_precision(values, iou=0.5) == pytest.approx(at_half, abs=1e-9)
        assert average_precision(values, iou=0.75) == pytest.approx(at_three_quarters, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_cocos_code_finds_for_a_detector_that_is_often_right(seed):
    images = draw(seed, 40)
    expected = stats(images)[0]
    assert 0.2 < expected < 0.9
    assert average_precision(rows(images)) == pytest.approx(expected, abs=1e-9)


def test_it_is_what_mmdet_reports():
    serve_mmcv_ops()
    metric = import_module("mmdet.evaluation").CocoMetric()
    metric.dataset_meta = {"classes": tuple("abc")}
    images = draw(5, 30)
    for number, (found, truth) in enumerate(images):
        boxes, scores, labels = zip(*found, strict=True) if found else ([], [], [])
        sample = {
            "img_id": number,
            "ori_shape": (300, 300),
            "instances": [
                {"bbox": list(box), "bbox_label": label, "ignore_flag": int(crowd)}
                for box, label, crowd in truth
            ],
            "pred_instances": {
                "bboxes": torch.tensor(boxes).reshape(-1, 4),
                "scores": torch.tensor(scores),
                "labels": torch.tensor(labels, dtype=torch.int64),
            },
        }
        metric.process({}, [sample])
    with redirect_stdout(io.StringIO()):
        reported = metric.evaluate(len(images))
    values = rows(images)
    assert round(average_precision(values), 3) == reported["coco/bbox_mAP"]
    assert round(average_precision(values, iou=0.5), 3) == reported["coco/bbox_mAP_50"]
    assert round(average_precision(values, iou=0.75), 3) == reported["coco/bbox_mAP_75"]


def test_only_the_hundred_likeliest_detections_of_an_image_count():
    box, elsewhere = (0, 0, 10, 10), (50, 50, 60, 60)
    many = [(elsewhere, 0.9, 0)] * 99
    for detections in ([*many, (box, 0.5, 0)], [*many, (elsewhere, 0.9, 0), (box, 0.5, 0)]):
        images = [(detections, [(box, 0, False)])]
        assert average_precision(rows(images)) == pytest.approx(stats(images)[0], abs=1e-12)
    assert average_precision(rows(images)) == 0


def test_of_equal_overlaps_the_later_box_is_taken():
    # The first detection may take either; only one of them leaves the second its box.
    truth = [((0, 0, 10, 10), 0, False), ((4, 0, 14, 10), 0, False)]
    images = [([((2, 0, 12, 10), 0.9, 0), ((0, 0, 10, 10), 0.8, 0)], truth)]
    assert stats(images)[1] == pytest.approx(1)
    assert average_precision(rows(images), iou=0.5) == 1


def test_several_detections_may_lie_in_one_crowd():
    crowd = ((0, 0, 100, 100), 0, True)
    inside = [((10 * i, 0, 10 * i + 10, 10), 0.9, 0) for i in range(5)]
    images = [([*inside, ((200, 0, 210, 10), 0.5, 0)], [crowd, ((200, 0, 210, 10), 0, False)])]
    assert average_precision(rows(images)) == 1


@given(IMAGES, st.randoms(use_true_random=False))
def test_the_order_of_the_images_changes_nothing_where_no_scores_are_equal(images, random):
    number = iter(range(1, 1000))
    distinct = [([(b, 1 / next(number), k) for b, _, k in found], t) for found, t in images]
    if not any(not crowd for _, truth in distinct for _, _, crowd in truth):
        return
    values = rows(distinct)
    order = random.sample(range(len(values)), len(values))
    assert average_precision(values[order]) == pytest.approx(average_precision(values), abs=1e-15)
    if sum(bool(count) for count in values[:, -NUM_CLASSES:].sum(1)) > 1:
        shuffled = pseudo_values(values[order])
        torch.testing.assert_close(shuffled, pseudo_values(values)[order], rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(st.lists(IMAGE, min_size=2, max_size=5))
def test_pseudo_values_are_those_of_leaving_images_out_with_cocos_code(images):
    values, expected = rows(images), jackknife(images)
    if expected is None:
        with pytest.raises(ValueError, match="at least two images"):
            pseudo_values(values)
    else:
        np.testing.assert_allclose(pseudo_values(values).numpy(), expected, rtol=0, atol=1e-9)


def test_pseudo_values_of_a_detector_that_is_often_right():
    images = draw(7, 15)
    expected = jackknife(images)
    np.testing.assert_allclose(pseudo_values(rows(images)).numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_images", [2, 30, 400])
def test_the_mean_of_the_pseudo_values_is_the_average_precision(num_images):
    values = rows(draw(num_images, num_images))
    assert abs(float(pseudo_values(values).mean()) - average_precision(values)) < 1e-12


def test_many_images_are_left_out_a_few_at_a_time_with_the_same_result(monkeypatch):
    values = rows(draw(3, 60))
    expected = pseudo_values(values)
    monkeypatch.setattr("search.tasks.average_precision._CELLS", 100)
    torch.testing.assert_close(pseudo_values(values), expected, rtol=0, atol=0)


def test_the_jackknifes_error_is_the_bootstraps_within_a_fifth():
    values = rows(draw(11, 250))
    pseudo = pseudo_values(values)
    jackknife = float(pseudo.std()) / math.sqrt(len(pseudo))
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(250, (250,), generator=generator) for _ in range(300)]
    bootstrap = float(np.std([average_precision(values[drawn]) for drawn in draws], ddof=1))
    assert 0.8 < jackknife / bootstrap < 1.25


def test_the_error_of_a_paired_difference_is_the_bootstraps_within_a_quarter():
    images = draw(12, 250)
    generator = np.random.default_rng(0)
    worse = [
        ([(box, score, label) for box, score, label in found if generator.random() < 0.9], truth)
        for found, truth in images
    ]
    first, second = rows(images), rows(worse)
    paired = pseudo_values(first) - pseudo_values(second)
    jackknife = float(paired.std()) / math.sqrt(len(paired))
    alone = float(pseudo_values(first).std()) / math.sqrt(len(paired))
    torch_generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(250, (250,), generator=torch_generator) for _ in range(150)]
    differences = [average_precision(first[d]) - average_precision(second[d]) for d in draws]
    assert 0.75 < jackknife / float(np.std(differences, ddof=1)) < 1.3
    assert jackknife < 0.7 * alone


def test_what_is_not_finite_is_told_by_the_score():
    broken = row(([((0, 0, 10, math.nan), 0.5, 0)], [((0, 0, 10, 10), 0, False)]))
    fine = row(([], [((0, 0, 10, 10), 0, False)]))
    assert math.isnan(average_precision(torch.stack([fine, broken])))
    assert pseudo_values(torch.stack([fine, broken])).isnan().all()


def test_a_row_of_an_image_with_nothing_in_it_is_zero():
    assert row(([], [])).shape == (1203,)
    assert not row(([], [])).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes": torch.zeros(2, 3)}, r"detections must have shapes .* got \(2, 3\)"),
        ({"scores": torch.zeros(3)}, "detections must have shapes"),
        ({"labels": torch.tensor([0, 2])}, r"classes of detections must be within 0..1, got 0..2"),
        ({"true_labels": torch.tensor([-1])}, "classes of true boxes must be within"),
        ({"crowd": torch.zeros(2, dtype=torch.bool)}, "true boxes must have shapes"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed, message):
    fitting = {
        "boxes": torch.zeros(2, 4),
        "scores": torch.zeros(2),
        "labels": torch.zeros(2, dtype=torch.int64),
        "true_boxes": torch.zeros(1, 4),
        "true_labels": torch.zeros(1, dtype=torch.int64),
        "crowd": torch.zeros(1, dtype=torch.bool),
    }
    matched(**fitting, num_classes=2)
    with pytest.raises(ValueError, match=message):
        matched(**(fitting | changed), num_classes=2)


def test_a_threshold_that_coco_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"iou must be one of .* got 0.3"):
        average_precision(rows(draw(0, 3)), iou=0.3)
