# `make book` renders the book, `make test` passes the tests; both make the environment first. See README.md.
PYTHON ?= python3
TPBOOK_DATA ?= ../shared/data
TPBOOK_WEIGHTS ?= ../shared/weights
ifneq ($(words $(CURDIR)) $(words $(TPBOOK_DATA)) $(words $(TPBOOK_WEIGHTS)),1 1 1)
$(error make cannot work where a path has a space in it: $(CURDIR), TPBOOK_DATA=$(TPBOOK_DATA), TPBOOK_WEIGHTS=$(TPBOOK_WEIGHTS))
endif
# absolute, since notebooks run in their own folder
override TPBOOK_DATA := $(abspath $(TPBOOK_DATA))
override TPBOOK_WEIGHTS := $(abspath $(TPBOOK_WEIGHTS))
export TPBOOK_DATA TPBOOK_WEIGHTS

photographs := $(and $(wildcard $(TPBOOK_DATA)/imagenette2-160),$(wildcard $(TPBOOK_DATA)/nips2017-dev),$(wildcard $(TPBOOK_WEIGHTS)/deit_tiny_patch16_224.safetensors))
PROFILE ?= $(if $(photographs),imagenette,digits)

installed := .venv/.ready
env := .venv/.kernels
bin := .venv/bin
out := _build/$(PROFILE)
package := $(shell find tpbook -type f -not -path '*/__pycache__/*')
pages := $(wildcard book/* book/*/* _config.yml _toc.yml)
javascript := _build/javascript/.ready
editions := digits imagenette
sites := $(editions:%=_build/%/site/_build/html/index.html)
site := $(out)/site/_build/html/index.html
asked := $(if $(filter books,$(MAKECMDGOALS)),$(editions),$(PROFILE))
ifeq ($(filter-out book books serve,$(or $(MAKECMDGOALS),book)),)
MAKEFLAGS += --jobs=2 # npm beside the notebooks, and one site beside the other
endif

.PHONY: book books ran test serve clean results workflow row cost speed ledger matrix ablations backbones scratch pretrained fast-path operators photographs
.DELETE_ON_ERROR:

book: $(site)
	@echo "The book ($(PROFILE)) is at $(abspath $(site))"

# both editions at once, which needs the photographs and weights
books: $(sites)

test: $(env)
	$(bin)/python -m pytest -n auto --dist worksteal

# on this machine only; a browser allows a server what it refuses from disk
serve: book
	$(bin)/python -m http.server --bind 127.0.0.1 --directory $(dir $(site)) 8000

# every row of the reduced reproduction, by Snakemake; skips what is done (two hours on two cores)
results: workflow
	$(bin)/snakemake --snakefile notebooks/Snakefile --cores all --rerun-triggers mtime --rerun-incomplete --nolock --quiet rules

# Snakemake, which only `make results` needs
workflow: $(env)
	$(bin)/python -m pip install --quiet --disable-pip-version-check -e .[workflow] -c constraints.txt

# one row again, beside the committed one: make row ROW=plain-dtps-0.3-s0, of Imagewoof's with OF=imagewoof-gpu
again := _build/again
OF ?= imagenette
row: $(env)
	$(if $(ROW),,$(error ROW is missing; a row is a file of notebooks/results/$(OF), as in: make row ROW=plain-dtps-0.3-s0))
	rm -rf $(again)/$(OF)/runs/$(ROW)
	$(bin)/python notebooks/run.py notebooks/one-training.ipynb $(again)/$(OF)/$(ROW).ipynb profile=$(OF:-gpu=) \
		budget=recipe row=$(ROW) changes=workers=1 out=../$(again)/$(OF) runs=../$(again)/$(OF)/runs
	$(bin)/python notebooks/ledger.py compare $(again)/$(OF)/$(ROW).json $(OF)

# MACs, parameters and speed ratios of the published settings (a quarter of an hour)
cost: $(env)
	$(bin)/python notebooks/run.py notebooks/cost-and-speed.ipynb $(again)/cost-and-speed.ipynb budget=full out=results

# what the chapter on speed shows, and steps of masked fine-tuning, each plan with its picture (two hours on two quiet
# cores); copied when all are done, so that all name the same clean commit
bench := $(bin)/python -m tpbook.bench rounds=31
speed := $(again)/speed
tiny := deit_tiny_patch16_224
small := deit_small_patch16_224
speed: $(env)
	$(bench) model=[$(tiny),$(small)] dtype=[bfloat16,float32] batch=[1,8] rounds=41 out=$(speed)/ratios.json
	$(bench) model=$(tiny) mode=training keep_ratio=0.7 dtype=[float32,bfloat16] batch=32 out=$(speed)/training.json
	$(bench) model=$(tiny) keep_ratio=0.5 dtype=[float32,bfloat16] mode=[eager,compiled] out=$(speed)/compiled.json
	$(bench) model=[$(tiny),$(small),deit_base_patch16_224] method=evit keep_ratio=0.7 image_size=[224,384,512] batch=1 rounds=11 \
		out=$(speed)/growth.json
	$(bench) model=[$(tiny),$(small)] dtype=[bfloat16,float32] batch=32 out=$(speed)/ratios-32.json
	$(bench) model=$(tiny) method=masked mode=training keep_ratio=[0.75,0.5,0.25] dtype=[float32,bfloat16] batch=32 \
		out=$(speed)-masked/masked.json
	cp $(speed)/*.json notebooks/results/speed
	cp $(speed)-masked/*.json notebooks/results/speed-masked

# what a stage starts and moves, counted (seconds)
operators: $(env)
	$(bin)/python -m tpbook.timing.operators out=notebooks/results/operators.json

# the status of every claim, from book/claims.csv and the results
ledger: $(env)
	$(bin)/python notebooks/ledger.py

# every training behind the committed results of the digits; skips what is done (about an hour on two cores)
matrix: $(env)
	$(bin)/python notebooks/matrix.py matrix family
ablations backbones scratch: $(env)
	$(bin)/python notebooks/matrix.py $@

# the methods that need no training, on DeiT-Ti and photographs of $TPBOOK_DATA (half an hour on two cores)
pretrained: $(env)
	$(bin)/python notebooks/matrix.py $@

# the photographs that every edition shows, and what DeiT-Ti makes of them (minutes)
photographs: $(env)
	$(bin)/python -m tpbook.book.photographs out=book/photographs hero=book/images/hero.svg

# two faults of the official code of the fast path, in numbers (seconds)
fast-path: $(env)
	$(bin)/python notebooks/fast_path.py

clean:
	rm -rf _build

$(installed): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt # Python does so as it imports
	touch $@

# and what a stage does on a CPU, compiled
$(env): $(installed) tpbook/kernels/stage.cpp tpbook/kernels/cpu.py
	$(bin)/python -m tpbook.kernels.cpu || echo "without them pruned models run by PyTorch's operators alone"
	touch $@

# the notebooks that are out of date, JOBS at a time (2): notebooks/editions.py says which, and when .ran is new
ran: $(env)
	$(bin)/python notebooks/editions.py $(asked)
$(editions:%=_build/%/.ran): ran ;

$(sites): _build/%/site/_build/html/index.html: _build/%/.ran $(pages) $(package) $(javascript) $(env)
	$(bin)/python book/render.py _build/$*
	touch $@

# what pages load, pinned and checksummed in book/javascript
$(javascript): book/javascript/package.json book/javascript/package-lock.json
	mkdir -p $(@D)
	cp $^ $(@D)
	npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@ \
		|| { rm -rf $(@D); echo "npm is missing or failed: pages will load MathJax from its CDN and run no model"; }
