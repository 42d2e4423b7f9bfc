"""Statistics of a model on a calibration set, as one safetensors file.

    diagonal.<input>      [cols]               diag((H + lambda I)^-1), METHOD 1.1
    gram.<input>          [cols (cols+1)/2]    float32, lower triangle of H row by row
    vectors.<input>       [rank, cols]         float32, or instead of the triangle: rows v with  H ~ sum v v'

An *input* is what one or several layers are fed with (q, k and v share one); the file's metadata says which layer reads
which input, how many tokens were seen, what share of the trace the vectors hold, and of which model and data the
statistics are (METHOD 1.1, 6.2).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hpa.checkpoint.files import (
    DTYPE_NAMES,
    CheckpointError,
    TensorFile,
    TensorInfo,
    encode_header,
    read_tensor,
    read_tensor_file,
    tensor_bytes,
)
from hpa.checkpoint.names import expert_input
from hpa.checkpoint.stream import HashedFile
from hpa.gram import whole
from hpa.layers import InputStatistics
from hpa.triangle import Triangle, pack

__all__ = ["InputInfo", "Role", "Statistics", "StatisticsInfo", "StatisticsWriter"]

Role = Literal["safety", "task", "keep"]
METADATA_KEY = "hpa"
FORMAT = 1


@dataclass(frozen=True)
class InputInfo:
    """One input of the model, without its numbers."""

    cols: int
    tokens: int
    samples: int
    zero: bool = False
    damping: float = 0.0
    energy: float = 1.0  # share of the trace of H that stored vectors hold; 1 for the whole triangle


@dataclass(frozen=True)
class StatisticsInfo:
    """What a statistics file says about itself.

    Attributes:
        role: which set it is of: safety, task, or keep (what else the model can do).
        fingerprint: of the weights, see :func:`hpa.checkpoint.plan.model_fingerprint`.
        model: the folder that was read, for people.
        data: the file of samples, its SHA-256 and how many were used.
        config: the calibration options.
        blocks: decoder blocks of the model.
        layers: canonical layer name -> input; experts are told by their inputs alone.
        inputs: input -> :class:`InputInfo`.
    """

    role: Role
    fingerprint: str
    model: str
    data: dict[str, Any]
    config: dict[str, Any]
    blocks: int
    layers: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, InputInfo] = field(default_factory=dict)


class Statistics:
    """A statistics file, read input by input."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file is no statistics file."""
        self.path = path
        self.file: TensorFile = read_tensor_file(path)
        if METADATA_KEY not in self.file.metadata:
            raise CheckpointError(f"{path}: not a statistics file (made by `hpa calibrate`)")
        try:
            content = json.loads(self.file.metadata[METADATA_KEY])
            if content.pop("format") != FORMAT:
                raise CheckpointError(f"{path}: written by another version of hpa; calibrate again")
            inputs = {key: InputInfo(**value) for key, value in content.pop("inputs").items()}
            self.info = StatisticsInfo(inputs=inputs, **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: its description cannot be read ({error})") from error

    @property
    def has_grams(self) -> bool:
        return any(name.startswith(("gram.", "vectors.")) for name in self.file.tensors)

    @property
    def has_diagonals(self) -> bool:
        return any(name.startswith("diagonal.") for name in self.file.tensors)

    def known_layers(self) -> set[str]:
        """Canonical names of layers, and of experts' inputs."""
        return set(self.info.layers) | {key for key in self.info.inputs if ".experts." in key}

    def input_of(self, layer: str) -> str:
        """The input that a layer is fed with.

        Raises:
            CheckpointError: the layer is not in the file.
        """
        if layer in self.info.layers:
            return self.info.layers[layer]
        key = expert_input(layer)
        if key in self.info.inputs:
            return str(key)
        raise CheckpointError(f"{self.path}: no statistics for layer {layer}")

    def read(self, key: str, want: frozenset[str]) -> InputStatistics:
        """Statistics of one input: ``diagonal``, ``gram`` (a triangle, read from the file block by block) or both.

        Raises:
            CheckpointError: the file does not hold what is wanted.
        """
        about = self.info.inputs[key]
        diagonal: Tensor | None = None
        triangle: Triangle | None = None
        if not about.zero:
            if "diagonal" in want:
                diagonal = read_tensor(self._info(f"diagonal.{key}", "inverse diagonal", ""))
            if "gram" in want and f"vectors.{key}" in self.file.tensors:
                triangle = Triangle.of_vectors(read_tensor(self.file.tensors[f"vectors.{key}"]))
            elif "gram" in want:
                packed = self._info(f"gram.{key}", "Gram matrix", " --gram")
                numbers = about.cols * (about.cols + 1) // 2
                if packed.shape != (numbers,):
                    raise CheckpointError(
                        f"gram: expected {numbers} numbers for {about.cols} columns, got {list(packed.shape)}"
                    )
                triangle = Triangle.of_packed(about.cols, lambda first, last: read_tensor(packed.part(first, last)))
        return InputStatistics(
            triangle=triangle,
            inverse_diagonal=diagonal,
            tokens=about.tokens,
            samples=about.samples,
            input_key=key,
            zero=about.zero,
            damping=about.damping,
        )

    def _info(self, name: str, what: str, option: str) -> TensorInfo:
        if name not in self.file.tensors:
            raise CheckpointError(
                f"{self.path}: holds no {what} of {name.partition('.')[2]}; make it with `hpa calibrate{option}`"
            )
        return self.file.tensors[name]


class StatisticsWriter:
    """Writes a statistics file input by input: tensors go to a side file, and are put behind the header at the end."""

    def __init__(self, path: Path, *, energy: float | None = None) -> None:
        """``energy``: store leading vectors that hold this share of a Gram matrix's trace, where that is smaller."""
        self.path = path
        self._energy = energy
        self._tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._inputs: dict[str, InputInfo] = {}
        self._layers: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".parts")
        self._parts = os.fdopen(handle, "w+b")
        self._parts_path = Path(name)

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()
        self._parts_path.unlink(missing_ok=True)

    def add(self, layers: Mapping[str, InputStatistics], names: Mapping[str, str]) -> None:
        """Statistics by layer, as calibration yields them; ``names``: layer or input -> canonical name."""
        for name, seen in layers.items():
            key = names[seen.input_key]
            if not key.endswith((".in", ".out")):  # an expert's inputs are found by its number
                self._layers[names[name]] = key
            if key in self._inputs:
                continue
            cols = _cols(seen)
            energy = 1.0
            if seen.inverse_diagonal is not None:
                self._put(f"diagonal.{key}", seen.inverse_diagonal)
            if seen.gram is not None and not seen.zero:
                vectors, energy = (None, 1.0) if self._energy is None else _vectors(seen.gram, self._energy)
                if vectors is None:
                    self._put(f"gram.{key}", pack(seen.gram))
                else:
                    self._put(f"vectors.{key}", vectors)
            self._inputs[key] = InputInfo(cols, seen.tokens, seen.samples, seen.zero, seen.damping, energy)

    def finish(self, info: StatisticsInfo) -> None:
        """Write the file beside its place, then rename."""
        content = asdict(info) | {
            "format": FORMAT,
            "layers": self._layers,
            "inputs": {key: asdict(value) for key, value in self._inputs.items()},
        }
        temporary = self._parts_path.with_suffix(".tmp")
        try:
            out = HashedFile(temporary)
            try:
                out.write(encode_header(self._tensors, {METADATA_KEY: json.dumps(content, separators=(",", ":"))}))
                self._parts.flush()
                self._parts.seek(0)
                while piece := self._parts.read(16 << 20):
                    out.write(piece)
                out.close()
            except BaseException:
                out.abandon()
                raise
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _put(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().cpu().contiguous()
        self._tensors[name] = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        self._parts.write(tensor_bytes(tensor))


def _vectors(gram: Tensor, energy: float) -> tuple[Tensor | None, float]:
    """Rows ``v`` with ``sum v v' ~ H`` that hold ``energy`` of its trace, where they are fewer numbers than the
    triangle; and the share they hold."""
    values, basis = torch.linalg.eigh(whole(gram.double().tril()))
    values, basis = values.flip(0).clamp_min(0), basis.flip(1)
    total = float(values.sum())
    held = torch.cumsum(values, 0) / total
    rank = min(int((held < energy).sum()) + 1, len(values))
    cols = gram.shape[0]
    if rank * cols >= cols * (cols + 1) // 2:
        return None, 1.0
    return (basis[:, :rank] * values[:rank].sqrt()).T.to(torch.float32).contiguous(), min(1.0, float(held[rank - 1]))


def _cols(seen: InputStatistics) -> int:
    for tensor in (seen.inverse_diagonal, seen.gram):
        if tensor is not None:
            return int(tensor.shape[0])
    return 0
