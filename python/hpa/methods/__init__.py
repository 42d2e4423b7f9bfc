"""The registry of methods: one file a method, one name each.

A new method is a subclass of :class:`~hpa.methods.base.Method` in a file of its own, and a line in :data:`METHODS`.
"""

from __future__ import annotations

from typing import Any

from hpa.config import validated
from hpa.methods.a_gem import AGEM
from hpa.methods.base import Method
from hpa.methods.combined import combine
from hpa.methods.dare import DARE
from hpa.methods.ewc import EWC
from hpa.methods.gpm import GPM
from hpa.methods.hpa import HPA
from hpa.methods.hpa_ls import HPALeastSquares
from hpa.methods.joint import Joint
from hpa.methods.lwf import LwF
from hpa.methods.magnitude import Magnitude
from hpa.methods.model_tailor import ModelTailor
from hpa.methods.o_lora import OLoRA
from hpa.methods.ogd import OGD
from hpa.methods.random_columns import RandomColumns
from hpa.methods.regmean import RegMean
from hpa.methods.replay import Replay
from hpa.methods.safe_delta import SafeDelta
from hpa.methods.safe_lora import SafeLoRA
from hpa.methods.scale import Scale
from hpa.methods.seqft import SeqFT
from hpa.methods.sppft import SPPFT
from hpa.methods.task_arithmetic import TaskArithmetic
from hpa.methods.ties import TIES
from hpa.methods.wise_ft import WiseFT

__all__ = ["METHODS", "Method", "create_method"]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SeqFT,
        HPA,
        HPALeastSquares,
        Joint,
        Replay,
        AGEM,
        OGD,
        GPM,
        OLoRA,
        EWC,
        LwF,
        SafeDelta,
        ModelTailor,
        SafeLoRA,
        SPPFT,
        WiseFT,
        TaskArithmetic,
        DARE,
        TIES,
        RegMean,
        RandomColumns,
        Magnitude,
        Scale,
    )
}


def create_method(name: str, **options: Any) -> Method:
    """The method called ``name`` with its options; ``hpa+gpm`` is both, with options by their names.

    Raises:
        ValueError: an unknown name or option (what exists is listed), or a value out of range.

    >>> create_method("hpa", mode="eps", proj="off")
    HPA(mode='eps', proj='off')
    """
    parts = name.split("+")
    unknown = [part for part in parts if part not in METHODS]
    if unknown:
        raise ValueError(f"method: expected one of {', '.join(METHODS)} (or several joined by '+'), got {name!r}")
    method = METHODS[name] if len(parts) == 1 else combine({part: METHODS[part] for part in parts})
    return method(validated(method.Config, options, f"method '{name}'"))
