# Each target sets up what it needs: `make demo` and `make test` are all a fresh clone takes.
VENV ?= .venv
VENV_NATIVE ?= .venv-native
PYTHON ?= python3
OUT ?= sgtriton-demo
TRITONS ?= 3.6.0 3.8.0 newest
# for compile-report, such as --op "bsr_linear fwd" --target sm_90
REPORT ?=
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

# Kernels are small here and tests run side by side: one thread each.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest
PYTEST_NATIVE = TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(VENV_NATIVE)/bin/python -m pytest

.PHONY: demo test test-slow test-native bench-train bench-serve compile-report check format clean

demo: $(VENV)/.demo
	$(VENV)/bin/python -m sgtriton demo --out $(OUT)

# first with the kernels interpreted, then the tests that compile them for cards
test: $(VENV)/.test
	TRITON_INTERPRET=1 $(PYTEST) -n 2 --dist worksteal
	TRITON_INTERPRET=0 $(PYTEST) -n 2 --dist worksteal -m compiles

# what takes minutes
test-slow: $(VENV)/.test
	TRITON_INTERPRET=1 $(PYTEST) --slow -m slow

# the kernels' tests again, compiled to native code by Triton's CPU compiler
test-native: $(VENV_NATIVE)/.test
	$(PYTEST_NATIVE) -n 2 --dist worksteal -m "not compiles" \
	    tests/test_gate.py tests/test_gate_bits.py tests/test_gated_matmul.py \
	    tests/test_gated_product.py tests/test_penalty.py tests/test_bsr_matmul.py \
	    tests/test_bsr_product.py tests/test_bsr_conv.py tests/test_bsr_convert.py
	$(PYTEST_NATIVE) -n 2 --dist worksteal -m native \
	    tests/test_candidates.py tests/test_conv_candidates.py

# what a gated training step costs beside the dense one; then the kernels in native code
bench-train: $(VENV)/.test $(VENV_NATIVE)/.test
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m bench sweep train
	OMP_NUM_THREADS=2 TRITON_INTERPRET=0 PYTHONPATH=.:kernels \
	    $(VENV_NATIVE)/bin/python -m bench bandwidth
	$(VENV)/bin/python -m bench report

# a pruned layer served beside the dense one and other libraries; then the kernel in native code
bench-serve: $(VENV)/.test $(VENV)/.peers $(VENV_NATIVE)/.test
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m bench sweep serve
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m bench overhead
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m bench sweep conv
	OMP_NUM_THREADS=2 $(VENV)/bin/python -m bench sweep model
	OMP_NUM_THREADS=2 TRITON_INTERPRET=0 PYTHONPATH=.:kernels \
	    $(VENV_NATIVE)/bin/python -m bench native
	$(VENV)/bin/python -m bench report

# what three compilers make of every kernel for every card: the oldest that is supported, the one
# that tests run with, the newest; hours on two cores, of which a stop loses nothing: what has not
# changed since it was compiled is not compiled again
compile-report: $(TRITONS:%=$(VENV)-triton-%/.triton)
	$(VENV)-triton-newest/bin/python $(PIP_INSTALL) --upgrade triton
	status=0; for version in $(TRITONS); do \
	    TRITON_INTERPRET=0 PYTHONPATH=.:kernels $(VENV)-triton-$$version/bin/python \
	        -m bench.compile_report $(REPORT) --csv $(VENV)-triton-$$version/report.csv \
	        || status=$$?; done; \
	PYTHONPATH=.:kernels $(VENV)-triton-newest/bin/python -m bench.compile_report \
	    --join $(TRITONS:%=$(VENV)-triton-%/report.csv) --csv bench/results/compile_report.csv \
	    || status=$$?; exit $$status

check: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.test
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV_NATIVE) $(TRITONS:%=$(VENV)-triton-%)

# An installation is current while it is newer than what it was made from.
$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[$*]'
	touch $@

# This fork of Triton takes the import name `triton`, so it needs an environment of its own.
$(VENV_NATIVE)/.test: pyproject.toml constraints.txt | $(VENV_NATIVE)/bin/python
	$(VENV_NATIVE)/bin/python $(PIP_INSTALL) --constraint constraints.txt \
	    torch numpy safetensors packaging filelock pytest pytest-timeout pytest-xdist hypothesis
	# a CUDA build of torch brings the other Triton: out with it, and with what the two mixed
	if $(VENV_NATIVE)/bin/python -m pip show --quiet triton 2>/dev/null; then \
	    $(VENV_NATIVE)/bin/python -m pip uninstall --quiet --yes triton fbtriton; fi
	$(VENV_NATIVE)/bin/python $(PIP_INSTALL) fbtriton==3.8.0rc3
	touch $@

# Each Triton beside the same PyTorch; a CUDA build of PyTorch would pin its own.
$(VENV)-triton-%/.triton: pyproject.toml constraints.txt | $(VENV)-triton-%/bin/python
	$(VENV)-triton-$*/bin/python $(PIP_INSTALL) --constraint constraints.txt \
	    torch numpy safetensors packaging filelock
	$(VENV)-triton-$*/bin/python $(PIP_INSTALL) --upgrade triton$(if $(filter newest,$*),,==$*)
	touch $@

$(VENV)/bin/python $(VENV_NATIVE)/bin/python $(TRITONS:%=$(VENV)-triton-%/bin/python):
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)
	$@ $(PIP_INSTALL) --upgrade pip
