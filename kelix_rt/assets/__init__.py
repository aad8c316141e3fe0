"""What ships inside the package: a photograph, a test picture, and the small trained checkpoint."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "kelix-tiny"
_FOLDER = Path(__file__).parent
PHOTO = _FOLDER / "photo.jpg"
SCENE = _FOLDER / "scene.png"


def bundled(name: str | Path) -> Path | None:
    """Directory of the checkpoint that ships under this name; None for every other name, and for a
    Path: that is a directory of the caller's, whatever it is called."""
    return _FOLDER / BUNDLED if name == BUNDLED else None
