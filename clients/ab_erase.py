"""Erase a person from the A/B log: raw files, Parquet days and the files beside them (docs/ab-log.md).

    python clients/ab_erase.py --user u1 --log runs/ab/log --data runs/ab/data --salt-file salt --salt-file salt.2025

Reports hold no user ids; they are made again from the days that are left.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from clients.ab.log.erasure import Erasure
from clients.ab.log.privacy import read_salt
from ranking.program import REPEATED_ONLY, run
from ranking.visible import is_visible

logger = logging.getLogger("ab_erase")

EXIT_IN_USE = 3
EXIT_NOT_FOUND = 4


@dataclass
class Config:
    """Erase users from the A/B log.

    Args:
        user: the user's id, as the router's callers send it, commas included; may be repeated
        log: folder of raw log files
        data: folder that ab_compact wrote, if there is one
        salt_file: every salt that the log was ever written with, the present one and former ones; may be repeated
        raw_ids: the log was never written with a salt
    """

    user: list[str] = field(metadata=REPEATED_ONLY)
    log: Path
    data: Path | None = None
    salt_file: list[Path] = field(default_factory=list)
    raw_ids: bool = False

    def __post_init__(self) -> None:
        if not self.user or not all(map(is_visible, self.user)):
            raise ValueError("user is blank: an id is needed")
        if not self.salt_file and not self.raw_ids:
            raise ValueError(
                "the log holds salted hashes of user ids: give --salt-file for every salt that it was ever written "
                "with, or --raw-ids if it never was with one"
            )


def main(config: Config) -> int:
    """Erase and print what went.

    Returns 3 if a raw file is still being written to, so that it must be run again; 4 if one of the users has no page.
    """
    erased = Erasure(config.user, map(read_salt, config.salt_file)).run(config.log, config.data)
    print(f"{erased.pages} pages erased: {erased.lines} lines of raw files, {erased.rows} rows of Parquet days")
    if erased.not_found:
        logger.warning(
            "no page of %s: erased before, never there, or the log knows them under another id or salt",
            ", ".join(map(repr, erased.not_found)),
        )
    if erased.in_use:
        logger.warning(
            "a router still appends to %s: run this again in an hour, when it has ended that file, or once it stopped",
            ", ".join(erased.in_use),
        )
        return EXIT_IN_USE
    return EXIT_NOT_FOUND if erased.not_found else 0


if __name__ == "__main__":
    run(
        main,
        Config,
        example="python clients/ab_erase.py --user u1 --log runs/ab/log --data runs/ab/data --salt-file runs/salt",
    )
