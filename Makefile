# The two commands that matter: make boot, make test. `make help` lists the rest.
KERNEL ?= cloud
CARGO ?= cargo
RUNS ?= 200
ROUNDS ?= 3
COMPARE_RUNS ?= 10
FUZZ_SECONDS ?= 60
TARGET := $(or $(CARGO_TARGET_DIR),target)
DEMO := build/demo.cpio
NET ?=
COMMAND ?= uname -a

MINIVMM := $(TARGET)/release/minivmm

# What these targets build is for musl, whose programs start sooner: glibc's begin with CPUID, an exit each where the host is a
# VM itself. Where neither rustc has that target nor rustup can add it, and for a plain cargo build, it is glibc.
MUSL := x86_64-unknown-linux-musl
GNU := x86_64-unknown-linux-gnu
find_triple = $(shell has_musl() { [ -d "$$(rustc --print target-libdir --target $(MUSL))" ]; }; \
	{ has_musl || { rustup target add $(MUSL) >&2 && has_musl; }; } && echo $(MUSL) || echo $(GNU))
# Looked up once, and only if need be.
TRIPLE = $(eval TRIPLE := $(find_triple))$(TRIPLE)
build test bench lint: export CARGO_BUILD_TARGET = $(TRIPLE)

.PHONY: help build boot boot-debian run test fuzz bench compare lint man dist kernel guests deps clean

help:
	@echo 'make boot     a stock Debian kernel to a shell in minivmm (KERNEL=cloud, generic, 6.12, small, ...); ends with poweroff;'
	@echo '              NET=passt gives it a network; this host is 10.0.2.2 if it runs in the lab, and else the gateway, with NET=passt,host-loopback'
	@echo 'make boot-debian   Debian with systemd from a disk, to a login (root, minivmm); what it writes is gone afterwards'
	@echo 'make run      a command in a container image, busybox (KERNEL=cloud, 6.12, small, ...)'
	@echo 'make build    the static release binary, $(MINIVMM)'
	@echo 'make test     all tests: natively what this machine can run, then real Linux guests, in the lab if need be'
	@echo 'make fuzz     each fuzz target for a minute (FUZZ_SECONDS=$(FUZZ_SECONDS)); fails on a finding'
	@echo 'make bench    start-up of whole processes side by side: bare KVM, minivmm, QEMU, runc (RUNS=$(RUNS)); then boots of'
	@echo '              Linux, disks and networks, minivmm and QEMU, in the lab if need be (ROUNDS=$(ROUNDS))'
	@echo 'make compare  one command in crun, runc, podman, docker, as far as they are installed, and in minivmm: a table, and'
	@echo '              build/compare/report.html (COMPARE_RUNS=$(COMPARE_RUNS), KERNEL=$(KERNEL))'
	@echo 'make lint     formatting, clippy, rustdoc and shellcheck'
	@echo 'make man      man pages and completions for bash, fish and zsh, in build/man/'
	@echo 'make dist     build/minivmm-VERSION-x86_64.tar.gz: the binary, man pages, completions and documents, to be unpacked at a prefix'
	@echo 'make kernel   the small kernel, which KERNEL=small boots, from guest-kernels/kernel/ (minutes)'
	@echo 'make guests   fetch the kernels, build the demo initramfs ($(DEMO)) and Debian'\''s initrd and disk'
	@echo 'make deps     install what is missing, as the other targets do'
	@echo 'make clean    remove what was built; the cache of fetched kernels stays'

build: deps
	$(CARGO) build --release
	@mkdir -p $(TARGET)/release
	@ln -sf ../$(TRIPLE)/release/minivmm $(MINIVMM)

# Without a terminal nobody can type: a command shows that the guest is up, and the guest powers off. passt wants a network of its host's.
boot: build
	@guest-kernels/fetch $(KERNEL) >/dev/null
	@guest-kernels/initramfs/build-initramfs $(if $(NET),--net "$$(guest-kernels/fetch $(KERNEL))" build/boot-net.cpio,$(DEMO))
	$(if $(NET),MINIVMM_LAB_NET=1) tests/lab/with-kvm $(MINIVMM) --kernel $$(guest-kernels/fetch $(KERNEL))/bzImage \
		--initrd $(if $(NET),build/boot-net.cpio,$(DEMO)) $(if $(NET),--net $(NET)) \
		--append "$$([ -t 0 ] || echo '-- $(COMMAND)')"

boot-debian: build
	@guest-kernels/debian-disk >/dev/null
	tests/lab/with-kvm $(MINIVMM) --kernel $$(guest-kernels/fetch cloud)/bzImage \
		--initrd $$(guest-kernels/debian-initrd cloud) --disk path=$$(guest-kernels/debian-disk),ephemeral \
		--memory 512M --rng --append "root=/dev/vda $$([ -t 0 ] || \
		echo "systemd.run=\"/bin/sh -c 'uname -a >/dev/console'\" systemd.run_success_action=poweroff")"

run: build
	@mkdir -p build/busybox/bin
	@cp $$(guest-kernels/fetch busybox)/busybox build/busybox/bin/
	@guest-kernels/fetch $(KERNEL) >/dev/null
	tests/lab/with-kvm $(MINIVMM) run --kernel $$(guest-kernels/fetch $(KERNEL))/bzImage --rootfs build/busybox \
		/bin/busybox uname -a

# Ring 1 and 2 natively; ring 3 in one boot of the lab for each of its files.
test: deps
	@# First, so that what is left in the target directory is not that binary.
	$(CARGO) test --features attack-port --test attack
	$(CARGO) test --workspace
	tests/lab/suite

fuzz: deps
	fuzz/run $(FUZZ_SECONDS)

# QEMU, runc and busybox-static are measured where they are installed; boots and disks need QEMU and real Linux guests.
bench: build
	$(CARGO) bench --bench startup -- $(RUNS)
	@guest-kernels/fetch all >/dev/null
	@guest-kernels/initramfs/build-initramfs $(DEMO)
	@# It takes a lab of its own for each boot.
	$(CARGO) bench --bench boot -- $(ROUNDS)
	@guest-kernels/debian-initrd cloud >/dev/null
	@guest-kernels/debian-disk >/dev/null
	$(CARGO) bench --config 'target."cfg(unix)".runner="$(CURDIR)/tests/lab/with-kvm"' --bench disk -- $(ROUNDS)
	tests/bench/net $(ROUNDS)

compare: build
	MINIVMM_KERNEL=$$(guest-kernels/fetch $(KERNEL))/bzImage tests/bench/containers build/compare $(COMPARE_RUNS)

lint: deps
	@command -v shellcheck >/dev/null || $(call install,shellcheck)
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@# Real Linux is no part of a plain cargo test, and so not among all targets.
	$(CARGO) clippy --workspace --features attack-port --lib --bins --test attack -- -D warnings
	$(CARGO) clippy --no-default-features --lib --bins -- -D warnings
	$(CARGO) clippy --test linux --test kernels --test direct --test disk --test net --test vsock --test restore --test run --test small -- -D warnings
	@# Fuzz targets need nightly to run, but not to be checked; nothing is linked with libFuzzer then.
	CUSTOM_LIBFUZZER_PATH=/none $(CARGO) clippy --manifest-path fuzz/Cargo.toml --bins -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --no-deps --workspace
	shellcheck -x $$(git ls-files | xargs grep -lE '^#(!/bin/(ba)?sh| shellcheck shell=)')

man: deps
	$(CARGO) run --example man -- build/man

# Man pages and completions lie where man and the shells look for them below a prefix such as /usr/local.
dist: build man
	@rm -rf build/dist && mkdir -p build/dist/share/doc/minivmm
	install -D -t build/dist/bin $(MINIVMM)
	install -D -m 644 -t build/dist/share/man/man1 build/man/*.1
	install -D -m 644 build/man/minivmm.bash build/dist/share/bash-completion/completions/minivmm
	install -D -m 644 -t build/dist/share/fish/vendor_completions.d build/man/minivmm.fish
	install -D -m 644 -t build/dist/share/zsh/site-functions build/man/_minivmm
	cp -r README.md SECURITY.md CHANGELOG.md docs build/dist/share/doc/minivmm
	tar --owner=0 --group=0 -C build/dist -czf build/minivmm-$$($(CARGO) pkgid | sed 's/.*[#@]//')-x86_64.tar.gz bin share

kernel: deps
	guest-kernels/kernel/build

guests: deps
	guest-kernels/fetch all
	guest-kernels/debian-initrd cloud
	guest-kernels/initramfs/build-initramfs $(DEMO)
	guest-kernels/debian-disk

# QEMU, which only the lab needs, and decompressors, which only fetch needs, are installed by those.
deps:
	@command -v cc >/dev/null || $(call install,gcc libc6-dev)
	@command -v $(CARGO) >/dev/null || { echo 'cargo is missing: install Rust 1.88 or later'; exit 1; }

clean:
	$(CARGO) clean
	rm -rf build fuzz/target

# install PACKAGES: or say what to install.
install = { [ "$$(id -u)" = 0 ] || { echo 'Missing; run: sudo apt-get install $(1)'; exit 1; }; \
	echo 'Installing $(1)'; apt-get install -qqy --no-install-recommends $(1) || \
	{ apt-get update -qq && apt-get install -qqy --no-install-recommends $(1); }; }
