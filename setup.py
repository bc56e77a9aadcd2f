"""Builds ``otloss/_C``: the CPU kernels and, where nvcc is found, the CUDA kernels.

One shared object holds everything. It uses only LibTorch's stable ABI, so a build works with any
later torch, and the CUDA part is plain ``.cu`` with no torch header, so it is built on every
machine that has nvcc, with or without a GPU, whichever torch is installed.

Environment:
    OTLOSS_BUILD_NATIVE=0   install pure Python; every operation is served by ``otloss.reference``
    OTLOSS_BUILD_CUDA=0     leave the CUDA kernels out
    OTLOSS_WERROR=1         compiler warnings are errors, but not those of torch or pybind11 headers
    OTLOSS_CUDA_ARCH        e.g. "80;90a;90-virtual" (the default): machine code for sm_80 (Ampere,
                            and with it sm_86 and sm_89) and sm_90a (Hopper), and PTX that the
                            driver compiles at first use for all later ones, Blackwell included
    CUDA_HOME               where the CUDA toolkit is
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the binary must run on
DEFAULT_CUDA_ARCH = "80;90a;90-virtual"


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


def cuda_arch() -> str:
    return os.environ.get("OTLOSS_CUDA_ARCH", DEFAULT_CUDA_ARCH)


def gencode_flags() -> list[str]:
    flags = []
    for arch in cuda_arch().split(";"):
        number, _, kind = arch.partition("-")
        target = "compute" if kind == "virtual" else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={target}_{number}")
    return flags


class BuildNative(build_ext):
    """Compiles C++ with the host compiler and ``.cu`` with nvcc, and links one shared object.

    An object is compiled again when its source, a header or its command changed; distutils alone
    would compile everything or, after a change of the environment variables above, nothing.
    """

    def build_extension(self, ext: Extension) -> None:
        # The longest compilations first.
        sources = sorted(ext.sources, key=lambda source: not source.endswith(".cu"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(lambda source: self.compile(ext, source), sources)
            ext.extra_objects = list(objects)
        ext.sources = []
        self.force = True  # linking costs less than knowing whether to
        super().build_extension(ext)

    def compile(self, ext: Extension, source: str) -> str:
        target = Path(self.build_temp) / f"{source}.o"
        command = self.command(ext, source, str(target))
        stamp = target.with_suffix(".command")
        headers = [*CSRC.rglob("*.h"), *(CSRC.rglob("*.cuh") if source.endswith(".cu") else [])]
        newest = max(path.stat().st_mtime for path in [Path(source), *headers])
        fresh = target.exists() and target.stat().st_mtime > newest
        if not (fresh and stamp.exists() and stamp.read_text() == " ".join(command)):
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
            stamp.write_text(" ".join(command))
        return str(target)

    def command(self, ext: Extension, source: str, target: str) -> list[str]:
        macros = [f"-D{name}={value}" for name, value in ext.define_macros]
        include = [f"-I{path}" for path in ext.include_dirs]
        if source.endswith(".cu"):
            nvcc, _ = find_nvcc()  # type: ignore[misc]
            flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
            flags += ["-Xcompiler=-fvisibility=hidden", "-Werror=all-warnings", "--threads=2"]
            return [nvcc, "-c", source, "-o", target, *flags, *include, *gencode_flags()]
        python = [f"-I{path}" for path in self.include_dirs]  # Python.h
        compiler = [*self.compiler.compiler_so, *macros, *include, *python]
        return [*compiler, "-c", source, "-o", target, *ext.extra_compile_args]


def native_extension() -> Extension:
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths

    sources = [*sorted(CSRC.glob("bindings/*.cpp")), *sorted(CSRC.glob("cpu/**/*.cpp"))]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    library_dirs = [str(Path(torch.__file__).parent / "lib")]
    libraries = ["torch", "torch_cpu", "c10"]
    toolkit = find_nvcc() if enabled("OTLOSS_BUILD_CUDA") else None
    if toolkit:
        sources += sorted([*CSRC.glob("cuda/**/*.cu"), *CSRC.glob("cuda/**/*.cpp")])
        macros += [("OTLOSS_WITH_CUDA", "1"), ("OTLOSS_CUDA_ARCH", f'"{cuda_arch()}"')]
        library_dirs += [str(p.parent) for p in toolkit[1].glob("lib*/libcudart_static.a")]
        libraries += ["cudart_static", "dl", "rt", "pthread"]
    else:
        print("otloss: nvcc was not found or not wanted; building the CPU kernels only", flush=True)
    return Extension(
        "otloss._C",
        sources=[str(s) for s in sources],
        depends=[str(h) for h in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]],
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


os.chdir(ROOT)
native = enabled("OTLOSS_BUILD_NATIVE")
setup(
    ext_modules=[native_extension()] if native else [],
    cmdclass={"build_ext": BuildNative},
)
