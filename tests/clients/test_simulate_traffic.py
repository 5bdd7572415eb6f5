"""The simulated users beside no router, or one that takes nothing from them."""

from __future__ import annotations

import asyncio

import pytest

from clients.ab.router.local_router import start_router
from clients.simulate_traffic import Config, main, simulate
from ranking.errors import InputError
from tests.helpers.broken_http import BROKEN_ANSWERS, answering
from tests.helpers.graded_rankers import write_data
from tests.helpers.stub_ranker import EXPERIMENT


@pytest.mark.parametrize("router", ["http://127.0.0.1:99999", "http://[::1", "127.0.0.1:0"])
def test_an_address_that_is_none_is_named(tmp_path, router):
    """Seen: a traceback of the HTTP client."""
    with pytest.raises(InputError, match="is no address of a router"):
        asyncio.run(simulate(Config(data=write_data(tmp_path), router=router)))


def test_a_router_that_refuses_every_page_is_no_success(tmp_path, capsys):
    """Seen: exit code 0, and a rehearsal without a page in the log."""
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    (tmp_path / "keys").write_text(f"front {'0' * 64} 5\n")
    keys = ("--api-keys", str(tmp_path / "keys"))
    with start_router(tmp_path / "e.yaml", "127.0.0.1:1", tmp_path / "log", *keys) as router:
        assert main(Config(data=write_data(tmp_path / "data"), router=router.url, users=2)) == 1
    assert "pages refused (401): " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a page for people", "nothing in it", "a list"])
def test_what_is_no_router_takes_no_page(tmp_path, capsys, name):
    """Seen: a traceback of the first page."""
    with answering(BROKEN_ANSWERS[name]) as address:
        assert main(Config(data=write_data(tmp_path), router=address, users=2)) == 1
    assert "pages without an answer that a router gives: " in capsys.readouterr().out
