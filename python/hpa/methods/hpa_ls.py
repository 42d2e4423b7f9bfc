"""HPA's statistics used as least squares: keep whole input directions instead of columns (METHOD 9).

Answer safety inputs and the inputs of past tasks as the old weight did, and the new task's inputs as the new one does:

    W^ = argmin_W  |(W - W_o) X_s|^2/N_s + sum_i m_i |(W - W_o) X_i|^2/N_i + p |W - W_o|^2
                 + mu |(W - W_n) X_t|^2/N_t + l |W - W_n|^2

    A  = X_s'X_s/N_s + sum_i m_i X_i'X_i/N_i + p I  kept: safety, a memory of past tasks, and the rest
    B  = mu X_t'X_t/N_t + l I                       wanted: the new task
    W^ = W_o + change * B (A + B)^-1                one cols x cols filter on the right of the update

What a few calibration samples do not show is most of what a model can do.  Without the proximal term (p = 0) an update
passes there as it was learned, and may even grow; with it, what the task's own inputs do not ask for stays as it was.
A low-rank update stays low-rank: the filter acts on its A factor.  The Gram matrices carry the factor 2 of the Hessian
throughout, which cancels.  Relatives: RegMean (merging by Gram matrices), GPM (a hard subspace, during training) and
AlphaEdit (editing in a null space).

What is solved is solved in float64: the triangles are read by blocks of rows, and what is held is the Cholesky factor
of A + B, ``4 cols (cols + 512)`` bytes (11008 columns: 0.51 GB), and a few hundred rows of the weight.  An input costs
``cols^3 / 3`` operations, and a layer that is narrower than its input ``4 rows cols^2`` (LoRA: ``7 rank cols^2``).  For
others the filter is formed, once an input: ``2 cols^3`` operations and ``4 cols^2`` bytes (``8 cols^2`` for weights of
32 bits and more).  A layer then is one matrix product, ``2 rows cols^2``; weights of 16 bits take it in float32, whose
rounding is a thousandth of theirs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from hpa.columns import keep_as_learned, measure, measured_numbers, stored
from hpa.config import CalibrationConfig, ColumnConfig
from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate, Number
from hpa.methods.base import Method
from hpa.triangle import Cholesky, Triangle, pack
from hpa_ext import DampingWarning, FactorizationError

__all__ = ["HPALeastSquares", "LeastSquaresConfig"]

ROWS_SIZE = 32 << 20  # bytes of a weight's rows that are filtered at a time
SKETCH = 128  # rows, or sums of rows with random signs, from which the numbers of a dense edit are taken


class LeastSquaresConfig(CalibrationConfig):
    """One knob for the new task (``mu``), one for past tasks (``memory``)."""

    mu: float = Field(
        default=0.1,
        ge=0.0,
        description="weight of the new task's inputs; large: the tuned model, 0: the old one where safety looks",
    )
    memory: float = Field(
        default=0.1, ge=0.0, description="weight m of past tasks' inputs; 0: no memory, nothing is carried on"
    )
    memory_weighting: Literal["sum", "mean", "decay"] = Field(
        default="sum",
        description="sum: every past task weighs m; mean: all of them together weigh m; decay: m * memory_decay^age, "
        "the latest at age 0",
    )
    memory_decay: float = Field(
        default=0.8, gt=0.0, le=1.0, description="memory_weighting=decay: factor a task loses per later task"
    )
    memory_source: Literal["trained", "edited"] = Field(
        default="trained",
        description="trained: remember the task's inputs as the tuned model sees them (no extra cost); edited: as the "
        "edited model sees them (one more forward pass over the task's samples)",
    )
    keep_samples: int = Field(
        default=0,
        ge=0,
        description="prompts of any kind, with the aligned model's own answers, that are in the memory before the "
        "first task: for what it can do and no task is about; hpa adapt takes them from --keep",
    )
    keep_weight: float = Field(
        default=1.0, gt=0.0, description="how much these count, in past tasks (with mean: beside the mean, not in it)"
    )
    ridge: float = Field(
        default=1e-4,
        gt=0.0,
        le=1.0,
        description="l, as a share of the mean diagonal of X_s'X_s + memory + mu X_t'X_t; times 10 up to 1 if "
        "factoring fails",
    )
    proximal: float = Field(
        default=0.0,
        ge=0.0,
        description="p, as a share of the same mean diagonal: how firmly input directions that the calibration samples "
        "do not show stay as they were; 0: an update passes there",
    )
    lora_native: bool = Field(
        default=True, description="D14: edit LoRA factors exactly; false merges them in the storage dtype first"
    )


class HPALeastSquares(Method):
    """A soft projection of each update off the inputs of safety and of past tasks."""

    name: ClassVar[str] = "hpa_ls"
    Config: ClassVar[type[BaseModel]] = LeastSquaresConfig
    config: LeastSquaresConfig
    reads_triangles: ClassVar[bool] = True

    def __init__(self, config: BaseModel | None = None) -> None:
        super().__init__(config)
        self.needs = frozenset({"safety_gram", "task_gram"})
        if self.config.memory > 0 and self.config.memory_source == "edited":
            self.needs |= {"edited_gram"}
        self._memory: dict[str, Tensor] = {}  # input_key -> packed lower triangle, float32
        self._tasks: dict[str, int] = {}  # input_key -> tasks in it
        self._pending: dict[str, Tensor | Triangle] = {}  # this task's Gram matrices: packed, or on disk
        self._filter: _Filter | None = None

    @property
    def keep_samples(self) -> int:
        return self.config.keep_samples if self.config.memory > 0 else 0

    def at_strength(self, strength: float) -> HPALeastSquares:
        """The weight ``mu`` of the new task over ``strength``."""
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength: expected a positive number, got {strength}")
        return type(self)(self.config.model_copy(update={"mu": self.config.mu / strength}))

    def work_size(self, rows: int, cols: int) -> int:
        # The factor, the filter if it is formed, what is held of some rows or the sketch, and a triangle's block.
        formed = 12 * cols * cols if rows >= cols else 0  # float64 statistics and a float32 filter: both for a moment
        in_rows = 5 * max(min(8 * rows * cols, ROWS_SIZE), 8 * min(rows, SKETCH) * cols)
        return 4 * cols * (cols + 512) + formed + in_rows + 2 * 8 * min(512, cols) * cols

    def edit_layer(
        self,
        change: LayerChange,
        safety: InputStatistics | None,
        task: InputStatistics | None,
        *,
        task_index: int,
        seed: int,
    ) -> LayerEdit:
        if safety is None or task is None:
            missing = "safety" if safety is None else "task"
            raise ValueError(f"layer {change.label}: method 'hpa_ls' needs {missing} statistics, got none")
        change = stored(change, ColumnConfig(lora_native=self.config.lora_native))
        filter_ = self._filter_for(change, safety, task)
        statistics = measure(change)
        numbers: dict[str, Number] = {
            "memory_tasks": self._tasks.get(change.input_key, 0),
            **measured_numbers(statistics),
        }
        if not bool(statistics.column_change.any()):
            return keep_as_learned(change, "no change", numbers)
        if not filter_.something_kept:
            return keep_as_learned(change, "no safety activations", numbers)
        numbers["ridge"] = filter_.ridge
        if isinstance(change.update, LowRankUpdate):
            update = change.update
            gram_b = update.B.double().T @ update.B.double()
            new = filter_.apply(update.A.double(), lambda left, right: float((gram_b * (left @ right.T)).sum()))
            filtered = LowRankUpdate(new.to(torch.promote_types(update.A.dtype, torch.float32)), update.B, update.scale)
            return LayerEdit(
                numbers | filter_.effects(), base=change.before, update=filtered, dtype=change.before.dtype
            )
        weight = filter_.apply_dense(change.before, change.update, reuse=change.reuse_update)
        return LayerEdit(numbers | filter_.effects(), weight=weight)

    def observe_edited(self, statistics: Mapping[str, InputStatistics]) -> None:
        for key, seen in statistics.items():
            if not seen.zero and (seen.gram is not None or seen.triangle is not None):
                self._remember(key, seen)

    def remember_inputs(self, statistics: Mapping[str, InputStatistics], *, weight: float | None = None) -> None:
        """``m`` counts for these inputs as it does for a task's, times ``weight`` (``keep_weight``)."""
        weight = self.config.keep_weight if weight is None else weight
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight: expected a positive number, got {weight}")
        if not self.config.memory:
            raise ValueError("memory: expected more than 0 to remember anything, got 0")
        if self._pending:
            raise ValueError("remember_inputs: expected between two tasks, got in the middle of one")
        for key, seen in statistics.items():
            if not seen.zero and seen.gram is None and seen.triangle is None:
                raise ValueError(f"statistics: input {key} has no Gram matrix")
        for key, seen in statistics.items():
            if not seen.zero:
                self._remember(key, seen)
                pending = self._pending[key]
                if weight != 1.0:
                    self._pending[key] = (pending.packed() if isinstance(pending, Triangle) else pending) * weight
        self.finish_task()

    def finish_task(self) -> None:
        """Fold the task's Gram matrices into the memory."""
        fade = self.config.memory_decay if self.config.memory_weighting == "decay" else 1.0
        for key in set(self._memory) | set(self._pending):
            old, new = self._memory.get(key), self._pending.get(key)
            new = new.packed() if isinstance(new, Triangle) else new
            if old is None:
                assert new is not None
                self._memory[key] = new
            else:
                # The old memory fades by a task's age even where this task never reached the input.
                faded = old if fade == 1.0 else old * fade
                self._memory[key] = faded if new is None else new.to(old.device).add_(faded)
            self._tasks[key] = self._tasks.get(key, 0) + (new is not None)
        self._pending = {}
        self._filter = None

    def state_dict(self) -> dict[str, Tensor]:
        """``memory.<input_key>``: packed lower triangle ``[cols (cols+1)/2]`` float32, row by row;
        ``tasks.<input_key>``: how many tasks are in it."""
        state = {f"memory.{key}": packed for key, packed in self._memory.items()}
        return state | {f"tasks.{key}": torch.tensor(count) for key, count in self._tasks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        unknown = [key for key in state if not key.startswith(("memory.", "tasks."))]
        memory = {key.removeprefix("memory."): value for key, value in state.items() if key.startswith("memory.")}
        tasks = {key.removeprefix("tasks."): int(value) for key, value in state.items() if key.startswith("tasks.")}
        if unknown or set(memory) != set(tasks):
            odd = unknown or sorted(set(memory) ^ set(tasks))
            raise ValueError(f"state: not a memory of method 'hpa_ls', unexpected or unpaired: {', '.join(odd[:3])}")
        if memory and not self.config.memory:
            raise ValueError("state: holds a memory, but this method was made with memory=0")
        self._memory = {key: value.to(torch.float32) for key, value in memory.items()}
        self._tasks, self._pending, self._filter = tasks, {}, None

    def _filter_for(self, change: LayerChange, safety: InputStatistics, task: InputStatistics) -> _Filter:
        """The filter of one input, factored once for all layers that share it."""
        last = self._filter
        if last is not None and last.key == change.input_key and last.safety is safety and last.task is task:
            return last
        cols = change.cols
        kept = [(1.0, _triangle("safety", safety, change))]
        packed = self._memory.get(change.input_key)
        if packed is not None and self.config.memory > 0:
            if packed.numel() != cols * (cols + 1) // 2:
                raise ValueError(f"layer {change.label}: the memory of its input is for another width than {cols}")
            share = self._tasks[change.input_key] if self.config.memory_weighting == "mean" else 1
            memory = Triangle.of_packed(cols, lambda first, last: packed[first:last])
            kept.append((self.config.memory / max(share, 1), memory))
        learned = _triangle("task", task, change)
        if self.config.memory > 0 and self.config.memory_source == "trained" and not task.zero:
            self._remember(change.input_key, task)
        self._filter = None  # its factor makes room before the next one is made
        del last
        self._filter = _Filter.build(change, safety, task, kept, learned, self.config)
        return self._filter

    def _remember(self, key: str, seen: InputStatistics) -> None:
        if seen.triangle is not None:
            self._pending[key] = seen.triangle
        else:
            assert seen.gram is not None
            self._pending[key] = pack(seen.gram)


@dataclass
class _Sums:
    """Inner products of an update and its edit, plain and weighed by ``S = A + B`` or ``L = X_t'X_t/N_t``, over the
    rows that stand for all (see :class:`_Sketch`)."""

    old: float = 0.0  # <old, old>
    new: float = 0.0
    old_summed: float = 0.0  # <old S, old>
    new_summed: float = 0.0
    old_learned: float = 0.0  # <old L, old>
    new_learned: float = 0.0
    both_learned: float = 0.0  # <old L, new>
    all_old: float = 0.0  # <old, old> over all rows
    all_new: float = 0.0


@dataclass(eq=False)
class _Filter:
    """``F = B (A + B)^-1`` of one input, with ``A + B`` factored."""

    key: str
    safety: InputStatistics
    task: InputStatistics
    learned: Triangle  # X_t'X_t/N_t
    mu: float
    factor: Cholesky | None  # of A + B; None where nothing is kept
    ridge: float
    ridge_size: float = 0.0  # l
    proximal_size: float = 0.0  # p
    inputs_kept: bool = True  # whether A has more than p I
    sums: _Sums = field(default_factory=_Sums)
    formed: dict[torch.dtype, Tensor] = field(default_factory=dict)  # F [cols, cols], once a layer has paid for it

    @property
    def something_kept(self) -> bool:
        return self.factor is not None

    @classmethod
    def build(
        cls,
        change: LayerChange,
        safety: InputStatistics,
        task: InputStatistics,
        kept: list[tuple[float, Triangle]],
        learned: Triangle,
        config: LeastSquaresConfig,
    ) -> _Filter:
        """Raises FactorizationError (layer named) when ``A + B`` is not positive definite at any ridge."""
        ridge = config.ridge
        while True:
            # Factoring takes the place of the sum, so the ladder reads the triangles again.
            blocks, something_kept = _summed(kept, config.mu, learned, change)
            diagonals = [block.diagonal(block.shape[1] - block.shape[0]) for block in blocks]
            scale = float(torch.cat(diagonals).mean())
            proximal = config.proximal * scale
            if not something_kept and not proximal:  # nothing to solve: the filter is the identity
                return cls(change.input_key, safety, task, learned, config.mu, None, ridge)
            for diagonal in diagonals:
                diagonal.add_(proximal + ridge * scale)
            factor = Cholesky.of(blocks)
            if factor is not None:
                break
            if ridge * 10 > 1.0 + 1e-6:
                raise FactorizationError(
                    f"layer {change.label}: A + B is not positive definite, even with ridge {ridge:g}"
                )
            ridge *= 10
        if ridge != config.ridge:
            message = f"layer {change.label}: A + B not positive definite with ridge {config.ridge:g}; used {ridge:g}"
            warnings.warn(message, DampingWarning, stacklevel=4)
        return cls(
            change.input_key, safety, task, learned, config.mu, factor, ridge, ridge * scale, proximal, something_kept
        )

    def apply(self, old: Tensor, inner: Callable[[Tensor, Tensor], float]) -> Tensor:
        """``old @ F`` for rows ``[n, cols]``, float64, and what :meth:`effects` is made of.

        ``inner(left, right)`` is the inner product of two updates, given what stands right of their common factor B.
        """
        assert self.factor is not None
        seen = self.learned.product(old)  # old @ L
        wanted = self._wanted(old, seen)
        new = self.factor.solve(wanted)
        # With S = A + B:  new S = wanted, and <old S, old> = |old C|^2 with its factor C.  Neither is needed again.
        half = self.factor.times(old)
        sums = self.sums
        sums.old += inner(old, old)
        sums.new += inner(new, new)
        sums.old_summed += inner(half, half)
        sums.new_summed += inner(wanted, new)
        sums.old_learned += inner(seen, old)
        sums.both_learned += inner(seen, new)
        del seen, wanted, half
        sums.new_learned += inner(self.learned.product(new), new)
        return new

    def apply_dense(self, before: Tensor, after: Tensor, *, reuse: bool) -> Tensor:
        """``W_o + (W_n - W_o) F``, some rows at a time; into the memory of ``after`` where it may be reused."""
        assert self.factor is not None
        out = after if reuse and after.dtype == before.dtype else torch.empty_like(before)
        rows, cols = before.shape
        matrix = self._matrix(before, after)
        dtype = torch.float64 if matrix is None else matrix.dtype
        seen = _Sketch(rows, cols, before.device)
        step = max(64, ROWS_SIZE // (dtype.itemsize * max(cols, 1)))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            base = before[part].to(dtype)
            old = after[part].to(dtype) - base
            seen.add(first, old)
            new = (
                old @ matrix if matrix is not None else self.factor.solve(self._wanted(old, self.learned.product(old)))
            )
            self.sums.all_old += float(torch.linalg.vector_norm(old, dtype=torch.float64)) ** 2
            self.sums.all_new += float(torch.linalg.vector_norm(new, dtype=torch.float64)) ** 2
            out[part] = new.add_(base).to(out.dtype)
        self.apply(seen.rows, lambda left, right: float((left * right).sum()))
        return out

    def _wanted(self, old: Tensor, seen: Tensor) -> Tensor:
        """``old @ B``, given ``old @ L``."""
        return (self.mu * seen).add_(old, alpha=self.ridge_size)

    def _matrix(self, before: Tensor, after: Tensor) -> Tensor | None:
        """``F``, where it is there already or a layer of this shape is cheaper with it."""
        assert self.factor is not None
        stored = torch.promote_types(before.dtype, after.dtype)
        dtype = torch.float32 if stored.itemsize <= 2 else torch.float64
        rows, cols = before.shape
        if dtype not in self.formed and rows >= cols:
            # Rows of F are rows of B, solved, and take B's place.  L stays in the type it is stored in: if B and A + B
            # had different roundings of it, solving would magnify the difference.
            matrix = self.learned.symmetric(at_least=dtype).to(before.device)
            for first, last in self.learned.blocks():
                wanted = self.mu * matrix[first:last].double()
                wanted[:, first:last].diagonal().add_(self.ridge_size)
                matrix[first:last] = self.factor.solve(wanted)
            self.formed[dtype] = matrix.to(dtype)
        return self.formed.get(dtype)

    def effects(self) -> dict[str, Number]:
        """Shares of squared norms: what is left of the update, what is left of its effect on the outputs for safety and
        memory inputs, and what is lost of its effect for the task's inputs.  Of all that was applied since last asked;
        of a dense update with more than 128 rows the last two are estimates, see :class:`_Sketch`.
        """
        sums, self.sums = self.sums, _Sums()
        mu, identity = self.mu, self.ridge_size + self.proximal_size
        old_kept = sums.old_summed - mu * sums.old_learned - identity * sums.old
        new_kept = sums.new_summed - mu * sums.new_learned - identity * sums.new
        lost = sums.old_learned - 2 * sums.both_learned + sums.new_learned
        return {
            "update_left": _ratio(sums.all_new, sums.all_old) if sums.all_old else _ratio(sums.new, sums.old),
            "kept_inputs_change_left": _ratio(new_kept, old_kept) if self.inputs_kept else 0.0,
            "task_change_lost": _ratio(lost, sums.old_learned),
        }


class _Sketch:
    """What stands for an update's rows where only sums of squares over them are asked for.

    Up to 128 rows they are the rows themselves.  More are added up 128 times, each time with other random signs:
    ``E |R U M|^2 = 128 |U M|^2`` for any ``M``; the relative standard deviation is below ``sqrt(2 / 128)``, which
    an update of rank 1 comes near.  The same sums stand for the update and its edit, so in the ratio of two norms much
    of it cancels.
    """

    def __init__(self, rows: int, cols: int, device: torch.device) -> None:
        self.rows = torch.zeros(min(rows, SKETCH), cols, dtype=torch.float64, device=device)
        self._signs: Tensor | None = None
        if rows > SKETCH:
            generator = torch.Generator().manual_seed(rows)
            self._signs = torch.randint(0, 2, (SKETCH, rows), generator=generator).mul_(2).sub_(1).to(device)

    def add(self, first: int, rows: Tensor) -> None:
        """Rows ``first`` and on."""
        stop = first + rows.shape[0]
        if self._signs is None:
            self.rows[first:stop] = rows
        else:
            self.rows += self._signs[:, first:stop].to(rows) @ rows


def _summed(
    kept: list[tuple[float, Triangle]], mu: float, learned: Triangle, change: LayerChange
) -> tuple[list[Tensor], bool]:
    """``A + mu L``, not damped yet, by blocks of rows, float64, and whether there is anything in A."""
    blocks, something_kept = [], False
    for first, last in learned.blocks():
        block = torch.zeros(last - first, last, dtype=torch.float64, device=change.before.device)
        for weight, triangle in kept:
            block.add_(triangle.rows(first, last).to(block), alpha=weight)
        something_kept = something_kept or bool(block.any())
        block.add_(learned.rows(first, last).to(block), alpha=mu)
        if not math.isfinite(float(block.sum())):
            raise ValueError(f"layer {change.label}: the Gram matrices of its input are not finite")
        blocks.append(block)
    return blocks, something_kept


def _ratio(part: float, whole: float) -> float:
    return max(0.0, part) / whole if whole > 0 else 0.0


def _triangle(which: str, statistics: InputStatistics, change: LayerChange) -> Triangle:
    """The Gram matrix, zeros where the input was never active."""
    triangle = statistics.triangle
    if statistics.gram is not None:
        if statistics.gram.shape != (change.cols, change.cols):
            found = tuple(statistics.gram.shape)
            raise ValueError(
                f"layer {change.label}: {which} gram: expected [{change.cols}, {change.cols}], got {found}"
            )
        triangle = Triangle.of_matrix(statistics.gram)
    if triangle is None:
        if not statistics.zero:
            raise ValueError(f"layer {change.label}: method 'hpa_ls' needs the {which} Gram matrix, got none")
        return Triangle.zero(change.cols)
    if triangle.cols != change.cols:
        raise ValueError(f"layer {change.label}: {which} gram: expected {change.cols} columns, got {triangle.cols}")
    return triangle
