"""Tests of sllmctl.planner."""
