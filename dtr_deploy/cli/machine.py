"""Commands that need neither recipe nor run."""

from __future__ import annotations

import json

import typer

from dtr_deploy.cli.terminal import AsJson, Debug, Terminal, one_line_errors


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """What this machine has: processor, memory, GPUs, engines, versions."""
    with one_line_errors(debug):
        from dtr_deploy.doctor import compiled_kernels, examine
        from dtr_deploy.plan import gigabytes
        from dtr_deploy.report.tables import new_table

        terminal = Terminal(as_json)
        hardware, engines, versions = examine()
        built, where = compiled_kernels()
        if as_json:
            usable = {name: {"usable": yes, "version_or_reason": text} for name, (yes, text) in engines.items()}
            kernels = {"built": built, "file_or_reason": where}
            terminal.answer(
                {"hardware": hardware.to_dict(), "compiled_kernels": kernels, "engines": usable, "versions": versions}
            )
            return
        terminal.show(f"Processor: {hardware.processor}, {hardware.cores} cores for this process")
        terminal.show(
            f"Instruction sets: {', '.join(hardware.instruction_sets) or 'none that engines choose kernels by'}"
        )
        memory = f"{gigabytes(hardware.memory_bytes)}, {gigabytes(hardware.available_memory_bytes)} available"
        terminal.show(f"Memory: {memory if hardware.memory_bytes else 'unknown'}")
        terminal.show(f"GPUs: {'; '.join(hardware.gpus) or 'none'}")
        slow = "" if built else "; linear attention runs in torch, several times slower"
        terminal.show(f"Compiled CPU kernels: {where}{slow}")
        table = new_table("Engines", "engine", "usable", "version, or why not", numbers_from=3)
        for name, (usable_here, reason) in engines.items():
            table.add_row(name, "yes" if usable_here else "no", reason)
        terminal.show(table)
        terminal.show("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def schema(debug: Debug = False) -> None:
    """The JSON Schema of recipes, for editors that complete and check while one writes."""
    with one_line_errors(debug):
        from dtr_deploy.recipe_schema import json_schema

        typer.echo(json.dumps(json_schema(), indent=1))
