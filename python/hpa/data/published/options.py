"""What a recipe says of a published model and its data."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hpa.data.files import FORMS, DataError
from hpa.data.packaged import PROMPT_LISTS, MissingPackageError, require

__all__ = ["Options", "Skill", "Source", "Task"]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Options):
    """Where samples come from: files, or a list of prompts that a package carries.  A bare string is ``file``."""

    file: str = Field(default="", description="below the root; with * the files of a table, in order")
    prompts: str | None = Field(default=None, description="a packaged list of prompts, in place of a file")
    format: str = Field(default="auto", description="a form of hpa.data.files that every sample must have")
    part: str | None = Field(default=None, description="of a form with parts; null: all")
    images: str | None = Field(default=None, description="folder that picture paths start from; null: the root's")
    annotations: str | None = Field(
        default=None, description="another file whose samples of the same ids know the right answers"
    )
    samples: int | None = Field(default=None, ge=1, description="at most so many, drawn; null: all")
    suffix: str = Field(default="", description="put behind every question")
    typographic: bool = Field(
        default=False, description="of requests: each stands in a picture, and the prompt says to follow it"
    )
    suffix_yes_no: str | None = Field(default=None, description="the same where the answer is Yes or No")

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Source:
        if bool(self.file) == (self.prompts is not None):
            raise ValueError("expected either file or prompts")
        if self.format != "auto" and self.format not in FORMS:
            raise ValueError(f"format: expected auto, {', '.join(FORMS)}, got {self.format!r}")
        if self.typographic and (self.suffix or self.suffix_yes_no):
            raise ValueError("typographic: expected no suffix beside it, for nothing stands behind the picture")
        if self.prompts is not None and self.prompts not in PROMPT_LISTS:
            raise ValueError(f"prompts: expected one of {', '.join(PROMPT_LISTS)}, got {self.prompts!r}")
        return self


class Skill(_Options):
    """What the model should keep."""

    name: str = Field(min_length=1)
    test: Source
    scorer: str | None = Field(default=None, description="null: the recipe's")

    @field_validator("scorer")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        from hpa.evaluation.scorers import get_scorer

        if name is not None:
            get_scorer(name)
        return name


class Task(Skill):
    """What the model is to learn."""

    train: Source


class Options(_Options):
    """All of them; see :class:`hpa.data.published.PublishedScenario`."""

    model: str = Field(min_length=1, description="folder of a transformers model with its processor or tokenizer")
    root: str = Field(default=".", description="folder that every file starts from")
    images: str | None = Field(default=None, description="folder that picture paths start from; null: the root")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    checkpointing: bool = Field(default=False, description="training computes activations twice, and keeps few")
    max_length: int = Field(default=2048, ge=1, description="tokens of a text-only sample at most")
    system: str | None = Field(default=None, description="system turn before every question that has none of its own")
    tasks: list[Task] = Field(min_length=1, description="in the order of learning")
    base_tasks: list[Skill] = Field(default_factory=list)
    alignment: list[Source] = Field(default_factory=list, description="refusals and benign answers")
    safety: dict[str, Source] = Field(default_factory=dict, description="name to harmful requests")
    benign: dict[str, Source] = Field(default_factory=dict, description="name to harmless look-alikes")
    calibration: list[Source] = Field(default_factory=list, description="harmful requests to find refusals among")
    injection: list[Source] = Field(default_factory=list, description="harmful requests that are given in to")

    @classmethod
    def checked(cls, **options: Any) -> Options:
        """The options, each mistake with its place.

        Raises:
            ValueError: something in them is wrong.
            DataError: files or folders are missing; all are named.
        """
        try:
            found = cls.model_validate(options)
        except ValidationError as error:
            told = (
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
                for problem in error.errors(include_url=False)
            )
            raise ValueError("; ".join(told)) from None
        names = [task.name for task in (*found.tasks, *found.base_tasks)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"tasks: expected distinct names, got {twice!r} twice")
        for place, source in found.sources():
            if source.typographic and place.partition(".")[0] in ("tasks", "alignment"):
                raise ValueError(
                    f"{place}: typographic: expected for requests alone (safety, benign, calibration, injection)"
                )
        found._check_files()
        return found

    def sources(self) -> Iterable[tuple[str, Source]]:
        """Every source with its place."""
        for task in self.tasks:
            yield f"tasks.{task.name}.train", task.train
        for skill in (*self.tasks, *self.base_tasks):
            yield f"tasks.{skill.name}.test", skill.test
        for kind in ("alignment", "calibration", "injection"):
            yield from ((kind, source) for source in getattr(self, kind))
        for kind in ("safety", "benign"):
            yield from ((f"{kind}.{name}", source) for name, source in getattr(self, kind).items())

    def files(self, source: Source) -> list[Path]:
        """The source's files, in order."""
        path = self.path(source.file)
        return sorted(map(Path, glob.glob(str(path)))) if "*" in source.file else [path]

    def image_root(self, source: Source) -> Path:
        return self.path(self.images or "." if source.images is None else source.images)

    def path(self, name: str) -> Path:
        return Path(self.root).expanduser() / Path(name).expanduser()

    def _check_files(self) -> None:
        """One message for all that is not there."""
        missing: dict[str, str] = {}

        def want(path: Path, place: str, there: bool) -> None:
            if not there:
                missing.setdefault(str(path), place)

        model = Path(self.model).expanduser()
        want(model / "config.json", "model", (model / "config.json").is_file())
        for place, source in self.sources():
            if source.prompts is not None:
                continue
            files = self.files(source)
            want(self.path(source.file), place, bool(files) and all(file.is_file() for file in files))
            if source.annotations is not None:
                annotations = self.path(source.annotations)
                want(annotations, f"{place}.annotations", annotations.is_file())
            images = self.image_root(source)
            want(images, f"{place}.images", images.is_dir())
        lists = dict.fromkeys(s.prompts for _, s in self.sources() if s.prompts is not None)
        packages = ""
        try:
            require(*(PROMPT_LISTS[name].file for name in lists))
        except MissingPackageError as error:
            packages = f"; {error}"
        if missing:
            told = "".join(f"\n  {path} ({place})" for path, place in missing.items())
            raise DataError(f"{len(missing)} files or folders are missing:{told}{packages}")
        if packages:
            raise DataError(packages.removeprefix("; "))
