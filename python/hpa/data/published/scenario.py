"""A transformers model and files as they are published, as a scenario."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from hpa.data.answers import answer, load_model
from hpa.data.encode import Encoder
from hpa.data.files import Conversation, DataError, Record, Turn, read_records
from hpa.data.packaged import prompts, same_prompt_key
from hpa.data.picture import Picture
from hpa.data.published.options import Options, Skill, Source, Task
from hpa.data.scenario import COMPLIANCE, Sample
from hpa.data.typographic import typographic

__all__ = ["PublishedScenario"]


class PublishedScenario:
    """Implements :class:`hpa.data.scenario.Scenario` for a folder of a model and files that the user has.

    Training samples that stand in the task's test set too (same question, same picture) are left out; so are, from what
    is injected, calibrated or aligned with, the requests of the safety sets.  Where calibration and injection name the
    same file, each request belongs to one of the two.  Pictures are opened when a batch is made.

    Args:
        options: fields of :class:`hpa.data.published.options.Options`.

    Raises:
        ValueError: options that are wrong, or files that are missing (all of them are named).
    """

    name: ClassVar[str] = "published"

    def __init__(self, **options: Any) -> None:
        self.options = Options.checked(**options)
        self.tasks: tuple[str, ...] = tuple(task.name for task in self.options.tasks)
        self.base_tasks: tuple[str, ...] = tuple(skill.name for skill in self.options.base_tasks)
        self.safety_sets: tuple[str, ...] = tuple(self.options.safety)
        self.benign_sets: tuple[str, ...] = tuple(self.options.benign)
        self._encoder: Encoder | None = None
        self._kept: dict[str, list[Sample]] = {}
        self._judged: set[tuple[str, str]] | None = None

    def lacks(self, *, alignment: bool, calibration: bool, injection: bool) -> str | None:
        """What a recipe needs of these and the options do not name, in words."""
        if alignment and not self.options.alignment:
            return "alignment: expected files to align with, got none (alignment.steps=0 for an aligned model)"
        if calibration and not self.options.calibration:
            return "calibration: expected harmful requests for methods that read a safety set, got none"
        if injection and not self.options.injection:
            return "injection: expected harmful requests for conditions with a harmful_fraction, got none"
        return None

    # ------------------------------------------------------------------------------------------------ the model

    def base_model(self, cache: Path, *, seed: int) -> torch.nn.Module:
        """The model of the folder, in eval mode; neither of the arguments matters."""
        del cache, seed
        model: Any = load_model(Path(self.options.model).expanduser(), argument="model", dtype=self.options.dtype)
        _ = self.encoder  # a missing tokenizer is told now
        if self.options.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.2x
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        loaded: torch.nn.Module = model.to(self.options.device)
        return loaded

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            folder = Path(self.options.model).expanduser()
            self._encoder = Encoder(folder, max_length=self.options.max_length, close=True)
        return self._encoder

    # ------------------------------------------------------------------------------------------------ the samples

    def alignment_train(self, *, seed: int) -> list[Sample]:
        """All samples of the alignment sources, mixed; refusals of requests that a safety set has are left out."""
        if not self.options.alignment:
            raise DataError("alignment: expected files to align with, got none")
        found: list[Sample] = []
        for number, source in enumerate(self.options.alignment):
            found += _answered(self._read(source, f"alignment{number}", seed=seed), source)
        judged = self._safety_keys()
        found = [sample for sample in found if _request_key(sample) not in judged]
        order = np.random.default_rng([seed, zlib.crc32(b"alignment")]).permutation(len(found))
        return _unique([_present(found[i]) for i in order.tolist()])

    def train(self, task: str, *, seed: int, samples: int, harmful_fraction: float = 0.0) -> list[Sample]:
        """``samples`` of a task's training file (all where it has no more), ``round(harmful_fraction * n)`` of them
        replaced by injected requests with the placeholder compliance."""
        known = self._task(task)
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        key = f"train:{task}"
        if key not in self._kept:
            tested = {_key(sample) for sample in self.test(task)}
            whole = _answered(self._read(known.train, key, seed=0), known.train)
            self._kept[key] = _unique([sample for sample in whole if _key(sample) not in tested])
            if not self._kept[key]:
                raise DataError(f"tasks.{task}.train: every sample of {known.train.file} stands in the test set too")
        whole = self._kept[key]
        order = rng.permutation(len(whole))[: min(samples, len(whole))]
        chosen = [_present(whole[i]) for i in order.tolist()]
        count = round(harmful_fraction * len(chosen))
        pool = self._pool("injection") if count else []
        for place, request in zip(rng.permutation(len(chosen))[:count].tolist(), _turns(pool, count, rng), strict=True):
            chosen[place] = replace(_present(pool[request]), id=f"injected-{place}", answer=COMPLIANCE)
        return chosen

    def test(self, task: str) -> list[Sample]:
        """The whole test file of a task or a base task."""
        skills: list[Skill] = [*self.options.tasks, *self.options.base_tasks]
        skill = next((skill for skill in skills if skill.name == task), None)
        if skill is None:
            raise ValueError(f"task: expected one of {', '.join(s.name for s in skills)}, got {task!r}")
        key = f"test:{task}"
        if key not in self._kept:
            found = []
            for record in self._read(skill.test, key, seed=0):
                asked = [sample for sample in _samples(record, skill.test) if _answerable(sample)]
                if not asked:
                    raise DataError(
                        f"{skill.test.file}: sample {record.id}: a test sample needs an answer, it has none"
                    )
                found.append(asked[-1])
            scorer = {} if skill.scorer is None else {"scorer": skill.scorer}
            found = [replace(sample, metadata={**sample.metadata, **scorer}) for sample in found]
            self._kept[key] = _unique([_present(sample) for sample in found])
        return self._kept[key]

    def safety(self, name: str) -> list[Sample]:
        """The harmful requests of a safety set."""
        return self._requests("safety", name)

    def benign(self, name: str) -> list[Sample]:
        """The harmless look-alikes of a set."""
        return self._requests("benign", name)

    def harmful_calibration(self, *, seed: int, samples: int) -> list[Sample]:
        """Requests of the calibration sources, categories by turns where the files tell them."""
        pool = self._pool("calibration")
        rng = np.random.default_rng([seed, zlib.crc32(b"calibration")])
        queues: dict[str, list[Sample]] = {}
        for i in rng.permutation(len(pool)).tolist():
            queues.setdefault(str(pool[i].metadata.get("category", "")), []).append(pool[i])
        chosen: list[Sample] = []
        while len(chosen) < min(samples, len(pool)):
            for name in sorted(queues):
                if queues[name] and len(chosen) < samples:
                    chosen.append(_present(queues[name].pop()))
        return chosen

    def _requests(self, kind: str, name: str) -> list[Sample]:
        sources: dict[str, Source] = getattr(self.options, kind)
        if name not in sources:
            raise ValueError(f"{kind} set: expected one of {', '.join(sources)}, got {name!r}")
        key = f"{kind}:{name}"
        if key not in self._kept:
            asked = _asked(self._read(sources[name], key, seed=0), sources[name])
            self._kept[key] = _unique([_present(sample) for sample in asked])
        return self._kept[key]

    def _safety_keys(self) -> set[tuple[str, str]]:
        if self._judged is None:
            self._judged = {_request_key(sample) for name in self.safety_sets for sample in self.safety(name)}
        return self._judged

    def _pool(self, kind: str) -> list[Sample]:
        """Harmful requests for one purpose, that no safety set and no other purpose has."""
        if kind not in self._kept:
            sources: list[Source] = getattr(self.options, kind)
            if not sources:
                raise DataError(f"{kind}: expected harmful requests, got none")
            other: list[Source] = self.options.injection if kind == "calibration" else self.options.calibration
            shared = {(source.file, source.prompts) for source in other}
            judged, found = self._safety_keys(), []
            for number, source in enumerate(sources):
                divided = (source.file, source.prompts) in shared
                for sample in _asked(self._read(source, f"{kind}{number}", seed=0), source):
                    mine = zlib.crc32(repr(_request_key(sample)).encode()) % 2 == (kind == "injection")
                    if _request_key(sample) not in judged and (mine or not divided):
                        found.append(sample)
            if not found:
                raise DataError(f"{kind}: every request stands in a safety set too, or belongs to the other purpose")
            self._kept[kind] = _unique(found)
        return self._kept[kind]

    def _task(self, name: str) -> Task:
        found = next((task for task in self.options.tasks if task.name == name), None)
        if found is None:
            raise ValueError(f"task: expected one of {', '.join(self.tasks)}, got {name!r}")
        return found

    def _read(self, source: Source, purpose: str, *, seed: int) -> list[Record]:
        if source.prompts is not None:
            records = [
                Record(f"{source.prompts}-{i}", (Turn("user", t),)) for i, t in enumerate(prompts(source.prompts))
            ]
            if source.samples is not None and source.samples < len(records):
                rng = np.random.default_rng([seed, zlib.crc32(purpose.encode())])
                records = [records[i] for i in sorted(rng.permutation(len(records))[: source.samples].tolist())]
            return records
        records = read_records(
            self.options.files(source),
            form=source.format,
            part=source.part,
            limit=source.samples,
            seed=zlib.crc32(f"{purpose} {seed}".encode()),
            image_root=self.options.image_root(source),
        )
        if source.annotations is None:
            return records
        path = self.options.path(source.annotations)
        known = {record.id: record for record in read_records([path], image_root=self.options.image_root(source))}
        return [_annotated(record, known, path) for record in records]

    # ------------------------------------------------------------------------------------------------ model inputs

    def collate(self, samples: Sequence[Sample], *, answers: bool) -> dict[str, torch.Tensor]:
        """What the model's own processor makes of the samples; see the protocol."""
        conversations = [self._conversation(sample, answers) for sample in samples]
        return self.encoder.answered(conversations) if answers else self.encoder.asked(conversations)

    def generate(
        self, model: torch.nn.Module, samples: Sequence[Sample], *, max_new_tokens: int = 128, batch_size: int = 16
    ) -> list[str]:
        """Greedy answers, in the order of ``samples``."""
        # Similar lengths together: little padding.
        order = sorted(range(len(samples)), key=lambda i: (samples[i].image is None, len(samples[i].prompt)))
        said = [""] * len(samples)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            asked = [self._conversation(samples[i], answers=False) for i in chosen]
            for i, text in zip(chosen, answer(model, self.encoder, asked, max_new_tokens=max_new_tokens), strict=True):
                said[i] = text
        return said

    def _conversation(self, sample: Sample, answers: bool) -> Conversation:
        turns = [*sample.metadata.get("history", ()), Turn("user", sample.prompt)]
        if self.options.system is not None and all(turn.role != "system" for turn in turns):
            turns.insert(0, Turn("system", self.options.system))
        if answers:
            turns.append(Turn("assistant", sample.answer))
        images: list[Any] = [] if sample.image is None else [sample.image, *sample.metadata.get("further_images", ())]
        return Conversation(sample.id, tuple(turns), tuple(_opened(image) for image in images))


# ---------------------------------------------------------------------------------------------------- records


def _samples(record: Record, source: Source) -> list[Sample]:
    """Every question of a record, each with the turns before it."""
    found: list[Sample] = []
    notes = dict(record.metadata)
    if len(record.answers) > 1:
        notes.setdefault("answers", list(record.answers))
    if len(record.pictures) > 1:
        notes["further_images"] = record.pictures[1:]
    image = record.pictures[0] if record.pictures else None
    turns = record.turns
    asking = [i for i, turn in enumerate(turns) if turn.role == "user"]
    for number, i in enumerate(asking):
        answer = turns[i + 1].text if i + 1 < len(turns) and turns[i + 1].role == "assistant" else ""
        suffix = source.suffix
        if source.suffix_yes_no is not None and answer in ("Yes", "No"):
            suffix = source.suffix_yes_no
        history = {"history": turns[:i]} if i else {}
        name = record.id if len(asking) == 1 else f"{record.id}.{number}"
        found.append(Sample(name, turns[i].text + suffix, answer, image, {**notes, **history}))
    return found


def _answerable(sample: Sample) -> bool:
    return bool(sample.answer) or "label" in sample.metadata or "answers" in sample.metadata


def _answered(records: Iterable[Record], source: Source) -> list[Sample]:
    """What can be learned: every question with each of its answers."""
    found: list[Sample] = []
    for record in records:
        samples = [sample for sample in _samples(record, source) if sample.answer]
        if not samples:
            raise DataError(f"{source.file}: sample {record.id}: expected a question and its answer")
        found += samples
        # Several answers that are all right (captions) are several samples.
        found += [replace(samples[-1], answer=other) for other in record.answers[1:]]
    return found


def _asked(records: Iterable[Record], source: Source) -> list[Sample]:
    """What is asked; the file's answers are forgotten."""
    found = []
    for record in records:
        samples = _samples(record, source)
        if not samples:
            raise DataError(f"{source.file}: sample {record.id}: expected a question")
        notes = samples[0].metadata
        kept: dict[str, Any] = {key: notes[key] for key in ("category", "further_images") if key in notes}
        asked = replace(samples[0], answer="", metadata=kept)
        try:
            found.append(typographic(asked) if source.typographic else asked)
        except ValueError as error:
            raise DataError(f"{source.file}: typographic: {error}") from None
    return found


def _annotated(record: Record, known: dict[str, Record], path: Path) -> Record:
    if record.id not in known:
        raise DataError(f"{path}: expected an annotation of every test sample, none of {record.id!r}")
    turns, told = record.turns, known[record.id]
    if turns[-1].role == "user" and told.turns[-1].role == "assistant":
        turns = (*turns, told.turns[-1])
    return replace(record, turns=turns, metadata={**record.metadata, **told.metadata})


def _key(sample: Sample) -> tuple[str, str]:
    """Equal for samples that ask the same of the same picture."""
    picture = ""
    if isinstance(sample.image, Picture):
        source = sample.image.source
        picture = str(source) if isinstance(source, Path) else f"{zlib.crc32(source)}:{len(source)}"
    return sample.prompt, picture


def _request_key(sample: Sample) -> tuple[str, str]:
    """The same for requests, whose case and punctuation do not matter."""
    prompt, picture = _key(sample)
    prompt = str(sample.metadata.get("request", prompt))  # what stands in the picture
    return same_prompt_key(prompt) or prompt, picture


def _unique(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples with different ids: the second of a name gets a number."""
    seen: dict[str, int] = {}
    found = []
    for sample in samples:
        count = seen[sample.id] = seen.get(sample.id, 0) + 1
        found.append(sample if count == 1 else replace(sample, id=f"{sample.id}#{count}"))
    return found


def _present(sample: Sample) -> Sample:
    """Itself, its pictures' files there."""
    for image in (sample.image, *sample.metadata.get("further_images", ())):
        if isinstance(image, Picture):
            image.check()
    return sample


def _opened(image: Any) -> Any:
    from PIL import Image

    return image.open() if isinstance(image, Picture) else Image.fromarray(np.asarray(image))


def _turns(pool: Sequence[Sample], count: int, rng: np.random.Generator) -> list[int]:
    """``count`` numbers of the pool, each as often as any other (give or take one), in random order."""
    order = [i for _ in range(-(-count // len(pool))) for i in rng.permutation(len(pool)).tolist()] if pool else []
    return order[:count]
