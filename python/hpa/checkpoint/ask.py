"""``hpa ask``: prompts in, the model's own answers out, as one file of samples that edits need.

The safety set is harmful requests with the refusals that the aligned model gives (METHOD 1.7), and what ``--keep``
shows is prompts with its answers: neither exists before the model has been asked.
"""

from __future__ import annotations

import base64
import io
import json
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import nn

from hpa.checkpoint.calibrate import device_of
from hpa.checkpoint.files import ADAPTER_CONFIG, CheckpointError
from hpa.config import CalibrationConfig
from hpa.data.answers import answer, load_model
from hpa.data.encode import Encoder
from hpa.data.files import Conversation, DataError, Record, Turn, read_records
from hpa.data.packaged import PROMPT_LISTS, prompts
from hpa.data.picture import Picture
from hpa.data.scenario import Sample
from hpa.evaluation.judge import RefusalJudge
from hpa.safety_set import build_safety_set
from hpa.storage import write_file

__all__ = ["Answers", "AskJob", "ask"]


@dataclass(frozen=True)
class AskJob:
    """What is asked for.

    Attributes:
        model: folder of a model, which is loaded whole.
        prompts: a file of samples, whose answers are not read, or a name in :data:`hpa.data.packaged.PROMPT_LISTS`.
        role: ``"safety"``: refusals are written, by ``judge``; ``"keep"``: all answers but empty ones.
        out: JSON lines to write.
        samples: as many are written at most, and asking ends there; ``None``: as many as an edit reads by default.
        seed: of the order in which prompts are asked.
        image_root: folder that picture paths start from; by default that of the prompts.
        dtype: torch's name of that of the weights in memory, or ``"auto"``: as stored.
    """

    model: Path
    prompts: Path | str
    role: Literal["safety", "keep"]
    out: Path
    judge: RefusalJudge
    samples: int | None = None
    seed: int = 0
    max_new_tokens: int = 128
    batch_size: int = 8
    image_root: Path | None = None
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Answers:
    """What came of it: how many prompts there were, were asked, were refused and got nothing, how many answers were
    written, and the folder that the file's picture paths start from where that is not its own."""

    prompts: int
    asked: int
    refused: int
    empty: int
    kept: int
    image_root: Path | None


def ask(job: AskJob, progress: Callable[[int, int], None] | None = None) -> Answers:
    """Ask a model prompts and write what it says.

    Each line of the file is a sample in the form of chat ``messages``: what stood before the answer, and the answer.
    Of several turns the last question is asked.  Refusals are spread over the categories that the prompts name
    (:func:`hpa.build_safety_set`).

    Args:
        job: what to do.
        progress: told of prompts asked and prompts in all.

    Raises:
        CheckpointError, DataError: inputs that cannot be used, or no answer of the wanted kind.
    """
    if not job.model.is_dir():
        raise CheckpointError(f"MODEL: expected a folder, found none at {job.model}")
    if (job.model / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"MODEL: {job.model} is an adapter; merge it into its model first, or ask that one")
    if job.out.suffix != ".jsonl":
        raise CheckpointError(f"--out: expected a file of JSON lines, named *.jsonl, got {job.out}")
    if job.out.is_dir():
        raise CheckpointError(f"--out: {job.out} is a folder; expected a file")
    device = device_of(job.device)
    records = _asked(job)
    if job.out.resolve() == Path(job.prompts).resolve():
        raise CheckpointError(f"--out: {job.out} is the file of prompts itself")
    encoder = Encoder(job.model, trust_remote_code=job.trust_remote_code)
    model = load_model(
        job.model,
        argument="MODEL",
        dtype=job.dtype,
        safetensors=True,
        trust_remote_code=job.trust_remote_code,
    ).to(device)
    order = list(range(len(records)))
    random.Random(job.seed).shuffle(order)
    # The number of its record is a sample's id: ids in files need not differ.
    samples = [Sample(str(i), "", "", None, dict(records[i].metadata)) for i in order]
    said: dict[int, str] = {}

    def generate(model: nn.Module, samples: Sequence[Sample]) -> list[str]:
        chosen = [int(sample.id) for sample in samples]
        # Pictures and bare text apart: a batch of both pads the one to the other's length.
        for pictured in (False, True):
            some = [i for i in chosen if bool(records[i].pictures) == pictured]
            if some:
                asked = [_opened(records[i]) for i in some]
                said.update(zip(some, answer(model, encoder, asked, max_new_tokens=job.max_new_tokens), strict=True))
        if progress is not None:
            progress(len(said), len(records))
        return [said[i] for i in chosen]

    kept = _kept(job, model, samples, generate)
    verdicts = {i: job.judge.verdict(text) for i, text in said.items()}
    refused, empty = (sum(verdict == kind for verdict in verdicts.values()) for kind in ("refused", "empty"))
    if not kept:
        raise DataError(
            f"{job.prompts}: the model said nothing to any of {len(said)} prompts; there is nothing to keep"
        )
    root = _common_root(job, [records[i] for i in kept])
    write_file(job.out, "".join(_line(records[i], said[i], root) for i in sorted(kept)))
    told = None if root == job.out.parent.resolve() else root
    return Answers(len(records), len(said), refused, empty, len(kept), told)


def _asked(job: AskJob) -> list[Record]:
    """Every record up to its last question."""
    path = Path(job.prompts)
    if str(job.prompts) in PROMPT_LISTS and not path.exists():
        return [Record(f"{path}-{i}", (Turn("user", text),)) for i, text in enumerate(prompts(str(job.prompts)))]
    if not path.exists():
        raise DataError(f"PROMPTS: expected a file or one of {', '.join(PROMPT_LISTS)}, got {job.prompts}")
    found = []
    for number, record in enumerate(read_records([path], image_root=job.image_root)):
        turns = record.turns[:-1] if record.turns[-1].role == "assistant" else record.turns
        if not turns or turns[-1].role != "user":
            raise DataError(f"{path}: sample {number}: expected a question")
        for picture in record.pictures:
            picture.check()
        found.append(Record(record.id, turns, record.pictures, (), record.metadata))
    return found


def _opened(record: Record) -> Conversation:
    return Conversation(record.id, record.turns, tuple(picture.open() for picture in record.pictures))


def _kept(
    job: AskJob,
    model: nn.Module,
    samples: Sequence[Sample],
    generate: Callable[[nn.Module, Sequence[Sample]], list[str]],
) -> list[int]:
    """Numbers of the records whose answers are kept."""
    defaults = CalibrationConfig()
    limit = job.samples or (defaults.safety_samples if job.role == "safety" else defaults.task_samples)
    if job.role == "safety":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # too few are told with the numbers
            try:
                refusals = build_safety_set(
                    model, samples, generate, job.judge.is_refusal, limit=limit, batch_size=job.batch_size
                )
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{job.prompts}: {error} (judge {job.judge.name!r})") from None
        return [int(sample.id) for sample in refusals]
    kept: list[int] = []
    for start in range(0, len(samples), job.batch_size):
        some = samples[start : start + job.batch_size]
        kept += [int(one.id) for one, text in zip(some, generate(model, some), strict=True) if text]
        if len(kept) >= limit:
            break
    return kept[:limit]


def _common_root(job: AskJob, records: Sequence[Record]) -> Path:
    """The folder of the file, where all pictures lie below it: then it needs no other word.  Else theirs."""
    paths = [p.source for record in records for p in record.pictures if isinstance(p.source, Path)]
    own = job.out.parent.resolve()
    if all(own in path.parents for path in paths):
        return own
    return (Path(job.prompts).parent if job.image_root is None else job.image_root).resolve()


def _line(record: Record, text: str, root: Path) -> str:
    turns = [*record.turns, Turn("assistant", text)]
    held: dict[str, Any] = {"id": record.id, "messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
    if record.pictures:
        held["images"] = [_told(picture, root) for picture in record.pictures]
    if isinstance(record.metadata.get("category"), str):
        held["category"] = record.metadata["category"]
    return json.dumps(held) + "\n"


def _told(picture: Picture, root: Path) -> str:
    if isinstance(picture.source, Path):
        return picture.source.relative_to(root).as_posix()
    kind = Image.open(io.BytesIO(picture.source)).get_format_mimetype() or "image"
    return f"data:{kind};base64,{base64.b64encode(picture.source).decode()}"
