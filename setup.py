"""Builds ``otloss/_C``: the CPU kernels and, where nvcc is found, the CUDA kernels.

One shared object holds everything. It uses only LibTorch's stable ABI, so a build works with any
later torch, and the CUDA part is plain ``.cu`` with no torch header, so it is built on every
machine that has nvcc, with or without a GPU, whichever torch is installed.

Environment:
    OTLOSS_BUILD_NATIVE=0   install pure Python; every operation is served by ``otloss.reference``
    OTLOSS_BUILD_CUDA=0     leave the CUDA kernels out
    OTLOSS_WERROR=1         compiler warnings are errors, but not those of torch or pybind11 headers
    OTLOSS_CUDA_ARCH        e.g. "80;90a;100+PTX"; default: sm_80, sm_90a and PTX of the newest
    CUDA_HOME               where the CUDA toolkit is
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the binary must run on
DEFAULT_CUDA_ARCH = "80;90a;120+PTX"


def enabled(variable: str, default: str = "1") -> bool:
    return os.environ.get(variable, default) != "0"


def find_nvcc() -> tuple[str, Path] | None:
    """The compiler and the toolkit folder. The nvcc on PATH may be a wrapper elsewhere."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin/nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    for nvcc in candidates:
        if not nvcc.exists():
            continue
        for toolkit in (nvcc.resolve().parent.parent, Path("/usr/local/cuda")):
            if next(toolkit.glob("lib*/libcudart_static.a"), None):
                return str(nvcc), toolkit
    return None


def gencode_flags() -> list[str]:
    flags = []
    for arch in os.environ.get("OTLOSS_CUDA_ARCH", DEFAULT_CUDA_ARCH).split(";"):
        number, _, ptx = arch.partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildNative(build_ext):
    """Compiles ``.cu`` sources with nvcc and links them with the rest."""

    def build_extension(self, ext: Extension) -> None:
        cuda_sources = [s for s in ext.sources if s.endswith(".cu")]
        ext.sources = [s for s in ext.sources if not s.endswith(".cu")]
        ext.extra_objects = [self.compile_cuda(s) for s in cuda_sources]
        self.compile_in_parallel()
        super().build_extension(ext)

    def compile_cuda(self, source: str) -> str:
        nvcc, _ = find_nvcc()  # type: ignore[misc]
        target = Path(self.build_temp) / Path(source).with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]
        newest = max(Path(p).stat().st_mtime for p in [source, *headers])
        if not (target.exists() and target.stat().st_mtime > newest):
            command = [nvcc, "-c", source, "-o", str(target), "-O3", "-std=c++17", "--threads=0"]
            command += ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-Werror=all-warnings"]
            command += ["-Icsrc", *gencode_flags()]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
        return str(target)

    def compile_in_parallel(self) -> None:
        """distutils compiles one file after another; the files do not depend on each other."""
        from concurrent.futures import ThreadPoolExecutor

        compiler = self.compiler
        compile_all = compiler.compile

        def compile(sources: list[str], **kwargs: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], **kwargs), sources)
            return [obj for group in objects for obj in group]

        compiler.compile = compile


def native_extension() -> Extension:
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths

    sources = [CSRC / "bindings.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    library_dirs = [str(Path(torch.__file__).parent / "lib")]
    libraries = ["torch", "torch_cpu", "c10"]
    toolkit = find_nvcc() if enabled("OTLOSS_BUILD_CUDA") else None
    if toolkit:
        sources += sorted(CSRC.glob("cuda/*.cu"))
        macros += [("OTLOSS_WITH_CUDA", "1"), ("OTLOSS_CUDA_ARCH", f'"{cuda_arch()}"')]
        library_dirs += [str(p.parent) for p in toolkit[1].glob("lib*/libcudart_static.a")]
        libraries += ["cudart_static", "dl", "rt", "pthread"]
    else:
        print("otloss: nvcc was not found or not wanted; building the CPU kernels only", flush=True)
    return Extension(
        "otloss._C",
        sources=[str(s) for s in sources],
        depends=[str(h) for h in [*CSRC.glob("*.h"), *CSRC.glob("cpu/*.h")]],
        include_dirs=["csrc"],
        define_macros=macros,
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args=[
            *("-O3", "-std=c++17", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wextra"),
            *("-fno-math-errno", "-fno-trapping-math", "-g0"),
            *(["-Werror"] if enabled("OTLOSS_WERROR", "0") else []),
            *(f"-isystem{path}" for path in [pybind11.get_include(), *include_paths()]),
        ],
        # torch is loaded before the extension, so its libraries need no path recorded here.
        language="c++",
    )


def cuda_arch() -> str:
    return os.environ.get("OTLOSS_CUDA_ARCH", DEFAULT_CUDA_ARCH)


os.chdir(ROOT)
native = enabled("OTLOSS_BUILD_NATIVE")
setup(
    ext_modules=[native_extension()] if native else [],
    cmdclass={"build_ext": BuildNative},
)
