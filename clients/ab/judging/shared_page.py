"""The routes of a page in the browser: the page, and the script and style that all pages share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent


def serve_page(app: FastAPI, page: Path) -> None:
    """Answer `/` with the page, and /shared_page.js and /shared_page.css with what it has in common with others."""
    for route, path in (("/", page), *((f"/{name}", FOLDER / name) for name in ("shared_page.js", "shared_page.css"))):
        app.get(route, include_in_schema=False)(_answer_with(path))


def _answer_with(path: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def answer() -> FileResponse:
        return FileResponse(path)

    return answer
