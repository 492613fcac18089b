"""One module per revision, named by its number; a released one is never changed."""
