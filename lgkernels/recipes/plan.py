"""`python -m lgkernels plan`: which ways of training a model fit into a given memory."""

import argparse
import contextlib
import os
from typing import Any

import torch

from ..core import optional
from ..training.attention import KINDS
from ..training.planner import Plan, parse_memory, plan, plot
from . import weights

# torchvision's names of networks that are among our own
OWN = {"resnet50": "resnet50", "vit_b_16": "vit-b-16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command ``plan``."""
    parser.add_argument(
        "--model",
        required=True,
        help=f"name of a torchvision model: a ResNet or a ViT ({', '.join(OWN)} without it); with --seq a kind of "
        "model of transformers (gpt2, llama, bert, ...) in its usual sizes, or a folder with a config.json",
    )
    parser.add_argument("--seq", type=int, help="tokens of a sample: a language model of transformers")
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
    if arguments.seq is not None:
        return _of_tokens(arguments)
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
    memory = _memory(arguments, (("classes", 1), ("batch", 1), ("image", 1), ("optimizer_state", 0)))
    if memory is None:
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
    return _shown(table, arguments.plot)


def _memory(arguments: argparse.Namespace, least: tuple[tuple[str, int], ...]) -> float | None:
    """Bytes; None, with a line, where an option is wrong."""
    for key, low in least:
        value = getattr(arguments, key)
        if value < low:
            print(f"--{key.replace('_', '-')} must be at least {low}, got {value}")
            return None
    try:
        return parse_memory(arguments.memory)
    except ValueError as error:
        print(f"--{error}")
        return None


def _shown(table: Plan, chart: str | None) -> int:
    print(table)
    if chart:
        try:
            plot(table, chart)
        except (ImportError, OSError, ValueError) as error:
            print(f"--plot {chart} cannot be written: {error}")
            return 2
    return 0


def _of_tokens(arguments: argparse.Namespace) -> int:
    """`--seq`: a causal language model, or the masked one where there is no such, without weights."""
    try:
        with contextlib.suppress(ImportError):
            optional.torchvision()  # transformers imports it where it is
        import transformers
    except ImportError as error:
        print(
            f"plan --seq needs transformers, which is not here ({error}); from Python, lgkernels.plan takes any model"
        )
        return 1
    memory = _memory(arguments, (("seq", 1), ("batch", 1), ("optimizer_state", 0)))
    if memory is None:
        return 2
    name = arguments.model
    try:
        configs = transformers.AutoConfig
        config = configs.from_pretrained(name) if os.path.isdir(name) else configs.for_model(name)
        kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM)
        kind = next((k for k in kinds if type(config) in k._model_mapping), None)
        if kind is None:
            raise ValueError(f"no language model has the config {type(config).__name__}")
        with torch.device("meta"):
            model = kind.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        print(f"--model must be a kind of language model of transformers, or a folder with one, got {name!r}: {error}")
        return 2
    x = torch.zeros((arguments.batch, arguments.seq), dtype=torch.long, device="meta")
    try:
        table = plan(model, x, memory, optimizer_state=arguments.optimizer_state, attention=arguments.attention)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        print(f"--model {name} cannot take --seq {arguments.seq} with --batch {arguments.batch}: {error}")
        return 2
    return _shown(table, arguments.plot)
