"""The kelix command on golden checkpoints: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from kelix_rt import Engine, InputError, RenderParams, SamplingParams
from kelix_rt.cli import main
from kelix_rt.cli.generate import printable
from kelix_rt.cli.options import read_size
from kelix_rt.cli.output import print_json, size_text
from kelix_rt.cli.parity import find_golden, kind_of
from kelix_rt.cli.session import STREAMED
from kelix_rt.memory import plan

PHOTO = Path(__file__).parent.parent / "kelix_rt" / "assets" / "photo.jpg"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def kelix(capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process."""

    def run(*args: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def model(golden: Path) -> Path:
    return golden / "llm" / "tiny_a"


@pytest.fixture(scope="module")
def drawing(golden: Path) -> tuple[str, ...]:
    parts = golden / "e2e_dit"
    return ("--dit", str(parts / "dit"), "--vae", str(parts / "vae"), "--steps", "3")


@pytest.fixture(scope="module")
def engine(golden: Path, model: Path) -> Engine:
    parts = golden / "e2e_dit"
    return Engine.from_pretrained(model, dit=parts / "dit", vae=parts / "vae", device="cpu")


def test_the_version_is_that_of_the_installed_package(kelix) -> None:
    result = kelix("--version")
    assert (result.code, result.out) == (0, f"kelix_rt {version('kelix-rt')}\n")


def test_chat_streams_the_answer(kelix, model: Path, engine: Engine) -> None:
    result = kelix("chat", "Hello", "-m", model, "--seed", 5, "--max-blocks", 20, "--device", "cpu")
    expected = engine.chat(
        [{"role": "user", "content": "Hello"}], SamplingParams(seed=5, max_blocks=20)
    )
    assert result.code == 0
    assert result.out == printable(expected.text) + "\n"
    assert f"{expected.usage.generated_blocks} blocks" in result.err


def test_chat_as_json_is_one_object_with_the_raw_text(kelix, model: Path, engine: Engine) -> None:
    args = ["--image", PHOTO, "--system", "Be brief", "--temperature", 0, "--max-blocks", 30]
    result = kelix("chat", "What is this?", "-m", model, *args, "--json")
    content = [{"type": "image", "image": PHOTO}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": content}]
    expected = engine.chat(messages, SamplingParams(temperature=0.0, max_blocks=30))
    found = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert found["text"] == expected.text
    assert found["finish_reason"] == expected.finish_reason
    assert found["usage"]["prompt_blocks"] == expected.usage.prompt_blocks
    assert found["timings"]["total"] > 0


def test_draw_writes_the_image_the_engine_draws(
    kelix, model: Path, drawing: tuple[str, ...], engine: Engine, tmp_path: Path
) -> None:
    out = tmp_path / "circle.png"
    args = ["--seed", 3, "--cfg", 1.5, "--size", "96x64", "--json"]
    result = kelix("draw", "a red circle", "-m", model, "-o", out, *drawing, *args)
    render = RenderParams(height=64, width=96, steps=3, cfg=1.5, seed=3)
    expected = engine.generate_image("a red circle", render=render)
    assert result.code == 0
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected.image))
    found = json.loads(result.out)
    assert (found["path"], found["width"], found["height"]) == (str(out), 96, 64)
    assert (found["seed"], found["blocks"]) == (3, len(expected.blocks))


def test_what_no_seed_is_given_for_differs_from_run_to_run(
    kelix, model: Path, drawing: tuple[str, ...], tmp_path: Path
) -> None:
    args = ["-m", model, "-o", tmp_path / "x.png", *drawing, "--json"]
    seeds = {json.loads(kelix("draw", "a red circle", *args).out)["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_chat_leaves_a_dit_beside_its_model_alone(kelix, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "dit").mkdir()  # without a VAE, no engine that draws can be made of it
    args = ["-m", tmp_path / "model", "--max-blocks", 2]
    assert kelix("chat", "Hello", *args).code == 0
    assert "drawing needs" in kelix("draw", "a circle", "-m", tmp_path / "model").err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["draw", "a circle", "--temperature", -1], "temperature must be a number in [0.0"),
        (["draw", "a circle", "--temperature", "nan"], "temperature must be a number in [0.0"),
        (["info", "kelix-tiny", "--dit", "x"], "--dit and --vae belong to a --plan"),
    ],
)
def test_options_are_not_ignored(kelix, args: list[object], message: str) -> None:
    result = kelix(*args)
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_draw_without_a_dit_reads_no_weight(
    kelix, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    result = kelix("draw", "a red circle", "-m", model, "-o", tmp_path / "x.png")
    assert result.code == 2
    assert "pass --dit and --vae" in result.err


def test_reconstruct_draws_the_photo_from_its_codes(
    kelix, model: Path, drawing: tuple[str, ...], engine: Engine, tmp_path: Path
) -> None:
    out = tmp_path / "again.png"
    result = kelix(
        "reconstruct", PHOTO, "-m", model, "-o", out, *drawing, "--seed", 3, "--size", "84x56"
    )
    expected = engine.reconstruct(PHOTO, size=(56, 84), render=RenderParams(steps=3, seed=3))
    assert result.code == 0
    assert result.out.startswith(str(out))
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected.image))


def test_encode_prints_and_saves_the_codes(
    kelix, model: Path, engine: Engine, tmp_path: Path
) -> None:
    expected = engine.encode_image(PHOTO)
    codes = expected.codes.numpy()
    table = kelix("encode", PHOTO, "-m", model, "-o", tmp_path / "codes.npy")
    assert table.code == 0
    assert f"{len(codes)} blocks of 8 codes" in table.out
    assert table.out.splitlines()[2].split() == ["0", *map(str, codes[0])]
    assert np.array_equal(np.load(tmp_path / "codes.npy"), codes)
    assert kelix("encode", PHOTO, "-m", model, "-o", tmp_path / "upper.NPY").code == 0
    assert np.array_equal(np.load(tmp_path / "upper.NPY"), codes)
    found = json.loads(kelix("encode", PHOTO, "-m", model, "-o", tmp_path / "c.json", "--json").out)
    assert found == {"grid": list(expected.grid), "codes": codes.tolist()}
    assert json.loads((tmp_path / "c.json").read_text()) == found


def test_encode_takes_a_vision_tokenizer_alone(kelix, golden: Path) -> None:
    result = kelix(
        "encode", PHOTO, "-m", golden / "tokenizer" / "tok_a", "--size", "112x84", "--json"
    )
    found = json.loads(result.out)
    assert found["grid"] == [1, 6, 8]
    assert np.shape(found["codes"]) == (12, 8)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["chat", "Hello", "-m", "no-such-model"], "neither an existing path nor a hub id"),
        (["chat", "Hello", "-m", "{model}", "--temperature", "-1"], "temperature must be a number"),
        (
            ["chat", "Hello", "-m", "{model}", "--image", "nowhere.jpg"],
            "there is no file nowhere.jpg",
        ),
        (["chat", "Hello", "-m", "{model}", "--dtype", "int8"], "dtype must be 'auto' or one of"),
        (["chat", "Hello", "-m", "{model}", "--device", "abacus"], "'abacus' is not a device"),
        (["chat", " ", "-m", "{model}"], "is empty"),
        (["draw", "x", "-m", "{model}", "-o", "x.gif"], "--out must end in .png"),
        (["draw", "x", "-m", "{model}", "-o", "/no/such/place/x.png"], "there is no directory"),
        (["draw", "x", "-m", "{model}", "--size", "64x"], "--size must be WIDTHxHEIGHT"),
        (["draw", "x", "-m", "{model}", "--steps", "0"], "RenderParams.steps"),
        (["encode", "nowhere.jpg", "-m", "{model}"], "there is no file nowhere.jpg"),
        (
            ["encode", "nowhere.jpg", "-m", "{golden}/e2e_dit/dit"],
            "neither a Kelix model nor a tokenizer",
        ),
        (["info", "/no/such/place"], "is not a directory"),
        (["info", "--plan"], "--plan needs a CHECKPOINT"),
        (["parity", "/no/such/place"], "is not a directory"),
    ],
)
def test_expected_errors_are_one_line(
    kelix, model: Path, golden: Path, args: list[str], text: str
) -> None:
    result = kelix(*(arg.format(model=model, golden=golden) for arg in args))
    assert result.code == 2
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert text in lines[0]
    assert "Traceback" not in result.err


def test_a_file_that_cannot_be_written_is_one_line(kelix, model: Path, tmp_path: Path) -> None:
    result = kelix("encode", PHOTO, "-m", model, "-o", tmp_path / ("x" * 300 + ".npy"))
    assert result.code == 2 and result.err.startswith("error: ") and "too long" in result.err


def test_json_is_plain_where_the_terminal_is_not_utf_8() -> None:
    code = "from kelix_rt.cli.output import print_json; print_json({'name': '\u2603'})"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=True,
    )
    assert json.loads(shown.stdout) == {"name": "\u2603"}


def test_info_shows_the_installation_and_the_ledger(kelix, model: Path) -> None:
    result = kelix("info", model, "--device", "cpu")
    assert result.code == 0
    for text in ("CPU operators", "Kelix language model", "backbone", "KV cache", "total"):
        assert text in result.out
    found = json.loads(kelix("info", model, "--device", "cpu", "--json").out)
    assert found["installation"]["kelix_rt"]
    assert found["checkpoint"]["memory"]["total"] > 0


def test_info_knows_the_bundled_checkpoint(kelix) -> None:
    result = kelix("info", "kelix-tiny", "--plan", "--device", "cpu")
    assert result.code == 0
    assert "render: image DiT" in result.out


def test_info_plans_an_engine_by_stage(kelix, model: Path, golden: Path) -> None:
    parts = ("--dit", golden / "e2e_dit" / "dit", "--vae", golden / "e2e_dit" / "vae")
    result = kelix("info", model, "--plan", *parts, "--device", "cpu")
    assert result.code == 0
    for text in ("encode: vision tokenizer", "render: image DiT", "at once (max_batch 32)"):
        assert text in result.out
    plain = json.loads(kelix("info", model, "--device", "cpu", "--json").out)
    assert "plan" not in plain
    found = json.loads(kelix("info", model, "--plan", *parts, "--device", "cpu", "--json").out)
    assert found["plan"]["total"] > plain["checkpoint"]["memory"]["total"]
    assert found["plan"]["concurrency"][-1]["blocks"] == 512


def test_a_smaller_cache_can_be_chosen(kelix, model: Path) -> None:
    plans = [
        json.loads(kelix("info", model, "--plan", "--device", "cpu", "--json", *extra).out)["plan"]
        for extra in ([], ["--kv-dtype", "fp8"])
    ]
    assert plans[0]["pages"] == plans[1]["pages"]  # as many as are of use
    assert plans[0]["kv_bytes"] == 4 * plans[1]["kv_bytes"]
    args = ("chat", "1 2", "-m", model, "--device", "cpu", "--kv-dtype", "int4")
    assert kelix(*args).code == 2


def test_the_loading_bar_ends_full(model: Path) -> None:
    loaded = []
    Engine.from_pretrained(model, device="cpu", on_tensor=lambda _, size: loaded.append(size))
    expected = sum(e.num_bytes for e in plan(model).entries if e.name in STREAMED)
    # The norms of the codebooks are computed after the last report.
    assert 0.99 * expected < sum(loaded) <= expected


def test_every_golden_directory_has_its_kind(golden: Path) -> None:
    kinds = {path.relative_to(golden).as_posix(): kind_of(path) for path in find_golden(golden)}
    assert (
        kinds.items()
        >= {
            "llm/tiny_a": "llm",
            "tokenizer/tok_a": "tokenizer",
            "dit/tiny_release": "dit",
            "e2e_dit": "e2e",
        }.items()
    )
    assert "e2e_dit/dit" not in kinds  # weights without fixtures


def test_parity_passes_on_golden_outputs(kelix, golden: Path) -> None:
    result = kelix("parity", golden / "tokenizer", "--device", "cpu")
    assert result.code == 0
    assert "MISS" not in result.out
    assert "in 2 directories, 0 missed" in result.out
    found = json.loads(kelix("parity", golden / "tokenizer", "--device", "cpu", "--json").out)
    assert found["ok"]
    assert [entry["kind"] for entry in found["directories"]] == ["tokenizer"] * 2
    assert all(check["ok"] for entry in found["directories"] for check in entry["checks"])


@pytest.fixture
def damaged(golden: Path, tmp_path: Path) -> Path:
    """A golden directory with one wrong number in its fixtures."""
    path = tmp_path / "tok"
    shutil.copytree(golden / "tokenizer" / "tok_b", path)
    fixtures = load_file(path / "fixtures.safetensors")
    fixtures["indices"] = fixtures["indices"].clone()
    fixtures["indices"].view(-1)[0] += 1
    save_file(fixtures, path / "fixtures.safetensors")
    return path


def test_parity_exits_with_1_on_a_miss(kelix, damaged: Path) -> None:
    result = kelix("parity", damaged, "--device", "cpu", "--misses")
    assert result.code == 1
    rows = [line.split() for line in result.out.splitlines() if "MISS" in line]
    assert ["indices", "1", "0", "MISS"] in [row[:4] for row in rows]
    assert not [line for line in result.out.splitlines() if line.endswith(" ok")]


def test_a_directory_that_fails_does_not_hide_the_others(
    kelix, golden: Path, damaged: Path
) -> None:
    shutil.copytree(golden / "tokenizer" / "tok_b", damaged.parent / "whole")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    result = kelix("parity", damaged.parent, "--device", "cpu", "--json")
    broken, whole = json.loads(result.out)["directories"]
    assert result.code == 1
    assert broken["checks"][0]["note"].startswith("WeightError")
    assert broken["checks"][0]["error"] is None  # infinity is no JSON
    assert whole["ok"]


def test_parity_exits_with_1_when_nothing_was_checked(kelix, golden: Path, tmp_path: Path) -> None:
    assert kelix("parity", tmp_path).code == 1
    path = tmp_path / "tok"
    shutil.copytree(golden / "tokenizer" / "tok_b", path)
    tensors = load_file(path / "fixtures.safetensors")
    inputs = ("pixel_values", "image_grid_thw")
    save_file({k: tensors[k] for k in inputs}, path / "fixtures.safetensors")
    result = kelix("parity", path, "--device", "cpu")
    assert result.code == 1
    assert "nothing was checked" in result.out


def test_an_unknown_layout_is_a_miss(kelix, golden: Path, tmp_path: Path) -> None:
    shutil.copy(golden / "e2e_dit" / "fixtures.safetensors", tmp_path)
    result = kelix("parity", tmp_path)
    assert result.code == 1
    assert "MISS" in result.out


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("64", (64, 64)), ("96x64", (96, 64)), ("96X64", (96, 64))]
)
def test_sizes_are_width_by_height(text: str | None, size: tuple[int, int] | None) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "64x", "1x2x3", "-1", "6.5", "²"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="WIDTHxHEIGHT"):
        read_size(text)


def test_text_for_a_terminal_has_no_control_characters() -> None:
    assert printable("a\x1b[31m\tb\n\x07ü") == "a[31m\tb\nü"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 50, "3072.0 TiB")]
)
def test_sizes_of_memory(count: int, text: str) -> None:
    assert size_text(count) == text


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"rows": [float("inf"), 1.5, {"nan": float("nan")}]})
    assert json.loads(capsys.readouterr().out) == {"rows": [None, 1.5, {"nan": None}]}


def test_help_comes_without_torch() -> None:
    code = (
        "import sys; from kelix_rt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
