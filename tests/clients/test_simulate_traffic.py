"""The simulated users without a router: what is wrong with its address."""

from __future__ import annotations

import asyncio

import pytest

from clients.simulate_traffic import Config, simulate
from ranking.errors import InputError
from tests.helpers.graded_rankers import write_data


@pytest.mark.parametrize("router", ["http://127.0.0.1:99999", "http://[::1", "127.0.0.1:0"])
def test_an_address_that_is_none_is_named(tmp_path, router):
    """Seen: a traceback of the HTTP client."""
    with pytest.raises(InputError, match="is no address of a router"):
        asyncio.run(simulate(Config(data=write_data(tmp_path), router=router)))
