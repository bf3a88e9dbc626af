"""Progress where there is no terminal, as in a log."""

from flashcomm.report import progress


def test_a_log_is_told_how_much_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PAUSE_S", 0)
    with progress.progress() as step:
        advance = step("accuracy", 3)
        for _ in range(3):
            advance()
    assert capsys.readouterr().err.splitlines() == [
        "measuring accuracy ...",
        "  1 of 3 parts, 0.0 min left",
        "  2 of 3 parts, 0.0 min left",
    ]


def test_a_log_has_no_line_for_every_part(capsys):
    with progress.progress() as step:
        advance = step("accuracy", 3)
        for _ in range(3):
            advance()
    assert capsys.readouterr().err == "measuring accuracy ...\n"
