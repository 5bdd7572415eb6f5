"""Lines of search logs as UBI (OpenSearch) and GA4 write them, after their documentation."""

from __future__ import annotations

import json
from pathlib import Path

NOON = 1_700_000_000  # seconds since 1970


def lines(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON, one a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ubi_query(number: int, client: str = "u", hits: tuple[str, ...] = ("a", "b", "c"), at: int = NOON) -> dict:
    """A search, its user and the documents it showed."""
    return {
        "application": "shop", "query_id": f"q{number}", "client_id": client, "user_query": "night train",
        "query_response_id": f"r{number}", "query_response_hit_ids": list(hits), "query_attributes": {},
        "timestamp": f"2023-11-14T22:{13 + (at - NOON) // 60:02}:{20 + (at - NOON) % 60:02}.000Z",
    }  # fmt: skip


def ubi_event(number: int, document: str, seconds: int, client: str = "u", action: str = "click") -> dict:
    """What a user did with a document, some seconds after NOON."""
    return {
        "application": "shop", "action_name": action, "query_id": f"q{number}", "client_id": client,
        "session_id": "s", "timestamp": (NOON + seconds) * 1000, "message_type": "INFO",
        "event_attributes": {"object": {"object_id": document, "object_id_field": "id"}, "position": {"ordinal": 2}},
    }  # fmt: skip


def ga4_event(name: str, seconds: float, items: list[str], term: str | None = None, user: str = "7.7") -> dict:
    """A list that was shown for a search term, or an item that was taken from one."""
    parameters = [{"key": "ga_session_id", "value": {"int_value": "1"}}]
    if term is not None:
        parameters.append({"key": "search_term", "value": {"string_value": term}})
    return {
        "event_date": "20231114", "event_timestamp": str(int((NOON + seconds) * 1e6)), "event_name": name,
        "user_pseudo_id": user, "event_params": parameters,
        "items": [{"item_id": item, "item_name": item, "item_list_index": str(i)} for i, item in enumerate(items)],
    }  # fmt: skip
