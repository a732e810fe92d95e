import io
import sys

import pytest

from sgtriton.tables import format_table, print_table


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_numbers_are_set_right_and_text_left():
    table = format_table(
        ["layer", "sparsity"], [["fc1", "95.1 %"], ["output", "5.0 %"]], title="Layers"
    )
    assert table.splitlines() == [
        "Layers",
        "layer   sparsity",
        "------  --------",
        "fc1       95.1 %",
        "output     5.0 %",
    ]


def test_alignment_can_be_given():
    assert format_table(["a", "b"], [["x", 1]], align="rl").splitlines()[-1] == "x  1"
    assert format_table(["aaa"], [["x"]], align="r").splitlines()[-1] == "  x"


def test_a_wide_table_is_wrapped_between_words_to_fit():
    reason = "density 0.41 leaves too little to skip, so the folded dense product is faster here"
    table = format_table(["layer", "form", "reason"], [["encoder.layer", "dense", reason * 2]])
    assert max(map(len, table.splitlines())) <= 100
    assert "".join(reason.split()) in "".join(table.split())


def test_long_names_are_broken_between_their_parts():
    rows = [["encoder.layers.0.linear1", "BlockSparseLinear", "x" * 30 + " and y"]]
    table = format_table(["layer", "type", "what"], rows, align="lll", width=40)
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["encoder.", "BlockSparse", "x" * 12],
        ["layers.0.", "Linear", "x" * 12],
        ["linear1", "x" * 6, "and", "y"],
    ]


def test_numbers_are_never_broken():
    row = [123456789.125] * 12
    table = format_table([f"column {i}" for i in range(12)], [row])
    assert table.count("123456789.125") == 12


def test_wide_and_combining_characters_keep_the_columns():
    lines = format_table(["name", "n"], [["漢字", 1], ["e\u0301", 2]]).splitlines()
    assert lines[2] == "漢字  1"
    assert lines[3] == "e\u0301     2"


def test_control_characters_do_not_reach_the_terminal():
    assert "\x1b" not in format_table(["a"], [["\x1b[31mred\nline"]])


def test_no_rows_and_empty_cells():
    assert format_table(["a", "b"], []).splitlines() == ["a  b", "-  -"]
    assert format_table(["a", "b"], [[None, 1]]).splitlines()[-1] == "   1"


def test_ragged_rows_and_bad_alignment_are_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells, the table 2 columns"):
        format_table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="align must be 2 letters"):
        format_table(["a", "b"], [[1, 2]], align="lc")


@pytest.mark.parametrize("rich", [True, False])
def test_print_table_on_a_terminal_shows_brackets_as_they_are(rich, monkeypatch):
    if rich:
        pytest.importorskip("rich", reason="rich is not installed")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    out = _Terminal()
    print_table(["block"], [["[32, 32]"]], title="[bold]", file=out)
    assert "[32, 32]" in out.getvalue()
    assert "[bold]" in out.getvalue()


def test_print_table_in_a_pipe_is_plain_and_survives_ascii():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_table(["layer"], [["größe"]], file=out)
    out.flush()
    assert raw.getvalue().decode("ascii").splitlines()[-1] == "gr??e"
