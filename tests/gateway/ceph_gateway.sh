#!/usr/bin/env bash
# A one-node Ceph cluster in memory with its S3 gateway on loopback, for src/durable/s3_gateway_test.cc and tests/process/test_durable_s3.py.
#   ceph_gateway.sh check        succeeds if the programs are installed (Debian: ceph-mon ceph-osd radosgw ceph-common)
#   ceph_gateway.sh install      installs them, as root
#   ceph_gateway.sh start DIR [PID]
#                                starts it with everything below the new directory DIR and prints the endpoint, when that answers;
#                                it is stopped, and DIR removed, when the process PID has ended in whatever way
#   ceph_gateway.sh down DIR     kills the gateway alone: what the store holds stays, nobody answers
#   ceph_gateway.sh up DIR       starts it again, and returns when that answers
#   ceph_gateway.sh stop DIR     ends what `start DIR` started
# The user has the access key "testkey" and the secret key "testsecret". Nothing in it survives, nothing in it is protected: only for tests.
set -euo pipefail

packages=(ceph-mon ceph-osd radosgw ceph-common)
programs=(ceph-mon ceph-osd radosgw ceph ceph-authtool monmaptool radosgw-admin)

die() {
  echo "ceph_gateway: $*" >&2
  exit 1
}

# Waits up to 60 s for a command to succeed.
await() {
  local what=$1 tries
  shift
  for ((tries = 0; tries < 200; ++tries)); do
    if "$@" >/dev/null 2>&1; then return; fi
    sleep 0.3
  done
  die "$what did not come up; logs are in $dir/log"
}

# Starts a program of the cluster in its own session, so that it outlives this script, and notes its process.
launch() {
  local name=$1
  shift
  setsid "$@" --conf "$dir/ceph.conf" --foreground >"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

configure() {
  mkdir -p "$dir"/{log,run,mon,osd,rgw}
  cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = v1:127.0.0.1:$mon_port
keyring = $dir/keyring
run dir = $dir/run
admin socket = $dir/run/\$name.\$pid.asok
log file = $dir/log/\$name.log
mon data = $dir/mon
osd data = $dir/osd
rgw data = $dir/rgw
public addr = 127.0.0.1
cluster addr = 127.0.0.1
# One copy, in memory, in few groups: quick to make and to throw away.
osd objectstore = memstore
memstore device bytes = 4294967296
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon max pg per osd = 1000
osd crush chooseleaf type = 0
# The disk of a build machine may be as full as it likes.
mon data avail crit = 1
mon data avail warn = 1
auth allow insecure global id reclaim = false
rgw frontends = beast endpoint=127.0.0.1:$s3_port
CONF
  ceph-authtool --create-keyring "$dir/keyring" --gen-key --name mon. --cap mon 'allow *'
  local name
  for name in client.admin client.rgw.test osd.0; do
    ceph-authtool "$dir/keyring" --gen-key --name "$name" --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  done
}

start() {
  [[ ! -e $dir ]] || die "$dir exists"
  if [[ -n $owner ]]; then
    setsid bash -c 'tail --pid="$1" -f /dev/null; "$2" stop "$3"; rm -rf "$3"' watch "$owner" "$self" "$dir" >/dev/null 2>&1 </dev/null &
  fi
  mon_port=$(free_port)
  s3_port=$(free_port)
  configure >/dev/null
  local ask=(timeout 5 ceph --conf "$dir/ceph.conf")
  monmaptool --create --addv a "[v1:127.0.0.1:$mon_port]" --fsid "$(sed -n 's/^fsid = //p' "$dir/ceph.conf")" "$dir/monmap" >/dev/null
  ceph-mon --mkfs --id a --monmap "$dir/monmap" --keyring "$dir/keyring" --conf "$dir/ceph.conf" >"$dir/log/mkfs.out" 2>&1
  launch mon ceph-mon --id a
  await "the monitor" "${ask[@]}" status
  local osd_id
  osd_id=$(cat /proc/sys/kernel/random/uuid)
  "${ask[@]}" osd create "$osd_id" 0 >/dev/null
  ceph-osd --id 0 --mkfs --osd-uuid "$osd_id" --conf "$dir/ceph.conf" >>"$dir/log/mkfs.out" 2>&1
  launch osd ceph-osd --id 0
  await "the storage daemon" sh -c "timeout 5 ceph --conf '$dir/ceph.conf' osd stat | grep -q '1 up'"
  up
  radosgw-admin --conf "$dir/ceph.conf" --name client.rgw.test user create --uid test --display-name test \
    --access-key testkey --secret-key testsecret >"$dir/log/user.out" 2>&1
  echo "http://127.0.0.1:$s3_port"
}

up() {
  local port
  kill_programs rgw  # One that was killed may not have let go of the port yet.
  port=$(sed -n 's/^rgw frontends = .*:\([0-9]*\)$/\1/p' "$dir/ceph.conf")
  launch rgw radosgw --name client.rgw.test
  await "the gateway" bash -c "exec 3<>/dev/tcp/127.0.0.1/$port"
}

# Sends SIGKILL to a program of the cluster and prints its process; nothing if it does not run.
kill_program() {
  local pid
  [[ -e $dir/$1.pid ]] || return 0
  pid=$(<"$dir/$1.pid")
  # The pid may be somebody else's by now: only a process that runs with our configuration is ours.
  tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$dir/ceph.conf" || return 0
  kill -KILL "$pid"
  echo "$pid"
}

# Returns when they have ended.
kill_programs() {
  local name pid tries
  for name in "$@"; do
    pid=$(kill_program "$name")
    for ((tries = 0; tries < 100; ++tries)); do
      [[ -n $pid && -e /proc/$pid ]] || break
      sleep 0.05
    done
  done
}

down() {
  kill_program rgw >/dev/null
}

stop() {
  kill_programs rgw osd mon
}

verb=${1:-}
dir=${2:-}
owner=${3:-}
self=$(realpath "$0")
case $verb in
  check)
    for program in "${programs[@]}"; do command -v "$program" >/dev/null || exit 1; done
    ;;
  install)
    [[ $(id -u) == 0 ]] || die "install as root: apt-get install --no-install-recommends ${packages[*]}"
    echo "ceph_gateway: installing ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
    ;;
  start | down | up | stop)
    [[ $dir == /* ]] || die "name a directory by its absolute path"
    "$verb"
    ;;
  *) die "check, install, start DIR [PID], down DIR, up DIR or stop DIR" ;;
esac
