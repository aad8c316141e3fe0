"""`kelix serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kelix_rt.assets import BUNDLED
from kelix_rt.cli import options
from kelix_rt.cli.output import stderr
from kelix_rt.cli.session import load_engine
from kelix_rt.errors import ConfigError


def serve(
    model: options.Model = BUNDLED,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="The model's name in answers; default: the last part of --model."
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests that run at once.")
    ] = 32,
    max_requests: Annotated[
        int,
        typer.Option("--max-requests", min=1, help="Requests taken at once, those that wait too."),
    ] = 256,
    dit: options.Dit = None,
    vae: options.Vae = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    quantization: options.Quantization = None,
) -> None:
    """Serve chat and drawing over HTTP, with the routes of OpenAI's API."""
    try:
        import uvicorn

        from kelix_rt.serve.app import create_app
    except ImportError as error:
        raise ConfigError(
            f"kelix serve needs more packages ({error}); run `pip install -e '.[serve]'` in "
            "the source directory"
        ) from error
    engine = load_engine(
        model,
        dit,
        vae,
        device,
        dtype,
        drawing=None,
        kv_dtype=kv_dtype,
        quantization=quantization,
        max_batch=max_batch,
        allow_files=False,
    )
    engine.warm_up()
    drawing = "drawing" if engine.options.drawing else "no drawing (it has no DiT and autoencoder)"
    stderr().print(f"chat and {drawing}; /docs describes the routes", style="dim")
    app = create_app(engine, name or Path(model).resolve().name, max_requests)
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=10)
