# make train | test | docs: each sets up what it needs (Python 3.10+) in $(VENV)
PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.PHONY: train test teacher results ablation paper clean help

help:
	@echo "make train    set up, then distil the toy student from the shipped teacher (papermill nbs/train.ipynb -p method query)"
	@echo "make test     set up, then run every test"
	@echo "make teacher  train the embedded teacher again (about an hour on 2 cores)"
	@echo "make results  run none, logit and query on toy; write the README's table and pictures"
	@echo "make ablation every method, its controls, six seeds, on toy: a night on 2 cores; again to go on (papermill nbs/ablation.ipynb -p preset toy)"
	@echo "make paper    the manuscript from the committed result files: paper/paper.pdf (needs LaTeX)"
	@echo "make clean    remove the virtual environment and what was generated"

$(VENV)/.ready: pyproject.toml
	@$(PY) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"Python 3.10 or later is needed, {sys.executable} is {v[0]}.{v[1]}: call make PY=<another python>")'
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

train: $(VENV)/.ready
	$(BIN)/papermill nbs/train.ipynb -p method query

test: $(VENV)/.ready
	bash tests/all.sh $(BIN)

teacher: $(VENV)/.ready
	$(BIN)/papermill nbs/train.ipynb -p size toy_teacher -p epochs 20 -p lr 1e-3 -p precision bfloat16 -p zoom_out 0.2 -p iou_crop 0.3 -p name toy_teacher
	$(BIN)/python -c 'from rtdetr_kd.weights import ship; ship("runs/toy_teacher", "weights/toy_teacher.safetensors")'

results: $(VENV)/.ready
	for m in none logit query; do $(BIN)/papermill nbs/train.ipynb -p method $$m || exit 1; done
	$(BIN)/python -c 'from rtdetr_kd.weights import ship; ship("runs/toy-query", "weights/toy_student.safetensors")'
	$(BIN)/python -m rtdetr_kd.results --figures --publish runs/toy_teacher runs/toy-none runs/toy-logit runs/toy-query

ablation: $(VENV)/.ready
	$(BIN)/papermill nbs/ablation.ipynb -p preset toy

paper: $(VENV)/.ready
	$(BIN)/python -m rtdetr_kd.paper

clean:
	rm -rf $(VENV) build *.egg-info _proc _site
