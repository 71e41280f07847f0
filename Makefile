# Each target is a task of tools/tasks.py, which needs nothing but Python 3.11 or newer. `make` lists them.
PYTHON ?= python3
.PHONY: help setup demo test test-slow docs lab outputs bench lint
help:
	@$(PYTHON) tools/tasks.py
setup:      ## make .venv with the pinned versions
demo:       ## fine-tune SmolLM2, compare it with its base, write a report
test:       ## everything a change must pass
test-slow:  ## other libraries, kills, two processes, the browser, Colab, sabotage
docs:       ## build and check the site
lab:        ## open the notebooks in JupyterLab
outputs:    ## run the chapters that changed and keep their outputs
bench:      ## side by side with peers, on an idle machine
lint:       ## ruff
setup demo test test-slow docs lab outputs bench lint:
	@$(PYTHON) tools/tasks.py $@ $(ARGS)
