"""What goes from one decoder block to the next, for all samples: in memory as far as it may be, else in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa.checkpoint.files import read_bytes, tensor_bytes

__all__ = ["HiddenStates"]


class HiddenStates:
    """A list of tensors of which at most ``memory`` bytes are held.

    The first ones that fit stay in memory; the others lie in a file that has no name, so that nothing is left of it
    whatever becomes of the process.  Bytes go there and come back as they are.
    """

    def __init__(self, memory: int | None = None, folder: Path | None = None) -> None:
        """``memory``: bytes, or ``None`` for no bound; ``folder``: where the file is made, by default the system's."""
        self.memory, self._folder = memory, folder
        self._held: dict[int, Tensor] = {}
        self._on_disk: dict[int, _Place] = {}
        self._file: Any = None
        self._end = 0

    def __len__(self) -> int:
        return len(self._held.keys() | self._on_disk.keys())

    @property
    def bytes_held(self) -> int:
        return sum(tensor.nbytes for tensor in self._held.values())

    @property
    def bytes_on_disk(self) -> int:
        return sum(place.room for place in self._on_disk.values())

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        self._held.pop(index, None)
        if self.memory is None or self.bytes_held + tensor.nbytes <= self.memory:
            self._held[index] = tensor
            self._on_disk.pop(index, None)
            return
        place = self._on_disk.get(index)
        if place is None or place.room < tensor.nbytes:
            place = self._on_disk[index] = _Place(self._end, tensor.nbytes)
            self._end += tensor.nbytes
        place.shape, place.dtype, place.device = tensor.shape, tensor.dtype, tensor.device
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed by clear()
        view, at = tensor_bytes(tensor.detach().cpu()), place.start
        try:
            while len(view):
                done = os.pwrite(self._file.fileno(), view, at)
                view, at = view[done:], at + done
        except OSError as error:
            folder = tempfile.gettempdir() if self._folder is None else self._folder
            what = f"{error.strerror} for the hidden states that memory does not hold (--max-memory says how much)"
            raise OSError(error.errno, what, str(folder)) from error

    def __getitem__(self, index: int) -> Tensor:
        if index in self._held:
            return self._held[index]
        place = self._on_disk[index]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        read_bytes(self._file.fileno(), place.start, tensor_bytes(tensor), Path("hidden states"))
        return tensor.to(place.device)

    def clear(self) -> None:
        self._held, self._on_disk, self._end = {}, {}, 0
        if self._file is not None:
            self._file.close()
            self._file = None


class _Place:
    """Where in the file a tensor lies."""

    def __init__(self, start: int, room: int) -> None:
        self.start, self.room = start, room
        self.shape = torch.Size()
        self.dtype = torch.float32
        self.device = torch.device("cpu")
