"""The simulator: the production control loop, planner and router on a virtual clock, over simulated nodes."""
