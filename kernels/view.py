"""The views of a task's images on CUDA: in one launch forward, in one to three backward.

Forward reads base images and what is added to them, and writes what the teacher takes: channels_last, in the dtype of
its pass. Backward adds up the images' gradients, in a fixed order, and takes the sum back through the one view they
share. See infer_fast.ops.view.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 1024, 4  # elements and warps of a program that makes views
ACROSS = 64  # elements of an image that a program of backward adds up: a cache line of bfloat16
DEEP = 32  # images that it reads at a time
LINE = 256  # elements of a program of _uncropped
VECTOR = 8  # elements that a thread moves at a time: 16 bytes of bfloat16
SIZES = ["height", "width", "lanes"]
DRAWS = ["counter_ptr", "shift_ptr", "crop_ptr", "flip_ptr"]


@triton.jit
def _drawn(draws_ptr, counter_ptr, lane, lanes, position, NUMBERS: tl.constexpr):
    """One of this iteration's draws of a lane, int32.

    draws_ptr    pointer, int64 (T, L, NUMBERS)
    counter_ptr  pointer, int64 (1,)              iterations done
    """
    at = (tl.load(counter_ptr) * lanes + lane) * NUMBERS + position
    return tl.load(draws_ptr + at).to(tl.int32)


@triton.jit
def _turned(place, by, size):
    """place - by modulo size, for 0 <= place < size and any by."""
    rest = (place - by) % size
    return tl.where(rest < 0, rest + size, rest)


@triton.jit
def _taps(place, first, length, size):
    """(low, high, weight) of pixels `place` of a crop that is resized to `size`: source pixels, and high's weight.

    Bilinear with half-pixel centres and repeated edges: (place + 1/2) * length / size - 1/2, at least 0.
    """
    exact = (place.to(tl.float32) + 0.5) * (length.to(tl.float32) / size.to(tl.float32)) - 0.5
    exact = tl.where(exact < 0, 0.0, exact)
    low = tl.floor(exact)
    weight = exact - low
    low = low.to(tl.int32)
    return first + low, first + tl.minimum(low + 1, length - 1), weight


@triton.jit
def _pixels(base_ptr, added_ptr, row, column, channel, inside, height, width, ADDED: tl.constexpr):
    """Pixels of one image, and of what is added to it; the pointers are at its first element."""
    at = (channel * height + row) * width + column
    pixel = tl.load(base_ptr + at, mask=inside, other=0.0)
    if ADDED:
        pixel += tl.load(added_ptr + at, mask=inside, other=0.0)
    return pixel


@triton.jit(do_not_specialize=[*SIZES, "lane_stride", "size"], do_not_specialize_on_alignment=DRAWS)
def _view(
    base_ptr, added_ptr, counter_ptr, shift_ptr, crop_ptr, flip_ptr, out_ptr, lane_stride, height, width, lanes, size,
    ADDED: tl.constexpr, CROPPED: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some elements of one image's view: shifted circularly; with CROPPED first cropped, resized back and flipped.

    Grid: (blocks of an image; images of a lane; lanes).

    base_ptr     pointer, float32 (L, C, 3, H, W)   an image after the other; lane_stride elements between lanes
    added_ptr    pointer, float32 (L, 1, 3, H, W)   added to all images of a lane; read with ADDED
    counter_ptr  pointer, int64 (1,)                iterations done
    shift_ptr    pointer, int64 (T, L, 2)           rows down and columns right
    crop_ptr     pointer, int64 (T, L, 4)           top, left, height and width; read with CROPPED, as is flip_ptr
    flip_ptr     pointer, bool (T, L)
    out_ptr      pointer, T (L*C, 3, H, W)          out: channels_last, in any float dtype
    lane_stride  number, int64
    height, width, lanes   numbers, int32           H, W, L
    size         number, int32                      elements of an image, in vectors of VECTOR
    ADDED, CROPPED   whether there is one
    VECTOR       elements to which images are aligned
    BLOCK        elements of a program
    """
    image, lane = tl.program_id(1), tl.program_id(2).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size * VECTOR
    channel, pixel = element % 3, element // 3
    row = _turned(pixel // width, _drawn(shift_ptr, counter_ptr, lane, lanes, 0, 2), height)
    column = _turned(pixel % width, _drawn(shift_ptr, counter_ptr, lane, lanes, 1, 2), width)
    base_ptr += lane * lane_stride + image.to(tl.int64) * size * VECTOR
    added_ptr += lane * size * VECTOR
    if CROPPED:
        flipped = tl.load(flip_ptr + tl.load(counter_ptr) * lanes + lane) != 0
        column = tl.where(flipped, width - 1 - column, column)
        top, left = _drawn(crop_ptr, counter_ptr, lane, lanes, 0, 4), _drawn(crop_ptr, counter_ptr, lane, lanes, 1, 4)
        tall, wide = _drawn(crop_ptr, counter_ptr, lane, lanes, 2, 4), _drawn(crop_ptr, counter_ptr, lane, lanes, 3, 4)
        above, below, down = _taps(row, top, tall, height)
        before, after, right = _taps(column, left, wide, width)
        upper_left = _pixels(base_ptr, added_ptr, above, before, channel, inside, height, width, ADDED)
        upper_right = _pixels(base_ptr, added_ptr, above, after, channel, inside, height, width, ADDED)
        lower_left = _pixels(base_ptr, added_ptr, below, before, channel, inside, height, width, ADDED)
        lower_right = _pixels(base_ptr, added_ptr, below, after, channel, inside, height, width, ADDED)
        left_side = upper_left * (1 - down) + lower_left * down
        right_side = upper_right * (1 - down) + lower_right * down
        seen = left_side * (1 - right) + right_side * right
    else:
        seen = _pixels(base_ptr, added_ptr, row, column, channel, inside, height, width, ADDED)
    place = (lane * tl.num_programs(1) + image) * size * VECTOR + element
    tl.store(out_ptr + place, seen.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[*SIZES, "size", "images", "per_lane"],
    do_not_specialize_on_alignment=["counter_ptr", "shift_ptr"],
)
def _sum_back(
    grad_ptr, counter_ptr, shift_ptr, out_ptr, height, width, lanes, size, images, per_lane,
    SHIFTED: tl.constexpr, VECTOR: tl.constexpr, ACROSS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Gradients of views added up over some images in a fixed order, and shifted back.

    Grid: (blocks of an image; sums).

    grad_ptr     pointer, T (S*images, 3, H, W)     channels_last, in any float dtype; S sums of `images` each
    counter_ptr, shift_ptr   pointers               as _view's; read with SHIFTED
    out_ptr      pointer, float32 (S, 3, H, W)      out
    height, width, lanes   numbers, int32           H, W, L
    size         number, int32                      elements of an image, in vectors of VECTOR
    images       number, int32                      of a sum
    per_lane     number, int32                      sums of a lane
    SHIFTED      whether the sums are shifted back
    VECTOR       elements to which images are aligned
    ACROSS, DEEP elements of an image, and images, that are read at a time
    """
    which = tl.program_id(1)
    element = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    inside = element < size * VECTOR
    total = tl.zeros((DEEP, ACROSS), tl.float32)
    for begin in range(0, images, DEEP):
        image = begin + tl.arange(0, DEEP)
        place = (which.to(tl.int64) * images + image)[:, None] * size * VECTOR + element[None, :]
        known = (image < images)[:, None] & inside[None, :]
        total += tl.load(grad_ptr + place, mask=known, other=0.0).to(tl.float32)
    channel, pixel = element % 3, element // 3
    row, column = pixel // width, pixel % width
    if SHIFTED:
        lane = (which // per_lane).to(tl.int64)
        row = _turned(row, _drawn(shift_ptr, counter_ptr, lane, lanes, 0, 2), height)
        column = _turned(column, _drawn(shift_ptr, counter_ptr, lane, lanes, 1, 2), width)
    at = which.to(tl.int64) * size * VECTOR + (channel * height + row) * width + column
    tl.store(out_ptr + at, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=DRAWS)
def _uncropped(
    grad_ptr, counter_ptr, shift_ptr, crop_ptr, flip_ptr, out_ptr, height, width, lanes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a view taken back through its rows, or through its columns: the transpose of that linear map.

    Grid: (blocks of an image; lanes).

    grad_ptr     pointer, float32 (L, 3, H, W)
    counter_ptr, shift_ptr, crop_ptr, flip_ptr   pointers   as _view's
    out_ptr      pointer, float32 (L, 3, H, W)              out
    height, width, lanes   numbers, int32                   H, W, L
    ROWS         whether it is the map of rows; that of columns may be flipped
    BLOCK        elements of a program
    """
    lane = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < 3 * height * width
    column, line = element % width, element // width
    row = line % height
    position = row if ROWS else column  # along the axis
    length = height if ROWS else width
    stride = width if ROWS else 1
    axis: tl.constexpr = 0 if ROWS else 1
    shift = _drawn(shift_ptr, counter_ptr, lane, lanes, axis, 2)
    first = _drawn(crop_ptr, counter_ptr, lane, lanes, axis, 4)
    extent = _drawn(crop_ptr, counter_ptr, lane, lanes, axis + 2, 4)
    flipped = tl.load(flip_ptr + tl.load(counter_ptr) * lanes + lane) != 0
    start_ptr = grad_ptr + lane * 3 * height * width + element - position * stride
    total = tl.zeros((BLOCK,), tl.float32)
    for seen in range(length):
        place = _turned(seen, shift, length)
        if not ROWS:
            place = tl.where(flipped, length - 1 - place, place)
        low, high, weight = _taps(place, first, extent, length)
        share = tl.where(position == low, 1 - weight, 0.0) + tl.where(position == high, weight, 0.0)
        total += share * tl.load(start_ptr + seen * stride, mask=inside, other=0.0)
    tl.store(out_ptr + lane * 3 * height * width + element, total, mask=inside)


def view(
    base: torch.Tensor,
    added: torch.Tensor | None,
    shift: torch.Tensor,
    crop: torch.Tensor | None,
    flip: torch.Tensor | None,
    counter: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills out (L*C, 3, H, W), channels_last, with the views of base (L, C, 3, H, W), whose images are contiguous."""
    lanes, images, _, height, width = base.shape
    size, vector = _sized(height, width)
    _view[(triton.cdiv(3 * height * width, BLOCK), images, lanes)](
        base, _or(added, base), counter, shift, _or(crop, shift), _or(flip, shift), out, base.stride(0),
        height, width, lanes, size,
        VECTOR=vector, ADDED=added is not None, CROPPED=crop is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def sum_back(grad: torch.Tensor, shift: torch.Tensor | None, counter: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out (S, 3, H, W) with sums of grad (S*images, 3, H, W), channels_last, shifted back unless shift is None.

    shift: int64 (T, L, 2); S is a multiple of L.
    """
    sums, _, height, width = out.shape
    images, lanes = len(grad) // sums, sums if shift is None else shift.shape[1]
    size, vector = _sized(height, width)
    _sum_back[(triton.cdiv(3 * height * width, ACROSS), sums)](
        grad, counter, _or(shift, counter), out, height, width, lanes, size, images, sums // lanes,
        VECTOR=vector, SHIFTED=shift is not None, ACROSS=ACROSS, DEEP=1 if images == 1 else DEEP, num_warps=WARPS,
    )  # fmt: skip


def uncropped(
    grad: torch.Tensor,
    shift: torch.Tensor,
    crop: torch.Tensor,
    flip: torch.Tensor,
    counter: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills out (L, 3, H, W) with what grad (L, 3, H, W), float32, gives the image that was cropped; two launches."""
    lanes, _, height, width = out.shape
    grid = (triton.cdiv(3 * height * width, LINE), lanes)
    rows = torch.empty_like(out)
    for source, filled, which in ((grad, rows, True), (rows, out, False)):
        _uncropped[grid](
            source, counter, shift, crop, flip, filled, height, width, lanes, ROWS=which, BLOCK=LINE, num_warps=WARPS
        )


def _sized(height: int, width: int) -> tuple[int, int]:
    """Elements of an image in vectors, and the elements of a vector: VECTOR where images are whole vectors, else 1."""
    size = 3 * height * width
    vector = VECTOR if size % VECTOR == 0 else 1
    return size // vector, vector


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if tensor is None else tensor
