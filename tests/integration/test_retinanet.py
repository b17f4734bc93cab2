"""The RetinaNet example on a made-up folder in COCO's format."""

import importlib.util
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_retinanet.py"
for _name in ("torchvision", "PIL"):
    if importlib.util.find_spec(_name) is None:
        pytest.skip(f"{_name} is not installed", allow_module_level=True)


@pytest.fixture
def folder(tmp_path):
    """Four images of 64 x 64, a bright rectangle in each; a crowd, an empty box and an image without a box."""
    from PIL import Image

    random, images, annotations = np.random.default_rng(0), [], []
    for i in range(5):
        pixels = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        x, y, width, height = (int(n) for n in random.integers(12, 32, 4))
        images.append({"id": 10 * i, "file_name": f"{i}.png", "width": 64, "height": 64})
        if i < 4:
            pixels[y : y + height, x : x + width, i % 2] = 255
            annotations.append({"image_id": 10 * i, "bbox": [x, y, width, height], "category_id": (7, 3)[i % 2]})
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    annotations += [
        {"image_id": 0, "bbox": [0, 0, 60, 60], "category_id": 3, "iscrowd": 1},
        {"image_id": 10, "bbox": [5, 5, 0, 9], "category_id": 3},
    ]
    categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "green"}]
    (tmp_path / "boxes.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return tmp_path


@pytest.mark.unpoisoned
def test_it_trains(folder, capsys):
    example = runpy.run_path(str(EXAMPLE))
    data = example["Coco"](folder, folder / "boxes.json")
    assert data.names == ["green", "red"] and len(data) == 4
    assert [target["labels"].tolist() for _, target in data] == [[1], [0], [1], [0]]
    for image, target in data:
        x, y, right, bottom = target["boxes"][0].int().tolist()
        assert image[:2, y:bottom, x:right].amax(0).min() == 1 and image[:2, :, :x].max() < 1
    losses = example["main"](
        [
            "--images",
            str(folder),
            "--annotations",
            str(folder / "boxes.json"),
            "--size",
            "64",
            "--epochs",
            "3",
            "--batch-size",
            "2",
            "--lr",
            "0.002",
            "--device",
            "cpu",
            "--out",
            str(folder / "out.pth"),
        ]
    )
    assert losses[-1] < losses[0] and (folder / "out.pth").exists()
    assert "cls_logits" in capsys.readouterr().out.split("left alone\n")[1]


@pytest.mark.unpoisoned
def test_weights_whose_labels_are_category_ids(folder):
    """torchvision publishes such: 91 classes for COCO's 80 categories. Here ids 3 and 7, and weights of 9 classes."""
    import torch

    example = runpy.run_path(str(EXAMPLE))
    data = example["Coco"](folder, folder / "boxes.json", 9)
    assert [target["labels"].tolist() for _, target in data] == [[7], [3], [7], [3]]
    model = example["torchvision"]().models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=9
    )
    torch.save(model.state_dict(), folder / "published.pth")
    example["main"](
        [
            "--images",
            str(folder),
            "--annotations",
            str(folder / "boxes.json"),
            "--size",
            "64",
            "--epochs",
            "1",
            "--batch-size",
            "4",
            "--device",
            "cpu",
            "--weights",
            str(folder / "published.pth"),
            "--out",
            str(folder / "out.pth"),
        ]
    )
    with pytest.raises(ValueError, match="ids up to 7: they do not go with weights of 5 classes"):
        example["Coco"](folder, folder / "boxes.json", 5)


def test_another_format_is_refused(folder):
    (folder / "boxes.json").write_text("{}")
    with pytest.raises(ValueError, match="boxes.json has no 'images': it is not in COCO's instances format"):
        runpy.run_path(str(EXAMPLE))["Coco"](folder, folder / "boxes.json")
