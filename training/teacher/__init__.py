"""The decoder that becomes a teacher: its weights, its score head, its likelihood as a first target."""
