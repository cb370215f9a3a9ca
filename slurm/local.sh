#!/usr/bin/env bash
# A throw-away multi-node SLURM on one machine, for the tests: real daemons, real schedulers.
#
#   slurm/local.sh start [NODES]   2 nodes unless told; returns when all of them are idle
#   eval "$(slurm/local.sh env)"   what a shell needs to talk to it
#   slurm/local.sh status          nodes and jobs
#   slurm/local.sh logs [LINES]    the ends of all daemons' logs
#   slurm/local.sh kill-node N     kill -9 of node N's daemon; what runs there runs on
#   slurm/local.sh start-node N    bring that node back
#   slurm/local.sh stop            cancel its jobs and stop what `start` started, nothing else
#
# All of it lives in $MOFO_SLURM_DIR: configuration, munge key and socket, spool, logs. Nothing under
# /etc is read or written. The daemons listen on 127.0.0.1 only, ports $MOFO_SLURM_PORT and up.
# Needs root, and Debian's slurm-wlm and munge, which `start` installs if they are missing.
set -euo pipefail
export LC_ALL=C

DIR=${MOFO_SLURM_DIR:-${TMPDIR:-/tmp}/mofo-slurm}
PORT=${MOFO_SLURM_PORT:-26817}
CPUS=128       # claimed per node, whatever the machine has: they only count for scheduling
MEMORY_MB=8192
GPUS=8         # pretended, so that scripts which ask for GPUs are accepted or refused as they would be
START_S=60     # until `start` gives up
STOP_S=10      # between TERM and KILL of a daemon
MARK=$DIR/.mofo-slurm
export SLURM_CONF=$DIR/slurm.conf

die() { echo "slurm/local.sh: $*" >&2; exit 1; }

launch() { # launch NAME COMMAND...: in a session of its own, its pid recorded
  local name=$1; shift
  setsid "$@" </dev/null >"$DIR/$name.out" 2>&1 &
  echo $! >"$DIR/$name.pid"
}

# A recorded pid counts only while its command line names our folder: pids are given out again.
runs() {
  local pid
  pid=$(cat "$DIR/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
  { tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -qF -- "$DIR/"
}

signal_one() { kill "-$1" "$(cat "$DIR/$2.pid")" 2>/dev/null || true; }

stop_one() {
  local name=$1 tenth
  if runs "$name"; then
    signal_one TERM "$name"
    for ((tenth = 0; tenth < STOP_S * 10; tenth++)); do runs "$name" || break; sleep 0.1; done
    if runs "$name"; then signal_one KILL "$name"; fi
  fi
  rm -f "$DIR/$name.pid"
}

start_munge() {
  mkdir -m 700 "$DIR/key"; mkdir "$DIR/munge"
  (umask 077; head -c 1024 /dev/urandom >"$DIR/key/munge.key")
  launch munged munged --foreground --num-threads=2 --key-file="$DIR/key/munge.key" \
    --socket="$DIR/munge/socket" --pid-file="$DIR/munge/pid" --seed-file="$DIR/munge/seed" \
    --log-file="$DIR/munge/munged.log"
  local tenth
  for ((tenth = 0; tenth < 100; tenth++)); do [ -S "$DIR/munge/socket" ] && return; sleep 0.1; done
  logs >&2; stop; die "munged did not start"
}

configure() { # configure NODES
  local host gpu; host=$(hostname -s)
  for ((gpu = 0; gpu < GPUS; gpu++)); do
    mknod -m 666 "$DIR/gpu$gpu" c 1 3 2>/dev/null || : >"$DIR/gpu$gpu"   # stands in for /dev/nvidia0
  done
  echo "NodeName=n[1-$1] Name=gpu File=$DIR/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  # cred_expire: also how long a requeued job waits before it starts again, by default 120 s.
  # NoInAddrAny: listen on the named address. config_overrides: believe the claimed CPUs.
  cat >"$SLURM_CONF" <<CONF
ClusterName=mofo-local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$DIR/state
SlurmctldPidFile=$DIR/state/slurmctld.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdSpoolDir=$DIR/spool-%n
SlurmdPidFile=$DIR/state/slurmd-%n.pid
SlurmdLogFile=$DIR/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
GresTypes=gpu
NodeName=n[1-$1] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + $1))] CPUs=$CPUS RealMemory=$MEMORY_MB Gres=gpu:$GPUS State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=2-0 DefaultTime=10 State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=2-0 DefaultTime=10 State=UP PriorityTier=2
CONF
}

start_node() { mkdir -p "$DIR/spool-n$1"; launch "slurmd-n$1" slurmd -D -N "n$1" -f "$SLURM_CONF"; }

start() {
  local nodes=${1:-2} node second
  [ "$(id -u)" = 0 ] || die "must run as root"
  case $nodes in [1-8]) ;; *) die "NODES is $nodes, but must be 1 to 8" ;; esac
  if runs slurmctld; then die "already running in $DIR; stop it first"; fi
  if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    { apt-get update -q && apt-get install -qy --no-install-recommends slurm-wlm munge; } >/dev/null
  fi
  if [ -e "$DIR" ] && [ ! -e "$MARK" ]; then die "$DIR is not one of ours; set MOFO_SLURM_DIR"; fi
  rm -rf "$DIR"; mkdir -p "$DIR/state"; : >"$MARK"
  start_munge
  configure "$nodes"
  launch slurmctld slurmctld -D -f "$SLURM_CONF"
  for ((node = 1; node <= nodes; node++)); do start_node "$node"; done
  for ((second = 0; second < START_S; second++)); do
    if [ "$(sinfo -h -N -p debug -o %T 2>/dev/null | grep -c '^idle$')" = "$nodes" ]; then
      sinfo -N -l -p debug; return
    fi
    sleep 1
  done
  logs >&2; stop; die "the nodes were not idle after $START_S s"
}

stop() {
  [ -e "$MARK" ] || return 0
  local name fifth
  if runs slurmctld; then
    timeout 10 scancel -f --user=root 2>/dev/null || true
    for ((fifth = 0; fifth < STOP_S * 5; fifth++)); do
      [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
      sleep 0.2
    done
  fi
  for name in "$DIR"/slurmd-*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do
    if [ -e "$name" ]; then stop_one "$(basename "$name" .pid)"; fi
  done
}

logs() {
  local file
  for file in "$DIR"/*.log "$DIR"/*.out "$DIR"/munge/*.log; do
    if [ -s "$file" ]; then echo "== $file"; tail -n "${1:-15}" "$file"; fi
  done
}

case ${1:-} in
  start) start "${@:2}" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  status) sinfo -N -l; squeue -l ;;
  logs) logs "${@:2}" ;;
  kill-node)
    runs "slurmd-n${2:?N}" || die "node $2 is not running"
    signal_one KILL "slurmd-n$2"; rm -f "$DIR/slurmd-n$2.pid" ;;
  start-node)
    start_node "${2:?N}"
    scontrol update nodename="n$2" state=resume 2>/dev/null || true ;;
  stop) stop ;;
  *) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
