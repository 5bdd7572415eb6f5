"""DuckDB's SQL as Spark's, by sqlglot, with the few functions that sqlglot leaves as they are."""

from __future__ import annotations

from functools import cache

import sqlglot
from sqlglot import exp
from sqlglot.dialects.spark import Spark

# DuckDB's function -> Spark's with the same arguments and answers
_RENAMED = {
    "epoch_us": "unix_micros",
    "hash": "xxhash64",  # another number, so that a query may only group by it
    "list_extract": "try_element_at",
    "strlen": "octet_length",
}


@cache
def spark_sql(query: str) -> str:
    """The query in Spark's SQL; `$name` becomes `:name`.

    Lists are counted with array_length, since `len` is the length of a text there. A function that neither sqlglot nor
    this file knows stays as it is, and Spark names it.
    """
    tree = sqlglot.parse_one(query, read="duckdb")
    return tree.transform(_translated).sql(Spark)


def _translated(node: exp.Expr) -> exp.Expr:
    if isinstance(node, exp.PercentileCont):  # exact, and interpolated as DuckDB does
        return exp.func("percentile", node.this, node.expression)
    if isinstance(node, exp.Anonymous):
        name, arguments = node.name.lower(), node.expressions
        if name == "isfinite":
            (value,) = arguments
            infinity = exp.cast(exp.Literal.string("inf"), "double")  # NaN is above it in Spark
            return exp.paren(exp.LT(this=exp.func("abs", value), expression=infinity))
        if name == "list_position":
            return exp.func("nullif", exp.func("array_position", *arguments), exp.Literal.number(0))
        if name in _RENAMED:
            return exp.func(_RENAMED[name], *arguments)
    return node
