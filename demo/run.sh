#!/usr/bin/env bash
# The demo: a Linux guest writes all the time to two disks (qcow2 and raw). It is backed up, fully and incrementally, in
# one process and over TCP; what was restored is proved by the guest's write log to be both disks at one instant; and a
# machine is started on restored disks. All in one temporary directory, which is kept when something fails.
#   demo/run.sh                    with the release build (`make demo` makes it); LIVEBACKUP names another program
#   demo/run.sh --guest-only       only the guest, the writer and the checker: no livebackup
set -euo pipefail
export LC_ALL=C.UTF-8
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=${LIVEBACKUP:-${CARGO_TARGET_DIR:-$here/../target}/release/livebackup}
qemu=${QEMU:-qemu-system-x86_64}
guest_only=
[ "${1:-}" != --guest-only ] || guest_only=1

seed=$((RANDOM * 32768 + RANDOM))
disk0_bytes=$((512 << 20)) # qcow2
disk1_bytes=$((256 << 20)) # raw
base_writes=20000          # made before the guest starts: 80 MB that an incremental leaves alone
pause_us=2000

# ---- steps, ends ----
work=$(mktemp -d "${TMPDIR:-/tmp}/livebackup-demo-XXXXXX")
began=$EPOCHREALTIME
declare -A ours=() # processes of ours that were not waited for: such a pid is nobody else's
summary=()
step() { printf '\n== %s\n' "$*"; }
fail() { echo "demo: $*" >&2; exit 1; }
end() {
  [ -n "${ours[$1]:-}" ] || return 0
  unset "ours[$1]"
  kill "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
}
on_exit() {
  local status=$? pid
  for pid in "${!ours[@]}"; do end "$pid"; done
  if [ $status = 0 ]; then
    rm -rf "$work"
  else
    if [ -s "$work/serve.log" ]; then tail -20 "$work/serve.log" >&2; fi
    echo "demo: FAILED; everything is kept in $work" >&2
  fi
}
trap on_exit EXIT
trap 'exit 130' INT TERM
since() { awk -v a="$1" -v b="$EPOCHREALTIME" 'BEGIN{printf "%.1f", b - a}'; }
mib() { du -sm "$1" | cut -f1; }
wait_for() { # what, seconds, command…
  local what=$1 tries=$(($2 * 20))
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $((tries--)) -gt 0 ] || fail "waited too long for $what"
    sleep 0.05
  done
}

# ---- the guest ----
files=$("$here/../tests/guest/build.sh")
sh_in() { python3 "$here/guest.py" sh "$work/$1.shell" "$2"; } # NAME COMMAND
boot() { # NAME FORMAT0 IMAGE0 IMAGE1: starts a guest with disks vd0 and vd1, and waits until it answers
  local name=$1 start=$EPOCHREALTIME
  "$qemu" -name "$name" -machine q35 -accel tcg -cpu max -m 256 -nodefaults -display none \
    -kernel "$files/vmlinuz" -initrd "$files/initramfs" \
    -append "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off no_timer_check random.trust_cpu=on apparmor=0 audit=0" \
    -serial "file:$work/$name.console" -qmp "unix:$work/$name.qmp,server=on,wait=off" -device virtio-serial-pci \
    -chardev "socket,id=agent,path=$work/$name.agent,server=on,wait=off" \
    -device virtserialport,chardev=agent,name=org.qemu.guest_agent.0 \
    -chardev "socket,id=shell,path=$work/$name.shell,server=on,wait=off" \
    -device virtserialport,chardev=shell,name=livebackup.shell \
    -blockdev "driver=$2,node-name=node0,discard=unmap,file.driver=file,file.filename=$3" \
    -device virtio-blk-pci,drive=node0,id=vd0,serial=vd0 \
    -blockdev "driver=raw,node-name=node1,discard=unmap,file.driver=file,file.filename=$4" \
    -device virtio-blk-pci,drive=node1,id=vd1,serial=vd1 </dev/null >"$work/$name.log" 2>&1 &
  booted=$!
  ours[$booted]=$name
  wait_for "QEMU to start (what it says: $work/$name.log)" 10 test -S "$work/$name.shell"
  sh_in "$name" "uname -sr" >/dev/null || { cat "$work/$name.log" "$work/$name.console"; fail "the guest does not answer"; }
  echo "the guest $name is up after $(since "$start") s"
}
written() { local n; n=$(sh_in demo "cat /run/written"); echo $((10#$n)); }
writing() { sh_in demo "kill -0 \$(cat /run/writer.pid)" || { sh_in demo "cat /run/writer.log"; fail "the writer has ended"; }; }

# ---- the proof ----
proved=
prove() { # IMAGE0 IMAGE1 AT_LEAST AT_MOST: both disks are of one instant, made between these writes
  local said
  said=$("$files/writer" check --seed "$seed" --at-least "$3" --at-most "$4" "$1" "$2") || { echo "$said"; fail "not proved: $1 $2"; }
  echo "$said (the backup ran during writes $3 to $4)"
  proved=$(sed -n 's/^proved: N=\([0-9]*\) .*/\1/p' <<<"$said")
}

# ---- livebackup ----
livebackup() {
  echo "\$ livebackup $*"
  "$program" "$@"
}
at_least=() at_most=() took=() grown=() # of each backup
backup() { # SOURCE REPO [OPTION…]: one backup while the guest writes, with the writes that it fell between
  local repo=$2 start before
  sleep 2
  writing
  before=$(mib "$repo")
  at_least+=("$(written)")
  start=$EPOCHREALTIME
  livebackup backup "$@"
  took+=("$(since "$start")")
  # One write more may have been on its way.
  at_most+=("$(($(written) + 1))")
  grown+=("$(($(mib "$repo") - before))")
  writing
}
restore_and_prove() { # REPO POINT DIR NUMBER-OF-THE-BACKUP
  livebackup restore "$1" "$2" "$3" --format raw
  [ "$(stat -c %s "$3/vd0.raw" "$3/vd1.raw" | xargs)" = "$disk0_bytes $disk1_bytes" ] || fail "a restored disk has another size"
  prove "$3/vd0.raw" "$3/vd1.raw" "${at_least[$4]}" "${at_most[$4]}"
  summary+=("backup $(($4 + 1)): $2 of ${1##*/}: ${took[$4]} s, repository +${grown[$4]} MiB, restored = the guest's disks after write $proved")
}

step "A guest with two disks, qcow2 and raw, that writes all the time"
truncate -s "$disk0_bytes" "$work/vd0.base"
truncate -s "$disk1_bytes" "$work/vd1.raw"
"$files/writer" write --seed "$seed" --buffered --count "$base_writes" "$work/vd0.base" "$work/vd1.raw"
qemu-img convert -O qcow2 "$work/vd0.base" "$work/vd0.qcow2"
rm "$work/vd0.base"
boot demo qcow2 "$work/vd0.qcow2" "$work/vd1.raw"
demo_pid=$booted
sh_in demo "writer write --seed $seed --from $base_writes --pause $pause_us --progress /run/written /dev/disk/vd0 /dev/disk/vd1 </dev/null >/run/writer.log 2>&1 & echo \$! >/run/writer.pid"
wait_for "the guest's first writes" 10 sh_in demo "[ \$(cat /run/written) -gt $base_writes ]"
sleep 1
echo "$(written) writes are complete, and more come"

if [ -n "$guest_only" ]; then
  step "Without livebackup: the machine is stopped for a copy of its disks"
  for round in 0 1; do
    sleep 1
    at_least[round]=$(written)
    python3 "$here/guest.py" qmp "$work/demo.qmp" stop >/dev/null
    mkdir "$work/copy$round"
    qemu-img convert -U -f qcow2 -O raw "$work/vd0.qcow2" "$work/copy$round/vd0.raw"
    cp --sparse=always "$work/vd1.raw" "$work/copy$round/vd1.raw"
    python3 "$here/guest.py" qmp "$work/demo.qmp" cont >/dev/null
    at_most[round]=$(($(written) + 1))
    prove "$work/copy$round/vd0.raw" "$work/copy$round/vd1.raw" "${at_least[round]}" "${at_most[round]}"
    summary+=("copy $round: the guest's disks after write $proved")
  done
  if "$files/writer" check --seed "$seed" "$work/copy0/vd0.raw" "$work/copy1/vd1.raw" >/dev/null; then
    fail "the checker takes disks of two instants"
  fi
  echo "disks of two instants are told apart"
  last=$work/copy1
else
  [ -x "$program" ] || fail "$program is missing: make demo builds it"
  # Nothing of the demo touches the user's own state.
  source=qmp:$work/demo.qmp
  repo=$work/repo state=(--state "$work/state" --scratch "$work/scratch")
  mkdir "$work/scratch"

  step "In one process: a full backup and an incremental one"
  livebackup init "$repo"
  livebackup disks "$source"
  backup "$source" "$repo" "${state[@]}"
  backup "$source" "$repo" "${state[@]}"
  livebackup points "$repo"
  livebackup verify "$repo"

  step "Restored and proved: both disks as they were at one instant"
  restore_and_prove "$repo" demo@latest~1 "$work/first" 0
  restore_and_prove "$repo" demo@latest "$work/second" 1

  step "The same over TCP: a server beside QEMU, a client with a repository of its own"
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  cat >"$work/livebackup.toml" <<END
listen = "127.0.0.1:$port"
state = "$work/state"

[[vm]]
name = "demo"
monitor = "$source"
END
  cat "$work/livebackup.toml"
  echo "\$ livebackup serve --config $work/livebackup.toml &"
  "$program" serve --config "$work/livebackup.toml" </dev/null >"$work/serve.log" 2>&1 &
  server=$!
  ours[$server]=server
  listening() { (: <"/dev/tcp/127.0.0.1/$port"); }
  wait_for "the server" 20 listening
  livebackup init "$work/repo2"
  backup "livebackup://127.0.0.1:$port/demo" "$work/repo2"
  backup "livebackup://127.0.0.1:$port/demo" "$work/repo2"
  livebackup points "$work/repo2"
  livebackup verify "$work/repo2"
  restore_and_prove "$work/repo2" demo@latest~1 "$work/third" 2
  restore_and_prove "$work/repo2" demo@latest "$work/fourth" 3
  end "$server"
  cat "$work/serve.log"
  last=$work/fourth
fi

step "The guest never noticed"
writing
echo "write $(written), no error; now it is powered off"
end "$demo_pid"

step "A machine starts on the restored disks and checks them from inside"
boot restored raw "$last/vd0.raw" "$last/vd1.raw"
said=$(sh_in restored "writer check --seed $seed --at-least $proved --at-most $proved /dev/disk/vd0 /dev/disk/vd1") || { echo "$said"; fail "the restored machine sees other disks"; }
echo "inside the restored machine: $said"
end "$booted"

step "Summary"
printf '%s\n' "${summary[@]}"
echo "disks: $((disk0_bytes >> 20)) MiB qcow2, $((disk1_bytes >> 20)) MiB raw; $(since "$began") s in all"
echo "demo: all proved"
