"""Random engines: what `kelix bench --config release` makes, here at toy size, and its refusals."""

from __future__ import annotations

import pytest
import torch

from kelix_rt import ConfigError, RenderParams
from kelix_rt.config import KelixConfig, SanaConfig
from kelix_rt.engine import Engine
from kelix_rt.errors import CapacityError
from kelix_rt.measure import measure
from kelix_rt.release import Sizes, random_engine, release_engine, release_workload
from tests.models import plain_dit, plain_tokenizer
from tests.models.toy_llm import D, K, N, V, config_json

CPU = torch.device("cpu")
STEPS, BLOCKS = 2, 5


def toy_sizes() -> Sizes:
    tokenizer = plain_tokenizer.make_config(
        codebook_size=N * K, n_q_tokens=N, split_voc=N, llm_hidden_size=D
    )
    del tokenizer["__class__"]
    config = config_json({"max_seq_len": 512}) | {"tokenizer_config": tokenizer}
    channels = (4,) * 6
    vae = {
        "latent_channels": 4,
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
        "encoder_qkv_multiscales": ((),) * 6,
        "decoder_qkv_multiscales": ((),) * 6,
    }
    dit = SanaConfig.from_json(plain_dit.options(connector_channels=D))
    return Sizes(KelixConfig.from_json(config), dit, vae)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return random_engine(toy_sizes(), CPU, torch.float32)


def test_every_stage_runs_and_is_measured(engine: Engine) -> None:
    work = release_workload(engine, RenderParams(steps=STEPS, seed=0), BLOCKS)
    report = measure(engine, work, runs=1)
    names = [row.name for row in report.rows]
    assert names[0] == "picture -> codes" and report.rows[0].count == 324
    assert {"visual block", "denoise step", "latent -> pixels", "prompt -> picture"} < set(names)
    assert all(row.seconds > 0 and row.per_second > 0 for row in report.rows)
    drawing, answer = report.traces
    assert len(drawing.seconds("visual block")) == BLOCKS - 1
    assert len(drawing.seconds("denoise")) == STEPS and len(drawing.seconds("decode")) == 1
    assert len(answer.seconds("encode")) == 1 and not answer.seconds("denoise")
    for trace in report.traces:
        ends = [span.end for span in trace.spans]
        assert [0.0, *ends[:-1]] == [span.start for span in trace.spans]
        assert ends == sorted(ends) and trace.total == ends[-1]


def test_drawings_are_made_of_visual_blocks(engine: Engine) -> None:
    work = release_workload(engine, RenderParams(steps=STEPS, seed=0), BLOCKS)
    image = engine.generate_image(work.drawing, sampling=work.sampling, render=work.render)
    assert bool((image.blocks[:, :-1] >= V).all())


def test_an_engine_without_a_checkpoint_has_no_text(engine: Engine) -> None:
    assert not engine.has_text
    with pytest.raises(ConfigError, match="made without a checkpoint"):
        engine.chat("hello")


def test_released_sizes() -> None:
    """The configs count as many weights as the released tensors do, without making them."""
    from kelix_rt.models.dit import KelixDiT
    from kelix_rt.models.language_model import KelixLM

    sizes = Sizes()
    with torch.device("meta"):
        language = KelixLM(sizes.kelix)
    backbone = sum(p.numel() for p in language.backbone.layers.parameters())
    assert backbone == 36 * 192_946_432
    assert language.head.numel() == language.embeddings.numel() == 890_765_312
    block = KelixDiT(sizes.dit).blocks[0]
    assert sum(p.numel() for p in block.parameters()) + 6 * 2240 == 77_929_600


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        release_engine("cpu")


def test_too_little_memory_is_refused_with_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kelix_rt.release.available_bytes", lambda _device: 1 << 30)
    with pytest.raises(CapacityError, match=r"language model 16\.\d+ GiB.* 1\.0 GiB are free"):
        random_engine(Sizes(), CPU, torch.bfloat16)
