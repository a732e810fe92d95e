"""What no run on a CPU can see in a kernel: the interpreter fills masked lanes with 0."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "kernels" / "sgtriton_kernels"
SOURCES = sorted(p for p in KERNELS.glob("*.py") if "@triton.jit" in p.read_text(encoding="utf-8"))


def masked_loads_without_fill(source: str) -> list[int]:
    """Line numbers of `tl.load` calls with a mask and without `other`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.load"
        and {"mask"} <= {keyword.arg for keyword in node.keywords}
        and "other" not in {keyword.arg for keyword in node.keywords}
    ]


def test_the_check_finds_a_planted_fault():
    assert masked_loads_without_fill("x = tl.load(p, mask=m)\ny = tl.load(p, mask=m, other=0)") == [
        1
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_masked_loads_say_what_fills_them(path):
    source = path.read_text(encoding="utf-8")
    assert masked_loads_without_fill(source) == []
    assert "mask=" in source or "_kernel(" not in source  # there is something to look at


def specialised_sizes(source: str) -> list[str]:
    """Kernels whose sizes and strides are not all declared to compile once for every value."""
    wrong = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
            continue
        for decorator in node.decorator_list:
            declared = []
            if isinstance(decorator, ast.Call):
                declared = ast.literal_eval(decorator.keywords[0].value)
            sizes = [
                arg.arg
                for arg in node.args.args
                if arg.annotation is None and not arg.arg.endswith("_ptr")
            ]
            if declared != sizes:
                wrong.append(node.name)
    return wrong


def test_the_check_finds_a_specialised_size():
    kernel = "def _a_kernel(x_ptr, M, K, BLOCK: tl.constexpr): pass"
    assert specialised_sizes(f"@triton.jit(do_not_specialize=['M'])\n{kernel}") == ["_a_kernel"]
    assert specialised_sizes(f"@triton.jit\n{kernel}") == ["_a_kernel"]
    assert specialised_sizes(f"@triton.jit(do_not_specialize=['M', 'K'])\n{kernel}") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_size_or_stride_is_specialised(path):
    """A new batch size compiles nothing."""
    assert specialised_sizes(path.read_text(encoding="utf-8")) == []


def narrow_program_ids(source: str) -> list[int]:
    """Line numbers of `tl.program_id` calls that are not widened to 64 bits at once."""
    tree = ast.parse(source)
    widened = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and "tl.int64" in map(ast.unparse, node.args)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.program_id"
        and id(node) not in widened
    ]


def test_the_check_finds_a_narrow_program_id():
    source = "pid = tl.program_id(0)\nwide = tl.program_id(1).to(tl.int64)"
    assert narrow_program_ids(source) == [1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_program_ids_are_widened_before_they_are_multiplied(path):
    assert narrow_program_ids(path.read_text(encoding="utf-8")) == []


def test_triton_is_imported_in_one_place():
    for path in KERNELS.glob("*.py"):
        if path.name != "_triton.py":
            assert "import triton" not in path.read_text(encoding="utf-8"), path.name
