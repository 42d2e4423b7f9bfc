"""Symmetric matrices by their lower triangles, a block of rows at a time.

A Gram matrix of 11008 columns takes 0.97 GB in float64.  Nothing here forms one: a :class:`Triangle` hands out blocks
of rows, from memory or from a file, and a :class:`Cholesky` factor keeps its blocks of rows without the zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Cholesky", "Triangle", "pack", "unpack"]

BLOCK = 512  # rows of a triangle in work


class Triangle:
    """A symmetric matrix ``[cols, cols]`` that is read by blocks of rows of its lower triangle."""

    def __init__(self, cols: int, rows: Callable[[int, int], Tensor]) -> None:
        """``rows(first, last)``: ``[last - first, last]``; above the diagonal, zeros."""
        self.cols = cols
        self.rows = rows

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Triangle:
        """Of ``[cols, cols]``, lower triangle filled; the matrix is not copied."""
        return cls(matrix.shape[0], lambda first, last: matrix[first:last, :last].tril(first))

    @classmethod
    def of_packed(cls, cols: int, numbers: Callable[[int, int], Tensor]) -> Triangle:
        """Of the lower triangle row by row; ``numbers(first, last)`` gives some of its ``cols (cols+1)/2`` numbers."""

        def rows(first: int, last: int) -> Tensor:
            start = first * (first + 1) // 2
            packed = numbers(start, last * (last + 1) // 2)
            out = packed.new_zeros(last - first, last)
            position = 0
            for row in range(first, last):
                out[row - first, : row + 1] = packed[position : position + row + 1]
                position += row + 1
            return out

        return cls(cols, rows)

    @classmethod
    def of_vectors(cls, vectors: Tensor) -> Triangle:
        """``sum v v'`` over the rows of ``vectors [rank, cols]``."""

        def rows(first: int, last: int) -> Tensor:
            wide = vectors[:, :last].double()
            return (wide[:, first:].T @ wide).tril(first)

        return cls(vectors.shape[1], rows)

    @classmethod
    def zero(cls, cols: int) -> Triangle:
        return cls(cols, lambda first, last: torch.zeros(last - first, last))

    def blocks(self) -> Iterator[tuple[int, int]]:
        return ((first, min(first + BLOCK, self.cols)) for first in range(0, self.cols, BLOCK))

    def product(self, left: Tensor) -> Tensor:
        """``left @ matrix`` for ``left [n, cols]``, in the dtype of ``left``."""
        out = torch.zeros_like(left)
        for first, last in self.blocks():
            part = self.rows(first, last).to(left)
            below, corner = part[:, :first], part[:, first:]
            out[:, :first].addmm_(left[:, first:last], below)
            out[:, first:last].addmm_(left[:, :first], below.T)
            out[:, first:last].addmm_(left[:, first:last], corner + corner.tril(-1).T)
        return out

    def symmetric(self, *, at_least: torch.dtype) -> Tensor:
        """All of it, ``[cols, cols]`` with both triangles, in the type that it is stored in or a wider one."""
        out: Tensor | None = None
        for first, last in self.blocks():
            part = self.rows(first, last)
            part = part.to(torch.promote_types(part.dtype, at_least))
            if out is None:
                out = part.new_empty(self.cols, self.cols)
            out[first:last, :last] = part
            out[:first, first:last] = part[:, :first].T
            corner = part[:, first:]
            out[first:last, first:last] += corner.tril(-1).T
        return torch.empty(0, 0, dtype=at_least) if out is None else out

    def packed(self) -> Tensor:
        """``[cols (cols+1)/2]`` float32, row by row."""
        # By rows: an index of the whole triangle would take several times the matrix.
        out: Tensor | None = None
        position = 0
        for first, last in self.blocks():
            part = self.rows(first, last)
            if out is None:
                out = torch.empty(self.cols * (self.cols + 1) // 2, dtype=torch.float32, device=part.device)
            for row in range(first, last):
                out[position : position + row + 1] = part[row - first, : row + 1]
                position += row + 1
        return torch.empty(0) if out is None else out

    def lower(self) -> Tensor:
        """All of it, ``[cols, cols]`` with zeros above the diagonal."""
        parts = [torch.nn.functional.pad(self.rows(*block), (0, self.cols - block[1])) for block in self.blocks()]
        return torch.cat(parts) if parts else torch.zeros(0, 0)


class Cholesky:
    """``L`` of ``L L' = S``, in blocks of rows ``[last - first, last]``: half of what a square takes."""

    def __init__(self, blocks: list[Tensor]) -> None:
        self._blocks = blocks

    @classmethod
    def of(cls, blocks: list[Tensor]) -> Cholesky | None:
        """Factors the blocks of rows of the lower triangle of ``S``, in place; ``None`` if ``S`` is not positive
        definite (then they hold nothing of use)."""
        self = cls(blocks)
        for number, (row, first, last) in enumerate(self._places()):
            for above, start, end in list(self._places())[:number]:
                piece = row[:, start:end]
                piece.addmm_(row[:, :start], above[:, :start].T, alpha=-1)
                corner = above[:, start:end]
                piece.copy_(torch.linalg.solve_triangular(corner.T, piece, upper=True, left=False))
            corner = row[:, first:last]
            corner.addmm_(row[:, :first], row[:, :first].T, alpha=-1)
            factor, failed = torch.linalg.cholesky_ex(corner)
            if int(failed):
                return None
            corner.copy_(factor)
        return self

    def solve(self, right: Tensor) -> Tensor:
        """``right @ S^-1`` for ``right [n, cols]``."""
        out = right.clone()
        places = list(self._places())
        for row, first, last in places:  # out L' = right
            piece = out[:, first:last]
            piece.addmm_(out[:, :first], row[:, :first].T, alpha=-1)
            piece.copy_(torch.linalg.solve_triangular(row[:, first:].T, piece, upper=True, left=False))
        for row, first, last in reversed(places):  # out L = that
            piece = out[:, first:last]
            piece.copy_(torch.linalg.solve_triangular(row[:, first:], piece, upper=False, left=False))
            out[:, :first].addmm_(piece, row[:, :first], alpha=-1)
        return out

    def times(self, left: Tensor) -> Tensor:
        """``left @ L`` for ``left [n, cols]``: its rows have the norms that ``S`` gives those of ``left``."""
        out = torch.zeros_like(left)
        for row, first, last in self._places():
            out[:, :last].addmm_(left[:, first:last], row)
        return out

    def _places(self) -> Iterator[tuple[Tensor, int, int]]:
        first = 0
        for block in self._blocks:
            yield block, first, block.shape[1]
            first = block.shape[1]


def pack(gram: Tensor) -> Tensor:
    """``[cols (cols+1)/2]`` float32 of the lower triangle of ``[cols, cols]``."""
    return Triangle.of_matrix(gram).packed()


def unpack(packed: Tensor, cols: int) -> Tensor:
    """``[cols, cols]`` with the lower triangle of a packed one, zeros above."""
    return Triangle.of_packed(cols, lambda first, last: packed[first:last]).lower()
