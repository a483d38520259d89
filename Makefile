# Everything a contributor types. `make chat` and `make test` need Python >= 3.10, a C++17 compiler and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := pyproject.toml constraints.txt $(shell find runtime_ops -name build -prune -o -type f -print)
DATA ?= ../shared/data
RUNS ?= runs/default
MODEL ?= $(RUNS)/student-3/model
ONNX ?= fbiedge/models/default.onnx
TEXT ?= $(RUNS)/text/held_out_stories.txt

.PHONY: chat test test-native-asan fuzz check format model wheels bench-ops bench-peers bench-peers-avx2 bench-levels \
    bench-neighbour bench-serve bench-generation bench-loss bench-train results clean

chat: $(VENV)/runtime.stamp  ## chat with the bundled 1-bit model
	@$(BIN)/fbiedge chat

test: $(VENV)/dev.stamp  ## every test
	$(BIN)/pytest

test-native-asan: $(VENV)/dev.stamp  ## the native tests under the address, undefined-behaviour and thread sanitizers
	$(call native,asan,-DCMAKE_BUILD_TYPE=Debug -DFBIEDGE_SANITIZE=ON -DFBIEDGE_BUILD_BENCH=OFF)
	$(BIN)/ctest --test-dir build/asan --output-on-failure
	$(call native,tsan,-DCMAKE_BUILD_TYPE=Debug -DFBIEDGE_SANITIZE=thread -DFBIEDGE_BUILD_BENCH=OFF)
	$(BIN)/ctest --test-dir build/tsan --output-on-failure

fuzz: $(VENV)/dev.stamp  ## damaged model files through the real commands, `make fuzz MINUTES=60 SEED=7`; findings go to build/fuzz
	$(BIN)/python tests/fuzz/run.py --seconds $$((60 * $(or $(MINUTES),10))) --seed $(or $(SEED),0)

wheels: $(VENV)/dev.stamp  ## wheels for Linux, macOS and Windows, cross-compiled into dist/
	$(BIN)/python runtime_ops/packaging/build_wheels.py

bench-ops: $(VENV)/dev.stamp  ## the kernels against the machine's speed of reading and multiplying; JSON ends each part
	$(call native,ops,-DCMAKE_BUILD_TYPE=Release -DFBIEDGE_BUILD_TESTS=OFF) >&2
	@build/ops/bench_binary_matmul $(foreach shapes,$(wildcard runtime_ops/bench/shapes/*.txt),--file $(shapes))
	@build/ops/bench_matmul_nbits 1x32000x768 1x32000x2048 1x32000x4096 128x32000x768

# llama.cpp is built from source for this machine, which takes 10 minutes and more; its packages stay out of $(VENV).
# `make bench-peers PEER_OPTIONS='--preset 1.3b'`; the script says what else there is.
bench-peers: $(VENV)/dev.stamp .venv-peers/stamp  ## fbiedge beside stock ONNX Runtime and llama.cpp; last line JSON
	@$(BIN)/python tests/benchmarks/peers.py --llama-python .venv-peers/bin/python $(PEER_OPTIONS)

# The same for machines without AVX-512: our AVX2 kernels and a llama.cpp built for AVX2.
bench-peers-avx2: $(VENV)/dev.stamp .venv-peers-avx2/stamp  ## our AVX2 kernels beside llama.cpp built without AVX-512
	@$(BIN)/python tests/benchmarks/peers.py --isa avx2 --only fbiedge,llama.cpp \
	    --llama-python .venv-peers-avx2/bin/python $(PEER_OPTIONS)

.venv-peers-avx2/stamp: export CMAKE_ARGS = -DGGML_NATIVE=OFF -DGGML_AVX512=OFF \
    $(foreach feature,SSE42 AVX AVX2 FMA F16C BMI2,-DGGML_$(feature)=ON)
.venv-peers/stamp .venv-peers-avx2/stamp:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir llama-cpp-python==0.3.36 \
	    ik-llama-cpp-python==0.1.5 gguf==0.19.0
	@touch $@

bench-levels: $(VENV)/dev.stamp  ## what levels, heads, KV caches and kernels cost on TEXT, with MODEL a checkpoint; last line JSON
	@$(BIN)/python tests/benchmarks/levels.py $(MODEL) $(TEXT)

bench-neighbour: $(VENV)/dev.stamp  ## decode of ONNX (a file) beside another busy process; last line JSON
	@$(BIN)/python tests/benchmarks/neighbour.py $(ONNX)

bench-serve: $(VENV)/dev.stamp  ## 32 clients of `fbiedge serve` for a minute; last line JSON
	@$(BIN)/python tests/benchmarks/serve_load.py $(ONNX)

bench-generation: $(VENV)/dev.stamp  ## what lookup, constraints, prompt caches and context shifts cost and save, with ONNX; last line JSON
	@$(BIN)/python tests/benchmarks/generation.py $(ONNX)

bench-loss: $(VENV)/dev.stamp  ## memory and time of the training loss, in chunks and whole (takes 16 GB); last line JSON
	@$(BIN)/python tests/benchmarks/loss_memory.py

# `make bench-train TRAIN_OPTIONS='--preset 130m --batch 16 --sequence-length 2048 --memory chunked,whole'`: memory instead.
bench-train: $(VENV)/dev.stamp  ## speed of a training step, and what binary linears cost beside dense ones; last line JSON
	@$(BIN)/python tests/benchmarks/train_step.py $(TRAIN_OPTIONS)

results: $(VENV)/dev.stamp  ## the runs, tables and figures of training/RESULTS.md, from DATA (hours on two cores)
	$(BIN)/python -m fbiedge.training.experiments --data $(DATA) --recipe $(RUNS) --out $(or $(EXPERIMENTS),runs/experiments)

check: $(VENV)/dev.stamp  ## linters, types, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fbiedge training exporters
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'runtime_ops/*.cc' 'runtime_ops/*.h')

format: $(VENV)/dev.stamp  ## rewrite in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'runtime_ops/*.cc' 'runtime_ops/*.h')

model: $(VENV)/dev.stamp  ## train the bundled model again from DATA (hours on two cores)
	$(BIN)/python -m fbiedge.training.default_model --data $(DATA) --out $(RUNS)
	$(BIN)/fbiedge export $(RUNS)/student-3/model --to onnx --embedding fp16 -o fbiedge/models/default.onnx

clean:
	rm -rf $(VENV) .venv-peers .venv-peers-avx2 build

# $(call native,FOLDER,OPTIONS): build runtime_ops alone into build/FOLDER.
native = $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S runtime_ops -B build/$(1) $(2) >/dev/null \
	&& $(BIN)/cmake --build build/$(1)

# The editable install builds the op library; it is built again when a file of runtime_ops/ changes.
$(VENV)/runtime.stamp: $(NATIVE) | $(BIN)/python
	@echo "setting up $(VENV): packages and the op library"
	@$(PIP) --editable .
	@touch $@

# llama-cpp-python comes as source; without its image models it takes about 5 minutes on two cores, once.
$(VENV)/dev.stamp: $(NATIVE) | $(BIN)/python
	@echo "setting up $(VENV): llama.cpp (minutes, the first time), packages and the op library"
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(PIP) llama-cpp-python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/runtime.stamp

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)
