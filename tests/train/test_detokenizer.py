from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kelix_rt.config import SanaConfig
from kelix_rt.train.autoencoder import new_autoencoder
from kelix_rt.train.chats import drawing
from kelix_rt.train.detokenizer import (
    DetokenizerTrainer,
    conditions,
    flow_loss,
    noise_levels,
)
from kelix_rt.train.detokenizer_start import new_dit
from kelix_rt.train.language import pack
from kelix_rt.train.pictures import scene_of
from kelix_rt.train.place_weights import place_weights
from kelix_rt.train.recipe import Sizes, Stage
from kelix_rt.train.states import load_modules
from tests.train import tiny

CONFIG = SanaConfig(
    input_size=2,
    in_channels=4,
    hidden_size=32,
    depth=2,
    num_heads=2,
    linear_head_dim=16,
    caption_channels=24,
    model_max_length=12,
    qk_norm=True,
    cross_norm=True,
    use_pe=True,
    use_connector=True,
    connector_channels=64,
)


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(size, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    return (
        torch.randn(size, 4, 2, 2, generator=generator),
        torch.randn(size, 12, 64, generator=generator),
        mask,
    )


def test_conditions_are_the_states_from_start_to_end(tmp_path: Path) -> None:
    model, chats, pictures = tiny.model(), tiny.chats(), tiny.pictures(tmp_path)
    documents = [drawing(chats, text, pictures.drawing(i)) for i, text in enumerate(("a", "b cd"))]
    found, mask = conditions(model, documents, 12)
    assert found.shape == (2, 12, 64) and mask.tolist() == [[1] * 12] * 2  # 2 + 2 x (3 + 2)
    for row, document in enumerate(documents):
        blocks = pack(model, [document]).blocks
        with torch.no_grad():
            states = model.hidden_states(blocks)[-1]
        start, end = document.ids.index(356), document.ids.index(357)
        torch.testing.assert_close(found[row], states[start : end + 1])


def test_noise_levels_are_logit_normal_and_shifted() -> None:
    torch.manual_seed(0)
    sigma, time = noise_levels(20_000)
    assert torch.equal(time, sigma * 1000)
    quantiles = torch.quantile(time, torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert quantiles == pytest.approx([364, 750, 939], abs=8)
    assert float(sigma.min()) >= 0 and float(sigma.max()) <= 2.997 / 2.998 + 1e-6
    assert len(time.unique()) <= 1000


def test_the_velocity_of_a_fixed_batch_is_learned() -> None:
    dit = new_dit(CONFIG, "cpu", seed=0)
    latent, condition, mask = batch()
    optimizer = torch.optim.AdamW([p for p in dit.parameters() if p.requires_grad], lr=3e-3)
    values = []
    for _ in range(150):
        torch.manual_seed(0)  # the same noise, so the loss can fall to nothing
        loss = flow_loss(dit, latent, condition, mask, dropout=0.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] == pytest.approx(float(latent.square().mean()) + 1, rel=0.6)
    assert values[-1] < 0.1 * values[0]
    assert float(dit.connector_norm.detach().abs().max()) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_dropout_replaces_the_condition(dropout: float) -> None:
    dit = new_dit(CONFIG, "cpu", seed=0)
    nn.init.normal_(dit.final.weight)
    nn.init.ones_(dit.connector_norm)
    latent, condition, mask = batch()
    losses = []
    for own in (condition, condition * 3 + 1):
        torch.manual_seed(1)
        losses.append(float(flow_loss(dit, latent, own, mask, dropout)["loss"].detach()))
    assert (losses[0] == losses[1]) == (dropout == 1.0)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_places_weigh_as_told_where_there_is_a_condition(dropout: float) -> None:
    dit = new_dit(CONFIG, "cpu", seed=0)  # its velocity is zero, so errors are those of the target
    latent, condition, mask = batch()
    weights = torch.zeros(len(latent), *latent.shape[2:])
    weights[:, 0, 1] = torch.rand(len(latent)) + 1

    def loss(weights: torch.Tensor | None) -> float:
        torch.manual_seed(2)
        return float(flow_loss(dit, latent, condition, mask, dropout, weights)["loss"].detach())

    torch.manual_seed(2)
    noise_levels(len(latent))
    errors = (torch.randn(latent.shape) - latent).square().mean(1)
    dropped = torch.rand(len(latent)) < dropout
    mixed = dropped.int().diff().min() < 0  # a dropped sample stands before one that is kept
    assert mixed == (dropout == 0.5)
    assert loss(None) == pytest.approx(float(errors.mean()))
    own = torch.where(dropped[:, None, None], 1.0, weights)
    assert loss(weights) == pytest.approx(float((own * errors).sum() / own.sum()))


def test_pictures_are_read_before_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a stage goes on: the precision of its steps is not that of reading."""
    recipe = tiny.replaced(detokenizer={"1": Stage(2, 1e-3, 1, 2), "2": Stage(2, 1e-3, 1, 2)})
    tiny.trainer(tmp_path).run(log_every=1)
    vae, latents = new_autoencoder(Sizes(latent_channels=4), "cpu", 0), torch.randn(9, 4, 2, 2)
    told: list[str] = []
    read_pictures, flow = DetokenizerTrainer.read_pictures, flow_loss

    def read(self: DetokenizerTrainer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        told.append("read")
        return read_pictures(self, name)

    def loss(*arguments: Any) -> dict[str, torch.Tensor]:
        told.append("step")
        if told.count("step") == 2:
            raise KeyboardInterrupt
        return flow(*arguments)

    monkeypatch.setattr(DetokenizerTrainer, "read_pictures", read)
    monkeypatch.setattr("kelix_rt.train.detokenizer.flow_loss", loss)

    def run() -> None:
        DetokenizerTrainer(
            new_dit(CONFIG, "cpu", seed=0), tiny.model(), tiny.chats(), tiny.pictures(tmp_path),
            latents.bfloat16(), vae, recipe, tmp_path / "language", tmp_path / "dit",
        ).run(["1"], log_every=1, save_every_seconds=0.0)  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run()
    run()
    assert told == ["read", "step", "step", "read", "step"]
    run()
    assert told[5:] == []  # a finished stage needs none


def test_stages_run_and_leave_the_language_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(2, 1e-3, 1, 2)
    recipe = tiny.replaced(detokenizer={"1": stage, "2": stage})
    model, latents = tiny.model(), torch.randn(9, 4, 2, 2).bfloat16()
    dit = new_dit(CONFIG, "cpu", seed=0)
    rows = dit.y_embedding.clone()
    vae = new_autoencoder(Sizes(latent_channels=4), "cpu", 0)
    options: dict[str, Any] = {"log_every": 1, "save_every_seconds": 0.0}
    tiny.trainer(tmp_path).run(**options)
    trainer = DetokenizerTrainer(
        dit, model, tiny.chats(), tiny.pictures(tmp_path), latents, vae, recipe,
        tmp_path / "language", tmp_path / "dit",
    )  # fmt: skip
    weighed = []

    def loss(*arguments: Any) -> dict[str, torch.Tensor]:
        weighed.append(arguments[-1])
        return flow_loss(*arguments)

    monkeypatch.setattr("kelix_rt.train.detokenizer.flow_loss", loss)
    first = trainer.run(["1"], **options)
    second = trainer.run(["2"], **options)
    assert len(weighed) == 4
    for number, weights in enumerate(weighed):
        name, step = "12"[number // 2], number % 2
        scenes = [scene_of(i % 3, recipe.seed) for i in trainer.indices(name, step)]
        assert torch.equal(weights, torch.stack([place_weights(scene, 2) for scene in scenes]))
    assert first.checkpoint.name == "detokenizer-1.pt" and second.steps == 2
    last = tiny.model(seed=1)
    load_modules(tmp_path / "language" / "language-4.pt", {"model": last})
    state = last.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(dit.y_embedding, rows)
    assert float(dit.final.weight.detach().abs().max()) > 0
