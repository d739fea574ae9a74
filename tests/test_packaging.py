"""Wheel, sdist and editable install; what importing costs and wants."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("fastmbconv", "kernels", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
TUNED = sorted(path.name for path in (ROOT / "kernels" / "tuned").glob("*.json"))
USE = """
import torch, fastmbconv
from fastmbconv.mbconv import MBConv
import importlib.util
print(fastmbconv.__file__)
print(importlib.util.find_spec("fastmbconv.kernels.depthwise").origin)
assert MBConv(8, 8).eval()(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)
"""


def run(*command, cwd, **environment):
    """A command's output; the test fails with what it printed if the command does."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def pip_install(target, *what, cwd):
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--target", str(target), *map(str, what), cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The sources as a checkout has them, so that building leaves nothing in this one."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)
    assert (copy / "fastmbconv" / "kernels").is_symlink()
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """(wheel, sdist): the wheel is built from the sdist, as `python -m build` does."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), cwd=checkout)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel_holds_the_kernels_as_plain_files(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    for kernel in KERNELS:
        assert sizes[f"fastmbconv/kernels/{kernel}"] == (ROOT / "kernels" / kernel).stat().st_size
    assert all(f"fastmbconv/kernels/tuned/{tuned}" in names for tuned in TUNED)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastmbconv"}
    assert "fastmbconv/cli/demo.py" in names


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "fastmbconv/__init__.py"} <= names
    assert {f"fastmbconv/kernels/{kernel}" for kernel in KERNELS} <= names


@pytest.mark.parametrize("which", ["wheel", "sdist"])
def test_install(built, which, tmp_path):
    site = tmp_path / "site"
    pip_install(site, built[which == "sdist"], cwd=tmp_path)
    where = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert all(Path(path).is_relative_to(site) for path in where)


def test_editable_install(checkout, tmp_path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--target", str(site), "--editable", str(checkout), cwd=tmp_path)
    # `.pth` files count in site directories only, so this folder is made one; this interpreter's own, which may hold an
    # editable install of this checkout, is made a plain folder behind it.
    libraries = sysconfig.get_paths()["purelib"]
    start = f"import site, sys; site.addsitedir({str(site)!r}); sys.path.append({libraries!r})\n"
    where = run(sys.executable, "-S", "-c", start + USE, cwd=tmp_path).split()
    assert all(Path(path).is_relative_to(checkout) for path in where)


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_package_keeps_the_name_kernels(built, tmp_path, ours_first):
    site, other = tmp_path / "site", tmp_path / "other"
    pip_install(site, built[0], cwd=tmp_path)
    (other / "kernels").mkdir(parents=True)
    (other / "kernels" / "__init__.py").write_text("OTHER = True\n")
    paths = [site, other] if ours_first else [other, site]
    code = "import kernels, fastmbconv; from fastmbconv.kernels import math; print(kernels.OTHER, math.__name__)"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=os.pathsep.join(map(str, paths)))
    assert printed.split() == ["True", "fastmbconv.kernels.math"]


def test_another_package_keeps_the_name_beside_a_checkout(checkout, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OTHER = True\n")
    paths = os.pathsep.join([str(checkout), str(tmp_path)])
    code = "import fastmbconv, kernels; print(kernels.OTHER)"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=paths).split() == ["True"]


HIDE = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = {"triton", "rich", "matplotlib", "PIL", "timm", "torchvision", "transformers"}
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def test_import_and_eager_run_without_triton_or_any_extra():
    code = (
        HIDE
        + """
import torch, fastmbconv
from fastmbconv.efficientnet import efficientnet_b0
from fastmbconv.mbconv import MBConv
import fastmbconv.cli, fastmbconv.functional, fastmbconv.traffic, fastmbconv.parity
block = fastmbconv.fuse(MBConv(8, 8))
block(torch.randn(2, 8, 4, 4)).sum().backward()
print(fastmbconv.explain(block))
"""
    )
    assert "eager" in run(sys.executable, "-c", code, cwd=ROOT)


def test_import_brings_no_extra_and_no_triton():
    code = """
import sys, torch
before = set(sys.modules)
import fastmbconv
fastmbconv.fuse, fastmbconv.graph
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*(new & {"triton", "timm", "torchvision", "matplotlib", "rich", "PIL", "transformers", "numpy"}))
"""
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == []


def test_import_adds_at_most_a_fifth_of_a_second_to_torch():
    code = """
import time, torch
start = time.perf_counter()
import fastmbconv
fastmbconv.fuse, fastmbconv.graph
print(time.perf_counter() - start)
"""
    added = [float(run(sys.executable, "-c", code, cwd=ROOT)) for _ in range(3)]
    assert min(added) < 0.2, added  # the machine may be busy with something else


def test_lint_and_test_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "gpu"):
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
