"""What ships inside the package: a photograph, a test picture, and the small trained checkpoint."""

from __future__ import annotations

from pathlib import Path

BUNDLED = "kelix-tiny"
_FOLDER = Path(__file__).parent
PHOTO = _FOLDER / "photo.jpg"
SCENE = _FOLDER / "scene.png"


def bundled(name: str) -> Path | None:
    """Directory of the checkpoint that ships under this name; None for every other name."""
    return _FOLDER / BUNDLED if name == BUNDLED else None
