"""What README.md says of results is what the results say."""

import pytest

from bench import readme


def test_readme_gets_its_parts_between_their_marks():
    parts = {name: readme.marks(name) for name in readme.PARTS}
    text = "before\n" + "".join(f"{begin}stale\n{end}" for begin, end in parts.values()) + "after\n"
    found = readme.with_results(text)
    assert found.startswith("before\n")
    assert found.endswith("after\n")
    assert "stale" not in found
    for name, (begin, end) in parts.items():
        assert f"{begin}{readme.PARTS[name]()}\n{end}" in found
    assert readme.with_results(found) == found


@pytest.mark.parametrize("name", readme.PARTS)
def test_readme_without_the_marks_of_a_part_is_refused(name):
    text = readme.README.read_text(encoding="utf-8")
    begin, end = readme.marks(name)
    swapped = text.replace(begin, "?").replace(end, begin).replace("?", end)
    for without in (text.replace(begin, ""), text.replace(end, ""), text + begin, swapped):
        with pytest.raises(ValueError, match=f"marks of its part '{name}'"):
            readme.with_results(without)


def test_readme_says_what_the_results_give():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.with_results(text) == text


def test_parts_of_the_readme_hold_the_figures_of_the_rows():
    table = readme.training_part().splitlines()
    assert table[0].startswith("| M, N, K | gates | closed | sgtriton |")
    assert any(line.startswith("| 512, 4096, 1024 | threshold 32x32 | 90% |") for line in table)
    said = readme.models_part()
    for begin in ("VGG-16's convolutions", "Whole models: VGG-16", "A call of `bsr_linear`"):
        assert begin in said
    assert max(map(len, said.splitlines())) <= 100


def test_what_was_not_measured_is_left_out(tmp_path):
    assert readme.models_part(tmp_path) == ""
