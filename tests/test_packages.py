"""What holds for the distribution as a whole: the wheel, the packages' independence, their import time."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lemo_trainer", "ollie_compile", "ripple_loader")


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_packages_do_not_import_each_other():
    for path in modules():
        own = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & (set(PACKAGES) - {own}), path


def test_no_file_is_long():
    for path in [*modules(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        assert len(path.read_text("utf-8").splitlines()) <= 500, path


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_exist(package):
    module = __import__(package)
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_wheel_holds_the_packages_and_imports_alone(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    for package in PACKAGES:
        assert (tmp_path / "unpacked" / package / "py.typed").exists()
    code = "import sys; sys.path.insert(0, 'unpacked')\n"
    code += "".join(f"import {package}; assert 'unpacked' in {package}.__file__\n" for package in PACKAGES)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    points = next((tmp_path / "unpacked").glob("*.dist-info")) / "entry_points.txt"
    assert "ollie = ollie_compile.backend:ollie" in points.read_text()


@pytest.mark.parametrize("command", ["lemo", "ripple", "ollie"])
def test_commands_are_installed(command):
    done = subprocess.run(
        [Path(sys.executable).with_name(command), "--help"], capture_output=True, text=True, check=True
    )
    assert "Usage" in done.stdout


def test_importing_ollie_compile_does_not_bring_inductor():
    code = "import sys, ollie_compile; print('torch._inductor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
