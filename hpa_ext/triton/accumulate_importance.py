"""importance += g^2 ("fisher"),  importance += |w g| ("taylor")                   lists of equal shapes, any strides

Arithmetic   float32, or float64 where any argument is; rounded once to the storage dtype.
Bytes moved  the minimum: each input once, importance read and written once.
Bound by     memory bandwidth; not measured on a device.
Design       A table of addresses makes the whole list one launch (one for each combination of dtypes and layouts in
             it): a thousand small tensors cost what one large tensor does.  Tensors that are one walk through memory,
             whatever their dimensions, take the wide path; others find their element by a division.
"""

import triton
import triton.language as tl
from torch import Tensor

from hpa_ext.triton.launching import TL, arithmetic, on_device_of, written
from hpa_ext.triton.tables import operand, table_of

CHUNK = 4096


def accumulate_importance_(
    importance: list[Tensor], grads: list[Tensor], weights: list[Tensor] | None, kind: str
) -> None:
    operands = [importance, grads] if weights is None else [importance, grads, weights]
    with on_device_of(importance[0]):
        for table in table_of(operands, 0, CHUNK):
            members = [tensors[table.members[0]] for tensors in operands]
            importance_kernel[(table.chunks,)](
                table.pieces,
                table.piece_of,
                IMPORTANCE=TL[members[0].dtype],
                GRAD=TL[members[1].dtype],
                WEIGHT=TL[members[-1].dtype],
                TAYLOR=kind == "taylor",
                UNIT=table.unit,
                ALIGNED=table.aligned,
                ARITHMETIC=arithmetic(*members),
                CHUNK=CHUNK,
                num_warps=8,
            )
    written(*importance)


@triton.jit
def importance_kernel(
    pieces,
    piece_of,
    IMPORTANCE: tl.constexpr,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    TAYLOR: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    CHUNK: tl.constexpr,
):
    FIELDS: tl.constexpr = 15 if TAYLOR else 11
    chunk = tl.program_id(0)
    entry = pieces + tl.load(piece_of + chunk).to(tl.int64) * FIELDS
    cols = tl.load(entry + 2)
    count = tl.load(entry + 1) * cols
    start = (chunk - tl.load(entry)) * CHUNK
    element = start + tl.arange(0, CHUNK)
    place = operand(entry + 3, element, cols, IMPORTANCE, UNIT, ALIGNED)
    grad = operand(entry + 7, element, cols, GRAD, UNIT, ALIGNED)
    if TAYLOR:
        weight = operand(entry + 11, element, cols, WEIGHT, UNIT, ALIGNED)
    else:
        weight = grad
    # A mask that may end anywhere would narrow every access to one element: full chunks go without.
    if start + CHUNK <= count:
        add_gain(place, grad, weight, None, TAYLOR, ARITHMETIC)
    else:
        add_gain(place, grad, weight, element < count, TAYLOR, ARITHMETIC)


@triton.jit
def add_gain(place, grad, weight, inside, TAYLOR: tl.constexpr, ARITHMETIC: tl.constexpr):
    g = tl.load(grad, mask=inside).to(ARITHMETIC)
    if TAYLOR:
        gain = tl.abs(tl.load(weight, mask=inside).to(ARITHMETIC) * g)
    else:
        gain = g * g
    total = tl.load(place, mask=inside)
    tl.store(place, (total.to(ARITHMETIC) + gain).to(total.dtype), mask=inside)
