"""``hpa calibrate``: a model and a set of samples in, one statistics file out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hpa.calibration import CalibrationStream, CalibrationWarning, find_layers
from hpa.checkpoint.adapter import Adapter
from hpa.checkpoint.distributed import process_group
from hpa.checkpoint.files import CheckpointError, Folder
from hpa.checkpoint.hidden_states import HiddenStates
from hpa.checkpoint.lazy_model import LazyModel, module_decoder
from hpa.checkpoint.names import expert_input, projector_name
from hpa.checkpoint.plan import model_fingerprint
from hpa.checkpoint.statistics import Role, Statistics, StatisticsInfo, StatisticsWriter
from hpa.config import CalibrationConfig
from hpa.data.encode import Encoder
from hpa.data.files import read_conversations

__all__ = ["CalibrationJob", "calibrate_checkpoint", "device_of"]


@dataclass(frozen=True)
class CalibrationJob:
    """What is asked for.

    Attributes:
        model: folder of the model, or of an adapter.
        base: folder of the model that the adapter stands on.
        data: file of samples, see :mod:`hpa.data.files`.
        role: which set it is.
        out: statistics file to write.
        config: averaging, damping, token filter.
        samples: how many; drawn with ``seed``.
        want: diagonals, Gram matrices or both.
        energy: store leading vectors that hold this share of a Gram matrix's trace, where that is smaller.
        dtype: of the weights in memory; as stored when ``None``.
        device: where the model runs; under ``torchrun`` ``"cuda"`` is another GPU for each process of a machine.
        max_memory: bytes that the job (each process of it) may hold besides the program itself: what is left of them by
            the weights and the sums of a block, the samples' hidden states may take, and the rest of these lies in a
            file beside ``out`` that has no name.  ``None``: all are held.
    """

    model: Path
    data: Path
    role: Role
    out: Path
    base: Path | None = None
    config: CalibrationConfig = field(default_factory=CalibrationConfig)
    samples: int | None = None
    seed: int = 0
    want: frozenset[str] = frozenset({"diagonal"})
    energy: float | None = None
    image_root: Path | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    max_length: int = 2048
    trust_remote_code: bool = False
    max_memory: int | None = None


def calibrate_checkpoint(job: CalibrationJob, progress: Callable[[int, int], None] | None = None) -> Statistics | None:
    """Run the samples through the model, block by block, and write what its layers were fed with.

    Under ``torchrun`` each process takes a part of the samples and process 0 writes the file.

    Args:
        job: what to do.
        progress: told of blocks done and blocks in all.

    Returns:
        The file; ``None`` in processes other than 0.

    Raises:
        CheckpointError, DataError: inputs that cannot be used.
        ValueError: activations that are not finite (the layer is named).
    """
    device = device_of(job.device)
    folder = Folder(job.model, "MODEL")
    adapter = None
    if folder.is_adapter:
        adapter = Adapter.of(folder)
        if job.base is None:
            raise CheckpointError(f"MODEL: {job.model} is an adapter; pass the model that it stands on with --base")
        folder = Folder(job.base, "base")
    limit = job.samples
    if limit is None:
        limit = job.config.safety_samples if job.role == "safety" else job.config.task_samples
    held = read_conversations(job.data, limit=limit, seed=job.seed, image_root=job.image_root)
    tokenizer = folder.path
    if adapter is not None and any(adapter.folder.path.glob("tokenizer*")):
        tokenizer = adapter.folder.path
    encoder = Encoder(tokenizer, max_length=job.max_length, trust_remote_code=job.trust_remote_code)
    group = process_group()
    conversations = held.conversations if group is None else group.share(held.conversations)
    if group is not None and len(held.conversations) < group.size:  # said by all of them, lest some wait for others
        raise CheckpointError(
            f"{job.data}: {len(held.conversations)} samples cannot be shared by {group.size} processes; start fewer"
        )
    lazy = LazyModel(folder, adapter, dtype=job.dtype, device=device, trust_remote_code=job.trust_remote_code)
    layers = find_layers(lazy.model, job.config.include_projector, blocks=job.config.blocks)
    decoder = module_decoder(lazy.model, "MODEL")
    hidden = HiddenStates(folder=job.out.parent)
    stream = CalibrationStream(
        lazy.model,
        encoder.batches(conversations),
        layers,
        want=job.want,
        config=job.config,
        label=job.role,
        experts=True,
        exchange=group,
        hidden=hidden,
    )
    if job.max_memory is not None:
        hidden.memory = _room(job.max_memory, lazy.weights_size + stream.sums_size)
    with StatisticsWriter(job.out, energy=job.energy) as writer:
        for done, number in enumerate(stream.numbers, start=1):
            try:
                entries = stream.block(number)
            except ValueError as error:
                if "not finite" not in str(error):
                    raise
                raise CheckpointError(
                    f"MODEL: {job.model}: {error}; a weight in or before that layer holds NaN or Inf, or the "
                    f"{job.role} samples ({job.data}) overflow its dtype"
                ) from error
            if group is None or group.rank == 0:
                names = {}
                for name in {*entries, *(seen.input_key for seen in entries.values())}:
                    canonical = decoder.canonical(name)
                    names[name] = projector_name(name) if canonical is None else expert_input(canonical) or canonical
                writer.add(entries, names)
            if progress is not None:
                progress(done, len(stream.numbers))
        if group is not None:
            rank = group.rank
            group.close()
            if rank:
                return None
        writer.finish(
            StatisticsInfo(
                role=job.role,
                fingerprint=model_fingerprint(folder, adapter),
                model=str(job.model),
                data={
                    "file": job.data.name,
                    "sha256": held.sha256,
                    "samples": len(held.conversations),
                    "seed": job.seed,
                },
                config=job.config.model_dump(mode="json"),
                blocks=decoder.blocks,
            )
        )
    return Statistics(job.out)


def _room(max_memory: int, block: int) -> int:
    """Bytes of hidden states that may be held beside what a block takes."""
    if block > max_memory:
        warnings.warn(
            f"max_memory: {max_memory / 1e6:.2f} MB were given, and the weights and sums of one block alone take up to "
            f"{block / 1e6:.2f} MB",
            CalibrationWarning,
            stacklevel=3,
        )
    return max(0, max_memory - block)


def device_of(name: str) -> torch.device:
    """The device of this process.

    Raises:
        CheckpointError: no such device here.
    """
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (number.isdecimal() or name == "cuda")):
        raise CheckpointError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu":
        return torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise CheckpointError(f"device: expected one of the {count} CUDA devices that torch sees, got cuda:{index}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
