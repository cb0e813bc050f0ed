"""Export names: what a client may write there."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_plugin.errors import PluginError
from nbd_plugin.names import ExportName, is_volume_name, parse_export_name_untrusted


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("vm1", ExportName("vm1")),
        ("", ExportName("")),
        ("vm1@monday", ExportName("vm1@monday", read_only=True)),
        ("vm1@readonly", ExportName("vm1", read_only=True)),
        ("vm1@session=a-b.c_1", ExportName("vm1", session="a-b.c_1")),
        ("@session=t", ExportName("", session="t")),
        ("v@session=t,connection=3", ExportName("v", session="t", connection=3)),
        ("v@client=c,session=t", ExportName("v", session="t", client="c")),
    ],
)
def test_export_name_of_a_legal_form_taken_apart(text: str, name: ExportName) -> None:
    assert parse_export_name_untrusted(text) == name


@pytest.mark.parametrize(
    "text",
    [
        *("..", ".", "/etc/passwd", "a/b", "../v", "-v", ".hidden", "a b", "a\nb", "a\0", "ä"),
        *("v" * 129, "v@", "v@a@b", "v@../x", "v@session=", "v@session=a/b", "v@connection=1"),
        *("v@session=a,session=b", "v@session=a,connection=x", "v@session=a,size=1"),
        *("v@session=" + "t" * 65, "@"),
    ],
)
def test_export_name_of_another_form_refused_in_one_line(text: str) -> None:
    with pytest.raises(PluginError) as caught:
        parse_export_name_untrusted(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_export_name_any_text_gives_a_safe_volume_or_is_refused(text: str) -> None:
    with contextlib.suppress(PluginError):
        name = parse_export_name_untrusted(text)
        assert name.volume == "" or is_volume_name(name.volume)
        assert re.fullmatch(r"[A-Za-z0-9_.+@-]*", name.volume)
        assert not name.volume.startswith((".", "-"))
