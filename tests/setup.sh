#!/usr/bin/env bash
# Installs what the tests and the demo need on Debian 12, and puts QEMU 7.2 beside the installed QEMU 10.0.
#   tests/setup.sh              all of it
#   tests/setup.sh --packages   only Debian's packages (enough for the demo)
#   tests/setup.sh --bench      those, and the programs that bench/throughput.py compares with (libvirt among them: only its
#                               programs, no service is started)
# Packages are installed as root; run by another user it names what is missing and how to install it. Does nothing where
# everything is there. Cache: $LIVEBACKUP_CACHE, default ~/.cache/livebackup.
set -euo pipefail
cache=${LIVEBACKUP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/livebackup}
mkdir -p "$cache"
# One at a time: apt would wait, but the unpacking would be done twice.
exec 9>"$cache/setup.lock"
flock 9
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
apt() { apt-get -o DPkg::Lock::Timeout=600 -qq -y --no-install-recommends "$@" >>"$cache/apt.log" 2>&1 || { tail -20 "$cache/apt.log"; echo "apt-get $* failed; the whole log is $cache/apt.log"; exit 1; }; }
installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
updated=
update() { [ -n "$updated" ] || apt update; updated=1; }

version=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p' || true)
qemu=
if [ "${version:-0}" -lt 10 ] || ! command -v qemu-img >/dev/null; then qemu="qemu-system-x86 and qemu-utils from bookworm-backports"; fi
missing=() others=()
[ "${1:-}" != --bench ] || others=(libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients virtnbdbackup restic borgbackup zstd)
for p in "${others[@]}" libnbd-bin nbdkit mmdebstrap cpio lvm2 busybox-static e2fsprogs gcc libc6-dev ovmf python3 mount fdisk shellcheck postgresql-client mariadb-client-core redis-tools; do installed "$p" || missing+=("$p"); done
if [ -n "$qemu${missing[*]}" ] && [ "$(id -u)" != 0 ]; then
  echo "These Debian packages are missing: $qemu ${missing[*]}"
  echo "Install them by:  sudo $(realpath "$0") ${1:---packages}"
  [ -n "$qemu" ] || echo "or by:            sudo apt-get install -y --no-install-recommends ${missing[*]}"
  echo "and run this again."
  exit 1
fi
if [ -n "$qemu" ]; then
  [ -e /etc/apt/sources.list.d/debian.sources ] || { echo "No /etc/apt/sources.list.d/debian.sources: install qemu-system-x86 and qemu-utils 10.0 or later yourself."; exit 1; }
  # The first stanza is the main archive; backports lies beside it on the same mirror.
  awk 'BEGIN{RS="";ORS="\n\n"} NR==1' /etc/apt/sources.list.d/debian.sources | sed 's/^Suites:.*/Suites: bookworm-backports/' >/etc/apt/sources.list.d/livebackup-backports.sources
  update
  echo "installing QEMU 10.0"
  apt install -t bookworm-backports qemu-system-x86 qemu-utils
fi
if [ ${#missing[@]} -gt 0 ]; then update; echo "installing ${missing[*]}"; apt install "${missing[@]}"; fi
case "${1:-}" in --packages | --bench) exit 0 ;; esac

# QEMU 7.2, unpacked and not installed.
q=$cache/qemu-7.2
if [ ! -x "$q/qemu-system-x86_64" ]; then
  [ "$(id -u)" != 0 ] || update
  echo "unpacking QEMU 7.2"
  rm -rf "$q.tmp"; mkdir -p "$q.tmp/deb" "$q.tmp/root"; cd "$q.tmp/deb"
  want() { apt-cache madison "$1" | awk -F'|' '{gsub(/ /,"",$2); print $2}' | grep -m1 '^1:7\.2'; }
  for p in qemu-system-x86 qemu-system-common qemu-system-data qemu-utils; do
    v=$(want "$p") || { echo "no $p 7.2 in the package lists; sudo apt-get update may help"; exit 1; }
    apt-get download -qq "$p=$v" 2>>"$cache/apt.log"
  done
  apt-get download -qq seabios ipxe-qemu 2>>"$cache/apt.log"
  for d in *.deb; do dpkg-deb -x "$d" ../root; done
  # Libraries that this version wants and the machine does not have.
  lib=../root/usr/lib/x86_64-linux-gnu
  for _ in 1 2 3; do
    lost=$(LD_LIBRARY_PATH=$lib ldd ../root/usr/bin/qemu-system-x86_64 ../root/usr/bin/qemu-img 2>/dev/null | awk '/not found/{print $1}' | sort -u)
    [ -n "$lost" ] || break
    for so in $lost; do
      name=$(echo "$so" | sed -E 's/^(lib.*)\.so\.([0-9]+).*/\1\2/; s/_/-/g' | tr '[:upper:]' '[:lower:]')
      for try in "$name" "$(echo "$name" | sed -E 's/([0-9])([0-9]+)$/\1-\2/')"; do apt-get download -qq "$try" 2>/dev/null && break; done
    done
    for d in *.deb; do dpkg-deb -x "$d" ../root; done
  done
  cd - >/dev/null
  for tool in qemu-system-x86_64 qemu-img qemu-io qemu-nbd; do
    extra=
    # shellcheck disable=SC2016 # these are for the wrapper to expand
    [ $tool != qemu-system-x86_64 ] || extra='-L "$here/root/usr/share/qemu" -L "$here/root/usr/share/seabios" -L "$here/root/usr/lib/ipxe/qemu"'
    # shellcheck disable=SC2016
    printf '#!/bin/sh\nhere=%s\nexport LD_LIBRARY_PATH="$here/root/usr/lib/x86_64-linux-gnu" QEMU_MODULE_DIR="$here/root/usr/lib/x86_64-linux-gnu/qemu"\nexec "$here/root/usr/bin/%s" %s "$@"\n' "'$q'" "$tool" "$extra" >"$q.tmp/$tool"
    chmod +x "$q.tmp/$tool"
  done
  rm -rf "$q" "$q.tmp/deb"; mv "$q.tmp" "$q"
  "$q/qemu-system-x86_64" --version | grep -q 'version 7\.2' || { echo "QEMU 7.2 does not run from $q"; "$q/qemu-system-x86_64" --version; exit 1; }
fi
