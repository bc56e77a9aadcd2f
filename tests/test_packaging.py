"""What is packaged: all that a build and its tests need, and nothing by a name that is not ours.

On the public package index the name ``otloss`` belongs to another project, which pip would install
wherever ours were asked for by name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_PACKAGED = ("benchmarks/results/", "docs/images/", "examples/results/", ".ci/", ".github/")
NOT_PACKAGED += (".gitignore", ".pre-commit-config.yaml")


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("compares with the files of a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True)
    return {name for name in listing.stdout.decode().splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def egg_info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metadata and the list of files of a source distribution, without making it."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "otloss.egg-info"


def test_source_distribution_is_complete(tracked: set[str], egg_info: Path) -> None:
    packaged = set((egg_info / "SOURCES.txt").read_text().splitlines())
    assert {name for name in tracked if not name.startswith(NOT_PACKAGED)} <= packaged
    assert not {name for name in packaged if name.startswith(NOT_PACKAGED)}
    assert not {name for name in packaged if name.endswith((".so", ".pyc"))}


def test_extras_do_not_name_the_package(egg_info: Path) -> None:
    assert "Requires-Dist: otloss" not in (egg_info / "PKG-INFO").read_text()


def installs_by_name(line: str) -> bool:
    """Whether a line has pip install otloss without a path or a wheel file."""
    _, found, arguments = re.sub(r"\$\(PIP\)", "pip install", line).partition("pip install")
    words = re.split(r"[\s'\"`]+", arguments.partition("#")[0])
    return bool(found) and any(re.fullmatch(r"otloss([\[=<>~!].*)?[.,;)]*", word) for word in words)


@pytest.mark.parametrize(
    ("line", "by_name"),
    [
        ("pip install otloss", True),
        ("    $(PIP) 'otloss[$*]'", True),
        ('run `pip install -U "otloss>=0.1"`.', True),
        ("pip install '.[test]'  # what otloss needs", False),
        ("pip install dist/otloss-0.1.0.tar.gz", False),
    ],
)
def test_installs_by_name(line: str, by_name: bool) -> None:
    assert installs_by_name(line) == by_name


def test_nothing_installs_otloss_by_name(tracked: set[str]) -> None:
    own = Path(__file__).relative_to(ROOT).as_posix()
    lines = {
        f"{name}:{number}: {line.strip()}"
        for name in tracked - {own}
        for number, line in enumerate((ROOT / name).read_text(errors="ignore").splitlines(), 1)
        if installs_by_name(line)
    }
    assert not lines


def test_without_a_compiler_the_build_says_what_helps(tmp_path: Path) -> None:
    """Also that CXX names the compiler."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no C++ compiler was found (no-such-compiler)" in done.stderr
    assert "OTLOSS_BUILD_NATIVE=0 installs a slow version" in done.stderr


def test_without_kernels_a_warning_points_at_the_import(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "otloss", tmp_path / "otloss", ignore=ignored)
    (tmp_path / "user.py").write_text("# a line\nimport otloss\n")
    # Installed for editing, otloss brings a finder that offers the checkout's kernels to any copy.
    alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]"
    command = [sys.executable, "-c", f"{alone}; import user"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'user.py'}:2: UserWarning: otloss in {tmp_path / 'otloss'}" in done.stderr
