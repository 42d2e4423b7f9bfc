"""A plugin of pytest that pretends that there is a GPU (`pytest -p pretend_gpu`), for the tests' own sake: that those
which run on a GPU where there is one make, mix and read tensors as a GPU has them.

Tensors on "cuda" are wrappers around tensors on the CPU.  Like those of a GPU they cannot be mixed with others, nor be
read by numpy; the backend ``cuda`` is the emulator.  The stream is a number, which the emulator has to be told.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from hpa_ext import backend

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_emulation"))

STREAM = 0xC0DA
# What takes tensors of two devices.
MIXING = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> OnGpu:
        # Asked for when one is made; later the mode below is there first, and hpa_ext takes no tensors that have one.
        cls.__torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: run(func, args, kwargs))
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",  # what torch's own code sees: it has no guard for a device that is not there
            requires_grad=requires_grad,
        )
        cls.__torch_dispatch__ = torch.Tensor.__torch_dispatch__
        self.inner = inner
        return self

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def cpu(self) -> torch.Tensor:
        return self.detach().inner.clone()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"


def inner_of(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    on_gpu = any(isinstance(t, OnGpu) for t in tensors)
    if on_gpu and func._schema.name.removeprefix("aten::") not in MIXING:
        for tensor in tensors:
            if not isinstance(tensor, OnGpu) and tensor.dim() > 0:
                raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu")
    device = kwargs.get("device")
    wrap = on_gpu if device is None else torch.device(device).type == "cuda"
    plain = {**kwargs, "device": "cpu"} if device is not None and wrap else kwargs
    out = func(*tree_map(inner_of, args), **tree_map(inner_of, plain))
    # A copy to the other device must be one.
    if device is not None and func._schema.name == "aten::_to_copy" and wrap != on_gpu:
        out = out.clone()
    if not wrap:
        return out
    out = tree_map(lambda t: OnGpu(t) if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_gpu else out


class PretendMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def tensor(data: Any, *, device: Any = None, build: Any = torch.tensor, **options: Any) -> torch.Tensor:
    """torch.tensor, which copies to the device where no mode sees it."""
    chosen = torch.device(device or torch.utils._device.CURRENT_DEVICE or "cpu")
    made = build(inner_of(data), device="cpu", **options)
    return OnGpu(made) if chosen.type == "cuda" else made


class EmulatedModule:
    """The emulated module, for tensors of the pretended GPU alone."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        if not callable(function) or name == "unavailable":
            return function

        def call(where: Any, *args: Any) -> None:
            index, stream, empty = where
            assert (index, stream) == (0, STREAM)
            for tensor in tree_flatten(args)[0]:
                assert not isinstance(tensor, torch.Tensor) or isinstance(tensor, OnGpu), f"{name}: a tensor on the CPU"
            function((index, stream, lambda count: inner_of(empty(count))), *tree_map(inner_of, args))

        return call


def pytest_configure(config: pytest.Config) -> None:
    import build

    module = EmulatedModule(build.module())
    backend.cuda_extension = lambda: module
    PretendMode().__enter__()


def runs_on_gpu(parameters: dict[str, Any]) -> bool:
    return "cuda" in (parameters.get("device"), parameters.get("backend"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on the CPU run without this plugin."""
    chosen = [item for item in items if hasattr(item, "callspec") and runs_on_gpu(item.callspec.params)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


# From the import on: fixtures ask when they are defined.
backend.cuda_trouble = lambda: None
backend.triton_trouble = lambda device: "a pretended GPU has none"
torch.cuda._lazy_init = lambda: None
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=STREAM)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.tensor = tensor
