"""The app: `python app.py` opens the page. Settings come from the command line or from METALORA_* variables."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import metalora  # noqa: F401  first, for it sets how threads wait before torch loads

if TYPE_CHECKING:
    from gradio import Blocks


def settings(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says, else the environment, else the default."""
    env = os.environ.get
    parser = argparse.ArgumentParser(description="Meta-LoRA: one photo of a face in, pictures and a LoRA file out.")
    parser.add_argument("--base", default=env("METALORA_BASE", "miniature"), help="miniature, a Hub id or a folder [METALORA_BASE]")
    parser.add_argument("--meta-down", default=env("METALORA_META_DOWN"), help="a Hub id[@revision] or a folder [METALORA_META_DOWN]")
    parser.add_argument("--plan", default=env("METALORA_PLAN"), help="how to use the GPU's memory; the fastest that fits when not given [METALORA_PLAN]")
    parser.add_argument("--host", default=env("METALORA_HOST"), help="address to serve on; 0.0.0.0 for all [METALORA_HOST]")
    parser.add_argument("--port", type=int, default=env("METALORA_PORT"), help="port; the first free one from 7860 on when not given [METALORA_PORT]")
    parser.add_argument("--share", action="store_true", default=env("METALORA_SHARE", "").lower() in ("1", "true", "yes"), help="a public link [METALORA_SHARE]")
    return parser.parse_args(arguments)


def start(chosen: argparse.Namespace) -> Blocks:
    """Serve the page and open the base behind it; returns while both go on. OSError where the port is taken."""
    from metalora.config import ZERO_GPU
    from metalora.page import STYLE, THEME, build
    from metalora.samples import FOLDERS, read_samples
    from metalora.studio import Studio

    studio = Studio(chosen.base, chosen.meta_down, chosen.plan)
    page = build(studio, *read_samples())
    if ZERO_GPU:
        studio.open()  # by the thread that has imported all, before anybody comes
    page.queue(max_size=32).launch(
        server_name=chosen.host, server_port=chosen.port, share=chosen.share, theme=THEME, css_paths=STYLE, prevent_thread_lock=True,
        footer_links=["api"], allowed_paths=[*map(str, FOLDERS)], max_file_size="200mb", ssr_mode=False,
    )  # fmt: skip
    studio.open()
    return page


def main() -> None:
    """Serve until stopped."""
    chosen = settings()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the first process of a container, as in Docker, would not heed it
    page = None
    try:
        page = start(chosen)
        while True:
            time.sleep(1)
    except OSError:
        where = f"{chosen.host or 'this machine'}:{chosen.port or '7860 and the ports after it'}"
        sys.exit(f"The page cannot be served on {where}: the port is taken, or the address is not this machine's; give another with --port or --host.")
    except KeyboardInterrupt:
        if page:
            page.close(verbose=False)  # which deletes what was uploaded; gradio's own way of waiting leaves it there while a browser has the page open


if __name__ == "__main__":
    main()
