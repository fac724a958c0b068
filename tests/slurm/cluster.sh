#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, for the tests: slurmctld, slurmd, slurmdbd on MariaDB, munge. Root only.
# usage: cluster.sh up|down
#   ROOT     where its state stands
#   NETNS=1  a network namespace, hostname and address for each node, so that they are different hosts
# Debian: slurmctld slurmd slurm-client munge slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core
#         iproute2
set -euo pipefail

ROOT=${ROOT:-/tmp/relora-slurm}
DATABASE=${DATABASE:-/dev/shm/relora-slurm-db}
NETNS=${NETNS:-1}
NODES=2
CPUS=8      # more than there are: the tests' jobs are small
MEMORY=8000 # MiB a node
HOST=$(hostname -s)
# The default place: submitit strips SLURM_* from the environment of what it submits, SLURM_CONF with it.
CONF=/etc/slurm/slurm.conf

if [ "$NETNS" = 1 ]; then CONTROLLER=10.99.0.1; else CONTROLLER=127.0.0.1; fi
node_address() { if [ "$NETNS" = 1 ]; then echo "10.99.0.$((10 + $1))"; else echo 127.0.0.1; fi; }
node_host() { if [ "$NETNS" = 1 ]; then echo "n$1"; else echo "$HOST"; fi; }

wait_for() {
  for _ in $(seq 200); do
    if eval "$1" >/dev/null 2>&1; then return 0; fi
    sleep 0.1
  done
  echo "not within 20 s: $1" >&2
  return 1
}

network_up() {
  getent hosts "$HOST" >/dev/null || echo "127.0.0.1 $HOST" >>/etc/hosts
  for i in $(seq $NODES); do
    grep -q "[[:space:]]n$i\$" /etc/hosts || echo "$(node_address "$i") n$i" >>/etc/hosts
  done
  [ "$NETNS" = 1 ] || return 0
  ip link add slbr0 type bridge
  ip addr add "$CONTROLLER/24" dev slbr0
  ip link set slbr0 up
  for i in $(seq $NODES); do
    ip netns add "n$i"
    ip link add "sl$i" type veth peer name eth0 netns "n$i"
    ip link set "sl$i" master slbr0 up
    ip -n "n$i" addr add "$(node_address "$i")/24" dev eth0
    ip -n "n$i" link set eth0 up
    ip -n "n$i" link set lo up
  done
}

munge_up() {
  install -d -o munge -g munge -m 755 /run/munge
  [ -f /etc/munge/munge.key ] || setpriv --reuid=munge --regid=munge --clear-groups mungekey --create
  munge -n >/dev/null 2>&1 || setpriv --reuid=munge --regid=munge --clear-groups munged --force >/dev/null 2>&1
}

accounting_up() {
  if [ ! -d "$DATABASE/mysql" ]; then
    mariadb-install-db --no-defaults --user=root --datadir="$DATABASE" --auth-root-authentication-method=normal \
      --skip-test-db --innodb-flush-log-at-trx-commit=0 --innodb-log-file-size=16M \
      --innodb-buffer-pool-size=32M >"$ROOT/log/install-db.log" 2>&1
  fi
  install -d /run/mysqld
  mariadbd --no-defaults --user=root --datadir="$DATABASE" --socket=/run/mysqld/mysqld.sock \
    --pid-file="$ROOT/run/mariadbd.pid" --skip-networking --skip-grant-tables --innodb-buffer-pool-size=32M \
    --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
    --performance-schema=OFF --log-error="$ROOT/log/mariadb.log" >/dev/null 2>&1 </dev/null &
  disown
  wait_for 'test -S /run/mysqld/mysqld.sock'
  cat >/etc/slurm/slurmdbd.conf <<X
AuthType=auth/munge
DbdHost=localhost
DbdPort=16819
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/run/slurmdbd.pid
X
  chmod 600 /etc/slurm/slurmdbd.conf
  slurmdbd
  wait_for 'test -f "$ROOT/run/slurmdbd.pid"'
  wait_for 'sacctmgr -n -i show cluster'
  sacctmgr -n show cluster 2>/dev/null | grep -qw relora || sacctmgr -i -Q add cluster relora >/dev/null
}

configure() {
  echo "CgroupPlugin=cgroup/v1" >/etc/slurm/cgroup.conf # else slurmd wants a usable /sys/fs/cgroup
  : >/etc/slurm/gres.conf
  # cred_expire: a requeued job waits for it. preempt_send_user_signal: many clusters lack it, and one test takes it away.
  cat >"$CONF" <<X
ClusterName=relora
SlurmctldHost=$HOST($CONTROLLER)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd-%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
MaxArraySize=1001
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=1,requeue_delay=0
KillWait=2
MinJobAge=300
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$CONTROLLER
AccountingStoragePort=16819
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
NodeName=DEFAULT CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
$(for i in $(seq $NODES); do echo "NodeName=n$i NodeHostname=$(node_host "$i") NodeAddr=$(node_address "$i") Port=$((17000 + i))"; done)
PartitionName=debug Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL Default=NO State=UP MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
X
}

node_up() {
  if [ "$NETNS" = 1 ]; then
    nsenter --net="/run/netns/n$1" unshare --uts sh -c "hostname n$1; exec slurmd -N n$1" 2>>"$ROOT/log/stderr.log"
  else
    slurmd -N "n$1" 2>>"$ROOT/log/stderr.log"
  fi
}

kill_node() {
  ip netns pids "n$1" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
}

refuse_foreign() {
  if [ -f "$CONF" ] && ! grep -q '^ClusterName=relora$' "$CONF"; then
    echo "$CONF belongs to another cluster: this script would take its place" >&2
    exit 1
  fi
}

up() {
  refuse_foreign
  mkdir -p "$ROOT"/{state,log,run} /etc/slurm
  chmod 755 "$ROOT"
  for i in $(seq $NODES); do mkdir -p "$ROOT/n$i"; done
  network_up
  munge_up
  configure
  accounting_up
  slurmctld 2>>"$ROOT/log/stderr.log"
  for i in $(seq $NODES); do node_up "$i"; done
  wait_for '[ "$(sinfo -h -N -t idle -p debug -o %N | wc -l)" = "$NODES" ]'
}

# A daemon removes its pidfile when it ends; under a PID 1 that reaps nobody, `kill -0` sees it for ever.
stop() {
  [ -f "$1" ] || return 0
  kill "$(cat "$1")" 2>/dev/null || { rm -f "$1"; return 0; }
  wait_for "[ ! -f '$1' ]" || kill -9 "$(cat "$1")"
}

down() {
  refuse_foreign
  if [ -f "$ROOT/run/slurmctld.pid" ]; then
    scancel --full --signal=KILL --user=root 2>/dev/null || true
    scancel --user=root 2>/dev/null || true
    sleep 0.5
    scontrol shutdown 2>/dev/null || true
  fi
  for file in "$ROOT"/run/slurmd-*.pid "$ROOT"/run/slurmctld.pid "$ROOT"/run/slurmdbd.pid "$ROOT"/run/mariadbd.pid; do
    stop "$file"
  done
  pkill -9 slurmstepd 2>/dev/null || true
  for i in $(seq $NODES); do
    kill_node "$i"
    # A process in it would keep a namespace, and its end of the cable, alive.
    ip link del "sl$i" 2>/dev/null || true
    ip netns del "n$i" 2>/dev/null || true
    # In place: in a container /etc/hosts may be a mount that cannot be replaced.
    sed "/[[:space:]]n$i\$/d" /etc/hosts >"$ROOT/hosts"
    cat "$ROOT/hosts" >/etc/hosts
  done
  ip link del slbr0 2>/dev/null || true
  if [ -f /run/munge/munged.pid ]; then munged --stop >/dev/null 2>&1 || true; fi
  rm -rf "$ROOT" "$DATABASE"
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  kill-node) kill_node "$2" ;;
  start-node) node_up "$2" ;;
  *)
    echo "usage: $0 up|down|kill-node N|start-node N" >&2
    exit 2
    ;;
esac
