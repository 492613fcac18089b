"""The nouns: what is stored and what is said. No I/O, and no clock but in `ids.system_ids`."""
