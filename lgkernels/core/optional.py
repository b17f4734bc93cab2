"""Optional packages that need a little help to be imported."""

import torch

_schemas = []  # kept alive: a library's definitions go with it


def torchvision():
    """The module `torchvision`; ImportError where it is not installed.

    Its wheels are built against CUDA torch: beside a CPU torch two of its operators have no schema, and the import
    fails unless they are declared first.
    """
    if torch.version.cuda is None and not _schemas:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            try:
                library.define(schema)
            except RuntimeError:
                pass  # declared already
        _schemas.append(library)
    import torchvision
    import torchvision.models

    return torchvision
