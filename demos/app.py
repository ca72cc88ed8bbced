"""One page for what the models do: classify, search, describe and ask, create, compare.

python demos/app.py [--models MODEL ...] [--folders DIR ...] [--host ADDRESS --auth FILE] [--port N]
"""

import argparse
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ui.offer import Offer, make_offer
from ui.safety import (
    DELETED_AFTER,
    DELETED_EVERY,
    MAX_UPLOAD_BYTES,
    MAX_WAITING,
    MAX_WRONG,
    WRONG_SECONDS,
    Guard,
    check_address,
    private_folder,
    read_accounts,
)

from mm.errors import UserError

if TYPE_CHECKING:
    import gradio as gr


def page(offer: Offer) -> "gr.Blocks":
    """The page, not yet served."""
    import gradio as gr
    from ui import classify, compare, create, describe, look, search

    tabs = {"Classify": classify, "Search": search, "Caption & ask": describe, "Create": create, "Compare": compare}
    with gr.Blocks(title=look.TITLE, analytics_enabled=False, delete_cache=(DELETED_EVERY, DELETED_AFTER)) as blocks:
        gr.HTML(look.HEADER)
        with gr.Tabs():
            for label, part in tabs.items():
                with gr.Tab(label, id=label):
                    part.tab(offer)
    return blocks.queue(max_size=MAX_WAITING, api_open=False)


def main(arguments: list[str] | None = None) -> None:
    """Serve the page until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="MODEL", help="runs or checkpoints beside the shipped models"
    )
    parser.add_argument("--folders", nargs="+", default=[], metavar="DIR", help="of pictures to search, beside the emoji")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; others than loopback need --auth")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860 on")
    parser.add_argument("--auth", type=Path, metavar="FILE", help="with a line NAME:PASSWORD for each account")
    given = parser.parse_args(arguments)
    try:
        accounts = read_accounts(given.auth) if given.auth else []
        check_address(given.host, accounts)
        offer = make_offer(given.models, given.folders)
        with private_folder() as folder:
            serve(offer, folder, given.host, given.port, accounts)
    except UserError as error:
        sys.exit(f"error: {error}")


def serve(offer: Offer, folder: Path, host: str, port: int | None, accounts: list[tuple[str, str]]) -> None:
    """Serve until the process is stopped, with the safe defaults of `ui.safety`."""
    from starlette.middleware import Middleware
    from ui import look

    blocks = page(offer)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        auth=accounts or None,
        auth_message=f"After {MAX_WRONG} wrong passwords please wait {WRONG_SECONDS // 60} minutes.",
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        allowed_paths=[],
        max_file_size=MAX_UPLOAD_BYTES,
        enable_monitoring=False,
        strict_cors=True,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        footer_links=["api"],
        theme=look.theme(),
        css=look.CSS,
        app_kwargs={"middleware": [Middleware(Guard, folder=folder)], "docs_url": None, "redoc_url": None},
    )
    print(f"open {address} (stop with Ctrl-C)", flush=True)
    threading.Thread(target=offer.load_all, daemon=True).start()
    blocks.block_thread()


if __name__ == "__main__":
    main()
