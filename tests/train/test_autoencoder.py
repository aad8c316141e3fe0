"""The autoencoder's recipe at the smallest size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kelix_rt.errors import ConfigError
from kelix_rt.models import load
from kelix_rt.models.vae import decode
from kelix_rt.testing import randn
from kelix_rt.train.autoencoder import AutoencoderTrainer, close, new_autoencoder, picture_loss
from kelix_rt.train.recipe import CPU, Recipe, Sizes, Stage

SIZES = Sizes(latent_channels=8, latent_rate=8, drawn_side=64)
RECIPE: Recipe = replace(
    CPU, sizes=SIZES, pictures=4, autoencoder={"1": Stage(3, 1e-3, 1, 2), "2": Stage(2, 1e-3, 1, 2)}
)


@pytest.mark.parametrize("rate", [8, 16, 32])
def test_compression_is_the_recipes(rate: int) -> None:
    vae = new_autoencoder(replace(SIZES, latent_rate=rate), "cpu", 0)
    with torch.no_grad():
        latent = vae.encode(randn(1, 3, 64, 64)).latent
        assert latent.shape == (1, 8, 64 // rate, 64 // rate)
        assert vae.decode(latent).sample.shape == (1, 3, 64, 64)


def test_a_seed_gives_its_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (new_autoencoder(SIZES, "cpu", 1).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_lower_the_loss_on_a_fixed_batch(tmp_path: Path) -> None:
    made = AutoencoderTrainer(RECIPE, tmp_path)
    pixels = made.batch("1", 0)
    optimizer = torch.optim.AdamW(made.vae.parameters(), lr=2e-3)
    seen = []
    for _ in range(8):
        losses = made.losses(pixels)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(float(losses["loss"].detach()))
    assert seen[-1] < 0.8 * seen[0]


def test_loss_is_of_pixels_and_their_squares() -> None:
    losses = picture_loss(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5))
    assert (float(losses["l1"]), float(losses["squared"])) == (0.5, 0.25)
    assert float(losses["loss"]) == 1.5


def test_batches_are_parts_of_pictures_at_whole_latents(tmp_path: Path) -> None:
    sizes = replace(SIZES, drawn_side=160, latent_rate=32)
    made = AutoencoderTrainer(replace(RECIPE, sizes=sizes), tmp_path)
    whole = made._pictures([0])
    made._drawn = lambda scenes: whole.expand(len(scenes), -1, -1, -1)  # type: ignore
    for part in made.batch("1", 0):
        places = [
            (y, x)
            for y in (0, 32)
            for x in (0, 32)
            if torch.equal(part, whole[0, :, y : y + 128, x : x + 128])
        ]
        assert len(places) == 1


def test_parts_of_the_second_stage_show_something(tmp_path: Path) -> None:
    sizes = replace(SIZES, drawn_side=256, latent_rate=32)
    stages = {name: Stage(1, 1e-3, 1, 64) for name in ("1", "2")}
    made = AutoencoderTrainer(replace(RECIPE, sizes=sizes, autoencoder=stages), tmp_path)
    shares = {}
    for name in stages:
        parts = made.batch(name, 0).flatten(2)
        shares[name] = float(((parts.amax(2) - parts.amin(2)).amax(1) > 0.3).float().mean())
    assert shares["1"] < 0.9 and shares["2"] == 1


def test_windows_hold_a_place_where_one_can() -> None:
    starts = range(0, 129, 32)
    assert list(close(starts, 128, 0.26 * 256)) == [0, 32]
    assert list(close(starts, 128, 0.5 * 256)) == [32, 64, 96]
    assert close(starts, 128, 0.02 * 256) == starts


def test_the_second_stage_teaches_the_decoder_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"autoencoder-1\.pt does not exist"):
        AutoencoderTrainer(RECIPE, tmp_path).run(["2"])
    first, second = (AutoencoderTrainer(RECIPE, tmp_path) for _ in range(2))
    first.run(["1"])
    second.run(["2"])
    before = first.vae.state_dict()
    for name, value in second.vae.state_dict().items():
        kept = torch.equal(value, before[name])
        assert kept or name.startswith("decoder."), name
        assert not kept or name != "decoder.conv_out.weight"
    assert second.vae.config.scaling_factor == pytest.approx(first.vae.config.scaling_factor)


def test_run_resume_scale_and_export(tmp_path: Path) -> None:
    made = AutoencoderTrainer(RECIPE, tmp_path / "whole")
    made.run()
    again = AutoencoderTrainer(RECIPE, tmp_path / "whole")
    assert again.run().resumed_from == 2
    assert again.vae.config.scaling_factor == pytest.approx(made.vae.config.scaling_factor)
    with torch.no_grad():
        latent = made.vae.encode(torch.cat([made._pictures([i]) for i in range(4)])).latent
        latent = latent * made.vae.config.scaling_factor
        assert float(latent.std()) == pytest.approx(1, abs=1e-3)
        made.export(tmp_path / "vae", torch.float32)
        loaded = load(tmp_path / "vae")
        assert torch.equal(decode(loaded, latent), decode(made.vae, latent))
    assert next(made.vae.parameters()).dtype == torch.float32


def test_a_compression_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ConfigError, match="power of two, got 24"):
        new_autoencoder(replace(SIZES, latent_rate=24), "cpu", 0)
