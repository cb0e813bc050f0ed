"""docker/scripts/environment.py: settings from environment variables."""

from __future__ import annotations

import environment
import pytest
from environment import SettingError, choice, integer, number, size, switch, text


def test_text_unset_gives_default() -> None:
    assert text("NBD_VOLUME", "disk") == "disk"


def test_text_empty_gives_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_VOLUME", "")
    assert text("NBD_VOLUME", "disk") == "disk"


def test_text_unset_without_default_names_the_variable() -> None:
    with pytest.raises(SettingError, match="NBD_URI is not set"):
        text("NBD_URI")


@pytest.mark.parametrize("value", ["a\nb", "\x1b[2J", "ä"])
def test_text_with_control_characters_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("NBD_VOLUME", value)
    with pytest.raises(SettingError) as raised:
        text("NBD_VOLUME", "disk")
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)


def test_text_too_long_is_quoted_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_VOLUME", "x" * 100_000)
    with pytest.raises(SettingError) as raised:
        text("NBD_VOLUME", "disk", pattern="[a-z]{1,10}")
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("value", ["10G", "512m", "4096", "1TiB", "64KB"])
def test_size_that_is_one_is_taken(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NBD_VOLUME_SIZE", value)
    assert size("NBD_VOLUME_SIZE", "10G") == value


@pytest.mark.parametrize("value", ["plenty", "-1", "10 G", "1e9", "10GG"])
def test_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NBD_VOLUME_SIZE", value)
    with pytest.raises(SettingError, match="a size such as 10G"):
        size("NBD_VOLUME_SIZE", "10G")


@pytest.mark.parametrize("value", ["-1", "inf", "nan", "1e3", "0x10"])
def test_number_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("BRIDGE_POLL_US", value)
    with pytest.raises(SettingError, match="BRIDGE_POLL_US"):
        number("BRIDGE_POLL_US", "32")


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "many"])
def test_integer_that_is_not_positive_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GUEST_MIB", value)
    with pytest.raises(SettingError, match="a whole number above 0"):
        integer("GUEST_MIB", 4)


def test_choice_of_something_else_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_STORE", "tape")
    with pytest.raises(SettingError, match="'tape' is not one of file, memory, rbd"):
        choice("NBD_STORE", "file", ("file", "memory", "rbd"))


def test_switch_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_TLS", "off")
    assert not switch("NBD_TLS", "on")
    monkeypatch.setenv("NBD_TLS", "yes")
    with pytest.raises(SettingError, match="on, off"):
        switch("NBD_TLS", "on")


def test_run_with_a_wrong_setting_says_it_once_and_waits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment.time, "sleep", lambda _: None)
    attempts = iter(["wrong", "wrong", "other", ""])

    def start() -> None:
        if said := next(attempts):
            raise SettingError(said)

    environment.run("bridge", start)
    assert capsys.readouterr().err.splitlines() == ["bridge: wrong", "bridge: other"]
