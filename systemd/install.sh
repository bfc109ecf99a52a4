#!/usr/bin/env bash
# Called by `make install-systemd` and `make uninstall-systemd`. Optional variables of the environment:
#   DESTDIR  install everything below this directory and change nothing that runs, to build a package or an image
#   PREFIX   the directory of the daemon's own virtual environment
#   PYTHON   the interpreter for that environment, 3.11 or newer
set -euo pipefail
umask 022 # the service's user must be able to read everything, whatever root's umask is

prefix=${PREFIX:-/opt/gcs-prefetchd}
readonly prefix=${prefix%/}
readonly python=${PYTHON:-python3}
destdir=${DESTDIR:-}
[ -z "$destdir" ] || destdir=$(realpath -m -- "$destdir")
readonly destdir
readonly venv=$destdir$prefix

# Administrators install their own units in /usr/local/lib. In /etc/systemd/system the next upgrade would overwrite the changes
# of `systemctl edit --full`, and `systemctl mask` would fail because the file exists.
readonly unit=$destdir/usr/local/lib/systemd/system/gcs-prefetchd.service
readonly sysusers=$destdir/usr/local/lib/sysusers.d/gcs-prefetchd.conf
readonly config=$destdir/etc/gcs-prefetchd/config.toml
readonly command=$destdir/usr/local/bin/gcs-prefetchd

fail() {
    echo "install-systemd: $*" >&2
    exit 1
}

check_paths() {
    local path
    for path in "$prefix" ${destdir:+"$destdir"}; do
        [[ $path =~ ^(/[A-Za-z0-9_+-][A-Za-z0-9._+-]*)+$ ]] || fail "$path: not a plain absolute path"
    done
    # An installation replaces the complete directory, so PREFIX=/usr/local must be refused.
    if [ -e "$venv" ] && { [ ! -f "$venv/pyvenv.cfg" ] || [ ! -e "$venv/bin/gcs-prefetchd" ]; }; then
        rmdir -- "$venv" 2>/dev/null || fail "$venv: is not an installation of gcs-prefetchd; choose another PREFIX"
    fi
    if [ -z "$destdir" ] && [ "$(id -u)" -ne 0 ]; then
        fail "this writes to /etc, /usr/local and $prefix; run it as root, or set DESTDIR"
    fi
}

# The unit's ProtectHome= hides these from the service.
is_hidden_from_service() { [[ $1 =~ ^/(home|root|run/user)(/|$) ]]; }

check_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$python: not Python 3.11 or newer; choose one: make install-systemd PYTHON=python3.12"
    "$python" -c 'import ensurepip' 2>/dev/null \
        || fail "$python: has no venv module; on Debian: apt-get install python3-venv"
    if is_hidden_from_service "$prefix"; then fail "$prefix: the service cannot see it; choose another PREFIX"; fi
    local base
    base=$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
    # A staged tree may be built with a Python that has another path on the target machine.
    if [ -z "$destdir" ] && is_hidden_from_service "$base"; then
        fail "$python lies in $base, which the service cannot see; choose another, as in PYTHON=/usr/bin/python3"
    fi
}

# The environment is built next to its final path and moved there last. So neither a failure nor an interrupt leaves half an
# environment, and a failed upgrade leaves the old one.
install_venv() {
    trap restore_old_venv EXIT
    rm -rf -- "$venv.new" "$venv.old"
    mkdir -p -- "$(dirname -- "$venv")"
    "$python" -m venv "$venv.new"
    "$venv.new/bin/python" -m pip install --quiet --upgrade pip
    "$venv.new/bin/python" -m pip install --quiet --constraint constraints.txt .
    # Scripts name their interpreter by its full path, which is about to change.
    grep -rlIZF -- "$venv.new" "$venv.new/bin" "$venv.new/pyvenv.cfg" | xargs -0 sed -i "s|$venv.new|$prefix|g"
    [ ! -e "$venv" ] || mv -- "$venv" "$venv.old"
    mv -- "$venv.new" "$venv"
    rm -rf -- "$venv.old"
    trap - EXIT
}

restore_old_venv() {
    if [ -e "$venv.old" ] && [ ! -e "$venv" ]; then mv -- "$venv.old" "$venv"; fi
    rm -rf -- "$venv.new" "$venv.old"
}

install_files() {
    install -d -- "$(dirname -- "$unit")" "$(dirname -- "$command")"
    sed "s|=/opt/gcs-prefetchd/|=$prefix/|" systemd/gcs-prefetchd.service | install -m 0644 /dev/stdin "$unit"
    install -D -m 0644 systemd/gcs-prefetchd.sysusers "$sysusers"
    ln -sfn -- "$prefix/bin/gcs-prefetchd" "$command"
    if [ -e "$config" ] || [ -L "$config" ]; then
        echo "kept ${config#"$destdir"}"
    else
        install -D -m 0644 systemd/config.toml "$config"
    fi
}

systemd_runs_here() { [ -z "$destdir" ] && [ -d /run/systemd/system ]; }

reload_systemd() {
    systemd-sysusers "$sysusers"
    systemctl daemon-reload
}

print_next_steps() {
    echo "installed gcs-prefetchd in $venv. Next, as root:"
    if ! systemd_runs_here; then
        echo "  systemd-sysusers && systemctl daemon-reload       once systemd runs with these files"
    fi
    cat <<STEPS
  \$EDITOR /etc/gcs-prefetchd/config.toml            name your data roots
  systemctl enable --now gcs-prefetchd              start it, now and at each boot
  systemctl restart gcs-prefetchd                   instead after an upgrade; the cache stays
  usermod -aG gcs-prefetchd alice                   let alice's training jobs read the cache, from her next login on
STEPS
}

uninstall() {
    if systemd_runs_here && [ -e "$unit" ]; then systemctl disable --now gcs-prefetchd.service; fi
    rm -f -- "$unit" "$sysusers"
    if [ "$(readlink -- "$command")" = "$prefix/bin/gcs-prefetchd" ]; then rm -f -- "$command"; fi
    rm -rf -- "$venv"
    if systemd_runs_here; then systemctl daemon-reload; fi
    cat <<KEPT
removed gcs-prefetchd. Kept, and yours to remove:
  /etc/gcs-prefetchd            the configuration
  /etc/credstore/gcs-key.json   the service account's key, if you put one there
  /var/cache/gcs-prefetchd      the cache, or the cache_dir of your configuration
  gcs-prefetchd                 the user and the group: userdel gcs-prefetchd, once they own no files
KEPT
}

cd -- "$(dirname -- "$0")/.."
check_paths
case ${1:-} in
    install)
        check_python
        install_venv
        install_files
        if systemd_runs_here; then reload_systemd; fi
        print_next_steps
        ;;
    uninstall) uninstall ;;
    *) fail "usage: $0 install|uninstall" ;;
esac
