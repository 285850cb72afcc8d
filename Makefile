# make train | test | docs: each sets up what it needs (Python 3.10+) in $(VENV)
PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.PHONY: serve train test test-processors test-lowest teacher results docs ablation paper clean clean-notebooks help reproduce

help:
	@echo "make train    set up, then distil the toy student from the shipped teacher (papermill nbs/train.ipynb -p method query)"
	@echo "make test     set up, then run every test"
	@echo "make test-processors   what depends on numbers, with the kernels of other processors, one and two threads: a table (SETTINGS='OMP_NUM_THREADS=2' PARTS='nbs/distill tests/test_cache.py': those alone)"
	@echo "make test-lowest   every test with the lowest versions that pyproject.toml declares (PY=python3.10)"
	@echo "make teacher  train the embedded teacher again (about an hour on 2 cores)"
	@echo "make results  the study from nothing: make ablation, the strengths, the shipped student; then the tables and pictures that are written from them"
	@echo "make serve    the toy student on http://localhost:8000 (make serve ARGS='--weights model.onnx --port 80')"
	@echo "make docs     every notebook with its outputs, the API and the guides as a site, offline: _site/index.html"
	@echo "make ablation every method, its controls, six seeds, on toy: a night on 2 cores; again to go on (papermill nbs/ablation.ipynb -p preset toy)"
	@echo "make paper    the manuscript from the committed result files: paper/paper.pdf (needs LaTeX)"
	@echo "make reproduce RUN=toy-none   train a published run again: its metrics must come out the same to the last digit (minutes)"
	@echo "make clean-notebooks   before a commit: no metadata of one machine, old outputs where only noise differs, no heavy picture"
	@echo "make clean    remove the virtual environment and what was generated"

$(VENV)/.ready: pyproject.toml
	@$(PY) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"Python 3.10 or later is needed, {sys.executable} is {v[0]}.{v[1]}: call make PY=<another python>")'
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev,docs]'
	@touch $@

train: $(VENV)/.ready
	$(BIN)/papermill nbs/train.ipynb -p method query

test: $(VENV)/.ready
	bash tests/all.sh $(BIN)

test-processors: $(VENV)/.ready
	bash tests/processors.sh $(BIN) $(SETTINGS)

$(VENV)/.lowest: pyproject.toml
	test -x $(VENV)/lowest/bin/python || $(PY) -m venv $(VENV)/lowest
	$(VENV)/lowest/bin/python -m pip install -q uv
	$(VENV)/lowest/bin/uv pip install -q --python $(VENV)/lowest/bin/python --resolution lowest-direct -e '.[dev]'
	@touch $@

test-lowest: $(VENV)/.lowest
	bash tests/all.sh $(VENV)/lowest/bin

teacher: $(VENV)/.ready
	$(BIN)/papermill nbs/train.ipynb -p size toy_teacher -p epochs 20 -p lr 1e-3 -p precision bfloat16 -p zoom_out 0.2 -p iou_crop 0.3 -p name toy_teacher
	$(BIN)/python -c 'from rtdetr_kd.weights import ship; ship("runs/toy_teacher", "weights/toy_teacher.safetensors")'

results: ablation
	export OMP_NUM_THREADS=1; set -e; for m in cwd feature logit query query+feature; do $(BIN)/papermill nbs/train.ipynb -p method $$m -p rho 0.2; done; \
	for a in index hungarian; do $(BIN)/papermill nbs/train.ipynb -p method query -p alignment $$a -p rho 0.2; done
	$(BIN)/python -c 'from rtdetr_kd.weights import ship; ship("runs/toy-query+cwd", "weights/toy_student.safetensors")'
	$(BIN)/python -c 'from rtdetr_kd.export import write_onnx; from rtdetr_kd.weights import load_model; write_onnx(load_model("weights/toy_student.safetensors"), "weights/toy_student.onnx")'
	$(BIN)/python -m rtdetr_kd.results --publish runs/toy-*
	$(BIN)/python -m rtdetr_kd.matches --published runs/toy-*
	$(BIN)/python -m rtdetr_kd.study
	$(BIN)/python -m rtdetr_kd.results --figures

$(VENV)/.serve: pyproject.toml
	@$(PY) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"Python 3.10 or later is needed, {sys.executable} is {v[0]}.{v[1]}: call make PY=<another python>")'
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[serve]'
	@touch $@

serve: $(VENV)/.serve
	@$(BIN)/python -m rtdetr_kd.serve $(ARGS)

docs: $(VENV)/.ready
	MPLBACKEND=agg $(BIN)/python -W ignore docs/build.py

ablation: $(VENV)/.ready
	$(BIN)/papermill nbs/ablation.ipynb -p preset toy

RUN ?= toy-none
reproduce: $(VENV)/.ready
	$(BIN)/python -m rtdetr_kd.results --reproduce $(RUN)

clean-notebooks: $(VENV)/.ready
	$(BIN)/nbdev_clean
	$(BIN)/python tests/outputs.py

paper: $(VENV)/.ready
	$(BIN)/python -m rtdetr_kd.paper

clean:
	rm -rf $(VENV) build *.egg-info _proc _site _site_src
