"""Builds ``otloss/_C``: the CPU kernels and, where they can be of use, the CUDA kernels.

One shared object holds everything. It uses only LibTorch's stable ABI, so a build works with any
later torch, and ``.cu`` files include no torch header, so nvcc compiles them whichever torch is
installed. ninja compiles, in parallel and with progress. An object is named by a hash of its
command, its source and the headers that the source includes, and is kept in the user's cache: an
unchanged file is compiled once per machine, whatever checkout or environment it is built in.

Environment:
    OTLOSS_BUILD_NATIVE=0   install pure Python; every operation is served by ``otloss.reference``
    OTLOSS_BUILD_CUDA       auto (the default): compile the CUDA kernels if nvcc is found and a GPU
                            is visible (for that GPU alone) or torch is a CUDA build (for the
                            release list); 1: always; 0: never
    OTLOSS_CUDA_ARCH        overrides the list, e.g. "80;90a;90-virtual" (the release list): machine
                            code for sm_80 (Ampere, and with it sm_86 and sm_89) and sm_90a
                            (Hopper), and PTX that the driver compiles for all later ones
    OTLOSS_WERROR=1         compiler warnings are errors, but not those of torch or pybind11 headers
    OTLOSS_CACHE            where objects are kept (default: ~/.cache/otloss)
    MAX_JOBS                how many files are compiled at once (default: the number of cores)
    CXX, CUDA_HOME          the C++ compiler, the CUDA toolkit
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")
OLDEST_TORCH = (2, 10)  # that the binary must run on
TORCH_TARGET_VERSION = "0x020a000000000000"  # the same, as torch's headers take it
RELEASE_ARCH = "80;90a;90-virtual"
CACHE_SECONDS = 90 * 24 * 3600  # how long an object is kept

CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fopenmp-simd", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-g0"),
]
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr"),
    *("-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"),
]


def variable(name: str, default: str, allowed: tuple[str, ...] = ("0", "1")) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        sys.exit(f"otloss: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def say(message: str) -> None:
    print(f"otloss: {message}", flush=True)


# ---------------------------------------------------------------------- what the build stands on


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """torch of the environment that is installed into, found without importing it.

    With build isolation pip hides the environment's packages from ``sys.path``, but the interpreter
    and so its ``site-packages`` are the environment's own. Those of the Python below a virtual
    environment will do too, since only the stable ABI is used.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    sites = [sysconfig.get_path("platlib"), *site.getsitepackages([sys.prefix, sys.base_prefix])]
    folders += [Path(path) / "torch" for path in [*sites, site.getusersitepackages()]]
    too_old = ""
    for folder in folders:
        if (folder / "version.py").exists():
            about: dict[str, str | None] = {}
            exec((folder / "version.py").read_text(), about)
            found = Torch(folder, str(about["__version__"]), about.get("cuda"))
            if tuple(map(int, found.version.split(".")[:2])) >= OLDEST_TORCH:
                return found
            too_old = f" ({folder} is version {found.version})"
    sys.exit(
        f"otloss: no torch >= 2.10 to compile the kernels with{too_old}.\n"
        "Install the build of torch that suits this machine first, for instance\n"
        "    pip install torch\n"
        "or set OTLOSS_BUILD_NATIVE=0 for a slow version in plain torch. A tool that builds in an\n"
        "environment of its own must be told to use this one: python -m build --no-isolation"
    )


def compiler() -> list[str]:
    """The C++ compiler: CXX, or the one that Python was built with, or g++, clang++ or c++."""
    candidates = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "g++", "clang++", "c++"]
    for command in filter(None, candidates):
        words = shlex.split(command)
        if shutil.which(words[0]):
            return words
        if command == os.environ.get("CXX"):
            break
    sys.exit(
        f"otloss: no C++ compiler was found ({os.environ.get('CXX') or 'g++'}). Install one "
        "(g++ >= 12) or name it in CXX; OTLOSS_BUILD_NATIVE=0 installs a slow version in plain "
        "torch that needs none."
    )


class Cuda(NamedTuple):
    nvcc: str
    library_dir: Path
    arch: str

    def gencode(self) -> list[str]:
        flags = []
        for arch in self.arch.split(";"):
            number, _, kind = arch.partition("-")
            target = "compute" if kind == "virtual" else "sm"
            flags.append(f"-gencode=arch=compute_{number},code={target}_{number}")
        return flags


def find_nvcc() -> tuple[str, Path] | None:
    """The compiler and the folder of its libraries. The nvcc on PATH may be a wrapper elsewhere."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for nvcc in filter(os.path.exists, candidates):
        for toolkit in (Path(nvcc).resolve().parent.parent, Path("/usr/local/cuda")):
            library = next(toolkit.glob("lib*/libcudart_static.a"), None)
            if library:
                return nvcc, library.parent
    return None


def visible_arch() -> str:
    """Architectures of the GPUs that the driver shows, empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    numbers = {line.replace(".", "") for line in answer.stdout.split()}
    return ";".join(sorted(n + "a" if n == "90" else n for n in numbers if n.isdigit()))


def find_cuda(torch: Torch) -> Cuda | None:
    """The CUDA toolkit if the CUDA kernels are to be compiled; says so where they are not."""
    wanted = variable("OTLOSS_BUILD_CUDA", "auto", ("auto", "0", "1"))
    if wanted == "0":
        return None
    found = find_nvcc()
    gpus = visible_arch() if found else ""
    if not found:
        if wanted == "1":
            sys.exit("otloss: OTLOSS_BUILD_CUDA=1, but nvcc was not found; name it in CUDA_HOME")
        say("CPU kernels only: nvcc was not found")
        return None
    if wanted == "auto" and not gpus and not torch.cuda:
        say("CPU kernels only: no GPU, torch without CUDA (OTLOSS_BUILD_CUDA=1 compiles for GPUs)")
        return None
    arch = os.environ.get("OTLOSS_CUDA_ARCH") or gpus or RELEASE_ARCH
    say(f"CPU and CUDA kernels, for {arch}")
    return Cuda(*found, arch)


# ---------------------------------------------------------------------------------- compilation


def cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otloss"
    return Path(os.environ.get("OTLOSS_CACHE") or default).resolve()


@functools.cache
def included(path: Path, folders: tuple[Path, ...]) -> frozenset[Path]:
    """A source of the project and the project's headers that it includes, directly or not."""
    files = {path}
    for name in re.findall(r'^\s*#\s*include\s+"(.+?)"', path.read_text(), re.MULTILINE):
        places = (folder / name for folder in (path.parent, *folders))
        header = next(filter(Path.exists, places), None)
        files |= included(header, folders) if header else set()
    return frozenset(files)


class Compilation(NamedTuple):
    source: Path
    command: list[str]  # but for where the object goes
    versions: str  # of the compiler and of headers that are not the project's

    def files(self) -> list[Path]:
        """All of the project that it compiles."""
        folders = tuple(Path(word[2:]) for word in self.command if word.startswith("-I"))
        return sorted(included(self.source, folders))

    def object(self) -> Path:
        """Where the cache keeps the result; the name changes with all that it is made of."""
        # Headers that are not the project's count by version: pip puts them elsewhere every time.
        command = [word for word in self.command if not word.startswith("-isystem")]
        content = hashlib.sha256(repr((command, self.versions)).encode())
        for path in self.files():
            content.update(f"{path}\n".encode() + path.read_bytes())
        return cache_folder() / f"{self.source.stem}-{content.hexdigest()[:24]}.o"


def version_of(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


def compilations(torch: Torch, cuda: Cuda | None) -> list[Compilation]:
    """Every source with its command. Only the bindings see torch, Python and pybind11."""
    import pybind11

    werror = variable("OTLOSS_WERROR", "0") == "1"
    cxx, python = compiler(), sysconfig.get_path("include")
    gcc = version_of(cxx[0])
    # clang warns of each loop that it does not vectorise though it was allowed to
    quiet = ["-Wno-pass-failed"] if "clang" in gcc else []
    own = shlex.split(os.environ.get("CXXFLAGS", ""))
    kernel = [*cxx, *CXX_FLAGS, *own, *quiet, *(["-Werror"] if werror else []), f"-I{CSRC}", "-c"]
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    if cuda:
        macros += ["-DOTLOSS_WITH_CUDA", f'-DOTLOSS_CUDA_ARCH="{cuda.arch}"']
    system = [pybind11.get_include(), str(torch.folder / "include"), python]
    # Bindings hold no loop that repays optimisation.
    binding = [*kernel, "-O2", *macros, *(f"-isystem{path}" for path in system)]
    headers = f"torch {torch.version} pybind11 {pybind11.__version__} {sys.version}"
    bindings = [CSRC / "bindings" / name for name in ("operations.cpp", "module.cpp")]
    sources = [
        *(Compilation(path, [*binding, str(path)], gcc + headers) for path in bindings),
        *(Compilation(path, [*kernel, str(path)], gcc) for path in find("core", "cpu")),
    ]
    if not cuda:
        return sources
    werror_cuda = ["-Werror=all-warnings"] if werror else []
    nvcc = [cuda.nvcc, *NVCC_FLAGS, *werror_cuda, *cuda.gencode(), f"-I{CSRC}", "-c"]
    both = version_of(cuda.nvcc) + gcc
    return [  # the slowest first
        *(Compilation(path, [*nvcc, str(path)], both) for path in find("cuda", suffix="cu")),
        *(Compilation(path, [*kernel, str(path)], gcc) for path in find("cuda")),
        *sources,
    ]


def find(*folders: str, suffix: str = "cpp") -> list[Path]:
    return sorted(path for name in folders for path in CSRC.glob(f"{name}/**/*.{suffix}"))


def libraries(torch: Torch, cuda: Cuda | None) -> list[str]:
    # torch is loaded before the extension, so its libraries need no path recorded here.
    flags = [f"-L{torch.folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if cuda:
        flags += [f"-L{cuda.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return flags


def write_ninja(path: Path, jobs: list[Compilation], link_flags: list[str], target: str) -> None:
    """The build of ``target``: what the cache lacks is compiled, then all is linked."""
    from ninja.ninja_syntax import Writer, escape, escape_path

    with path.open("w") as file:
        writer = Writer(file)
        writer.variable("builddir", str(path.parent))
        # The cache is shared with other builds: an object appears there whole.
        writer.rule("compile", "$compile -o $out.$$$$ && mv $out.$$$$ $out", description="$source")
        writer.rule("link", "$link", description="$out")
        objects = []
        for job in jobs:
            objects.append(str(job.object()))
            if os.path.exists(objects[-1]):
                continue
            values = {"compile": escape(shlex.join(job.command)), "source": str(job.source)}
            writer.build(escape_path(objects[-1]), "compile", variables=values)
        link = shlex.join([*compiler(), "-shared", "-o", target, *objects, *link_flags])
        inputs = [escape_path(name) for name in objects]
        writer.build(escape_path(target), "link", inputs, variables={"link": escape(link)})


def run_ninja(path: Path) -> None:
    import ninja

    workers = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    command = [Path(ninja.BIN_DIR) / "ninja", "-f", path, "-j", workers]
    if subprocess.run(command, env={**os.environ, "NINJA_STATUS": "[%f/%t] "}).returncode:
        sys.exit("otloss: the build failed; the command and its errors are above")


def remove_old_objects() -> None:
    for path in cache_folder().glob("*.o*"):
        if path.stat().st_mtime < time.time() - CACHE_SECONDS:
            path.unlink(missing_ok=True)


class BuildNative(build_ext):
    """Builds by ninja in place of distutils, which knows neither nvcc nor two files at once."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        cuda = find_cuda(torch)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        plan = Path(self.build_temp, "build.ninja").resolve()
        for folder in (plan.parent, target.parent, cache_folder()):
            folder.mkdir(parents=True, exist_ok=True)
        write_ninja(plan, compilations(torch, cuda), libraries(torch, cuda), str(target))
        run_ninja(plan)
        remove_old_objects()


class Metadata(dist_info):
    """pip asks for it before it downloads anything, so what is missing is said at once."""

    def run(self) -> None:
        find_torch()
        compiler()
        super().run()


if __name__ == "__main__":  # tests/backends.py names its objects as the build does
    os.chdir(ROOT)
    native = variable("OTLOSS_BUILD_NATIVE", "1") == "1"
    setup(
        ext_modules=[Extension("otloss._C", sources=[], language="c++")] if native else [],
        cmdclass={"build_ext": BuildNative, "dist_info": Metadata} if native else {},
    )
