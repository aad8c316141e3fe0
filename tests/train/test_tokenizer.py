"""The tokenizer's recipe at the smallest size: it learns, resumes, and exports what it trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kelix_rt.models import load
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.processing import ImageProcessor, TextTokenizer
from kelix_rt.train.quantizer import code_usage
from kelix_rt.train.recipe import CPU, Recipe, Sizes, Stage, tokenizer_config
from kelix_rt.train.text_tokenizer import write_text_tokenizer
from kelix_rt.train.token_pixels import token_paint, token_pixels
from kelix_rt.train.tokenizer import TokenizerTrainer
from kelix_rt.train.world import make_scene

SIZES = Sizes(
    vocab=700, books=2, codes_per_book=8, code_dim=8, width=32, side=56,
    other_sides=(84,), vision_width=32, vision_layers=1, vision_heads=2, vision_ffn=32,
    max_positions=300,
)  # fmt: skip
STAGE = Stage(3, 3e-3, 1, 3)
RECIPE: Recipe = replace(
    CPU,
    sizes=SIZES,
    pictures=20,
    tokenizer={"warmup": STAGE, "1": STAGE, "2": STAGE, "3": STAGE},
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, ImageProcessor]:
    folder = tmp_path_factory.mktemp("text")
    write_text_tokenizer(folder, SIZES, samples=20)
    return (
        TextTokenizer.from_pretrained(folder, vocab_size=SIZES.vocab),
        ImageProcessor.from_pretrained(folder),
    )


def trainer(
    text: tuple[TextTokenizer, ImageProcessor], out: Path, recipe: Recipe = RECIPE
) -> TokenizerTrainer:
    return TokenizerTrainer(recipe, tokenizer_config(SIZES), *text, out)


@pytest.fixture(scope="module")
def trained(
    text: tuple[TextTokenizer, ImageProcessor], tmp_path_factory: pytest.TempPathFactory
) -> TokenizerTrainer:
    made = trainer(text, tmp_path_factory.mktemp("trained"))
    made.run()
    return made


@pytest.mark.parametrize("name", ["warmup", "2"])
def test_steps_lower_the_loss_on_a_fixed_batch(
    text: tuple[TextTokenizer, ImageProcessor], tmp_path: Path, name: str
) -> None:
    made = trainer(text, tmp_path)
    made.quantizer.start(made._corpus(), made.model)
    made._unfreeze(name)
    batch = made.batch(name, 0)
    parameters = [p for module in made.modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    seen = []
    for _ in range(30):
        losses = made.losses(batch, name == "warmup")
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append({key: float(value.detach()) for key, value in losses.items()})
    assert ("text" in seen[0], "vq" in seen[0]) == (name == "2", name == "2")
    for part in seen[0].keys() & {"text", "labels"}:
        assert seen[-1][part] < 0.6 * seen[0][part], part
    assert all(seen[-1][part] < seen[0][part] for part in ("pixels", "paint"))


def test_export_encodes_as_the_training_modules_do(
    trained: TokenizerTrainer, tmp_path: Path
) -> None:
    codes = trained.codes(3)
    trained.export(tmp_path, torch.float32)
    loaded = load(tmp_path)
    assert isinstance(loaded, VisionTokenizer)
    loaded_codes = [
        loaded.encode(*trained.patches(make_scene("val", i, RECIPE.seed))) for i in range(3)
    ]
    assert torch.equal(torch.cat(loaded_codes), codes)
    assert torch.equal(loaded.codebooks, trained.quantizer.codebooks())
    torch.testing.assert_close(loaded.embed(codes), trained.model.embed(codes))


def test_stage_one_leaves_the_vision_transformer_alone(
    text: tuple[TextTokenizer, ImageProcessor], trained: TokenizerTrainer
) -> None:
    def state(stage: str) -> dict[str, torch.Tensor]:
        stored = torch.load(trained.out / f"tokenizer-{stage}.pt", weights_only=True)["modules"]
        return {f"{m}.{n}": t for m, own in stored.items() for n, t in own.items()}

    before, after = state("warmup"), state("1")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith((
        "model.merger.", "model.encoder.", "model.z_", "model.up_projectors", "quantizer.",
        "reader.", "pixels.", "paint.", "labels.", "sight.",
    ))}  # fmt: skip
    assert torch.equal(after["quantizer.centres"], state("3")["quantizer.centres"])


def test_an_interrupted_run_ends_with_the_same_weights(
    text: tuple[TextTokenizer, ImageProcessor], trained: TokenizerTrainer, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def stop(step: int) -> None:
        if step == 2:
            raise Interrupted

    first = trainer(text, tmp_path)
    first.run(("warmup",))
    first._measures = stop  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted):
        first.run(("1",), log_every=1, save_every_seconds=0)
    second = trainer(text, tmp_path)
    assert second.run(("1",)).resumed_from == 1
    second.run(("2", "3"))
    for name, module in trained.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, second.modules[name].state_dict()[key]), f"{name}.{key}"


def test_usage_is_reported_while_training(trained: TokenizerTrainer) -> None:
    lines = (trained.out / "tokenizer-3.jsonl").read_text()
    assert all(name in lines for name in ("utilisation", "perplexity", "background"))
    used, _ = code_usage(trained.codes(20), SIZES.codes_per_book)
    assert used.shape == (2,) and used.min() > 0


def test_token_pixels_belong_to_their_token(trained: TokenizerTrainer) -> None:
    patches = torch.zeros(8, 3, 14, 14)
    patches[6] = 1.0  # row 1, column 2 of 2 x 4 patches: token 1, third of its four patches
    layout = trained.model.layout(patches, torch.tensor([[1, 2, 4]]))
    pixels = token_pixels(patches, layout.merge_order)
    assert pixels.shape == (2, 588) and pixels[0].sum() == 0
    assert pixels[1].view(4, 147).sum(1).tolist() == [0, 0, 147, 0]


def test_paint_is_the_colour_of_what_covers_a_token(trained: TokenizerTrainer) -> None:
    patches, covered = torch.full((8, 3, 14, 14), -0.5), -torch.ones(8, 1, 14, 14)
    covered[6, :, :7] = 1.0  # half a patch of token 1, as above
    patches[6, :, :7] = torch.tensor([1.0, 0.25, -1.0]).view(3, 1, 1)
    covered[0, :, 0, :2] = 1.0  # a speck of token 0
    layout = trained.model.layout(patches, torch.tensor([[1, 2, 4]]))
    paint, there = token_paint(patches, covered, layout.merge_order)
    assert there.tolist() == [False, True]
    assert paint[1].tolist() == pytest.approx([1.0, 0.25, -1.0])
