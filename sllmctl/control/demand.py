"""How much a model is called for: recent calls that found it idle or without an instance, decaying with time."""

from __future__ import annotations

from math import exp

from sllmctl.cluster.records import Model

__all__ = ["called", "heat"]


def heat(model: Model, now: float, heat_s: float) -> float:
    """Its heat as of now."""
    return model.heat * exp(-max(0.0, now - model.heat_at) / heat_s) if model.heat else 0.0


def called(model: Model, now: float, heat_s: float) -> None:
    """A call found it idle, or without an instance."""
    model.heat = heat(model, now, heat_s) + 1.0
    model.heat_at = now
