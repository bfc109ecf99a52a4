#!/usr/bin/env bash
# What `make install-systemd` and `make uninstall-systemd` do. From the environment, all optional:
#   DESTDIR  put everything below this directory and touch nothing that runs, to build a package or an image
#   PREFIX   where the daemon's own virtual environment goes
#   PYTHON   what makes that environment, 3.11 or newer
set -euo pipefail
umask 022 # the service's user has to read all of it, whatever root's umask is

prefix=${PREFIX:-/opt/gcs-prefetchd}
readonly prefix=${prefix%/}
readonly python=${PYTHON:-python3}
destdir=${DESTDIR:-}
[ -z "$destdir" ] || destdir=$(realpath -m -- "$destdir")
readonly destdir
readonly venv=$destdir$prefix

# /usr/local/lib is where an administrator installs units by hand. In /etc/systemd/system the next upgrade would overwrite
# what `systemctl edit --full` wrote, and `systemctl mask` would find its place taken.
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
    # This directory is replaced as a whole, so PREFIX=/usr/local must not get through.
    if [ -e "$venv" ] && { [ ! -f "$venv/pyvenv.cfg" ] || [ ! -e "$venv/bin/gcs-prefetchd" ]; }; then
        rmdir -- "$venv" 2>/dev/null || fail "$venv: is not an installation of gcs-prefetchd; name another PREFIX"
    fi
    if [ -z "$destdir" ] && [ "$(id -u)" -ne 0 ]; then
        fail "this writes to /etc, /usr/local and $prefix; run it as root, or name a DESTDIR"
    fi
}

# The unit's ProtectHome= hides these from the service.
is_hidden_from_service() { [[ $1 =~ ^/(home|root|run/user)(/|$) ]]; }

check_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$python: not Python 3.11 or newer; name one: make install-systemd PYTHON=python3.12"
    "$python" -c 'import ensurepip' 2>/dev/null \
        || fail "$python: has no venv module; on Debian: apt-get install python3-venv"
    if is_hidden_from_service "$prefix"; then fail "$prefix: the service cannot see it; name another PREFIX"; fi
    local base
    base=$("$python" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
    # A staged tree may be made with a Python that lies elsewhere on the machine it is for.
    if [ -z "$destdir" ] && is_hidden_from_service "$base"; then
        fail "$python lies in $base, which the service cannot see; name another, as in PYTHON=/usr/bin/python3"
    fi
}

# The environment is made beside its place and moved there last, so that neither a failure nor an interrupt leaves half of
# one, and a failed upgrade leaves the old one.
install_venv() {
    trap put_back EXIT
    rm -rf -- "$venv.new" "$venv.old"
    mkdir -p -- "$(dirname -- "$venv")"
    "$python" -m venv "$venv.new"
    "$venv.new/bin/python" -m pip install --quiet --upgrade pip
    "$venv.new/bin/python" -m pip install --quiet --constraint constraints.txt .
    # Scripts name their interpreter by its full path, and the path is about to change.
    grep -rlIZF -- "$venv.new" "$venv.new/bin" "$venv.new/pyvenv.cfg" | xargs -0 sed -i "s|$venv.new|$prefix|g"
    [ ! -e "$venv" ] || mv -- "$venv" "$venv.old"
    mv -- "$venv.new" "$venv"
    rm -rf -- "$venv.old"
    trap - EXIT
}

put_back() {
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

tell_systemd() {
    systemd-sysusers "$sysusers"
    systemctl daemon-reload
}

print_next_steps() {
    echo "installed gcs-prefetchd in $venv. Next, as root:"
    if ! systemd_runs_here; then
        echo "  systemd-sysusers && systemctl daemon-reload       once this is in place and systemd runs"
    fi
    cat <<STEPS
  \$EDITOR /etc/gcs-prefetchd/config.toml            name your data roots
  systemctl enable --now gcs-prefetchd              start it, now and at each boot
  systemctl restart gcs-prefetchd                   instead, after an upgrade; the cache stays
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
  gcs-prefetchd                 the user and the group: userdel gcs-prefetchd, once no file is theirs
KEPT
}

cd -- "$(dirname -- "$0")/.."
check_paths
case ${1:-} in
    install)
        check_python
        install_venv
        install_files
        if systemd_runs_here; then tell_systemd; fi
        print_next_steps
        ;;
    uninstall) uninstall ;;
    *) fail "usage: $0 install|uninstall" ;;
esac
