"""Where judgments come from: BEIR folders, tables, ir_datasets, downloads; splits of queries; BM25."""
