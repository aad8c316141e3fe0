from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kelix_rt import Engine
from kelix_rt.errors import ConfigError
from kelix_rt.train import __main__ as commands
from kelix_rt.train import ablations
from kelix_rt.train.evaluate import Amounts
from kelix_rt.train.language import pack
from kelix_rt.train.pipeline import STAGES, Pipeline
from kelix_rt.train.recipe import CPU, Sizes

SIZES = Sizes(
    vocab=600, codes_per_book=4, code_dim=8, side=56, other_sides=(84,), vision_width=32,
    vision_layers=1, vision_heads=2, vision_ffn=32, width=32, layers=1, heads=2, kv_heads=1,
    head_dim=16, ffn=32, max_positions=1024, block_width=16, block_heads=2, block_ffn=16,
    latent_channels=4, latent_rate=16, drawn_side=64, dit_width=32, dit_layers=1, dit_head_dim=16,
    caption_width=16,
)  # fmt: skip
AMOUNTS = Amounts(questioned=1, drawn=1, reconstructed=1, encoded=1, side=56, steps=2)
QUIET: dict[str, Any] = {"log_every": 1}


def train_everything(out: Path) -> Pipeline:
    """Every stage of every part, one to four steps each, and the export."""
    recipe = CPU.scaled(0.0005)
    recipe = replace(recipe, sizes=SIZES)
    for part in STAGES:
        small = {name: replace(stage, batch=2) for name, stage in getattr(recipe, part).items()}
        recipe = replace(recipe, **{part: small})  # type: ignore[arg-type]
    pipeline = Pipeline(recipe, out, torch.device("cpu"))
    pipeline.train_all(**QUIET)
    pipeline.export()
    return pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return train_everything(tmp_path_factory.mktemp("run"))


def test_every_stage_leaves_a_checkpoint_and_a_log(run: Pipeline) -> None:
    for part, stages in STAGES.items():
        for stage in stages:
            assert (run.out / part / f"{part}-{stage}.pt").is_file()
            lines = (run.out / part / f"{part}-{stage}.jsonl").read_text().splitlines()
            assert len(lines) == getattr(run.recipe, part)[stage].steps
            assert json.loads(lines[-1])["loss"] > 0
            shown = run.out / part / f"{part}-{stage}.png"
            assert shown.is_file() == (part in ("autoencoder", "detokenizer"))


def test_the_checkpoint_speaks_draws_and_agrees_with_the_trained_model(run: Pipeline) -> None:
    engine = Engine.from_pretrained(run.checkpoint, device="cpu", dtype="float32")
    trained = run._language_trainer
    documents = trained.documents(run.recipe.language["4"], "4", 0)
    rounded = run._new_language_model()
    state = trained.model.state_dict()
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in state.items()})
    blocks = pack(rounded, documents[:1]).blocks
    with torch.no_grad():
        expected = rounded.teacher_forced_logits(blocks)
        torch.testing.assert_close(engine.runner.model.teacher_forced_logits(blocks), expected)
    reply = engine.chat([{"role": "user", "content": "hello."}])
    assert reply.usage.generated_blocks > 0
    picture = engine.generate_image("draw a red circle.").image
    assert picture.size == (64, 64)
    card = (run.checkpoint / "README.md").read_text()
    assert "| language | 2.2 |" in card


def test_a_second_run_trains_nothing(run: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Pipeline(run.recipe, run.out, torch.device("cpu"))
    written = {path: path.stat().st_mtime_ns for path in run.out.rglob("*.pt")}
    again.train_all(**QUIET)
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*.pt")} == written
    for name, value in run._language_trainer.model.state_dict().items():
        assert torch.equal(value, again._language_trainer.model.state_dict()[name]), name


def test_the_same_seed_gives_the_same_checkpoint(run: Pipeline, tmp_path: Path) -> None:
    again = train_everything(tmp_path)
    weights = [p.relative_to(run.checkpoint) for p in run.checkpoint.rglob("*.safetensors")]
    assert len(weights) == 3
    for file in weights:
        first, second = load_file(run.checkpoint / file), load_file(again.checkpoint / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_run_is_measured(run: Pipeline) -> None:
    found = run.evaluate(AMOUNTS)
    assert json.loads((run.out / "evaluation" / "evaluation.json").read_text()) == found
    assert (run.out / "evaluation" / "contact-sheet.png").is_file()


def test_variants_of_the_tokenizer_are_compared(run: Pipeline) -> None:
    found = run.ablate(2, **QUIET)
    assert list(found) == ["N = 1", "N = 2", "N = 4", "N = 8", "N = 8, mean instead of sum",
                           "N = 8, one shared codebook"]  # fmt: skip
    assert json.loads((run.out / "ablations" / "ablations.json").read_text()) == found
    assert all(row["text"] > 0 and 0 <= row["background"] <= 1 for row in found.values())


def test_variants_start_from_the_warmed_up_transformer(run: Pipeline, tmp_path: Path) -> None:
    base = torch.load(run.out / "tokenizer" / "tokenizer-warmup.pt", weights_only=True)
    learned = base["modules"]["model"]
    still = {name: replace(stage, lr=1e-12) for name, stage in ablations.STAGES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "STAGES", still)
        ablations.ablate(run._tokenizer_trainer, 1, tmp_path, **QUIET)
    for folder in (path for path in tmp_path.iterdir() if path.is_dir()):
        variant = torch.load(folder / "tokenizer-warmup.pt", weights_only=True)["modules"]["model"]
        for name in ("patch_embedding.weight", "patch_embedding.bias", "positions"):
            torch.testing.assert_close(variant[name], learned[name], rtol=0, atol=1e-6)


def test_a_part_needs_the_parts_before_it(run: Pipeline, tmp_path: Path) -> None:
    bare = Pipeline(run.recipe, tmp_path, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"tokenizer-3\.pt does not exist"):
        bare.train("language")


def test_other_sizes_are_refused(run: Pipeline) -> None:
    other = replace(run.recipe, sizes=replace(SIZES, marker="{row},{cols}"))
    with pytest.raises(ConfigError, match="other settings"):
        Pipeline(other, run.out, torch.device("cpu")).train("autoencoder")


def test_texts_of_another_run_are_refused(run: Pipeline) -> None:
    other = Pipeline(run.recipe.seeded(1), run.out, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"text is of another seed, size or world"):
        other.train("tokenizer")


def test_options_out_of_range_are_named() -> None:
    for arguments in (["--budget", "inf"], ["--seed", str(-(10**13))]):
        wrong = CliRunner().invoke(commands.app, ["tokenizer", *arguments])
        assert isinstance(wrong.exception, ConfigError), arguments


def test_commands(run: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = CliRunner().invoke(commands.app, ["--help"]).output
    assert all(name in listed for name in (*STAGES, "all", "export", "ablate", "evaluate"))
    arguments = ["evaluate", str(run.checkpoint), "--out", str(tmp_path), "--amount", "0.001",
                 "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(commands.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "Answers on the test split" in done.output
    wrong = CliRunner().invoke(commands.app, ["language", "--stage", "9"])
    assert isinstance(wrong.exception, ConfigError)
    monkey = ["kelix_rt.train", "language", "--stage", "9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", monkey)
        with pytest.raises(SystemExit):
            commands.main()
    assert "--stage of language must be one of warmup, 1, 2.1" in capsys.readouterr().err
