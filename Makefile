# make demo | test | figures | report | budget | bench: each sets up .venv on first use.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export DATA_DIR ?= $(CURDIR)/data

.PHONY: demo again test browser colab flower lint figures budget bench report trust mutants clean

$(VENV)/installed: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt \
		nbclient nbconvert latex2mathml nbformat ipykernel pytest pytest-xdist hypothesis ruff
	touch $@

$(VENV)/extras: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "flwr[simulation]>=1.41" \
		jupyterlab playwright
	touch $@

demo: $(VENV)/installed  ## all notebooks in the demo preset, on a CPU in minutes
	PRESET=demo $(PYTHON) tests/run_notebooks.py --out results/demo/notebooks

again:  ## after demo: everything is found, and what is deleted comes back the same
	$(PYTHON) tests/rerun_demo.py

figures: $(VENV)/installed  ## figures/ and report/notebooks/*.html from results/, training nothing
	PRESET=$(or $(PRESET),small) TRAIN=no $(PYTHON) tests/run_notebooks.py --html report/notebooks

budget: $(VENV)/installed  ## what each preset and notebook costs: runs, images, FLOP, hours
	@$(PYTHON) -m notebooks.experiments budget

report: $(VENV)/installed  ## report/report.pdf from results/ and figures/; its numbers alone without TeX
	$(PYTHON) -m report.make_numbers --preset $(or $(PRESET),small) $(if $(SEEDS),--seeds $(SEEDS))
	@if command -v latexmk && command -v pdflatex && command -v bibtex; then cd report && \
		SOURCE_DATE_EPOCH=0 latexmk -gg -pdf -interaction=nonstopmode -halt-on-error report.tex; \
	else echo "report.pdf is left as it is: no latexmk, pdflatex or bibtex (texlive-latex-extra)"; fi

bench: $(VENV)/extras  ## speed and memory as ratios, into benchmarks/results/
	for script in round_cost against_naive scaling sparse workers gpu against_flower; do \
		$(PYTHON) benchmarks/$$script.py || exit 1; done

test: $(VENV)/installed lint  ## on a CPU, without network; browser and Flower have their own
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal --ignore tests/test_flower.py

browser: $(VENV)/extras  ## a person at the panel: JupyterLab in Debian's Chromium
	command -v chromium || { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null || true
	$(PYTHON) -m pytest -m browser -rs tests/test_browser.py

colab: $(VENV)/installed  ## the panel and a notebook under Colab's versions of what shows them
	python3 -m venv .venv-colab
	.venv-colab/bin/pip install --quiet --disable-pip-version-check \
		ipywidgets==7.7.1 ipykernel==6.17.1 ipython==7.34.0
	for own in $$(ls -d .venv-colab/lib/python3*/site-packages); do \
		ls -d $(CURDIR)/$(VENV)/lib/python3*/site-packages > $$own/zz-the-rest.pth; done
	.venv-colab/bin/python -m pytest tests/test_panel.py
	PRESET=demo .venv-colab/bin/python tests/run_notebooks.py 03

flower: $(VENV)/extras  ## the Flower app, on its simulation engine and over a real SuperLink
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/test_flower.py $(FAILED)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

trust: $(VENV)/installed  ## runs killed at chosen moments, then faults, foreign files, bad input
	OMP_NUM_THREADS=1 $(PYTHON) tests/crash_campaign.py
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(addprefix tests/test_,$(addsuffix .py,\
		faults untrusted bad_input determinism resume))

# The method in utils.py: data and shards, task vectors, SparseSGDM, sensitivity, masks, federation.
METHOD := split shard _shard_by_classes _shard_by_dirichlet cohort_size cohort add scale negate \
	task_vector apply_vector squared_norm flatten unflatten decay_and_mask_ _check_mask maskable \
	squared_gradients sensitivity _draw_labels select_lowest _query_key calibrate_mask \
	_combined_scores learning_rate local_step client_update accumulate_update shares_of federated_round

mutants: $(VENV)/installed  ## the method broken on purpose in mutants/, which the tests must notice
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "mutmut>=3.8"
	OMP_NUM_THREADS=1 nice -n 19 $(VENV)/bin/mutmut run --max-children 2 \
		"utils.xǁSparseSGDMǁ*" "utils.xǁFedAvgǁ*" $(foreach name,$(METHOD),"utils.x_$(name)__mutmut_*")
	$(VENV)/bin/mutmut results | grep -v "not checked" || true

clean:
	rm -rf $(VENV) .venv-colab results/demo figures/demo mutants
