"""How a device and a dtype are chosen."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kelix_rt import ops
from kelix_rt.devices import choose_device, choose_dtype
from kelix_rt.errors import ConfigError, NativeError


def test_auto_takes_what_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_dtype("auto") is None


@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
def test_dtypes_go_by_name_or_value(given: str | torch.dtype) -> None:
    assert choose_dtype(given) == torch.bfloat16


@pytest.mark.parametrize("given", ["int8", torch.int64, "half precision"])
def test_other_dtypes_are_refused(given: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="dtype must be 'auto' or one of"):
        choose_dtype(given)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'abacus' is not a device"):
        choose_device("abacus")
    for other in ("meta", "mps"):
        with pytest.raises(ConfigError, match=f"must be a CPU or a CUDA GPU, got '{other}'"):
            choose_device(other)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a GPU"):
        choose_device("cuda:1")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_without_kernels_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ops, "build_info", lambda: {"isa": "avx2", "cuda": ""})
    with pytest.raises(NativeError, match=r"built without nvcc.*device 'cpu'"):
        choose_device(device)
    assert choose_device(device, kernels=False).type == "cuda"
    monkeypatch.setattr(ops, "build_info", lambda: {"isa": "avx2", "cuda": "90a-real"})
    assert choose_device(device).type == "cuda"


def test_a_gpu_past_the_last_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="'cuda:1' is not there, torch sees 1 GPUs"):
        choose_device("cuda:1")


def test_a_host_library_of_another_python_is_refused_by_name() -> None:
    code = """
import sys
sys.modules["kelix_rt._host"] = None
from kelix_rt.errors import NativeError
try:
    from kelix_rt import Engine
except NativeError as error:
    assert "not built for Python" in str(error) and "pip install -e ." in str(error), error
    sys.exit(0)
sys.exit(1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_device_is_chosen_without_the_native_libraries() -> None:
    code = """
import sys
from kelix_rt.devices import choose_device
assert choose_device("cpu").type == "cpu"
assert "kelix_rt._host" not in sys.modules and "kelix_rt.ops" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
