"""Triton kernels without a GPU: each compiles for Hopper, spilling no register, in forms that its launcher asks for."""

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

def compile(kernel, pointers, numbers, constants, warps=4):
    fn = getattr(kernel, "fn", kernel) if not isinstance(kernel, triton.runtime.JITFunction) else kernel
    signature, values = {}, {}
    for name in fn.arg_names:
        if name in constants:
            signature[name], values[(fn.arg_names.index(name),)] = "constexpr", constants[name]
        else:
            signature[name] = pointers.get(name) or numbers.get(name, "i32")
    built = triton.compile(
        ASTSource(fn, signature=signature, constexprs=values),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": warps},
    )
    assert built.asm["cubin"]
    if disassembler.is_file():  # comes with Triton
        binary = pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        told = subprocess.check_output([disassembler, "--dump-resource-usage", binary], text=True)
        assert " STACK:0 " in told, f"{fn.__name__} {constants} spills registers: {told}"
    return 1

disassembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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
        built += compile(kernel, tensors | vectors, {"eps": "fp32"}, constants)
vectors["norms"] = f32
for kernel, constants in (
    (bn_match._finish, {"SPLITS": bn_match.SPLITS, "BLOCK": bn_match.CHANNELS, "WHOLE": True}),
    (bn_match._finish, {"SPLITS": bn_match.SPLITS, "BLOCK": bn_match.CHANNELS, "WHOLE": False}),
    (bn_match._penalty, {"BLOCK": 32}),
    (bn_match._coefficients, {"BLOCK": 1024}),
):
    built += compile(kernel, vectors, {"count": "fp32", "r_var": "fp32"}, constants)
for kind in (triton.language.float32, triton.language.bfloat16):
    constants = {"KIND": kind, "CHUNK": perturb.CHUNK}
    table = dict.fromkeys(["params", "grads", "owners", "starts", "sizes"], "*i64") | {"partial": f32}
    for kernel in (perturb._squares, perturb._step):
        built += compile(kernel, table, {"rho": "fp32", "tiny": "fp32"}, constants, warps=perturb.WARPS)
pointers = dict.fromkeys(["base_index", "compensator_index", "shift", "partner"], "*i64") | dict.fromkeys(
    ["base", "values", "flip"], bytes_) | {"scale": f32, "offset": f32, "lam": f32, "statistics": f32, "out": "*bf16"}
for flag in (True, False):
    constants = dict.fromkeys(["COMPENSATED", "SHIFTED", "FLIPPED", "MIXED"], flag) | {"BLOCK": compose.BLOCK}
    built += compile(compose._compose, pointers, {}, constants)
print(built, "kernels")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_compiles_for_hopper_and_spills_no_register(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "22 kernels"
