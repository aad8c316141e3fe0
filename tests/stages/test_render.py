"""The render stage: golden images, batches of unlike requests, sizes and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt.errors import ConfigError, InputError
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.vae import Autoencoder, to_uint8
from kelix_rt.parity import e2e
from kelix_rt.parity.report import failures
from kelix_rt.request import RenderParams
from kelix_rt.stages.render import RenderStage, RenderState, sample


@pytest.fixture(scope="module")
def stage(golden: Path) -> RenderStage:
    path = golden / "e2e_dit"
    return RenderStage.from_pretrained(path / "dit", path / "vae")


@pytest.fixture(scope="module")
def data(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "e2e_dit" / "fixtures.safetensors")


def finish(stage: RenderStage, states: list[RenderState]) -> list[Tensor]:
    """Steps all states together until each is done; their last latents."""
    while True:
        running = [state for state in states if not state.done]
        if not running:
            return [state.latent for state in states]
        stage.step(running)


def test_golden_images(golden: Path) -> None:
    checks = e2e.run(golden / "e2e_dit")
    assert {"cfg1.image_uint8", "cfg3.image_uint8"} <= {check.name for check in checks}
    assert not failures(checks)


@pytest.mark.parametrize("cfg", [1, 3])
def test_stepwise_image_equals_golden(
    stage: RenderStage, data: dict[str, Tensor], cfg: int
) -> None:
    length = int(data["mask"].sum())
    params = RenderParams(steps=6, cfg=float(cfg), latent=data["latent0"])
    state = stage.start(data["cond_embeds"][0, :length], params)
    finish(stage, [state])
    image = torch.from_numpy(np.array(stage.finish(state)))
    difference = (image.int() - data[f"cfg{cfg}.image_uint8"].int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 5e-3


def test_unlike_requests_in_one_batch_equal_each_alone(
    stage: RenderStage, data: dict[str, Tensor]
) -> None:
    """Other lengths, steps, guidance, shift, solver and size; one starts two steps late."""
    condition = data["cond_embeds"][0]
    requests: list[tuple[int, dict[str, Any]]] = [
        (13, {"steps": 5, "seed": 1}),
        (20, {"steps": 3, "seed": 2, "cfg": 2.5}),
        (4, {"steps": 4, "seed": 3, "cfg": 0.0, "shift": 1.5}),
        (13, {"steps": 4, "seed": 4, "scheduler": "dpm++"}),
        (9, {"steps": 6, "seed": 5, "scheduler": "dpm++", "cfg": 4.0}),
        (7, {"steps": 3, "seed": 6, "height": 96, "width": 160}),
    ]

    def start(number: int) -> RenderState:
        length, values = requests[number]
        return stage.start(condition[:length], RenderParams(**values))

    alone = [finish(stage, [start(number)])[0] for number in range(len(requests))]
    states = [start(number) for number in range(len(requests) - 1)]
    stage.step(states)
    stage.step(states)
    states.append(start(len(requests) - 1))
    for got, want in zip(finish(stage, states), alone, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert states[-1].latent.shape == (1, 8, 3, 5)


def test_sample_equals_the_formula(stage: RenderStage, data: dict[str, Tensor]) -> None:
    dit, latent = stage.dit, data["latent0"]
    condition, mask = data["cond_embeds"], data["mask"]
    seen: list[int] = []
    got = sample(dit, condition, mask, latent, 3, 2.0, callback=lambda i, _x: seen.append(i))
    assert got.shape == (3, *latent.shape) and got.dtype == torch.float32 and seen == [0, 1, 2]
    sigmas = [1.0, 6 / 7, 0.6, 0.0]
    x = latent.clone()
    for i, time in enumerate((1000.0, 857.0, 599.0)):
        steps = torch.tensor([time])
        c = dit.velocity(x, steps, condition, mask)
        u = dit.forward_cached(x, dit.prepare_modulation(steps), dit.unconditional(1, 20))
        x = x + (sigmas[i + 1] - sigmas[i]) * (u + 2 * (c - u))
        torch.testing.assert_close(got[i], x, rtol=1e-4, atol=1e-4)


def test_guidance_1_never_evaluates_the_unconditional_half(
    stage: RenderStage, data: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = KelixDiT.forward_cached

    def counted(self: KelixDiT, latent: Tensor, *rest: Any) -> Tensor:
        rows.append(len(latent))
        return forward(self, latent, *rest)

    monkeypatch.setattr(KelixDiT, "forward_cached", counted)
    for cfg, expected in ((1.0, 1), (1.5, 2)):
        rows.clear()
        sample(stage.dit, data["cond_embeds"], data["mask"], data["latent0"], 2, cfg)
        assert rows == [expected] * 2


def test_the_given_latent_is_not_changed(stage: RenderStage, data: dict[str, Tensor]) -> None:
    before = data["latent0"].clone()
    sample(stage.dit, data["cond_embeds"], data["mask"], data["latent0"], 2)
    assert torch.equal(before, data["latent0"])


@pytest.mark.parametrize("latent", [np.zeros((1, 8, 4, 4)), "noise", torch.zeros(1, 8, 4, 4).int()])
def test_a_latent_of_another_type_is_refused(stage: RenderStage, latent: Any) -> None:
    with pytest.raises(InputError, match="latent must be a floating tensor"):
        stage.latent_shape(RenderParams(latent=latent))


def test_seeds(stage: RenderStage, data: dict[str, Tensor]) -> None:
    condition = data["cond_embeds"]
    first, again = (stage.start(condition, RenderParams(seed=7)) for _ in range(2))
    assert first.seed == 7 and torch.equal(first.latent, again.latent)
    expected = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first.latent, expected)
    fresh = stage.start(condition, RenderParams())
    repeated = stage.start(condition, RenderParams(seed=fresh.seed))
    assert torch.equal(fresh.latent, repeated.latent)
    assert not torch.equal(fresh.latent, first.latent)


def test_long_conditions_are_cut(golden: Path, data: dict[str, Tensor]) -> None:
    path = golden / "e2e_dit"
    short = RenderStage.from_pretrained(path / "dit", path / "vae", max_condition_length=5)
    params = RenderParams(steps=1, seed=0)
    states = [short.start(data["cond_embeds"][0, :n], params) for n in (5, 12)]
    got = finish(short, states)
    assert states[1].condition.lengths == (5,)
    torch.testing.assert_close(got[0], got[1])


@pytest.mark.parametrize(
    "params",
    [
        RenderParams(height=100),
        RenderParams(width=48),
        RenderParams(latent=torch.zeros(1, 7, 4, 4)),
        RenderParams(latent=torch.zeros(8, 4, 4)),
        RenderParams(height=64, latent=torch.zeros(1, 8, 4, 4)),
        RenderParams(latent=torch.full((1, 8, 4, 4), float("nan"))),
        RenderParams(height=2048, width=2080),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    stage: RenderStage, data: dict[str, Tensor], params: RenderParams
) -> None:
    with pytest.raises(InputError):
        stage.start(data["cond_embeds"], params)


def test_bad_conditions_and_calls_are_refused(stage: RenderStage, data: dict[str, Tensor]) -> None:
    condition, params = data["cond_embeds"], RenderParams(steps=1, seed=0)
    for bad in (condition[0, :0], condition.repeat(2, 1, 1), condition[0, 0], condition[..., :3]):
        with pytest.raises(InputError):
            stage.start(bad, params)
    state = stage.start(condition, params)
    with pytest.raises(InputError, match="0 of 1"):
        stage.finish(state)
    stage.step([state])
    with pytest.raises(InputError, match="all its 1 steps"):
        stage.step([state])
    with pytest.raises(InputError, match="scheduler"):
        sample(stage.dit, condition, None, data["latent0"], 2, scheduler="heun")  # type: ignore[arg-type]


def test_autoencoder_of_another_scale_is_refused(golden: Path) -> None:
    vae = Autoencoder(golden / "e2e_dit" / "vae")
    dit = KelixDiT.from_pretrained(golden / "dit" / "tiny_release")
    RenderStage(dit, vae)
    vae.config["decoder_block_out_channels"] = [8, 8, 16]
    with pytest.raises(ConfigError, match="vae_downsample_rate"):
        RenderStage(dit, vae)


def test_pixels_round_halves_to_even() -> None:
    values = torch.tensor([-3.0, -1.0, 2 * 0.5 / 255 - 1, 2 * 1.5 / 255 - 1, 1.0, 5.0])
    got = to_uint8(values.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert got.shape == (1, 1, 6, 3) and got.dtype == torch.uint8
    unit = (values / 2 + 0.5).clamp(0, 1) * 255
    assert got[0, 0, :, 0].tolist() == unit.round().int().tolist()
    assert got[0, 0, [0, 1, 4, 5], 0].tolist() == [0, 0, 255, 255]


def test_sides_are_those_asked_for_those_of_the_latent_or_the_models(stage: RenderStage) -> None:
    own = stage.dit.config.input_size * stage.vae.rate
    latent = torch.zeros(1, stage.dit.config.in_channels, 2, 6)
    for params, sides in (
        (RenderParams(), (own, own)),
        (RenderParams(width=2 * own), (own, 2 * own)),
        (RenderParams(latent=latent), (2 * stage.vae.rate, 6 * stage.vae.rate)),
    ):
        sized = stage.sized(params)
        assert (sized.height, sized.width) == sides
        assert stage.sized(sized) == sized


def test_a_latent_may_be_filled_anew_once_it_was_given(stage: RenderStage) -> None:
    noise = torch.ones(1, stage.dit.config.in_channels, 2, 2)
    sized = stage.sized(RenderParams(latent=noise))
    noise.zero_()
    assert sized.latent is not None and torch.equal(sized.latent, torch.ones_like(noise))
