from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kelix_rt import Engine
from kelix_rt.checkpoint import Checkpoint
from kelix_rt.errors import ConfigError
from kelix_rt.models import load, vision_weights
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.vae import load_vae
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.train.export import (
    TrainedParts,
    export,
    own_centres,
    require_checkpoint_world,
    stored_language,
)
from kelix_rt.train.world_scene import WORLD_VERSION
from tests.train import tiny


def parts(golden: Path) -> TrainedParts:
    """A new language model with the golden tokenizer, DiT and autoencoder."""
    tokenizer = tiny.tokenizer()
    checkpoint = Checkpoint(tiny.CHECKPOINT)
    names = vision_weights.codebook_names(tokenizer.config)
    dit = load(golden / "e2e_dit" / "dit")
    assert isinstance(dit, KelixDiT)
    return TrainedParts(
        tiny.model(),
        tokenizer,
        {name: checkpoint.read(f"visual_tokenizer.{name}") for name in names},
        tiny.images(),
        tiny.CHECKPOINT,
        dit,
        load_vae(golden / "e2e_dit" / "vae"),
    )


def test_the_engine_loads_the_same_weights(golden: Path, tmp_path: Path) -> None:
    made, folder = parts(golden), tmp_path / "kelix"
    folder.mkdir()
    (folder / "old").write_text("gone afterwards")
    size = export(made, folder, "# A card\n")
    assert size == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert not (folder / "old").exists() and (folder / "README.md").read_text() == "# A card\n"
    engine = Engine.from_pretrained(folder, device="cpu")
    model = engine.runner.model
    assert model.dtype == torch.bfloat16
    assert model.visual_tokenizer is not None
    pairs = [
        (made.language.state_dict(), model.state_dict()),
        (made.tokenizer.state_dict(), model.visual_tokenizer.state_dict()),
        (made.dit.state_dict(), engine.runner.render_stage().dit.state_dict()),
        (made.vae.state_dict(), load_vae(folder / "vae").state_dict()),
    ]
    for trained, loaded in pairs:
        assert set(trained) <= set(loaded)
        for name, tensor in trained.items():
            assert torch.equal(tensor.bfloat16(), loaded[name]), name
    assert engine.text.encode("Hello") == tiny.chats()._text.encode("Hello")
    assert engine.images == tiny.images()


def test_the_layout_is_the_released_one(golden: Path, tmp_path: Path) -> None:
    made = parts(golden)
    released = Checkpoint(tiny.CHECKPOINT)
    unused = {"lm_head.weight", *(n for n in released.names() if ".final_norm." in n)}
    stored = stored_language(made)
    assert {n for n in released.names() if n not in unused and "embeddings.packing" not in n} >= {
        name for name in stored if "up_projectors" not in name
    }
    for name, tensor in stored.items():
        if name in released and "position_embedding" not in name:
            assert tuple(tensor.shape) == released.shape(name), name


def test_a_large_checkpoint_is_refused_and_nothing_replaced(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kelix"
    folder.mkdir()
    (folder / "old").write_text("stays")
    with pytest.raises(ConfigError, match="at most 1000 bytes"):
        export(parts(golden), folder, "", max_bytes=1000)
    assert (folder / "old").exists() and list(tmp_path.iterdir()) == [folder]


def test_codebooks_must_be_complete(golden: Path, tmp_path: Path) -> None:
    made = parts(golden)
    first = next(iter(made.codebooks))
    with pytest.raises(ConfigError, match="codebooks must hold"):
        stored_language(TrainedParts(**{**vars(made), "codebooks": {first: made.codebooks[first]}}))


def test_own_centres_give_the_same_codebooks(golden: Path, tmp_path: Path) -> None:
    made, small, large = parts(golden), tmp_path / "small", tmp_path / "large"
    own = own_centres(made.tokenizer.config, made.codebooks)
    assert own["quantizer.7.embedding.weight"].shape[0] == 32
    assert export(made, large, "") > export(replace(made, codebooks=own), small, "")
    books = [VisionTokenizer.from_pretrained(p, "visual_tokenizer.").codebooks
             for p in (small, large)]  # fmt: skip
    assert torch.equal(*books)


def test_another_world_is_refused(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kelix"
    export(parts(golden), folder, "")
    require_checkpoint_world(folder)
    file = folder / "model.safetensors"
    with safe_open(str(file), "pt") as opened:
        assert opened.metadata()["world_version"] == str(WORLD_VERSION)
    save_file(load_file(str(file)), str(file), {"world_version": "0"})
    with pytest.raises(ConfigError, match=r"model\.safetensors: world_version.*world 0"):
        require_checkpoint_world(folder)
    with pytest.raises(ConfigError, match="cannot be read"):
        require_checkpoint_world(tmp_path)
