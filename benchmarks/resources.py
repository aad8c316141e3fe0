"""Registers, shared memory and spills of every CUDA kernel: `python -m benchmarks.resources`.

Compiles csrc/kernels/*.cu with `ptxas -v` for each architecture, needs no GPU and prints a Markdown
table. Exits with 1 when a kernel spills registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setup import ROOT, cuda_root, environment_package

ARCHITECTURES = ("sm_80", "sm_90a")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
CUTLASS_KERNEL = re.compile(r"cutlass::device_kernel<.*Adapter<(\w+<[\w, ]+>)")  # its epilogue
SHORT = {"__nv_bfloat16": "bf16", "__half": "f16", "float8": "f8", "float": "f32"}


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one architecture; shared memory without the launch's part."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    spill_bytes: int


def architectures_of(source: Path) -> tuple[str, ...]:
    """Where a file is compiled: wgmma on sm_90a alone, CUTLASS where its headers are."""
    if source.stem.endswith("_cutlass_hopper") and environment_package("cutlass_library") is None:
        return ()
    return ("sm_90a",) if source.stem.endswith("_hopper") else ARCHITECTURES


def compile_verbosely(nvcc: Path, source: Path, architecture: str) -> str:
    """What ptxas says about a file; compiled as CMakeLists.txt does it."""
    command = [str(nvcc), "-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]
    command += ["-Werror=all-warnings", "-DKELIX_HOPPER"]
    cutlass = environment_package("cutlass_library")
    if cutlass is not None:
        command += ["-DKELIX_CUTLASS", f"-isystem={cutlass / 'source' / 'include'}"]
    with tempfile.TemporaryDirectory() as directory:
        command += [f"-arch={architecture}", "-cubin", "-o", f"{directory}/kernels.cubin"]
        command += ["-Xptxas=-v", "-Xcompiler=-Wall", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} does not compile for {architecture}:\n{done.stderr}")
    return done.stderr


def parse(report: str) -> list[Usage]:
    """The kernels of a report of ptxas, each with its lines up to the next."""
    entries = list(ENTRY.finditer(report))
    ends = [entry.start() for entry in entries[1:]] + [len(report)]
    usages = []
    for entry, end in zip(entries, ends, strict=True):
        lines = report[entry.end() : end]
        used, spills, shared = USED.search(lines), SPILLS.search(lines), SHARED.search(lines)
        assert used and spills, f"ptxas reported no resources of {entry[1]}"
        usages.append(
            Usage(
                kernel=entry[1],
                architecture=entry[2],
                registers=int(used[1]),
                shared_bytes=int(shared[1]) if shared else 0,
                spill_bytes=int(spills[1]) + int(spills[2]),
            )
        )
    return usages


def short_names(mangled: list[str]) -> list[str]:
    """`norm_kernel<bf16, 8>` for each; c++filt gives the long form."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = []
    for line in done.stdout.splitlines():
        name = re.sub(r"^void |kelix::(cuda::)?|\(anonymous namespace\)::", "", line)
        name = re.sub(r"\((int|bool|long)\)", "", name.split("(kelix")[0])
        name = re.sub("|".join(SHORT), lambda found: SHORT[found[0]], name)
        of_cutlass = CUTLASS_KERNEL.match(name)
        names.append(of_cutlass[1] if of_cutlass else re.sub(r"\([^<>]*\)$", "", name))
    return names


def table(stem: str, usages: list[Usage]) -> list[str]:
    """A row per kernel of one file, with registers, shared bytes and spills per architecture."""
    kernels = sorted({usage.kernel for usage in usages})
    by_place = {(usage.kernel, usage.architecture): usage for usage in usages}
    names = dict(zip(kernels, short_names(kernels), strict=True))
    architectures = sorted({usage.architecture for usage in usages})
    heads = [f"{architecture} registers | shared | spills" for architecture in architectures]
    lines = [f"| {stem} | {' | '.join(heads)} |", "|---" * (1 + 3 * len(heads)) + "|"]
    for kernel in sorted(kernels, key=names.__getitem__):
        cells = [f"`{names[kernel]}`"]
        for architecture in architectures:
            usage = by_place.get((kernel, architecture))
            cells += (
                [str(usage.registers), str(usage.shared_bytes), str(usage.spill_bytes)]
                if usage
                else ["-"] * 3
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: list[str]) -> int:
    """Print the tables of the named stems, all without names; 1 when something spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stems", nargs="*", help="files of csrc/kernels, without .cu")
    parser.add_argument("--out", type=Path, help="write the tables here instead of printing them")
    options = parser.parse_args(arguments)
    cuda = cuda_root()
    if cuda is None:
        raise SystemExit("no nvcc found: pip install '.[cuda]' or set CUDA_HOME")
    sources = sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
    unknown = set(options.stems) - {source.stem for source in sources}
    if unknown:
        raise SystemExit(f"no such file in csrc/kernels: {', '.join(sorted(unknown))}")
    lines, spilled = [], []
    for source in sources:
        if options.stems and source.stem not in options.stems:
            continue
        usages = [
            usage
            for architecture in architectures_of(source)
            for usage in parse(compile_verbosely(cuda / "bin" / "nvcc", source, architecture))
        ]
        if usages:
            lines += [*table(source.stem, usages), ""]
        spilled += [usage for usage in usages if usage.spill_bytes]
    text = "\n".join(lines)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)
    names = short_names([usage.kernel for usage in spilled])
    for usage, name in zip(spilled, names, strict=True):
        print(f"spills {usage.spill_bytes} bytes on {usage.architecture}: {name}", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
