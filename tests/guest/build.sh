#!/usr/bin/env bash
# Builds the small Linux guest that the tests and the demo boot, and prints its directory:
#   vmlinuz     Debian's cloud kernel, unpacked (never installed)
#   initramfs   busybox, qemu-ga and fio with their libraries, the writer, the drivers, `init`
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
for tool in apt-get dpkg-deb gcc objdump cpio flock; do
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
others="busybox-static fio libaio1 libnuma1"
download() {
  local kernel agent
  kernel=$(kernel_package) && [ -n "$kernel" ] && agent=$(agent_packages) || return 1
  # shellcheck disable=SC2086 # lists of names
  apt-get download -qq "$kernel" $others $agent >>"$log" 2>&1 && echo "$kernel" >complete
}
have() { for name in $others; do compgen -G "${name}_*.deb" >/dev/null || return 1; done; }
if [ ! -e complete ] || ! have; then
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
cp "$files"/usr/bin/fio bin/
loader=$(find "$files" -name 'ld-linux-x86-64.so.2' | head -1)
libraries=$(find "$files" -type d -name x86_64-linux-gnu -path '*lib/*' | paste -sd:)
cp -L "$loader" lib64/ld-linux-x86-64.so.2

# Debian's fio is linked with the libraries of all storage that it knows, 80 MiB with what these need (Ceph, Gluster, RDMA, …).
# Here it has a disk: for the others there is one library that has their symbols and does nothing.
mkdir "$tmp/stub"
objdump -T bin/fio | awk '/\*UND\*/ && match($0, /\((GFAPI|LIBNBD|IBVERBS|RDMACM|LIBPMEM|LIBPMEMBLK|LIBRADOS|LIBRBD)[^)]*\)/) {
    print substr($0, RSTART + 1, RLENGTH - 2), $NF }
  /\*UND\*/ && $NF ~ /^(rados|rbd)_/ && !/\(/ { print "-", $NF }' >"$tmp/stub/symbols"
awk '{print "void " $2 "(void) { __builtin_trap(); }"}' "$tmp/stub/symbols" >"$tmp/stub/stub.c"
awk '$1 != "-" {of[$1] = of[$1] $2 "; "} END {for (v in of) print v " { " of[v] "};"}' "$tmp/stub/symbols" >"$tmp/stub/versions"
gcc -w -shared -fno-builtin -Wl,--version-script="$tmp/stub/versions" -o "$tmp/stub/libstub.so" "$tmp/stub/stub.c"
objdump -p bin/fio | awk '/NEEDED/ && /lib(gfapi|nbd|ibverbs|rdmacm|pmem|pmemblk|rados|rbd)\.so/ {print $2}' |
  xargs -I{} ln -s libstub.so "$tmp/stub/{}"
mkdir -p lib/x86_64-linux-gnu
cp -P "$tmp"/stub/*.so* lib/x86_64-linux-gnu/
for program in usr/sbin/qemu-ga bin/fio; do
  needed=$("$loader" --library-path "$libraries:$tmp/stub" --list "$program")
  if lost=$(grep 'not found' <<<"$needed"); then fail "libraries of $program: $lost"; fi
  awk '/=> \//{print $3}' <<<"$needed" | grep -v "^$tmp/stub/" | xargs -I{} cp -L {} lib/x86_64-linux-gnu/
done
find . | sort | cpio -o -H newc -R 0:0 --quiet >../initramfs
cd ..
rm -rf root kernel files stub
: >"done"
rm -rf "$guest"
mv "$tmp" "$guest"
echo "$guest"
