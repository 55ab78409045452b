"""Detectors through the whole search, on drawn rectangles; and what a wrong data set is told."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pictures import CLASSES, DETECTOR, SHIPPED, SSD, SSD_OPTIONS, TINY, draw_set

pytest.importorskip("mmdet", reason="needs the extra: pip install 'hawq-search[detection]'")

from hawq.curvature.choice import choose_estimator
from hawq.finetune import Recipe, evaluate, make_optimizer, train_epoch
from hawq.finetune.batch_norm import has_statistics
from hawq.reads import read_network
from hawq.space import quantizable_layers
from hawq.testing import check_task
from search.artefacts import Summary
from search.commands.doctor import examine_config
from search.config import TaskConfig
from search.config_file import load_config
from search.errors import InputError
from search.pictured import pictured, take_pictures
from search.pipeline import run
from search.spaces import reads_of, space_of
from search.tasks.build import build_task
from search.tasks.detection import DetectionTask
from search.tasks.detectors import detector_config
from search.tasks.mmcv_ops import serve_mmcv_ops
from search.tasks.rewritten import FoldedTask

serve_mmcv_ops()

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = {"train": 24, "val": 10, "test": 10}


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    return draw_set(tmp_path_factory.mktemp("rectangles") / "set", SIZES)


def make_task(root, **options):
    return DetectionTask(str(DETECTOR), str(root), json.dumps(TINY | options))


def test_a_detector_keeps_the_contract(rectangles):
    check_task(make_task(rectangles))


def test_the_splits_are_the_configs_own(rectangles):
    task = make_task(rectangles)
    assert {split: task.size(split) for split in ("train", "search", "test")} == {
        "train": 24,
        "search": 10,
        "test": 10,
    }
    assert not task.search_seen


def test_without_a_set_of_its_own_the_search_split_is_held_out(rectangles):
    given = TINY | {"test_dataloader.dataset.ann_file": "annotations/val.json"}
    task = DetectionTask(str(DETECTOR), str(rectangles), json.dumps(given), 6, from_checkpoint=True)
    assert (task.size("train"), task.size("search"), task.size("test")) == (18, 6, 10)
    assert task.search_seen
    together = {
        int(seed)
        for split in ("train", "search")
        for seed in task.batch(split, torch.arange(task.size(split)))["seed"]
    }
    assert together == set(range(24))


def test_mirroring_moves_boxes_with_their_pixels(rectangles):
    task = make_task(rectangles)
    batch = task.batch("train", torch.arange(24))
    mirrored = task.augment(batch, torch.Generator().manual_seed(0))
    moved = (batch["images"] != mirrored["images"]).flatten(1).any(1)
    assert 5 < moved.sum() < 20
    for n in range(24):
        for old, new, label in zip(
            batch["boxes"][n], mirrored["boxes"][n], batch["labels"][n], strict=True
        ):
            if label < 0:
                assert torch.equal(old, new)
                continue
            x, y = ((new[0] + new[2]) / 2).int(), ((new[1] + new[3]) / 2).int()
            colour = mirrored["images"][n, :, y, x]
            assert int(colour.argmax()) == label  # colours are normalized by much the same
            if not moved[n]:
                assert torch.equal(old, new)


def test_the_score_is_coco_s_own(rectangles):
    from mmdet.evaluation import CocoMetric  # noqa: PLC0415

    task = make_task(rectangles)
    model = task.model()
    recipe = Recipe(epochs=4, batch_size=4, lr=0.04, clip_norm=10.0, freeze_batch_norm=1.0)
    optimizer = make_optimizer(model, recipe)
    for epoch in range(recipe.epochs):
        train_epoch(model, optimizer, task, recipe, epoch=epoch, seed=0)
    score = evaluate(model.eval(), task, "test")
    metric = CocoMetric(str(rectangles / "annotations" / "test.json"), metric="bbox")
    metric.dataset_meta = {"classes": CLASSES}
    with torch.no_grad():
        for i in range(task.size("test")):
            batch = task.batch("test", torch.tensor([i]))
            (found,) = model.predict(batch["images"], task._samples(batch))
            size = task._data("test").infos[i]
            sample = found.to_dict() | {
                "img_id": size["img_id"],
                "ori_shape": (size["height"], size["width"]),
            }
            metric.process({}, [sample])
    expected = metric.evaluate(task.size("test"))["coco/bbox_mAP"]
    assert score.mean() > 0.01
    assert float(score.mean()) == pytest.approx(expected, abs=6e-4)  # it is rounded to 0.001


def test_a_folded_detector_keeps_the_contract_its_map_and_its_pictures(rectangles):
    task = make_task(rectangles)
    wrapped = pickle.loads(pickle.dumps(FoldedTask(task)))
    check_task(wrapped)
    assert not has_statistics(wrapped.model())
    plain, same = (pictured(t) for t in (task, wrapped))
    model = wrapped.model()
    assert take_pictures(same, {"fp32": model}) == take_pictures(plain, {"fp32": model})
    assert wrapped.remarks() == task.remarks()
    values = task.scores(model, task.batch("test", torch.arange(4)))
    assert torch.equal(wrapped.pooled(values), task.pooled(values))


def test_lists_are_of_the_kind_that_they_take_the_place_of(rectangles):
    given = TINY | {"model.backbone": {"strides": [1, 2, 2, 2], "out_indices": [0, 1, 2, 3]}}
    config = detector_config(str(DETECTOR), given)
    assert config.model.neck.in_channels == [4, 8, 16, 32]
    assert config.model.backbone.out_indices == (0, 1, 2, 3)
    assert config.model.backbone.strides == (1, 2, 2, 2)
    assert config.val_dataloader.dataset.pipeline[2].scale == (96, 64)
    assert config.val_dataloader.dataset.metainfo.classes == list(CLASSES)


def test_heads_that_levels_share_have_a_tensor_for_each(rectangles):
    task = make_task(rectangles)
    reads = read_network(task.model(), task.batch("train", torch.arange(1))["images"])
    of_class = [a.name for a in reads.activations if a.name.startswith("bbox_head.retina_cls#")]
    assert of_class == [f"bbox_head.retina_cls#{level}" for level in range(5)]


@pytest.mark.filterwarnings("ignore:DeprecationWarning. `num_anchors`")
@pytest.mark.parametrize(
    ("config", "reason"),
    list(zip(SHIPPED, ("RoIAlignFunction", "NativeGroupNorm"), strict=True)),
)
def test_other_detectors_are_looked_at_in_double_precision(rectangles, config, reason):
    task = DetectionTask(config, str(rectangles), json.dumps(SHIPPED[config]))
    model = task.model()
    layers = list(quantizable_layers(model))
    found = choose_estimator(task, model, layers, task.batch("train", torch.arange(2)))
    assert reason in found.reason


def written(folder, rectangles, **changes):
    config = {
        "seed": 0,
        "task": {
            "detector": {"config": str(DETECTOR), "root": str(rectangles), "options": TINY},
            "pretrain": {"epochs": 2, "batch_size": 4, "lr": 0.04, "clip_norm": 10},
        },
        "curvature": {"examples": 8, "batch_size": 2, "rtol": 0.3, "max_probes": 8},
        "weights": {"bits": [2, 4, 8]},
        "activations": {"menu": [4, 8]},
        "budgets": [{"compression": 8, "activation_compression": 4.6}],
        "methods": ["uniform", "hawq-v2", "channel"],
        "calibration": {"examples": 4, "choices": 4, "draws": 3},
        "finetune": {"epochs": 1, "batch_size": 4, "lr": 0.002, "clip_norm": 10},
    } | changes
    path = folder / "detector.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ssd(rectangles, config=SSD, **options):
    described = {"config": config, "root": str(rectangles), "options": SSD_OPTIONS | options}
    given = json.dumps({"detector": described, "pretrain": {"epochs": 1}})
    return build_task(TaskConfig.model_validate_json(given), 0)


def test_a_head_without_a_loss_module_finds_boxes(rectangles):
    task = ssd(rectangles, **{"model.bbox_head.num_classes": 3})
    check_task(task)
    with pytest.raises(InputError, match=r"num_classes must be 3, as the data has .* got 80"):
        ssd(rectangles)


def test_pictures_too_small_for_the_network_are_refused(rectangles, tmp_path):
    task = ssd(rectangles, "mmdet::ssd/ssd300_coco.py", **{"model.bbox_head.num_classes": 3})
    config = load_config(written(tmp_path, rectangles))
    with pytest.raises(InputError, match=r"inputs of shape \(1, 3, 64, 96\), got Calculated"):
        reads_of(config, task, task.model())


@pytest.mark.ray
@pytest.mark.slow
def test_a_detector_of_two_stages_goes_through_the_whole_search(ray_cluster, rectangles, tmp_path):
    path = written(tmp_path, rectangles)
    config, options = next(iter(SHIPPED.items()))
    detector = {"config": config, "root": str(rectangles), "options": options}
    out = tmp_path / "run"
    summary = run(load_config(path, [f"task.detector={json.dumps(detector)}"]), out)
    assert isinstance(summary, Summary)
    assert summary.model.score_name == "mAP"
    for said in ("RoIAlignFunction is marked once_differentiable", "smooth L1"):
        assert said in summary.curvature.reason
    for of_boxes in ("rpn_head.rpn_reg", "roi_head.bbox_head.fc_reg"):
        assert summary.curvature.trace[summary.curvature.layers.index(of_boxes)] > 0
    assert summary.curvature.activations is not None
    assert "rpn_head.rpn_cls#4" in summary.curvature.activations.layers
    assert len(summary.test.scores) >= 3
    page = (out / "report.html").read_text()
    assert "mAP" in page
    # A loss looks at 16 regions, and 50 are proposed: a budget is of the latter.
    assert f"{32 / 4.6:.2f} bits on average" in page


@pytest.mark.ray
@pytest.mark.slow
def test_an_agent_is_rewarded_by_map(ray_cluster, rectangles, tmp_path):
    path = written(
        tmp_path,
        rectangles,
        methods=["random", "cw-hawq"],
        searches={"evaluations": 3, "examples": 5},
    )
    summary = run(load_config(path), tmp_path / "run")
    assert summary.searches is not None
    for search in summary.searches.searches:
        assert len(search.evaluations) == 3
        assert all(0 <= found.score <= 1 for found in search.evaluations)


def broken(rectangles, tmp_path, change):
    root = tmp_path / "set"
    shutil.copytree(rectangles, root)
    path = root / "annotations" / "train.json"
    document = json.loads(path.read_text())
    change(document, root)
    path.write_text(json.dumps(document))
    return make_task(root)


def test_missing_images_are_named_five_at_most(rectangles, tmp_path):
    def remove(document, root):
        for i in range(7):
            (root / "images" / f"train_{i}.png").unlink()

    with pytest.raises(InputError, match=r"7 of 24 images are missing: .*train_0\.png.* …$"):
        broken(rectangles, tmp_path, remove).size("train")


def test_classes_that_the_annotations_lack_are_named(rectangles, tmp_path):
    def rename(document, root):
        document["categories"][1]["name"] = "grün"

    with pytest.raises(InputError, match=r"must be categories of .*train\.json .*got green"):
        broken(rectangles, tmp_path, rename).size("train")


def test_a_head_of_other_classes_than_the_data_s_is_refused(rectangles):
    task = make_task(rectangles, **{"model.bbox_head.num_classes": 5})
    with pytest.raises(InputError, match=r"num_classes must be 3, .*\(red, green, blue\), got 5"):
        task.model()


def test_a_picture_of_another_size_is_refused(rectangles, tmp_path):
    def widen(document, root):
        document["images"][0]["width"] = 500

    task = broken(rectangles, tmp_path, widen)
    with pytest.raises(InputError, match=r"train_0\.png must be 500×64 .* got 96×64"):
        task.batch("train", torch.arange(1))


def test_what_is_no_picture_is_refused(rectangles, tmp_path):
    def spoil(document, root):
        (root / "images" / "train_0.png").write_text("no picture")

    task = broken(rectangles, tmp_path, spoil)
    with pytest.raises(InputError, match=r"train_0\.png must be an image"):
        task.batch("train", torch.arange(1))


def test_boxes_of_no_area_or_outside_are_dropped_and_counted(rectangles, tmp_path):
    def spoil(document, root):
        box = document["annotations"][0]
        document["annotations"] += [
            box | {"id": 1000, "bbox": [3, 3, 0, 5], "area": 0},
            box | {"id": 1001, "bbox": [500, 3, 9, 9], "area": 81},
        ]

    task = broken(rectangles, tmp_path, spoil)
    assert any("2 boxes of train" in remark for remark in task.remarks())


def test_a_config_of_mmdetection_2_is_refused(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("model = dict(type='RetinaNet')\ndata = dict(train=dict())\n")
    with pytest.raises(InputError, match=r"must be of mmdetection 3\.x, got data = dict"):
        DetectionTask(str(path)).size("train")


def test_a_config_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"no\.py must be a file"):
        DetectionTask("no.py").size("train")


def test_a_loss_that_is_no_number_names_its_image(rectangles):
    task = make_task(rectangles)
    model = task.model()
    with torch.no_grad():
        model.bbox_head.retina_cls.bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"train_3\.png"):
        task.losses(model, task.batch("train", torch.tensor([3])))


def test_a_checkpoint_of_other_classes_is_refused(rectangles, tmp_path):
    from search.tasks.checkpoint import load_weights, save_state  # noqa: PLC0415

    task = make_task(rectangles)
    state = task.model().state_dict()
    state["bbox_head.retina_cls.weight"] = torch.zeros(12, 8, 3, 3)
    save_state(tmp_path / "x.safetensors", state)
    with pytest.raises(InputError, match=r"retina_cls\.weight is \(12, 8, 3, 3\), not"):
        load_weights(task.model(), tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """COCO's folders and classes, with a few drawn rectangles."""
    from mmdet.datasets import CocoDataset  # noqa: PLC0415

    classes = CocoDataset.METAINFO["classes"]
    root = draw_set(
        tmp_path_factory.mktemp("coco") / "set", {"train": 6, "val": 4}, classes=classes
    )
    for split in ("train", "val"):
        (root / f"{split}2017").symlink_to(root / "images")
        annotations = root / "annotations"
        (annotations / f"{split}.json").rename(annotations / f"instances_{split}2017.json")
    return root


@pytest.fixture
def paper(coco, tmp_path, monkeypatch):
    """The paper's config, on those, at the least size."""
    monkeypatch.setenv("COCO", str(coco))
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "weights.safetensors"))
    small = {
        f"{part}_dataloader.dataset.pipeline.{step}.scale": [96, 64]
        for part, step in (("train", 2), ("val", 1), ("test", 1))
    } | {"train_dataloader.dataset.filter_cfg": None}
    return load_config(
        CONFIGS / "coco_retinanet_r50.yaml",
        [f"task.detector.options={json.dumps(small)}", "task.search_size=2"],
    )


def test_the_costs_are_those_of_the_paper_s_table(paper):
    task = build_task(paper.task, 0)
    model = task.model()
    mib = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert mib == pytest.approx(144.8, abs=0.05)
    assert mib / 8.10 == pytest.approx(17.90, abs=0.05)
    reads = reads_of(paper, task, model)
    space = space_of(paper, reads, by_channel=False)
    limits = paper.budgets[0].limits(space)
    # The weights of layers, without biases and batch-norm, which stay as they are.
    assert limits["weight_bits"] / 8 / 2**20 == pytest.approx(17.90, rel=0.01)
    activations = space.part("activations")
    elements = sum(group.num_elements for group in activations.groups)
    for bits, compression in ((4, 8.00), (6, 5.33)):
        assert 32 * elements / (bits * elements) == pytest.approx(compression, abs=0.005)
    assert 32 * elements / limits["activation_bits"] == pytest.approx(7.62, abs=0.001)


def test_the_paper_s_detector_has_a_loss_and_a_score(paper):
    task = build_task(paper.task, 0)
    model = task.model()
    batch = task.batch("train", torch.arange(2))
    assert torch.isfinite(task.losses(model, batch)).all()
    assert task.scores(model, task.batch("test", torch.arange(1))).shape[0] == 1


def test_the_doctor_looks_at_a_config(rectangles, tmp_path):
    found = examine_config(written(tmp_path, rectangles), [])
    assert all(check.ok for check in found)
    assert any("24 train, 10 search, 10 test" in check.finding for check in found)
    wrong = examine_config(written(tmp_path, rectangles), ["task.detector.root=/nowhere"])
    assert [check.ok for check in wrong] == [True, False]
    assert "/nowhere/annotations/train.json" in wrong[1].finding
