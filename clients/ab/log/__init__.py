"""The router's log of pages shown and clicks on them: what a record holds, how it is written, read and compacted."""
