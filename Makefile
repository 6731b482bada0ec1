# make demo | test | figures | report | bench: each sets up .venv on first use.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export DATA_DIR ?= $(CURDIR)/data

.PHONY: demo test lint figures report clean

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

test: $(VENV)/installed lint
	$(PYTHON) -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) results/demo figures/demo
