#!/usr/bin/env bash
# Builds the small Linux guest that the tests and the demo boot, and prints its directory:
#   vmlinuz     Debian's cloud kernel, unpacked (never installed)
#   initramfs   busybox, qemu-ga with its libraries, the writer, the drivers, `init`
#   writer      the writer and checker (writer.c), static: for the host too
# Needs no root, only what tests/setup.sh installs. Cache: $LIVEBACKUP_CACHE, default ~/.cache/livebackup. The
# directory's name has the hash of what it is made from: a changed script makes a new guest, and a second run nothing.
set -euo pipefail
export LC_ALL=C.UTF-8
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${LIVEBACKUP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/livebackup}
hash=$(cat "$here/build.sh" "$here/init" "$here/writer.c" | sha256sum | cut -c1-12)
guest=$cache/guest/$hash
if [ -e "$guest/done" ]; then
  touch "$guest/done"
  echo "$guest"
  exit
fi
fail() { echo "$*" >&2; exit 1; }
for tool in apt-get dpkg-deb gcc cpio flock; do
  command -v "$tool" >/dev/null || fail "$tool is missing: run tests/setup.sh first"
done

# One builder at a time; who waited finds the work done.
mkdir -p "$cache/guest"
exec 9>"$cache/guest/lock"
flock 9
if [ -e "$guest/done" ]; then echo "$guest"; exit; fi
find "$cache/guest" -maxdepth 2 -name 'done' -mtime +14 -printf '%h\0' | xargs -0r rm -rf
rm -rf "$cache"/guest/*.tmp
tmp=$guest.tmp
mkdir -p "$tmp/root" "$cache/guest/debs"
log=$cache/guest/build.log
: >"$log"

# The packages, kept for the next build. Where the lists are older than the mirror, they are read again, once.
cd "$cache/guest/debs"
kernel_package() { apt-cache depends linux-image-cloud-amd64 2>>"$log" | awk '/Depends: linux-image-[0-9]/{print $2; exit}'; }
agent_packages() {
  apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances \
    qemu-guest-agent 2>>"$log" | grep -E '^(qemu-guest-agent|lib[a-z0-9.-]*|zlib1g)$' | grep -v perl
}
download() {
  local kernel agent
  kernel=$(kernel_package) && [ -n "$kernel" ] && agent=$(agent_packages) || return 1
  # shellcheck disable=SC2086 # a list of names
  apt-get download -qq "$kernel" busybox-static $agent >>"$log" 2>&1 && echo "$kernel" >complete
}
if [ ! -e complete ]; then
  echo "downloading the guest's packages" >&2
  if ! download; then
    [ "$(id -u)" = 0 ] || fail "cannot download the guest's packages (see $log); try: sudo apt-get update"
    apt-get -o DPkg::Lock::Timeout=600 -qq update >>"$log" 2>&1 || true
    rm -f ./*.deb
    download || { tail -5 "$log" >&2; fail "cannot download the guest's packages; the whole log is $log"; }
  fi
fi
kernel=$(cat complete)
mkdir "$tmp/kernel" "$tmp/files"
for deb in *.deb; do
  case $deb in
    linux-image-*) dpkg-deb -x "$deb" "$tmp/kernel" ;;
    *) dpkg-deb -x "$deb" "$tmp/files" ;;
  esac
done
cd "$tmp"

version=${kernel#linux-image-}
cp "kernel/boot/vmlinuz-$version" vmlinuz

# The drivers, each after those that it depends on. What is built in is no file.
mkdir root/modules
add_module() {
  local file name
  [ ! -e "root/modules/$1.ko" ] || return 0
  file=$(find "kernel/lib/modules/$version" -name "$1.ko" -o -name "${1//_/-}.ko" | head -1)
  if [ -z "$file" ]; then
    grep -qE "/(${1}|${1//_/-})\.ko$" "kernel/lib/modules/$version/modules.builtin" || fail "the kernel has no $1"
    return 0
  fi
  cp "$file" "root/modules/$1.ko"
  for name in $(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p' | tr ',-' ' _'); do add_module "$name"; done
  echo "$1" >>root/modules/order
}
for module in virtio_pci virtio_blk virtio_console virtio_scsi virtio_net sd_mod nvme ext4 loop dm_mod dm_snapshot; do add_module "$module"; done

# The writer, for the guest and for the host.
gcc -O2 -Wall -Wextra -Werror -static -pthread -o writer "$here/writer.c"

# The initramfs, not compressed: unpacking it under emulation would cost more than reading it.
cd root
mkdir -p bin dev etc lib lib64 mnt proc run sys tmp usr/sbin var
ln -s ../run var/run
files=$tmp/files
cp "$files"/bin/busybox bin/
for applet in $(bin/busybox --list); do [ "$applet" = busybox ] || ln -s busybox "bin/$applet"; done
install -m 755 "$here/init" init
cp ../writer bin/
cp "$files"/usr/sbin/qemu-ga usr/sbin/
loader=$(find "$files" -name 'ld-linux-x86-64.so.2' | head -1)
libraries=$(find "$files" -type d -name x86_64-linux-gnu -path '*lib/*' | paste -sd:)
cp -L "$loader" lib64/ld-linux-x86-64.so.2
needed=$("$loader" --library-path "$libraries" --list usr/sbin/qemu-ga)
if lost=$(grep 'not found' <<<"$needed"); then fail "libraries of qemu-ga: $lost"; fi
mkdir -p lib/x86_64-linux-gnu
awk '/=> \//{print $3}' <<<"$needed" | xargs -I{} cp -L {} lib/x86_64-linux-gnu/
find . | sort | cpio -o -H newc -R 0:0 --quiet >../initramfs
cd ..
rm -rf root kernel files
: >"done"
rm -rf "$guest"
mv "$tmp" "$guest"
echo "$guest"
