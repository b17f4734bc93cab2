"""`python -m lgkernels plan`: which ways of training a model fit into a given memory."""

import argparse
from typing import Any

import torch

from ..core import optional
from ..training.attention import KINDS
from ..training.planner import parse_memory, plan, plot
from . import weights

# torchvision's names of networks that are among our own
OWN = {"resnet50": "resnet50", "vit_b_16": "vit-b-16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command ``plan``."""
    parser.add_argument(
        "--model", required=True, help=f"name of a torchvision model: a ResNet or a ViT ({', '.join(OWN)} without it)"
    )
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224, help="height and width")
    parser.add_argument("--memory", default="inf", help="what there is, e.g. 8GB or 24GiB")
    parser.add_argument("--optimizer-state", type=int, default=1, help="values per parameter: momentum 1, Adam 2")
    parser.add_argument("--attention", choices=KINDS, default="flash")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart (needs matplotlib)")


def main(arguments: argparse.Namespace) -> int:
    """The command ``plan``. Returns the exit code."""
    name = arguments.model
    try:
        models: Any = optional.torchvision().models
    except ImportError as error:
        if name not in OWN:
            print(
                f"plan --model {name} needs torchvision, which is not here ({error}); without it there are "
                f"{', '.join(OWN)}; from Python, lgkernels.plan(model, input) takes any model"
            )
            return 1
        models = None
        if name.startswith("vit") and arguments.image != 224:
            print(f"--model {name} without torchvision takes --image 224 alone, got {arguments.image}")
            return 2
    kinds = ("resnet", "vit", "wide_resnet", "resnext")
    if models and not (name.startswith(kinds) and callable(getattr(models, name, None))):
        print(f"--model must be a ResNet or vision transformer of torchvision, got {name!r}")
        return 2
    for key, least in (("classes", 1), ("batch", 1), ("image", 1), ("optimizer_state", 0)):
        value = getattr(arguments, key)
        if value < least:
            print(f"--{key.replace('_', '-')} must be at least {least}, got {value}")
            return 2
    try:
        memory = parse_memory(arguments.memory)
    except ValueError as error:
        print(f"--{error}")
        return 2
    try:
        with torch.device("meta"):
            options = {"image_size": arguments.image} if name.startswith("vit") else {}
            if models is None:
                model = weights.network(OWN[name], 3, arguments.classes)
            else:
                model = getattr(models, name)(num_classes=arguments.classes, **options)
        table = plan(
            model,
            (arguments.batch, 3, arguments.image, arguments.image),
            memory,
            optimizer_state=arguments.optimizer_state,
            attention=arguments.attention,
        )
    except (ValueError, AssertionError, RuntimeError) as error:  # torch's, of sizes
        print(f"--model {name} cannot take --image {arguments.image} with --batch {arguments.batch}: {error}")
        return 2
    print(table)
    if arguments.plot:
        try:
            plot(table, arguments.plot)
        except (ImportError, OSError, ValueError) as error:
            print(f"--plot {arguments.plot} cannot be written: {error}")
            return 2
    return 0
