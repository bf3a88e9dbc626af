"""Environment variables: every value works or is refused, and no variable is read that the table lacks."""

import re
from pathlib import Path

import pytest

from flashcomm import settings
from flashcomm.errors import SettingError

SOURCES = Path(settings.__file__).parent


@pytest.mark.parametrize("name", [setting.name for setting in settings.SETTINGS.values() if setting.is_switch])
def test_a_switch_is_on_or_off_or_an_error(name, monkeypatch):
    for text in ("1", "true", "ON", "yes", " 1 "):
        monkeypatch.setenv(name, text)
        assert settings.switched_on(name)
    for text in ("0", "false", "Off", "no"):
        monkeypatch.setenv(name, text)
        assert not settings.switched_on(name)
    for text in ("", " "):
        monkeypatch.setenv(name, text)
        assert settings.switched_on(name) == settings.SETTINGS[name].default
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(SettingError, match=rf"{name}='maybe': use 1 \(or true, on, yes\) or 0 \(or false, off, no\)"):
        settings.switched_on(name)
    with pytest.raises(SettingError, match=name):
        settings.check()


def test_a_misspelt_variable_is_a_warning_once(monkeypatch, caplog):
    monkeypatch.setenv("FLASHCOMM_SHARD_MEMORY", "0")
    settings.check()
    settings.check()
    assert [record.message for record in caplog.records] == [
        "unknown variable FLASHCOMM_SHARD_MEMORY is ignored. Did you mean FLASHCOMM_SHARED_MEMORY?"
    ]


def test_every_variable_in_the_sources_is_in_the_table():
    named = {name for path in SOURCES.rglob("*.py") for name in re.findall(r"FLASHCOMM_[A-Z_]+", path.read_text())}
    assert named - {"FLASHCOMM_"} == set(settings.SETTINGS)


def test_only_the_table_reads_our_variables():
    reads = re.compile(r"environ(?:\.get\(|\[|\.pop\()\s*[\"']FLASHCOMM_")
    assert [path.name for path in SOURCES.rglob("*.py") if reads.search(path.read_text())] == ["settings.py"]


def test_every_variable_is_in_the_documents():
    text = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    for setting in settings.SETTINGS.values():
        default = {True: "on", False: "off", "": ""}[setting.default]
        assert f"| `{setting.name}` | {default} | {setting.meaning} |" in text
