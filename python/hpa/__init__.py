"""hpa: keep a safety-aligned model safe, and keep its old skills, while it goes on learning new tasks.

After each fine-tuning step the weights are edited: the columns that carry safety and the columns that carry the task
are found from two small calibration sets, a balanced choice of the old columns is put back, and the part of the
update that points along old knowledge is taken out (HPA, arXiv 2511.20158).

    >>> import hpa
    >>> hpa.adapt(before_model, after_model, safety=safety_batches, task=task_batches)     # whole models, in place
    >>> hpa.adapt_layer(before, after, safety_diagonal, task_diagonal, layer=1, layers=32) # one weight matrix

Public names are imported on first use, so that ``import hpa`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpa.adapt import AdaptResult, adapt, adapt_layer, edit_model, remember
    from hpa.calibration import LayerSpec, calibrate, find_layers
    from hpa.config import AdaptConfig
    from hpa.layers import InputStatistics, LayerChange, LayerEdit, LowRankUpdate
    from hpa.methods import METHODS, Method, create_method
    from hpa.projection import Basis, HPACallback, project_optimizer
    from hpa.safety_set import build_safety_set

_HOME = {
    "AdaptConfig": "hpa.config",
    "AdaptResult": "hpa.adapt",
    "Basis": "hpa.projection",
    "HPACallback": "hpa.projection",
    "InputStatistics": "hpa.layers",
    "LayerChange": "hpa.layers",
    "LayerEdit": "hpa.layers",
    "LayerSpec": "hpa.calibration",
    "LowRankUpdate": "hpa.layers",
    "METHODS": "hpa.methods",
    "Method": "hpa.methods",
    "adapt": "hpa.adapt",
    "adapt_layer": "hpa.adapt",
    "build_safety_set": "hpa.safety_set",
    "calibrate": "hpa.calibration",
    "create_method": "hpa.methods",
    "edit_model": "hpa.adapt",
    "find_layers": "hpa.calibration",
    "project_optimizer": "hpa.projection",
    "remember": "hpa.adapt",
}

__all__ = [
    "METHODS",
    "AdaptConfig",
    "AdaptResult",
    "Basis",
    "HPACallback",
    "InputStatistics",
    "LayerChange",
    "LayerEdit",
    "LayerSpec",
    "LowRankUpdate",
    "Method",
    "adapt",
    "adapt_layer",
    "build_safety_set",
    "calibrate",
    "create_method",
    "edit_model",
    "find_layers",
    "project_optimizer",
    "remember",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hpa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
