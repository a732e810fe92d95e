import csv
from dataclasses import astuple, replace

import pytest
import torch
from sgtriton_kernels import candidates, records
from sgtriton_kernels._triton import triton

from bench import compile_report, compile_rules
from bench.compile_rows import Row, write_rows
from bench.variant import SIZE, Product, Variant
from bench.variants import variants
from sgtriton.cross_compile import Compiled
from sgtriton.launches import Launch, bsr_linear_launches

LAUNCH = Launch("module", "kernel", {}, {}, num_warps=4, num_stages=2)


def run(*arguments):
    return compile_report.main(["--jobs", "1", *arguments])


@pytest.fixture
def in_this_process(monkeypatch):
    """Compile where the test can reach."""

    def run_all(task, items, jobs, limit):
        yield from ((item, task(item)) for item in items)

    monkeypatch.setattr(compile_report, "in_processes", run_all)


@pytest.mark.compiles
def test_every_op_that_ships_is_there():
    found = variants()
    assert {variant.op for variant in found} == {
        "gate_weight", "gate_weight bwd", "gate_penalties", "pack_gates",
        "bsr_linear fwd", "bsr_linear dx", "bsr_linear dvalues", "bsr_linear sums",
        "bsr_conv", "bsr_conv dx", "bsr_conv dvalues",
        "gated_to_bsr count", "gated_to_bsr copy",
        "fused fwd", "fused dx", "fused dw", "skip fwd", "skip dx", "skip dw",
    }  # fmt: skip
    keys = [(v.op, repr(v.launch)) for v in found]
    assert len(set(keys)) == len(keys)
    # a report's rows are told apart, and joined, by what it says of them
    shown = [(v.op, v.name, v.rows[:1] + v.rows[-1:], v.tile) for v in found]
    assert len(set(shown)) == len(shown)
    for variant in found:
        if variant.product is not None:
            assert {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(variant.launch.constexprs)


@pytest.mark.compiles
def test_tiles_that_tables_name_are_compiled_for_the_blocks_they_are_named_for():
    """A tile is cut to the block, and what is cut is another kernel."""
    launched = {(v.op, repr(v.launch)): v.targets for v in variants()}
    seen = set()
    for table in records.tables():
        for entry in table.entries.values():
            key = entry["key"]
            named = candidates.named(key["op"], "triton", False).get(entry["candidate"])
            if named is None or named.tile is None or not key["op"].startswith("bsr_linear"):
                continue  # what reasoning takes, or the library's product
            tile = named.tile
            which, block = key["op"].split()[1], [int(side) for side in key["block"].split("x")]
            dtype, rows = getattr(torch, key["dtype"]), key["rows"]
            if (launched_for := (table.architecture, which, *block, dtype, tile)) in seen:
                continue
            seen.add(launched_for)
            launch, *_ = bsr_linear_launches(
                which, dtype, (block[0], block[1]), rows, SIZE, SIZE, SIZE, tile
            )
            targets = launched[key["op"], repr(launch)]
            assert not targets or table.architecture in targets, entry
    assert seen


def test_a_tile_is_compiled_for_the_cards_that_take_it(monkeypatch):
    monkeypatch.setattr(compile_report, "source_of", lambda variant: "-")
    everywhere, somewhere = (
        Variant("op", name, "tile", LAUNCH, targets=targets)
        for name, targets in (("a", ()), ("b", ("sm_90",)))
    )
    work = compile_report.work_of([everywhere, somewhere], ["sm_80", "sm_90"])
    asked = [(variant, row.target) for variant, row in work]
    assert asked == [(everywhere, "sm_80"), (everywhere, "sm_90"), (somewhere, "sm_90")]


@pytest.mark.compiles
def test_every_op_is_compiled_for_fp16():
    """Values of 16 bits were bf16 everywhere, whose conversions are others."""
    types = {}
    for variant in variants():
        pointers = {text for text in variant.launch.signature.values() if "fp16" in text}
        types.setdefault(variant.op, set()).update(pointers)
    without = {op for op, found in types.items() if not found}
    # these read and write gates, counts and bits only, or add up sums in fp32
    assert without <= {"gate_penalties", "pack_gates", "gated_to_bsr count"}
    forms = {v.name for v in variants() if v.op == "bsr_linear fwd" and "fp16" in v.name}
    assert {name.split(", ")[2] for name in forms} == {"vector", "x left", "weight left", "pairs"}


@pytest.mark.compiles
def test_report_shows_and_writes_what_was_compiled(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = ["--target", "sm_90", "--target", "gfx1100", "--op", "pack_gates"]
    assert run(*arguments, "--csv", str(path)) == 0
    out, err = capsys.readouterr()
    assert "4 of 4 compiled" in err
    assert f"4 kernels compiled by Triton {triton.__version__}, 0 with violations" in out
    for name in compile_report.COLUMNS.values():
        assert name in out.splitlines()[0]
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == ["sm_90", "gfx1100"] * 2
    for row in rows:
        assert int(row["registers"]) > 0
        assert row["triton"] == triton.__version__
        assert row["spills"] == "0"
        assert row["copy"] in ("4", "8", "16")
        assert row["instruction"] == row["buffers"] == "-"  # no product, nothing to show


@pytest.mark.compiles
def test_report_reads_products(in_this_process, monkeypatch, capsys):
    chosen = [
        next(
            v
            for v in variants()
            if v.op == op and v.product and v.product.half and max(v.rows) > 64
        )
        for op in ("fused fwd", "bsr_linear fwd")
    ]
    gated, blocks = compile_report.report(compile_report.work_of(chosen, ["sm_90"]), jobs=1)
    assert (gated.instruction, gated.left) == ("wgmma", "registers")
    assert blocks.instruction == "wgmma"
    for row, variant in zip((gated, blocks), chosen, strict=True):
        stages = variant.launch.num_stages
        assert stages is not None
        assert max(map(int, row.buffers.split())) in (stages - 1, stages)
        assert "16" in row.copy.split()
        assert row.violations == ""

    monkeypatch.setattr(compile_report, "variants", lambda: chosen[:1])
    monkeypatch.setitem(compile_rules.SHARED_LIMITS, "sm_90", 1024)
    assert run("--target", "sm_90") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("fused fwd")
    assert f"{gated.shared} bytes of shared memory, the card has 1024" in last


CP_ASYNC = "cp.async.cg.shared.global [%r1], [%rd1], {:#x}, {:#x};"
ALLOC = "\n%x = ttg.local_alloc : () -> !ttg.memdesc<{}x64x32xbf16, #shared, #smem, mutable>\n"
DOT = "ttng.warp_group_dot %a, %b, %c : {} * !ttg.memdesc<32x16xbf16, #shared, #smem> -> tensor<>"


@pytest.mark.parametrize(
    ("target", "change", "expected"),
    [
        ("sm_90", {}, []),
        ("sm_90", {"spills": 8}, ["8 bytes spilled"]),
        ("gfx942", {"assembly": "v_mfma", "spills": 8}, ["8 registers spilled"]),
        ("sm_86", {"assembly": "mma.sync", "shared": 101377}, [
            "101377 bytes of shared memory, the card has 101376"]),
        ("sm_90", {"assembly": ""}, ["no matrix instruction instead of wgmma"]),
        ("sm_90", {"assembly": "mma.sync"}, ["mma.sync instead of wgmma"]),
        ("sm_100", {"assembly": "mma.sync"}, [
            "mma.sync instead of tcgen05.mma", "left operand in registers instead of tensor memory"
        ]),
        ("sm_90", {"ttgir": DOT.format("!ttg.memdesc<64x32xbf16, #shared, #smem>")}, [
            "left operand in shared memory instead of registers"]),
    ],
)  # fmt: skip
def test_violations_of_products(target, change, expected):
    product = Product(half=True, left_rows=64, left_direct=True)
    variant = Variant("op", "name", "tile", LAUNCH, product=product)
    given = {
        "assembly": "wgmma", "shared": 1024, "spills": 0, "registers": 64,
        "ttgir": DOT.format("tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0}>>"),
    }  # fmt: skip
    given["ttgir"] += ALLOC.format(2)
    if "ttgir" in change:
        change = {**change, "ttgir": change["ttgir"] + ALLOC.format(2)}
    found = list(compile_rules.violations(variant, target, Compiled(**given | change)))
    assert found == expected


def test_violations_of_copies_and_accesses():
    def found(variant, assembly):
        code = Compiled(assembly, shared=0, spills=0, registers=32)
        return list(compile_rules.violations(variant, "sm_80", code))

    product = Product(half=False, left_rows=16, left_direct=False, copies=(4096, 1024), ahead=False)
    variant = Variant("op", "name", "tile", LAUNCH, product=product)
    both = CP_ASYNC.format(16, 16) + "\n" + CP_ASYNC.format(8, 8)
    assert found(variant, both) == []
    assert found(variant, CP_ASYNC.format(4, 4)) == [
        "tiles copied in pieces of 4 bytes instead of 16 8"
    ]

    variant = Variant("op", "name", "tile", LAUNCH, wide=2, narrow=1)
    load = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\n"
    store = "st.global.L1::evict_last.v4.b32 [ %rd2 + 0 ], { %r1, %r2, %r3, %r4 };\n"
    assert found(variant, load + store + "ld.global.b64 { %rd1 }, [ %rd3 + 0 ];\n") == []
    assert found(variant, load + "st.global.b32 [ %rd2 + 0 ], { %r1 };\n") == [
        "1 accesses of 16 bytes and 1 narrower ones instead of at least 2 and at most 1"
    ]


@pytest.mark.parametrize(
    ("target", "held", "ahead", "expected"),
    [
        ("sm_80", (3, 3), True, []),
        ("sm_90", (4, 3), True, []),
        ("sm_90", (4, 4), True, []),
        ("sm_80", (3, 2), True, ["tiles get 2 buffers, 4 stages take 3"]),
        ("gfx942", (1,), True, ["tiles get 1 buffers, 4 stages take 3"]),
        ("sm_100", (), True, ["tiles get 0 buffers, 4 stages take 3"]),
        ("sm_100", (), False, []),  # elements that are read one by one
        ("gfx942", (), True, []),  # they may wait in registers
    ],
)
def test_a_shallower_pipeline_is_a_violation(target, held, ahead, expected):
    launch = Launch("module", "kernel", {}, {}, num_warps=4, num_stages=4)
    product = Product(half=False, left_rows=64, left_direct=False, ahead=ahead)
    variant = Variant("op", "name", "tile", launch, product=product)
    code = Compiled("", 1024, 0, 64, ttgir="".join(map(ALLOC.format, held)))
    assert code.buffers == held
    assert list(compile_rules.violations(variant, target, code)) == expected
    if held:  # without matrix instructions, too
        alone = replace(variant, product=None)
        assert list(compile_rules.violations(alone, target, code)) == expected


@pytest.mark.parametrize(
    ("held", "op", "left", "expected"),
    [
        ((4, 4), "bsr_linear fwd", "!ttg.memdesc<64x32xbf16, #shared, #smem>", []),
        ((4, 3), "bsr_linear fwd", "tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0}>>", []),
        ((4, 3, 3), "skip fwd", "!ttg.memdesc<64x32xbf16, #shared, #smem>", []),
        ((3, 3), "bsr_linear fwd", "!ttg.memdesc<64x32xbf16, #shared, #smem>", [
            "tiles get 3 buffers, 4 stages take 4"]),
        ((4, 3), "bsr_linear fwd", "!ttg.memdesc<64x32xbf16, #shared, #smem>", [
            "tiles get 3 buffers, 4 stages take 4"]),
        ((3, 3), "skip fwd", "tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0}>>", [
            "tiles get 3 buffers, 4 stages take 4"]),
        ((4, 2), "skip fwd", "tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0}>>", [
            "tiles get 2 buffers, 4 stages take 3"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("target", "instruction", "name"),
    [("sm_90", "wgmma", "warp_group_dot"), ("sm_100", "tcgen05.mma", "tc_gen5_mma")],
)
def test_matrix_units_that_read_shared_memory_take_a_buffer_more(
    held, op, left, expected, target, instruction, name
):
    launch = Launch("module", "kernel", {}, {}, num_warps=4, num_stages=4)
    dot = DOT.replace("warp_group_dot", name).format(left)
    code = Compiled(instruction, 1024, 0, 64, ttgir="".join(map(ALLOC.format, held)) + dot)
    product = Product(half=False, left_rows=64, left_direct=False)
    variant = Variant(op, "name", "tile", launch, product=product)
    assert list(compile_rules.violations(variant, target, code)) == expected


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Variants whose kernels are not there, one that ends the process and one that hangs."""
    monkeypatch.setattr(compile_report, "source_of", lambda variant: "source")
    (tmp_path / "planted_crash.py").write_text("import os; os._exit(9)", encoding="utf-8")
    (tmp_path / "planted_hang.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return [
        Variant("op", name, "tile", replace(LAUNCH, module=f"planted_{name}"))
        for name in ("missing", "crash", "hang", "absent")
    ]


def test_a_compiler_that_dies_or_hangs_is_a_line_of_the_report(planted, monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "_SECONDS", 3.0)
    work = compile_report.work_of(planted, ["sm_90"])
    rows = {row.variant: row for row in compile_report.report(work, jobs=2)}
    assert rows["crash"].violations == "does not compile: its process ended with 9"
    assert rows["hang"].violations == "does not compile: not finished after 3 s"
    for name in ("missing", "absent"):
        assert rows[name].violations.startswith("does not compile: ModuleNotFoundError: ")
    assert {row.registers for row in rows.values()} == {None}
    assert "4 of 4 compiled" in capsys.readouterr().err


class Report:
    """A report on two variants, of which it compiles as many as it may."""

    def __init__(self, path, monkeypatch):
        self.path, self.sources, self.most, self.compiled = path, {"a": "1", "b": "1"}, 9, []
        chosen = [Variant("op", name, "tile", LAUNCH) for name in "ab"]
        monkeypatch.setattr(compile_report, "why_not", lambda: None)
        monkeypatch.setattr(compile_report, "variants", lambda: chosen)
        monkeypatch.setattr(compile_report, "source_of", lambda v: self.sources[v.name])
        monkeypatch.setattr(compile_report, "compile_launch", self.compile)
        self.monkeypatch = monkeypatch

    def compile(self, target, launch):
        if len(self.compiled) == self.most:
            raise KeyboardInterrupt
        self.compiled.append(target)
        return Compiled("", 1024, 0, 64)

    def run(self, *arguments, most=9):
        """The exit status, and how many kernels were compiled."""
        self.most, self.compiled = most, []
        status = run("--target", "sm_80", "--target", "sm_90", "--csv", str(self.path), *arguments)
        return status, len(self.compiled)

    @property
    def rows(self):
        with open(self.path, newline="", encoding="utf-8") as file:
            return [(line["variant"], line["target"]) for line in csv.DictReader(file)]


EVERY = [(name, target) for name in "ab" for target in ("sm_80", "sm_90")]


@pytest.fixture
def reported(in_this_process, tmp_path, monkeypatch):
    return Report(tmp_path / "folder" / "rows.csv", monkeypatch)


def test_a_stopped_report_goes_on_where_it_was(reported, capsys):
    assert reported.run(most=3) == (130, 3)
    assert "the same command goes on" in capsys.readouterr().err
    assert reported.rows == EVERY[:3]
    assert reported.run() == (0, 1)
    said = capsys.readouterr()
    assert "3 of 4 are known" in said.err
    assert "4 kernels compiled by" in said.out
    assert reported.rows == EVERY
    assert reported.run() == (0, 0)
    assert reported.run("--target", "sm_86") == (0, 2)  # what was not asked for stays
    assert len(reported.rows) == 6


def test_a_line_that_a_stop_has_cut_is_compiled_again(reported):
    reported.run()
    whole = reported.path.read_text(encoding="utf-8")
    for cut in (3, 20):
        reported.path.write_text(whole[:-cut], encoding="utf-8")
        assert reported.run() == (0, 1)
        assert reported.path.read_text(encoding="utf-8") == whole


def test_what_has_changed_is_compiled_again(reported, monkeypatch):
    reported.run()
    reported.sources["b"] = "2"
    assert reported.run() == (0, 2)
    assert reported.rows == EVERY
    monkeypatch.setattr(compile_report.triton, "__version__", "99.0")
    assert reported.run() == (0, 4)


def test_what_did_not_compile_is_tried_again(reported, monkeypatch):
    def fail(*_):
        raise RuntimeError("PassManager::run failed\nsomewhere")

    monkeypatch.setattr(compile_report, "compile_launch", fail)
    assert reported.run()[0] == 1
    with open(reported.path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {line["violations"] for line in lines} == {
        "does not compile: RuntimeError: PassManager::run failed somewhere"
    }
    assert {line["registers"] for line in lines} == {"-"}
    monkeypatch.setattr(compile_report, "compile_launch", reported.compile)
    assert reported.run() == (0, 4)


def test_a_violation_that_is_known_still_gives_1(reported):
    row = Row("op", "a", "", "tile", "sm_80", triton.__version__, 64, 1024, 8, None, None, None,
              None, "8 bytes spilled", "1")  # fmt: skip
    reported.path.parent.mkdir()
    write_rows(reported.path, [astuple(row)])
    assert reported.run() == (1, 3)


def test_a_file_that_is_no_report_is_not_replaced(reported, capsys):
    reported.path.parent.mkdir()
    reported.path.write_text("a,b\n1,2\n", encoding="utf-8")
    assert reported.run() == (2, 0)
    assert "is no report: its columns are" in capsys.readouterr().err
    assert reported.path.read_text(encoding="utf-8") == "a,b\n1,2\n"


@pytest.mark.compiles
def test_a_source_is_that_of_kernel_launch_and_rules(monkeypatch):
    one, other = (v for v in variants()[:2])
    assert compile_report.source_of(one) == compile_report.source_of(one)
    wider = replace(one, launch=replace(one.launch, num_warps=one.launch.num_warps * 2))
    found = {compile_report.source_of(v) for v in (one, other, wider)}
    assert len(found) == 3
    before = compile_report.source_of(one)
    monkeypatch.setattr(compile_report, "_rules", lambda: b"other rules")
    assert compile_report.source_of(one) != before
    assert not any(" at 0x" in repr(v) for v in variants())  # they would differ between processes


HEADER = (
    "op,variant,rows,tile,target,triton,registers,shared,spills,instruction,left,copy,buffers,"
    "violations,source\n"
)


def test_reports_of_several_tritons_are_joined_in_one_order(tmp_path, capsys):
    lines = [
        f"{op},bf16,16,n64,{target},{version},32,0,0,-,-,16,-,,abc\n"
        for op in ("b", "a") for target in ("gfx942", "sm_90") for version in ("3.10.0", "3.6.0")
    ]  # fmt: skip
    paths = [tmp_path / "one.csv", tmp_path / "two.csv"]
    paths[0].write_text(HEADER + "".join(lines[::2]), encoding="utf-8")
    paths[1].write_text(HEADER + "".join(lines[1::2] + lines[:1]), encoding="utf-8")
    out = tmp_path / "joined" / "all.csv"
    assert run("--join", *map(str, paths), "--csv", str(out)) == 0
    assert capsys.readouterr().out == "8 kernels, Triton 3.6.0, 3.10.0: 0 with violations\n"
    found = out.read_text(encoding="utf-8").splitlines(keepends=True)
    # targets as the table has them, versions as numbers
    assert found == [HEADER, *(lines[i] for i in (7, 6, 5, 4, 3, 2, 1, 0))]
    assert run("--join", *map(str, paths[::-1]), "--csv", str(out)) == 0
    assert out.read_text(encoding="utf-8").splitlines(keepends=True) == found

    paths[0].write_text(
        HEADER + lines[0].replace(",,abc", ",8 bytes spilled,abc"), encoding="utf-8"
    )
    assert run("--join", str(paths[0]), "--csv", str(out)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read: No such file"), ("a,b\n1,2\n", "is no report: its columns are")],
)
def test_what_is_no_report_is_not_joined(text, message, tmp_path, capsys):
    path, out = tmp_path / "one.csv", tmp_path / "all.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert run("--join", str(path), "--csv", str(out)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert run("--join", str(path)) == 2
    assert "--join needs --csv" in capsys.readouterr().err


def test_widths_of_amd_accesses():
    text = "global_load_dwordx4 v[0:3]\n buffer_load_ushort v1\n global_store_b64 v2\n"
    code = Compiled(text, shared=0, spills=0, registers=32)
    assert code.loads == (16, 2)
    assert code.accesses == (16, 2, 8)


def test_where_nothing_can_be_compiled_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "why_not", lambda: "no compiler")
    assert run() == 2
    assert capsys.readouterr().err == "bench: error: no compiler\n"


@pytest.mark.compiles
def test_an_unknown_op_is_refused(capsys):
    assert run("--op", "nothing") == 2
    assert "--op must be one of gate_weight" in capsys.readouterr().err
