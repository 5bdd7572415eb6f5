"""Every source ends in the same checked tables; sampling keeps what it says."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranking.errors import InputError
from ranking.program import parse
from ranking.schema import read_table
from training import prepare_data
from training.prepare_data import Config
from training.sample_candidates import Config as SampleConfig
from training.sample_candidates import sample_candidates
from training.sources import download
from training.world.dataset import WorldConfig

MSRD = Path(__file__).parents[4] / "shared" / "data" / "msrd"
WORDS = ("amber", "birch", "cedar", "daisy", "elder", "fjord", "grove", "hazel", "ivory", "jolly")
QUERIES = {f"q{i}": f"{WORDS[i % 10]} {WORDS[(3 * i + i // 10) % 10]} {i * 7919}" for i in range(60)}
DOCUMENTS = {f"d{i}": (f"Title {i}", f"{WORDS[i % 10]} text {i}") for i in range(30)}


def judgments():
    """Five documents a query, the first two relevant and listed first, as judgment files often do."""
    for i, query_id in enumerate(QUERIES):
        for j in range(5):
            yield query_id, f"d{(i + 7 * j) % 30}", int(j < 2)


def write_beir(folder: Path, splits=("train", "test")) -> Path:
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": d, "title": t, "text": s, "metadata": {}}) for d, (t, s) in DOCUMENTS.items()]
    lines.append(json.dumps({"_id": "unjudged", "title": "Nobody judged me", "text": "amber amber"}))
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps({"_id": q, "text": text}) for q, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for n, split in enumerate(splits):
        rows = [f"{q}\t{d}\t{g}" for q, d, g in judgments() if int(q[1:]) % len(splits) == n]
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
        (folder / f"qrels/{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def prepare(source: str, out: Path, **settings) -> dict:
    prepare_data.main(Config(source=source, out=out, **settings))
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))


def tables(out: Path) -> dict[str, pa.Table]:
    return {name: read_table(out / f"judgments/{name}.parquet", "judgments") for name in ("train", "dev", "test")}


def grades(table: pa.Table) -> dict[tuple[str, str], int]:
    return {(row["query_id"], row["doc_id"]): row["grade"] for row in table.to_pylist()}


def test_a_beir_folder_keeps_its_test_split_and_gets_a_dev_split(tmp_path):
    content = prepare(f"beir:{write_beir(tmp_path / 'set')}", tmp_path / "out", licence="mine")
    found = tables(tmp_path / "out")
    assert content["counts"]["queries_test"] == 30
    assert content["counts"]["queries_dev"] == 3
    assert content["counts"]["queries_train"] == 27
    assert content["counts"]["documents"] == 31
    assert content["licence"] == "mine"
    assert content["grades"]["test"] == {"0": 90, "1": 60, "2": 0, "3": 0, "4": 0}
    everything = {pair: grade for table in found.values() for pair, grade in grades(table).items()}
    assert everything == {(q, d): g for q, d, g in judgments()}
    row = found["test"].to_pylist()[0]
    assert (row["query"], (row["title"], row["summary"])) == (QUERIES[row["query_id"]], DOCUMENTS[row["doc_id"]])
    candidates = read_table(tmp_path / "out/candidates.parquet", "candidates").to_pylist()
    train = set(grades(found["train"]))
    assert train < {(row["query_id"], row["doc_id"]) for row in candidates}  # every judged pair, its grade hidden
    assert {row["query_id"] for row in candidates} == {query_id for query_id, _ in train}  # no dev or test query
    assert len(candidates) == len(train) + content["candidates_are"]["pairs_found_by_bm25"] > len(train)


def test_the_order_of_a_querys_documents_says_nothing_about_their_grades(tmp_path):
    prepare(f"beir:{write_beir(tmp_path / 'set')}", tmp_path / "out")
    table = tables(tmp_path / "out")["test"].to_pylist()
    first = [table[i]["grade"] for i in range(0, len(table), 5)]
    assert 4 <= sum(first) <= 20  # of 30; in the file all 30 stand first


def test_the_same_source_and_seed_give_the_same_fingerprint(tmp_path):
    source = f"beir:{write_beir(tmp_path / 'set')}"
    first, again = prepare(source, tmp_path / "a"), prepare(source, tmp_path / "b")
    other = prepare(source, tmp_path / "c", seed=1)
    assert first["fingerprint"] == again["fingerprint"] != other["fingerprint"]


def test_a_judged_fraction_turns_the_other_train_queries_into_candidates(tmp_path):
    source = f"beir:{write_beir(tmp_path / 'set')}"
    prepare(source, tmp_path / "all")
    content = prepare(source, tmp_path / "out", judged_fraction=0.2, clicks_from_judgments=True, candidate_documents=0)
    whole, found = tables(tmp_path / "all"), tables(tmp_path / "out")
    candidates = read_table(tmp_path / "out/candidates.parquet", "candidates")
    assert content["counts"]["queries_train"] == 5
    assert content["candidates_are"] == {
        "queries_without_grades": 22, "queries_judged_train": 5, "queries_titles": 0, "pairs_of_the_source": 135,
        "pairs_found_by_bm25": 0,
    }  # fmt: skip
    kept, unlabelled = grades(found["train"]), {(r["query_id"], r["doc_id"]) for r in candidates.to_pylist()}
    assert set(kept) < unlabelled == set(grades(whole["train"]))
    assert grades(found["test"]) == grades(whole["test"])
    clicks = read_table(tmp_path / "out/clicks.parquet", "clicks")
    assert len(clicks) == 10  # from the queries that keep their grades alone
    assert "not clicks" in content["clicks_are"]


def test_limits_draw_whole_queries(tmp_path):
    source = f"beir:{write_beir(tmp_path / 'set')}"
    limits = {"train_queries": 8, "dev_queries": 2, "test_queries": 4, "unlabelled_queries": 3}
    content = prepare(source, tmp_path / "out", judged_fraction=0.5, **limits)
    counts = content["counts"]
    assert [counts[f"queries_{n}"] for n in ("train", "dev", "test", "candidates")] == [8, 2, 4, 11]
    assert content["candidates_are"]["queries_without_grades"] == 3
    assert counts["judgments_test"] == 20


def test_negatives_are_the_best_unjudged_documents_with_grade_zero(tmp_path):
    folder = write_beir(tmp_path / "set")
    for file in (folder / "qrels").iterdir():
        rows = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join([rows[0], *(r for r in rows if r.endswith("\t1"))]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="--negatives"):
        prepare(f"beir:{folder}", tmp_path / "out")
    content = prepare(f"beir:{folder}", tmp_path / "out", negatives=2)
    assert content["grades"]["test"]["1"] == 60
    assert content["grades"]["test"]["0"] > 30
    table = tables(tmp_path / "out")["test"].to_pylist()
    added = [row for row in table if row["grade"] == 0]
    assert all(set(row["query"].split()) & set(row["summary"].split()) for row in added)
    assert any(row["doc_id"] == "unjudged" for row in added)


def test_a_copy_of_a_relevant_document_is_no_negative(tmp_path):
    """Seen: a catalogue that has a product twice taught that one text is relevant and irrelevant to the same query."""
    rows = [
        {"query": f"{query} lamp", "doc_id": f"{query}{copy}", "title": f"{word} lamp", "grade": 1}
        for word in WORDS
        for copy, query in enumerate((word, f"second {word} {word[0] * 9}"))
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(f"table:{path}", tmp_path / "out", negatives=3)
    added = 0
    for table in tables(tmp_path / "out").values():
        for row in table.to_pylist():
            assert row["grade"] == int(row["title"].split()[0] in row["query"].split())
            added += row["grade"] == 0
    assert added > 30


def table_rows() -> list[dict]:
    rows = []
    for q, d, g in judgments():
        split = "test" if int(q[1:]) % 5 == 0 else "train"
        rows.append(
            {
                "search": QUERIES[q],
                "sku": d,
                "name": DOCUMENTS[d][0],
                "text": DOCUMENTS[d][1],
                "label": g,
                "fold": split,
            }
        )
    return rows


COLUMNS = ["query=search", "doc_id=sku", "title=name", "summary=text", "grade=label", "split=fold"]


def write_any(path: Path, rows: list[dict]) -> Path:
    names = list(rows[0])
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ".jsonl" in path.name:
        _write(path, "".join(json.dumps(row) + "\n" for row in rows))
    elif ".tsv" in path.name:
        _write(
            path, "\n".join("\t".join(str(row[n]) for n in names) for row in [dict(zip(names, names)), *rows]) + "\n"
        )
    else:
        quoted = [",".join('"' + str(row[n]).replace('"', '""') + '"' for n in names) for row in rows]
        _write(path, "\n".join([",".join(names), *quoted]) + "\n")
    return path


def _write(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "tsv", "jsonl.gz", "csv.gz"])
def test_the_users_table_in_any_format_gives_the_same_dataset(ending, tmp_path):
    content = prepare(
        f"table:{write_any(tmp_path / f'mine.{ending}', table_rows())}", tmp_path / "out", columns=COLUMNS
    )
    found = tables(tmp_path / "out")
    everything = {pair: grade for table in found.values() for pair, grade in grades(table).items()}
    assert everything == {(QUERIES[q], d): g for q, d, g in judgments()}
    assert content["counts"]["queries_test"] == 12
    assert content["counts"]["queries_dev"] == 5


def test_a_table_without_ids_or_split_and_with_empty_grades(tmp_path):
    rows = [
        {"query": row["search"], "title": row["name"], "grade": "" if row["search"] == QUERIES["q7"] else row["label"]}
        for row in table_rows()
    ]
    path = write_any(tmp_path / "mine.csv", [dict(row, title=f'{row["title"]}, "quoted"\nline') for row in rows])
    content = prepare(f"table:{path}", tmp_path / "out", seed=3, candidate_documents=0)
    assert content["candidates_are"]["queries_without_grades"] == 1
    assert content["counts"]["candidates"] == 5 + content["counts"]["judgments_train"]
    assert content["counts"]["queries_test"] == 6
    assert {row["title"] for row in tables(tmp_path / "out")["train"].to_pylist()} <= {
        f'Title {i}, "quoted"\nline' for i in range(30)
    }


def test_ir_datasets_are_read_by_their_interface(tmp_path):
    import ir_datasets
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import BaseDocs, BaseQrels, BaseQueries, GenericDoc, GenericQuery, TrecQrel

    class Docs(BaseDocs):
        def docs_iter(self):
            return (GenericDoc(d, f"{t} {s}") for d, (t, s) in DOCUMENTS.items())

    class Queries(BaseQueries):
        def queries_iter(self):
            return (GenericQuery(q, text) for q, text in QUERIES.items())

    class Qrels(BaseQrels):
        def __init__(self, part: int):
            self.part = part

        def qrels_iter(self):
            return (TrecQrel(q, d, g, "0") for q, d, g in judgments() if int(q[1:]) % 2 == self.part)

    name = "disranker-test-set"
    if name not in ir_datasets.registry:
        ir_datasets.registry.register(name, Dataset(Docs()))
        for part, split in enumerate(("train", "test")):
            ir_datasets.registry.register(f"{name}/{split}", Dataset(Docs(), Queries(), Qrels(part)))
    content = prepare(f"ir:{name}", tmp_path / "out")
    assert content["counts"]["queries_test"] == 30
    row = tables(tmp_path / "out")["test"].to_pylist()[0]
    assert row["summary"] == " ".join(DOCUMENTS[row["doc_id"]])
    with pytest.raises(InputError, match="knows no dataset 'no-such-set'"):
        prepare("ir:no-such-set", tmp_path / "out")

    class Renumbered(Queries):
        """Another query of the same number in each part."""

        def __init__(self, part: int):
            self.part = part

        def queries_iter(self):
            return (GenericQuery(q, f"{text} {['even', 'odd'][self.part]}") for q, text in QUERIES.items())

    class AllQrels(Qrels):
        def qrels_iter(self):
            return (TrecQrel(q, d, g, "0") for q, d, g in judgments() if (int(q[1:]) < 30) is (self.part == 1))

    name = "disranker-renumbered"
    if name not in ir_datasets.registry:
        ir_datasets.registry.register(name, Dataset(Docs()))
        for part, split in enumerate(("train", "test")):
            ir_datasets.registry.register(f"{name}/{split}", Dataset(Docs(), Renumbered(part), AllQrels(part)))
    prepare(f"ir:{name}", tmp_path / "numbers")
    found = {split: set(table.column("query").to_pylist()) for split, table in tables(tmp_path / "numbers").items()}
    assert found["test"] == {f"{QUERIES[f'q{i}']} odd" for i in range(30)}
    assert all(query.endswith(" even") for query in found["train"] | found["dev"])


MOVIES = [
    {"id": str(i), "title": f"Movie {i}", "overview": f"About {WORDS[i % 10]}.", "tags": [],
             "genres": ["Action", "War"],
     "director": "A. Person", "actors": ["B. Person"], "characters": [], "year": 1990 + i}
    for i in range(30)
]  # fmt: skip


def write_msrd(folder: Path) -> Path:
    folder.mkdir()
    corpus = "".join(json.dumps(movie) + "\n" for movie in MOVIES)
    rows = [f"qid:{q[1:]}\t{QUERIES[q]}\t{d[1:]}\t{g}" for q, d, g in judgments()]
    judged = "\n".join(["query_id\tquery\tdoc_id\tgrade", *rows]) + "\n"
    (folder / "movies-corpus.jsonl.gz").write_bytes(gzip.compress(corpus.encode()))
    (folder / "movies-judgments.tsv.gz").write_bytes(gzip.compress(judged.encode()))
    return folder


def test_msrd_in_its_upstream_format(tmp_path):
    content = prepare(f"msrd:{write_msrd(tmp_path / 'up')}", tmp_path / "out")
    assert content["licence"].startswith("CC BY-SA 4.0")
    assert content["counts"]["queries_test"] == 6
    row = next(r for r in tables(tmp_path / "out")["train"].to_pylist() if r["doc_id"] == "3")
    assert row["summary"] == "About daisy. Year: 1993. Genres: Action, War. Director: A. Person. Cast: B. Person."


@pytest.mark.skipif(not MSRD.is_dir(), reason="the MSRD sample is not here")
def test_the_upstream_sample_of_msrd_and_its_four_unknown_movies(tmp_path):
    source = f"msrd:{MSRD / 'upstream_sample'}"
    with pytest.raises(InputError, match=r"row 75: document '440249' is not in the corpus \(--on-bad-row reject"):
        prepare(source, tmp_path / "out")
    content = prepare(source, tmp_path / "out", on_bad_row="reject")
    assert content["counts"]["rejected_rows"] == 4
    assert len((tmp_path / "out/rejects.tsv").read_text(encoding="utf-8").splitlines()) == 5
    assert sum(content["counts"][f"judgments_{n}"] for n in ("train", "dev", "test")) == 4736


@pytest.fixture
def web(tmp_path):
    """A web server on this machine with the upstream files of MSRD."""
    folder = write_msrd(tmp_path / "web")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_downloads_are_checked_and_not_repeated(web, tmp_path, monkeypatch):
    folder, address = web
    monkeypatch.setattr(
        prepare_data, "fetch_msrd", lambda at, names: download.fetch_msrd(at, names, address)
    )  # the public address is not reachable from every machine that runs tests
    downloads = tmp_path / "downloads"
    content = prepare("msrd", tmp_path / "out", downloads=downloads)
    assert content["counts"]["queries_test"] == 6
    for file in folder.iterdir():
        file.unlink()  # a second run needs no network
    assert prepare("msrd", tmp_path / "out2", downloads=downloads)["fingerprint"] == content["fingerprint"]
    corpus = downloads / "msrd/movies-corpus.jsonl.gz"
    corpus.write_bytes(corpus.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"movies-corpus\.jsonl\.gz: SHA-256 is"):
        prepare("msrd", tmp_path / "out3", downloads=downloads)
    corpus.unlink()
    with pytest.raises(InputError, match="cannot be downloaded: HTTP Error 404"):
        prepare("msrd", tmp_path / "out3", downloads=downloads)
    with pytest.raises(InputError, match="SHA-256"):
        download.fetch(address, tmp_path / "index", sha256="0" * 64)


def test_the_built_in_world_is_a_source_and_its_sizes_are_flags(tmp_path):
    small = WorldConfig.small()
    sizes = asdict(small)
    sizes |= {f"drift.{name}": value for name, value in sizes.pop("drift").items()}
    flags = [f"--world.{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    config = parse(Config, ["--source", "world", "--out", str(tmp_path / "w"), *flags], prog="prepare_data")
    assert config.world == small
    prepare_data.main(config)
    assert json.loads((tmp_path / "w/dataset.json").read_text(encoding="utf-8"))["source"] == "world:1"
    assert len(read_table(tmp_path / "w/judgments/train.parquet", "judgments")) == 40 * 12


def test_a_smaller_dataset_is_drawn_from_a_prepared_one(tmp_path):
    whole = tmp_path / "whole"
    prepare(f"beir:{write_beir(tmp_path / 'set')}", whole, judged_fraction=0.5, clicks_from_judgments=True, licence="L")
    content = prepare(f"dataset:{whole}", tmp_path / "out", test_queries=5, unlabelled_queries=4, candidate_documents=0)
    assert content["licence"] == "L" and content["counts"]["documents"] == 31
    assert content["counts"]["queries_test"] == 5 and content["candidates_are"]["queries_without_grades"] == 4
    before, after = tables(whole), tables(tmp_path / "out")
    assert grades(after["train"]) == grades(before["train"])
    assert grades(after["test"]).items() <= grades(before["test"]).items()
    assert (tmp_path / "out/clicks.parquet").read_bytes() == (whole / "clicks.parquet").read_bytes()
    with pytest.raises(InputError, match="is the source itself"):
        prepare(f"dataset:{whole}", whole)
    with pytest.raises(InputError, match=r"no dataset\.json"):
        prepare(f"dataset:{tmp_path}", tmp_path / "out")


def test_clicks_made_from_judgments_are_those_of_the_new_draw(tmp_path):
    """Seen: grades that --judged-fraction took away, and queries that --resplit made test ones, stood in the copy."""
    whole = tmp_path / "whole"
    prepare(f"beir:{write_beir(tmp_path / 'set')}", whole, clicks_from_judgments=True)
    for settings in ({"judged_fraction": 0.2}, {"resplit": True, "seed": 3}):
        content = prepare(f"dataset:{whole}", tmp_path / "out", **settings)
        clicks = read_table(tmp_path / "out/clicks.parquet", "clicks").column("query").to_pylist()
        assert set(clicks) == set(tables(tmp_path / "out")["train"].column("query").to_pylist())
        assert "clicks_are" in content and content["settings"]["clicks_from_judgments"]
    content = prepare(f"dataset:{whole}", tmp_path / "log", judged_fraction=0.5, simulate_clicks="baidu")
    assert "clicks_are" not in content and not (tmp_path / "log/clicks.parquet").exists()


def test_a_dataset_whose_candidates_were_sampled_is_a_source(tmp_path):
    """Seen: sample_candidates writes queries in lower case, and every one with capitals was "another text"."""
    rows = [dict(row, search=row["search"].title()) for row in table_rows()]
    data = tmp_path / "data"
    prepare(f"table:{write_any(tmp_path / 'mine.csv', rows)}", data, columns=COLUMNS)
    (data / "candidates.parquet").rename(data / "pool.parquet")
    sample_candidates(SampleConfig(pool=str(data / "pool.parquet"), out=data / "candidates.parquet"))
    content = prepare(f"dataset:{data}", tmp_path / "out")
    assert content["counts"]["queries_test"] == 12 and content["counts"]["candidates"]
    assert all(query.istitle() for query in tables(tmp_path / "out")["train"].column("query").to_pylist())
    (data / "dataset.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"dataset\.json: cannot be read"):
        prepare(f"dataset:{data}", tmp_path / "out")


def test_settings_out_of_range_and_unknown_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="judged_fraction"):
        Config(source="world", out=tmp_path, judged_fraction=0)
    with pytest.raises(ValueError, match="dev_fraction"):
        Config(source="world", out=tmp_path, dev_fraction=1)
    with pytest.raises(ValueError, match="negatives"):
        Config(source="world", out=tmp_path, negatives=-1)
    with pytest.raises(InputError, match="one of beir:PATH"):
        prepare("parquet:x", tmp_path)
    # seen: three worlds of --seed 1, 2 and 3 were one
    with pytest.raises(ValueError, match=r"seed: of other sources; the built-in world has --world\.seed"):
        Config(source="world", out=tmp_path, seed=3)
    with pytest.raises(ValueError, match="judged_fraction: of other sources"):
        Config(source="world", out=tmp_path, judged_fraction=0.5)
    with pytest.raises(ValueError, match="world: sizes of the built-in world, and source is msrd"):
        Config(source="msrd", out=tmp_path, world=WorldConfig(documents=99))
