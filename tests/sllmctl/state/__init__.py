"""Tests of sllmctl.state."""
