"""Every document that was shown for a query somebody was satisfied with: its clicks, and how often it was likely seen.

Clicks alone cannot teach a ranker what was seen and passed over. Expected examinations are the sum of the propensities
of the positions that the document was shown at, so clicks over examinations estimate relevance under the position-based
model, whatever the positions were (training/student/clicked_groups.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from ranking.query_engine import QueryEngine, add_table
from training.clicks.propensities import Propensities


def shown_documents(engine: QueryEngine, satisfied: str, propensities: Propensities | None) -> Iterator[pa.Table]:
    """The `shown_documents` table in pieces, by query and document.

    engine: has `kept`, `queries` and `weights` of training/clicks/click_pairs.py; satisfied: the SQL condition of a
    satisfied click; propensities: None counts every impression as one examination.
    """
    positions = [position for (position,) in engine.rows("SELECT DISTINCT position FROM kept ORDER BY 1")]
    chances = [propensities.at(position) if propensities else 1.0 for position in positions]
    schema = pa.schema([("position", pa.int32()), ("propensity", pa.float64())])
    add_table(engine, "examination", pa.table([positions, chances], schema=schema))
    # rounded: the order in which threads add floats must not change the file
    engine.table(
        "shown_counts",
        f"""
        SELECT query_no, doc_id, count(*) FILTER ({satisfied}) AS clicks, round(sum(propensity), 4) AS examinations
        FROM kept SEMI JOIN weights USING (query_no) JOIN examination USING (position) GROUP BY ALL
        """,
    )
    # a document's text as it was last shown for that query
    engine.table(
        "shown_texts",
        """
        SELECT query_no, doc_id, arg_max({'title': title, 'summary': summary}, (timestamp, title, summary)) AS text
        FROM kept SEMI JOIN shown_counts USING (query_no, doc_id) GROUP BY query_no, doc_id
        """,
    )
    for batch in engine.batches("""
        SELECT query, doc_id, text.title AS title, text.summary AS summary,
               CAST(clicks AS FLOAT) AS clicks, CAST(examinations AS FLOAT) AS examinations
        FROM shown_counts JOIN queries USING (query_no) JOIN shown_texts USING (query_no, doc_id) ORDER BY query, doc_id
    """):
        yield pa.Table.from_batches([batch])
