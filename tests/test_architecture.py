"""The layers of the project depend on each other in one direction only.

csrc:      kernels, cpu -> common;  ops -> kernels, cpu, common, torch;  host -> common, pybind11
kelix_rt:  engine -> scheduler, runner -> stages, memory -> models -> ops;  the pieces that are data
           (request, config, scheduler) know no torch; processing knows no models; serve knows the
           engine alone; nothing imports train.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kelix_rt"
STEMS = [
    "activation",
    "attention",
    "block_decoder",
    "codes",
    "diffusion",
    "linear",
    "norm",
    "sampling",
]

# What a part of the package must not import.
FORBIDDEN = {
    "request": ["torch", "kelix_rt.engine", "kelix_rt.runner", "kelix_rt.models"],
    "params": ["torch", "kelix_rt.engine", "kelix_rt.runner", "kelix_rt.models"],
    "config": ["torch", "kelix_rt.models", "kelix_rt.ops"],
    "model_configs": ["torch", "kelix_rt.models", "kelix_rt.ops"],
    "scheduler": ["torch", "kelix_rt.models", "kelix_rt.ops", "kelix_rt.runner"],
    "plans": ["torch", "kelix_rt.models", "kelix_rt.ops", "kelix_rt.runner"],
    "speculation": ["torch", "kelix_rt.models", "kelix_rt.ops", "kelix_rt.runner"],
    "step_layout": ["torch", "kelix_rt.models", "kelix_rt.ops", "kelix_rt.runner"],
    "errors": ["torch", "kelix_rt"],
    "ops": ["kelix_rt.models", "kelix_rt.stages", "kelix_rt.engine", "kelix_rt.processing"],
    "models": [
        "kelix_rt.stages",
        "kelix_rt.engine",
        "kelix_rt.runner",
        "kelix_rt.scheduler",
        "kelix_rt.processing",
    ],
    "processing": ["kelix_rt.models", "kelix_rt.stages", "kelix_rt.engine", "kelix_rt.ops"],
    "stages": ["kelix_rt.engine", "kelix_rt.runner", "kelix_rt.scheduler", "kelix_rt.cli"],
    "graphs": ["kelix_rt.engine", "kelix_rt.runner", "kelix_rt.scheduler", "kelix_rt.stages"],
    "denoise_graphs": [
        "kelix_rt.engine",
        "kelix_rt.runner",
        "kelix_rt.scheduler",
        "kelix_rt.stages",
    ],
    "runner": ["kelix_rt.engine", "kelix_rt.cli"],
    "engine": ["kelix_rt.cli", "kelix_rt.serve"],
    "serve": [
        "torch",
        "kelix_rt.models",
        "kelix_rt.ops",
        "kelix_rt.stages",
        "kelix_rt.runner",
        "kelix_rt.scheduler",
        "kelix_rt.cli",
    ],
}


def imported_modules(path: Path) -> set[str]:
    """Modules that a file imports at run time; `if TYPE_CHECKING:` blocks do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def files_of(part: str) -> list[Path]:
    directory = PACKAGE / part
    return sorted(directory.rglob("*.py")) if directory.is_dir() else [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("part", FORBIDDEN)
def test_layers(part: str) -> None:
    for path in files_of(part):
        assert path.exists(), f"{path} is listed here but gone: update this test"
        for module in imported_modules(path):
            for forbidden in FORBIDDEN[part]:
                assert not (module == forbidden or module.startswith(forbidden + ".")), (
                    f"{path.relative_to(ROOT)} must not import {module}"
                )


def test_nothing_imports_train() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "train" in path.relative_to(PACKAGE).parts:
            continue
        assert not any(m.startswith("kelix_rt.train") for m in imported_modules(path)), path


def test_environment_is_read_in_config_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "config.py":
            assert not re.search(r"os\.environ|getenv", path.read_text()), path


def test_importing_the_package_is_light() -> None:
    """`import kelix_rt` loads neither torch nor anything that could touch CUDA."""
    code = "import sys, kelix_rt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def includes_of(path: Path) -> list[str]:
    return re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())


@pytest.mark.parametrize("layer", ["common", "cpu", "kernels", "host"])
def test_native_layers_see_no_torch(layer: str) -> None:
    allowed = {
        "common": ["common/"],
        "cpu": ["cpu/", "common/"],
        "kernels": ["kernels/", "common/"],
        "host": ["host/", "common/"],
    }[layer]
    for path in sorted((ROOT / "csrc" / layer).iterdir()):
        for include in includes_of(path):
            assert not include.startswith(("torch/", "ATen/", "c10/")), f"{path}: {include}"
            if re.match(r"(common|cpu|kernels|ops|host)/", include):
                assert include.startswith(tuple(allowed)), f"{path} must not include {include}"


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_has_every_layer(stem: str) -> None:
    for path in [
        f"csrc/common/{stem}.h",
        f"csrc/cpu/{stem}.cpp",
        f"csrc/kernels/{stem}.cuh",
        f"csrc/kernels/{stem}.cu",
        f"csrc/ops/{stem}.cpp",
        f"kelix_rt/ops/{stem}.py",
        f"tests/ops/test_{stem}.py",
    ]:
        assert (ROOT / path).exists(), path


def test_only_device_header_knows_intrinsics() -> None:
    """Kernels reach assembly, warp intrinsics, shared memory and launches through wrappers only, so
    that the harness of tests/simt can run them."""
    forbidden = r"\basm\b|__shfl|__ballot|__reduce|__shared__|<<<"
    for path in (ROOT / "csrc" / "kernels").iterdir():
        assert not re.search(forbidden, path.read_text()), path


def test_isa_builds_export_no_shared_inline_functions() -> None:
    """A weak symbol of an AVX-512 object could be linked in for every machine."""
    objects = sorted((ROOT / "build").glob("*/CMakeFiles/kelix_cpu_*.dir/csrc/cpu/*.o"))
    if not objects:
        pytest.skip("the libraries were not built in this directory")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        )
        weak = [line for line in symbols.stdout.splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, f"{path.name}: {weak[:3]}"
