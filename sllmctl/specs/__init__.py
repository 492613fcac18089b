"""Model specs as files: read with their places, foreign ones translated, and the JSON Schema that editors use."""
