"""benchmarks/resources.py: what it reads from ptxas and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import resources

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5kelix4cuda6squareI13__nv_bfloat16Li8EEEvNS_4ArgsE' \
for 'sm_80'
ptxas info    : Function properties for _ZN5kelix4cuda6squareI13__nv_bfloat16Li8EEEvNS_4ArgsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compiling entry function '_ZN5kelix4cuda4cubeENS_4ArgsE' for 'sm_80'
ptxas info    : Function properties for _ZN5kelix4cuda4cubeENS_4ArgsE
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 4224 bytes smem, 400 bytes cmem[0]
"""


def test_a_report_becomes_a_table() -> None:
    usages = resources.parse(REPORT)
    assert [(u.registers, u.shared_bytes, u.spill_bytes) for u in usages] == [
        (30, 0, 0),
        (255, 4224, 20),
    ]
    assert resources.table("powers", usages)[2:] == [
        "| `cube` | 255 | 4224 | 20 |",
        "| `square<bf16, 8>` | 30 | 0 | 0 |",
    ]


NO_STORES = REPORT.replace("12 bytes spill", "0 bytes spill")
CLEAN = NO_STORES.replace("8 bytes spill", "0 bytes spill")


@pytest.mark.parametrize(("report", "status"), [(REPORT, 1), (NO_STORES, 1), (CLEAN, 0)])
def test_a_spill_fails(
    report: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(resources, "cuda_root", lambda: Path("cuda"))
    monkeypatch.setattr(resources, "compile_verbosely", lambda *_: report)
    assert resources.main(["norm"]) == status
    assert ("sm_80: cube" in capsys.readouterr().err) == bool(status)


def test_an_unknown_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cuda_root", lambda: Path("cuda"))
    with pytest.raises(SystemExit, match="no such file in csrc/kernels: nrom"):
        resources.main(["nrom"])
