# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the structural losses; imported by `triton_launch.py` alone, where triton is installed.

Two of them work on tokens, several per program. The other two work on a tile of logits
`(num_samples, num_rows, num_columns)`, contiguous float32, whose first `num_rows` columns are the square on the
diagonal; a program treats `BLOCK_ROWS x BLOCK_COLUMNS` of one sample, and samples and row blocks share the first axis
of the grid, the only one that may be longer than 65535.
"""

import triton
import triton.language as tl


@triton.jit
def normalize_kernel(
    tokens,
    normalized,
    inverses,
    num_samples,
    num_tokens,
    dim,
    sample_stride,
    token_stride,
    element_stride,
    normalized_stride,
    zero_norm,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
) -> None:
    """Write `x / |x|` as float32 and `1 / |x|`, or zeros where `|x| < zero_norm`.

    `tokens` are of any float dtype and any strides; `normalized_stride` leads to the next sample of the result.
    """
    positions = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = positions < num_samples * num_tokens
    samples, places = positions // num_tokens, positions % num_tokens
    sources = tokens + (samples * sample_stride + places * token_stride)[:, None]
    targets = normalized + (samples * normalized_stride + places * dim)[:, None]
    squares = tl.zeros([BLOCK_TOKENS, BLOCK_ELEMENTS], dtype=tl.float32)
    for start in range(0, dim, BLOCK_ELEMENTS):
        elements = start + tl.arange(0, BLOCK_ELEMENTS)[None, :]
        is_element = is_token[:, None] & (elements < dim)
        values = tl.load(sources + elements * element_stride, mask=is_element, other=0.0).to(tl.float32)
        squares += values * values
    norms = tl.sqrt(tl.sum(squares, axis=1))
    is_zero = norms < zero_norm
    inverse = tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, norms))
    tl.store(inverses + positions, inverse, mask=is_token)
    for start in range(0, dim, BLOCK_ELEMENTS):
        elements = start + tl.arange(0, BLOCK_ELEMENTS)[None, :]
        is_element = is_token[:, None] & (elements < dim)
        values = tl.load(sources + elements * element_stride, mask=is_element, other=0.0).to(tl.float32)
        tl.store(targets + elements, values * inverse[:, None], mask=is_element)


@triton.jit
def tangent_kernel(
    gradient,
    normalized,
    scale,
    num_samples,
    num_tokens,
    dim,
    gradient_stride,
    normalized_stride,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
) -> None:
    """Overwrite `gradient`, g, by `(g - z (z . g)) scale` with z from `normalized`; the strides lead to the next
    sample."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = positions < num_samples * num_tokens
    samples, places = positions // num_tokens, positions % num_tokens
    targets = gradient + (samples * gradient_stride + places * dim)[:, None]
    directions = normalized + (samples * normalized_stride + places * dim)[:, None]
    products = tl.zeros([BLOCK_TOKENS, BLOCK_ELEMENTS], dtype=tl.float32)
    for start in range(0, dim, BLOCK_ELEMENTS):
        elements = start + tl.arange(0, BLOCK_ELEMENTS)[None, :]
        is_element = is_token[:, None] & (elements < dim)
        values = tl.load(targets + elements, mask=is_element, other=0.0)
        products += values * tl.load(directions + elements, mask=is_element, other=0.0)
    radial = tl.sum(products, axis=1)[:, None]
    factors = tl.load(scale + positions, mask=is_token, other=0.0)[:, None]
    for start in range(0, dim, BLOCK_ELEMENTS):
        elements = start + tl.arange(0, BLOCK_ELEMENTS)[None, :]
        is_element = is_token[:, None] & (elements < dim)
        values = tl.load(targets + elements, mask=is_element, other=0.0)
        values -= tl.load(directions + elements, mask=is_element, other=0.0) * radial
        tl.store(targets + elements, values * factors, mask=is_element)


@triton.jit
def sums_kernel(
    teacher,
    student,
    row_parts,
    column_parts,
    num_samples,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Sums of `exp t`, `(t - s) exp t` and `exp s` over the block's columns and over its rows, diagonal left out.

    `row_parts` is `(column blocks, num_samples, 3, num_rows)`, `column_parts`, for the columns right of the square,
    `(row blocks, num_samples, 3, num_columns - num_rows)`. Every element is written once, without atomics, so the
    result does not depend on the order in which programs run.
    """
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    sample = (tl.program_id(0) // num_row_blocks).to(tl.int64)
    row_block = tl.program_id(0) % num_row_blocks
    column_block = tl.program_id(1)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    is_pair = is_inside & (rows[:, None] != columns[None, :])
    offsets = (sample * num_rows + rows)[:, None] * num_columns + columns[None, :]

    # The diagonal is read, since a mask with holes would forbid wide loads, but replaced before it can matter.
    teacher_logits = tl.where(is_pair, tl.load(teacher + offsets, mask=is_inside, other=0.0), 0.0)
    student_logits = tl.where(is_pair, tl.load(student + offsets, mask=is_inside, other=0.0), 0.0)
    teacher_weights = tl.where(is_pair, tl.exp(teacher_logits), 0.0)
    student_weights = tl.where(is_pair, tl.exp(student_logits), 0.0)
    gaps = teacher_weights * (teacher_logits - student_logits)

    row_out = row_parts + (column_block * num_samples + sample) * 3 * num_rows + rows
    is_row = rows < num_rows
    tl.store(row_out, tl.sum(teacher_weights, axis=1), mask=is_row)
    tl.store(row_out + num_rows, tl.sum(gaps, axis=1), mask=is_row)
    tl.store(row_out + 2 * num_rows, tl.sum(student_weights, axis=1), mask=is_row)

    if (column_block + 1) * BLOCK_COLUMNS > num_rows:
        num_right = num_columns - num_rows
        column_out = column_parts + (row_block * num_samples + sample) * 3 * num_right + columns - num_rows
        is_right = (columns >= num_rows) & (columns < num_columns)
        tl.store(column_out, tl.sum(teacher_weights, axis=0), mask=is_right)
        tl.store(column_out + num_right, tl.sum(gaps, axis=0), mask=is_right)
        tl.store(column_out + 2 * num_right, tl.sum(student_weights, axis=0), mask=is_right)


@triton.jit
def weights_kernel(
    teacher,
    student,
    teacher_shares,
    student_shares,
    sample_stride,
    num_rows,
    num_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Overwrite `student` by `exp(s_ij) (u_i + u_j) - exp(t_ij) (v_i + v_j)`, 0 on the diagonal.

    The shares u (student) and v (teacher) start at the tile's first column; `sample_stride` leads to the next sample.
    """
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    sample = (tl.program_id(0) // num_row_blocks).to(tl.int64)
    row_block = tl.program_id(0) % num_row_blocks
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    is_pair = is_inside & (rows[:, None] != columns[None, :])
    offsets = (sample * num_rows + rows)[:, None] * num_columns + columns[None, :]
    own, other = sample * sample_stride + rows, sample * sample_stride + columns

    shares = (
        tl.load(student_shares + own, mask=rows < num_rows, other=0.0)[:, None]
        + tl.load(student_shares + other, mask=columns < num_columns, other=0.0)[None, :]
    )
    weights = tl.exp(tl.load(student + offsets, mask=is_inside, other=0.0)) * shares
    shares = (
        tl.load(teacher_shares + own, mask=rows < num_rows, other=0.0)[:, None]
        + tl.load(teacher_shares + other, mask=columns < num_columns, other=0.0)[None, :]
    )
    weights -= tl.exp(tl.load(teacher + offsets, mask=is_inside, other=0.0)) * shares
    tl.store(student + offsets, tl.where(is_pair, weights, 0.0), mask=is_inside)
