"""The remote tier: layouts published to a directory, an HTTP server or an S3-compatible store, and fetched from there."""
