"""What a scenario is made of: machines, models, requests. Sizes in bytes, rates in bytes per second, times in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Arrival", "Lengths", "ModelGroup", "NodeGroup", "Popularity", "Scenario", "Speed", "Workload"]

_Positive = Annotated[float, Meta(gt=0)]
_Seconds = Annotated[float, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=1)]
_Bytes = Annotated[int, Meta(ge=0)]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class NodeGroup(_Part, frozen=True, kw_only=True):
    """``count`` equal machines. ``device_bps`` is the link to one device, ``network_bps`` the machine's own, ``dram_bytes`` the
    arena's budget. ``device_kind`` names the speed class of its devices (a GPU's name), "cpu" for none."""

    name: str
    count: _Count = 1
    devices: _Count = 1
    device_kind: str = "cuda"
    device_bytes: _Positive
    device_bps: _Positive
    dram_bytes: _Bytes
    disk_bps: _Positive
    network_bps: _Positive


class Speed(_Part, frozen=True, kw_only=True):
    """How fast an instance computes alone on its devices, and which part of them it keeps busy meanwhile (``occupancy``).

    A prefill of t tokens takes ``prefill_base_s + t * prefill_token_s``. One decode step of n sequences that hold k tokens
    takes ``decode_step_s + n * decode_sequence_s + k * decode_token_s``. Instances that compute on one device at a time slow
    each other as soon as their parts are more than the whole.
    """

    prefill_base_s: Annotated[float, Meta(ge=0, le=3600)]
    prefill_token_s: Annotated[float, Meta(ge=0, le=60)]
    decode_step_s: Annotated[float, Meta(gt=0, le=3600)]
    decode_sequence_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    decode_token_s: Annotated[float, Meta(ge=0, le=1)] = 0.0
    occupancy: Annotated[float, Meta(gt=0, le=1)] = 1.0


class ModelGroup(_Part, frozen=True, kw_only=True):
    """``count`` models of one size, each with weights of its own.

    ``build_s``: making a worker, side by side with the load. ``finish_s``: from the weights' arrival to ready.
    ``on_disk``: on how many nodes the checkpoint lies on disk at the beginning, None for all of them; ``in_dram`` likewise, 0
    for none. ``kv_bytes``: KV cache per device of one instance, None for the planner's rule.
    """

    name: str
    count: _Count = 1
    weights_bytes: _Count
    kv_token_bytes: _Count
    max_context_tokens: _Count = 2048
    devices: _Count = 1
    speed: Speed
    build_s: _Seconds = 0.0
    finish_s: _Seconds = 0.0
    on_disk: Annotated[int, Meta(ge=0)] | None = None
    in_dram: Annotated[int, Meta(ge=0)] = 0
    kv_bytes: _Count | None = None
    max_concurrency: _Count = 32
    max_instances: _Count = 64
    min_instances: Annotated[int, Meta(ge=0)] = 0
    keep_alive_s: _Seconds | None = None


class Lengths(_Part, frozen=True, kw_only=True):
    """Token counts: log-normal, by mean and coefficient of variation, cut to [least, most]."""

    mean: _Positive
    cv: Annotated[float, Meta(ge=0)]
    least: _Count = 1
    most: _Count


class Popularity(_Part, frozen=True, kw_only=True):
    """Zipf: the model of rank r is called in proportion to ``1 / r**exponent``; 0 is uniform. The seed shuffles ranks."""

    zipf: Annotated[float, Meta(ge=0, le=10)] = 0.0


class Workload(_Part, frozen=True, kw_only=True):
    """``requests`` arrivals in all, or as many as ``duration_s`` brings, whichever ends first (with ``rate``, one is needed).

    ``rate``: requests per second over the whole cluster; times between arrivals are Gamma with coefficient of variation ``cv``.
    ``per_model``: every model has an arrival process of its own, with its share of the rate and this CV; otherwise one process
    serves all. ``trace``: a CSV file instead (columns time,model,input_tokens,output_tokens), beside the scenario or shipped.
    ``counts``: a CSV file of invocations per function and minute, in the form of Azure's functions trace; its functions are
    dealt to the models in turn, and ``rate``, if given, is what its time is stretched or pressed to in the mean.
    """

    rate: _Positive | None = None
    cv: _Positive = 1.0
    per_model: bool = False
    requests: Annotated[int, Meta(ge=1, le=1_000_000_000)] | None = None
    duration_s: _Positive | None = None
    input_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    popularity: Popularity = Popularity()
    trace: str | None = None
    counts: str | None = None


class Scenario(_Part, frozen=True, kw_only=True):
    """``timeout_s``: a request that has waited so long for an instance fails. ``policies``: names known to
    sllmctl.simulate.policies. ``control``: overrides of the control loop's settings, by name."""

    name: str
    description: str = ""
    seed: Annotated[int, Meta(ge=0)] = 0
    nodes: tuple[NodeGroup, ...]
    models: tuple[ModelGroup, ...]
    workload: Workload
    policies: tuple[str, ...] = ("sllmctl",)
    timeout_s: _Positive = 300.0
    control: dict[str, float | int | str] = {}

    def model_names(self) -> Sequence[str]:
        """Every model of every group: ``group-00001`` and so on."""
        return [f"{group.name}-{number:05d}" for group in self.models for number in range(group.count)]

    def contexts(self) -> dict[str, int]:
        """How many tokens, prompt and reply together, each model serves, by name."""
        contexts = [group.max_context_tokens for group in self.models for _ in range(group.count)]
        return dict(zip(self.model_names(), contexts, strict=True))


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """One request: when, for which model, with how many tokens in and out."""

    at: float
    model: str
    prompt_tokens: int
    output_tokens: int
