"""COCO's mean average precision of boxes, and what every image adds to it (Lin et al., 2014).

The average precision of a class ranks its detections over all images: it is no mean over images,
so a standard error or a paired difference has nothing to stand on. Pseudo-values of the jackknife
(Efron and Stein, 1981) give every image a score whose mean is the average precision and whose
standard error is the jackknife's.

COCO reads precision at 101 recalls. Whether one of them is just reached or just missed is a jump,
and a jackknife fails where there are jumps: on simulated thousands of images of three classes, its
error of a paired difference was about twice too large. What an image adds is therefore taken from
the area under the whole curve, which the 101 points approximate.

An image is one row of numbers. Detections have three outcomes at each threshold of overlap: +1 for
one that found a true box, −1 for a false one, 0 for one that does not count because it lies in a
crowd. A missing detection is a row of zeros, for what does not count changes nothing.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["average_precision", "matched", "pseudo_values"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Written as COCO's own code writes them: another last digit moves a box across a threshold.
_IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_DETECTIONS = 100  # of an image
_COLUMNS = 2 + len(_IOUS)  # class, score, outcomes
_CELLS = 1 << 18  # of a table of images by found boxes: what fits a cache


def matched(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    true_boxes: Tensor,
    true_labels: Tensor,
    crowd: Tensor,
    num_classes: int,
) -> Tensor:
    """Match an image's detections with its true boxes, by COCO's greedy rule.

    The likelier detection chooses first: the box of its class, not yet found, that it overlaps
    most. Of an image's D detections the 100 likeliest count. COCO counts 100 of every class, which
    is the same for a detector that returns no more than 100.

    Args:
        boxes: Corners x₁, y₁, x₂, y₂ of the detections, shape (D, 4), pixels.
        scores: Of the detections, shape (D,).
        labels: Classes of the detections, shape (D,), from 0.
        true_boxes: Corners of the true boxes, shape (G, 4), pixels.
        true_labels: Their classes, shape (G,).
        crowd: Whether a true box is a crowd, shape (G,): detections in it do not count.
        num_classes: Classes C.

    Returns:
        The image's row, shape (1200 + C,), float32: class, score and ten outcomes of each
        detection, then the true boxes of each class. All NaN if a box or score is not finite.

    Raises:
        ValueError: If shapes do not agree, or a class is not within 0..C−1.
    """
    _check(boxes, scores, labels, num_classes, "detections")
    _check(true_boxes, crowd, true_labels, num_classes, "true boxes")
    if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
        return torch.full((_DETECTIONS * _COLUMNS + num_classes,), torch.nan)
    kept = scores.sort(descending=True, stable=True).indices[:_DETECTIONS]
    # Of equal overlaps COCO takes the later box: reversed, that is the first largest.
    there, is_crowd = true_boxes.flip(0).double().cpu().numpy(), crowd.flip(0).bool().cpu().numpy()
    overlaps = _overlaps(boxes[kept].double().cpu().numpy(), there, is_crowd)
    overlaps[(labels[kept, None] != true_labels.flip(0)).cpu().numpy()] = 0
    row = np.zeros((_DETECTIONS, _COLUMNS), np.float32)
    row[: len(kept), 0] = labels[kept].cpu().numpy()
    row[: len(kept), 1] = scores[kept].cpu().numpy()
    row[: len(kept), 2:] = _outcomes(overlaps[:, ~is_crowd], overlaps[:, is_crowd])
    num_true = torch.bincount(true_labels[~crowd.bool()].long().cpu(), minlength=num_classes)
    return torch.cat([torch.from_numpy(row).flatten(), num_true.float()])


def average_precision(values: Tensor, *, iou: float | None = None) -> float:
    """Return COCO's average precision: the mean over classes, and over thresholds of overlap.

    A class without a true box is left out. Equal scores are ranked in the order of the images, as
    COCO's code ranks them.

    Args:
        values: Rows of ``matched``, shape (N, 1200 + C).
        iou: One threshold of 0.5, 0.55, …, 0.95; None takes the mean over all ten.

    Returns:
        A number in [0, 1]; NaN if a row is not finite.

    Raises:
        ValueError: If there is no true box, or no such threshold.
    """
    chosen = np.full(len(_IOUS), True) if iou is None else np.isclose(_IOUS, iou)
    if not chosen.any():
        raise ValueError(f"iou must be one of 0.5, 0.55, …, 0.95, got {iou}")
    if not torch.isfinite(values).all():
        return math.nan
    areas = [
        _mean_precision(outcome, int(num_true.sum()))
        for outcomes, _, num_true in _by_class(values)
        for outcome in outcomes[:, chosen].T
    ]
    if not areas:
        raise ValueError("values must count at least one true box, got none")
    return float(np.mean(areas))


def pseudo_values(values: Tensor) -> Tensor:
    """Return what each image adds to the average precision.

    Leaving image i out changes the area under the whole curve from θ to θ₋ᵢ. Image i has
    (N − 1)(θ − θ₋ᵢ), the jackknife's pseudo-value less a constant, shifted by what makes the mean
    ``average_precision``. The standard deviation over √N is the standard error. Differences between
    two networks, image by image, have the error of a paired comparison.

    Args:
        values: Rows of ``matched``, shape (N, 1200 + C).

    Returns:
        Shape (N,), float64, in the order of the images; single ones may lie outside [0, 1]. All
        NaN if a row is not finite.

    Raises:
        ValueError: If fewer than two images have true boxes.
    """
    num = len(values)
    if not torch.isfinite(values).all():
        return torch.full((num,), torch.nan, dtype=torch.float64)
    total, num_classes = 0.0, 0
    change, lost = np.zeros(num), np.zeros(num)  # of the total and the classes, without an image
    for outcomes, image, num_true in _by_class(values):
        touched, row = np.unique(np.append(image, num_true.nonzero()), return_inverse=True)
        # The last row leaves nobody out.
        left = num_true.sum() - np.append(num_true[touched], 0)
        areas = _areas(outcomes, row[: len(image)], left).mean(1)
        total, num_classes = total + areas[-1], num_classes + 1
        change[touched] += areas[:-1] - areas[-1]
        lost[touched] += left[:-1] == 0
    if num_classes == lost.max(initial=0):
        raise ValueError("values must count true boxes in at least two images, got fewer")
    added = (num - 1) * (total / num_classes - (total + change) / (num_classes - lost))
    return torch.from_numpy(average_precision(values) + (added - added.mean()))


def _check(boxes: Tensor, of_each: Tensor, labels: Tensor, num_classes: int, what: str) -> None:
    num = len(boxes)
    if boxes.shape != (num, 4) or of_each.shape != (num,) or labels.shape != (num,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (boxes, of_each, labels))
        raise ValueError(f"{what} must have shapes (N, 4), (N,) and (N,), got {shapes}")
    if num and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"classes of {what} must be within 0..{num_classes - 1}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )


def _overlaps(found: Floats, there: Floats, is_crowd: Flags) -> Floats:
    """Return intersection over union, shape (D, G); in a crowd, over the detection alone."""
    low = np.maximum(found[:, None, :2], there[:, :2])
    high = np.minimum(found[:, None, 2:], there[:, 2:])
    shared: Floats = (high - low).clip(0).prod(-1)
    found_area, area = (np.prod(x[:, 2:] - x[:, :2], axis=-1) for x in (found, there))
    whole = found_area[:, None] + np.where(is_crowd, 0, area - shared)
    overlaps: Floats = np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)
    return overlaps


def _outcomes(overlaps: Floats, in_crowds: Floats) -> Floats:
    """Match detections with single boxes, the likeliest first, and the rest with crowds."""
    outcomes = np.where((in_crowds[:, :, None] >= _IOUS).any(1), 0.0, -1.0)
    levels = np.arange(len(_IOUS))
    taken = np.zeros((len(levels), overlaps.shape[1]), bool)
    for detection in (overlaps >= _IOUS[0]).any(1).nonzero()[0]:
        free = np.where(taken, -1, overlaps[detection])
        best = free.argmax(1)
        hits = free[levels, best] >= _IOUS
        taken[levels[hits], best[hits]] = True
        outcomes[detection, hits] = 1
    return outcomes


def _by_class(values: Tensor) -> Iterator[tuple[Floats, Integers, Integers]]:
    """Yield for each class with true boxes what ranks its M detections over all images.

    Yields:
        Outcomes, shape (M, 10), and images, shape (M,), likeliest first; true boxes of each image.
    """
    rows = values.cpu().numpy()
    size = _DETECTIONS * _COLUMNS
    detections, num_true = rows[:, :size].reshape(-1, _COLUMNS), rows[:, size:].astype(np.int64)
    image = np.arange(len(detections)) // _DETECTIONS
    counts = (detections[:, 2:] != 0).any(1)
    for label in num_true.sum(0).nonzero()[0]:
        mine = (counts & (detections[:, 0] == label)).nonzero()[0]
        ranked = mine[np.argsort(-detections[mine, 1], kind="stable")]
        yield detections[ranked, 2:], image[ranked], num_true[:, label]


def _mean_precision(outcome: Floats, num_true: int) -> float:
    """Return a class's precision at the 101 recalls, on average, at one threshold.

    Args:
        outcome: Of its M detections, likeliest first, shape (M,).
        num_true: True boxes of the class.
    """
    num_hits, num_false = (outcome > 0).cumsum(), (outcome < 0).cumsum()
    precision = num_hits / np.maximum(num_hits + num_false, 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)  # 0: never reached
    return float(envelope[np.searchsorted(num_hits / num_true, _RECALLS)].mean())


def _areas(outcomes: Floats, row: Integers, num_true: Integers) -> Floats:
    """Return the areas under a class's curve, in each of R rows without some of its detections.

    Args:
        outcomes: Of the M detections, likeliest first, shape (M, T).
        row: The row that leaves a detection out, shape (M,); it is in all others.
        num_true: True boxes in each row, shape (R,); a row without one is 0.

    Returns:
        Shape (R, T).
    """
    areas = np.zeros((len(num_true), outcomes.shape[1]))
    for level, outcome in enumerate(outcomes.T):
        hits, false = (outcome > 0).nonzero()[0], (outcome < 0).nonzero()[0]
        # Precision falls with every false detection, so only the ranks of hits matter to the area
        # under its envelope. A false one counts from the next hit on.
        after = np.searchsorted(hits, false)
        step = max(1, _CELLS // (len(hits) + 1))
        for start in range(0, len(num_true), step):
            part = slice(start, start + step)
            areas[part, level] = _envelope_areas(
                row[hits] - start, row[false] - start, after, num_true[part]
            )
    return areas


def _envelope_areas(hit: Integers, false: Integers, after: Integers, num_true: Integers) -> Floats:
    """Return the areas of a few rows, shape (R,), at one threshold.

    Args:
        hit: The row that leaves out each of K hits, likeliest first; outside 0..R−1, none here.
        false: The row that leaves out each false detection.
        after: How many hits are likelier than it.
        num_true: True boxes in each row.
    """
    num_hits, num_rows = len(hit), len(num_true)
    out = hit == np.arange(num_rows)[:, None]
    inside = (false >= 0) & (false < num_rows) & (after < num_hits)
    cells = false[inside] * num_hits + after[inside]
    spared = np.bincount(cells, minlength=num_rows * num_hits).reshape(num_rows, num_hits)
    num_false = (np.bincount(after, minlength=num_hits + 1)[:num_hits] - spared).cumsum(1)
    rank = (~out).cumsum(1)
    precision = np.where(out, 0, rank / np.maximum(rank + num_false, 1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    areas: Floats = np.where(out, 0, envelope).sum(1) / np.maximum(num_true, 1)
    return areas
