"""How an op is made: one way for every family.

    @define(backends_of="lls_loss", package=__package__, fake=_loss_fake, check=_check_loss)
    def lls_loss_forward(kernels, activation: Tensor, options: HeadOptions, ...) -> tuple[Tensor, ...]:
        return kernels.head(...)

registers `torch.ops.lgkernels.lls_loss_forward(activation, <the fields of HeadOptions>, ..., impl)`:

- The schema comes from the annotations. A NamedTuple among the arguments is flat there and whole in the
  function.
- `kernels` is the backend's module, chosen by `impl`, device and dtype inside of the op, so that a compiled graph
  holds one opaque call and no look-ups of the environment.
- The op is a door: what native code will trust is checked here, whoever calls. Every tensor is dense, lies on one
  device, has memory and one of its `dtypes`, and is no wrapper (a DTensor, say) whose address means nothing; one that
  is written to does not overlap itself; sizes, and words such as the name of a law, are for `check(*arguments)`.
- An ambient autocast is switched off: inside of an op the dtypes are settled. No graph is recorded inside of it either:
  plain torch on the way differentiates no further than a kernel.

`define`/`impl` of `torch.library` instead of `custom_op`: a third of the call's cost.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from . import checks, dispatch, environment, kept, trust
from .checks import autocasts
from .tiles import type_of
from .trial import Trial

LIBRARY = torch.library.Library("lgkernels", "FRAGMENT")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, an ambient autocast does not touch the arithmetic."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else contextlib.nullcontext()


def class_indices(
    name: str, target: torch.Tensor, num_classes: int, ignore_index: int | None = None, what: str = "class indices"
) -> torch.Tensor:
    """Contiguous int64; range-checked where looking at them costs no synchronisation, or when LGKERNELS_CHECK=1.

    While a graph is being traced, and inside of torch.func's transforms, there are no values to look at.
    """
    given = target
    if target.dtype != torch.int64:
        checks.integer(name, target, f"{what} are expected")
        target = target.long()
    if (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and (target.device.type == "cpu" or environment.is_on("LGKERNELS_CHECK"))
    ):
        # uint64 above 2**63 would wrap around to what another class, or ignore_index, is
        values = given.cpu() if given.dtype == torch.uint64 else target
        checks.class_indices(name, values, num_classes, ignore_index, what)
    return target.contiguous()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype that it is computed in (`wide_dtype`)."""
    return tensor.to(wide_dtype(tensor.dtype))


def of_first(*arguments: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first argument: what chooses the backend of most ops."""
    return arguments[0].device, arguments[0].dtype


def define(
    *,
    backends_of: str,
    package: str,
    fake: Callable,
    check: Callable | None = None,
    prepare: Callable | None = None,
    where: Callable[..., tuple[torch.device, torch.dtype]] = of_first,
    mutates: Sequence[str] = (),
    dtypes: Mapping[str, Sequence[torch.dtype]] = {},
    backends: Sequence[str] | None = None,
    choose: Callable | None = None,
) -> Callable[[Callable], Callable]:
    """Decorator of the function that runs an op on a backend; see the module.

    Args:
        backends_of: name under which the op's backends are chosen, shown by `info`; ops that
            belong together (a forward and its backward) share one.
        package: the family's, `__package__`: its modules are the backends.
        fake: shapes and dtypes of the results: takes the op's arguments without `impl`, NamedTuples whole.
        check: raises where the arguments do not fit each other; takes them as `fake` does.
        prepare: makes what the function keeps between calls (`core/kept.py`); takes `kernels` and what `fake` takes.
            It is called while the op is traced: at the first run of the graph the memory may be a CUDA graph's.
        where: device and dtype that choose the backend, from the arguments.
        mutates: names of the arguments that are written to.
        dtypes: of the tensors that are none of `checks.FLOATING`, by name.
        backends: those that there are; default: every one that has a file in the package.
        choose: takes `impl` and the arguments, returns the backend's module; where device and dtype do not settle it.
    """

    def register(function: Callable) -> Callable:
        dispatch.register(backends_of, package, backends)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        flat, pack = _flattened(parameters)
        schema = _schema(function, flat, mutates)
        names = tuple(p.name for p in flat)
        op = trust.Op(function.__name__, function, names, pack, _trial(package, function), backends_of)
        trust.OPS[op.name] = op
        tensors = [
            (i, p.name, dtypes.get(p.name, checks.FLOATING))
            for i, p in enumerate(flat)
            if "Tensor" in str(p.annotation)
        ]
        written = [(i, name) for i, name in enumerate(names) if name in mutates]

        def implementation(*arguments):
            impl, own = arguments[-1], pack(arguments[:-1])
            device, dtype = where(*own)
            for i, name, kinds in tensors:
                tensor = arguments[i]
                if (
                    tensor is None
                    or type(tensor) in _PLAIN
                    and tensor.device == device
                    and tensor.dtype in kinds
                    and tensor.data_ptr()
                ):
                    continue  # nearly always
                for one in tensor if type(tensor) is list else (tensor,):
                    require_memory(name, one, device)
                    _require_dtype(name, one, kinds)
            for i, name in written:
                tensor = arguments[i]
                for one in () if tensor is None else tensor if type(tensor) is list else (tensor,):
                    require_no_overlap(name, one)
            if check is not None:
                check(*own)
            kernels = choose(impl, *own) if choose else dispatch.backend(backends_of, impl, device, dtype)
            if torch.is_grad_enabled():  # in a backward with create_graph=True, or called from outside
                with torch.no_grad(), without_autocast(device):
                    return function(trusted(kernels, impl, device, arguments), *own)
            if torch._C._is_any_autocast_enabled():
                with without_autocast(device):
                    return function(trusted(kernels, impl, device, arguments), *own)
            return function(trusted(kernels, impl, device, arguments), *own)

        def trusted(kernels, impl, device, arguments):
            """These kernels where they may be used, else plain torch."""
            if type_of(device) not in trust.DEVICE_TYPES or kernels is None or not dispatch.is_auto(impl):
                return kernels
            backend = kernels.__name__.rpartition(".")[2]
            if backend not in trust.BACKENDS or trust.policy() != "first-use":
                return kernels
            reference = dispatch.reference_module(backends_of)
            admitted = trust.admits(op, backend, kernels, reference, arguments[:-1])
            return kernels if admitted else dispatch.fallback_module(backends_of)

        def shapes(*arguments):
            own = pack(arguments[:-1])
            device, dtype = where(*own)
            for name, tensor in _tensors(tensors, arguments):  # one on the meta device brings the others here
                _require_device(name, tensor, device)
            if prepare is not None and kept.present(device):
                for kernels in dispatch.candidates(backends_of, arguments[-1], device, dtype):
                    prepare(kernels, *own)
            return fake(*own)

        def refuse(*arguments):
            for name, tensor in _tensors(tensors, arguments):
                checks.tensor(name, tensor)
                if tensor.is_quantized:
                    raise TypeError(f"{name} must be a dense tensor, got {tensor.dtype}; use .dequantize()")
            raise TypeError(f"{function.__name__} takes dense tensors alone")

        function.implementation = implementation  # type: ignore[attr-defined]
        function.trusted = trusted  # type: ignore[attr-defined]
        LIBRARY.define(function.__name__ + schema)
        LIBRARY.impl(function.__name__, implementation, "CompositeExplicitAutograd")
        for key in _NOT_DENSE:  # by the dispatcher: a dense tensor's call pays nothing for it
            LIBRARY.impl(function.__name__, refuse, key)
        torch.library.register_fake(f"lgkernels::{function.__name__}", shapes, lib=LIBRARY)
        return function

    return register


def _trial(package: str, function: Callable) -> Trial | None:
    """How the op's kernels prove themselves on a GPU, by the family's `trials.py`."""
    if importlib.util.find_spec(f"{package}.trials") is None:
        return None
    return importlib.import_module(f"{package}.trials").TRIALS.get(function.__name__)


# -- the schema -----------------------------------------------------------------------------------------------------


def _is_options(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def _flattened(parameters: list[inspect.Parameter]) -> tuple[list[inspect.Parameter], Callable[[tuple], tuple]]:
    """The parameters with the fields of NamedTuples in their place, and what packs flat arguments again."""
    flat: list[inspect.Parameter] = []
    spans = []
    for parameter in parameters:
        start = len(flat)
        if _is_options(parameter.annotation):
            hints = inspect.get_annotations(parameter.annotation)
            flat += [parameter.replace(name=name, annotation=hints[name]) for name in parameter.annotation._fields]
            spans.append((parameter.annotation, start, len(flat)))
        else:
            flat.append(parameter)
            spans.append((None, start, start))
    if all(kind is None for kind, _, _ in spans):
        return flat, lambda arguments: arguments

    def pack(arguments):
        return tuple(
            [
                arguments[start] if kind is None else tuple.__new__(kind, arguments[start:end])
                for kind, start, end in spans
            ]
        )

    return flat, pack


def _schema(function: Callable, flat: list[inspect.Parameter], mutates: Sequence[str]) -> str:
    plain = [inspect.Parameter(p.name, p.POSITIONAL_OR_KEYWORD, annotation=p.annotation) for p in flat]
    plain.append(inspect.Parameter("impl", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=str))

    def prototype(*arguments):
        pass

    prototype.__signature__ = inspect.Signature(plain, return_annotation=inspect.signature(function).return_annotation)
    return torch.library.infer_schema(prototype, mutates_args=set(mutates))


# -- the door -------------------------------------------------------------------------------------------------------

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_LAYOUTS = ("Sparse", "SparseCsr", "Quantized", "NestedTensor")
_NOT_DENSE = [layout + device for layout in _LAYOUTS for device in ("CPU", "CUDA")]
_NOT_DENSE += ["SparseMeta", "SparseCsrMeta", "MkldnnCPU", "AutogradNestedTensor"]
_plain_types = dict.fromkeys(_PLAIN, True)


def has_an_address(kind: type) -> bool:
    """Whether the memory of a tensor of this class is its own: a subclass that intercepts every operation
    (`__torch_dispatch__`) may hold its values elsewhere."""
    if kind not in _plain_types:
        _plain_types[kind] = kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return _plain_types[kind]


def _tensors(places: Sequence[tuple], arguments: tuple) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor among the arguments, those of lists too."""
    for i, name, _ in places:
        argument = arguments[i]
        if type(argument) is list:
            for tensor in argument:
                yield name, tensor
        elif argument is not None:
            yield name, argument


def _require_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the op's other tensors, got {tensor.device}")


def _require_dtype(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype)[6:] for dtype in dtypes)
        raise TypeError(f"{name} must be one of {expected}, got {checks.dtype_of(tensor)}")


def require_memory(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless the tensor's address means what native code will take it for."""
    if not has_an_address(type(tensor)):
        raise TypeError(
            f"{name} must be a plain torch.Tensor, got {type(tensor).__name__}, whose values lie elsewhere: pass its "
            "local tensor (DTensor: .to_local(), or .full_tensor())"
        )
    _require_device(name, tensor, device)
    if device.type == "cpu" and not tensor.data_ptr() and tensor.numel():
        raise ValueError(
            f"{name} must have memory, got a tensor of shape {tuple(tensor.shape)} whose storage was freed"
        )


def require_no_overlap(name: str, tensor: torch.Tensor) -> None:
    """Raise where two elements of a tensor that is written to lie in one place, as torch's operations in place do."""
    if 0 in tensor.stride() and any(n > 1 and not s for n, s in zip(tensor.shape, tensor.stride())):
        raise ValueError(
            f"{name} must have memory of its own for each element, as it is written to in place, got shape "
            f"{checks.shape_of(tensor)} with strides {tuple(tensor.stride())}; use .contiguous()"
        )
