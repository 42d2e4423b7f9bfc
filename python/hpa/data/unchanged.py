"""Samples that stay the same from a run's first step to its last, though it was stopped and files lie in between."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from hpa.data.picture import Picture
from hpa.data.scenario import Sample, Scenario
from hpa.storage import RunFolderError, write_file

__all__ = ["digest_of", "unchanged"]


def unchanged(scenario: Scenario, folder: Path) -> Scenario:
    """The scenario, with an error where a set is not the one that it was when ``folder`` first saw it.

    Args:
        folder: gets one small file for each set that is asked for.

    The methods that give samples then raise :class:`hpa.storage.RunFolderError`; not so those for alignment, which are
    read again only where there is no aligned model.
    """
    return cast(Scenario, _Unchanged(scenario, folder))


def digest_of(samples: Sequence[Sample]) -> str:
    """SHA-256 as hexadecimal digits of all that the samples hold; of pictures in files name and size alone."""
    digest = hashlib.sha256()
    for sample in samples:
        held = [sample.id, sample.prompt, sample.answer, sample.metadata]
        digest.update(json.dumps(held, sort_keys=True, default=str).encode())
        digest.update(_of_picture(sample.image))
    return digest.hexdigest()


def _of_picture(image: np.ndarray | Picture | None) -> bytes:
    if image is None:
        return b"none"
    if isinstance(image, Picture):
        return image.fingerprint()
    return repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()


class _Unchanged:
    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self._scenario = scenario
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scenario, name)

    def train(self, task: str, *, seed: int, samples: int, harmful_fraction: float = 0.0) -> list[Sample]:
        found = self._scenario.train(task, seed=seed, samples=samples, harmful_fraction=harmful_fraction)
        return self._same(f"training of {task}, {samples}, harmful {harmful_fraction}, seed {seed}", found)

    def test(self, task: str) -> list[Sample]:
        return self._same(f"test of {task}", self._scenario.test(task))

    def safety(self, name: str) -> list[Sample]:
        return self._same(f"safety set {name}", self._scenario.safety(name))

    def benign(self, name: str) -> list[Sample]:
        return self._same(f"benign set {name}", self._scenario.benign(name))

    def harmful_calibration(self, *, seed: int, samples: int) -> list[Sample]:
        found = self._scenario.harmful_calibration(seed=seed, samples=samples)
        return self._same(f"safety calibration, {samples}, seed {seed}", found)

    def _same(self, name: str, samples: list[Sample]) -> list[Sample]:
        now = {"set": name, "samples": len(samples), "sha256": digest_of(samples)}
        path = self._folder / f"{zlib.crc32(name.encode()):08x}.json"
        if not path.exists():
            write_file(path, json.dumps(now) + "\n")
            return samples
        then = json.loads(path.read_text(encoding="utf-8"))
        if then != now:
            raise RunFolderError(
                f"{name}: not the samples that this run began with ({then['samples']} of sha256 {then['sha256'][:12]} "
                f"then, {now['samples']} of {str(now['sha256'])[:12]} now); put the files back as they were, or choose "
                "another --out"
            )
        return samples
