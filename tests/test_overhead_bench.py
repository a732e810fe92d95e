from bench import overhead, rows


def test_rows_of_every_call_survive_the_csv(tmp_path):
    path = tmp_path / "overhead.csv"
    measured = [row for mode in overhead.MODES for row in overhead.measure(mode, seconds=0.01)]
    rows.write(path, measured)
    assert rows.read(path, overhead.Row) == measured
    dense = [row for row in measured if row.call in ("F.linear", "nn.Linear", "F.conv2d")]
    assert len(dense) == 3 * len(overhead.MODES)
    assert all(row.over == 0 for row in dense)
    head, _, *lines = overhead.markdown(measured).splitlines()
    assert all(mode in head for mode in overhead.MODES)
    assert len(lines) == len({row.call for row in measured})


def test_calls_with_gradients_make_a_graph():
    for mode, expected in (("no_grad", False), ("gradients", True)):
        for group in overhead.candidates(mode == "gradients").values():
            for name, call in group.items():
                if not name.startswith(("served", "nn.")):
                    assert call().requires_grad == expected, name
