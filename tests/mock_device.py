"""A device that is not there: CPU tensors that say they are on cuda:0, and a record of what a GPU would have to do.

The real code runs on them, alone or as rank zero of PyTorch's fake process group, and every operator passes through
`Device`, which notes by file and line of this package: synchronisations between host and device, operators (taken as
one launch each), copies between host and device, collectives with dtype and device. It refuses what a GPU would refuse:
operators over tensors of both sides. It knows nothing of streams, time or memory. Each rank of the fake group brings
what rank zero does.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import rkdo_dist

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PACKAGE = str(Path(rkdo_dist.__file__).parent) + "/"
_PASSED = {PACKAGE + "exchange/transfer.py"}  # who calls it is meant
# The host must wait for the result, or for the number of its elements.
_WAITS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave",
}  # fmt: skip
_NO_LAUNCH = {
    "_unsafe_view", "unsafe_split", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_",
    "resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "detach_", "is_same_size", "sym_size", "lift_fresh",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class OnDevice(Tensor):
    """A tensor that says it is on cuda:0; its numbers are in `on_host`."""

    on_host: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: Tensor) -> OnDevice:
        self = Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            requires_grad=on_host.requires_grad,
        )
        self.on_host = on_host.detach()
        return self

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.on_host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the mock device is used outside of `Device`")


class Device(TorchDispatchMode):
    """What the device was asked for.

    Attributes:
        waits: synchronisations by "file:line what".
        operators: launches by "file:line"; "encoder" for its forward and backward pass, "optimizer" for torch's.
        copies: from host memory that is "pinned" or "pageable", by "file:line kind".
        unsafe: copies to the host that nothing waits for, by "file:line".
        collectives: by "file:line name dtype device".
    """

    def __init__(self) -> None:
        super().__init__()
        self._pinned: dict[int, Tensor] = {}  # by address; held, so that no address is used twice
        self.clear()

    def clear(self) -> None:
        """Begin to count again."""
        self.waits, self.operators, self.copies, self.unsafe, self.collectives = (Counter[str]() for _ in range(5))

    def upload(self, tensor: Tensor, waits: bool) -> None:
        """A copy to the device."""
        if waits:
            self.waits[f"{place()} upload"] += 1
        self.copies[f"{place()} {'pinned' if self.is_pinned(tensor) else 'pageable'}"] += 1

    def download(self, waits: bool, what: str = "download") -> None:
        """A copy to the host."""
        if waits:
            self.waits[f"{place()} {what}"] += 1
        else:
            self.unsafe[place()] += 1

    def pin(self, tensor: Tensor) -> Tensor:
        """Note that a tensor is in page-locked memory."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether it is."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            return self._collective(func, name, args)
        tensors = _tensors((args, tuple(kwargs.values())))
        here = any(isinstance(x, OnDevice) for x in tensors)
        asked = kwargs.get("device")
        made_here = asked is not None and torch.device(asked).type == "cuda"
        if made_here:
            kwargs["device"] = CPU
        if name == "_to_copy":
            if made_here and not here:
                self.upload(args[0], waits=not kwargs.get("non_blocking"))
            elif here and asked is not None and not made_here:
                self.download(waits=not kwargs.get("non_blocking"))
        elif name in ("copy_", "_copy_from"):
            into, source = args[:2]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            if isinstance(into, OnDevice) and not isinstance(source, OnDevice):
                self.upload(source, waits)
            elif here and not isinstance(into, OnDevice):
                self.download(waits)
        elif here:
            self._refuse_mixed(name, args, tensors)
            if name in _WAITS or (name in _INDEXING and _by_mask(name, args)):
                self.waits[f"{place()} {name}"] += 1
        if (here or made_here) and not func.is_view and name not in _NO_LAUNCH:
            self.operators[place()] += 1
        out = func(*_each(_inside, args), **{key: _each(_inside, value) for key, value in kwargs.items()})
        to_host = name == "_to_copy" and asked is not None and not made_here
        if to_host or name in ("_local_scalar_dense", "equal") or not (here or made_here):
            return out
        out = _each(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if here else out

    def _refuse_mixed(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """A GPU takes scalars of the host, and indices, which it then waits for; nothing else."""
        strange = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        if strange and name in _INDEXING and isinstance(args[0], OnDevice):
            for index in strange:
                self.upload(index, waits=True)
        elif strange:
            raise RuntimeError(f"{place()}: {name} over tensors of cuda:0 and cpu")

    def _collective(self, func: Any, name: str, args: Any) -> Any:
        """Note it, and fill what it gives as if every rank brought what this one does."""
        tensors = _tensors(args)
        for tensor in tensors[-1:]:
            self.collectives[f"{place()} {name.strip('_')} {str(tensor.dtype)[6:]} {tensor.device.type}"] += 1
        inner = _each(_inside, args)
        if name == "alltoall_base_":  # the fake group refuses to bring rows of nothing, as other ranks may
            alike = torch.empty(dist.get_world_size())
            out = func(alike, alike, inner[2], [], [], *inner[5:])
        else:
            out = func(*inner)
        if name in ("_allgather_base_", "alltoall_base_", "_reduce_scatter_base_", "gather_", "allgather_"):
            for target in _tensors(inner[:1]):
                _fill(target, _tensors(inner[1:])[0])
        elif name == "recv_":
            _tensors(inner)[0].detach().zero_()
        work = out[-1] if isinstance(out, tuple) else out
        return (args[0], work) if isinstance(out, tuple) else work


class _Functions(TorchFunctionMode):
    """What never becomes an operator, because a tensor of the mock device is a CPU tensor to torch's own code."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replaced = _REPLACED.get(func)
        if replaced is not None:
            found = replaced(self._device, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


def _to(there: Device, /, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], Tensor):  # another one's device and dtype
        args = (args[0].device, args[0].dtype, *args[1:])
        found = _to(there, x, *args, **kwargs)
        return Tensor.to(x, *args, **kwargs) if found is NotImplemented else found
    if not isinstance(x, OnDevice):
        return NotImplemented  # becomes an operator
    words, target = list(args), kwargs.pop("device", None)
    if words and (words[0] is None or isinstance(words[0], (str, torch.device))):
        target = words.pop(0)
    if target is None or torch.device(target).type == "cuda":
        return Tensor.to(x, *words, **kwargs)
    given = dict(zip(("dtype", "non_blocking"), words, strict=False)) | kwargs
    there.download(waits=not given.pop("non_blocking", False))
    return x.on_host.to(**{k: v for k, v in given.items() if k != "copy"}).clone()


def _cpu(there: Device, /, x: Tensor, *_: Any) -> Any:
    return _to(there, x, CPU)


def _tolist(there: Device, /, x: Tensor) -> Any:
    if not isinstance(x, OnDevice):
        return NotImplemented
    there.download(waits=True, what="tolist")
    return x.on_host.tolist()


def _numpy(there: Device, /, x: Tensor, **_: Any) -> Any:
    if isinstance(x, OnDevice):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
    return NotImplemented


def _made(of: Callable[..., Tensor]) -> Callable[..., Any]:
    """torch.tensor and torch.as_tensor: what is made of numbers on the host is uploaded from pageable memory."""

    def make(there: Device, /, data: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("device")
        if asked is None or torch.device(asked).type != "cuda" or isinstance(data, OnDevice):
            return NotImplemented
        made = of(data, **{**kwargs, "device": CPU})
        there.upload(made, waits=True)
        return OnDevice(made)

    return make


def _new_tensor(there: Device, /, like: Tensor, data: Any, **kwargs: Any) -> Any:
    if not isinstance(like, OnDevice):
        return NotImplemented
    return _made(torch.tensor)(there, data, **{"dtype": like.dtype, "device": CUDA, **kwargs})


def _pin_memory(there: Device, /, x: Tensor, *_: Any) -> Any:
    return there.pin(x.clone())


def _is_pinned(there: Device, /, x: Tensor, *_: Any) -> Any:
    return there.is_pinned(x)


def _pinned(of: Callable[..., Tensor]) -> Callable[..., Any]:
    def make(there: Device, /, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return there.pin(of(*args, **kwargs)) if pin_memory else NotImplemented

    return make


_REPLACED: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.tolist: _tolist,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.new_tensor: _new_tensor,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: _is_pinned,
    torch.tensor: _made(torch.tensor),
    torch.as_tensor: _made(torch.as_tensor),
    torch.empty: _pinned(torch.empty),
    torch.zeros: _pinned(torch.zeros),
}


def place() -> str:
    """Who asks: "file:line" of this package, "encoder" for its forward and backward pass, "optimizer" for torch's."""
    frame, backward = sys._getframe(1), torch._C._current_graph_task_id() != -1
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and name not in _PASSED:
            file = name.removeprefix(PACKAGE)
            pushes = backward and file.startswith("training/") and frame.f_code.co_name == "backward"
            return "encoder" if pushes or file.startswith("encoders/") else f"{file}:{frame.f_lineno}"
        if "/torch/optim/" in name:
            return "optimizer"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def by_file(counts: Counter[str]) -> Counter[str]:
    """Sums over the lines of a file."""
    found: Counter[str] = Counter()
    for where, count in counts.items():
        found[re.sub(r":\d+", "", where)] += count
    return found


@contextlib.contextmanager
def mock_device(world: int = 1) -> Iterator[Device]:
    """While entered, `CUDA` is there, and this process is rank zero of `world` over "NCCL"."""
    assert not dist.is_initialized()
    device = Device()
    generator = torch.zeros(1, dtype=torch.uint8)
    replaced: dict[str, Any] = {
        "torch.__future__._overwrite_module_params_on_conversion": True,  # of the host's type they stay otherwise
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.get_rng_state": lambda device=None: generator,
        "torch.cuda.set_rng_state": lambda state, device=None: None,
        "torch.distributed.get_backend": lambda group=None: "nccl",
        "torch.distributed.all_gather_object": lambda out, value, group=None: _objects(device, out, value),
        # Kernels of Triton cannot be launched: the field is computed by eager operators, as without a compiler.
        "rkdo_dist.field.fused.find_spec": lambda name: None,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        for name, function in replaced.items():
            stack.enter_context(mock.patch(name, function))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        if world > 1:
            dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        stack.enter_context(device)
        stack.enter_context(_Functions(device))
        yield device


def _objects(device: Device, out: list[Any], value: Any) -> None:
    device.collectives[f"{place()} objects"] += 1
    out[:] = [value] * len(out)


def _each(change: Callable[[Any], Any], tree: Any) -> Any:
    """Of nested lists and tuples, which arguments of operators are."""
    return type(tree)([_each(change, x) for x in tree]) if type(tree) in (tuple, list) else change(tree)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(lambda x: found.append(x) if isinstance(x, Tensor) else None, tree)
    return found


def _inside(x: Any) -> Any:
    return x.on_host if isinstance(x, OnDevice) else x


def _by_mask(name: str, args: Any) -> bool:
    """Whether elements are chosen by a mask, whose number the host must know; one value put there needs none."""
    masks = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return masks and not (name != "index" and args[2].numel() == 1)


def _fill(target: Tensor, source: Tensor) -> None:
    flat = target.detach().view(-1)
    if flat.numel() and source.numel():
        repeats = -(-flat.numel() // source.numel())
        flat.copy_(source.detach().reshape(-1).repeat(repeats)[: flat.numel()])
    else:
        flat.zero_()
