"""Names of layers, equal for every way in which a checkpoint or a model may spell them.

A linear layer of decoder block ``N`` is ``layers.N.<rest>`` here (``layers.0.self_attn.q_proj``), whatever stands
before it (``model.``, ``language_model.model.``, ``model.language_model.``, ``model.text_model.`` ...), in files of
transformers 4 and 5 and in the module tree of a loaded model.  Which of a model's lists of blocks is the decoder is
found from the names and sizes alone: vision and audio towers are told by their names, and of the rest the largest is
the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpa.calibration import PROJECTOR_NAMES, experts_transposed
from hpa.checkpoint.files import CheckpointError

__all__ = [
    "Decoder",
    "Experts",
    "expert_input",
    "find_decoder",
    "find_experts",
    "is_projector",
    "is_router",
    "projector_name",
    "reduced",
]

_BLOCK = re.compile(r"^(?P<prefix>|.*?\.)(?P<list>layers|h|blocks|block|layer)\.(?P<number>\d+)\.(?P<rest>.+)$")
_OTHER_TOWERS = (
    "vision",
    "visual",
    "image",
    "audio",
    "speech",
    "vit",
    "qformer",
    "resampler",
    "perceiver",
    "encoder",
    "mtp",
    "talker",
    "token2wav",
    "code2wav",
    "gen_",
)
# The module around the experts is called mlp, block_sparse_moe ... by turns, and has no part in a canonical name.
_EXPERT = re.compile(
    r"^(?P<block>layers\.\d+)\.(?:.+\.)?experts\.(?P<number>\d+)\."
    r"(?P<matrix>w1|w2|w3|gate_proj|up_proj|gate_up_proj|down_proj|in|out)$"
)
# Two tensors that hold all experts of a block: the module around them, and which of the two a name is.
_EXPERTS = re.compile(
    r"^layers\.\d+\.(?:(?:.+\.)?experts\.(?P<half>gate_up_proj|down_proj|fc1|fc2)"
    r"|block_sparse_moe\.(?P<granite>input_linear|output_linear))(?:\.weight)?$"
)
_FIRST = ("gate_up_proj", "fc1", "input_linear")
_ROUTERS = ("gate", "shared_expert_gate")


@dataclass(frozen=True)
class Decoder:
    """The decoder's list of blocks.

    Attributes:
        path: what stands before the block numbers, ``model.layers``.
        blocks: number of blocks.
    """

    path: str
    blocks: int

    def canonical(self, name: str) -> str | None:
        """``layers.N.<rest>`` of a name below the decoder's blocks, else ``None``."""
        if not name.startswith(self.path + "."):
            return None
        return "layers." + name[len(self.path) + 1 :]

    def place(self, name: str) -> str:
        """What a tensor is told by in two folders that may spell its path differently."""
        canonical = self.canonical(name)
        if canonical is not None:
            return canonical
        return _without(name, ("model", "language_model", "text_model"))

    @staticmethod
    def block(canonical: str) -> int:
        """1-based number of the block of a canonical name."""
        return int(canonical.split(".")[1]) + 1


def find_decoder(sizes: Mapping[str, int], argument: str) -> Decoder:
    """The decoder among names of tensors or modules.

    Args:
        sizes: name -> number of elements.
        argument: what errors call the model.

    Raises:
        CheckpointError: no list of blocks, or one with a block missing.
    """
    weights: dict[str, int] = {}
    numbers: dict[str, set[int]] = {}
    for name, size in sizes.items():
        match = _BLOCK.match(name)
        if match is None:
            continue
        prefix = match["prefix"]
        parts = prefix.lower().split(".")
        if any(part.startswith(word) for part in parts for word in _OTHER_TOWERS) or is_projector(prefix):
            continue
        path = prefix + match["list"]
        weights[path] = weights.get(path, 0) + size
        numbers.setdefault(path, set()).add(int(match["number"]))
    if not weights:
        raise CheckpointError(f"{argument}: no list of decoder blocks (like model.layers.0 ...) among its names")
    path = max(weights, key=lambda key: (weights[key], key))
    blocks = max(numbers[path]) + 1
    missing = sorted(set(range(blocks)) - numbers[path])
    if missing:
        raise CheckpointError(f"{argument}: block {path}.{missing[0]} is missing, of {blocks}")
    return Decoder(path, blocks)


def is_projector(name: str) -> bool:
    """Whether a name lies in the layers between vision tower and decoder."""
    return any(part in PROJECTOR_NAMES for part in name.split("."))


def projector_name(name: str) -> str:
    """The path from the projector's own name on; the whole path where none of its parts is one."""
    parts = name.split(".")
    start = next((index for index, part in enumerate(parts) if part in PROJECTOR_NAMES), 0)
    return ".".join(parts[start:])


def reduced(name: str) -> str:
    """A path without the wrappers that one spelling of it has and another has not."""
    return _without(name, ("model", "language_model", "text_model", "transformer", "vision_model"))


def is_router(canonical: str) -> bool:
    """Whether a layer chooses experts; routers are left as the task made them."""
    return "router" in canonical.split(".") or canonical.split(".", 3)[-1] in _ROUTERS


def expert_input(canonical: str) -> str | None:
    """The input of one expert's matrix, by the expert's number; ``None`` for other layers.

    >>> expert_input("layers.0.mlp.experts.3.down_proj")
    'layers.0.experts.3.out'
    """
    match = _EXPERT.match(canonical)
    if match is None:
        return None
    side = "out" if match["matrix"] in ("w2", "down_proj", "out") else "in"
    return f"{match['block']}.experts.{match['number']}.{side}"


@dataclass(frozen=True)
class Experts:
    """All experts of one decoder block, where two tensors hold them.

    Attributes:
        path: canonical path of the module, ``layers.0.mlp.experts``.
        gate_up: name of the tensor of all first matrices.
        down: name of the tensor of all last ones.
        number: of experts.
        transposed: whether matrices are ``[cols, rows]``, as :func:`hpa.calibration.experts_transposed` says.
    """

    path: str
    gate_up: str
    down: str
    number: int
    transposed: bool

    def layers(self, name: str) -> list[str]:
        """Canonical names of the matrices of tensor ``name``, by their experts' numbers."""
        last = "gate_up_proj" if name == self.gate_up else "down_proj"
        return [f"{self.path}.{number}.{last}" for number in range(self.number)]


def find_experts(shapes: Mapping[str, tuple[int, ...]], decoder: Decoder) -> dict[str, Experts]:
    """What stands in two tensors a block, by the name of either tensor.

    Args:
        shapes: of tensors or parameters, by name.
        decoder: where the blocks are.
    """
    pairs: dict[str, dict[str, str]] = {}
    for name in shapes:
        canonical = decoder.canonical(name) or ""
        match = _EXPERTS.match(canonical)
        if match is not None:
            half = match["half"] or match["granite"]
            path = canonical.removesuffix(".weight").removesuffix(half)
            path = path + "experts" if match["granite"] else path.removesuffix(".")
            pairs.setdefault(path, {})["first" if half in _FIRST else "last"] = name
    found: dict[str, Experts] = {}
    for path, pair in pairs.items():
        if len(pair) == 2:
            first, last = pair["first"], pair["last"]
            transposed = experts_transposed(shapes[first], shapes[last])
            if transposed is not None:
                found[first] = found[last] = Experts(path, first, last, shapes[first][0], transposed)
    return found


def _without(name: str, wrappers: tuple[str, ...]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)
