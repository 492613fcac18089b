"""Pure functions over the cluster view: plans and their reasons. No I/O, no clock, no randomness."""
