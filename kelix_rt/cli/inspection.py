"""`kelix info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kelix_rt.cli import options
from kelix_rt.cli.output import plain_table, print_json, size_text, stdout
from kelix_rt.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

STAGES = ("encode", "generate", "render")


def info(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint directory.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    kv_dtype: options.KvDtype = "auto",
    quantization: options.Quantization = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="The memory of a whole engine, and what runs at once.")
    ] = False,
    dit: options.Dit = None,
    vae: options.Vae = None,
    as_json: options.Json = False,
) -> None:
    """Show the installation, or what a checkpoint holds and costs, before loading it."""
    from kelix_rt import EngineConfig
    from kelix_rt import info as facts
    from kelix_rt.devices import choose_device, choose_dtype
    from kelix_rt.memory import available_bytes

    if plan and checkpoint is None:
        raise InputError("--plan needs a CHECKPOINT to plan for")
    if not plan and (dit is not None or vae is not None):
        raise InputError("--dit and --vae belong to a --plan; to look into one, name it CHECKPOINT")
    found: dict[str, Any] = {"installation": facts.installation()}
    if checkpoint is not None:
        target, wanted = choose_device(device, kernels=False), choose_dtype(dtype)
        chosen = EngineConfig(kv_dtype=kv_dtype, quantization=quantization).on_device(target.type)
        free = available_bytes(target)
        found["checkpoint"] = facts.checkpoint(
            checkpoint, options=chosen, dtype=wanted, free_bytes=free
        )
        if plan:
            found["plan"] = facts.engine(
                checkpoint, dit=dit, vae=vae, options=chosen, dtype=wanted, free_bytes=free
            )
    if as_json:
        print_json(found)
        return
    stdout().print(_installation(found["installation"]))
    if checkpoint is not None:
        _print_checkpoint(found["checkpoint"])
    if plan:
        _print_plan(found["plan"])


def _installation(facts: dict[str, Any]) -> Table:
    table = plain_table("installation", "")
    table.columns[1].justify = "left"
    for name in ("kelix_rt", "python", "torch", "machine", "threads"):
        table.add_row(name, str(facts[name]))
    native = facts["native"]
    if "error" in native:
        table.add_row("operators", native["error"])
    else:
        table.add_row("CPU operators", native["isa"])
        table.add_row("CUDA operators", ", ".join(native["cuda"]) or "not built (no nvcc)")
    for gpu in facts["gpus"]:
        memory = size_text(gpu["memory"])
        table.add_row("GPU", f"{gpu['name']}, capability {gpu['capability']}, {memory}")
    if not facts["gpus"]:
        table.add_row("GPU", "none")
    return table


def _print_checkpoint(facts: dict[str, Any]) -> None:
    console = stdout()
    console.print()
    console.print(facts["path"], style="bold", markup=False)
    if "kind" in facts:
        table = plain_table("", "")
        table.columns[1].justify = "left"
        table.show_header = False
        for name, value in facts.items():
            if name not in ("path", "memory", "parts"):
                text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
                table.add_row(name, str(text))
        console.print(table)
        console.print(_memory(facts["memory"]))
        if "error" in facts["memory"]:
            console.print(f"does not fit: {facts['memory']['error']}", style="red", markup=False)
    for part in facts.get("parts", ()):
        _print_checkpoint(part)


def _print_plan(plan: dict[str, Any]) -> None:
    console = stdout()
    console.print()
    table = plain_table(f"engine in {plan['dtype']}", "loaded", "while running")
    for stage in STAGES:
        for entry in plan["entries"]:
            if entry["stage"] == stage:
                sizes = ["", ""]
                sizes[entry["kind"] == "transient"] = size_text(entry["bytes"])
                table.add_row(f"{stage}: {entry['name']}", *sizes)
    cache = f"KV cache ({plan['pages']} pages of {plan['page_size']} blocks)"
    table.add_row(f"generate: {cache}", size_text(plan["kv_bytes"]), "")
    loaded = plan["loaded"] + plan["kv_bytes"]
    table.add_row("in all", size_text(loaded), size_text(plan["transient"]))
    console.print(table)
    if "error" in plan:
        console.print(f"does not fit: {plan['error']}", style="red", markup=False)
        return
    console.print()
    table = plain_table("blocks of a request", f"at once (max_batch {plan['max_batch']})")
    for row in plan["concurrency"]:
        table.add_row(str(row["blocks"]), str(row["requests"]))
    console.print(table)


def _memory(memory: dict[str, Any]) -> Table:
    table = plain_table(f"memory in {memory['dtype']}", "")
    for row in memory["rows"]:
        table.add_row(row["name"], size_text(row["bytes"]))
    if memory["kv_bytes_per_block"]:
        table.add_row("(keys and values of a block)", size_text(memory["kv_bytes_per_block"]))
    return table
