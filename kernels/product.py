"""Rows picked from a table, times a matrix: what the Markov heads spend their time on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(
    total,  # float32 [BLOCK_R, BLOCK_N], what to add to
    table_ptr,  # [*, RANK], contiguous
    index,  # int64 [BLOCK_R], rows of the table
    has_row,  # bool [BLOCK_R]
    matrix_ptr,  # [*, RANK or wider], rows `matrix_stride` apart
    matrix_stride,
    column,  # int64 [BLOCK_N], rows of the matrix
    has_column,  # bool [BLOCK_N]
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + table[index] · matrix[column]ᵀ, summed in float32. Both are stored row by row, so
    every load is a run of BLOCK_K neighbours, whichever rows are picked."""
    for start in range(0, RANK, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < RANK
        left = tl.load(
            table_ptr + index[:, None] * RANK + k[None, :],
            mask=has_row[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            matrix_ptr + column[None, :] * matrix_stride + k[:, None],
            mask=has_column[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(left, right.to(left.dtype), total, input_precision=PRECISION)
    return total
