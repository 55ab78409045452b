"""Detectors leave as graphs up to the outputs of their head, and are scored with them."""

import json

import pytest
import torch
from pictures import DETECTOR, TINY, draw_set
from torch.utils._pytree import tree_leaves, tree_structure, treespec_dumps

pytest.importorskip("mmdet", reason="needs the extra: pip install 'hawq-search[detection]'")

from hawq.export import encode, load, pack, read
from hawq.export.onnx_graph import onnx_graph
from hawq.finetune import attach, calibrate, evaluate, fixed_activations
from hawq.reads import read_network
from search.exported import ABOUT, network_of, read_exported
from search.tasks.detection import DetectionTask
from search.tasks.mmcv_ops import serve_mmcv_ops

serve_mmcv_ops()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = draw_set(
        tmp_path_factory.mktemp("rectangles") / "set", {"train": 8, "val": 4, "test": 6}
    )
    return DetectionTask(str(DETECTOR), str(root), json.dumps(TINY))


@pytest.fixture(scope="module")
def model(task):
    images = task.inputs(task.batch("train", torch.arange(4)))
    model = task.model()
    reads = read_network(model, images)
    bits = {f"w:{layer.name}": 4 for layer in reads.layers if layer.macs}
    attach(model, bits | fixed_activations(reads, 8, 8), images)
    calibrate(model, [images])
    return model.eval()


def test_a_detector_loads_back_to_the_same_bits(task, model):
    loaded = load(read(encode(pack(model))), task.model())
    assert torch.equal(evaluate(loaded, task, "test"), evaluate(model, task, "test"))


def test_a_detector_is_scored_by_what_its_graph_computes(task, model, tmp_path):
    packed = pack(model)
    images = task.inputs(task.batch("test", torch.arange(task.size("test"))))
    graph = onnx_graph(packed, task.model(), images[:2])
    with torch.no_grad():
        expected = model(images)
    entry = graph.model.metadata_props.add()
    outputs = treespec_dumps(tree_structure(expected))
    entry.key, entry.value = ABOUT, json.dumps({"batch": None, "outputs": outputs})
    (tmp_path / "file").write_bytes(graph.model.SerializeToString())
    network = network_of(read_exported(tmp_path / "file"), task)
    found = network(images)
    assert tree_structure(found) == tree_structure(expected)
    for mine, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert ((mine - other).abs() < 1e-3).float().mean() > 0.95
    scores = evaluate(network, task, "test")
    torch.testing.assert_close(scores, evaluate(model, task, "test"), rtol=0, atol=0.05)
