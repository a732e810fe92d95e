"""What is kept of measurements and predictions is what the code makes of it now."""

from bench import report, roofline, rows


def test_the_page_is_what_the_results_give():
    assert report.page() == report.PAGE.read_text(encoding="utf-8"), "run python -m bench report"


def test_kept_predictions_are_those_of_the_model():
    kept = rows.read(rows.RESULTS / "roofline.csv", roofline.Row)
    different = [
        (old, new) for old, new in zip(kept, roofline.predict_rows(), strict=True) if old != new
    ]
    assert not different, f"run python -m bench roofline: {len(different)} rows, {different[0]}"
