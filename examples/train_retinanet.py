"""RetinaNet with sign-symmetric feedback on a folder in COCO's format (torchvision and Pillow):

    python examples/train_retinanet.py --images train2017 --annotations instances_train2017.json --weights retinanet.pth

`--weights` is a state_dict of torchvision's retinanet_resnet50_fpn, for the folder's number of classes or, as the one
that torchvision publishes, with COCO's category ids as labels; `--backbone` one of its ResNet-50. The last layers of
both heads, class and box, have the exact gradient.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import lgkernels
from lgkernels.core.optional import torchvision
from lgkernels.recipes.readers import DataError, pillow

HEADS = ("head.classification_head.cls_logits", "head.regression_head.bbox_reg")


class Coco(Dataset):
    """Images with at least one box that is no crowd; labels 0 ... C - 1 in the order of the category ids. With more
    `classes` than categories the labels are those ids."""

    def __init__(self, images, annotations, classes=None):
        content = json.loads(Path(annotations).read_text())
        for key in ("images", "annotations", "categories"):
            if key not in content:
                raise DataError(f"{annotations} has no {key!r}: it is not in COCO's instances format")
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.folder, self.names = Path(images), [category["name"] for category in categories]
        ids = [category["id"] for category in categories]
        self.classes = classes or len(ids)
        if self.classes < len(ids) or self.classes > len(ids) and not 0 <= min(ids) <= max(ids) < self.classes:
            raise DataError(
                f"{annotations} has {len(ids)} categories with ids up to {max(ids)}: they do not go with "
                f"weights of {self.classes} classes"
            )
        label = {k: k if self.classes > len(ids) else i for i, k in enumerate(ids)}
        boxes = {}
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            if not entry.get("iscrowd") and width > 0 and height > 0:
                box = (x, y, x + width, y + height, label[entry["category_id"]])
                boxes.setdefault(entry["image_id"], []).append(box)
        self.items = [(image["file_name"], boxes[image["id"]]) for image in content["images"] if image["id"] in boxes]
        if not self.items:
            raise DataError(f"{annotations} has no image with a box")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        name, boxes = self.items[i]
        with pillow().open(self.folder / name) as file:
            image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float() / 255
        boxes = torch.tensor(boxes)
        if torch.rand(()) < 0.5:  # mirrored
            image = image.flip(-1)
            boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
        return image, {"boxes": boxes[:, :4], "labels": boxes[:, 4].long()}


def main(arguments=None):
    """The mean loss of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--rule", default="usf", help="as lgkernels.convert's, bp: back-propagation")
    parser.add_argument("--weights")
    parser.add_argument("--backbone")
    parser.add_argument("--size", type=int, default=800, help="the shorter side of the images")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", default="retinanet.pth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    weights = torch.load(options.weights, weights_only=True) if options.weights else None
    anchors = 9  # of a position
    data = Coco(
        options.images,
        options.annotations,
        len(weights["head.classification_head.cls_logits.bias"]) // anchors if weights else None,
    )
    model = torchvision().models.detection.retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=data.classes,
        min_size=options.size,
        max_size=options.size * 5 // 3,
    )
    if weights:
        model.load_state_dict(weights)
    if options.backbone:
        model.backbone.body.load_state_dict(torch.load(options.backbone, weights_only=True), strict=False)  # no fc
    lgkernels.convert(model.to(options.device), options.rule, exclude=HEADS)
    loader = DataLoader(data, options.batch_size, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], options.lr, 0.9, weight_decay=1e-4)
    steps = options.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * steps // 3, 8 * steps // 9], 0.1)
    model.train()
    history = []
    for epoch in range(options.epochs):
        total = 0.0
        for images, targets in loader:
            losses = model(
                [image.to(options.device) for image in images],
                [{key: t.to(options.device) for key, t in target.items()} for target in targets],
            )
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        history.append(total.item() / len(loader))
        print(f"epoch {epoch + 1}: loss {history[-1]:.3f}", flush=True)
        torch.save(model.state_dict(), options.out)
    return history


if __name__ == "__main__":
    main()
