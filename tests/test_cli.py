import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sgtriton.cli import main
from sgtriton.options import parse_block


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("4x4", (4, 4)),
        ("1x1", (1, 1)),
        ("16X8", (16, 8)),
        ("1xfull", (1, None)),
        ("fullx1", (None, 1)),
        ("FULLxfull", (None, None)),
        (" 32x32 ", (32, 32)),
    ],
)
def test_parse_block(text, block):
    assert parse_block(text) == block


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "x",
        "4x",
        "4x4x4",
        "0x4",
        "4x0",
        "-4x4",
        "4x-4",
        "4.5x4",
        "4 4",
        "axb",
        "٤x٤",
        "4,4",
    ],
)
def test_parse_block_says_what_is_allowed(text):
    with pytest.raises(ValueError, match="block must be two sides of 1 or more or 'full'") as error:
        parse_block(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "nonsense"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "--block", "0x4"], "block must be two sides"),
        (["demo", "--block=-4x4"], "block must be two sides"),
        (["demo", "--target", "1"], "target must be in [0, 1), got 1.0"),
        (["demo", "--target=-0.1"], "target must be in [0, 1), got -0.1"),
        (["demo", "--target", "nan"], "target must be in [0, 1), got nan"),
        (["demo", "--target", "much"], "target must be a number, got 'much'"),
        (["demo", "--epochs", "0"], "epochs must be 1 or more, got 0"),
        (["demo", "--epochs", "2.5"], "epochs must be a whole number, got '2.5'"),
        (["demo", "--seed", "-1"], "seed must be in [0, 2**63), got -1"),
        (["demo", "--model", "vgg"], "model must be one of lenet300, lenet5, got 'vgg'"),
        (
            ["demo", "--gate", "soft"],
            "gate must be one of threshold, bernoulli, hard_concrete, got 'soft'",
        ),
        (["demo", "--data", "nowhere"], "nowhere is no folder"),
        (["demo", "--out", "a-file"], "out: cannot write into the folder a-file"),
        (["demo", "--out", "a-file/below"], "out: cannot write into the folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("in the way")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("sgtriton: error: ")
    assert text in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path, capsys):
    if os.geteuid() == 0:
        pytest.skip("root writes into every folder")
    tmp_path.chmod(0o500)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "cannot write into the folder" in capsys.readouterr().err


def test_version_and_help(capsys):
    for argument, text in (("--version", "sgtriton "), ("--help", "demo")):
        with pytest.raises(SystemExit) as end:
            main([argument])
        assert end.value.code == 0
        assert text in capsys.readouterr().out


def test_a_keyboard_interrupt_ends_quietly(monkeypatch, capsys):
    from sgtriton.demo import run

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    assert main(["demo"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child process")
def test_ctrl_c_while_training_exits_130_without_traceback(tmp_path):
    command = [sys.executable, "-m", "sgtriton", "demo", "--epochs", "5000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        # a test run in the background ignores the signal, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("train"):
        assert process.poll() is None, process.stderr and process.stderr.read()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    # Python dies of the signal itself where it met code that was being executed by an import
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err
    assert err.rstrip().endswith("sgtriton: interrupted")


def test_the_module_runs_and_a_closed_pipe_is_no_traceback(tmp_path):
    command = [sys.executable, "-m", "sgtriton", "demo", "--epochs", "1", "--target", "0.5"]
    command += ["--json", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["predictions_equal"] is True

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def _environment() -> dict[str, str]:
    """Of a child that finds both packages, also where they are not installed."""
    path = os.pathsep.join(p for p in [*sys.path, os.environ.get("PYTHONPATH")] if p)
    return {**os.environ, "PYTHONPATH": path}
