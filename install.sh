#!/usr/bin/env bash
# Installs sllmctl for the user, runs its demo, or runs its tests. `./install.sh help` says how.
set -euo pipefail

readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT

usage() {
    cat <<'TEXT'
usage: ./install.sh [command]

  (none)               install for this user: an environment of its own, and a link to sllmctl on the PATH
  uninstall [--purge]  undo that, and hugepages; --purge also removes the manager's state without asking
  hugepages [SIZE] [-y]  set aside memory in huge pages for a node's arena, now and at each boot (root; asks, -y answers).
                       SIZE is the arena's, node.arena_bytes: 1G if nothing is said; 0 undoes it
  bundle [FILE]        build one executable file, dist/sllmctl if nothing is said: the manager and all commands, for a machine
                       with the Python that built it (SLLM_PYTHON) and nothing else; it runs no models itself
  demo [--keep]        the whole path in a scratch directory: ingest, deploy, a cold and a warm request
  test [ARGS...]       ruff, mypy, import-linter and pytest; ARGS go to pytest
  help                 this text

demo, bundle and test use an environment in .venv of the checkout, or where SLLM_VENV says.
SLLM_PYTHON names the Python (3.11 to 3.13) to use.
TEXT
}

say() { printf '%s\n' "$*" >&2; }

die_usage() {
    say "install.sh: $*; \`./install.sh help\` says what there is"
    exit 2
}

die() {
    say "install.sh: $*"
    exit 1
}

# step MESSAGE COMMAND...: run a command quietly, show that it runs, and show what it said only if it fails. What it keeps in
# TMPDIR is gone with it, also when it is interrupted: pip unpacks gigabytes there.
step() {
    local message=$1 work began status=0 pid
    shift
    work=$(mktemp -d)
    began=$SECONDS
    TMPDIR=$work "$@" >"$work/log" 2>&1 </dev/null &
    pid=$!
    # A background job of a script ignores the terminal's Ctrl-C, so it is ended by hand.
    # shellcheck disable=SC2064
    trap "kill $pid 2>/dev/null || true; wait $pid || true; rm -rf -- '$work'; say; say 'Interrupted; the same command goes on where it can'; exit 130" INT TERM
    if [[ -t 2 ]]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r==> %s ... %d s' "$message" "$((SECONDS - began))" >&2
            sleep 0.2
        done
    else
        printf '==> %s ...\n' "$message" >&2
    fi
    wait "$pid" || status=$?
    trap - INT TERM
    if [[ -t 2 ]]; then printf '\r==> %s: %d s   \n' "$message" "$((SECONDS - began))" >&2; fi
    if ((status != 0)); then
        tail -n 40 -- "$work/log" >&2
        rm -rf -- "$work"
        case $1 in pip_install | build_wheels) about_index "$2" ;; esac
        die "failed: $message"
    fi
    rm -rf -- "$work"
}

# --- Python ----------------------------------------------------------------------------------------------------------

fitting() { # fitting PYTHON: is it there, and of a version that will do?
    command -v -- "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

minor() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

on_debian() { command -v apt-get >/dev/null 2>&1; }

apt_install() {
    step "Installing $* with apt-get" env DEBIAN_FRONTEND=noninteractive sh -c \
        'apt-get install -y -qq "$@" || { apt-get update -qq && apt-get install -y -qq "$@"; }' sh "$@"
}

find_python() { # sets PYTHON
    local candidate version
    if [[ -n ${SLLM_PYTHON:-} ]]; then
        fitting "$SLLM_PYTHON" || die "SLLM_PYTHON=$SLLM_PYTHON is no Python 3.11 to 3.13"
        PYTHON=$SLLM_PYTHON
    else
        PYTHON=
        for candidate in python3.13 python3.12 python3.11 python3; do
            if fitting "$candidate"; then
                PYTHON=$candidate
                break
            fi
        done
        [[ -n $PYTHON ]] || die "there is no Python 3.11, 3.12 or 3.13; on Debian or Ubuntu: sudo apt-get install python3 python3-venv"
    fi
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null && return
    version=$(minor "$PYTHON")
    if on_debian && ((EUID == 0)); then
        say "$PYTHON lacks the venv module; installing python$version-venv"
        apt_install "python$version-venv"
        "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null && return
    fi
    die "$PYTHON lacks the venv module; on Debian or Ubuntu: sudo apt-get install python$version-venv"
}

make_venv() { # make_venv DIRECTORY: an environment there whose Python runs
    local has wants
    if [[ -n ${SLLM_PYTHON:-} ]] && fitting "$1/bin/python" && fitting "$SLLM_PYTHON"; then
        has=$(minor "$1/bin/python") wants=$(minor "$SLLM_PYTHON")
        [[ $has == "$wants" ]] || die "$1 has Python $has and SLLM_PYTHON is $wants; remove that directory, or name another in SLLM_VENV"
    fi
    if ! fitting "$1/bin/python" || ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        find_python
        mkdir -p -- "$(dirname -- "$1")"
        step "Making an environment in $1 ($("$PYTHON" --version))" "$PYTHON" -m venv --clear "$1"
    fi
}

# --- Packages --------------------------------------------------------------------------------------------------------

has_nvidia() { [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }; }

answers() { # answers PYTHON URL: does it, within three seconds?
    timeout 6 "$1" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=3).close()' "$2/torch/" >/dev/null 2>&1
}

index_url() { # index_url VENV: where pip looks
    local url=${PIP_INDEX_URL:-}
    [[ -n $url ]] || url=$("$1/bin/python" -m pip config get global.index-url 2>/dev/null) || url=https://pypi.org/simple
    printf '%s' "${url%/}"
}

about_index() { # about_index VENV: say it where that does not answer, which pip calls a conflict of versions
    local url
    url=$(index_url "$1")
    answers "$1/bin/python" "$url" || say "install.sh: $url does not answer: is there a network? PIP_INDEX_URL names another index"
}

pip_install() { # pip_install VENV ARGS...: only for step, whose subshell it becomes, so that a Ctrl-C ends pip itself
    local venv=$1
    shift
    exec "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --constraint "$ROOT/constraints.txt" "$@"
}

install_torch() { # the CPU build unless there is an NVIDIA device, where its own index can be reached
    local venv=$1 pin
    pin=$(grep -E '^torch==' "$ROOT/constraints.txt")
    if "$venv/bin/python" -c 'import sys; from importlib.metadata import version as v; sys.exit(v("torch").split("+")[0] != sys.argv[1])' \
        "${pin#torch==}" 2>/dev/null; then
        return
    fi
    if has_nvidia; then
        step "Installing $pin" pip_install "$venv" "$pin"
    elif answers "$venv/bin/python" "$TORCH_CPU_INDEX"; then
        step "Installing $pin (CPU build)" pip_install "$venv" --extra-index-url "$TORCH_CPU_INDEX" "$pin+cpu"
    else
        step "Installing $pin (the index of CPU builds does not answer, so from pip's own, with CUDA: gigabytes)" pip_install "$venv" "$pin"
    fi
}

digest() { sha256sum | cut -c1-64; }

compiler() { "${CC:-gcc}" -dumpfullversion 2>/dev/null || printf 'none'; } # with another, other files are installed

dependencies_digest() {
    (cd -- "$ROOT" && cat pyproject.toml constraints.txt install.sh agent/native/*.[ch] && compiler && printf '%s' "$1") | digest
}

sources_digest() {
    (
        cd -- "$ROOT"
        find pyproject.toml constraints.txt install.sh README.md schema sllmctl agent tui -type f \
            -not -path '*/__pycache__/*' -not -name '*.so' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
        compiler
    ) | digest
}

stamped() { [[ -f $1 && $(<"$1") == "$2" ]]; }

install_editable() { # install_editable VENV EXTRAS: the checkout itself with its dependencies, unless they are as they were
    local venv=$1 extras=$2 stamp
    stamp=$venv/.sllmctl-$extras
    local want
    want=$(dependencies_digest "$extras $ROOT")
    make_venv "$venv"
    stamped "$stamp" "$want" && return
    install_torch "$venv"
    step "Installing sllmctl [$extras] into $venv" pip_install "$venv" --editable "$ROOT[$extras]"
    printf '%s' "$want" >"$stamp"
}

scratch() { # sets SCRATCH: a directory that is gone with this script, however it ends
    SCRATCH=$(mktemp -d)
    trap 'rm -rf -- "$SCRATCH"' EXIT
}

copy_sources() { # copy_sources DIRECTORY: what the package is built from, without what earlier builds left
    mkdir -p -- "$1"
    (cd -- "$ROOT" && tar -c --exclude=__pycache__ --exclude='*.so' pyproject.toml README.md LICENSE schema sllmctl agent tui) | tar -x -C "$1"
}

# --- The commands ----------------------------------------------------------------------------------------------------

user_paths() {
    [[ -n ${HOME:-} ]] || die "HOME is not set"
    USER_DIR=${XDG_DATA_HOME:-$HOME/.local/share}/sllmctl
    if ((EUID == 0)); then LINK=/usr/local/bin/sllmctl; else LINK=$HOME/.local/bin/sllmctl; fi
    if [[ -n ${XDG_STATE_HOME:-} ]]; then
        STATE=$XDG_STATE_HOME/sllmctl
    elif ((EUID == 0)); then
        STATE=/var/lib/sllmctl
    else
        STATE=$HOME/.local/state/sllmctl
    fi
}

ours() { [[ -L $LINK && $(readlink -- "$LINK") == "$USER_DIR/venv/bin/sllmctl" ]]; }

install_user() {
    user_paths
    local venv=$USER_DIR/venv want copy
    if [[ -e $LINK || -L $LINK ]] && ! ours; then die "$LINK is there and not ours; move it away first"; fi
    want=$(sources_digest)
    make_venv "$venv"
    if stamped "$venv/.sllmctl" "$want"; then
        say "sllmctl is installed already and up to date"
    else
        install_torch "$venv"
        # Built from a copy: a build leaves its files in the directory it was made from, and the next one would pick them up.
        scratch
        copy=$SCRATCH/sources
        copy_sources "$copy"
        step "Installing sllmctl into $venv" pip_install "$venv" "$copy[node]"
        # pip leaves an installed copy of the same version alone, however old its files are.
        step "Bringing its own files up to date" pip_install "$venv" --no-deps --force-reinstall "$copy"
        printf '%s' "$want" >"$venv/.sllmctl"
    fi
    mkdir -p -- "$(dirname -- "$LINK")"
    ln -sfn -- "$venv/bin/sllmctl" "$LINK"
    say "Installed: $LINK"
    case ":$PATH:" in
        *":$(dirname -- "$LINK"):"*) ;;
        *) say "$(dirname -- "$LINK") is not on your PATH; add to your shell's profile:  export PATH=\"$(dirname -- "$LINK"):\$PATH\"" ;;
    esac
    say "Next: sllmctl demo, or sllmctl serve"
}

# --- Huge pages --------------------------------------------------------------------------------------------------------

readonly HUGE_CONF=/etc/sysctl.d/90-sllmctl-hugepages.conf
readonly HUGE_POOL=/proc/sys/vm/nr_hugepages
readonly HUGE_BYTES=$((2 * 1024 * 1024))

size_bytes() { # size_bytes SIZE: 512M, 16G, 16GiB, or bytes
    local number unit
    [[ $1 =~ ^([0-9]{1,15})([KMGT]?)(i?B)?$ ]] || return 1
    number=${BASH_REMATCH[1]} unit=${BASH_REMATCH[2]}
    case $unit in
        K) number=$((number * 1024)) ;;
        M) number=$((number * 1024 ** 2)) ;;
        G) number=$((number * 1024 ** 3)) ;;
        T) number=$((number * 1024 ** 4)) ;;
    esac
    printf '%s' "$number"
}

huge_before() { # the pool's pages without ours: what it had before we first changed it
    if [[ -f $HUGE_CONF ]]; then sed -n 's/^# before: \([0-9][0-9]*\)$/\1/p' "$HUGE_CONF"; else cat "$HUGE_POOL"; fi
}

set_huge_pages() {
    local size=1G yes=no argument bytes pages before total answer=n got
    for argument in "$@"; do
        case $argument in
            -y | --yes) yes=yes ;;
            -*) die_usage "hugepages has no option $argument" ;;
            *) size=$argument ;;
        esac
    done
    bytes=$(size_bytes "$size") || { say "install.sh: $size is no size; say 16G, 512M or a number of bytes"; exit 2; }
    [[ -r $HUGE_POOL ]] || die "this kernel has no huge pages ($HUGE_POOL)"
    ((bytes > 0)) || { undo_huge_pages; return; }
    before=$(huge_before)
    [[ -n $before ]] || die "$HUGE_CONF does not say what was there before; remove it and vm.nr_hugepages by hand"
    pages=$(((bytes + HUGE_BYTES - 1) / HUGE_BYTES + 1)) # one more for the arena's own table
    total=$((before + pages))
    say "This sets vm.nr_hugepages to $total ($pages pages of 2 MiB for an arena of $size, $before as before),"
    say "now and in $HUGE_CONF. That memory is then used by nothing but what asks for huge pages."
    if [[ $yes == no ]]; then
        if [[ ! -t 0 ]]; then
            say "install.sh: there is no terminal to ask on: say so with -y"
            exit 2
        fi
        read -r -p "Go on? [y/N] " answer || answer=n
        [[ $answer == [yY]* ]] || { say "Nothing was changed"; exit 1; }
    fi
    ((EUID == 0)) || die "only root may set huge pages: run this with sudo"
    printf '# Memory for the arena of sllmctl; `install.sh uninstall` or `install.sh hugepages 0` takes it back.\n# before: %s\nvm.nr_hugepages = %s\n' \
        "$before" "$total" >"$HUGE_CONF"
    printf '%s\n' "$total" >"$HUGE_POOL" || die "the kernel refuses $total huge pages; $HUGE_CONF is in force from the next boot"
    got=$(<"$HUGE_POOL")
    if ((got < total)); then
        say "The kernel found only $got of $total: memory is in use or fragmented. Try again after a reboot, which has them first."
        exit 1
    fi
    say "Done. Restart the node (or sllmctl serve), and see \`sllmctl doctor\`."
}

undo_huge_pages() {
    local before
    [[ -f $HUGE_CONF ]] || return 0
    if ((EUID != 0)); then
        say "Kept $HUGE_CONF and its huge pages; take them back with: sudo $0 hugepages 0"
        return 0
    fi
    before=$(huge_before)
    rm -f -- "$HUGE_CONF"
    printf '%s\n' "${before:-0}" >"$HUGE_POOL" || say "The kernel keeps its huge pages until the next boot"
    say "Removed $HUGE_CONF; vm.nr_hugepages is ${before:-0} again"
}

uninstall_user() {
    user_paths
    local answer=n purge=no
    case ${1:-} in
        '') ;;
        --purge) purge=yes ;;
        *) die_usage "uninstall has no option $1" ;;
    esac
    if ours; then
        rm -f -- "$LINK"
        say "Removed $LINK"
    fi
    if [[ -d $USER_DIR/venv ]]; then
        rm -rf -- "$USER_DIR/venv"
        rmdir -- "$USER_DIR" 2>/dev/null || true
        say "Removed $USER_DIR/venv"
    fi
    undo_huge_pages
    [[ -d $STATE ]] || return 0
    if [[ $purge == no && -t 0 ]]; then
        read -r -p "Remove the manager's state in $STATE too (models, checkpoints, database)? [y/N] " answer || answer=n
        [[ $answer == [yY]* ]] && purge=yes
    fi
    if [[ $purge == yes ]]; then
        rm -rf -- "$STATE"
        say "Removed $STATE"
    else
        say "Kept the manager's state in $STATE; --purge removes it"
    fi
}

build_wheels() { # build_wheels VENV SOURCES WHEELS: the package's own and those of all that the manager needs
    export SOURCE_DATE_EPOCH=315532800 # the first moment that a zip file can name: the same sources make the same bytes
    exec "$1/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-input \
        --constraint "$ROOT/constraints.txt" --wheel-dir "$3" "$2"
}

pack_wheels() { # pack_wheels VENV WHEELS FILE: one file that unpacks itself to a cache at its first start
    local build version
    build=$(cd -- "$2" && LC_ALL=C sha256sum -- *.whl | digest | cut -c1-12)
    version=$(minor "$1/bin/python")
    # tokenizers asks a hub only where it is told to, which the manager never does.
    exec "$1/bin/python" -m pex sllmctl --pre-resolved-dists "$2" --exclude huggingface-hub --console-script sllmctl \
        --venv --sh-boot --runtime-pex-root "~/.cache/sllmctl/bundle-$build" --interpreter-constraint "CPython==$version.*" \
        --no-pre-install-wheels --disable-cache --output-file "$3"
}

build_bundle() {
    local venv=${SLLM_VENV:-$ROOT/.venv} file=${1:-$ROOT/dist/sllmctl}
    (($# < 2)) || die_usage "bundle takes one file, not $*"
    [[ $file != -* ]] || die_usage "bundle has no option $file"
    [[ ! -d $file ]] || die "$file is a directory; name the file to build"
    make_venv "$venv"
    "$venv/bin/python" -c 'import pex' 2>/dev/null || step "Installing pex into $venv" pip_install "$venv" pex
    scratch
    copy_sources "$SCRATCH/sources"
    step "Building the wheels" build_wheels "$venv" "$SCRATCH/sources" "$SCRATCH/wheels"
    step "Packing them" pack_wheels "$venv" "$SCRATCH/wheels" "$SCRATCH/sllmctl"
    mkdir -p -- "$(dirname -- "$file")"
    # Into its directory first, then by rename: what runs from an older one, or is copied meanwhile, never sees half a file.
    cp -- "$SCRATCH/sllmctl" "$file.new.$$"
    mv -f -- "$file.new.$$" "$file"
    say "Built $file: $(du -h -- "$file" | cut -f1), for Python $(minor "$venv/bin/python") on $(uname -m)"
    say "Its first start unpacks it to ~/.cache/sllmctl (PEX_ROOT names another place). Next: $file serve"
}

run_demo() {
    local venv=${SLLM_VENV:-$ROOT/.venv}
    install_editable "$venv" node
    exec "$venv/bin/sllmctl" demo "$@"
}

run_tests() {
    local venv=${SLLM_VENV:-$ROOT/.venv} failed=()
    install_editable "$venv" node,dev
    # Without compiled modules every process of a test compiles its own, and pytest rewrites every file again.
    unset SLLM_VENV SLLM_PYTHON PYTHONDONTWRITEBYTECODE
    cd -- "$ROOT"
    PATH=$venv/bin:$PATH
    check() {
        say "==> $*"
        "$@" || failed+=("$1")
    }
    check_types() {
        say "==> mypy (it began before the tests)"
        wait "$TYPES" || failed+=(mypy)
        TYPES=
        cat -- "$SCRATCH/mypy"
    }
    check ruff check .
    check ruff format --check .
    # It keeps one processor busy for a minute, and tests often wait.
    scratch
    mypy >"$SCRATCH/mypy" 2>&1 </dev/null &
    TYPES=$!
    trap 'if [[ -n $TYPES ]]; then kill "$TYPES" 2>/dev/null || true; fi; rm -rf -- "$SCRATCH"' EXIT
    check lint-imports
    if (($#)); then
        check python -m pytest "$@"
        check_types
    else
        check python -m pytest -n 2 --dist loadfile -m "not alone"
        check_types
        # To import all the other tests takes a good part of the time of the few that run alone.
        local alone
        mapfile -t alone < <(grep -rl --include='test_*.py' 'pytest\.mark\.alone' tests)
        check python -m pytest "${alone[@]}" -m alone
    fi
    if ((${#failed[@]})); then die "failed: ${failed[*]}"; fi
    say "All checks passed"
}

main() {
    local command=${1:-install} argument
    shift || true
    for argument in "$@"; do
        # What follows demo and test is for sllmctl and pytest, which have a help of their own.
        case $command:$argument in demo:* | test:*) ;; *:-h | *:--help) command=help ;; esac
    done
    case $command in
        install)
            (($# == 0)) || die_usage "install takes no arguments, not $*"
            install_user
            ;;
        uninstall) uninstall_user "$@" ;;
        hugepages) set_huge_pages "$@" ;;
        bundle) build_bundle "$@" ;;
        demo) run_demo "$@" ;;
        test) run_tests "$@" ;;
        help | -h | --help) usage ;;
        *) die_usage "there is no command $command" ;;
    esac
}

main "$@"
