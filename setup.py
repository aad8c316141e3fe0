"""Drives CMake and Ninja, the only build description; metadata lives in pyproject.toml.

`pip install .` works inside pip's build isolation although torch is not a build requirement: the
environment's torch is found without importing it.  `python setup.py native` rebuilds in place.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


def environment_package(name: str) -> Path | None:
    """Directory of an installed package, also from inside pip's build isolation.

    Isolation hides the environment through PYTHONPATH, which `python -I` ignores.
    """
    probe = (
        f"import importlib.util as u; s = u.find_spec({name!r});"
        "print(list(s.submodule_search_locations)[0] if s else '')"
    )
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    command = [sys.executable, "-I", "-c", probe]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    where = found.stdout.strip()
    return Path(where) if found.returncode == 0 and where else None


def cuda_root() -> Path | None:
    """The CUDA toolkit to build with: CUDA_HOME, CUDA_PATH, /usr/local/cuda, pip's, then PATH."""
    if os.environ.get("KELIX_CUDA", "auto") == "0":
        return None
    for name in ("CUDA_HOME", "CUDA_PATH"):
        named = os.environ.get(name)
        if named and not (Path(named) / "bin" / "nvcc").exists():
            raise SystemExit(
                f"kelix_rt: {name} must name a CUDA toolkit, got {named}, which has no bin/nvcc; "
                "unset it, or set KELIX_CUDA=0 to build for the CPU alone"
            )
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvidia = environment_package("nvidia")
    if nvidia:
        candidates.append(str(nvidia / "cu13"))
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(str(Path(on_path).resolve().parent.parent))
    for candidate in candidates:
        if candidate and (Path(candidate) / "bin" / "nvcc").exists():
            return Path(candidate)
    if os.environ.get("KELIX_CUDA") == "1":
        raise SystemExit(
            "KELIX_CUDA=1 but no nvcc: set CUDA_HOME, or `KELIX_CUDA=0 pip install -e '.[cuda]'` "
            "brings one for the next build"
        )
    return None


def build_native(output: Path) -> None:
    """Configure and build both libraries into `output`; a second run compiles what changed."""
    torch = environment_package("torch")
    if torch is None:
        raise SystemExit("kelix_rt needs torch installed first: pip install 'torch>=2.10'")
    cuda = cuda_root()
    build = ROOT / "build" / f"{'cuda' if cuda else 'cpu'}-{sysconfig.get_config_var('SOABI')}"
    cutlass = environment_package("cutlass_library")  # pip install --no-deps nvidia-cutlass
    options = {
        "TORCH_DIR": torch,
        "CUDA_ROOT": cuda or "",
        "CUTLASS_DIR": cutlass / "source" / "include" if cutlass else "",
        "OUTPUT_DIR": output,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": _pybind11_dir(),
        "CMAKE_COMPILE_WARNING_AS_ERROR": os.environ.get("KELIX_WERROR") == "1",
    }
    # CMake remembers what an earlier build was given: without the variable its default holds again.
    archs = os.environ.get("KELIX_CUDA_ARCHS")
    cuda_archs = f"-DCUDA_ARCHS={archs}" if archs else "-UCUDA_ARCHS"
    # Isolated builds put ninja in a directory that is gone afterwards: forget the remembered path.
    ninja = shutil.which("ninja") or "ninja"
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", cuda_archs]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", *(f"-D{k}={v}" for k, v in options.items())]
    print(f"kelix_rt: building {'CPU and CUDA' if cuda else 'CPU'} operators with torch at {torch}")
    if not cuda and os.environ.get("KELIX_CUDA") != "0":
        print("kelix_rt: no nvcc found, CUDA tensors are refused (pip install '.[cuda]' has one)")
    if shutil.which("cmake") is None:
        raise SystemExit("kelix_rt: a build outside of pip needs cmake; `make native` installs it")
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))
    for command in (configure, ["cmake", "--build", str(build), "-j", jobs]):
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"kelix_rt: the native build failed at `{' '.join(command[:3])} ...`")


def _pybind11_dir() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:
        raise SystemExit(
            "kelix_rt: a build outside of pip needs cmake, ninja and pybind11 installed; "
            "`make native` installs them, `pip install -e .` brings its own"
        ) from None
    return pybind11.get_cmake_dir()


class BuildPy(build_py):
    """Put the libraries into the wheel's copy of the package."""

    def run(self) -> None:
        super().run()
        in_place = getattr(self, "editable_mode", False)
        package = ROOT / "kelix_rt" if in_place else Path(self.build_lib) / "kelix_rt"
        if not in_place:  # what an earlier build left may be newer than its sources, and of others
            for library in package.glob("*.so"):
                library.unlink()
        build_native(package.resolve())


class EditableWheel(editable_wheel):
    """`pip install -e .`: the libraries go next to the sources."""


class Native(Command):
    """`python setup.py native`: rebuild the libraries in place."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        build_native(ROOT / "kelix_rt")


class BinaryDistribution(Distribution):
    """The wheel holds native libraries."""

    def has_ext_modules(self) -> bool:
        return True


# Imported by benchmarks/resources.py; pip and setuptools run the file as the main module.
if __name__ == "__main__":
    setup(
        distclass=BinaryDistribution,
        cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel, "native": Native},
    )
