"""Names from files: shown in full, harmless to terminals and pages."""

import io
import sys

import pytest

from medmoco.command import run_command
from medmoco.errors import UserError
from medmoco.printing import brief, say, visible

NASTY = 'a<b>\n"\x1b[31m\u202e\udcff\x00'


def test_what_does_not_print_becomes_an_escape():
    shown = visible(NASTY)
    assert shown == 'a<b>\\n"\\x1b[31m\\u202e\\udcff\\x00'
    assert shown.isprintable() and visible(shown) == shown
    assert visible("läuft, 一 \N{EN DASH}") == "läuft, 一 \N{EN DASH}"
    assert visible("one\ntwo\t", keep="\n") == "one\ntwo\\t"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1, "1"),
        (None, "None"),
        (2.5, "2.5"),
        (NASTY, repr(NASTY)),
        ("x" * 1000, repr("x" * 80) + "..."),
        pytest.param(10**5000, "a number of 16610 bits", id="long"),
        ([[]] * 7, "list of 7"),
        ({"a": 1}, "dict of 1"),
        (object(), "object"),
    ],
)
def test_values_in_messages_are_short(value, shown):
    assert brief(value) == shown


def test_lines_stay_lines(capsys):
    say("one\n\x1b[2Jtwo")
    assert capsys.readouterr().out == "one\n\\x1b[2Jtwo\n"


def test_a_terminal_without_the_letters_of_a_name_gets_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run_command(lambda _: say("n\u00e4me \udcff")) == 0
    assert raw.getvalue() == b"n\\xe4me \\udcff\n"


def test_an_error_with_a_hostile_name_is_harmless_to_the_terminal(capsys):
    def fail(_):
        raise UserError(f"{NASTY}: expected\n  more")

    assert run_command(fail) == 2
    shown = capsys.readouterr().err
    assert shown == 'error: a<b>\n"\\x1b[31m\\u202e\\udcff\\x00: expected\n  more\n'
