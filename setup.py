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

import importlib.util
import os
import runpy
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent
CSRC = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the binary must run on
OLDEST_TORCH = (2, 10)
DEFAULT_CUDA_ARCH = "80;90a;90-virtual"
NO_TORCH = """
otloss: no torch >= 2.10 to compile the kernels with ({found}).
Install the build of torch that suits this machine first, for instance
    pip install torch
or set OTLOSS_BUILD_NATIVE=0 to install without the kernels: pure Python, and slow.
Tools that build in an environment of their own need telling to use this one, for instance
    python -m build --wheel --no-isolation
"""


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


def find_torch() -> Path:
    """The folder of the installed torch, which is read and not imported.

    pip builds in isolation: its Python is that of the environment it installs into, but hides what
    is installed there. Only headers and libraries are needed, and those can be read all the same,
    so torch is no build requirement, and pip does not download a second one to compile against.
    Any torch from the oldest on will do, since only the stable ABI is used.
    """
    visible = importlib.util.find_spec("torch")
    folders = [Path(visible.origin).parent.parent] if visible and visible.origin else []
    paths = [sysconfig.get_path("platlib"), *site.getsitepackages([sys.prefix, sys.base_prefix])]
    folders += [Path(path) for path in [*paths, site.getusersitepackages()]]
    found = []
    for torch in [folder / "torch" for folder in folders]:
        if (torch / "version.py").exists() and (torch / "include").is_dir():
            version = runpy.run_path(str(torch / "version.py"))["__version__"]
            if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TORCH:
                return torch
            found.append(f"{torch} is version {version}")
    sys.exit(NO_TORCH.format(found="; ".join(found) or f"none belongs to {sys.executable}"))


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
        import pybind11

        torch = find_torch()  # here, not in native_extension: a source distribution needs no torch
        ext.library_dirs.append(str(torch / "lib"))
        ext.extra_compile_args += [f"-isystem{pybind11.get_include()}", f"-isystem{torch}/include"]
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


class Metadata(dist_info):
    """pip asks for it before it downloads anything, so a missing torch is said at once."""

    def run(self) -> None:
        find_torch()
        super().run()


def native_extension() -> Extension:
    sources = [CSRC / "bindings.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    library_dirs = []
    libraries = ["torch", "torch_cpu", "c10"]
    toolkit = find_nvcc() if enabled("OTLOSS_BUILD_CUDA") else None
    if toolkit:
        sources += sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")])
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
        ],
        # torch is loaded before the extension, so its libraries need no path recorded here.
        language="c++",
    )


os.chdir(ROOT)
native = enabled("OTLOSS_BUILD_NATIVE")
setup(
    ext_modules=[native_extension()] if native else [],
    cmdclass={"build_ext": BuildNative, "dist_info": Metadata} if native else {},
)
