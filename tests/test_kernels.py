"""Triton kernels without a GPU: each compiles for Hopper, spilling no register, in forms that its launcher asks for;
those that are bound by memory move 16 bytes at a time."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, pathlib, subprocess
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from infer_fast.kernels import bn_match, compose, perturb

def compile(kernel, pointers, numbers, constants, warps=4, wide=()):
    fn = getattr(kernel, "fn", kernel) if not isinstance(kernel, triton.runtime.JITFunction) else kernel
    signature, values, known = {}, {}, {}
    for position, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name], values[(position,)] = "constexpr", constants[name]
        else:
            signature[name] = pointers.get(name) or numbers.get(name, "i32")
            if name in pointers or name in ("channels", "plane"):  # as a launch finds them, for all but odd shapes
                known[(position,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(fn, signature=signature, constexprs=values, attrs=known),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": warps},
    )
    assert built.asm["cubin"]
    for access in wide:
        assert access in built.asm["ptx"], f"{fn.__name__} {constants} has no {access}"
    if disassembler.is_file():  # comes with Triton
        binary = pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        told = subprocess.check_output([disassembler, "--dump-resource-usage", binary], text=True)
        assert " STACK:0 " in told, f"{fn.__name__} {constants} spills registers: {told}"
    return 1

disassembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
both = ("ld.global.v4", "st.global.v4")
built = 0
f32, bytes_ = "*fp32", "*u8"
vectors = dict.fromkeys(["weight", "bias", "running_mean", "running_var", "partial", "coefficients", "mean", "var",
                         "penalty", "grad_penalty"], f32)
for dtype, rows, activation, residual in [
    ("*bf16", True, 1, True), ("*bf16", False, 1, True), ("*fp32", True, 3, False), ("*fp32", False, 2, True),
    ("*fp16", True, 3, True), ("*bf16", True, 0, False),
]:
    tensors = dict.fromkeys(["x", "residual", "y", "grad_y", "grad_x", "grad_residual"], dtype) | {"mask": bytes_}
    constants = {"ACTIVATION": activation, "RESIDUAL": residual, "MASK": residual and activation in (1, 2),
                 "WEIGHT": True, "BIAS": True, "ROWS": rows, "BLOCK": 64, "TILE": 2048}
    for kernel in (bn_match._forward, bn_match._backward):
        built += compile(kernel, tensors | vectors, {"eps": "fp32"}, constants, wide=both)
vectors["norms"] = f32
for kernel, constants in (
    (bn_match._finish, {"SPLITS": bn_match.SPLITS, "BLOCK": bn_match.CHANNELS, "WHOLE": True}),
    (bn_match._finish, {"SPLITS": bn_match.SPLITS, "BLOCK": bn_match.CHANNELS, "WHOLE": False}),
    (bn_match._penalty, {"BLOCK": 32}),
    (bn_match._coefficients, {"BLOCK": 1024}),
):
    built += compile(kernel, vectors, {"count": "fp32", "r_var": "fp32"}, constants)
for kind in (triton.language.float32, triton.language.bfloat16):
    constants = {"KIND": kind, "ALIGNED": kind == triton.language.float32, "CHUNK": perturb.CHUNK}
    table = dict.fromkeys(["params", "grads", "owners", "starts", "sizes"], "*i64") | {"partial": f32}
    for kernel, wide in ((perturb._squares, both[:1]), (perturb._step, both)):
        wide = wide if constants["ALIGNED"] else ()
        built += compile(kernel, table, {"rho": "fp32", "tiny": "fp32"}, constants, perturb.WARPS, wide)
pointers = dict.fromkeys(["base_index", "compensator_index", "shift", "partner"], "*i64") | dict.fromkeys(
    ["base", "values", "flip"], bytes_) | {"scale": f32, "offset": f32, "lam": f32, "statistics": f32, "out": "*bf16"}
for flag in (True, False):
    constants = dict.fromkeys(["COMPENSATED", "SHIFTED", "FLIPPED", "MIXED"], flag) | {"BLOCK": compose.BLOCK}
    built += compile(compose._compose, pointers, {}, constants)
print(built, "kernels")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles_for_hopper_spills_no_register_and_moves_16_bytes_at_a_time(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "22 kernels"
