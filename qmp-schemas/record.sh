#!/usr/bin/env bash
# Records what QEMU's QMP schema says about what used.json lists: qemu-MAJOR.MINOR.json beside this script.
#   record.sh [qemu-system-x86_64]...      default: the installed QEMU, and the one that tests/setup.sh unpacked
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${LIVEBACKUP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/livebackup}
[ $# -gt 0 ] || set -- /usr/bin/qemu-system-x86_64 "$cache/qemu-7.2/qemu-system-x86_64"
for qemu; do
  version=$("$qemu" --version | sed -n 's/^QEMU emulator version \([0-9]*\.[0-9]*\).*/\1/p')
  [ -n "$version" ] || { echo "$qemu does not tell its version"; exit 1; }
  coproc QEMU { exec "$qemu" -machine none -nodefaults -display none -qmp stdio; }
  printf '%s\n' '{"execute":"qmp_capabilities"}' '{"execute":"query-qmp-schema"}' >&"${QEMU[1]}"
  # The greeting, the empty reply, the schema; `quit` any earlier would cut it off.
  answer=$(head -n 3 <&"${QEMU[0]}")
  kill "$QEMU_PID"
  wait "$QEMU_PID" 2>/dev/null || true
  "$here/reduce.py" "$version" <<<"$answer" >"$here/qemu-$version.json.new"
  mv "$here/qemu-$version.json.new" "$here/qemu-$version.json"
  echo "recorded $here/qemu-$version.json"
done
