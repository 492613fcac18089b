"""The cluster as the manager holds it in memory: records, indexes, the memory ledger, and the rows that make it last. Pure."""
