# Every target works from a bare clone: Python >= 3.11 and make are all it needs.
PYTHON ?= python3
# Versions to install: constraints-lowest.txt has the lowest ones of the core's dependencies.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin

.PHONY: demo lint test test-claims test-cluster test-faults test-long \
  test-kernels test-peft check gpu-check figures notebooks docs data bench fuzz clean

demo: .venv/.demo
	$(BIN)/lora-analysis demo -o runs/demo

# What .ci/run runs: one file of tests a worker, for the fixtures that a file shares.
test: lint
	$(BIN)/pytest -n auto --dist loadfile -m "not long and not cluster and not faults and not claims"

# What takes half a minute or more and repeats, at full size, what `make test` has in small.
test-long: .venv/.dev
	$(BIN)/pytest -n auto --dist loadfile -m long

# Work through a Ray cluster of two nodes, both on this machine.
test-cluster: .venv/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[ray]'
	$(BIN)/pytest -m cluster

# The numeric tests with the kernels of other processors: what this one chooses, those for AVX2, and
# those for every x86-64. Bounds come from the arithmetic, so they hold under each.
NUMERIC := $(addprefix tests/test_,$(addsuffix .py,adapter amplify* bases_* chance* conclusions_* \
  doctests edit* effective fine_tunes formats_* groups* intruders linalg* lora_* pairwise* plots_* \
  reproduction shared_init similarity spectra studies* training_* weight_changes))
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
test-kernels: .venv/.dev
	$(BIN)/pytest -n auto --dist loadfile -m "not cluster" $(NUMERIC)
	$(AVX2) $(BIN)/pytest -n auto --dist loadfile -m "not cluster" $(NUMERIC)
	ATEN_CPU_CAPABILITY=default $(BIN)/pytest -n auto --dist loadfile -m "not cluster" $(NUMERIC)

# PEFT's own tests as a client: every adapter that they save is read and compared with PEFT's layers.
# make test-peft PEFT_TESTS=/path/to/peft/tests, of the version that is installed.
test-peft: .venv/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) \
	  datasets diffusers parameterized
	cd tests && ../$(BIN)/python -m peft_client $(abspath $(PEFT_TESTS))

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The quick half, for while you work.
check: lint
	$(BIN)/pytest -n auto --dist loadfile -m "not slow and not cluster and not faults and not claims"

# Every file operation of every verb that writes fails once, by a full disk, an error or a kill.
test-faults: .venv/.dev
	$(BIN)/pytest -n auto -m faults

# Simulates studies of known truth, and counts how often conclusions about them are false. TRIALS=n
# of each kind; 400 take some two hours on two cores.
test-claims: .venv/.dev
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n auto -m claims

figures: .venv/.demo
	$(BIN)/python -m lora_analysis demo -o runs/demo
	$(BIN)/python figures/make.py runs/demo figures

# The eighth needs adapters of others, which notebooks/authors.toml names and this project lacks.
notebooks: .venv/.notebook
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False notebooks/0[1-7]*.ipynb \
	  $(if $(wildcard notebooks/adapters),notebooks/08*.ipynb)

# Runs every page, so that what it shows is what this version gives; nothing is fetched.
docs: .venv/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# Pretrains the demo's base model again and writes data/.
data: .venv/.demo
	$(BIN)/python -m lora_analysis.training.pretrain data

# Compares with PEFT among others, so it needs what the tests need; some 20 minutes.
bench: .venv/.dev
	$(BIN)/python -m benchmarks --write

# For a machine with a GPU, without network, under 8 minutes: the tests on CUDA, then its numbers
# against the CPU's and step times, which go into benchmarks/RESULTS.md with the card's name.
gpu-check: .venv/.dev
	$(BIN)/python -c "import torch; exit(None if torch.cuda.is_available() else 'no CUDA device')"
	$(BIN)/pytest -n 0 -k cuda tests/test_spectra.py tests/test_training_executors.py
	$(BIN)/python -m benchmarks gpu --rounds 5 --write

# Damages adapters and bases of every format at random for a minute; SEED=n draws other damage.
# Guided by coverage, one format at a time: tests/fuzz/guided.py.
fuzz: .venv/.dev
	cd tests && ../$(BIN)/python -m fuzz --seed $(or $(SEED),0)

clean:
	rm -rf .venv build dist runs docs/_build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; name one with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,docs,test]'
	@touch $@

.venv/.notebook: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) \
	  -e '.[demo,demo-text,notebook]' peft
	@touch $@

.venv/.docs: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[demo,docs]'
	@touch $@
