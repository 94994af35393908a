"""The wire's own rules: bounds, strictness, leniency of clients, units, WebSocket frames."""

from __future__ import annotations

import re
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.api import models, types, units
from stoker.api import websocket as wire
from stoker.api.codec import decode_answer, decode_request, encode
from stoker.errors import InternalError, InvalidRequest


def _structs() -> list[type[msgspec.Struct]]:
    found = [getattr(models, name) for name in models.__all__]
    return [value for value in found if isinstance(value, type) and issubclass(value, msgspec.Struct)]


@pytest.mark.parametrize("model", _structs(), ids=lambda model: model.__name__)
def test_every_model_is_frozen_and_strict(model: type[msgspec.Struct]) -> None:
    config = model.__struct_config__
    assert config.frozen and config.forbid_unknown_fields
    assert model.__doc__ is not None


def test_every_pattern_refuses_a_final_newline() -> None:
    for name in types.__all__:
        alias = getattr(types, name)
        for meta in getattr(alias, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.pattern and meta.pattern.startswith("^["):
                assert not re.search(meta.pattern, "a\n") or "^[^" in meta.pattern, name


@pytest.mark.parametrize("name", ["a", "A.b-c_9", "x" * 64])
def test_names_that_are(name: str) -> None:
    assert decode_request(encode({"image": "i", "name": name}), models.CreateSandbox).name == name


@pytest.mark.parametrize("name", ["", "-a", ".", "..", "a/b", "a b", "a\n", "ä", "x" * 65, "a\0"])
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(InvalidRequest):
        decode_request(encode({"image": "i", "name": name}), models.CreateSandbox)


def test_a_client_leaves_out_what_it_does_not_know_at_any_depth() -> None:
    box = {"id": "sb-" + "a" * 20, "state": "running", "image": "x", "created_at": 1, "new": {"deep": 1}}
    box["timeout"] = {"seconds": 3, "new": 1}
    page = decode_answer(encode({"items": [box], "next": None, "total": 1}), models.SandboxPage)
    assert page.items[0].timeout is not None and page.items[0].timeout.seconds == 3
    with pytest.raises(InternalError):
        decode_answer(b'{"items": 3}', models.SandboxPage)
    with pytest.raises(InternalError):
        decode_answer(b"<html>", models.SandboxPage)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoders(data: bytes) -> None:
    for model in (models.CreateSandbox, models.ExecRequest, models.WriteFiles):
        try:
            decode_request(data, model)
        except InvalidRequest:
            pass
    try:
        wire.decode_client(data)
    except msgspec.DecodeError:
        pass
    except UnicodeDecodeError:
        pass
    try:
        wire.decode_data(data)
    except ValueError:
        pass


@given(st.sampled_from([0, 1, 2]), st.integers(0, (1 << 64) - 1), st.binary(max_size=1000))
def test_frames_come_back(stream: int, offset: int, data: bytes) -> None:
    found = wire.decode_data(wire.encode_data(stream, offset, data))
    assert (found[0], found[1], bytes(found[2])) == (stream, offset, data)


def test_every_message_has_a_type_of_its_own_and_comes_back() -> None:
    members = [*typing.get_args(wire.ClientMessage), *typing.get_args(wire.DaemonMessage)]
    tags = {member.__struct_config__.tag for member in members}
    assert len(tags) == len(set(members))
    start = wire.Start(process=models.StartProcess(argv=["true"]))
    assert wire.decode_client(wire.encode_message(start)) == start
    assert '"type":"start"' in wire.encode_message(start)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("1.5G", 3 << 29),
        ("2GiB", 2 << 30),
        (" 1 kb ", 1024),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1X", "1 2", "1e9", "٣M", "M"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidRequest):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1h30m", 5400), ("250ms", 0.25), ("2d", 172800), ("0.5m", 30)]
)
def test_durations(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "h", "1x", "1h 30", "-5", "1h-3m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidRequest):
        units.parse_duration(text)


def test_written_for_people() -> None:
    assert [units.format_size(n) for n in (0, 1023, 1024, 1536, 512 << 20, 5 << 40)] == ["0", "1023", "1K", "1.5K", "512M", "5T"]
    assert [units.format_duration(s) for s in (0, 59, 60, 5400, 90061)] == ["0s", "59s", "1m", "1h30m", "1d1h"]
