from __future__ import annotations

import json
from pathlib import Path

import pytest

from kelix_rt.config import EngineConfig, KelixConfig, SanaConfig, TokenizerConfig, read_config
from kelix_rt.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer/tok_a", TokenizerConfig),
        ("llm/tiny_b", KelixConfig),
        ("dit/tiny_alt", SanaConfig),
        ("e2e_dit/vae", dict),
    ],
)
def test_the_class_field_picks_the_config(golden: Path, name: str, kind: type) -> None:
    assert isinstance(read_config(golden / name), kind)
    assert isinstance(read_config(golden / name / "config.json"), kind)


def test_every_stored_field_is_read(golden: Path) -> None:
    config = read_config(golden / "dit" / "tiny_alt")
    stored = json.loads((golden / "dit" / "tiny_alt" / "config.json").read_text())
    del stored["__class__"]
    stored["mlp_acts"] = tuple(stored["mlp_acts"])
    assert {name: getattr(config, name) for name in stored} == stored


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "__class__"),
        ('{"__class__": "Other"}', "got 'Other'"),
        ('{"__class__": "SanaConfig", "depht": 3}', "unknown fields: depht"),
    ],
)
def test_unreadable_configs_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_old_autoencoder_configs_take_the_defaults_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC", "latent_channels": 4}')
    config = read_config(tmp_path)
    assert isinstance(config, dict)
    assert config["latent_channels"] == 4 and len(config["decoder_block_out_channels"]) == 6


def test_absent_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_head_dim": 33}, "linear_head_dim must divide"),
        ({"linear_head_dim": 320}, "linear_head_dim must be at most 256"),
        ({"num_heads": 9}, "num_heads must divide"),
        ({"mlp_acts": ["silu"]}, "mlp_acts must have 3 entries"),
        ({"use_connector": True}, "connector_channels must be set"),
        ({"attn_type": "vanilla"}, "attn_type"),
    ],
)
def test_impossible_sana_configs(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SanaConfig.from_json(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch must be positive"),
        ({"num_pages": -1}, "num_pages must be None or positive"),
        ({"kv_memory_fraction": 1.5}, "kv_memory_fraction"),
        ({"codes_mode": "fast"}, "codes_mode"),
    ],
)
def test_impossible_engine_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message.split(maxsplit=1)[0]):
        EngineConfig.from_json(options)
