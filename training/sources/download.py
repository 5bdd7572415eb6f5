"""Files from a public address: with a progress bar, checked, written aside and renamed, and not fetched twice."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ranking.errors import InputError
from ranking.files import replacing
from ranking.telemetry import bars_are_read

LOGGER = logging.getLogger(__name__)
TIMEOUT_SECONDS = 30
# content addressed by a commit: the files behind it cannot change
MSRD_ADDRESS = (
    "https://raw.githubusercontent.com/elastic/elasticsearch-labs/ea994c3c4502277fd5cdd0bd88a4bb003d622af2/"
    "notebooks/search/sample_data/learning-to-rank/"
)


def fetch(address: str, path: Path, sha256: str | None = None) -> Path:
    """Download address to path, unless it is there already, and check it.

    Its SHA-256 is compared with sha256, or, without one, with the one noted in path + ".sha256" at the first download,
    so that a file damaged later is found out. InputError: not reachable, incomplete, or another checksum.
    """
    noted = path.with_name(path.name + ".sha256")
    if not path.is_file():
        try:
            _download(address, path)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as problem:
            raise InputError(
                f"{address}: cannot be downloaded: {problem}; fetch it elsewhere and give its folder"
            ) from problem
        noted.unlink(missing_ok=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = sha256 or (noted.read_text(encoding="utf-8").split()[0] if noted.is_file() else found)
    if found != wanted:
        raise InputError(f"{path}: SHA-256 is {found}, {wanted} is expected; delete the file to download it again")
    noted.write_text(f"{found}  {path.name}\n", encoding="utf-8")
    return path


def _download(address: str, path: Path) -> None:
    LOGGER.info("downloading %s", address)
    with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        with (
            replacing(path) as aside,
            aside.open("wb") as file,
            tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True, disable=not bars_are_read()) as bar,
        ):
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
            if size and file.tell() != size:
                raise InputError(f"{address}: {file.tell()} of {size} bytes came; run again")


def fetch_msrd(folder: Path, names: tuple[str, ...], address: str = MSRD_ADDRESS) -> Path:
    """The upstream files of MSRD in folder; see fetch."""
    for name in names:
        fetch(address + name, folder / name)
    return folder
