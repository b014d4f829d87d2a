"""The installed package, the refusals of the Makefile, and the files of the repository."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.repository import ROOT, copy_repository, repository_files

LARGEST_FILE = 12_000_000  # bytes
MACHINE_PATH = re.compile(rb"(?<![\w.~:/-])/(?:root|home|tmp|work)/\w+")

REGISTERED = """
import argparse, importlib.util, json
from fairseq import utils
place = importlib.util.find_spec("longmem_fairseq").submodule_search_locations[0]
utils.import_user_module(argparse.Namespace(user_dir=place))
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
registries = {"models": MODEL_REGISTRY, "architectures": ARCH_MODEL_REGISTRY}
registries.update({"tasks": TASK_REGISTRY, "criterions": CRITERION_REGISTRY})
print(json.dumps({"place": place, **{name: sorted(registry) for name, registry in registries.items()}}))
"""


WITHOUT_KERNEL = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from longmem_fairseq.memory.search.base import choose_search
import longmem_fairseq.memory.search
assert choose_search("auto", torch.device("cpu")).name == "faiss"
"""


def install(directory: Path, **environment: str) -> Path:
    """Install the package as `pip install .` does, without its dependencies, into a directory and return it."""
    source, site = copy_repository(directory / "source"), directory / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    pip += ["--no-deps", "--no-build-isolation", "--target", site, source]
    subprocess.run(pip, check=True, cwd=source, env={**os.environ, **environment})
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("install"))


def test_installs_the_package_and_nothing_else(site):
    assert [p.name for p in site.iterdir() if p.suffix != ".dist-info"] == ["longmem_fairseq"]
    installed = {str(path.relative_to(site)) for path in (site / "longmem_fairseq").rglob("*.*")}
    installed = {path for path in installed if "__pycache__" not in path}
    kernels = {path for path in installed if "native_kernel" in path}
    assert len(kernels) == (platform.machine() == "x86_64")
    assert installed - kernels == {str(path) for path in repository_files() if path.parts[0] == "longmem_fairseq"}


def test_source_distribution_contains_the_kernel(tmp_path):
    source = copy_repository(tmp_path / "source")
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist"], check=True, cwd=source)
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as files:
        names = {Path(name).name for name in files.getnames()}
    sources = [path.name for path in repository_files() if path.suffix in (".cpp", ".h")]
    assert len(sources) >= 7 and set(sources) <= names


def test_without_a_compiler_memories_are_searched_by_faiss(tmp_path):
    site = install(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert not list(site.rglob("*.so"))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERNEL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "search by faiss, as native is not available: it was not compiled when longmem_fairseq was" in done.stderr


def test_a_malformed_compiler_does_not_fail_the_installation(tmp_path):
    source = copy_repository(tmp_path)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=source, env={**os.environ, "CXX": 'g++ "'}, capture_output=True, text=True)
    assert done.returncode == 0 and "the kernel of --memory-search native is not built: " in done.stderr


def test_installed_package_registers_itself(site):
    """`--user-dir` finds it by the path of the installed package, outside of the clone."""
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        stdout=subprocess.PIPE,
    )
    registered = json.loads(done.stdout)  # nothing else may be printed on standard output
    assert Path(registered["place"]) == site / "longmem_fairseq"
    assert {"longmem_lm", "alibi_lm"} <= set(registered["models"])
    sizes = ("tiny", "small", "medium", "large", "xl")
    assert {f"longmem_gpt2_{size}" for size in sizes} <= set(registered["architectures"])
    assert {f"alibi_lm_{size}" for size in ("tiny", "medium")} <= set(registered["architectures"])
    assert "longmem_language_modeling" in registered["tasks"]
    assert "longmem_cross_entropy" in registered["criterions"]


def test_leaves_an_existing_fairseq_environment_alone(site):
    requirements = next(importlib.metadata.distributions(path=[str(site)])).requires
    required = [line for line in requirements if "extra ==" not in line]
    assert required and not [line for line in required if re.search(r"==|<|fairseq|faiss", line)]
    extras = {extra: [r for r in requirements if re.search(rf"extra == .{extra}.", r)] for extra in ("cpu", "gpu")}
    for extra, other in (("cpu", "gpu"), ("gpu", "cpu")):
        assert any(f"faiss-{extra}==" in line for line in extras[extra])
        assert not any(f"faiss-{other}" in line for line in extras[extra]), "both install the module faiss"
        assert any(line.startswith("numpy==1.") for line in extras[extra]), "stock fairseq fails with numpy 2"


@pytest.mark.parametrize("extra", ["cpu", "gpu", "preprocess", "examples", "dev"])
def test_extras_provide_the_requirements_of_preprocessing(site, extra):
    needed = {package for package, name in required_packages() if not name}
    assert {"regex", "tokenizers", "zstandard"} <= needed <= provided_by(extra, site)


def test_extras_provide_the_packages_that_name_them(site):
    named = {(package, extra) for package, extra in required_packages() if extra}
    assert ("gguf", "convert") in named
    for package, extra in named:
        assert package in provided_by(extra, site) and package in provided_by("dev", site)


def required_packages():
    """Packages that only some inputs of the scripts need, with the extra that the message names, or an empty string."""
    scripts = [path for path in repository_files() if path.parts[0] == "preprocess" and path.suffix == ".py"]
    text = "".join((ROOT / path).read_text() for path in scripts)
    return set(re.findall(r'\brequire_package\("(\w+)"(?:[^\n]*extra="(\w+)")?', text))


def provided_by(extra, site):
    requirements = next(importlib.metadata.distributions(path=[str(site)])).requires
    return {re.match(r"[\w-]+", line)[0] for line in requirements if re.search(rf"extra == .{extra}.", line)}


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_make_refuses_another_python(tmp_path):
    old = script(tmp_path / "python", "echo 3.10")
    done = make(f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "FAISS=cpu")
    assert done.returncode and f"PYTHON={old} is Python 3.10" in done.stderr and "3.11 or 3.12" in done.stderr
    done = make(f"PYTHON={tmp_path / 'none'}", f"VENV={tmp_path / 'venv'}", "FAISS=cpu")
    assert done.returncode and "none does not run" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_refuses_a_missing_compiler(tmp_path):
    script(tmp_path / "venv/bin/pip", "exit 1")
    script(tmp_path / "venv/bin/python", f'exec "{sys.executable}" "$@"')
    here = (f"VENV={tmp_path / 'venv'}", "FAISS=cpu")
    done = make(f"CXX={tmp_path / 'none'}", *here)
    assert done.returncode and "none is not a C++ compiler" in done.stderr and "make CXX=" in done.stderr
    done = make(f"CXX={script(tmp_path / 'c++', 'exit 1')}", *here)
    assert done.returncode and "does not find this Python's Python.h" in done.stderr
    assert not list((tmp_path / "venv").glob(".installed-*"))


def test_make_refuses_an_unknown_faiss():
    done = make("FAISS=tpu")
    assert done.returncode and "FAISS=tpu is unknown: set FAISS=cpu or FAISS=gpu" in done.stderr


def test_files_are_small():
    large = {str(path): size for path in repository_files() if (size := (ROOT / path).stat().st_size) > LARGEST_FILE}
    assert not large


def test_files_name_no_place_of_one_machine():
    """Binary files are included: a checkpoint may contain paths of the machine that wrote it."""
    assert MACHINE_PATH.search(b'x = "' + b"/ho" + b'me/someone/data"')
    assert not MACHINE_PATH.search(b"https://example.org/" + b"work/x ~/" + b"tmp/x a/" + b"home/b")
    # The checkpoints in the released format contain paths of another machine on purpose.
    files = [path for path in repository_files() if not str(path).startswith("tests/models/released")]
    matches = {str(path): MACHINE_PATH.findall((ROOT / path).read_bytes())[:3] for path in files}
    assert {path: places for path, places in matches.items() if places} == {}
