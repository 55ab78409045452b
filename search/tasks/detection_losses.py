"""Losses of mmdetection's detectors, image by image, and their Hessian in what they are losses of.

A detector's loss is a sum over many predictions: a logit of every anchor and class, four numbers of
every box. It is normalized by the positives of a batch, so an example's own loss is that of a batch
of one. The head's loss modules are watched at work: what each was given, logits or boxes, are the
outputs of the network, and each module's Hessian in them is taken for itself. Only what is complete
is returned: if the watched losses do not add up to the detector's, there is no answer.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hawq.hessian_forms import HessianForm, hessian_form, joint_factors
from hawq.task import Factor

__all__ = ["image_losses", "output_factors", "smoothing"]

# Of the detector's loss and the sum of what its loss modules returned, in float32.
_COMPLETE = 1e-5


def image_losses(
    detector: nn.Module,
    images: Tensor,
    samples: Sequence[Any],
    *,
    smooth: float | None,
    seeds: Sequence[int],
) -> Tensor:
    """Return each image's own loss, shape (N,), as if it were a batch alone.

    Where one stage predicts everything, the network runs once and its predictions are taken apart;
    otherwise it runs image by image. Focal loss is the one of torch's operators, which has a second
    derivative on every device.

    Args:
        detector: Of mmdetection 3.x; left as it was.
        images: Normalized, on one canvas, shape (N, 3, H, W).
        samples: Their ``DetDataSample`` with ``gt_instances``.
        smooth: β of the smooth L1 loss that takes the place of boxes' L1 losses; None leaves them.
        seeds: One an image, of what is drawn for its loss: the regions that are sampled.

    Raises:
        ValueError: If there is not one sample and seed an image, or ``smooth`` is not positive.
    """
    _check(images, samples, smooth, seeds)
    with _prepared(detector, smooth, None):
        return torch.stack(list(_each(detector, images, samples, seeds)))


def output_factors(
    detector: nn.Module,
    images: Tensor,
    samples: Sequence[Any],
    *,
    smooth: float | None,
    seeds: Sequence[int],
) -> tuple[Tensor, list[Factor]] | None:
    """Return what the losses are of, and the factors of ``image_losses``' Hessian in it.

    Args:
        detector: Of mmdetection 3.x; left as it was.
        images: Normalized, on one canvas, shape (N, 3, H, W).
        samples: Their ``DetDataSample`` with ``gt_instances``.
        smooth: As in ``image_losses``.
        seeds: As in ``image_losses``.

    Returns:
        Predictions, shape (N, M), with zeros after an image's last, and a factor of sign +1,
        followed by one of −1 where some curvature is negative. None where a part of the loss is
        computed outside of loss modules (SSD), depends on predictions otherwise than through the
        first argument of one, or has a Hessian of another form.

    Raises:
        ValueError: If there is not one sample and seed an image, or ``smooth`` is not positive.
    """
    _check(images, samples, smooth, seeds)
    predictions: list[Tensor] = []
    forms: list[list[HessianForm]] = []
    calls: list[_Call] = []
    with _tracked(detector), _prepared(detector, smooth, calls):
        for total in _each(detector, images, samples, seeds):
            scales = _scales(total, calls)
            if scales is None:
                return None
            found = [call.hessian(scale) for call, scale in zip(calls, scales, strict=True)]
            if None in found:
                return None
            forms.append([form for form in found if form is not None])
            predictions.append(torch.cat([call.prediction.flatten() for call in calls]))
            calls.clear()
    longest = max(map(len, predictions))
    outputs = torch.stack([F.pad(row, (0, longest - len(row))) for row in predictions])
    return outputs, joint_factors(forms, outputs.detach())


def smoothing(detector: nn.Module, smooth: float | None) -> str:
    """Say what ``smooth`` replaces in a detector, for a report; empty where there is no L1 loss."""
    names = [name for name, module in _loss_modules(detector) if _is_a(module, "L1Loss")]
    if not names:
        return ""
    found = f"L1 of the boxes has no curvature ({', '.join(names)})"
    return f"{found}: smooth L1 with β = {smooth:.2g} in its place" if smooth else found


def _check(
    images: Tensor, samples: Sequence[Any], smooth: float | None, seeds: Sequence[int]
) -> None:
    if not len(images) == len(samples) == len(seeds) or not len(images):
        raise ValueError(
            "images must have one sample and one seed each, and be some, "
            f"got {len(images)}, {len(samples)} and {len(seeds)}"
        )
    if smooth is not None and not smooth > 0:
        raise ValueError(f"smooth must be positive (L1 has no curvature), got {smooth}")


def _each(
    detector: nn.Module, images: Tensor, samples: Sequence[Any], seeds: Sequence[int]
) -> Iterator[Tensor]:
    """Compute the loss of one image after the other."""
    outputs = detector(images, list(samples), mode="tensor") if _has_one_stage(detector) else None
    for i, seed in enumerate(seeds):
        sample = samples[i].to(images.device)
        with _seeded(seed, images.device):
            if outputs is None:
                losses = detector(images[i : i + 1], [sample], mode="loss")
            else:
                head: Any = detector.bbox_head
                losses = head.loss_by_feat(
                    *_row(outputs, i),
                    [sample.gt_instances],
                    [sample.metainfo],
                    [sample.get("ignored_instances")],
                )
        yield _total(losses)


def _row(outputs: Any, i: int) -> Any:
    return tree_map_only(Tensor, lambda x: x[i : i + 1], outputs)


def _has_one_stage(detector: nn.Module) -> bool:
    """Whether the loss is what the head's ``loss_by_feat`` makes of all that ``forward`` gives."""
    head: Any = getattr(detector, "bbox_head", None)
    plain = {"loss": "detectors.single_stage", "_forward": "detectors.single_stage"}
    return (
        hasattr(head, "loss_by_feat")
        and all(
            getattr(type(detector), method).__module__ == f"mmdet.models.{where}"
            for method, where in plain.items()
        )
        and type(head).loss.__module__ == "mmdet.models.dense_heads.base_dense_head"
    )


def _total(losses: dict[str, Any]) -> Tensor:
    """Add a detector's losses up, as it does in training."""
    parts = [tree_leaves(value) for name, value in losses.items() if "loss" in name]
    return torch.stack([part.mean() for values in parts for part in values]).sum()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, in torch and NumPy, and leave their generators alone."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)


@contextmanager
def _tracked(detector: nn.Module) -> Iterator[None]:
    """Let the loss of the predictions be differentiated, where those of the network need not be."""
    if torch.is_grad_enabled():
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in detector.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True, slots=True)
class _Call:
    """A loss module at work.

    Attributes:
        loss: Maps predictions to what it returns.
        prediction: What it was given.
        value: What it returned, as a leaf.
        is_alone: Whether nothing else that it was given depends on the network.
    """

    loss: Callable[[Tensor], Tensor]
    prediction: Tensor
    value: Tensor
    is_alone: bool

    @classmethod
    def of(
        cls,
        forward: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: Tensor,
    ) -> "_Call":
        given = inspect.signature(forward).bind(*args, **kwargs)
        first, rest, options = given.args[0], given.args[1:], given.kwargs
        others = (x for x in tree_leaves((rest, options)) if isinstance(x, Tensor))
        return cls(
            lambda prediction: forward(prediction, *rest, **options),
            first,
            value.detach().requires_grad_(),
            not any(x.requires_grad for x in others),
        )

    def hessian(self, scale: Tensor) -> HessianForm | None:
        """Return the Hessian of ``scale`` times what it returned, in its predictions."""
        return hessian_form(lambda x: (scale.to(x.dtype) * self.loss(x)).sum(), self.prediction)


@contextmanager
def _prepared(
    detector: nn.Module, smooth: float | None, calls: list[_Call] | None
) -> Iterator[None]:
    """Make a detector compute the losses that are wanted, and watch it."""

    def watch(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
    ) -> Tensor:
        forward = module.forward
        if smooth is not None and _is_a(module, "L1Loss"):
            smoothed = _registered("SmoothL1Loss")
            forward = smoothed(smooth, module.reduction, module.loss_weight).forward
            value = forward(*args, **kwargs)
        if calls is None or not isinstance(value, Tensor):
            return value
        calls.append(_Call.of(forward, args, kwargs, value))
        return calls[-1].value

    # In eval mode some heads return boxes in pixels, which their losses do not expect.
    heads = [m for m in detector.modules() if hasattr(m, "loss_by_feat") or hasattr(m, "bbox_loss")]
    modes = [head.training for head in heads]
    handles = []
    try:
        for head in heads:
            head.training = True
        for _, module in _loss_modules(detector):
            handles.append(module.register_forward_hook(watch, with_kwargs=True))
            if _is_a(module, "FocalLoss"):
                handles.append(module.register_forward_pre_hook(_one_hot, with_kwargs=True))
        with _Promoting():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for head, mode in zip(heads, modes, strict=True):
            head.training = mode


def _one_hot(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give focal loss one-hot targets, for which it uses torch's operators on a GPU, too."""
    given = inspect.signature(module.forward).bind(*args, **kwargs)
    prediction, target = given.arguments["pred"], given.arguments["target"]
    if prediction.dim() != target.dim():
        num_classes = prediction.size(1)
        given.arguments["target"] = F.one_hot(target, num_classes + 1)[:, :num_classes]
    return given.args, given.kwargs


class _Promoting(TorchFunctionMode):
    """Keeps the type of binary cross-entropy: mmdetection's targets are float32 in any network."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.binary_cross_entropy_with_logits:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.arguments["target"] = given.arguments["target"].to(given.arguments["input"].dtype)
            args, kwargs = given.args, given.kwargs
        return func(*args, **(kwargs or {}))


def _loss_modules(detector: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the loss modules by name: all are called ``loss_…``."""
    return [
        (name, module)
        for name, module in detector.named_modules()
        if name.rpartition(".")[2].startswith("loss")
    ]


def _is_a(module: nn.Module, name: str) -> bool:
    return isinstance(module, _registered(name))


def _registered(name: str) -> Any:
    return import_module("mmdet.registry").MODELS.get(name)


def _scales(total: Tensor, calls: Sequence[_Call]) -> list[Tensor] | None:
    """Return what each module's result is multiplied by; None where they are not the whole loss."""
    if not calls or not total.requires_grad or not all(call.is_alone for call in calls):
        return None
    values = [call.value for call in calls]
    scales = torch.autograd.grad(total, values, materialize_grads=True)
    parts = torch.stack([(c * v).sum().detach() for c, v in zip(scales, values, strict=True)])
    gap = abs(float(parts.sum() - total.detach()))
    return list(scales) if gap <= _COMPLETE * float(parts.abs().sum()) else None
