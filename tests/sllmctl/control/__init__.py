"""Tests of sllmctl.control."""
