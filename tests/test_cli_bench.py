"""`kelix bench` on the bundled checkpoint: the table, JSON, the picture, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from kelix_rt import Engine, SamplingParams
from kelix_rt.assets import SCENE
from kelix_rt.cli import main
from kelix_rt.cli.timeline import COLOURS, WIDTH, draw_timeline
from kelix_rt.measure import Span, Trace, trace


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return int(ended.value.code or 0)


def test_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "timeline.png"
    assert run("bench", "--runs", 1, "--steps", 2, "--out", picture, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "kelix-tiny" and facts["timeline"] == str(picture)
    rows = {row["name"]: row for row in facts["rows"]}
    assert {"picture -> codes", "text block", "visual block", "picture -> text"} < set(rows)
    drawing = rows["prompt -> picture"]
    assert drawing["per_second"] == pytest.approx(1 / drawing["seconds"])
    spans = facts["traces"][0]["spans"]
    assert spans[-1]["stage"] == "decode" and spans[-1]["end"] == drawing["seconds"]
    with Image.open(picture) as image:
        assert image.width == WIDTH


def test_every_trace_encodes_its_picture() -> None:
    """One whose codes are known, or whose rows are, would be timed as if it cost nothing."""
    engine = Engine.from_pretrained("kelix-tiny", device="cpu", drawing=False)
    content = [{"type": "image", "image": SCENE}, {"type": "text", "text": "what is this?"}]
    prompt = engine.chat_prompt([{"role": "user", "content": content}])
    for number in (1, 2):
        trace(engine, "picture -> text", prompt, SamplingParams(temperature=0.0, max_blocks=1))
        assert engine.stats().image_misses == number


def test_release_size_on_a_cpu_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "timeline.png"
    assert run("bench", "--config", "release", "--device", "cpu", "--out", out) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not out.exists()
    assert run("bench", "--config", "release", "-m", "other", "--out", out) == 2
    assert "drop --model, --dit and --vae" in " ".join(capsys.readouterr().err.split())


def test_a_picture_that_cannot_be_written_is_refused_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("bench", "--out", "/nowhere/timeline.png") == 2
    assert "no directory" in capsys.readouterr().err


def test_lanes_are_as_long_as_their_spans() -> None:
    """One pixel row of a lane: colours change where the stages do."""
    spans = (Span("prompt", 0.0, 1.0), Span("visual block", 1.0, 2.0), Span("decode", 2.0, 4.0))
    image = draw_timeline([Trace("one", spans)], "title")
    rows = {tuple(image.getpixel((x, 110))) for x in range(WIDTH)}  # type: ignore[arg-type]
    assert len(rows) >= 4, "three stages and the background"
    row = [image.getpixel((x, 110)) for x in range(WIDTH)]
    shares = {
        stage: row.count(tuple(bytes.fromhex(COLOURS[stage][1:]))) / (WIDTH - 48)
        for stage in ("prompt", "visual block", "decode")
    }
    assert shares == pytest.approx({"prompt": 0.25, "visual block": 0.25, "decode": 0.5}, abs=0.01)
