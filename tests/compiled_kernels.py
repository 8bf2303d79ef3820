"""Compiles every Triton kernel for Hopper, in forms that its launcher asks for; needs no GPU.

    TRITON_CACHE_DIR=... python -m tests.compiled_kernels    # fails where a kernel spills a register or lacks vectors
    TRITON_CACHE_DIR=... python -m tests.compiled_kernels -v # says what each takes

Its own program, for Triton must not have been imported with TRITON_INTERPRET set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import triton
from infer_fast.kernels import (
    adam,
    bn_match,
    bn_match_statistics,
    compose,
    max_pool,
    objective,
    perturb,
    scale_shift,
    view,
)
from infer_fast.kernels.bn_match_plan import plan
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # comes with Triton
HOPPER = GPUTarget("cuda", 90, 32)
LOADS, STORES = "ld.global.v4", "st.global.v4"  # 16 bytes at a time
NARROW = {  # what moves one element of a tensor at a time
    "*bf16": ("ld.global.b16", "st.global.b16"),
    "*fp16": ("ld.global.b16", "st.global.b16"),
    "*fp32": (),  # as the vectors of parameters are read
}
SINGLE_BYTES = ("ld.global.b8", "st.global.b8")
MULTIPROCESSORS = 132
FLOATS, BYTES, LONGS = "*fp32", "*u8", "*i64"
TENSORS = ("x", "residual", "y", "grad_y", "grad_y2", "grad_x", "grad_residual")  # bn_match's, all of one type


class Form(NamedTuple):
    """A kernel as a launcher asks for it: the types of pointers and numbers (int32 where not named), constants."""

    kernel: triton.runtime.JITFunction
    pointers: dict[str, str]
    numbers: dict[str, str]
    constants: Mapping[str, object]
    warps: int = 4
    wide: tuple[str, ...] = ()  # instructions that must be there
    narrow: tuple[str, ...] = ()  # instructions that must not


def bn_match_passes() -> Iterator[Form]:
    names = ("weight", "bias", "running_mean", "running_var", "partial", "mean", "var", "norms", "grad_penalty")
    vectors = {f"{name}_ptr": FLOATS for name in names}
    numbers = dict.fromkeys(["eps", "count", "r_var"], "fp32")
    for dtype, rows, activation, residual, channels, plane in [
        *(("*bf16", True, activation, residual, channels, 1024)
          for channels in (24, 40, 144, 200) for activation, residual in ((3, False), (1, True))),
        ("*bf16", True, 1, True, 512, 16),
        ("*bf16", False, 1, True, 64, 1024),
        ("*fp32", True, 3, False, 64, 1024),
        ("*fp32", False, 2, True, 64, 256),
        ("*fp16", True, 3, True, 64, 1024),
        ("*bf16", True, 0, False, 960, 16),
        ("*bf16", True, 1, True, 67, 45),  # no whole vectors
        ("*fp32", False, 3, True, 67, 49),
    ]:  # fmt: skip
        tensors = {f"{name}_ptr": dtype for name in TENSORS}
        cut = plan(100, channels, plane, rows, 1, 4 if dtype == "*fp32" else 2, MULTIPROCESSORS)
        constants = {
            "ACTIVATION": activation,
            "RESIDUAL": residual,
            "MASK": residual and activation in (1, 2),
            "WEIGHT": True,
            "BIAS": True,
            "ROWS": rows,
            "VECTOR": cut.vector,
            "BLOCK": cut.block,
            "TILE": cut.tile,
        }
        pointers = tensors | vectors | {"mask_ptr": BYTES, "arrived_ptr": "*i32"}
        wide, narrow = ((LOADS, STORES), NARROW[dtype]) if cut.vector > 1 else ((), ())
        yield Form(bn_match._forward, pointers, numbers, constants, cut.warps, wide, narrow)
        for second in (False, True):
            given = constants | {"SECOND": second}
            yield Form(bn_match._backward, pointers, numbers, given, cut.warps, wide, narrow)


def bn_match_sums() -> Iterator[Form]:
    names = ("partial", "sums", "running_var", "mean", "var", "norms", "penalty")
    pointers = {f"{name}_ptr": FLOATS for name in names} | {"arrived_ptr": "*i32"}
    sizes = ("SHARE", "HEIGHT", "WIDTH", "LAST_HEIGHT", "LAST_WIDTH")
    constants = {name: getattr(bn_match_statistics, name) for name in sizes}
    numbers = {"count": "fp32", "r_var": "fp32"}
    yield Form(bn_match_statistics._finish, pointers, numbers, constants, bn_match_statistics.WARPS)
    yield Form(bn_match_statistics._norms, pointers, {}, {"BLOCK": bn_match_statistics.LAST_WIDTH})


def perturb_steps() -> Iterator[Form]:
    tables = {f"{name}_ptr": LONGS for name in ("params", "grads", "owners", "starts", "sizes")}
    pointers = tables | {"partial_ptr": FLOATS}
    for kind in (triton.language.float32, triton.language.bfloat16):
        aligned = kind == triton.language.float32
        constants = {"KIND": kind, "ALIGNED": aligned, "CHUNK": perturb.CHUNK}
        for kernel, wide in ((perturb._squares, (LOADS,)), (perturb._step, (LOADS, STORES))):
            numbers = {"rho": "fp32", "tiny": "fp32"}
            yield Form(kernel, pointers, numbers, constants, perturb.WARPS, wide if aligned else ())


def adam_steps() -> Iterator[Form]:
    names = ("optimised", "m", "v", "gradient", "lr", "low", "high")
    pointers = {f"{name}_ptr": FLOATS for name in names}
    pointers |= {"counter_ptr": LONGS, "now_ptr": LONGS, "broken_ptr": "*i32"}
    numbers = dict.fromkeys(["beta1", "beta2", "log2_beta1", "log2_beta2", "epsilon"], "fp32")
    constants = {"VECTOR": adam.VECTOR, "CHUNK": adam.CHUNK}
    yield Form(adam._look, pointers, numbers, constants, adam.WARPS, (LOADS,))
    for bounded in (True, False):
        yield Form(adam._update, pointers, numbers, constants | {"BOUNDED": bounded}, adam.WARPS, (LOADS, STORES))


def max_pools() -> Iterator[Form]:
    names = "KERNEL_HEIGHT", "KERNEL_WIDTH", "STRIDE_DOWN", "STRIDE_RIGHT", "PADDING_TOP", "PADDING_LEFT"
    for dtype, window, vector in [
        ("*bf16", (3, 3, 2, 2, 1, 1), 8),
        ("*bf16", (2, 2, 2, 2, 0, 0), 8),
        ("*fp16", (3, 3, 1, 1, 1, 1), 8),
        ("*fp32", (3, 3, 2, 2, 1, 1), 4),
        ("*bf16", (3, 3, 2, 2, 0, 0), 1),  # contiguous, or no whole vectors
        ("*bf16", (15, 15, 1, 1, 7, 7), 8),
    ]:
        constants = dict(zip(names, window, strict=True)) | {"VECTOR": vector, "BLOCK": max_pool.BLOCK}
        pointers = {f"{name}_ptr": dtype for name in ("x", "y", "grad_y", "grad_x")} | {"position_ptr": BYTES}
        wide, narrow = ((LOADS, STORES), (*NARROW[dtype], *SINGLE_BYTES)) if vector > 1 else ((), ())
        for kernel in (max_pool._pool, max_pool._unpool):
            yield Form(kernel, pointers, {}, constants, max_pool.WARPS, wide, narrow)


def scales_and_shifts() -> Iterator[Form]:
    vectors = {"scale_ptr": FLOATS, "shift_ptr": FLOATS}
    for dtype, activation, residual, rows, vector in [
        ("*bf16", 1, True, True, 8),
        ("*fp32", 3, False, True, 4),
        ("*fp16", 1, True, False, 8),
        ("*bf16", 0, False, True, 1),  # no whole vectors
    ]:
        pointers = {f"{name}_ptr": dtype for name in ("x", "residual", "y")} | vectors
        constants = {"ACTIVATION": activation, "RESIDUAL": residual, "ROWS": rows, "VECTOR": vector}
        constants |= {"BLOCK": scale_shift.BLOCK}
        wide, narrow = ((LOADS, STORES), (*NARROW[dtype], *["ld.global.b32"] * rows)) if vector > 1 else ((), ())
        yield Form(scale_shift._scale_shift, pointers, {}, constants, scale_shift.WARPS, wide, narrow)


def compose_batches() -> Iterator[Form]:
    types = {
        LONGS: ("base_index", "compensator_index", "shift", "partner"),
        BYTES: ("base", "values", "flip"),
        FLOATS: ("scale", "offset", "lam", "statistics"),
        "*bf16": ("out",),
    }
    pointers = {f"{name}_ptr": kind for kind, names in types.items() for name in names}
    for flag in (True, False):
        constants = dict.fromkeys(["COMPENSATED", "SHIFTED", "FLIPPED", "MIXED"], flag) | {"BLOCK": compose.BLOCK}
        yield Form(compose._compose, pointers, {}, constants)


def views() -> Iterator[Form]:
    draws = {"counter_ptr": LONGS, "shift_ptr": LONGS, "crop_ptr": LONGS, "flip_ptr": "*i1"}
    seen = draws | {"base_ptr": FLOATS, "added_ptr": FLOATS, "out_ptr": "*bf16"}
    for cropped in (True, False):
        constants = {"ADDED": True, "CROPPED": cropped, "VECTOR": view.VECTOR, "BLOCK": view.BLOCK}
        yield Form(view._view, seen, {}, constants, view.WARPS, (STORES,))
    for shifted, deep in ((True, view.DEEP), (False, view.DEEP), (True, 1)):
        constants = {"SHIFTED": shifted, "VECTOR": view.VECTOR, "ACROSS": view.ACROSS, "DEEP": deep}
        pointers = {"grad_ptr": "*bf16", "out_ptr": FLOATS, "counter_ptr": LONGS, "shift_ptr": LONGS}
        yield Form(view._sum_back, pointers, {}, constants, view.WARPS, (LOADS,) if deep > 1 else ())
    for rows in (True, False):
        pointers = draws | {"grad_ptr": FLOATS, "out_ptr": FLOATS}
        yield Form(view._uncropped, pointers, {}, {"ROWS": rows, "BLOCK": view.LINE}, view.WARPS)


def objectives() -> Iterator[Form]:
    floats = ("penalty", "rows", "sums", "loss", "upstream", "grad_penalty")
    vectors = {f"{name}_ptr": FLOATS for name in floats} | {"targets_ptr": LONGS, "arrived_ptr": "*i32"}
    for dtype in ("*bf16", FLOATS):
        pointers = vectors | {"logits_ptr": dtype, "grad_logits_ptr": dtype}
        sizes = {"BLOCK": objective.BLOCK}
        yield Form(objective._lose, pointers, {"r_bn": "fp32"}, sizes | {"ROWS": objective.ROWS}, objective.WARPS)
        yield Form(objective._slope, pointers, {"r_bn": "fp32"}, sizes, objective.WARPS)


def check(form: Form, folder: Path) -> None:
    """Compiles a form; fails where an instruction that must be there is not, or registers are spilled."""
    fn = form.kernel
    signature, values, known = {}, {}, {}
    for position, (name, parameter) in enumerate(zip(fn.arg_names, fn.params, strict=True)):
        if name in form.constants:
            signature[name], values[(position,)] = "constexpr", form.constants[name]
        else:
            signature[name] = form.pointers.get(name) or form.numbers.get(name, "i32")
            if name in form.pointers and not parameter.do_not_specialize_on_alignment:  # as a launch finds them
                known[(position,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(fn, signature=signature, constexprs=values, attrs=known),
        target=HOPPER,
        options={"num_warps": form.warps},
    )
    said = f"{fn.__name__} {form.constants}"
    assert built.asm["cubin"], said
    for access in form.wide:
        assert access in built.asm["ptx"], f"{said} has no {access}"
    for access in form.narrow:
        assert access not in built.asm["ptx"], f"{said} has {access}"
    if DISASSEMBLER.is_file():
        binary = folder / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        told = subprocess.check_output([DISASSEMBLER, "--dump-resource-usage", binary], text=True)
        if "-v" in sys.argv:
            print(fn.__name__, form.constants, form.warps, " ".join(re.findall(r"(?:REG|STACK|SHARED):\d+", told)))
        assert " STACK:0 " in told, f"{said} spills registers: {told}"


if __name__ == "__main__":
    forms = [
        *bn_match_passes(),
        *bn_match_sums(),
        *perturb_steps(),
        *adam_steps(),
        *compose_batches(),
        *views(),
        *max_pools(),
        *scales_and_shifts(),
        *objectives(),
    ]
    for form in forms:
        check(form, Path(os.environ["TRITON_CACHE_DIR"]))
    print(len(forms), "kernels")
