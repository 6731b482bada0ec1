# make demo | test | figures | report | bench: each sets up .venv on first use.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export DATA_DIR ?= $(CURDIR)/data

.PHONY: demo again test browser colab flower lint figures bench report trust mutants clean

$(VENV)/installed: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt \
		nbclient nbformat ipykernel pytest hypothesis ruff
	touch $@

demo: $(VENV)/installed  ## all notebooks in the demo preset, on a CPU in minutes
	PRESET=demo $(PYTHON) tests/run_notebooks.py --out results/demo/notebooks

figures: $(VENV)/installed  ## figures/ again from results/, training nothing
	PRESET=$(or $(PRESET),small) TRAIN=no $(PYTHON) tests/run_notebooks.py

report: $(VENV)/installed  ## report/report.pdf from results/ and figures/; its numbers alone without TeX
	$(PYTHON) -m report.make_numbers
	@if command -v latexmk && command -v pdflatex && command -v bibtex; then cd report && \
		SOURCE_DATE_EPOCH=0 latexmk -gg -pdf -interaction=nonstopmode -halt-on-error report.tex; \
	else echo "report.pdf is left as it is: no latexmk, pdflatex or bibtex (texlive-latex-extra)"; fi

bench: $(VENV)/installed  ## speed and memory as ratios, into benchmarks/results/
	-$(VENV)/bin/pip install --quiet --disable-pip-version-check "flwr[simulation]==1.41.0"
	for script in round_cost against_naive scaling gpu against_flower; do \
		$(PYTHON) benchmarks/$$script.py || exit 1; done

test: $(VENV)/installed lint
	$(PYTHON) -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

trust: $(VENV)/installed  ## runs killed at chosen moments, then faults, foreign files, bad input
	OMP_NUM_THREADS=1 $(PYTHON) tests/crash_campaign.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(addprefix tests/test_,$(addsuffix .py,\
		faults untrusted bad_input determinism resume))

mutants: $(VENV)/installed  ## the code broken on purpose, which the tests must notice
	OMP_NUM_THREADS=1 $(PYTHON) tests/mutants.py

clean:
	rm -rf $(VENV) results/demo figures/demo
