"""Checkpoint folders as they lie on disk: headers, tensors and side files, without a model class.

A safetensors file is an 8-byte length, a JSON header and the tensors' bytes.  Headers are read and checked here, for
they come from strangers; tensors are read by position into memory of their own, never by mapping the file, so that
what is resident is what is worked on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpa.checkpoint.buffers import Buffers

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "CheckpointError",
    "Folder",
    "TensorFile",
    "TensorInfo",
    "encode_header",
    "fingerprint",
    "read_tensor",
    "read_tensor_file",
    "tensor_bytes",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

# Files that Python's pickle can run code from, and weights in other formats: never read, never copied.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS = (".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".npz")


class CheckpointError(ValueError):
    """A checkpoint, adapter or statistics file cannot be used; the message says which, and what was expected."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, or one expert's matrix in it: where it is and what it is, without its values."""

    name: str
    dtype: str  # as the format writes it: BF16, F32 ...
    shape: tuple[int, ...]
    path: Path
    offset: int  # of the first byte, from the beginning of the file
    size: int  # bytes
    transposed: bool = False  # a matrix [rows, cols] whose bytes are those of [cols, rows]

    @property
    def is_floating(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")

    def part(self, first: int, last: int) -> TensorInfo:
        """Some of the numbers of a vector."""
        width = DTYPES[self.dtype].itemsize
        return replace(self, shape=(last - first,), offset=self.offset + first * width, size=(last - first) * width)

    def expert(self, number: int, transposed: bool) -> TensorInfo:
        """The matrix of one expert, of a tensor ``[experts, rows, cols]`` or (transposed) ``[experts, cols, rows]``."""
        experts, *sides = self.shape
        size = self.size // experts
        shape = tuple(reversed(sides)) if transposed else tuple(sides)
        return replace(self, shape=shape, offset=self.offset + number * size, size=size, transposed=transposed)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file's header."""

    path: Path
    tensors: dict[str, TensorInfo]  # in the order of their bytes
    metadata: dict[str, str]
    size: int  # bytes, of the whole file


def read_tensor_file(path: Path) -> TensorFile:
    """The checked header of a safetensors file.

    Raises:
        CheckpointError: no such file, a torn or foreign file, and every way in which a header can be wrong.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > LARGEST_HEADER:
                raise CheckpointError(f"{path}: not a safetensors file (no header length in its first 8 bytes)")
            if 8 + length > size:
                raise CheckpointError(f"{path}: truncated: the header takes {length} bytes, the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        header = json.loads(raw)
    except ValueError:
        raise CheckpointError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is not a JSON object)")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is not a JSON object")
    found = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items()]
    found.sort(key=lambda info: (info.offset, info.size))
    position = 8 + length
    for info in found:
        if info.offset != position:
            raise CheckpointError(f"{path}: the bytes of '{info.name}' overlap or leave a gap; the header is damaged")
        position += info.size
    if position > size:
        raise CheckpointError(f"{path}: truncated: its tensors end at byte {position}, the file has {size}")
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor; the file is damaged")
    return TensorFile(path, {info.name: info for info in found}, {str(k): str(v) for k, v in metadata.items()}, size)


def _tensor_info(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    where = f"{path}: tensor '{name}'"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise CheckpointError(f"{where}: expected a list of sizes as shape, got {shape!r}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(isinstance(offset, int) and offset >= 0 for offset in offsets)
        or offsets[1] < offsets[0]
    ):
        raise CheckpointError(f"{where}: expected [begin, end] as data_offsets, got {offsets!r}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise CheckpointError(f"{where}: {dtype} {shape} takes {size} bytes, its offsets say {offsets[1] - offsets[0]}")
    return TensorInfo(name, dtype, tuple(shape), path, data + offsets[0], size)


def read_tensor(info: TensorInfo, buffers: Buffers | None = None) -> Tensor:
    """The tensor's values, in memory from ``buffers``, or that torch allocated.

    Raises:
        CheckpointError: the file became shorter since its header was read.
    """
    dtype = DTYPES[info.dtype]
    shape = info.shape[::-1] if info.transposed else info.shape
    tensor = torch.empty(shape, dtype=dtype) if buffers is None else buffers.empty(shape, dtype)
    if info.size:
        with open(info.path, "rb", buffering=0) as file:
            read_bytes(file.fileno(), info.offset, tensor_bytes(tensor), info.path)
    return tensor.T.contiguous() if info.transposed else tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where its elements lie side by side."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_bytes(descriptor: int, offset: int, target: memoryview, path: Path) -> None:
    """Fill ``target`` from a file's bytes at ``offset``."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count <= 0:
            raise CheckpointError(f"{path}: truncated while it was read, at byte {offset + done}")
        done += count


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file whose tensors (name -> dtype name, shape) follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the tensors begin at a multiple of 8
    return len(raw).to_bytes(8, "little") + raw


class Folder:
    """A Hugging Face folder of safetensors: one file, shards with an index, or a PEFT adapter.

    Attributes:
        path: the folder.
        files: weight file name -> header, in the order of the index.
        tensors: tensor name -> :class:`TensorInfo`, over all files.
        config: ``config.json`` (of an adapter: ``adapter_config.json``).
        is_adapter: whether it is a PEFT adapter.
    """

    def __init__(self, path: Path, argument: str) -> None:
        """``argument`` is what errors call the folder: BEFORE, AFTER ..."""
        self.path = path
        self.argument = argument
        if not path.is_dir():
            kind = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(f"{argument}: expected a folder with safetensors and a config.json; {path} {kind}")
        self.is_adapter = (path / ADAPTER_CONFIG).is_file()
        self.config = self._json(ADAPTER_CONFIG if self.is_adapter else "config.json")
        self.files = self._adapter_file() if self.is_adapter else self._weight_files()
        self.tensors: dict[str, TensorInfo] = {}
        for name, file in self.files.items():
            for key, info in file.tensors.items():
                if key in self.tensors:
                    raise CheckpointError(
                        f"{argument}: tensor '{key}' stands in {self.tensors[key].path.name} and in {name}"
                    )
                self.tensors[key] = info

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size for info in self.tensors.values())

    def side_files(self) -> Iterator[tuple[Path, str | None]]:
        """Every other file below the folder (relative), with the reason where it is not to be copied."""
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            if any(part.startswith(".") for part in relative.parts) or not file.is_file():
                continue
            name = relative.as_posix()
            if name in self.files or name == INDEX_FILE or name.startswith("hpa"):
                continue
            if name.endswith(PICKLES):
                yield relative, "pickle file (can run code)"
            elif name.endswith(OTHER_WEIGHTS) or name.endswith(".index.json"):
                yield relative, "weights in another form"
            else:
                yield relative, None

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            raise CheckpointError(
                f"{self.argument}: {self.path} has neither config.json nor {ADAPTER_CONFIG}; "
                "expected a Hugging Face model folder or a PEFT adapter"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.argument}: {path}: not a readable JSON file ({error})") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.argument}: {path}: expected a JSON object")
        return content

    def _adapter_file(self) -> dict[str, TensorFile]:
        path = self.path / ADAPTER_FILE
        if not path.is_file():
            pickled = self.path / "adapter_model.bin"
            hint = "; adapter_model.bin is a pickle file and is not read: save it again as safetensors"
            raise CheckpointError(
                f"{self.argument}: {self.path} has no {ADAPTER_FILE}{hint if pickled.exists() else ''}"
            )
        return {ADAPTER_FILE: read_tensor_file(path)}

    def _weight_files(self) -> dict[str, TensorFile]:
        index_path = self.path / INDEX_FILE
        if index_path.is_file():
            return self._indexed(index_path)
        if (self.path / WEIGHT_FILE).is_file():
            return {WEIGHT_FILE: read_tensor_file(self.path / WEIGHT_FILE)}
        others = sorted(file.name for file in self.path.glob("*.safetensors"))
        pickles = sorted(file.name for file in self.path.iterdir() if file.name.endswith(PICKLES))
        hint = ""
        if others:
            hint = f"; it has {', '.join(others[:3])}, but no index that says which belong together"
        elif pickles:
            hint = f"; {pickles[0]} is a pickle file and is not read: save the model again as safetensors"
        raise CheckpointError(f"{self.argument}: {self.path} has neither {WEIGHT_FILE} nor {INDEX_FILE}{hint}")

    def _indexed(self, index_path: Path) -> dict[str, TensorFile]:
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            names = {str(key): str(value) for key, value in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.argument}: {index_path}: expected JSON with a weight_map ({error})"
            ) from error
        files: dict[str, TensorFile] = {}
        for name in names.values():
            if name in files:
                continue
            if Path(name).name != name:
                raise CheckpointError(f"{self.argument}: {index_path}: file names only are allowed, got '{name}'")
            files[name] = read_tensor_file(self.path / name)
        for key, name in names.items():
            if key not in files[name].tensors:
                raise CheckpointError(f"{self.argument}: the index puts '{key}' into {name}, which does not have it")
        for name, file in files.items():
            for key in file.tensors:
                if names.get(key) != name:
                    raise CheckpointError(f"{self.argument}: {name} has '{key}', which the index does not put there")
        return files


def fingerprint(folder: Folder, names: Mapping[str, str]) -> str:
    """A short name for the contents of tensors, equal however they are sharded or prefixed.

    SHA-256 of each tensor's name, dtype, shape and eight pieces of 512 bytes, from its beginning to its end: what a
    training changes, it changes everywhere.

    Args:
        folder: the model.
        names: the name that counts -> the folder's name of the tensor.
    """
    pieces, size = 8, 512
    digest = hashlib.sha256()
    descriptors: dict[Path, int] = {}
    try:
        for name in sorted(names):
            info = folder.tensors[names[name]]
            if info.path not in descriptors:
                descriptors[info.path] = os.open(info.path, os.O_RDONLY)
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            if info.size <= pieces * size:
                digest.update(os.pread(descriptors[info.path], info.size, info.offset))
                continue
            for piece in range(pieces):
                at = info.offset + piece * (info.size - size) // (pieces - 1)
                digest.update(os.pread(descriptors[info.path], size, at))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()[:32]
