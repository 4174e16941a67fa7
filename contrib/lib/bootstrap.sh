# What contrib/quickstart and contrib/check share: Debian packages that are missing, and a virtual environment.
# Sourced by bash, with $root set to the checkout.

if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi

say() { printf '%s==> %s%s\n' "$bold" "$*" "$plain"; }

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

have_program() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null; }

# Whether a need, named as in packages_for, is met.
have() {
    case $1 in
        libfuse.so.2) PATH="$PATH:/usr/sbin:/sbin" ldconfig -p | grep -q 'libfuse\.so\.2 ' ;;
        mod_sftp.so) [ -e /usr/lib/proftpd/mod_sftp.so ] || compgen -G '/usr/lib*/*/proftpd/mod_sftp.so' >/dev/null ;;
        sftp-server) [ -x /usr/lib/openssh/sftp-server ] || [ -x /usr/libexec/openssh/sftp-server ] ;;
        gesftpserver) [ -x /usr/libexec/gesftpserver ] ;;
        venv) "$python" -c 'import ensurepip, venv' 2>/dev/null ;;
        *) have_program "$1" ;;
    esac
}

# The Debian package that meets a need; most are called like it.
package_for() {
    case $1 in
        fusermount3) echo fuse3 ;;
        libfuse.so.2) if [ -n "$(apt-cache -n search '^libfuse2t64$')" ]; then echo libfuse2t64; else echo libfuse2; fi ;;
        venv | python3) echo python3-venv ;;
        ssh | sftp | ssh-keygen) echo openssh-client ;;
        sshd) echo openssh-server ;;
        sftp-server) echo openssh-sftp-server ;;
        dropbear) echo dropbear-bin ;; # without the service
        proftpd) echo proftpd-core ;;
        mod_sftp.so) echo proftpd-mod-crypto ;;
        unshare) echo util-linux ;;
        systemd-analyze) echo systemd ;;
        borg) echo borgbackup ;;
        gpg) echo gnupg ;;
        *) echo "$1" ;;
    esac
}

# need WHAT...: install the packages of those that are missing, with sudo where we are not root.
need() {
    local what missing=() packages=() as_root=()
    for what in "$@"; do have "$what" || missing+=("$what"); done
    [ ${#missing[@]} -eq 0 ] && return
    have_program apt-get ||
        fail "missing here: ${missing[*]}. Install them (this script knows how on Debian and Ubuntu only), then run it again."
    if [ "$(id -u)" -ne 0 ]; then
        have_program sudo || fail "missing here: ${missing[*]}, and no sudo to install them: run this script once as root."
        as_root=(sudo)
    fi
    say "Installing what is missing here: ${missing[*]}${as_root:+ (with sudo)}"
    "${as_root[@]}" apt-get update -qq || fail "apt-get update failed; see above. Mend the package sources or the network."
    for what in "${missing[@]}"; do packages+=("$(package_for "$what")"); done
    mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
    install_without_services "${packages[@]}" || fail "apt-get could not install ${packages[*]}; see above."
    for what in "${missing[@]}"; do have "$what" || fail "$what is still missing after apt-get installed ${packages[*]}."; done
}

# Servers start and enable services when they are installed; only the binaries are wanted.
install_without_services() (
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap '"${as_root[@]}" rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
        "${as_root[@]}" chmod 755 "$policy"
    fi
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    status=$?
    for package in "$@"; do
        case $package in
            openssh-server) disable_services ssh ssh.service ssh.socket ;;
            proftpd-core) disable_services proftpd proftpd.service proftpd.socket ;;
            tinysshd) disable_services tinysshd tinysshd.socket ;;
        esac >/dev/null 2>&1
    done
    exit "$status"
)

# disable_services SCRIPT UNIT...: at the next boot too, where an init script of that name or the units would start them.
disable_services() {
    local script=$1
    shift
    if have_program systemctl; then
        "${as_root[@]}" systemctl disable --quiet "$@"
    else
        "${as_root[@]}" deb-systemd-helper disable "$@"
        "${as_root[@]}" update-rc.d "$script" disable
    fi
}

# find_python: set $python, and install it where there is none.
find_python() {
    python=${PYTHON:-python3}
    need "$python" venv
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9, 2))' ||
        fail "$("$python" --version) is too old: Python 3.9.2 or newer is needed (name it with PYTHON=/path/to/python3)."
}

# Whether this user can mount and unmount, in a sentence where not.
need_fuse() {
    [ -e /dev/fuse ] || [ "$(id -u)" -ne 0 ] || modprobe fuse 2>/dev/null || true
    [ -e /dev/fuse ] ||
        fail "there is no /dev/fuse: load the kernel's module with 'sudo modprobe fuse'; a container needs to be started with --device /dev/fuse --cap-add SYS_ADMIN."
    if ! { : <>/dev/fuse; } 2>/dev/null; then
        fail "/dev/fuse may not be opened by $(id -un): run 'sudo chmod 0666 /dev/fuse' (what Debian's own rules set it to), then this script again."
    fi
    [ -e /etc/mtab ] || [ "$(id -u)" -eq 0 ] ||
        fail "there is no /etc/mtab, without which fusermount3 lets only root unmount: run 'sudo ln -s /proc/self/mounts /etc/mtab', then this script again."
}

# make_venv EXTRA: set $venv to a virtual environment with this checkout's sftpmount, its dependencies and those of EXTRA.
# $SFTPMOUNT_VENV, else .venv in the checkout, else (where the checkout belongs to somebody else) one in the user's cache.
make_venv() {
    local stamp copy each
    venv=${SFTPMOUNT_VENV:-$root/.venv}
    if [ -z "${SFTPMOUNT_VENV:-}" ] && ! { mkdir -p "$venv" 2>/dev/null && [ -w "$venv" ] && [ -O "$venv" ]; }; then
        venv=${XDG_CACHE_HOME:-$HOME/.cache}/sftpmount/venv
    fi
    mkdir -p "$venv" || fail "cannot make $venv: name another directory with SFTPMOUNT_VENV=..."
    stamp=$(
        "$python" -c 'import sys; print(sys.version, sys.base_prefix)'
        cd "$root" && find sftpmount setup.cfg pyproject.toml README.md LICENSE -type f ! -name '*.pyc' -print0 |
            sort -z | xargs -0 sha256sum | sha256sum
    )
    [ "$(cat "$venv/stamp-$1" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c 'import sftpmount' 2>/dev/null && return
    say "Installing Python packages into $venv"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$venv" || fail "cannot make a virtual environment in $venv; see above."
    fi
    # From a copy: a build leaves files in its source tree, which may not be ours.
    copy=$(mktemp -d) || fail "cannot make a temporary directory."
    cp -R "$root/sftpmount" "$root/contrib" "$root/setup.cfg" "$root/pyproject.toml" "$root"/*.md "$root/LICENSE" "$copy/"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23" &&
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "${copy}[$1]"
    local status=$?
    rm -rf "$copy"
    [ "$status" -eq 0 ] || fail "pip could not install the Python packages; see above. Is the network there?"
    for each in "$venv"/stamp-*; do # what an older checkout installed no longer holds
        [ "$(cat "$each" 2>/dev/null)" = "$stamp" ] || rm -f "$each"
    done
    printf '%s' "$stamp" >"$venv/stamp-$1"
}
