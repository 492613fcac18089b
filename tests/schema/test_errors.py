from schema.errors import Fault, InvalidCheckpoint, Overloaded, SllmError


def test_a_fault_carries_an_error_over_a_link_and_back() -> None:
    fault = Fault.of(InvalidCheckpoint("model.safetensors is short"))
    error = fault.to_error()
    assert isinstance(error, InvalidCheckpoint)
    assert error.message == "model.safetensors is short"


def test_every_class_can_be_made_from_its_code() -> None:
    for code, kind in SllmError.by_code.items():
        assert type(Fault(code, "why").to_error()) is kind


def test_what_is_not_ours_becomes_internal_and_keeps_its_type() -> None:
    fault = Fault.of(KeyError("x"))
    assert (fault.code, fault.message) == ("internal", "KeyError: 'x'")
    assert type(fault.to_error()) is SllmError


def test_overloaded_says_when_to_try_again() -> None:
    assert Overloaded("queue is full", 7.0).retry_after_s == 7.0
