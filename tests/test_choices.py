"""What was looked up is met again, until it may be another; and does not pile up."""

from sgtriton_kernels.choices import Choices, keep


def test_what_was_kept_is_of_one_generation():
    choices = Choices()
    choices.of(3)["key",] = "first"
    assert choices.of(3) == {("key",): "first"}
    before = choices.of(3)
    assert choices.of(4) == {}
    before["late",] = "of the generation before"  # which another thread had begun with
    assert choices.of(4) == {}


def test_no_more_are_kept_than_allowed():
    kept = {}
    for i in range(7):
        assert keep(kept, i, -i, 3) == -i
        assert kept[i] == -i
        assert len(kept) <= 3
    assert kept == {6: -6}
    assert keep(kept, 6, "again", 3) == "again"
