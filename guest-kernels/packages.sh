# shellcheck shell=bash
# Sourced: Debian's packages, for scripts that have say and die. All output goes to stderr.

# with_fresh_lists COMMAND...: runs it, and where it fails once more behind an update of apt's package lists, for which it takes
# root: those of a fresh container are empty, old ones name versions that are gone.
with_fresh_lists() {
    ! "$@" || return 0
    if [ "$(id -u)" != 0 ]; then
        say "if apt's package lists are missing or old, run 'apt-get update' as root"
        return 1
    fi
    say "trying again with fresh package lists"
    apt-get update -q >&2 || say "apt-get update failed"
    "$@"
}

# need COMMAND:PACKAGE...: installs the PACKAGE of each COMMAND that is missing; one with a slash is a file.
need() {
    local entry name missing=()
    for entry; do
        name=${entry%:*}
        if [[ $name = /* ]]; then [ -e "$name" ]; else command -v "$name" >/dev/null; fi || missing+=("${entry#*:}")
    done
    [ ${#missing[@]} != 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "tools are missing; on Debian: sudo apt-get install --no-install-recommends ${missing[*]}"
    say "installing ${missing[*]}"
    with_fresh_lists env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends -o DPkg::Lock::Timeout=600 "${missing[@]}" >&2 ||
        die "cannot install ${missing[*]}"
}

# download PACKAGE...: their files, into the current directory; nothing is installed.
download() {
    apt-get download -q -o APT::Sandbox::User=root "$@" >&2
}
