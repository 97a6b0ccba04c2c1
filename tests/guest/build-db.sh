#!/usr/bin/env bash
# Builds the disk of the guest with databases, and prints its directory:
#   db.raw   an ext4 root file system (sparse): PostgreSQL 15, MariaDB 10.11, Redis 7, their clients, qemu-ga
# It boots with the kernel and initramfs of build.sh. Its packages are unpacked and not installed: no service manager; what
# runs is `init-db`. Needs only what tests/setup.sh installs (as another user than root: uidmap, too). Cached as build.sh
# caches: the directory's name has the hash of what it is made from.
set -euo pipefail
export LC_ALL=C.UTF-8
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${LIVEBACKUP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/livebackup}
hash=$(cat "$here/build-db.sh" "$here/setup-db" "$here/init-db" | sha256sum | cut -c1-12)
guest=$cache/guest/db-$hash
if [ -e "$guest/done" ]; then
  touch "$guest/done"
  echo "$guest"
  exit
fi
fail() { echo "$*" >&2; exit 1; }
for tool in mmdebstrap mke2fs flock; do
  command -v "$tool" >/dev/null || fail "$tool is missing: run tests/setup.sh first"
done
mkdir -p "$cache/guest"
exec 9>"$cache/guest/lock"
flock 9
if [ -e "$guest/done" ]; then echo "$guest"; exit; fi
rm -rf "$cache"/guest/*.tmp
find "$cache/guest" -maxdepth 2 -name 'done' -mtime +14 -printf '%h\0' | xargs -0r rm -rf
tmp=$guest.tmp
mkdir -p "$tmp"
log=$cache/guest/build-db.log
echo "building the guest with databases (about a minute)" >&2
without() { for path; do printf '%s\n' "--dpkgopt=path-exclude=$path"; done; }
mapfile -t slim < <(without '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' '/usr/share/info/*' \
  '/usr/lib/x86_64-linux-gnu/libLLVM*' '/usr/lib/x86_64-linux-gnu/libz3*' '/usr/lib/postgresql/15/lib/bitcode/*' \
  '/usr/share/perl*' '/usr/lib/x86_64-linux-gnu/perl*' '/usr/share/zoneinfo/right/*' '/usr/bin/redis-benchmark')
packages=busybox-static,qemu-guest-agent,util-linux,e2fsprogs,postgresql-15,mariadb-server-core,mariadb-client-core,redis-server
if ! mmdebstrap --quiet --variant=extract --format=null --aptopt='Apt::Install-Recommends "false"' "${slim[@]}" \
  --include=$packages --extract-hook="$here/setup-db \"\$1\" '$tmp/db.raw' '$here/init-db'" bookworm >"$log" 2>&1; then
  tail -20 "$log" >&2
  fail "building the guest with databases failed; the whole log is $log"
fi
: >"$tmp/done"
rm -rf "$guest"
mv "$tmp" "$guest"
echo "$guest"
