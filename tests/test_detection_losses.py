"""Losses of tiny detectors, image by image; their curvature against plain second derivatives."""

import copy
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hawq.curvature import estimate_traces, plan_traces
from hawq.curvature.probes import rademacher
from hawq.hessian_forms import hessian_form
from hawq.space import quantizable_layers
from hawq.task import Factor
from search.tasks.detection_losses import image_losses, output_factors, smoothing
from search.tasks.mmcv_ops import serve_mmcv_ops

pytest.importorskip("mmdet", reason="needs the extra: pip install 'hawq-search[detection]'")
# mmdet's own: an attribute that it has given another name, an argument that torch will want.
pytestmark = [
    pytest.mark.filterwarnings("ignore:DeprecationWarning. `num_anchors`"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
]
serve_mmcv_ops()
CONFIGS = Path(import_module("mmdet").__file__).parent / ".mim" / "configs"
MODELS = import_module("mmdet.registry").MODELS

FILES = {
    "retinanet": "retinanet/retinanet_r18_fpn_1x_coco.py",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "fcos-normed": "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
    "ssd": "ssd/ssd300_coco.py",
    "faster-rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
}
FACTORED = [name for name in FILES if name != "ssd"]
BETA = 0.11
SEEDS = (5, 6, 7)


@lru_cache
def described(name: str) -> Any:
    """The config's network: ResNet18 with eight channels, three classes, heads as small."""
    model = import_module("mmengine.config").Config.fromfile(str(CONFIGS / FILES[name])).model
    model.backbone = {
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "norm_cfg": {"type": "BN"},
        "norm_eval": True,
        "out_indices": (1, 2, 3) if name == "ssd" else (0, 1, 2, 3),
        "style": "pytorch",
    }
    if name == "ssd":
        model.neck = None
        model.bbox_head.update(in_channels=(16, 32, 64), num_classes=3)
        model.bbox_head.anchor_generator.update(
            input_size=64,
            strides=[8, 16, 32],
            ratios=([2], [2, 3], [2]),
            min_sizes=[12, 24, 40],
            max_sizes=[24, 40, 64],
        )
        return model
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    if name == "faster-rcnn":
        model.rpn_head.update(in_channels=8, feat_channels=8)
        model.roi_head.bbox_roi_extractor.update(out_channels=8)
        model.roi_head.bbox_head.update(in_channels=8, fc_out_channels=16, num_classes=3)
        model.train_cfg.rpn.sampler.num = 32
        model.train_cfg.rcnn.sampler.num = 16
        return model
    model.bbox_head.update(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=3)
    if name != "retinanet":
        model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 4, "requires_grad": True}
    return model


@lru_cache
def built(name: str) -> nn.Module:
    import_module("mmdet.utils").register_all_modules(init_default_scope=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(described(name)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def detector(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return copy.deepcopy(built(name)).to(dtype)


def examples(num: int, dtype: torch.dtype = torch.float32, size: int = 64) -> tuple[Tensor, list]:
    """Noise with one box in the first image, two in the second, and so on."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num, 3, size, size, generator=generator).to(dtype)
    sample = import_module("mmdet.structures").DetDataSample
    instances = import_module("mmengine.structures").InstanceData
    shape = (size, size)
    samples = []
    for i in range(num):
        corner = 30 * torch.rand(i + 1, 2, generator=generator)
        extent = 15 + 15 * torch.rand(i + 1, 2, generator=generator)
        one = sample(
            metainfo={
                "img_shape": shape,
                "pad_shape": shape,
                "batch_input_shape": shape,
                "scale_factor": (1.0, 1.0),
            }
        )
        one.gt_instances = instances(
            bboxes=torch.cat([corner, corner + extent], 1),
            labels=torch.randint(3, (i + 1,), generator=generator),
        )
        samples.append(one)
    return images, samples


def losses_of(
    model: nn.Module, num: int = 1, dtype: torch.dtype = torch.float32, smooth: float | None = BETA
) -> Tensor:
    return image_losses(model, *examples(num, dtype), smooth=smooth, seeds=SEEDS[:num])


def factors_of(
    model: nn.Module, num: int = 1, dtype: torch.dtype = torch.float32, smooth: float | None = BETA
) -> tuple[Tensor, list[Factor]]:
    found = output_factors(model, *examples(num, dtype), smooth=smooth, seeds=SEEDS[:num])
    assert found is not None
    return found


def hessian_product(loss: Tensor, weight: Tensor, z: Tensor) -> float:
    """zᵀ H z of one weight."""
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    if not slope.requires_grad:
        return 0.0
    (hz,) = torch.autograd.grad(slope, weight, z, retain_graph=True, materialize_grads=True)
    return float((hz * z).sum())


def gauss_newton_product(
    outputs: Tensor, factors: list[Factor], weight: Tensor, z: Tensor
) -> tuple[float, list[float]]:
    """zᵀ Jᵀ H J z of one weight, and its part of each factor."""
    u = torch.zeros_like(outputs, requires_grad=True)
    (pullback,) = torch.autograd.grad(outputs, weight, u, create_graph=True)
    (push,) = torch.autograd.grad(pullback, u, z, retain_graph=True)
    parts = []
    for factor in factors:
        s = outputs.new_zeros(len(outputs), factor.rank, requires_grad=True)
        (image,) = torch.autograd.grad(factor.apply(s), s, push)
        parts.append(factor.sign * float(image.square().sum()))
    return sum(parts), parts


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_images_at_once_have_the_losses_that_each_has_alone(name):
    model = detector(name, torch.float64)
    images, samples = examples(3, torch.float64)
    together = image_losses(model, images, samples, smooth=BETA, seeds=SEEDS)
    alone = [
        image_losses(model, images[i : i + 1], samples[i : i + 1], smooth=BETA, seeds=[SEEDS[i]])
        for i in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert len(set(together.tolist())) == 3


@pytest.mark.parametrize("name", FILES)
def test_one_image_has_the_detectors_own_loss(name):
    model = detector(name)
    images, samples = examples(1)
    found = image_losses(model, images, samples, smooth=None, seeds=[SEEDS[0]])
    # Its batch-norms stay in eval mode (norm_eval), as in the configs.
    model.train()
    torch.manual_seed(SEEDS[0])
    losses = model.loss(images, samples)
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(found, total[None])


@pytest.mark.parametrize("name", ["retinanet", "fcos-normed", "faster-rcnn"])
def test_a_detector_is_left_as_it_was(name):
    model = detector(name)
    images, samples = examples(2)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    with torch.no_grad():
        before = model.predict(images, samples)[0].pred_instances.scores
    torch.set_rng_state(torch_state)
    image_losses(model, images, samples, smooth=BETA, seeds=SEEDS[:2])
    with torch.no_grad():
        output_factors(model, images, samples, smooth=BETA, seeds=SEEDS[:2])
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(before, model.predict(images, samples)[0].pred_instances.scores)


def test_sampled_regions_depend_on_the_image_own_seed_alone():
    model = detector("faster-rcnn")
    images, samples = examples(2)

    def found(*seeds: int) -> list[float]:
        return image_losses(model, images, samples, smooth=None, seeds=seeds).tolist()

    torch.manual_seed(0)
    first = found(3, 4)
    torch.manual_seed(1)
    assert found(3, 4) == first
    assert found(3, 9)[0] == first[0]
    assert found(3, 9)[1] != first[1]


def test_no_gradient_goes_through_proposals():
    model = detector("faster-rcnn")
    images, samples = examples(1)
    weight = model.rpn_head.rpn_reg.weight
    whole = image_losses(model, images, samples, smooth=None, seeds=[3])
    torch.manual_seed(3)
    own = model.loss(images, samples)
    rpn = sum(sum(own[name]) for name in ("loss_rpn_cls", "loss_rpn_bbox"))
    (expected,) = torch.autograd.grad(rpn, weight)
    (gradient,) = torch.autograd.grad(whole.sum(), weight)
    torch.testing.assert_close(gradient, expected)


def test_focal_loss_is_given_one_hot_targets():
    model = detector("retinanet")
    dims = []
    model.bbox_head.loss_cls.register_forward_hook(lambda _, args, __: dims.append(args[1].dim()))
    losses_of(model)
    assert set(dims) == {2}


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_smoothing_that_is_not_positive_is_refused(beta):
    with pytest.raises(ValueError, match="smooth must be positive"):
        losses_of(detector("retinanet"), smooth=beta)


def test_every_image_wants_a_sample_and_a_seed():
    images, samples = examples(2)
    with pytest.raises(ValueError, match=r"one sample and one seed each, .*got 2, 2 and 1"):
        image_losses(detector("retinanet"), images, samples, smooth=None, seeds=[1])


def test_what_is_replaced_is_said():
    assert smoothing(detector("retinanet"), 1 / 9) == (
        "L1 of the boxes has no curvature (bbox_head.loss_bbox): smooth L1 with β = 0.11 in its "
        "place"
    )
    assert smoothing(detector("retinanet"), None) == (
        "L1 of the boxes has no curvature (bbox_head.loss_bbox)"
    )
    assert "rpn_head.loss_bbox, roi_head.bbox_head.loss_bbox" in smoothing(
        detector("faster-rcnn"), 0.1
    )
    assert smoothing(detector("fcos"), 0.1) == ""


# --- curvature ----------------------------------------------------------------------------------

# Layers that the loss modules' predictions are piecewise linear in, on a way that has second
# derivatives.
LINEAR = {
    "retinanet": None,
    "fcos-normed": ["bbox_head.conv_cls", "bbox_head.conv_reg", "bbox_head.conv_centerness"],
    "atss": ["bbox_head.atss_cls", "bbox_head.atss_centerness"],
    "gfl": ["bbox_head.gfl_cls"],
    "faster-rcnn": [
        "rpn_head.rpn_conv",
        "rpn_head.rpn_cls",
        "rpn_head.rpn_reg",
        "roi_head.bbox_head.shared_fcs.0",
        "roi_head.bbox_head.fc_cls",
        "roi_head.bbox_head.fc_reg",
    ],
}


@pytest.mark.parametrize("name", LINEAR)
def test_gauss_newton_is_the_hessian_where_predictions_are_piecewise_linear(name):
    model = detector(name, torch.float64)
    loss = losses_of(model, 2, torch.float64).sum()
    outputs, factors = factors_of(model, 2, torch.float64)
    layers = LINEAR[name] or list(quantizable_layers(model))
    products = []
    for i, layer in enumerate(layers):
        weight = model.get_submodule(layer).weight
        z = rademacher(weight.shape, torch.Generator().manual_seed(i), weight)
        expected = hessian_product(loss, weight, z)
        found, _ = gauss_newton_product(outputs, factors, weight, z)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12), layer
        products.append(expected)
    assert min(map(abs, products)) > 0


@pytest.mark.parametrize("name", FACTORED)
def test_without_gradients_the_factors_are_the_same(name):
    model = detector(name)
    outputs, factors = factors_of(model, 2)
    with torch.no_grad():
        same_outputs, same_factors = factors_of(model, 2)
    assert outputs.requires_grad
    assert not same_outputs.requires_grad
    assert torch.equal(outputs, same_outputs)
    for factor, same in zip(factors, same_factors, strict=True):
        assert (factor.rank, factor.sign) == (same.rank, same.sign)
        assert torch.equal(factor.energies, same.energies)


def test_l1_has_curvature_only_where_it_is_smooth():
    model = detector("retinanet", torch.float64)
    weight = model.bbox_head.retina_reg.weight
    # Near its targets, as a trained one is: where it is farther than β it has no curvature either.
    traces = {}
    for smooth in (None, 5.0):
        outputs, factors = factors_of(model, 1, torch.float64, smooth)
        traces[smooth], _ = gauss_newton_product(outputs, factors, weight, torch.ones_like(weight))
    assert traces[None] == 0.0
    assert traces[5.0] > 0.0


def test_negative_curvature_of_focal_loss_has_sign_minus_one():
    model = detector("retinanet", torch.float64)
    nn.init.constant_(model.bbox_head.retina_cls.bias, -4.0)  # positives far on the wrong side
    outputs, factors = factors_of(model, 1, torch.float64)
    assert [factor.sign for factor in factors] == [1.0, -1.0]
    weight = model.bbox_head.retina_cls.weight
    z = torch.ones_like(weight)
    found, (positive, negative) = gauss_newton_product(outputs, factors, weight, z)
    assert positive > 0 > negative
    expected = hessian_product(losses_of(model, 1, torch.float64).sum(), weight, z)
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_is_computed_outside_of_loss_modules_has_no_factors():
    images, samples = examples(1)
    model = detector("ssd")
    assert output_factors(model, images, samples, smooth=BETA, seeds=[1]) is None
    with torch.no_grad():
        assert output_factors(model, images, samples, smooth=BETA, seeds=[1]) is None


def test_a_loss_beside_the_loss_modules_is_noticed():
    model = detector("retinanet")
    inner = model.bbox_head.loss_by_feat

    def penalized(scores: Any, *rest: Any) -> dict[str, Any]:
        return inner(scores, *rest) | {"loss_size": 1e-3 * scores[0].square().sum()}

    model.bbox_head.loss_by_feat = penalized
    assert output_factors(model, *examples(1), smooth=BETA, seeds=[1]) is None


def test_a_weight_that_depends_on_the_network_is_noticed():
    model = detector("retinanet")
    inner = model.bbox_head.loss_by_feat_single

    def entangled(scores: Tensor, boxes: Tensor, anchors: Tensor, labels: Tensor, weights: Tensor,
                  *rest: Any, **options: Any) -> Any:  # fmt: skip
        weights = weights * (1 + boxes.mean())
        return inner(scores, boxes, anchors, labels, weights, *rest, **options)

    model.bbox_head.loss_by_feat_single = entangled
    assert output_factors(model, *examples(1), smooth=BETA, seeds=[1]) is None


def test_a_loss_on_boxes_is_found_in_blocks():
    loss = MODELS.get("GIoULoss")(reduction="sum")
    corner = 10 * torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    boxes, targets = (torch.cat([corner + d, corner + d + 9], 1).double() for d in (0.0, 2.0))
    form = hessian_form(lambda x: loss(x, targets), boxes)
    assert form is not None
    hessian = torch.autograd.functional.hessian(
        lambda x: loss(x.view(6, 4), targets), boxes.flatten()
    )
    torch.testing.assert_close(form.values.sum(), hessian.trace())
    assert bool((form.values < 0).any())


class Detection:
    """Four images as ``hawq.task.Objective``."""

    def __init__(self) -> None:
        self._images, self._samples = examples(4)

    def size(self, split: str) -> int:
        return 4

    def batch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._images[indices], indices

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        samples = [self._samples[i] for i in batch[1]]
        return image_losses(model, batch[0], samples, smooth=BETA, seeds=batch[1].tolist())

    def curvature(
        self, model: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, list[Factor]] | None:
        samples = [self._samples[i] for i in batch[1]]
        return output_factors(model, batch[0], samples, smooth=BETA, seeds=batch[1].tolist())


CHOICES = {
    ("retinanet", "weights"): ("mixed_gauss_newton", "a Hessian-vector product agrees"),
    ("retinanet", "activations"): ("mixed_gauss_newton", "a Hessian-vector product agrees"),
    ("ssd", "weights"): ("hutchinson", "the task gives no factor"),
    ("faster-rcnn", "weights"): ("gauss_newton", "RoIAlignFunction is marked once_different"),
    ("faster-rcnn", "activations"): ("mixed_gauss_newton", "RoIAlignFunction is marked once_dif"),
}


@pytest.mark.parametrize(("name", "subject"), CHOICES)
def test_the_estimator_is_chosen_and_estimates(name, subject):
    model = detector(name)
    layers = ["backbone.layer4.1.conv2"]
    layers += {
        "retinanet": ["bbox_head.retina_cls"],
        "ssd": ["bbox_head.reg_convs.0.0"],
        "faster-rcnn": ["rpn_head.rpn_cls", "roi_head.bbox_head.fc_cls"],
    }[name]
    plan, reason = plan_traces(
        Detection(), model, layers, subject=subject, batch_size=2, max_probes=4
    )
    estimator, why = CHOICES[name, subject]
    assert plan.estimator == estimator
    assert why in reason
    # A network that runs image by image anyway is taken so.
    assert plan.batch_size == (1 if name == "faster-rcnn" else 2)
    estimate = estimate_traces(Detection(), model, plan)
    assert np.isfinite(estimate.trace).all()
    if estimator != "hutchinson":
        assert (estimate.trace > 0).all()


@pytest.mark.slow
def test_hessian_products_of_a_full_retinanet_agree_with_differences_of_gradients():
    file = CONFIGS / "retinanet/retinanet_r50_fpn_1x_coco.py"
    described = import_module("mmengine.config").Config.fromfile(str(file)).model
    described.backbone.init_cfg = None
    import_module("mmdet.utils").register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    model = MODELS.build(described).eval().double()
    images, samples = examples(1, torch.float64, 64)
    weights = [
        model.get_submodule(name).weight
        for name in ("backbone.layer2.0.conv2", "neck.fpn_convs.0.conv", "bbox_head.retina_cls")
    ]

    def loss() -> Tensor:
        return image_losses(model, images, samples, smooth=BETA, seeds=[1]).sum()

    value = loss()
    for i, weight in enumerate(weights):
        z = rademacher(weight.shape, torch.Generator().manual_seed(i), weight)
        expected = hessian_product(value, weight, z)
        # So short that no kink of a ReLU is crossed: one that is makes nonsense of the difference.
        start, step = weight.detach().clone(), 1e-8
        gradients = []
        for distance in (step, -step):
            with torch.no_grad():
                weight.copy_(start + distance * z)
            gradients.append(torch.autograd.grad(loss(), weight)[0])
        with torch.no_grad():
            weight.copy_(start)
        found = float(((gradients[0] - gradients[1]) * z).sum() / (2 * step))
        assert found == pytest.approx(expected, rel=1e-6)
