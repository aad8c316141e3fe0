from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kelix_rt.models.vae import load_vae
from kelix_rt.train import pictures as module
from kelix_rt.train.pictures import (
    encode_latents,
    encode_pictures,
    odd_twin,
    strange_twin,
    to_pixels,
)
from kelix_rt.train.world import draw, make_scene
from kelix_rt.train.world_scene import plain
from tests.train import tiny


def test_codes_are_those_of_the_pictures(tmp_path: Path) -> None:
    tokenizer, images, codes = tiny.tokenizer(), tiny.images(), tiny.pictures(tmp_path)
    assert codes.count == 3
    for index in range(3):
        pixels, grid = images.patchify(draw(make_scene("train", index, 0), tiny.SIDE))
        drawn = codes.drawing(index)
        assert torch.equal(drawn.ids, tokenizer.global_ids(tokenizer.encode(pixels, grid), 640))
        assert drawn.grid == (1, 4, 4)
        pixels, grid = images.patchify(draw(plain(make_scene("train", index, 0)), tiny.SIDE))
        ids = codes.answer(index).ids
        assert torch.equal(ids, tokenizer.global_ids(tokenizer.encode(pixels, grid), 640))
        pixels, grid = images.patchify(draw(strange_twin(make_scene("train", index, 0)), tiny.SIDE))
        ids = codes.stranger(index).ids
        assert torch.equal(ids, tokenizer.global_ids(tokenizer.encode(pixels, grid), 640))
        twin = odd_twin(make_scene("train", index, 0))
        pixels, grid = images.patchify(draw(plain(twin), tiny.SIDE))
        ids = codes.odd_answer(index).ids
        assert torch.equal(ids, tokenizer.global_ids(tokenizer.encode(pixels, grid), 640))
        views = {codes.seen(index, random.Random(i)).grid for i in range(20)}
        assert views == {(1, 4, 4), (1, 6, 6)}


def test_the_cache_is_used_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, cache = tiny.tokenizer(), tmp_path / "codes.safetensors"
    calls = []
    encode = module._codes
    monkeypatch.setattr(module, "_codes", lambda *args: calls.append(args) or encode(*args))
    per_make = 4  # the pictures as they are and plain, and their strange and odd twins

    def make(count: int) -> torch.Tensor:
        return encode_pictures(tokenizer, tiny.images(), count, 56, (), 640, 0, cache).drawn

    first = make(2)
    assert torch.equal(make(2), first) and len(calls) == per_make
    make(3)
    assert len(calls) == 2 * per_make
    with torch.no_grad():
        tokenizer.z_bias += 1
    make(3)
    assert len(calls) == 3 * per_make


def test_latents_have_the_scale_of_the_dit(golden: Path, tmp_path: Path) -> None:
    vae = load_vae(golden / "e2e_dit" / "vae")
    latents = encode_latents(vae, 2, 64, 0, tmp_path / "latents.safetensors")
    scene = make_scene("train", 1, 0)
    pixels = to_pixels([draw(s, 64) for s in (scene, plain(scene), strange_twin(scene))])
    assert float(pixels.min()) >= -1 and float(pixels.max()) <= 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent * vae.config.scaling_factor
    assert latents.dtype == torch.bfloat16 and len(latents) == 6
    torch.testing.assert_close(latents[1::2], expected.bfloat16(), rtol=2e-2, atol=2e-2)
