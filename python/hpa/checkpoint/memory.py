"""The memory of past tasks that a method hands from edit to edit, as one safetensors file (METHOD 9).

    memory.<input>   [cols (cols+1)/2]   float32, lower triangle of a sum of Gram matrices, row by row
    tasks.<input>    []                  int64, how many tasks are in it

The file is read and written input by input: all of it never is in memory.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hpa.checkpoint.files import (
    DTYPE_NAMES,
    CheckpointError,
    encode_header,
    read_tensor,
    read_tensor_file,
    tensor_bytes,
)
from hpa.checkpoint.statistics import Statistics
from hpa.checkpoint.stream import HashedFile
from hpa.methods import Method

__all__ = ["Memory", "write_memory"]


class Memory:
    """A memory file; an empty one where there is none yet."""

    def __init__(self, path: Path | None, *, method: Method | None = None, keep: Statistics | None = None) -> None:
        """``keep``: Gram matrices that ``method`` takes in on top, of what the model can do and no task is about.

        Raises:
            CheckpointError: a file that is no memory.
        """
        self.path = path
        self._keep = keep
        self._kept = set[str]() if keep is None else _seen(keep)
        # One of its own: what the caller's holds of another input must not be mixed in.
        self._method = None if method is None else type(method)(method.config)
        self._tensors = {} if path is None else read_tensor_file(path).tensors
        odd = [name for name in self._tensors if not name.startswith(("memory.", "tasks."))]
        if odd:
            raise CheckpointError(f"{path}: not a memory of past tasks (it holds '{odd[0]}')")

    @property
    def keys(self) -> set[str]:
        """The inputs that it remembers."""
        told = {name.removeprefix("memory.") for name in self._tensors if name.startswith("memory.")}
        return told | self._kept

    def state(self, key: str) -> dict[str, Tensor]:
        """What :meth:`hpa.methods.base.Method.load_state_dict` takes, for one input."""
        names = (f"memory.{key}", f"tasks.{key}")
        old = {name: read_tensor(self._tensors[name]) for name in names if name in self._tensors}
        if self._keep is None or self._method is None:
            return old
        # Also where what is kept never reached this input: a memory that fades does so everywhere.
        seen = {key: self._keep.read(key, frozenset({"gram"}))} if key in self._kept else {}
        self._method.load_state_dict(old)
        self._method.remember_inputs(seen)
        state = self._method.state_dict()
        self._method.load_state_dict({})
        return state


def _seen(statistics: Statistics) -> set[str]:
    return {key for key, about in statistics.info.inputs.items() if not about.zero}


def write_memory(path: Path, method: Method, old: Memory, task: Statistics) -> str:
    """``old`` and a task's Gram matrices, as ``method`` sums them up; the new file's SHA-256."""
    learned = _seen(task)
    keys = sorted(old.keys | learned)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key in keys:
        if key in learned:
            cols = task.info.inputs[key].cols
            shape: tuple[int, ...] = (cols * (cols + 1) // 2,)
        else:
            shape = tuple(old.state(key)[f"memory.{key}"].shape)
        shapes[f"memory.{key}"] = ("F32", shape)
        shapes[f"tasks.{key}"] = ("I64", ())
    out = HashedFile(path)
    try:
        out.write(encode_header(shapes, {"hpa": "memory"}))
        for key in keys:
            method.load_state_dict(old.state(key))
            if key in task.info.inputs:
                method.observe_edited({key: task.read(key, frozenset({"gram"}))})
            method.finish_task()
            state = method.state_dict()
            for name in (f"memory.{key}", f"tasks.{key}"):
                tensor = state[name]
                if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != shapes[name]:
                    raise CheckpointError(
                        f"{old.path or 'memory'}: '{name}' is {tuple(tensor.shape)}, expected {shapes[name][1]}"
                    )
                out.write(tensor_bytes(tensor))
        method.load_state_dict({})
        return out.close()
    except BaseException:
        out.abandon()
        raise
