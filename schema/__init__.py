"""The nouns: what is stored and what is said. No I/O, no clocks."""
