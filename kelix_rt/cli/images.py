"""`kelix encode` and `kelix reconstruct`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from kelix_rt.assets import BUNDLED
from kelix_rt.cli import options
from kelix_rt.cli.generate import follow_drawing, save_picture
from kelix_rt.cli.output import plain_table, print_json, progress, stdout
from kelix_rt.cli.session import load_engine
from kelix_rt.errors import ConfigError
from kelix_rt.request import ImageCodes, RenderParams

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_BLOCKS = 16
Image = Annotated[Path, typer.Argument(metavar="IMAGE")]


def encode(
    image: Image,
    model: options.Model = BUNDLED,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the codes as .npy or .json.")
    ] = None,
    size: options.Size = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Turn an image into visual codes. The model may be a vision tokenizer alone."""
    if out is not None:
        options.check_output(out, (".npy", ".json"))
    codes = encode_file(model, image, options.read_size(size), device, dtype)
    table = codes.codes.cpu().numpy()
    facts = {"grid": list(codes.grid), "codes": table.tolist()}
    if out is not None and out.suffix.lower() == ".npy":
        with out.open("wb") as file:  # np.save would add .npy to a name that ends in .NPY
            np.save(file, table)
    elif out is not None:
        out.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    if as_json:
        print_json(facts)
        return
    frames, rows, columns = codes.grid
    stdout().print(
        f"{image}: {len(table)} blocks of {table.shape[1]} codes, from {frames} x {rows} x "
        f"{columns} patches",
        markup=False,
    )
    stdout().print(codes_table(table))
    if len(table) > SHOWN_BLOCKS:
        stdout().print(f"and {len(table) - SHOWN_BLOCKS} more blocks")
    if out is not None:
        stdout().print(f"saved to {out}", markup=False)


def encode_file(
    model: str, image: Path, size: tuple[int, int] | None, device: str, dtype: str
) -> ImageCodes:
    """Codes of an image file; of a whole Kelix checkpoint only the vision tokenizer is loaded.

    size: (width, height) wanted. Raises ConfigError for a model that encodes no images.
    """
    from kelix_rt.checkpoint import resolve
    from kelix_rt.config import KelixConfig, TokenizerConfig, read_config
    from kelix_rt.devices import choose_device, choose_dtype
    from kelix_rt.models.vision_tokenizer import VisionTokenizer
    from kelix_rt.processing import ImageProcessor
    from kelix_rt.stages.encode import EncodeStage

    directory = resolve(model)
    config = read_config(directory)
    whole = isinstance(config, KelixConfig)
    tokenizer = config.tokenizer_config if isinstance(config, KelixConfig) else config
    if not isinstance(tokenizer, TokenizerConfig):
        raise ConfigError(f"encode: {directory} holds neither a Kelix model nor a tokenizer")
    patch = tokenizer.vision_config.patch_size
    processor = ImageProcessor.from_pretrained(directory, patch_size=patch)
    pixels, grid = processor.preprocess(image, size=None if size is None else size[::-1])
    with progress() as bar:
        bar.add_task("encoding", total=None)
        vision = VisionTokenizer.from_pretrained(
            directory,
            device=choose_device(device),
            dtype=choose_dtype(dtype),
            prefix="visual_tokenizer." if whole else "",
        )
        codes = EncodeStage(vision, text_vocab=0).codes(pixels, grid)
    frames, rows, columns = grid[0].tolist()
    return ImageCodes(codes, (frames, rows, columns))


def codes_table(codes: np.ndarray) -> Table:
    """The codes of the first blocks, int64 [T, N], one row per block."""
    table = plain_table("block", *map(str, range(codes.shape[1])))
    for index, row in enumerate(codes[:SHOWN_BLOCKS]):
        table.add_row(str(index), *map(str, row))
    return table


def reconstruct(
    image: Image,
    model: options.Model = BUNDLED,
    out: options.Picture = Path("out.png"),
    steps: options.Steps = 50,
    cfg: options.Cfg = 1.0,
    seed: options.Seed = None,
    size: options.Size = None,
    dit: options.Dit = None,
    vae: options.Vae = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    quantization: options.Quantization = None,
    as_json: options.Json = False,
) -> None:
    """Encode an image and draw it again from its codes. --size is the size it is encoded at."""
    from kelix_rt.processing import load_image

    options.check_picture(out)
    wanted = options.read_size(size)
    render = RenderParams(steps=steps, cfg=cfg, seed=seed)
    source = load_image(image)  # before a model is loaded
    engine = load_engine(
        model, dit, vae, device, dtype, kv_dtype=kv_dtype, quantization=quantization, drawing=True
    )
    codes = engine.encode_image(source, size=None if wanted is None else wanted[::-1])
    request = engine.add_reconstruction(codes, render=render)
    save_picture(follow_drawing(engine.collect(request)), out, as_json)
