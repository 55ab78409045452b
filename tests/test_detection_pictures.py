"""Pictures of detections, read as the XML that they are."""

import base64
import io
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from search.report.detection_pictures import DetectionPicture, Panel, detection_pictures

NAMES = ("RBC", "WBC", "Platelets")
HEIGHT, WIDTH = 240, 320
BOX = st.tuples(
    st.integers(0, WIDTH - 2), st.integers(0, HEIGHT - 2), st.integers(1, 200), st.integers(1, 200)
).map(lambda b: (b[0], b[1], min(b[0] + b[2], WIDTH), min(b[1] + b[3], HEIGHT)))


def panel(boxes, labels, scores=None):
    return Panel(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        None if scores is None else np.array(scores, np.float32),
    )


def picture(seed=0, names=NAMES, **panels):
    corners = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), np.uint8)
    image = np.asarray(Image.fromarray(corners).resize((WIDTH, HEIGHT)))
    given = panels or {
        "true": panel([(10, 20, 60, 70), (100, 100, 150, 160), (5, 5, 300, 200)], [0, 0, 1]),
        "fp32": panel([(11, 20, 60, 71), (200, 50, 220, 70)], [0, 2], [0.98, 0.29]),
    }
    return DetectionPicture(image, given, names)


def parsed(*pictures, **options):
    return ElementTree.fromstring(detection_pictures(pictures, **options))


def drawings(tree):
    return [svg for svg in tree.iter("svg") if svg.get("role") == "img"]


def place(element):
    return tuple(float(element.get(name)) for name in ("x", "y", "width", "height"))


def tags(svg):
    return [place(rect) for rect in svg.iter("rect") if rect.get("style")]


def test_each_panel_says_aloud_what_is_in_it():
    labels = [svg.get("aria-label") for svg in drawings(parsed(picture(), picture(1)))]
    assert labels == [
        "Image 1, true: 2 RBC and 1 WBC",
        "Image 1, fp32: 1 RBC",
        "Image 2, true: 2 RBC and 1 WBC",
        "Image 2, fp32: 1 RBC",
    ]


def test_boxes_stand_where_they_were_found_with_class_and_score():
    _, svg = drawings(parsed(picture(), least_score=0.2))
    assert svg.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    boxes = [place(rect) for rect in svg.iter("rect") if rect.get("class") == "box"]
    assert boxes == [(11, 20, 49, 51), (200, 50, 20, 20)]
    assert [text.text for text in svg.iter("text")] == ["RBC 0.98", "Platelets 0.29"]


def test_boxes_that_a_network_is_less_sure_of_are_left_out_and_the_page_says_so():
    tree = parsed(picture(), least_score=0.3)
    true, found = drawings(tree)
    assert [text.text for text in true.iter("text")] == ["RBC", "RBC", "WBC"]
    assert [text.text for text in found.iter("text")] == ["RBC 0.98"]
    assert "boxes below 0.30 are left out" in " ".join("".join(tree.itertext()).split())


def test_a_class_has_one_color_everywhere_and_a_place_in_the_legend_if_it_occurs():
    later = picture(
        1,
        names=("RBC", "WBC", "cell", "other"),
        true=panel([(0, 0, 9, 9)], [2]),
        fp32=panel([], []),
    )
    tree = parsed(picture(), later)
    legend = {
        item.find("svg").tail: item.find("svg/rect").get("stroke") for item in tree.iter("li")
    }
    assert set(legend) == {"RBC", "WBC", "cell"}
    assert len(set(legend.values())) == 3
    for svg in drawings(tree):
        strokes = [rect.get("stroke") for rect in svg.iter("rect") if rect.get("class") == "box"]
        words = [text.text.split()[0] for text in svg.iter("text")]
        assert strokes == [legend[word] for word in words]


def test_an_image_is_embedded_once_and_every_panel_shows_it():
    pictures = [picture(0), picture(1)]
    tree = parsed(*pictures)
    images = {image.get("id"): image.get("href") for image in tree.iter("image")}
    assert len(images) == 2
    shown = [svg.find("image") for svg in drawings(tree)]
    used = [svg.find("use") for svg in drawings(tree)]
    assert [image is not None for image in shown] == [True, False, True, False]
    assert [use.get("href")[1:] for use in used if use is not None] == list(images)
    for given_picture, href in zip(pictures, images.values(), strict=True):
        data = base64.b64decode(href.removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(data)) as jpeg:
            seen = np.asarray(jpeg, float)
        assert seen.shape == given_picture.image.shape
        assert np.abs(seen - given_picture.image).mean() < 3


def test_a_large_image_is_made_smaller_and_its_boxes_still_fit():
    image = np.zeros((1200, 1600, 3), np.uint8)
    large = DetectionPicture(image, {"true": panel([(1500, 1100, 1600, 1200)], [0])}, NAMES)
    (svg,) = drawings(parsed(large))
    data = base64.b64decode(svg.find("image").get("href").partition(",")[2])
    with Image.open(io.BytesIO(data)) as jpeg:
        assert jpeg.size == (800, 600)
    assert svg.get("viewBox") == "0 0 1600 1200"
    assert svg.find("image").get("width") == "1600"


def test_names_are_text_and_never_markup():
    odd = '<script>"&'
    tree = parsed(picture(names=(odd, odd, odd), **{odd: panel([(0, 0, 9, 9)], [0])}))
    assert not list(tree.iter("script"))
    assert drawings(tree)[0].get("aria-label") == f"Image 1, {odd}: 1 {odd}"


@settings(max_examples=30)
@given(st.lists(BOX, max_size=30), st.integers(1, 30))
def test_every_tag_is_whole_wherever_its_box_is(boxes, letters):
    named = picture(names=("x" * letters,), fp32=panel(boxes, [0] * len(boxes), [0.5] * len(boxes)))
    (svg,) = drawings(parsed(named))
    found = tags(svg)
    assert len(found) == len(boxes)
    for x, y, width, height in found:
        assert x >= 0
        assert y >= 0
        assert x + width <= WIDTH + 0.1 or x == 0
        assert y + height <= HEIGHT + 0.1


def test_tags_of_boxes_over_one_another_do_not_hide_one_another():
    twins = panel([(100, 100, 200, 200), (102, 101, 201, 202)], [0, 1], [0.9, 0.8])
    (svg,) = drawings(parsed(picture(fp32=twins)))
    (x, y, width, height), (u, v, _, _) = tags(svg)
    assert u >= x + width or v >= y + height or v + height <= y


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, r"image must be uint8 of shape \(H, W, 3\), got"),
        ({"image": np.zeros((4, 4, 3))}, "got float64"),
        ({"panels": {}}, "panels must hold at least one"),
        ({"panels": {"a": panel([(0, 0, 1, 1)], [3])}}, r"labels of panel a .* 0..2, got 3..3"),
        ({"panels": {"a": panel([(0, 0, 1, 1)], [0, 1])}}, "panel a must have shapes"),
        ({"panels": {"a": panel([(0, 0, 1, 1)], [0], [])}}, "panel a must have shapes"),
    ],
)
def test_what_cannot_be_shown_is_refused(change, message):
    fitting = {"image": np.zeros((4, 4, 3), np.uint8), "panels": {"a": panel([], [])}}
    DetectionPicture(**fitting, class_names=NAMES)
    with pytest.raises(ValueError, match=message):
        DetectionPicture(**(fitting | change), class_names=NAMES)


def test_no_pictures_are_refused():
    with pytest.raises(ValueError, match="pictures must hold at least one, got none"):
        detection_pictures([])


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "num_columns"), [(500, 1), (1280, 3)])
def test_a_browser_stacks_panels_on_a_phone_and_needs_no_sideways_scrolling(
    tmp_path, width, num_columns
):
    wide = picture(**{name: panel([(0, 0, 9, 9)], [0]) for name in ("true", "fp32", "4 bits")})
    script = (
        "const lefts = [...document.querySelectorAll('figure')].map(f => f.offsetLeft);"
        "document.title = `${document.documentElement.scrollWidth} of ${innerWidth}, "
        "${new Set(lefts).size} columns`;"
    )
    page = f"<!DOCTYPE html><main>{detection_pictures([wide])}</main><script>{script}</script>"
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-sync --no-first-run "
        "--disable-background-networking --disable-component-update --hide-scrollbars "
        f"--window-size={width},900 --virtual-time-budget=8000 --dump-dom"
    )
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command.append((tmp_path / "page.html").as_uri())
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f"<title>{width} of {width}, {num_columns} columns</title>" in dom
