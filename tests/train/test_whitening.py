"""Whitened latents decode to the same pictures."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from kelix_rt.testing import randn
from kelix_rt.train.autoencoder import new_autoencoder
from kelix_rt.train.recipe import Sizes
from kelix_rt.train.whitening import FLATTEST, whiten

SIZES = Sizes(latent_channels=8, latent_rate=8, drawn_side=64)


def _covariance(latents: torch.Tensor) -> torch.Tensor:
    return torch.cov(latents.movedim(1, 0).flatten(1))


@torch.no_grad()
def test_covariance_is_the_identity_and_pictures_stay() -> None:
    vae = new_autoencoder(SIZES, "cpu", 0).double()
    pixels = randn(6, 3, 64, 64).double()
    before = vae.encode(pixels).latent
    pictures = vae.decode(before).sample
    assert (_covariance(before) - torch.eye(8)).abs().max() > 0.1
    whiten(vae, before)
    after = vae.encode(pixels).latent
    assert torch.allclose(_covariance(after), torch.eye(8).double(), atol=1e-8)
    assert torch.allclose(vae.decode(after).sample, pictures, atol=1e-8)


@torch.no_grad()
def test_a_direction_that_hardly_varies_is_not_blown_up() -> None:
    vae = new_autoencoder(replace(SIZES, latent_rate=16), "cpu", 0)
    pixels = randn(4, 3, 64, 64)
    before = vae.encode(pixels).latent
    flat = before.clone()
    flat[:, 3] = before[:, 2]
    twin = copy.deepcopy(vae)
    whiten(twin, flat)
    after = twin.encode(pixels).latent
    assert torch.isfinite(after).all()
    mean = _covariance(flat).diagonal().mean()
    assert after.square().mean() < before.square().mean() / (FLATTEST * mean)
    assert torch.allclose(twin.decode(after).sample, vae.decode(before).sample, atol=1e-3)
