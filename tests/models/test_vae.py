"""Loading the autoencoder as strictly as the other models."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kelix_rt.errors import ConfigError, WeightError
from kelix_rt.memory import weight_entries
from kelix_rt.models import load, products
from kelix_rt.models.vae import Autoencoder, decode, load_vae
from kelix_rt.testing import assert_as_accurate_as_torch, randn

FILE = "diffusion_pytorch_model.safetensors"
NAME = "decoder.conv_out.weight"


@pytest.fixture
def path(golden: Path, tmp_path: Path) -> Path:
    """A copy of a small autoencoder that a test may change."""
    return shutil.copytree(golden / "e2e_dit" / "vae", tmp_path / "vae")


def rewrite(path: Path, changes: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    tensors = load_file(path / FILE) | changes
    save_file({k: v.to(dtype) for k, v in tensors.items() if v is not None}, path / FILE)


def test_the_stored_dtype_is_kept(path: Path) -> None:
    rewrite(path, {}, torch.bfloat16)
    assert load(path).dtype == torch.bfloat16
    assert load(path, dtype=torch.float32).dtype == torch.float32


def test_nothing_is_left_on_the_meta_device(path: Path) -> None:
    vae = load_vae(path)
    assert {t.device.type for t in (*vae.parameters(), *vae.buffers())} == {"cpu"}
    assert not vae.training
    assert bool(decode(vae, torch.zeros(1, 8, 2, 2)).isfinite().all())


def test_drawing_does_without_the_encoder(path: Path) -> None:
    decoder, whole = Autoencoder(path).module, load_vae(path)
    latent = randn(1, 8, 2, 2)
    assert torch.equal(decode(decoder, latent), decode(whole, latent))
    stored = dict(whole.state_dict())
    assert set(decoder.state_dict()) == {name for name in stored if name.startswith("decoder.")}
    kept = sum(entry.num_bytes for entry in weight_entries(path, torch.float32))
    assert kept == sum(t.nbytes for t in decoder.state_dict().values())


def test_a_cpu_that_multiplies_float32_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(path, {}, torch.bfloat16)
    latent, narrow = randn(1, 8, 2, 2), load_vae(path)
    entered = []

    class Watched(products.Float32Products):
        def __enter__(self) -> Watched:
            entered.append(self)
            return super().__enter__()

    monkeypatch.setattr("kelix_rt.models.vae.Float32Products", Watched)
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: True)
    theirs = decode(narrow, latent)
    assert not entered
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: dtype == torch.float32)
    mine = decode(narrow, latent)
    assert len(entered) == 1 and narrow.dtype == torch.bfloat16
    exact = decode(load_vae(path, dtype=torch.float32), latent).double()
    assert_as_accurate_as_torch(mine, theirs, exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "missing 1 tensors"),
        (torch.zeros(3, 8, 3), "must give shape"),
        (torch.full((3, 8, 3, 3), torch.nan), "holds NaN"),
    ],
)
def test_broken_tensors_are_named(path: Path, change: Tensor | None, message: str) -> None:
    rewrite(path, {NAME: change}, torch.float32)
    with pytest.raises(WeightError, match=message) as caught:
        load(path)
    assert re.search(re.escape(NAME), str(caught.value))


def test_broken_files_are_refused(path: Path) -> None:
    whole = (path / FILE).read_bytes()
    (path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightError, match="cannot be read"):
        load(path)
    (path / FILE).unlink()
    with pytest.raises(WeightError, match="holds no"):
        load(path)


def test_another_model_is_refused(path: Path, golden: Path) -> None:
    (path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match="AutoencoderDC"):
        load(path)
    with pytest.raises(ConfigError, match="AutoencoderDC"):
        load_vae(golden / "e2e_dit" / "dit")
