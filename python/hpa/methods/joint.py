"""Joint (multi-task) training: one LoRA on the data of all tasks so far, shuffled together, from the aligned model.

No method of continual learning; it may look at all data at once.  The upper bound for AP, not for MASR.  After task t
the model is the aligned one fine-tuned on D_1 + ... + D_t with t times the steps of one task, so that each sample is
seen as often as in a sequence.  Training costs 1 + 2 + ... + T tasks; an edit costs nothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from hpa.methods.seqft import SeqFT

__all__ = ["Joint"]


class Joint(SeqFT):
    """All tasks so far are trained together, from the aligned model; no edit."""

    name: ClassVar[str] = "joint"
    only_trains: ClassVar[bool] = True

    @property
    def starts_from(self) -> Literal["previous", "aligned"]:
        return "aligned"

    @property
    def trains_on(self) -> Literal["task", "tasks so far"]:
        return "tasks so far"
