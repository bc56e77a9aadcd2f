"""Lines of code by feature: ``python .ci/lines.py``. Not blank lines, comments, docstrings. A file
belongs to the first feature that names it or a folder that it is in.
"""

import ast
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("otloss/", "csrc/core/", "csrc/cpu/", "csrc/cuda/", "csrc/", "tests/")
# What the library has grown by, and the rest: solves, costs, gradients, losses and results.
FEATURES = {
    "multiscale": "csrc/cpu/multiscale otloss/progress.py tests/test_multiscale.py "
    "tests/multiscale_fuzz.py tests/test_progress.py",
    "regular grids": "otloss/grid.py otloss/grid_solve.py otloss/grid_result.py "
    "otloss/reference/grid.py otloss/autograd/grid.py csrc/cpu/grid csrc/cuda/grid "
    "csrc/grid_kernels.h csrc/bindings/grid.cpp tests/test_grid.py",
    "barycenters": "otloss/barycenter.py tests/test_barycenter.py",
    "partial transport": "otloss/partial.py tests/test_partial.py",
    "drop-ins for GeomLoss and POT": "otloss/compat tests/test_compat_geomloss.py "
    "tests/test_compat_pot.py tests/test_compat_random.py tests/test_coming_from.py",
    "many processes": "otloss/distributed otloss/row_sweep.py tests/test_distributed.py",
    "torch.func": "otloss/transforms.py otloss/autograd/transforms.py tests/test_func.py",
    "streamed cost functions": "otloss/streamed_functions.py tests/test_streamed_functions.py",
    "eps as a tensor": "otloss/eps.py tests/test_eps.py",
    "weights of empty bins": "otloss/autograd/empty_bins.py tests/test_empty_bins.py",
    "forbidden pairs": "otloss/forbidden.py tests/test_forbidden.py",
    "small mass that goes far": "otloss/reference/far_mass.py otloss/reference/group_shifts.py "
    "csrc/cpu/solve/far_mass.cpp csrc/cpu/solve/far_mass.h csrc/cpu/solve/group_shifts.cpp "
    "csrc/cpu/solve/group_shifts.h csrc/cpu/solve/plan_marginals.cpp "
    "csrc/cpu/solve/plan_marginals.h csrc/cpu/simd/large_entries.cpp "
    "csrc/cpu/simd/large_entries.h tests/test_far_mass.py",
    "Newton's step": "csrc/cpu/solve/sparse_newton.cpp csrc/cpu/solve/sparse_newton.h "
    "tests/test_newton.py",
    "duality gap": "otloss/duality_gap.py tests/test_duality_gap.py",
    "exact totals": "otloss/totals.py tests/test_totals.py csrc/cpu/solve/last_update.cpp "
    "csrc/cpu/solve/last_update.h",
    "targets that stay": "otloss/target.py tests/test_target.py",
    "distances without a solver": "otloss/simple.py tests/test_simple.py",
    "eps suggested, padding": "otloss/suggest_eps.py otloss/batching.py "
    "tests/test_suggest_eps.py tests/test_batching_helpers.py",
    "pairs drawn from a plan": "otloss/sampling.py tests/test_sampling.py",
    "checks of an installation": "otloss/check.py otloss/first_use.py otloss/config.py "
    "tests/test_check.py tests/test_packaging.py",
    "fuzzing, oracles, soak": "tests/fuzz tests/native tests/soak.py tests/fuzz_ops.py "
    "tests/matrix.py tests/test_fuzz.py tests/certified.py tests/oracle.py",
    "examples, documentation": "tests/test_examples.py tests/test_examples_page.py "
    "tests/test_examples_sweeps.py tests/test_examples_minimal.py tests/test_docs.py "
    "tests/test_benchmarks.py",
    "the rest": "otloss csrc tests",
}


def feature_of(path: str) -> str:
    for feature, places in FEATURES.items():
        if any(path == place or path.startswith(f"{place}/") for place in places.split()):
            return feature
    raise AssertionError(path)


def check_places() -> None:
    missing = [p for p in " ".join(FEATURES.values()).split() if not (ROOT / p).exists()]
    if missing:
        raise SystemExit(f"moved or gone, as {__file__} does not know: {', '.join(missing)}")


def python_code(text: str) -> int:
    prose = set[int]()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node):
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = ((k, line.strip()) for k, line in enumerate(text.splitlines(), 1))
    return sum(bool(line) and k not in prose and not line.startswith("#") for k, line in lines)


def cpp_code(text: str) -> int:
    lines = map(str.strip, text.splitlines())
    return sum(bool(line) and not line.startswith("//") for line in lines)


def main() -> None:
    check_places()
    code, full = Counter[tuple[str, str]](), Counter[str]()
    command = ["git", "ls-files", "otloss", "csrc", "tests"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).split():
        if Path(name).suffix not in (".py", ".h", ".cpp", ".cu", ".cuh"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        layer = next(layer for layer in LAYERS if name.startswith(layer))
        code[feature_of(name), layer] += (python_code if name.endswith(".py") else cpp_code)(text)
        full[layer] += text.count("\n")
    heads = [layer.rstrip("/").removeprefix("csrc/") for layer in LAYERS]
    heads[4] = "bindings"
    print(f"{'':30}" + "".join(f"{head:>10}" for head in heads))
    for feature in FEATURES:
        print(f"{feature:30}" + "".join(f"{code[feature, x] or '':>10}" for x in LAYERS))
    print(f"{'all':30}" + "".join(f"{sum(code[f, x] for f in FEATURES):>10}" for x in LAYERS))
    print(f"{'with blank lines and comments':30}" + "".join(f"{full[x]:>10}" for x in LAYERS))


if __name__ == "__main__":
    main()
