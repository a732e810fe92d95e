"""Cross-compilation for every card, shared with the benchmarks' compile report."""

from bench.cards import CARDS as CARDS
from bench.cards import Compiled as Compiled
from bench.cards import compile_for as compile_for
