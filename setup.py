"""Builds infer_fast and, where a C++17 compiler is found, its native CPU backend `infer_fast._native`.

The extension uses pybind11 and no torch headers, so one build serves every torch. Without a compiler the
install goes on and says so; the package then runs on its PyTorch backend.
"""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# OpenMP on Linux, where torch brings libgomp: our loops then run on torch's own threads. std::thread elsewhere.
THREADS = ["-fopenmp"] if sys.platform == "linux" else ["-pthread"]


class OptionalBuildExt(build_ext):
    """Builds what it can: a missing or failing compiler costs the native backend, not the install."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            self._say(error)

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            self._say(error)

    def copy_extensions_to_source(self):
        try:
            super().copy_extensions_to_source()
        except Exception as error:
            self._say(error)

    @staticmethod
    def _say(error):
        print(
            f"infer_fast: the native CPU backend was not built ({error}). "
            "The package works without it, slower: install a C++17 compiler and reinstall to get it."
        )


setup(
    # The kernels lie beside the package and are installed inside it.
    packages=[*find_packages(include=["infer_fast", "infer_fast.*"]), "infer_fast.kernels"],
    package_dir={"infer_fast.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "infer_fast._native",
            [
                "csrc/bindings.cpp",
                "csrc/bn_match.cpp",
                "csrc/bn_match_cut.cpp",
                "csrc/bn_match_statistics.cpp",
                "csrc/compose.cpp",
                "csrc/perturb.cpp",
            ],
            depends=[
                "csrc/bn_match_cut.h",
                "csrc/bn_match_kernels.h",
                "csrc/bn_match_memory.h",
                "csrc/bn_match_statistics.h",
                "csrc/bn_match_target.h",
                "csrc/ops.h",
            ],
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-trapping-math", *THREADS],
            extra_link_args=THREADS,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
