"""What can be said of the CUDA kernels without a GPU: compiles csrc/cuda for one architecture and
reads what ptxas says and the machine code.

    python -m benchmarks.cuda_report            # the table
    python -m benchmarks.cuda_report --write    # and to benchmarks/results/cuda_report.{json,md}

For every kernel: registers, spills, stack. For every hot loop, one of a function that goes over
all pairs whose own instructions (not those of a loop inside) hold exponentials, tensor core
products or many multiply-adds: how many instructions it takes, per exponential and beside the
products, how many loads come before the first use of one, and the local loads and stores. The exit
code is 1 where a hot loop has clearly more of these than in the committed table.
A loop is what a backward branch spans in the machine code. Compilations are kept by content.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
ARCH = "90a"
# Functions that go over all pairs of points, at least once per pass or gradient.
HOT = "panel_pass|SweepKernel|SideSumKernel|CostKernel|LargestKernel|EpilogueKernel"
HOT += "|ListedSumsKernel|RowsKernel"
LEAST_EXPONENTIALS, LEAST_MULTIPLY_ADDS = 4, 16  # of a hot loop
LOADS = ("LDG", "LDS", "LD", "LDSM", "LDGSTS")
FLOATS = ("FFMA", "FMUL", "FADD", "DFMA", "DADD", "DMUL", "MUFU", "HMMA")


def build_module() -> Any:
    spec = importlib.util.spec_from_file_location("otloss_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def disassembler(nvcc: str) -> str:
    """nvdisasm: of the toolkit, on PATH, or of the package nvidia-cuda-nvdisasm."""
    beside = Path(nvcc).resolve().parent / "nvdisasm"
    packaged = [Path(folder) / "nvidia/cu13/bin/nvdisasm" for folder in sys.path]
    for place in [
        shutil.which("nvdisasm"),
        beside,
        Path("/usr/local/cuda/bin/nvdisasm"),
        *packaged,
    ]:
        if place and Path(place).exists():
            return str(place)
    sys.exit("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")


def compiled(build: Any, nvcc: str, source: Path) -> tuple[Path, dict[str, Any]]:
    """The machine code of a source, and what was said and used while it was made."""
    target = f"-gencode=arch=compute_{ARCH},code=sm_{ARCH}"
    command = [nvcc, *build.NVCC_FLAGS, target, f"-I{build.CSRC}", "-Xptxas=-v", "-cubin"]
    command += [str(source)]
    place = build.Compilation(source, command, build.version_of(nvcc)).object()
    told = place.with_suffix(".o.json")  # *.o*: removed when it is old
    if not (place.exists() and told.exists()):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".part")
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen([*command, "-o", str(part)], stderr=said)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            text = said.read()
        if status != 0:
            raise RuntimeError(text)
        told.write_text(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "ptxas": text}))
        part.replace(place)
    return place, json.loads(told.read_text())


def demangled(names: list[str]) -> dict[str, str]:
    """Short names of kernels and of functions in them."""
    inner = "\n".join(re.sub(r"^.*\$", "", name) for name in names)
    done = subprocess.run(["c++filt"], input=inner, capture_output=True, text=True)
    short = done.stdout.rstrip("\n") if done.returncode == 0 else inner
    short = re.sub(
        r"otloss::(cuda::)?|\(anonymous namespace\)::|^void |<GpuBlock>", "", short, flags=re.M
    )
    short = re.sub(r"\bkernel<(.*)>\(.*", r"\1", short)
    return dict(
        zip(names, (re.sub(r"\(.*|, GpuBlock| $", "", s) for s in short.split("\n")), strict=True)
    )


def of_ptxas(text: str) -> dict[str, dict[str, int]]:
    """By function: registers, spills, stack, shared memory."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in text.splitlines():
        if at := re.search(r"(?:Function properties for|entry function) '?([\w$]+)", line):
            name = at[1]
        elif at := re.search(r"(\d+) bytes stack frame, (\d+) .*stores, (\d+) ", line):
            values = zip(
                ("stack", "spill_stores", "spill_loads"), map(int, at.groups()), strict=True
            )
            found[name] = dict(values)
        elif at := re.search(r"Used (\d+) registers", line):
            found[name]["registers"] = int(at[1])
    return found


class Loop:
    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.own: list[str] = []  # instructions, but those of loops inside

    def facts(self) -> dict[str, Any]:
        kinds = Counter(line.split(".")[0] for line in self.own)
        exponentials = sum("MUFU.EX2" in line for line in self.own)
        tensor = kinds["HMMA"]
        facts: dict[str, Any] = {"instructions": len(self.own), "exponentials": exponentials}
        facts |= {"tensor": tensor, "multiply_adds": kinds["FFMA"] + kinds["DFMA"]}
        facts["loads_ahead"] = self.loads_ahead()
        facts["local"] = kinds["LDL"] + kinds["STL"]
        if exponentials:
            facts["per_exponential"] = round((len(self.own) - tensor) / exponentials, 1)
        return facts

    def loads_ahead(self) -> int:
        """The most loads with no use of floating point between them."""
        most = count = 0
        for line in self.own:
            kind = line.split(".")[0]
            count = 0 if kind in FLOATS else count + (kind in LOADS)
            most = max(most, count)
        return most

    def hot(self) -> bool:
        facts = self.facts()
        many = facts["multiply_adds"] >= LEAST_MULTIPLY_ADDS
        return bool(facts["exponentials"] >= LEAST_EXPONENTIALS or facts["tensor"] or many)


def loops_of(lines: list[str]) -> list[Loop]:
    """Of a function: instructions, with labels as `name:` between them."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        else:
            code.append(line)
    spans: dict[int, int] = {}
    for at, line in enumerate(code):
        target = re.match(r"BRA\b.*`\((\S+)\)", line)
        if target and labels.get(target[1], at + 1) <= at:
            spans[labels[target[1]]] = max(at, spans.get(labels[target[1]], 0))
    loops = [Loop(first, last) for first, last in spans.items()]
    loops.sort(key=lambda loop: loop.last - loop.first)
    for at, line in enumerate(code):
        inside = next((loop for loop in loops if loop.first <= at <= loop.last), None)
        if inside:
            inside.own.append(line)
    return loops


def functions_of(text: str) -> dict[str, list[str]]:
    """Instructions and labels of each function of a disassembly, without predicates."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        stripped = line.strip()
        if label := re.match(r"(\.text\.)?([\w$.]+):$", stripped):
            if label[1] or label[2].startswith("$"):
                name = label[2]
                found[name] = []
            elif name:
                found[name].append(label[2] + ":")
        elif name and (
            code := re.match(
                r"(?:/\*[0-9a-f]+\*/)?\s*(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][^;]*);", stripped
            )
        ):
            found[name].append(code[1].strip())
    return found


def report_of(build: Any, nvcc: str, nvdisasm: str, source: Path) -> dict[str, Any]:
    place, told = compiled(build, nvcc, source)
    command = [nvdisasm, "-c", str(place)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions, properties = functions_of(text), of_ptxas(told["ptxas"])
    short = demangled([*functions, *(name for name in properties if name not in functions)])
    kernels = [{"kernel": short[name], **values} for name, values in properties.items()]
    loops = [
        {"function": short[name], **loop.facts()}
        for name, lines in functions.items()
        for loop in loops_of(lines)
        if re.search(HOT, short[name]) and loop.hot()
    ]
    return {
        "file": str(source),
        "cpu_s": round(told["cpu_s"], 1),
        "kernels": kernels,
        "loops": loops,
    }


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines) + "\n"


def markdown(files: list[dict[str, Any]], nvcc: str) -> str:
    kernels = [(k, f) for f in files for k in f["kernels"]]
    loops = [(x, f) for f in files for x in f["loops"]]
    names = ("registers", "spill_stores", "spill_loads", "stack")
    facts = ("exponentials", "tensor", "multiply_adds", "instructions", "per_exponential",
             "loads_ahead", "local")  # fmt: skip
    parts = [
        f"Machine code of csrc/cuda for sm_{ARCH} by `make cuda-report`, {nvcc}.\n",
        table(["file", "CPU s"], [[f["file"], f["cpu_s"]] for f in files]),
        table(["kernel", *(name.replace("_", " ") for name in names)],
              [[f"`{k['kernel']}`", *(k.get(n, "") for n in names)] for k, _ in kernels]),
        table(["hot loop in", *(name.replace("_", " ") for name in facts)],
              [[f"`{x['function']}`", *(x.get(n, "") for n in facts)] for x, _ in loops]),
    ]  # fmt: skip
    return "\n".join(parts)


def local_of(files: list[dict[str, Any]]) -> dict[str, int]:
    """Local loads and stores in the hot loops of each function that has any."""
    found = Counter[str]()
    for file in files:
        for loop in file["loops"]:
            found[f"{loop['function']} ({file['file']})"] += loop["local"]
    return {name: count for name, count in found.items() if count}


def more_local(files: list[dict[str, Any]], known: list[dict[str, Any]]) -> dict[str, int]:
    """Than known; where there are some, their number varies with code elsewhere."""
    before = local_of(known)
    allowed = {name: 1.25 * count + 4 for name, count in before.items()}
    return {name: n for name, n in local_of(files).items() if n > allowed.get(name, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    parser.add_argument("files", nargs="*", help="sources, by default all of csrc/cuda")
    args = parser.parse_args()
    build = build_module()
    found = build.find_nvcc()
    if found is None:
        sys.exit("nvcc was not found; name it in CUDA_HOME")
    nvcc, nvdisasm = found[0], disassembler(found[0])
    sources = [Path(name) for name in args.files] or sorted(build.CSRC.glob("cuda/**/*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(functools.partial(report_of, build, nvcc, nvdisasm), sources))
    release = re.findall(r"release .*", build.version_of(nvcc))[0]
    text = markdown(files, f"CUDA {release}")
    table_of = RESULTS / "cuda_report.json"
    known = json.loads(table_of.read_text()) if table_of.exists() else []
    if args.write:
        (RESULTS / "cuda_report.md").write_text(text)
        table_of.write_text(json.dumps(files, indent=1) + "\n")
    print(text)
    spilt = [f"  {name}: {count}" for name, count in sorted(more_local(files, known).items())]
    if spilt:
        sys.exit("more local loads and stores in hot loops than are known:\n" + "\n".join(spilt))


if __name__ == "__main__":
    main()
