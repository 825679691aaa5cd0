# The two commands of README.md, and what they are made of. Everything else is Ansible.

SHELL := /bin/bash
# Ubuntu's sudo is sudo-rs from 25.10 on, which ignores -E; the classic one lies beside it.
SUDO_PROGRAM := $(shell command -v sudo.ws || echo sudo)
SUDO := $(if $(filter 0,$(shell id -u)),,$(SUDO_PROGRAM) -E)
# Ansible asks for sudo's password where sudo does.
ASK = $(if $(SUDO),$(shell $(SUDO_PROGRAM) -n true 2>/dev/null || echo --ask-become-pass))
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
UV_VERSION := 0.13.9
# By name: Ansible ignores the file in a folder that everybody may write, as all of a Windows drive is.
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

.PHONY: help rehearse rehearse-down deploy verify start stop status logs uninstall \
    check scenario test bench-client bench-host bench-gateway docs lock release

help:
	@echo "Try it, without a GPU:"
	@echo "  make rehearse        deploy dots.ocr on a rehearsal host and read a page with it"
	@echo "  make rehearse-down   remove the rehearsal; a few Debian packages stay"
	@echo "On the machine with the GPU:"
	@echo "  make deploy          deploy dots.ocr"
	@echo "  make verify          test what was deployed"
	@echo "  make start, stop     start the server; stop it and give the GPU's memory back"
	@echo "  make status, logs    show its state; follow its journal"
	@echo "  make uninstall       remove the service; the weights stay"
	@echo "For developers:"
	@echo "  make check           what a change needs at least, in five minutes: lint, unit tests, client"
	@echo "  make scenario NAME=  one scenario of molecule/, such as docker_engine"
	@echo "  make test            all of it: lint, unit tests, client, rehearsal, every scenario"
	@echo "  make bench-client    measure what the client costs (after make rehearse)"
	@echo "  make bench-host      measure what a run that changes nothing costs (after make rehearse)"
	@echo "  make bench-gateway   measure the gateway against its servers, one to three of them (needs haproxy)"
	@echo "  make docs            write the generated tables and this documentation as a site"
	@echo "  make lock            resolve the Python packages again"
	@echo "  make release         write the collection and the client's wheel to dist/"

rehearse: .venv/ready
	@$(SUDO) $(BIN)/python -m rehearsal run

rehearse-down: .venv/ready
	@$(SUDO) $(BIN)/python -m rehearsal down

check: .venv/ready
	@$(SUDO) $(BIN)/python -m tests lint unit client

scenario: .venv/ready
	@$(SUDO) $(BIN)/python -m tests "molecule $(NAME)"

test: .venv/ready
	@$(SUDO) $(BIN)/python -m tests

bench-client: .venv/ready
	@cd client && $(CURDIR)/$(BIN)/python -m benchmarks $(OPTIONS)

bench-host: .venv/ready
	@$(SUDO) $(BIN)/python -m benchmarks.host

bench-gateway: .venv/ready
	@$(BIN)/python -m benchmarks.gateway

# The tests' sudo has no keyboard, so that its password is asked for before they begin.
verify: .venv/ready
	@$(if $(SUDO),sudo true)
	@$(BIN)/pytest verification --hosts=ansible://ocr_servers --ansible-inventory=inventory/local --sudo

deploy: .venv/ready
	@$(BIN)/ansible-playbook site.yml -i inventory/local $(ASK)

uninstall: .venv/ready
	@$(BIN)/ansible-playbook playbooks/uninstall.yml -i inventory/local $(ASK)

# What the deployment installed. The journal of a system unit is root's.
SERVER = $(or $(shell command -v dots-ocr-server),$(error there is no server on this machine. Fix: make deploy))
start stop logs:
	@$(SUDO) $(SERVER) $@

# Status 3 says that it does not run, which is shown, and no fault of make's.
status:
	@$(SERVER) $@ || [ $$? -eq 3 ]

# The controller's Python environment, from the lock. Compiled by all cores, and of Ansible's collections those that are used.
.venv/ready: requirements.lock client/pyproject.toml
	@echo "==> install the controller's Python environment (.venv)"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@python3 -m venv --clear .venv 2>/dev/null || \
	    { $(SUDO) apt-get -qq update && $(SUDO) apt-get -qq install -y python3-venv && python3 -m venv --clear .venv; }
	@$(BIN)/python -m pip install -qq --no-compile --require-hashes --requirement requirements.lock
	@$(BIN)/python -m compileall -q -j 0 -x 'ansible_collections/(?!ansible/posix|community/(docker|general))' .venv/lib
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable client
	@touch $@

# The generated tables (after a change of a role's argument specification or of the memory plan), then the site. A link that leads
# nowhere is an error.
docs: .venv/ready .cache/docs/ready
	@$(BIN)/python docs/tables.py
	@for role in roles/*/; do $(BIN)/aar-doc --output-template docs/role.md.j2 $$role markdown; done
	@NO_MKDOCS_2_WARNING=1 .cache/docs/bin/mkdocs build --quiet --strict
	@echo "the site is in .cache/site: python3 -m http.server --directory .cache/site"

.cache/docs/ready: docs/requirements.lock
	@python3 -m venv --clear .cache/docs && .cache/docs/bin/python -m pip install -qq --require-hashes --requirement $<
	@touch $@

# What is handed out, once the versions agree (tests/test_release.py): the collection and the client's wheel.
release: .venv/ready
	@! sed -n '/^## /{p;q}' CHANGELOG.md | grep -F '(unreleased)' || \
	    { echo "the newest version in CHANGELOG.md has no date. Fix: put it in place of '(unreleased)'"; exit 1; }
	@$(BIN)/pytest -q tests/test_release.py
	@rm -rf dist
	@$(BIN)/ansible-galaxy collection build --output-path dist
	@$(BIN)/python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir dist ./client
	@ls dist

# After a change of requirements.txt or of what a part of the tests needs: resolve it again, for every Python from 3.11 on, and
# write the locks with the SHA-256 of every file that the index has. What is locked already stays, as far as it can.
RESOLVE = .cache/lock/bin/uv pip compile -q --universal --generate-hashes --no-annotate --python-version 3.11 \
    --custom-compile-command 'make lock'
lock:
	@python3 -m venv --clear .cache/lock && .cache/lock/bin/python -m pip install -qq uv==$(UV_VERSION)
	@$(RESOLVE) requirements.txt --output-file requirements.lock
	@$(RESOLVE) tests/examples/requirements.txt --constraint requirements.lock --override requirements.txt \
	    --output-file tests/examples/requirements.lock
	@$(RESOLVE) tests/live_client/requirements-page.txt --constraint requirements.lock \
	    --output-file tests/live_client/requirements.lock
	@$(RESOLVE) docs/requirements.txt --output-file docs/requirements.lock
	@rm -rf .cache/lock
