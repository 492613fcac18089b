"""The dashboard: a client of the admin API, and nothing more."""
