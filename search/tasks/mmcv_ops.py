"""The compiled operations of mmcv, served from torchvision's kernels.

mmdet's networks call operations of ``mmcv._ext``. mmcv-lite, the only wheel there is for today's
torch, comes without that extension, and compiling it takes a compiler and many minutes. torchvision
has kernels of the same definitions, for processors and GPUs. mmcv asks for its extension by name
and looks only at the names in it, so that a module put in its place is enough.

Two operations are written out here, as plain tensor formulas: the focal loss (Lin et al., 2017),
which on processors mmdet writes out, too, and RoI pooling (Girshick, 2015), of which torchvision's
is another one: it rounds a region to whole pixels before it divides it.
"""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from operator import itemgetter
from typing import NoReturn

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from search.errors import InputError

__all__ = ["serve_mmcv_ops"]

_EXTENSION = "mmcv._ext"
_ORIGIN = "torchvision"
_COMPILED = "install a compiled mmcv 2.1.0 in place of mmcv-lite"


def serve_mmcv_ops() -> bool:
    """Import mmdet's networks, with the operations of mmcv that are not compiled here.

    To be called before anything else is imported from mmdet or mmcv, in every process; again does
    no harm. A compiled mmcv is left as it is. An operation that is not served raises an
    ``InputError`` with its name where a network calls it, so that no other network is concerned.

    Returns:
        Whether the operations are the ones served here.

    Raises:
        InputError: If mmdet, or a system library that it loads, is missing, or versions differ.
    """
    if find_spec("mmdet") is None or find_spec("mmcv") is None:
        raise InputError(
            "detection must have mmdet and mmcv installed: pip install 'hawq-search[detection]'"
        )
    with warnings.catch_warnings():
        # mmcv itself imports from the place that it warns of; mmdet's texts hold escapes that
        # Python warns of once, when it compiles them. Neither is the caller's to mend.
        warnings.filterwarnings("ignore", ".*MultiScaleDeformableAttention", ImportWarning)
        warnings.filterwarnings("ignore", ".*invalid escape sequence")
        try:
            is_served = _put_in_place()
            import_module("mmdet.models")
        except ImportError as error:
            if not any(name in str(error) for name in ("libGL", "libglib", "libgthread")):
                raise
            raise InputError(
                f"OpenCV must find its system libraries, got {error}; "
                "on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0"
            ) from None
        except AssertionError as error:  # so mmdet and mmcv speak of versions, and of nothing else
            raise InputError(f"mmdet and mmcv must be of versions that fit: {error}") from None
    return is_served


def _put_in_place() -> bool:
    spec = find_spec(_EXTENSION)
    if spec is not None:
        return spec.origin == _ORIGIN
    extension = module_from_spec(ModuleSpec(_EXTENSION, None, origin=_ORIGIN))
    vars(extension).update(_SERVED, __getattr__=_refusing)
    sys.modules[_EXTENSION] = extension
    return True


def _refusing(name: str) -> Callable[..., NoReturn]:
    """Stand for an operation that nobody serves, as long as nobody calls it."""
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*_: object, **__: object) -> NoReturn:
        raise InputError(f"mmcv's {name} must be compiled, nothing serves it here: {_COMPILED}")

    return refuse


# --- boxes --------------------------------------------------------------------------------------


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    # Where pixels are counted, a box from 2 to 5 is 4 wide: it ends where the next one begins.
    ends = torch.tensor((0, 0, offset, offset)).to(boxes)
    kept: Tensor = torchvision.ops.nms(boxes + ends, scores, iou_threshold)
    return kept


# --- regions ------------------------------------------------------------------------------------


def _roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    _argmax_y: Tensor,
    _argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    if pool_mode != 1:
        raise InputError(f"mmcv's roi_align must have pool_mode 'avg', got 'max': {_COMPILED}")
    size = (aligned_height, aligned_width)
    pooled = torch.ops.torchvision.roi_align(
        features, rois, spatial_scale, *size, sampling_ratio, aligned
    )
    output.copy_(pooled)


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    _argmax_y: Tensor,
    _argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,  # noqa: ARG001  mmcv names it; the forward pass has refused all but one
    aligned: bool,
) -> None:
    size = (aligned_height, aligned_width)
    gradient = torch.ops.torchvision._roi_align_backward(
        grad_output, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
    )
    grad_input.add_(gradient)


def _roi_pool_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    height, width = features.shape[2:]
    starts, ends = rois[:, 1:3] * spatial_scale, (rois[:, 3:] + 1) * spatial_scale
    columns = _bins(starts[:, 0], ends[:, 0], pooled_width, width)
    rows = _bins(starts[:, 1], ends[:, 1], pooled_height, height)
    # One region at a time: all of them together would be a copy of the features for each.
    for n, image in enumerate(rois[:, 0].long().tolist()):
        lowest = torch.finfo(features.dtype).min
        spread = features[image].unsqueeze(2).masked_fill(~columns[n], lowest)
        across, at_x = spread.max(3)  # (C, H, pooled_width)
        spread = across.unsqueeze(1).masked_fill(~rows[n].unsqueeze(2), lowest)
        values, at_y = spread.max(2)  # (C, pooled_height, pooled_width)
        at = at_y * width + at_x.gather(1, at_y)
        is_empty = ~(rows[n].any(1).unsqueeze(1) & columns[n].any(1))
        output[n] = values.masked_fill(is_empty, 0)
        argmax[n] = at.masked_fill(is_empty, -1)


def _bins(start: Tensor, end: Tensor, num_bins: int, num_pixels: int) -> Tensor:
    """Tell which pixels are in which bin of which region, shape (R, bins, pixels)."""
    size = ((end - start) / num_bins).unsqueeze(1)
    edges = torch.arange(num_bins + 1, device=start.device)
    low = (edges[:-1] * size + start.unsqueeze(1)).floor().unsqueeze(2)
    high = (edges[1:] * size + start.unsqueeze(1)).ceil().unsqueeze(2)
    pixels = torch.arange(num_pixels, device=start.device)
    return (pixels >= low) & (pixels < high) & (size > 0).unsqueeze(2)


def _roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    *,
    pooled_height: int,  # noqa: ARG001  mmcv names both sizes; the gradient has them
    pooled_width: int,  # noqa: ARG001
    spatial_scale: float,  # noqa: ARG001  `argmax` says it all
) -> None:
    channels, height, width = grad_input.shape[1:]
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    at = planes[:, :, None, None] * (height * width) + argmax
    pooled = argmax >= 0
    grad_input.put_(at[pooled], grad_output[pooled], accumulate=True)


# --- deformable convolutions --------------------------------------------------------------------

# Both have torchvision's order of sizes; mmcv names them by device code's habit, each in its own.
_plain_sizes = itemgetter(
    "dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group"
)
_modulated_sizes = itemgetter(
    "stride_h",
    "stride_w",
    "pad_h",
    "pad_w",
    "dilation_h",
    "dilation_w",
    "group",
    "deformable_group",
)


def _deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    _columns: Tensor,
    _ones: Tensor,
    **sizes: int,
) -> None:
    unmasked, bias = x.new_zeros(len(x), 1), x.new_zeros(len(weight))
    output.copy_(
        torch.ops.torchvision.deform_conv2d(
            x, weight, offset, unmasked, bias, *_plain_sizes(sizes), False
        )
    )


def _deform_conv_backward_input(
    x: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    _columns: Tensor,
    **sizes: int,
) -> None:
    gradients = _plain_gradients(grad_output, x, weight, offset, sizes)
    grad_input.add_(gradients[0])
    grad_offset.add_(gradients[2])


def _deform_conv_backward_parameters(
    x: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    _columns: Tensor,
    _ones: Tensor,
    *,
    scale: float,
    **sizes: int,
) -> None:
    # A weight's gradient does not depend on the weight, which mmcv does not hand over.
    weight = torch.zeros_like(grad_weight)
    grad_weight.add_(_plain_gradients(grad_output, x, weight, offset, sizes)[1], alpha=scale)


def _plain_gradients(
    grad_output: Tensor, x: Tensor, weight: Tensor, offset: Tensor, sizes: dict[str, int]
) -> tuple[Tensor, ...]:
    """Return gradients in x, weight, offset, and in a mask and a bias that are not there."""
    unmasked, bias = x.new_zeros(len(x), 1), x.new_zeros(len(weight))
    gradients: tuple[Tensor, ...] = torch.ops.torchvision._deform_conv2d_backward(
        grad_output, x, weight, offset, unmasked, bias, *_plain_sizes(sizes), False
    )
    return gradients


def _modulated_deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    _ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    _columns: Tensor,
    *,
    with_bias: bool,
    **sizes: int,
) -> None:
    shift = bias if with_bias else x.new_zeros(len(weight))
    output.copy_(
        torch.ops.torchvision.deform_conv2d(
            x, weight, offset, mask, shift, *_modulated_sizes(sizes), True
        )
    )


def _modulated_deform_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    _ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    _columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **sizes: int,
) -> None:
    shift = bias if with_bias else x.new_zeros(len(weight))
    gradients = torch.ops.torchvision._deform_conv2d_backward(
        grad_output, x, weight, offset, mask, shift, *_modulated_sizes(sizes), True
    )
    targets = [grad_input, grad_weight, grad_offset, grad_mask]
    targets += [grad_bias] if with_bias else []
    for target, gradient in zip(targets, gradients, strict=False):
        target.add_(gradient)


# --- the focal loss -----------------------------------------------------------------------------


def _sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    p, q = logits.sigmoid(), (-logits).sigmoid()
    hit = -alpha * q**gamma * F.logsigmoid(logits)
    miss = (alpha - 1) * p**gamma * F.logsigmoid(-logits)
    output.copy_(torch.where(_one_hot(target, logits), hit, miss) * _of_class(weight, target))


def _sigmoid_focal_loss_backward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    *,
    gamma: float,
    alpha: float,
) -> None:
    p, q = logits.sigmoid(), (-logits).sigmoid()
    hit = -alpha * q**gamma * (q - gamma * p * F.logsigmoid(logits))
    miss = (alpha - 1) * p**gamma * (gamma * q * F.logsigmoid(-logits) - p)
    grad_input.copy_(torch.where(_one_hot(target, logits), hit, miss) * _of_class(weight, target))


def _one_hot(target: Tensor, logits: Tensor) -> Tensor:
    # A class that is none of the logits' is the background: a row of misses.
    return target.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)


def _of_class(weight: Tensor, target: Tensor) -> Tensor | int:
    return weight[target].unsqueeze(1) if len(weight) else 1


_SERVED: dict[str, Callable[..., Tensor | None]] = {
    "nms": _nms,
    "roi_align_forward": _roi_align_forward,
    "roi_align_backward": _roi_align_backward,
    "roi_pool_forward": _roi_pool_forward,
    "roi_pool_backward": _roi_pool_backward,
    "deform_conv_forward": _deform_conv_forward,
    "deform_conv_backward_input": _deform_conv_backward_input,
    "deform_conv_backward_parameters": _deform_conv_backward_parameters,
    "modulated_deform_conv_forward": _modulated_deform_conv_forward,
    "modulated_deform_conv_backward": _modulated_deform_conv_backward,
    "sigmoid_focal_loss_forward": _sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": _sigmoid_focal_loss_backward,
}
