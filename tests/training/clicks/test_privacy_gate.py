"""What of people reaches training: shared queries only, no personal data, a few clicks of each user."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ranking.errors import DataError, InputError
from ranking.schema import read_table
from tests.training.clicks.test_prepare_clicks import event, write_events
from training.clicks import personal_data
from training.clicks.click_pairs import ClickPairSettings, write_clicks
from training.clicks.personal_data import PersonalData
from training.clicks.privacy_gate import PrivacySettings

EVERYBODY = {"bot_rate_quantile": 1.0, "bot_volume_quantile": 1.0, "debias": False}


def through_the_gate(tmp_path, rows: list[dict], more: dict | None = None, **privacy) -> tuple[dict, dict]:
    """(weights of the clicks table by query and document, the report)"""
    path = write_events(tmp_path / "events.parquet", rows)
    settings = ClickPairSettings(
        events=str(path),
        out=tmp_path / "clicks.parquet",
        privacy=PrivacySettings(**privacy),
        **EVERYBODY | (more or {}),
    )
    report = write_clicks(settings)
    pairs = read_table(tmp_path / "clicks.parquet", "clicks").to_pylist()
    return {(row["query"], row["doc_id"]): row["weight"] for row in pairs}, report


def asked_by(query: str, users: int, first_request: int = 0, hours_apart: int = 0) -> list[dict]:
    """A query of several users; event() puts request n at hour n, so hours_apart says how far apart they ask."""
    return [
        event(first_request + n * max(hours_apart, 1), "d1", query=query, user=f"{query}-{n}") for n in range(users)
    ]


def test_a_query_needs_enough_users_and_many_pages_of_few_do_not_help(tmp_path):
    rows = asked_by("Red  Tent", 3) + asked_by("red tent", 2, 50) + asked_by("my rash", 4, 100)
    rows += [event(200 + n, "d1", query="my rash", user="my rash-0") for n in range(20)]
    found, report = through_the_gate(tmp_path, rows)
    assert found == {("red tent", "d1"): 5}
    assert (report["privacy"]["rare_queries"], report["privacy"]["rare_events"]) == (1, 24)
    assert set(through_the_gate(tmp_path, rows, min_users=4)[0]) == {("red tent", "d1"), ("my rash", "d1")}


def test_pages_that_name_no_user_may_all_be_one_persons(tmp_path):
    rows = asked_by("red tent", 4) + [event(50 + n, "d1", query="red tent", user=f"no-user-{n}") for n in range(3)]
    rows += [event(100 + n, "d1", query="my rash", user=f"no-user-{100 + n}") for n in range(20)]
    found, report = through_the_gate(tmp_path, rows)
    assert found == {("red tent", "d1"): 7}
    assert (report["privacy"]["rare_queries"], report["privacy"]["unnamed_events"]) == (1, 23)


def test_users_are_counted_within_the_window_wherever_it_lies_in_the_log(tmp_path):
    slow = asked_by("old letters", 5, hours_apart=24 * 10)  # five users within 41 days
    late = asked_by("new tents", 5, first_request=3000, hours_apart=24 * 7)  # five users within 29 days
    found, report = through_the_gate(tmp_path, slow + late)
    assert set(found) == {("new tents", "d1")} and report["privacy"]["rare_queries"] == 1
    assert len(through_the_gate(tmp_path, slow + late, window_days=41)[0]) == 2
    assert len(through_the_gate(tmp_path, slow + late, window_days=40)[0]) == 1


def test_one_users_clicks_on_a_document_count_up_to_the_cap(tmp_path):
    rows = asked_by("red tent", 5) + [event(100 + n, "d1", user="red tent-0") for n in range(50)]
    found, report = through_the_gate(tmp_path, rows)
    assert found == {("red tent", "d1"): 4 + 3} and report["privacy"]["clicks_over_cap"] == 48
    assert through_the_gate(tmp_path, rows, max_user_clicks=0)[0] == {("red tent", "d1"): 55}


PERSONAL = {
    "mail to jane.doe@example.org": "EMAIL_ADDRESS",
    "jörg@müller.example tent": "EMAIL_ADDRESS",
    "4111 1111 1111 1111": "CREDIT_CARD",
    "de89 3704 0044 0532 0130 00": "IBAN_CODE",
    "gb29 nwbk 6016 1331 9268 19": "IBAN_CODE",
    "+49 151 23456789": "PHONE_NUMBER",
    "order 12345678": "NUMBER",
    "router 192.168.7.13": "IP_ADDRESS",
    "12 baker street london": "STREET_ADDRESS",
    "lange straße 17 berlin": "STREET_ADDRESS",
    "24 rue victor hugo": "STREET_ADDRESS",
}
IMPERSONAL = [
    "red shoes size 42", "iphone 15 pro 256gb", "canon eos 5d mark 4", "rtx 4090", "iso 27001 2022", "100 street food",
    "4k tv 55 inch", "2 person tent 2026", "world war 2 1939 1945", "windows 11 24h2",
]  # fmt: skip


def test_personal_data_are_recognised_and_products_are_not():
    rules = PersonalData()
    found = {text: [kind for _, _, kind in rules.spans(text)] for text in [*PERSONAL, *IMPERSONAL]}
    assert {text: kind in found[text] for text, kind in PERSONAL.items()} == dict.fromkeys(PERSONAL, True), found
    assert {text: found[text] for text in IMPERSONAL} == {text: [] for text in IMPERSONAL}


RULES = PersonalData()  # loads nothing before its first text


@pytest.fixture(scope="module")
def rules_of_all_texts() -> PersonalData:
    """Every recogniser looks at every text."""
    personal = PersonalData()
    vars(personal)["_rules"] = [rule._replace(digits=0, marks="") for rule in personal._rules]
    return personal


# pieces of what the rules look for, so that many of the made-up queries are nearly, or just, personal data
PIECES = st.sampled_from(
    [*" .:-/+()@", "0", "12", "555", "2671", "0049", "+49", "+1", "192", "168", "4111", "gb82", "west", "ab", "00:1a",
     "ff", "calle", "12345678", "a@b.example", "st", "٣٤", "\uff10\uff11"]
)  # fmt: skip


@given(st.lists(PIECES, min_size=1, max_size=12).map("".join))
@settings(max_examples=400, deadline=None)
@example("089 1234")
@example("call 110 or 0201 1234")
def test_a_rule_that_is_left_out_would_have_found_nothing(rules_of_all_texts, text):
    assert RULES.spans(text) == rules_of_all_texts.spans(text)


def test_queries_with_personal_data_are_dropped_or_masked_and_counted(tmp_path):
    rows = asked_by("red tent", 5)
    rows += [event(100 + n, "d2", query=f"parcel 9876543{n}", user=f"p{n}") for n in range(6)]
    found, report = through_the_gate(tmp_path, rows)
    assert set(found) == {("red tent", "d1")}
    assert report["privacy"]["queries_personal"] == 6 and report["privacy"]["personal_by_kind"] == {"NUMBER": 6}
    # each parcel has one user, but the masked query has six
    found, _ = through_the_gate(tmp_path, rows, personal_data="mask")
    assert found == {("red tent", "d1"): 5, ("parcel <number>", "d2"): 6}
    found, report = through_the_gate(tmp_path, rows, personal_data="keep", min_users=1)
    assert len(found) == 7 and not report["privacy"]["personal_by_kind"]


def test_a_missing_library_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(personal_data, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"presidio-analyzer.*disranker\[privacy\].*--privacy.personal-data keep"):
        through_the_gate(tmp_path, asked_by("red tent", 5))
    assert through_the_gate(tmp_path, asked_by("red tent", 5), personal_data="keep")[0]


@pytest.mark.parametrize(("stored", "count"), [("(dropped)", 1), ("0123456789abcdef", 1)])
def test_queries_that_the_router_did_not_keep_teach_nothing(tmp_path, stored, count):
    with pytest.raises(DataError, match="dropped or hashed where it was written"):
        through_the_gate(tmp_path, asked_by(stored, 9))
    found, report = through_the_gate(tmp_path, asked_by(stored, 9) + asked_by("red tent", 5, 100))
    assert set(found) == {("red tent", "d1")} and report["privacy"]["queries_not_stored"] == count


def test_what_the_gate_left_nothing_of_is_said(tmp_path):
    with pytest.raises(DataError, match=r"of 2 queries 1 have too few users .*, 1 hold personal data"):
        through_the_gate(tmp_path, asked_by("my rash", 4) + asked_by("call 0151 2345678", 9, 100))


def test_a_log_without_users_cannot_pass_the_gate(tmp_path):
    path = write_events(tmp_path / "events.parquet", asked_by("red tent", 5))
    pq.write_table(pq.read_table(path).drop_columns(["user_id"]), path)
    settings = {"events": str(path), "out": tmp_path / "clicks.parquet", "debias": False}
    with pytest.raises(InputError, match=r"no user_id.*--privacy.min-users 1"):
        write_clicks(ClickPairSettings(**settings))
    report = write_clicks(ClickPairSettings(**settings, privacy=PrivacySettings(min_users=1)))
    assert report["clicks"] == 1 and report["privacy"]["clicks_over_cap"] == 0


def test_a_setting_that_means_nothing_is_refused():
    for setting in ({"min_users": 0}, {"window_days": 0}, {"max_user_clicks": -1}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            PrivacySettings(**setting)


def exposures_of(tmp_path, rows: list[dict]) -> None:
    """The table `exposures` beside the folder `events`, as compaction leaves them."""
    (tmp_path / "ab" / "exposures").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ab" / "exposures" / "2026-01-05.parquet")


def test_forced_pages_are_left_out_and_other_kinds_counted(tmp_path):
    rows = [event(n, "d1", user=f"u{n}") for n in range(8)]
    (tmp_path / "ab" / "events").mkdir(parents=True)
    write_events(tmp_path / "ab" / "events" / "2026-01-05.parquet", rows)
    kinds = {3: {"forced": True}, 4: {"fallback": "timeout"}, 5: {"teams": ["student"]}, 6: {"served_by": "incoming"}}
    plain = {"forced": False, "fallback": "", "served_by": "student", "teams": []}
    exposures_of(tmp_path, [{"request_id": f"r{n}"} | plain | kinds.get(n, {}) for n in range(7)])  # r7 is unknown
    settings = ClickPairSettings(events=str(tmp_path / "ab" / "events"), out=tmp_path / "c.parquet", **EVERYBODY)
    report = write_clicks(settings)
    assert report["pages"] == {
        "read": 8, "forced_left_out": 1, "fallback": 1, "interleaved": 1, "incoming_order": 1, "without_exposure": 1
    }  # fmt: skip
    assert [row["weight"] for row in read_table(tmp_path / "c.parquet", "clicks").to_pylist()] == [7]
    wrong = tmp_path / "ab" / "events"
    with pytest.raises(DataError, match="no column forced, fallback, served_by, teams"):
        write_clicks(ClickPairSettings(events=str(wrong), exposures=wrong, out=tmp_path / "c.parquet", **EVERYBODY))
