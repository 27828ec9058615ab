"""`lite-llm warmup`: compile a model's kernels now, so that no later start waits for it."""

import argparse
import dataclasses

from lite_llm.cli import oneshot
from lite_llm.cli.interrupt import whole
from lite_llm.cli.screen import LoadingBar, Screen
from lite_llm.config import EngineConfig


def run(options: argparse.Namespace, screen: Screen) -> int:
    bar = LoadingBar(screen)
    bar.status("starting ...")
    with whole():
        from lite_llm.llm import warm  # torch

    # Kernels depend on how many requests may run together: as many as in the chat, and as many as LLM() takes.
    usual = [options.engine["max_requests"], EngineConfig().max_requests]
    sizes = [options.max_requests] if options.max_requests else usual
    try:
        found = [warm(options.model, status=bar.stage, **options.engine | {"max_requests": n}) for n in sizes]
    finally:
        bar.clear()
    if options.json:
        rows = [dataclasses.asdict(one) for one in found]
        oneshot.print_json(screen, {"schema_version": oneshot.SCHEMA_VERSION, "warmup": rows})
        return 0
    for one in found:
        if one.directory is None:
            screen.out.write("nothing to compile on a CPU\n")
            break
        screen.out.write(
            f"up to {one.max_requests} requests: {one.compiled} kernels compiled and {one.loaded} loaded from "
            f"{one.directory} in {one.seconds:.1f} s\n"
        )
    return 0
